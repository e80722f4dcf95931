"""RecurrentState: all that a model remembers between two calls.

    logits, state = model(prefix, return_state=True)
    logits, state = model(suffix, state=state, return_state=True)      # equals the whole, at every split
    state["scan", 3]                                                   # batch channel state: the scan state of block 3
    state.save("after-chapter-1.safetensors")

Conv tails, scan states, shift tails and attention windows of every block, by name; a call never changes the state that
it was given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int
from safetensors.torch import save_file
from torch import Tensor

from gatedlens.errors import CheckpointError, InputError, did_you_mean
from gatedlens.files import read_tensors


class Carried(NamedTuple):
    """What a tensor of the state is: the `part` of its layer's memory (empty: it belongs to no layer alone), and its axes.

    divides: whether another one is divided by it, so that it must stay positive (or says how large both are)."""

    part: str
    axes: str
    divides: bool = False


CARRIED = {"scan": Carried("scan", "batch channel state"), "conv": Carried("conv", "batch tail channel")}


class RecurrentState:
    """`state[name, layer]` reads, `state[name, layer] = value` edits (same shape); `seen` counts each row's tokens."""

    def __init__(self, tensors: dict[str, Tensor], seen: Int[Tensor, " batch"], model_name: str = ""):
        self.tensors = tensors  # "blocks.3.scan" -> batch ...
        self.seen = seen
        self.model_name = model_name

    @staticmethod
    def key(name: str, layer: int) -> str:
        """`RecurrentState.key("scan", 3)`: "blocks.3.scan", the key of one part of a layer's state."""
        return f"blocks.{layer}.{name}"

    def _key(self, index: tuple[str, int] | str) -> str:
        if isinstance(index, str):
            key = index
        else:
            name, layer = index
            n_layers = 1 + max(int(k.split(".")[1]) for k in self.tensors)
            key = self.key(name, layer % n_layers if -n_layers <= layer < n_layers else layer)
        if key not in self.tensors:
            raise InputError(
                f"The state holds no {index!r}. It holds: {', '.join(self.tensors)}.{did_you_mean(key, self.tensors)}"
            )
        return key

    def __getitem__(self, index: tuple[str, int] | str) -> Tensor:
        return self.tensors[self._key(index)]

    def __setitem__(self, index: tuple[str, int] | str, value: Tensor) -> None:
        key = self._key(index)
        old = self.tensors[key]
        if value.shape != old.shape:
            raise InputError(f"{key} has shape {list(old.shape)}; the new value has shape {list(value.shape)}.")
        self.tensors[key] = value.to(old.dtype).to(old.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def batch_size(self) -> int:
        return int(self.seen.shape[0])

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def __repr__(self) -> str:
        shapes = ", ".join(f"{k} {list(t.shape)}" for k, t in list(self.tensors.items())[:4])
        more = f", and {len(self) - 4} more" if len(self) > 4 else ""
        return f"RecurrentState(seen {self.seen.tolist()}, {self.nbytes} bytes: {shapes}{more})"

    def map(self, function: Callable[[Tensor], Tensor]) -> RecurrentState:
        """`state.map(lambda t: t.half())`: a new state with the function of every tensor (`seen` is kept)."""
        return RecurrentState({k: function(t) for k, t in self.tensors.items()}, self.seen, self.model_name)

    def clone(self) -> RecurrentState:
        """`state.clone()`: a copy that shares no memory."""
        return self.map(torch.clone)

    def detach(self) -> RecurrentState:
        """`state.detach()`: the same numbers, without the history of gradients."""
        return self.map(torch.Tensor.detach)

    def to(self, device: torch.device | str) -> RecurrentState:
        """`state.to("cuda")`: the state on another device."""
        moved = self.map(lambda t: t.to(device))
        return RecurrentState(moved.tensors, self.seen.to(device), self.model_name)

    def rows(self, index: Tensor | list[int] | slice) -> RecurrentState:
        """The state of some rows of the batch, in that order (repeats are fine): `state.rows([0, 0, 0])`."""
        picked = self.map(lambda t: t[index])
        return RecurrentState(picked.tensors, self.seen[index], self.model_name)

    def repeated(self, n: int) -> RecurrentState:
        """`state.repeated(3)`: the batch `n` times over; what has one row is not copied."""

        def many(t: Tensor) -> Tensor:
            return t.expand(n, *t.shape).flatten(0, 1)

        return RecurrentState(self.map(many).tensors, many(self.seen), self.model_name)

    def save(self, path: str | Path) -> None:
        """`state.save("state.safetensors")`: write a safetensors file."""
        tensors = {k: t.detach().contiguous().cpu().clone() for k, t in self.tensors.items()}
        save_file({**tensors, "seen": self.seen.cpu()}, str(path), {"gatedlens": "state", "model": self.model_name})

    @staticmethod
    def load(path: str | Path) -> RecurrentState:
        """`RecurrentState.load("state.safetensors")`: read a file that `save` wrote; CheckpointError for any other."""
        tensors, meta = read_tensors(path)
        if meta.get("gatedlens") != "state" or "seen" not in tensors:
            raise CheckpointError(f"{path} is no saved RecurrentState: it holds {', '.join(list(tensors)[:5])}, ...")
        seen = tensors.pop("seen")
        if seen.dtype != torch.int64 or seen.ndim != 1 or bool((seen < 0).any()):
            raise CheckpointError(
                f"{path} is no saved RecurrentState: seen is {seen.dtype} {list(seen.shape)}; expected how many tokens each "
                "row has read, int64 [batch]."
            )
        for key, tensor in tensors.items():
            if not re.fullmatch(r"blocks\.\d{1,6}\.\w+", key):
                raise CheckpointError(
                    f"{path} is no saved RecurrentState: it holds {key!r}; expected names blocks.N.part."
                )
            if tensor.ndim == 0 or len(tensor) != len(seen):
                raise CheckpointError(
                    f"{path} is no saved RecurrentState: {key} has shape {list(tensor.shape)}; expected {len(seen)} rows, "
                    "as seen has."
                )
        order = sorted(tensors, key=lambda k: (int(k.split(".")[1]), k))
        return RecurrentState({k: tensors[k] for k in order}, seen, meta.get("model", ""))

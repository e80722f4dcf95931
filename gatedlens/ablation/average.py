"""Means: the mean activation of points over a data set, in one pass, nothing kept but sums.

    averages = gl.ablation.means(model, batches, ["blocks.*.mixer.hook_gate"])
    averages["blocks.3.mixer.hook_gate"]                            # 1 1 channel
    with gl.ablation.mean("blocks.*.mixer.hook_gate", averages).on(model): ...
    averages.save("means.safetensors"); gl.ablation.Means.load("means.safetensors")

Padding takes no part. `per_position` keeps the positions apart.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Bool
from safetensors.torch import save as to_bytes
from torch import Tensor
from tqdm.auto import tqdm

from gatedlens.address.names import Name, listed
from gatedlens.errors import CheckpointError, InputError, PointError, did_you_mean
from gatedlens.files import Fields, read_tensors, write_whole
from gatedlens.markup import card, table
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Input
from gatedlens.model.hookpoint import HookPoint, Saver
from gatedlens.options import checked
from gatedlens.runs import inputs

COUNTS = ("rows", "positions")


@dataclass(frozen=True)
class Means(Mapping[str, Tensor]):
    """`means["blocks.0.hook_mixer_out"]`: float64, batch (and pos, unless per_position) of size 1. `rows` and `positions`
    say of how many they are the means."""

    by_name: Mapping[str, Tensor]
    rows: int
    positions: int
    per_position: bool = False

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.by_name:
            raise PointError(f"These are not the means of {name!r}.{did_you_mean(name, self.by_name)}")
        return self.by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_name)

    def __len__(self) -> int:
        return len(self.by_name)

    def __repr__(self) -> str:
        return f"Means({len(self)} points, {self.rows} rows, {self.positions} positions: {', '.join(list(self)[:3])})"

    def _repr_html_(self) -> str:
        facts = {"points": len(self), "rows": self.rows, "positions": self.positions}
        rows = [(name, list(mean.shape), float(mean.norm())) for name, mean in self.by_name.items()]
        return card("Means" + " by position" * self.per_position, facts, table(["point", "shape", "norm"], rows))

    # -- on disk -------------------------------------------------------------------------------------------------

    @checked
    def save(self, path: str | Path) -> Path:
        """`averages.save("means.safetensors")`: write the means and of how many they are, as safetensors; returns the path."""
        facts = {"rows": self.rows, "positions": self.positions, "per_position": self.per_position}
        tensors = {name: mean.detach().cpu().contiguous() for name, mean in self.by_name.items()}
        write_whole(Path(path), to_bytes(tensors, {"gatedlens": "means", "facts": json.dumps(facts)}))
        return Path(path)

    @staticmethod
    @checked
    def load(path: str | Path) -> Means:
        """`Means.load("means.safetensors")`: what `save` wrote. CheckpointError for a file that holds none."""
        tensors, meta = read_tensors(path)
        if meta.get("gatedlens") != "means":
            raise CheckpointError(f"{path} holds no saved Means: it holds {', '.join(list(tensors)[:5])}.")
        told = Fields(meta, "Means", path, CheckpointError).get("facts", "JSON of how many they are of", is_json)
        facts = Fields(json.loads(told), "Means", f"{path}, field 'facts',", CheckpointError)
        rows, positions = (facts.get(one, "a whole number", lambda v: type(v) is int and v >= 0) for one in COUNTS)
        by_position = facts.get("per_position", "true or false", lambda v: isinstance(v, bool))
        for name, mean in tensors.items():
            if not mean.is_floating_point():
                raise CheckpointError(f"{path} holds no saved Means: {name} holds {mean.dtype}.")
        return Means(tensors, rows, positions, by_position)


def is_json(text: object) -> bool:
    try:
        return isinstance(json.loads(str(text)), dict)
    except (ValueError, RecursionError):
        return False


@dataclass
class Sums(Saver):
    """A hook that adds up what it hears, over rows and (unless `per_position`) positions that are `real`."""

    per_position: bool
    real: Bool[Tensor, "batch pos"] | None = None
    totals: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, tensor: Tensor, hook: HookPoint) -> None:
        assert self.real is not None
        name, x = hook.name or "", tensor.detach().double()
        count = x.new_full([1] * x.ndim, len(x))
        dims = [0]
        if hook.pos_dim is not None:
            shape = [len(x), *[x.shape[1 + d] if 1 + d == hook.pos_dim else 1 for d in range(x.ndim - 1)]]
            real = self.real.reshape(shape).to(x.device)
            dims = [0] if self.per_position else [0, hook.pos_dim]
            x, count = x.masked_fill(~real, 0), real.double().sum(dims, keepdim=True)
        total = x.sum(dims, keepdim=True)
        if name in self.totals:
            if self.totals[name].shape != total.shape:
                raise InputError(
                    f"{name} has other sizes in this batch than before: {list(total.shape)}, {list(self.totals[name].shape)}"
                    f" ({hook.point.axes}). Give batches of one length."
                )
            total, count = total + self.totals[name], count + self.counts[name]
        self.totals[name], self.counts[name] = total, count


@checked
@torch.no_grad()
def means(
    model: HookedModel,
    batches: str | Tensor | Iterable[Input],
    names: Name | Sequence[Name],
    per_position: bool = False,
    progress: bool = True,
) -> Means:
    """`gl.ablation.means(model, batches, "blocks.*.mixer.hook_gate")`: means over a data set, a `source` for `mean`.

    batches: inputs of the model, one after another: texts, lists of texts, ids [batch, pos], pairs (ids, mask), images; one
    tensor, or one text, is one batch. names: points, by name, alias or glob, lazy ones too. per_position: the means of each
    position, for batches of one length. Each mean is float64, with a batch axis (and a pos axis, unless per_position) of size 1.

    PointError for a name that no point has; InputError for no batch, for batches of unequal length with per_position, and for a
    position that is padding in every row.
    """
    chosen = [one.name for name in listed(names) for one in model.names.hooked(name)]
    sums, rows, positions = Sums(per_position), 0, 0
    given = [batches] if isinstance(batches, str | Tensor) else batches
    with model.hooks([(name, sums) for name in dict.fromkeys(chosen)]):
        for batch in tqdm(given, disable=not progress, desc="means", unit="batch"):
            ready = inputs.ready(model, batch)
            sums.real = inputs.real(model, ready)
            model(ready)
            rows, positions = rows + len(sums.real), positions + int(sums.real.sum())
    if not rows:
        raise InputError("means() was given no batch.")
    empty = [name for name, count in sums.counts.items() if not bool((count > 0).all())]
    if empty:
        raise InputError(f"Some positions are padding in every row, so {empty[0]} has no mean there.")
    return Means(
        {name: total / sums.counts[name] for name, total in sums.totals.items()}, rows, positions, per_position
    )

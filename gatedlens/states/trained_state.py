"""TrainedState: an initial state that was trained for a task, of one model; `optimising.py` trains it.

trained = gl.states.optimise(model, prompts, metric)
with trained.on(model):
    model(tokens)                                   # every call that is given no state begins with it
model(tokens, state=trained.rows(model, len(tokens)))
trained.save("french.safetensors"); gl.states.TrainedState.load("french.safetensors")
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gatedlens.errors import CheckpointError, InputError
from gatedlens.markup import card, table
from gatedlens.model.language import HookedLanguageModel
from gatedlens.model.state import RecurrentState
from gatedlens.options import checked
from gatedlens.result.result import Result
from gatedlens.runs.fitting import check_model, course
from gatedlens.runs.saved import read_saved, write_saved

SAVED = "trained state"


@dataclass(frozen=True, eq=False, repr=False)
class TrainedState:
    """state: a RecurrentState of one row. facts: of which model it is, what was trained of it, and how."""

    state: RecurrentState
    facts: Mapping[str, Any]

    def __repr__(self) -> str:
        first, last = self.facts["losses"][0][0], self.facts["losses"][-1][0]
        trained = len(self.facts["trained"])
        return f"TrainedState({self.facts['model']}, {trained} tensors, loss {first:.4g} to {last:.4g})"

    def _repr_html_(self) -> str:
        told = {name: said for name, said in self.facts.items() if isinstance(said, str | int | float)}
        rows = [(key, list(self.state[key].shape[1:]), float(self.state[key].norm())) for key in self.facts["trained"]]
        drawn = table(["tensor", "shape", "norm"], rows)
        return card(f"TrainedState: {self.facts['model']}", told, drawn)

    @property
    def losses(self) -> Result:
        """`trained.losses.plot()`: the loss of every step of its training, a Result [step, loss]."""
        return course(self.facts["losses"], ["loss"], "loss", "Trained state: loss in training", "loss")

    @checked
    def rows(self, model: HookedLanguageModel, rows: int = 1) -> RecurrentState:
        """`trained.rows(model, 4)`: it as a RecurrentState for so many rows. InputError for another model than its own."""
        check_model(model, self.facts, SAVED)
        model.check_state(self.state)
        if rows < 1:
            raise InputError(f"rows={rows}: give at least 1.")
        return self.state.to(model.W_U.device).rows([0] * rows)

    @checked
    @contextmanager
    def on(self, model: HookedLanguageModel) -> Iterator[HookedLanguageModel]:
        """`with trained.on(model): ...`: every call that is given no state begins with this one, in `generate` too.

        Texts take no BOS then, as behind any state. InputError for another model than its own.
        """
        self.rows(model)
        handle = model.register_forward_pre_hook(self._begin, with_kwargs=True)
        try:
            yield model
        finally:
            handle.remove()

    def _begin(
        self, model: HookedLanguageModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if kwargs.get("state") is not None or kwargs.get("start_at_layer") is not None:
            return args, kwargs
        begun = {**kwargs, "state": self.state.to(model.W_U.device)}
        batch, rest = model.prepare(*args, **begun)
        return (batch,), {**rest, "state": begun["state"].rows([0] * len(batch.value))}

    @checked
    def save(self, path: str | Path) -> Path:
        """`trained.save("french.safetensors")`: the state, with a header that names its model; returns the path."""
        return write_saved(path, SAVED, {**self.state.tensors, "seen": self.state.seen}, dict(self.facts))

    @staticmethod
    @checked
    def load(path: str | Path) -> TrainedState:
        """`TrainedState.load("french.safetensors")`: what `save` wrote; CheckpointError for any other file."""
        tensors, fields = read_saved(path, SAVED)
        seen = tensors.pop("seen", None)
        name, trained = fields.word("model"), fields.words("trained")
        fields.get("losses", "the losses of its training", _are_losses)
        lacking = [key for key in trained if key not in tensors]
        strange = [key for key in tensors if not re.fullmatch(r"blocks\.\d+\.\w+", key)]
        if strange:
            raise CheckpointError(f"{path} is no saved {SAVED}: {strange[0]} is no tensor of a state.")
        if seen is None or seen.dtype != torch.int64 or list(seen.shape) != [1] or lacking:
            raise CheckpointError(
                f"{path} is no saved {SAVED}: it lacks {lacking[0] if lacking else 'seen, int64 [1]'}."
            )
        order = sorted(tensors, key=lambda key: (int(key.split(".")[1]), key))
        state = RecurrentState({key: tensors[key] for key in order}, seen, name)
        return TrainedState(state, dict(fields.data))


def _are_losses(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, list) and len(one) == 1 for one in value)

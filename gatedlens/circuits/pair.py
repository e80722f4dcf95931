"""Pair: a clean and a corrupted input of one model, made ready and found to fit together.

    pair = Pair.of(model, clean, corrupted, {"attention_mask": mask})
    logits = pair.run(pair.corrupted, hooks=[(name, hook)])
    logits, store = pair.cached(pair.clean, names)

`differences` are what the methods multiply with gradients: clean minus corrupted, one tensor a point.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gatedlens import inputs
from gatedlens.errors import InputError
from gatedlens.hooking import CACHE_LIMIT, Batch
from gatedlens.hookpoint import Saver
from gatedlens.metrics import Logits
from gatedlens.padding import Padding

WHOLE = ("return_type", "start_at_layer", "stop_at_layer", "return_state")  # options that would cut a run short


@dataclass(frozen=True)
class Pair:
    """`clean` and `corrupted` are of one shape and padded alike; `options` go to every forward of the model."""

    model: Any
    clean: Batch
    corrupted: Batch
    options: Mapping[str, Any]

    @classmethod
    def of(cls, model: Any, clean: Any, corrupted: Any, options: Mapping[str, Any]) -> Pair:
        """The inputs as `model` takes them (text, tokens, images), checked; `options` are its forward's."""
        for option in WHOLE:
            if options.get(option) is not None:
                raise InputError(
                    f"{option}={options[option]!r}: here the model runs whole, from its input to its logits."
                )
        (good, rest), (bad, _) = (inputs.prepared(model, one, **options) for one in (clean, corrupted))
        if good.value.shape != bad.value.shape:
            raise InputError(
                f"The clean input is {list(good.value.shape)} and the corrupted one {list(bad.value.shape)}: each entry of "
                "one run goes into its place in the other, so they need one shape (as many rows, one length)."
            )
        if not _alike(good.mask, bad.mask):
            raise InputError(
                "The clean and the corrupted input are padded at different places: row by row they need one length."
            )
        return cls(model, good, bad, rest)

    def run(self, batch: Batch, hooks: Sequence[Any] = (), **options: Any) -> Tensor:
        """Logits under some hooks, which are gone afterwards; as a metric reads them."""
        with self.model.hooks(list(hooks)):
            return Logits.of(self.model(batch, **{**self.options, **options}), batch.mask)

    @torch.no_grad()
    def cached(
        self, batch: Batch, names: Iterable[str], max_bytes: int | None = CACHE_LIMIT
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits, as a metric reads them, and what some points held."""
        wanted: dict[str, Any] = {"names_filter": list(names), "max_bytes": max_bytes, "return_cache_object": False}
        logits, store = self.model.run_with_cache(batch, **wanted, **self.options)
        return Logits.of(logits, batch.mask), store

    def by_number(self, x: Tensor, dims: Sequence[str]) -> Tensor:
        """What a point held, by the numbers of real positions: each row's in front, as many as the longest row has."""
        padding, length = Padding.of(self.clean.mask), self.clean.value.shape[1]
        x = padding.by_number(x, dims)
        return (
            x.narrow(dims.index("pos"), 0, padding.longest(length)) if padding.mask is not None and "pos" in dims else x
        )

    @torch.no_grad()
    def differences(self, names: Iterable[str], max_bytes: int | None = CACHE_LIMIT) -> dict[str, Tensor]:
        """Clean minus corrupted at some points."""
        _, store = self.cached(self.clean, names, max_bytes)
        self.run(self.corrupted, subtracting(store))
        return store


class _Subtract(Saver):
    """The hook that takes what fires from what `store` holds there, in place."""

    def __init__(self, store: Mapping[str, Tensor]):
        self.store = store

    def __call__(self, tensor: Tensor, hook: Any) -> None:
        rest = self.store[hook.name].sub_(tensor.detach())
        if bool(rest.sum().isnan()):
            rest.masked_fill_(rest.isnan(), 0)  # inf - inf: masked attention scores, the same in both runs


def subtracting(store: Mapping[str, Tensor]) -> list[tuple[str, _Subtract]]:
    """Hooks under which a run of the corrupted input turns a store of clean activations into differences."""
    return [(name, _Subtract(store)) for name in store]


def _alike(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        given = other if one is None else one
        return given is None or bool(given.bool().all())
    return torch.equal(one.bool(), other.bool())


def steps_of(steps: int) -> list[float]:
    """The midpoints of `steps` equal parts of the line from corrupted (0) to clean (1)."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps={steps!r}: it is how many gradients are averaged, a whole number of at least 1.")
    return [(step + 0.5) / steps for step in range(steps)]

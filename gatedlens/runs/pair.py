"""Pair: a clean and a corrupted run of one model, found to fit together.

    clean = Clean(cache, corrupted); clean["blocks.3.hook_resid_pre"]     # a cached run, and a Baseline
    pair = Pair.of(model, clean, corrupted, {"attention_mask": mask})      # two inputs
    logits = pair.run(pair.corrupted, hooks=[(name, hook)])
    logits, store = pair.cached(pair.clean, names)

`differences` are what gradients are multiplied with: clean minus corrupted, one tensor a point.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from gatedlens.errors import InputError, PointError
from gatedlens.metrics import Logits
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Batch, Input
from gatedlens.model.cache import ActivationCache
from gatedlens.model.hooking import CACHE_LIMIT
from gatedlens.model.hookpoint import Saver
from gatedlens.model.padding import Padding
from gatedlens.runs import inputs
from gatedlens.runs.baseline import Baseline

# What the clean run is given as. For editors and type checkers: whoever passes something else gets the error of `Clean`.
if TYPE_CHECKING:
    Cached: TypeAlias = ActivationCache | Mapping[str, Tensor]
else:
    Cached = Any

WHOLE = ("return_type", "start_at_layer", "stop_at_layer", "return_state")  # options that would cut a run short


class Clean:
    """`Clean(cache, corrupted)[name]`: a cached activation, each row's real positions in front; `cache` is an
    ActivationCache, or a dict of full names."""

    def __init__(self, cache: Cached, corrupted: Baseline):
        self.cache = cache
        self.corrupted = corrupted
        self.model = corrupted.model
        self.padding = corrupted.padding  # of a dict: it is taken to be laid out as the corrupted input
        if isinstance(cache, ActivationCache):
            self.padding = Padding.of(cache.mask)
            self._check(cache)
        elif not isinstance(cache, Mapping):
            raise InputError(
                f"The clean cache is {type(cache).__name__}; it is what model.run_with_cache(clean) gives beside the logits, "
                "or a dict of full names."
            )

    def _check(self, cache: ActivationCache) -> None:
        corrupted = self.corrupted
        if cache.sliced:
            raise InputError("The clean cache keeps only some positions (pos_slice): cache the clean run without it.")
        if cache.tokens is None:
            return
        rows, length = len(cache.tokens), self.model.positions(Batch(cache.tokens))
        if length != corrupted.length:
            raise InputError(
                f"The clean prompt has {length} positions and the corrupted one {corrupted.length}: patching moves "
                "activations from position to position, so both must be equally long."
            )
        if rows != corrupted.rows:
            raise InputError(
                f"The clean cache has {rows} rows and the corrupted input {corrupted.rows}: give a clean row for each."
            )
        like = cache.tokens
        if not torch.equal(self.padding.counts(like).cpu(), corrupted.padding.counts(like).cpu()):
            raise InputError(
                "Clean and corrupted prompts are padded in different places: row by row, the two must be equally long."
            )

    def __getitem__(self, name: str) -> Tensor:
        try:
            value = self.cache[name]
        except KeyError as error:
            # A lazy point is in no cache that has not asked for it: said once for all layers, for the next would be refused too.
            kin = re.sub(r"^blocks\.\d+\.", "blocks.*.", name)
            lacking = [one for one in self.model.names if fnmatch.fnmatchcase(one, kin) and one not in self.cache]
            asked = kin if len(lacking) > 1 and self.model.names.points[name].lazy else name
            raise PointError(
                f"The clean cache holds no {asked}: cache it, model.run_with_cache(clean, names_filter={asked!r})."
            ) from error
        if isinstance(self.cache, ActivationCache) and not self.cache.has_batch_dim:
            value = value.unsqueeze(0)
        return self._fitting(name, value)

    def _fitting(self, name: str, value: Tensor) -> Tensor:
        point, corrupted = self.model.names.points[name], self.corrupted
        sizes = {**self.model.cfg.sizes, "batch": corrupted.rows, "pos": corrupted.length, "key_pos": corrupted.length}
        wanted = list(point.shape(sizes))
        if list(value.shape) == wanted:
            return self.padding.by_number(value, point.dims)
        whose = ""
        if isinstance(self.cache, ActivationCache) and self.cache.model is not self.model:
            whose = f" It is a cache of {self.cache.model.cfg.model_name}."
        raise InputError(
            f"The clean cache's {name} has shape {list(value.shape)}; in the corrupted run it is {wanted} ({point.axes}).{whose}"
        )

    def logits(self) -> Tensor | None:
        """The clean run's logits, as a metric reads them: from the cache, or by running its tokens again; None where
        neither is possible."""
        if "hook_logits" in self.cache:
            dims = self.model.names.points["hook_logits"].dims
            return Logits.of(self.padding.by_place(self["hook_logits"], dims), self.padding.mask)
        if not isinstance(self.cache, ActivationCache) or self.cache.tokens is None or self.cache.state is not None:
            return None
        return Logits.of(self.cache.model(Batch(self.cache.tokens, self.cache.mask)), self.padding.mask)


@dataclass(frozen=True)
class Pair:
    """`clean` and `corrupted` are of one shape and padded alike; `options` go to every forward of the model."""

    model: HookedModel
    clean: Batch
    corrupted: Batch
    options: Mapping[str, Any]

    @classmethod
    def of(cls, model: HookedModel, clean: Input, corrupted: Input, options: Mapping[str, Any]) -> Pair:
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
        if not _same_padding(good.mask, bad.mask):
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


def steps_of(steps: int) -> list[float]:
    """The midpoints of `steps` equal parts of the line from corrupted (0) to clean (1)."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps={steps!r}: it is how many gradients are averaged, a whole number of at least 1.")
    return [(step + 0.5) / steps for step in range(steps)]


def _same_padding(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two masks mask the same; None masks nothing."""
    if a is None or b is None:
        return all(mask is None or bool(mask.bool().all()) for mask in (a, b))
    return torch.equal(a.bool().cpu(), b.bool().cpu())

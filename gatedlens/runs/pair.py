"""Clean: the clean run's activations, checked against the corrupted run that they are to be patched into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gatedlens.cache import ActivationCache
from gatedlens.errors import InputError, PointError
from gatedlens.hooking import Batch
from gatedlens.runs.baseline import Baseline


class Clean:
    """`Clean(cache, corrupted)[name]`: a cached activation; `cache` is an ActivationCache, or a dict of full names."""

    def __init__(self, cache: Any, corrupted: Baseline):
        self.cache = cache
        self.corrupted = corrupted
        self.model = corrupted.model
        if isinstance(cache, ActivationCache):
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
        if not _same_padding(cache.mask, corrupted.batch.mask):
            raise InputError(
                "Clean and corrupted prompts are padded in different places: the two of a pair must be equally long."
            )

    def __getitem__(self, name: str) -> Tensor:
        try:
            value = self.cache[name]
        except KeyError as error:
            raise PointError(
                f"The clean cache holds no {name}: cache it, model.run_with_cache(clean, names_filter={name!r})."
            ) from error
        if isinstance(self.cache, ActivationCache) and not self.cache.has_batch_dim:
            value = value.unsqueeze(0)
        return self._fitting(name, value)

    def _fitting(self, name: str, value: Tensor) -> Tensor:
        point, corrupted = self.model.names.points[name], self.corrupted
        sizes = {**self.model.cfg.sizes, "batch": corrupted.rows, "pos": corrupted.length, "key_pos": corrupted.length}
        wanted = [sizes[dim] for dim in point.dims]
        if list(value.shape) == wanted:
            return value
        whose = ""
        if isinstance(self.cache, ActivationCache) and self.cache.model is not self.model:
            whose = f" It is a cache of {self.cache.model.cfg.model_name}."
        raise InputError(
            f"The clean cache's {name} has shape {list(value.shape)}; in the corrupted run it is {wanted} ({point.axes}).{whose}"
        )

    def logits(self) -> Tensor | None:
        """The clean run's logits: from the cache, or by running its tokens again; None where neither is possible."""
        if "hook_logits" in self.cache:
            return self["hook_logits"]
        if not isinstance(self.cache, ActivationCache) or self.cache.tokens is None or self.cache.state is not None:
            return None
        return self.cache.model(Batch(self.cache.tokens, self.cache.mask))


def _same_padding(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two masks mask the same; None masks nothing."""
    if a is None or b is None:
        return all(mask is None or bool(mask.bool().all()) for mask in (a, b))
    return torch.equal(a.bool().cpu(), b.bool().cpu())

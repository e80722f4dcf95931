"""Store: the numbers of a sweep while it runs, and the Result that they become."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gatedlens.errors import InputError
from gatedlens.result import Result
from gatedlens.runs.cells import Plan


@dataclass
class Store:
    """Raw numbers [*cells, metric, rows], NaN where none was measured.

    low, high: the metrics of the corrupted and of the clean run (None: not known). metrics: their names, None for a
    single one. keep_rows: whether the rows stay apart, on an axis "batch"; rows is 1 otherwise.
    """

    plan: Plan
    low: Float[Tensor, "metric rows"]
    high: Float[Tensor, "metric rows"] | None
    metrics: list[str] | None
    keep_rows: bool
    normalised: bool
    facts: Mapping[str, Any]
    values: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.values = self.low.new_full((*self.plan.sizes, *self.low.shape), torch.nan)
        if self.normalised:
            self._span()

    def _span(self) -> Float[Tensor, "metric 1"]:
        """clean - corrupted, of the means over rows."""
        if self.high is None:
            raise InputError(
                "normalised=True needs the clean run's metric: pass the ActivationCache of a run_with_cache, or put "
                "hook_logits into the cache."
            )
        span = (self.high - self.low).mean(1, keepdim=True)
        flat = span.abs() <= 1e-12 * self.low.mean(1, keepdim=True).abs().clamp(min=1e-12)
        if bool(flat.any()):
            raise InputError(
                f"The metric is {self.low.mean(1).tolist()} in the corrupted run and the same in the clean one: there is "
                "nothing to normalise by."
            )
        return span

    # -- numbers -------------------------------------------------------------------------------------------------

    def put(self, place: tuple[int, ...], value: Float[Tensor, "metric rows"]) -> None:
        self.values[place] = value.to(self.values)

    def has(self, place: tuple[int, ...]) -> bool:
        return not bool(self.values[place].isnan().any())

    def measured(self) -> int:
        """How many cells have a number."""
        return sum(self.has(cell.place) for cell in self.plan.cells)

    # -- as a Result ---------------------------------------------------------------------------------------------

    def _layout(self, values: Tensor) -> Tensor:
        """[*cells, metric, rows] as the result has it: metric in front, rows at the end, or without them."""
        values = values if self.keep_rows else values.squeeze(-1)
        at = len(self.plan.sizes)
        return values.select(at, 0) if self.metrics is None else values.movedim(at, 0)

    @property
    def axes(self) -> tuple[str, ...]:
        front = () if self.metrics is None else ("metric",)
        return (*front, *self.plan.axes, *(("batch",) if self.keep_rows else ()))

    def _baseline(self, values: Tensor | None) -> Any:
        """A baseline as JSON holds it: a number, or one a metric by name."""
        if values is None:
            return None
        means = values.mean(1).tolist()
        return means[0] if self.metrics is None else dict(zip(self.metrics, means, strict=True))

    def result(self) -> Result:
        values = self.values
        if self.normalised:
            values = (values - self.low.mean(1, keepdim=True)) / self._span()
        labels = {**self.plan.labels, **({} if self.metrics is None else {"metric": self.metrics})}
        cells, done = len(self.plan.cells), self.measured()
        facts = {
            **self.facts,
            "clean": self._baseline(self.high),
            "corrupted": self._baseline(self.low),
            "normalised": self.normalised,
            "cells": cells,
            "measured": done,
        }
        if not self.normalised and self.metrics is None:
            facts["baseline"] = facts["corrupted"]
        what = "score (corrupted 0, clean 1)" if self.normalised else "metric"
        return Result(self._layout(values).clone(), self.axes, labels, self.plan.title, what, facts)

    def fill(self, earlier: Result) -> None:
        """Take over the numbers of an earlier, interrupted sweep, checked to be the same sweep."""
        mine = self.result()
        if earlier.axes != mine.axes or earlier.shape != mine.shape or earlier.title != mine.title:
            raise InputError(
                f"results is of another sweep: {earlier.title!r} over {earlier.axes} {list(earlier.shape)}; this one is "
                f"{mine.title!r} over {mine.axes} {list(mine.shape)}. Give another path, or results=None to begin anew."
            )
        for fact in ("model", "clean", "corrupted"):
            then, now = earlier.facts.get(fact), mine.facts.get(fact)
            if not _same(then, now):
                raise InputError(f"results is of another sweep: its {fact} is {then}, this one's is {now}.")
        values = earlier.values.to(self.values)
        values = values if self.keep_rows else values.unsqueeze(-1)
        at = len(self.plan.sizes)
        values = values.unsqueeze(at) if self.metrics is None else values.movedim(0, at)
        if earlier.facts.get("normalised"):
            span = (self.high - self.low).mean(1, keepdim=True) if self.high is not None else 1.0
            values = values * span + self.low.mean(1, keepdim=True)
        self.values = values.clone()


def _same(a: Any, b: Any) -> bool:
    """Equal; numbers to rounding, of batches of another size."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6)
    return bool(a == b)

"""Meter: the metrics of a sweep, called on the logits of one cell at a time.

    meter = Meter(metric, "mean", rows=2)              # one metric, or a dict of several by name
    meter(logits, "With layer 3 patched")              # [metric, 1]; with "none" [metric, rows]

A metric that compares with answers of its own rows works as it does outside: it gets a cell's rows alone, laid out as the
input was, and is told where they are real (`Logits`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gatedlens.address.positions import one_a_row
from gatedlens.errors import InputError
from gatedlens.metrics import AtPosition, Metric, by_rows, measure, name_of

# One metric, or several by name. For editors and type checkers: whoever passes something else gets the error of `Meter`.
if TYPE_CHECKING:
    Metrics: TypeAlias = Metric | Mapping[str, Metric]
else:
    Metrics = Any


class Meter:
    """reduce: "mean" over rows, "none" (a number a row), "scalar" (the metric gives one number).

    rows: how many the metric is asked about at once; runs of several samples have a multiple of it.
    """

    def __init__(self, metric: Metrics, reduce: str, rows: int):
        self.names = list(metric) if isinstance(metric, Mapping) else None
        self.metrics = list(metric.values()) if isinstance(metric, Mapping) else [metric]
        self.reduce = reduce
        self.rows = rows
        if not self.metrics or not all(map(callable, self.metrics)):
            raise InputError(
                f"The metric is {metric!r}; it is a function of logits: gl.metrics.logit_difference(...), say, or a dict "
                "of such functions by name."
            )

    @property
    def said(self) -> str:
        """What its numbers are called: by the metric's own name where it has one and is one."""
        return "metric" if self.names else name_of(self.metrics[0])

    def reads(self, real: Bool[Tensor, "rows pos"]) -> Int[Tensor, " rows"] | None:
        """`meter.reads(real)`: the place that every metric reads in each row of an input that is `real` there; None where they
        do not say, or read different ones."""
        said = [metric.reads for metric in self.metrics if isinstance(metric, AtPosition)]
        if len(said) < len(self.metrics):
            return None
        places = [one_a_row(pos, "pos", real[: self.rows]) for pos in said]
        same = all(torch.equal(place, places[0]) for place in places)
        return places[0].repeat(len(real) // self.rows) if same else None

    def __call__(self, logits: Tensor, where: str) -> Float[Tensor, "metric rows"]:
        try:
            return torch.stack([self._all(metric, logits) for metric in self.metrics])
        except InputError as error:
            raise InputError(f"{where}: {error}") from error

    def _all(self, metric: Metric, logits: Tensor) -> Tensor:
        return torch.cat([self._value(metric, sample) for sample in by_rows(logits, self.rows)])

    def _value(self, metric: Metric, logits: Tensor) -> Tensor:
        value = measure(metric, logits).detach()
        if self.reduce == "scalar" and value.ndim:
            raise InputError(
                f"The metric returned {list(value.shape)}; with reduce='scalar' it must return one scalar."
            )
        if self.reduce != "none":
            return value.mean().reshape(1)
        if value.ndim == 0 and len(logits) > 1:
            raise InputError(
                f"The metric returned one number for {len(logits)} rows; here each row needs its own: leave out its mean."
            )
        return value.reshape(-1)

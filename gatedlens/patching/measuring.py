"""Measuring: what every sweep of patches can be told, and how the metric of a patched run becomes its number.

chosen = Options.of({"reduce": "none", "normalised": True})
found = measure_cells(corrupted, clean, plan, metric, chosen, facts)      # a Result
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from gatedlens.errors import InputError, did_you_mean
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Input
from gatedlens.result.result import Result
from gatedlens.runs.baseline import Baseline
from gatedlens.runs.cells import Plan
from gatedlens.runs.engine import Effort, Question, answer
from gatedlens.runs.meter import Meter, Metrics
from gatedlens.runs.pair import Clean


@dataclass(frozen=True)
class Options(Effort):
    """What every sweep can be told.

    reduce: "mean" over the rows of a batch, "none" (an axis "batch" is kept; the metric gives a number a row), or
    "scalar" (the metric gives one number). normalised: (value - corrupted) / (clean - corrupted), 1 where a patch
    restores the clean run and 0 where it does nothing. results: an earlier, interrupted Result to complete, or a path
    to which results are written batch by batch, and from which they are taken up if they are of the same sweep.
    attention_mask, position_ids: those of the corrupted run (with position_ids, of packed documents, each patch is a whole
    run). max_bytes: about how much a batch's activations may take (None: 64 MiB on a CPU, where more is slower, and 1 GiB
    on an accelerator), max_rows: how many rows; one patch at least goes at a time.
    """

    reduce: str = "mean"
    normalised: bool = False
    attention_mask: Tensor | None = None
    position_ids: Shaped[Tensor, "*document position"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ("mean", "none", "scalar")
        if self.reduce not in known:
            raise InputError(
                f"reduce={self.reduce!r}: it is 'mean', 'none' or 'scalar'.{did_you_mean(self.reduce, known)}"
            )

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """`Options.of({"reduce": "none"})`; InputError for an option that does not exist."""
        known = [one.name for one in fields(cls)]
        for name in given:
            if name not in known:
                raise InputError(
                    f"A sweep has no option {name!r}; it has {', '.join(known)}.{did_you_mean(name, known)}"
                )
        return cls(**given)

    def baseline(self, model: HookedModel, corrupted: Input) -> Baseline:
        """`options.baseline(model, corrupted)`: the corrupted run, under its own options."""
        return Baseline(model, corrupted, self.attention_mask, {"position_ids": self.position_ids})


@torch.no_grad()
def measure_cells(
    corrupted: Baseline, clean: Clean, plan: Plan, metric: Metrics, options: Options, facts: Mapping[str, Any]
) -> Result:
    """Every cell's number, laid out on the plan's axes (a "metric" axis in front for a dict of metrics, "batch" at the
    end where rows are kept)."""
    meter = Meter(metric, options.reduce, corrupted.rows)
    changing = corrupted.prepare(plan.cells)
    low = meter(corrupted.logits, "In the corrupted run")
    high = None if (logits := clean.logits()) is None else meter(logits, "In the clean run")
    base, span = low.mean(1, keepdim=True), _span(low, high) if options.normalised else None
    told = {
        "clean": None if high is None else _baseline(meter, high),
        "corrupted": _baseline(meter, low),
        "normalised": options.normalised,
    }
    if span is None and meter.names is None:
        told["baseline"] = told["corrupted"]
    question = Question(
        plan,
        meter,
        (lambda cell, value: value) if span is None else (lambda cell, value: (value - base) / span),
        value=meter.said if span is None else f"{_score(meter.said)} (corrupted 0, clean 1)",
        verb="patched",
        facts={**facts, **told},
        unit=1.0 if span is None else float(span.abs().max()),
        by_row=options.reduce == "none",
    )
    return answer(question, [corrupted], changing, low, options)


def _score(said: str) -> str:
    return "score" if said == "metric" else said


def _span(low: Tensor, high: Tensor | None) -> Float[Tensor, "metric 1"]:
    """clean - corrupted, of the means over rows."""
    if high is None:
        raise InputError(
            "normalised=True needs the clean run's metric: pass the ActivationCache of a run_with_cache, or put "
            "hook_logits into the cache."
        )
    span = (high - low).mean(1, keepdim=True)
    flat = span.abs() <= 1e-12 * low.mean(1, keepdim=True).abs().clamp(min=1e-12)
    if bool(flat.any()):
        raise InputError(
            f"The metric is {low.mean(1).tolist()} in the corrupted run and the same in the clean one: there is "
            "nothing to normalise by."
        )
    return span


def _baseline(meter: Meter, values: Tensor) -> Any:
    """A baseline as JSON holds it: a number, or one a metric by name."""
    means = values.mean(1).tolist()
    return means[0] if meter.names is None else dict(zip(meter.names, means, strict=True))

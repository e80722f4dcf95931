"""What each kind of token mixer does: a metric without it, in all layers, in each, or head by head.

    gl.ablation.by_kind(model, tokens, metric)                       # a Result [without]
    gl.ablation.by_layer(model, tokens, metric).plot()               # a Result [layer, without]
    gl.ablation.by_head(model, tokens, metric, kind="attention")     # a Result [layer, head]

values = (metric - clean) / |clean|, means over rows: -1 where all of the metric is gone, 0 where nothing happened. `without`
are the kinds of what mixes tokens, and each combination of them: "attention", "recurrent", "attention + recurrent". What a
mixer hands to its output projection becomes 0, or its mean over a data set (`means`); its projection's bias stays.

What one kind does that another does not is what goes with it alone. Of what either can do neither is missed; it goes with both:

    found.at(without="attention + recurrent") - found.at(without="attention") - found.at(without="recurrent")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from gatedlens.ablation.average import Means
from gatedlens.address.composite import own_indices
from gatedlens.address.layers import Layers, Where, mixers_of
from gatedlens.errors import InputError
from gatedlens.metrics import Metric
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Input
from gatedlens.model.mixer import TokenMixing
from gatedlens.options import checked
from gatedlens.result.result import Result
from gatedlens.runs.baseline import Baseline
from gatedlens.runs.cells import Cell, Plan, Put
from gatedlens.runs.engine import Earlier, Effort, Question, answer
from gatedlens.runs.meter import Meter

# For editors and type checkers: whoever passes something else gets an InputError.
Given = Means | None
WITHOUT = "without"


@checked
@torch.no_grad()
def by_kind(
    model: HookedModel,
    input: Input,
    metric: Metric,
    layers: Layers = None,
    means: Given = None,
    attention_mask: Tensor | None = None,
    position_ids: Shaped[Tensor, "*document position"] | None = None,
    progress: bool = True,
    results: Earlier = None,
    max_bytes: int | None = None,
    max_rows: int | None = None,
) -> Result:
    """`gl.ablation.by_kind(model, tokens, metric)`: the metric without a kind of mixers in all layers: a Result [without].

    input: text(s), ids, a pair (ids, mask), images. metric: logits -> one number a row, or a scalar. layers: in these alone.
    means: `gl.ablation.means(...)` of the mixers' output points, in place of 0. results, max_bytes, max_rows: as in every sweep,
    see `gl.patching.Options`.

    InputError for a metric that is 0 without an ablation, and for a model in training mode; PointError for means that lack a
    point.
    """
    sweep = Sweep.of(model, input, metric, means, attention_mask, position_ids)
    mixers = mixers_of(model, layers)
    kinds = _kinds(mixers)
    cells = [sweep.cell((i,), [m for m in mixers if m.role in some]) for i, some in enumerate(kinds)]
    plan = Plan((WITHOUT,), {WITHOUT: list(map(_said, kinds))}, (len(kinds),), tuple(cells), "Without a kind of mixers")
    return sweep.run(plan, Effort(results, max_bytes, max_rows, progress))


@checked
@torch.no_grad()
def by_layer(
    model: HookedModel,
    input: Input,
    metric: Metric,
    layers: Layers = None,
    means: Given = None,
    attention_mask: Tensor | None = None,
    position_ids: Shaped[Tensor, "*document position"] | None = None,
    progress: bool = True,
    results: Earlier = None,
    max_bytes: int | None = None,
    max_rows: int | None = None,
) -> Result:
    """`gl.ablation.by_layer(model, tokens, metric).plot()`: the same in each layer by itself: a Result [layer, without].

    NaN where a layer lacks a kind. Where it has two, side by side (Falcon-H1) or one before the other (Zamba2), its row says what
    each does that the other does not. Options and errors as of `gl.ablation.by_kind`.
    """
    sweep = Sweep.of(model, input, metric, means, attention_mask, position_ids)
    mixers = mixers_of(model, layers)
    kinds, numbers = _kinds(mixers), list(dict.fromkeys(mixer.layer for mixer in mixers))
    cells = []
    for row, layer in enumerate(numbers):
        own = [mixer for mixer in mixers if mixer.layer == layer]
        has = {mixer.role for mixer in own}
        cells += [
            sweep.cell((row, i), [m for m in own if m.role in some]) for i, some in enumerate(kinds) if has >= set(some)
        ]
    labels = {"layer": numbers, WITHOUT: list(map(_said, kinds))}
    plan = Plan(("layer", WITHOUT), labels, (len(numbers), len(kinds)), tuple(cells), "Without a kind, layer by layer")
    return sweep.run(plan, Effort(results, max_bytes, max_rows, progress))


@checked
@torch.no_grad()
def by_head(
    model: HookedModel,
    input: Input,
    metric: Metric,
    kind: str,
    layers: Layers = None,
    means: Given = None,
    attention_mask: Tensor | None = None,
    position_ids: Shaped[Tensor, "*document position"] | None = None,
    progress: bool = True,
    results: Earlier = None,
    max_bytes: int | None = None,
    max_rows: int | None = None,
) -> Result:
    """`gl.ablation.by_head(model, tokens, metric, kind="attention").plot()`: the metric without each head: a Result [layer,
    head].

    kind: "attention" or "recurrent", whose heads they are. PointError for a kind whose mixers have no heads (Mamba's channels are
    their own). Options and errors as of `gl.ablation.by_kind`; InputError too for a kind that the layers lack.
    """
    sweep = Sweep.of(model, input, metric, means, attention_mask, position_ids)
    mixers = mixers_of(model, Where((kind,), layers))
    points, sizes = model.names.points, model.cfg.sizes
    for mixer in mixers:
        if not points[mixer.output_name].reaches(mixer.heads_axis, sizes):
            raise model.names.lacking(mixer.output_name, mixer.heads_axis, sizes)
    axis = mixers[0].heads_axis
    cells = [
        sweep.cell((row, head), [mixer], {axis: [head]})
        for row, mixer in enumerate(mixers)
        for head in range(sizes[axis])
    ]
    labels = {"layer": [mixer.layer for mixer in mixers], "head": list(range(sizes[axis]))}
    plan = Plan(("layer", "head"), labels, (len(mixers), sizes[axis]), tuple(cells), f"Without a head ({kind})")
    return sweep.run(plan, Effort(results, max_bytes, max_rows, progress))


def _kinds(mixers: Sequence[TokenMixing]) -> list[tuple[str, ...]]:
    """Every kind, and every combination of them."""
    roles = sorted({mixer.role for mixer in mixers})
    return [some for n in range(1, len(roles) + 1) for some in combinations(roles, n)]


def _said(kinds: Sequence[str]) -> str:
    return " + ".join(kinds)


@dataclass(frozen=True)
class Sweep:
    """One input and one metric, for any number of runs without some mixers or heads."""

    baseline: Baseline
    metric: Metric
    means: Given

    @staticmethod
    def of(
        model: HookedModel,
        input: Input,
        metric: Metric,
        means: Given,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> Sweep:
        """`Sweep.of(model, tokens, metric, None, None, None)`, of the options of `by_kind`."""
        return Sweep(Baseline(model, input, attention_mask, {"position_ids": position_ids}), metric, means)

    def cell(
        self, place: tuple[int, ...], mixers: Sequence[TokenMixing], index: Mapping[str, Any] | None = None
    ) -> Cell:
        """The run without what some mixers hand to their output projections, or without these entries of it."""
        points, sizes = self.baseline.model.names.points, self.baseline.model.cfg.sizes
        edits = []
        for mixer in mixers:
            point, source = points[mixer.output_name], self._instead(mixer.output_name)
            own = own_indices(point, index or {}, sizes)
            edits += [Put(mixer.output_name, point.dims, one, source, self.baseline.causal) for one in own]
        return Cell(place, tuple(edits))

    def _instead(self, name: str) -> Tensor | None:
        """What stands there: None, for 0, or the mean."""
        if self.means is None:
            return None
        if self.means.per_position:
            raise InputError(
                "The means are per position: one for all positions is meant, means(..., per_position=False)."
            )
        mean = self.means[name]
        return mean.expand(self.baseline.rows, self.baseline.length, *mean.shape[2:])

    def run(self, plan: Plan, effort: Effort) -> Result:
        """The Result."""
        baseline, meter = self.baseline, Meter(self.metric, "mean", self.baseline.rows)
        changing = baseline.prepare(plan.cells)
        low = meter(baseline.logits, "Without an ablation").double().cpu()
        clean = float(low)
        if abs(clean) < 1e-12:
            raise InputError(f"The metric is {clean:.3g} as it is: a change cannot be put in relation to it.")
        facts = {
            "model": baseline.model.cfg.model_name,
            "clean": clean,
            "instead": "0" if self.means is None else "mean",
        }
        question = Question(
            plan,
            meter,
            lambda cell, value: (value.double() - clean) / abs(clean),
            value="(metric - clean) / |clean|",
            verb="ablated",
            facts=facts,
            unit=abs(clean),
        )
        return answer(question, [baseline], changing, low, effort)

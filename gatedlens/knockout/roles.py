"""Gather or aggregate: whether a layer brings together what stands in a segment of a text, or what segments have gathered.

    gl.knockout.gather_and_aggregate(model, tokens, metric, segments=[slice(0, 4), slice(4, 8)]).plot()    # Result [role, layer]

    gather       the edges inside each segment, from its other tokens to its last one, are cut
    aggregate    the edges from the last tokens of the segments to `dst` are cut

Bick et al. 2025, Understanding the Skill Gap in Recurrent Language Models (arXiv 2504.18574): what reads a list first gathers
each entry at its end, then aggregates the ends where the answer is given; which layers of a hybrid do which is a matter of
measuring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from gatedlens.address.entries import Index
from gatedlens.address.layers import Layers, Mixers, mixers_of
from gatedlens.address.positions import Positions, listed
from gatedlens.errors import InputError
from gatedlens.knockout.sweeping import How, cut, of_edges, relative_to_clean
from gatedlens.knockout.token_edges import GivenEdges
from gatedlens.metrics import Metric
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Input
from gatedlens.options import checked
from gatedlens.result.result import Result
from gatedlens.runs import inputs
from gatedlens.runs.baseline import Baseline
from gatedlens.runs.cells import Cell, Plan
from gatedlens.runs.engine import Earlier, Effort

ROLES = ("gather", "aggregate")


@checked
@torch.no_grad()
def gather_and_aggregate(
    model: HookedModel,
    input: Input,
    metric: Metric,
    segments: Sequence[Positions],
    dst: Positions = -1,
    how: How = cut,
    layers: Layers = None,
    scan: str | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Shaped[Tensor, "*document position"] | None = None,
    max_rows: int = 64,
    progress: bool = True,
    results: Earlier = None,
    max_bytes: int | None = None,
    **index: Index,
) -> Result:
    """`gl.knockout.gather_and_aggregate(model, tokens, metric, segments=[slice(0, 4), slice(4, 8)]).plot()`: see the head of this
    file.

    values[role, layer] = (metric - clean) / |clean|, means over rows, when the edges of that role are cut in the layer alone; one
    more column, "all", when they are cut in all of `layers`. segments: positions each, of 2 tokens or more; dst: where the answer
    is given. layers: `gl.layers.where(kind=...)` of one kind of mixers. The rest, and the errors, are those of
    `gl.knockout.sweep`.
    """
    mixers = mixers_of(model, layers)
    chosen = tuple(dict.fromkeys(mixer.layer for mixer in mixers))
    run = Baseline(model, input, attention_mask, {"position_ids": position_ids})
    edges = Segments.of(run, segments, dst).edges()
    made = partial(how, scan=scan, **index)
    columns = [*([layer] for layer in chosen), list(chosen)]
    cells = []
    for column, some in enumerate(columns):
        here = Mixers(tuple((m.layer, m.place) for m in mixers if m.layer in some))
        cells += [_Role((row, column), (), tuple(some), here, edges[role], made) for row, role in enumerate(ROLES)]
    labels: dict[str, list[Any]] = {"role": list(ROLES), "layer": [*chosen, "all"]}
    title = f"Gather and aggregate ({how.__name__})"
    plan = Plan(("role", "layer"), labels, (len(ROLES), len(columns)), tuple(cells), title)
    facts = {"how": how.__name__, "segments": len(segments)}
    return relative_to_clean(plan, run, metric, facts, Effort(results, max_bytes, max_rows, progress))


@dataclass(frozen=True)
class Segments:
    """Some segments of each row, and where the answer is given, as positions are laid out in a run."""

    inside: tuple[Bool[Tensor, "batch pos"], ...]
    dst: Bool[Tensor, "batch pos"]

    @staticmethod
    def of(run: Baseline, segments: Sequence[Positions], dst: Positions) -> Segments:
        """`Segments.of(run, [slice(0, 4), slice(4, 8)], -1)`; InputError for none, and for one of a single token."""
        if isinstance(segments, str) or len(segments) == 0:
            raise InputError(f"segments={segments!r}: give several, each some positions: [slice(0, 4), slice(4, 8)].")
        masks = tuple(run.mask_of(one, f"segments[{i}]") for i, one in enumerate(segments))
        for number, mask in enumerate(masks):
            if bool((mask.sum(1) == 1).any()):
                at = listed(mask, inputs.real(run.model, run.batch))
                raise InputError(f"segments[{number}] is one token, {at}, in some row: it has nothing to gather.")
        return Segments(masks, run.mask_of(dst, "dst"))

    def edges(self) -> dict[str, Bool[Tensor, "batch dst src"]]:
        """The edges of each role."""
        place = torch.arange(self.dst.shape[1], device=self.dst.device)
        gather = torch.zeros(*self.dst.shape, len(place), dtype=torch.bool, device=self.dst.device)
        ends = torch.zeros_like(self.dst)
        for mask in self.inside:
            last = place == torch.where(mask, place, -1).amax(1, keepdim=True)
            gather |= last.unsqueeze(2) & (mask & ~last).unsqueeze(1)
            ends |= last
        return {"gather": gather, "aggregate": self.dst.unsqueeze(2) & (ends & ~self.dst).unsqueeze(1)}


@dataclass(frozen=True)
class _Role(Cell):
    """The edges of one role cut in `mixers` of `layers`."""

    layers: tuple[int, ...]
    mixers: Mixers
    edges: Bool[Tensor, "batch dst src"]
    how: How

    @cached_property
    def first(self) -> int:
        found = self.edges.any(2).any(0).nonzero()
        return int(found[0]) if len(found) else 0

    def entry(self, run: Baseline) -> int:
        return self.layers[0]

    def behind(self, run: Baseline) -> int:
        """What a target reads stands before it, so the layers that are cut have all their positions."""
        return self.layers[-1] + 1

    def hooks(self, cells: Sequence[Any], run: Baseline) -> list[tuple[str, Any]]:
        """One cut in the rows of all of them. The first role's batch of a layer verifies that a cut is exact."""
        edges = GivenEdges(torch.cat([cell.edges for cell in cells]))
        return of_edges(self.how(0, 0, layers=self.mixers), edges, self.place[0] == 0).hooks(run.model)

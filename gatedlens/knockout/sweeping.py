"""Cuts, and the sweep that makes one in every window of layers. `knockout/__init__.py` says what each kind of cut is.

cut(src=[2, 3], dst=-1, layers=1)                              # an Intervention
sweep(model, tokens, metric, dst=-1, window=3)                 # a Result [layer, src]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from gatedlens.address.entries import Index
from gatedlens.address.layers import Layers, Mixers, mixers_of
from gatedlens.address.positions import Positions, columns, listed
from gatedlens.errors import InputError
from gatedlens.knockout.cutting import Cut, Way, erase, share, token, update, write
from gatedlens.knockout.token_edges import Edges, GivenEdges
from gatedlens.metrics import Metric
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Input
from gatedlens.model.intervention import Intervention
from gatedlens.options import checked
from gatedlens.result.result import Result
from gatedlens.runs import inputs
from gatedlens.runs.baseline import Baseline
from gatedlens.runs.cells import Cell, Plan
from gatedlens.runs.engine import Earlier, Effort, Question, answer
from gatedlens.runs.meter import Meter

How = Callable[..., Intervention]


@checked
def cut(src: Positions, dst: Positions, layers: Layers = None, scan: str | None = None, **index: Index) -> Intervention:
    """`gl.knockout.cut(src=[2, 3], dst=-1, layers=range(4, 8), channel=slow)`: A[i, j] = 0 for every source j and target i.

    The target loses all that comes from the source, through conv, scan and skip.

    src, dst: a position, a list or slice of them (the same in every row), a tensor [batch] (one a row) or [batch, some], a
    list for each row, or a mask [batch, pos]; see `positions.py`. layers: a number, several, or None for all. index: some
    `channel` (in attention layers `head`, `d_head`). scan: "fwd" or "bwd" where a layer has both; None for all. Returns an
    Intervention: `with gl.knockout.cut(3, -1).on(model): ...`.

    Positions are the real ones of the call (while generating, each step is one). Several cuts of a layer act together.

    InputError for a `batch` or `pos` in index, for layers that do not exist, and while the model runs for positions that do not
    exist or that a target cannot see, and where an edit inside the recurrence (decay, write, scan, ...) of the layer makes A not
    the layer's operator.
    """
    return _cut(token, src, dst, layers, scan, index)


@checked
def cut_scan(
    src: Positions, dst: Positions, layers: Layers = None, scan: str | None = None, **index: Index
) -> Intervention:
    """`gl.knockout.cut_scan(3, -1)`: the readout of i loses what the state carries of j's write, C_i prod(decay) write_j.

    The conv stays, and the write holds what the conv mixed into it. Under a delta rule the state carries what the steps behind j
    have left of the write, and j still erases: see `gl.knockout.cut_erase`, `cut_update`. Parameters and errors: as of
    `gl.knockout.cut`. Endy et al. 2025 (Mamba Knockout, arXiv 2505.24244).
    """
    return _cut(write, src, dst, layers, scan, index)


@checked
def cut_erase(
    src: Positions, dst: Positions, layers: Layers = None, scan: str | None = None, **index: Index
) -> Intervention:
    """`gl.knockout.cut_erase(3, -1, layers=0, head=1)`: i reads the state as it would be if j had erased nothing.

    For layers with a delta rule, S_t = decay_t S_{t-1} - erase_t (probe_t . S_{t-1}) + write_t: the readout of i is of the S_i
    that the same recurrence gives with erase_j = 0 at every source j. What j overwrote is there again, beside what j wrote; all
    other positions read the state as it was. `gl.ablation.no_erase(pos=3)` is the same for every reader, and for what follows
    from it. Parameters and errors: as of `gl.knockout.cut`; InputError too for a layer without a delta rule.
    """
    return _cut(erase, src, dst, layers, scan, index)


@checked
def cut_update(
    src: Positions, dst: Positions, layers: Layers = None, scan: str | None = None, **index: Index
) -> Intervention:
    """`gl.knockout.cut_update(3, -1, layers=0)`: i reads the state as it would be if j had not touched it.

    `cut_scan` and `cut_erase` at once: write_j = 0 and erase_j = 0 at every source j, and only the decay goes on there. For one
    source the target loses the sum of what these two take; for several it does not, as one erases what another wrote.
    Parameters and errors: as of `gl.knockout.cut_erase`.
    """
    return _cut(update, src, dst, layers, scan, index)


@checked
def cut_renormalised(
    src: Positions, dst: Positions, layers: Layers = None, scan: str | None = None, **index: Index
) -> Intervention:
    """`gl.knockout.cut_renormalised(3, -1, layers=2)`: S[i, j] = 0, and the rest of row i scaled to sum to 1 again.

    For softmax scans only: scores := -inf in attention layers, numerator and denominator of RWKV. Parameters and errors: as of
    `gl.knockout.cut`; InputError too for a target that would lose every position it sees. Geva et al. 2023 (arXiv 2304.14767).
    """
    return _cut(share, src, dst, layers, scan, index)


@checked
def pairs(
    edges: Sequence[tuple[Positions, Positions]],
    how: How = cut,
    layers: Layers = None,
    scan: str | None = None,
    **index: Index,
) -> Intervention:
    """`gl.knockout.pairs([(2, 5), (3, 6)], how=gl.knockout.cut)`: these edges (src, dst) alone, not all sources to all targets.

    how: `cut`, or any other kind of cut, as `gl.knockout.cut_scan`. The rest, and the errors, are those of `gl.knockout.cut`.
    """
    return _with(how(0, 0, layers=layers, scan=scan, **index), edges=Edges(tuple(edges)))


def of_edges(cuts: Intervention, edges: Edges | GivenEdges, verify: bool) -> Intervention:
    """`of_edges(cut(0, 0, layers=2), Edges(...), verify=True)`: the same kind of cut, of other edges."""
    return _with(cuts, edges=edges, verify=verify)


def _with(cuts: Intervention, **changes: Any) -> Intervention:
    """The same kind of cut, of other edges."""
    return Intervention(tuple(replace(step, **changes) for step in cuts.steps if isinstance(step, Cut)))


def _cut(
    way: Way, src: Positions, dst: Positions, layers: Layers, scan: str | None, index: Mapping[str, Index]
) -> Intervention:
    for axis in ("batch", "pos"):
        if axis in index:
            raise InputError(f"{axis}={index[axis]!r}: rows and positions of a cut are said by src and dst.")
    return Intervention((Cut(way, Edges(((src, dst),)), layers, scan, index),))


# -- sweeping -------------------------------------------------------------------------------------------------------


@checked
@torch.no_grad()
def sweep(
    model: HookedModel,
    input: Input,
    metric: Metric,
    dst: Positions,
    src: Positions | Mapping[str, Positions] = None,
    window: int = 1,
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
    """`gl.knockout.sweep(model, tokens, metric, dst=-1, src={"subject": subject_pos, "rest": [5, 6]}, window=3).plot()`

    values[layer, src] = (metric - clean) / |clean|, means over rows, when all edges from the source to `dst` are cut in a window
    of `window` of the `layers` around the layer (shorter at the ends). -1: all of the metric is gone; 0: nothing
    happened, also where a target cannot see the source, or in a row that is too short to have it.

    input: text(s), ids, a pair (ids, mask), images. metric: logits -> one number a row, or a scalar. src: None for every
    position by itself, a dict of names to positions, or a list of positions. how: `cut`, or any other kind of cut; scan and
    index are its own. Many cells run in one batch of at most `max_rows` rows (or one cell), from the first layer of their window
    on; under position_ids (of packed documents) each cell is a whole run. results, max_bytes: as in every sweep,
    `gl.patching.Options`: a path to which results are written as they come and from which an interrupted sweep goes on, or an
    interrupted Result; about how much a batch may take.

    InputError for a window that does not fit the layers, for positions that no row has, for a metric that is 0 without a cut,
    and for a model in training mode. Geva et al. 2023 (arXiv 2304.14767).
    """
    mixers = mixers_of(model, layers)
    chosen = tuple(dict.fromkeys(mixer.layer for mixer in mixers))
    if not 1 <= window <= len(chosen):
        raise InputError(f"window={window}: give 1 to {len(chosen)}, the number of layers.")
    windows = [chosen[max(0, c - window // 2) : c + (window + 1) // 2] for c in range(len(chosen))]
    run = Baseline(model, input, attention_mask, {"position_ids": position_ids})
    groups = _sources(run, src)
    targets = run.mask_of(dst, "dst")
    made = partial(how, scan=scan, **index)
    places = [Mixers(tuple((m.layer, m.place) for m in mixers if m.layer in some)) for some in windows]
    cells = [
        _Cell((row, column), (), some, places[row], sources, targets, made)
        for row, some in enumerate(windows)
        for column, sources in enumerate(groups.values())
    ]
    labels: dict[str, list[Any]] = {
        "layer": list(chosen),
        "src": inputs.labels(model, run.batch) if src is None else list(groups),
    }
    where = f" to {dst}" if isinstance(dst, int) else ""
    title = f"Knockout ({how.__name__}): source{where}, window {window}"
    plan = Plan(("layer", "src"), labels, (len(windows), len(groups)), tuple(cells), title)

    facts = {"window": window, "dst": listed(targets, inputs.real(model, run.batch)), "how": how.__name__}
    return relative_to_clean(plan, run, metric, facts, Effort(results, max_bytes, max_rows, progress))


def relative_to_clean(plan: Plan, run: Baseline, metric: Metric, facts: Mapping[str, Any], effort: Effort) -> Result:
    """(metric - clean) / |clean| of each cell of a plan, the mean over rows; InputError for a metric that is 0 without a cut."""
    meter = Meter(metric, "mean", run.rows)
    changing = run.prepare(plan.cells)
    low = meter(run.logits, "Without a cut").double().cpu()
    clean = float(low)
    if abs(clean) < 1e-12:
        raise InputError(f"The metric is {clean:.3g} without a cut: a change cannot be put in relation to it.")
    question = Question(
        plan,
        meter,
        lambda cell, value: (value.double() - clean) / abs(clean),
        value=f"({meter.said} - clean) / |clean|",
        verb="cut",
        facts={"model": run.model.cfg.model_name, "clean": clean, **facts},
        unit=abs(clean),
    )
    return answer(question, [run], changing, low, effort)


def _sources(run: Baseline, src: Positions | Mapping[str, Positions]) -> dict[Any, Bool[Tensor, "batch pos"]]:
    """Each source's name and its positions."""
    found = columns(src, "src", inputs.real(run.model, run.given))
    return {name: run.as_run(mask) for name, mask in found.items()}


@dataclass(frozen=True)
class _Cell(Cell):
    """All edges from `src` to `dst` cut in `mixers` of `layers`; `how(src, dst, layers)` makes the cut."""

    layers: Sequence[int]
    mixers: Mixers
    src: Bool[Tensor, "batch pos"]
    dst: Bool[Tensor, "batch pos"]
    how: How

    @cached_property
    def first(self) -> int:
        return int(self.dst.any(0).nonzero()[0])

    def entry(self, run: Baseline) -> int:
        return self.layers[0]

    def behind(self, run: Baseline) -> int:
        """What a target reads stands before it, so the layers that are cut have all their positions."""
        return self.layers[-1] + 1

    def hooks(self, cells: Sequence[Any], run: Baseline) -> list[tuple[str, Any]]:
        """One cut in the rows of all of them. The first source's batch of a window verifies that a cut is exact."""
        edges = Edges(((torch.cat([cell.src for cell in cells]), self.dst.repeat(len(cells), 1)),), strict=False)
        return of_edges(self.how(0, 0, layers=self.mixers), edges, self.place[-1] == 0).hooks(run.model)

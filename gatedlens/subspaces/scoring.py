"""Scores of interchanges: how often the base run then gives the source's answer.

    gl.subspaces.score(model, {"learned": s, "random": s.random()}, base, source, answers)           # measure x subspace

The base run is known, so what an interchange puts there is known before: each is a cell of `runs/engine.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gatedlens.address.positions import Positions
from gatedlens.errors import InputError, PointError
from gatedlens.metrics import AtPosition, Tokens
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Batch, Input
from gatedlens.options import checked
from gatedlens.recurrence.scanning import at_least_float32
from gatedlens.result.bootstrap import estimate
from gatedlens.result.result import Result
from gatedlens.runs import inputs
from gatedlens.runs.baseline import Baseline
from gatedlens.runs.cells import Cell, Plan, PutByRow, may_start_within
from gatedlens.runs.engine import Effort, Question, answer
from gatedlens.runs.meter import Meter
from gatedlens.runs.vectors import chosen, entries, vectors
from gatedlens.subspaces.alignment import answers_of
from gatedlens.subspaces.interchange import Interchange
from gatedlens.subspaces.subspace import Subspace

ACCURACY, LOG = "interchange accuracy", "log probability"
MEASURES = [ACCURACY, "low", "high", LOG]


@checked
def score(
    model: HookedModel,
    subspaces: Subspace | Mapping[str, Subspace],
    base: Input,
    source: Input,
    answers: Tokens,
    pos: Positions = None,
    source_pos: Positions = None,
    *,
    read: Positions = -1,
    max_bytes: int | None = None,
    max_rows: int | None = None,
    progress: bool = True,
) -> Result:
    """`gl.subspaces.score(model, {"learned": s, "random": s.random()}, base, source, answers)`: a Result, measure x subspace.

    Measures: the interchange accuracy (the share of pairs whose base run, with the source's component, gives the answer), the
    ends of its 95 % interval (bootstrap over pairs), and the mean log probability of the answer in nats. base, source,
    answers: as of `gl.subspaces.das`. pos: where the interchange is; None: where each subspace was fitted. `facts` hold the
    base run's own accuracy ("baseline"). Errors: as of `das`; InputError for a subspace that was fitted at no one position,
    without pos.

    Source: Geiger et al. 2021 (arXiv 2106.02997).
    """
    named: Any = {"subspace": subspaces} if isinstance(subspaces, Subspace) else subspaces
    if not isinstance(named, Mapping) or not named or not all(isinstance(one, Subspace) for one in named.values()):
        raise InputError(f"{named!r:.80}: there is no subspace to score: give one, or a dict of several by name.")
    places = []
    for i, (label, one) in enumerate(named.items()):
        where = one.pos if pos is None else pos
        if where is None and "pos" in model.names[one.name].dims:
            raise InputError(f"{label}: {one!r} was fitted at no one position; give pos.")
        one.check(model)
        places.append(Place((i,), one, where, where if source_pos is None else source_pos))
    plan = Layout(("subspace",), {"subspace": list(named)}, (len(named),), "Interchanges")
    effort = Effort(max_bytes=max_bytes, max_rows=max_rows, progress=progress)
    return scored(model, places, plan, base, source, answers, read, effort)


# -- a plan of them ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """One interchange of a plan: its `place` in the result, the subspace, and where in base and source."""

    place: tuple[int, ...]
    subspace: Subspace
    pos: Positions
    source_pos: Positions


@dataclass(frozen=True)
class Layout:
    """The axes of a plan."""

    axes: tuple[str, ...]
    labels: dict[str, list[Any]]
    sizes: tuple[int, ...]
    title: str


@torch.no_grad()
def scored(
    model: HookedModel,
    places: Sequence[Place],
    layout: Layout,
    base: Input,
    source: Input,
    answers: Tokens,
    read: Positions,
    effort: Effort,
) -> Result:
    """`scored(model, places, layout, base, source, answers, read, effort)`: the measures of each interchange, measure in
    front.
    """
    run, other = Baseline(model, base), inputs.ready(model, source)
    tokens = answers_of(answers, run.rows, model).to(run.given.value.device)
    if len(other.value) not in (1, run.rows):
        raise InputError(f"There are {run.rows} bases and {len(other.value)} sources: give a source for each base.")
    edits = _edits(run, other, places)
    cells = tuple(Cell(one.place, edit) for one, edit in zip(places, edits, strict=True))
    plan = Plan(layout.axes, dict(layout.labels), layout.sizes, cells, layout.title)

    def right(logits: Tensor) -> Tensor:
        return (logits.argmax(-1) == tokens.to(logits.device)).to(logits.dtype)

    def log_p(logits: Tensor) -> Tensor:
        return logits.log_softmax(-1).gather(1, tokens.to(logits.device).unsqueeze(1)).squeeze(1)

    metrics = {ACCURACY: AtPosition(right, read, ACCURACY), LOG: AtPosition(log_p, read, LOG)}
    meter = Meter(metrics, "none", run.rows)
    changing = run.prepare(plan.cells)
    low = meter(run.logits, "In the base run")
    facts = {
        "model": model.cfg.model_name,
        "points": list(dict.fromkeys(one.subspace.name for one in places)),
        "batch": run.rows,
    }
    question = Question(plan, meter, lambda cell, value: value, ACCURACY, "interchanged", facts, by_row=True)
    rows = answer(question, [run], changing, low, effort).values
    accuracy, log = rows[0], rows[1].mean(-1)
    ends = [estimate(one) for one in accuracy.reshape(-1, run.rows)]
    low_end, high_end = (
        torch.tensor([getattr(one, end) for one in ends], dtype=log.dtype, device=log.device).reshape(log.shape)
        for end in ("low", "high")
    )
    values = torch.stack([accuracy.mean(-1), low_end, high_end, log])
    told = {**facts, "baseline": float(low[0].mean())}
    return Result(
        values, ("measure", *layout.axes), {"measure": MEASURES, **layout.labels}, layout.title, ACCURACY, told
    )


def _edits(run: Baseline, other: Batch, places: Sequence[Place]) -> list[tuple[PutByRow, ...]]:
    """What each interchange puts where."""
    model, real = run.model, inputs.real(run.model, run.given).cpu()
    masks = []
    for one in places:
        point = model.names.points[one.subspace.name]
        if "pos" not in point.dims:
            raise PointError(
                f"{one.subspace.name} ({point.axes}) has no positions: put it in by `subspace.interchange`."
            )
        masks.append(chosen(one.pos, real, point))
    union: dict[str, Tensor] = {}
    for one, mask in zip(places, masks, strict=True):
        union[one.subspace.name] = union.get(one.subspace.name, torch.zeros_like(mask)) | mask
    held = entries(model, run.given, union)
    found = []
    for one, mask in zip(places, masks, strict=True):
        name = one.subspace.name
        source = vectors(model, other, one.subspace.frame, one.source_pos, "source_pos")
        own = held[name][mask[union[name]].to(held[name].device)]
        found.append(_edit(run, one.subspace, own, source, mask))
    return found


def _edit(
    run: Baseline,
    subspace: Subspace,
    own: Float[Tensor, "place number"],
    source: Tensor,
    mask: Bool[Tensor, "batch pos"],
) -> tuple[PutByRow, ...]:
    """What the base holds, `own`, with the source's component; of a state, in place of its past."""
    model, row = run.model, mask.nonzero()[:, 0]
    point, nth = model.names.points[subspace.name], (mask.cumsum(1) - 1)[mask]
    places, new = subspace.frame.places(model).to(own.device), own.clone()
    v = at_least_float32(own[:, places])
    moved = v + Interchange(subspace.frame, subspace.basis, source).move(v, row, nth)
    new[:, places.flatten()] = moved.flatten(1).to(own.dtype)
    dim, local = point.dims.index("pos"), run.causal and may_start_within(point.dims, model.cfg.sizes)
    sizes = {**model.cfg.sizes, "batch": run.rows, "pos": run.length}
    where = run.padding.pack(mask.to(run.given.value.device))
    whole = _spread(new, where, [sizes[axis] for axis in point.dims], dim)
    if not subspace.name.endswith(".hook_state"):
        return (PutByRow(subspace.name, dim, where, whole, local),)
    stem, nothing = subspace.name.removesuffix("hook_state"), own.new_zeros(())
    forgotten = [name for name in (f"{stem}hook_decay", f"{stem}hook_erase") if name in model.names.points]
    rows = {name: [sizes[axis] for axis in model.names.points[name].dims] for name in forgotten}
    zeros = [PutByRow(name, dim, where, nothing.expand(shape), local) for name, shape in rows.items()]
    return (*zeros, PutByRow(f"{stem}hook_write", dim, where, whole, local))


def _spread(
    new: Float[Tensor, "place number"], where: Bool[Tensor, "batch pos"], shape: Sequence[int], dim: int
) -> Tensor:
    """What is put at places as an activation of this shape; of one place a row at every position, which takes no memory."""
    inner = [size for axis, size in enumerate(shape) if axis not in (0, dim)]
    if bool((where.sum(1) == 1).all()):
        return new.reshape(shape[0], 1, *inner).expand(-1, shape[dim], *inner).movedim(1, dim)
    whole = new.new_zeros(shape[0], shape[dim], *inner)
    whole[where.to(new.device)] = new.reshape(-1, *inner)
    return whole.movedim(1, dim)

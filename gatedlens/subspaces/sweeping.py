"""Scores of interchanges: how often the base run then gives the source's answer; over layers and positions, with controls.

    gl.subspaces.score(model, {"learned": s, "random": s.random()}, base, source, answers)           # measure x subspace
    gl.subspaces.sweep(model, base, source, answers, "blocks.*.hook_resid_post", pos=[5, -1])        # ... x layer x pos

The base run is known, so what an interchange puts there is known before: each is a cell of `runs/engine.py`. What a fit finds
without knowing anything, the method finds: so controls stand beside, fitted and scored in the same way on the same pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gatedlens.address.entries import Index
from gatedlens.address.names import Name, listed
from gatedlens.address.positions import Positions
from gatedlens.errors import InputError, PointError, did_you_mean
from gatedlens.metrics import AtPosition, Tokens
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Batch, Input
from gatedlens.options import checked
from gatedlens.recurrence.scanning import at_least_float32
from gatedlens.result.bootstrap import estimate
from gatedlens.result.result import Result
from gatedlens.runs import inputs
from gatedlens.runs.baseline import Baseline
from gatedlens.runs.cells import Cell, Plan, PutByRow, layer_of, may_start_within
from gatedlens.runs.engine import Effort, Question, answer
from gatedlens.runs.meter import Meter
from gatedlens.runs.vectors import Frame, chosen, entries, rows_of, vectors
from gatedlens.subspaces.alignment import Fit, Training, answers_of, some_of
from gatedlens.subspaces.fixed import lda, mean_difference, pca, random
from gatedlens.subspaces.interchange import Interchange
from gatedlens.subspaces.subspace import Subspace

ACCURACY, LOG = "interchange accuracy", "log probability"
MEASURES = [ACCURACY, "low", "high", LOG]
# Each fit with its controls: what knows no answers has none in another order, what has all of the space no other of its rank.
CONTROLS = {
    "das": ("random", "start", "shuffled"),
    "pca": ("random",),
    "mean_difference": ("random", "shuffled"),
    "lda": ("random", "shuffled"),
    "whole": (),
}
FITS = tuple(CONTROLS)


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


@checked
def sweep(
    model: HookedModel,
    base: Input,
    source: Input,
    answers: Tokens,
    names: Name | Sequence[Name],
    pos: int | Sequence[int] | Mapping[str, Any] = -1,
    rank: int = 1,
    fit: str = "das",
    axes: str | Sequence[str] | None = None,
    *,
    controls: Sequence[str] | None = None,
    untrained: HookedModel | None = None,
    held_out: float = 0.5,
    read: Positions = -1,
    epochs: int = 20,
    batch_size: int = 128,
    lr: float = 1e-2,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = True,
    **index: Index,
) -> Result:
    """`gl.subspaces.sweep(model, base, source, answers, "blocks.*.hook_resid_post", pos=[5, -1])`: a Result, measure x subspace x
    layer x pos: a subspace fitted in each place, scored on pairs that it has not seen, with controls beside it.

    names: points, one a layer. pos: positions, or a dict of label -> positions (a tensor [batch]: one a row). fit: "das", "pca",
    "mean_difference", "lda" (between answers, by the source runs), or "whole" (all of the point, plain patching). controls
    (None: all that a fit has): "random" (a random subspace of this rank), "start" (the rotation that training starts from),
    "shuffled" (fitted to the answers in random order, and scored by these). untrained: a model that has learnt nothing,
    `gl.subspaces.untrained(model)`, on which it is fitted and scored, too. held_out: the share of pairs that it is scored on.
    folder: where fits of "das" are kept, and taken up. Measures and all else: as of `score` and `das`. InputError for another
    fit or control, several points of one layer, and too few pairs.

    Source: Geiger et al. 2024 (arXiv 2303.02536); controls: Arora et al. 2024 (CausalGym, arXiv 2402.12560).
    """
    if fit not in FITS:
        raise InputError(f"fit={fit!r}: it is {', '.join(map(repr, FITS))}.{did_you_mean(fit, FITS)}")
    known = CONTROLS[fit]
    kept = known if controls is None else controls
    for one in kept:
        if one not in known:
            raise InputError(
                f"controls: {one!r} is none of {fit!r}, which has {', '.join(map(repr, known)) or 'none'}."
                f"{did_you_mean(str(one), known)}"
            )
    if folder is not None and fit != "das":
        raise InputError(
            f"folder={str(folder)!r}: fits of 'das' are kept in it, and this is {fit!r}, which takes no time."
        )
    if not 0 < held_out < 1:
        raise InputError(f"held_out={held_out}: it is the share of pairs to score on, more than 0 and less than 1.")
    frames = _frames(model, names, axes, index)
    columns = _columns(pos)
    training = Training(rank, epochs, batch_size, float(lr), seed)
    pairs = Pairs.of(model, base, source, answers, held_out, seed)
    layout = Layout(
        ("layer", "pos"),
        {"layer": list(frames), "pos": list(columns)},
        (len(frames), len(columns)),
        f"Interchanges, {fit}",
    )
    work = Work(fit, training, frames, columns, read, Path(folder) if folder is not None else None, progress)
    found: dict[str, Result] = {fit: work.run(model, pairs, layout, fit)}
    found |= {one: work.run(model, pairs.shuffled(seed) if one == "shuffled" else pairs, layout, one) for one in kept}
    if untrained is not None:
        found["untrained model"] = work.run(untrained, pairs, layout, fit, "untrained-")
    first = found[fit]
    values = torch.stack([one.values for one in found.values()], dim=1)
    facts = {**first.facts, "rank": rank, "fit": fit, "held_out": held_out, "seed": seed, "pairs": len(pairs.train)}
    labels = {"measure": MEASURES, "subspace": list(found), **layout.labels}
    return Result(
        values, ("measure", "subspace", *layout.axes), labels, f"Interchanges of subspaces, {fit}", ACCURACY, facts
    )


# -- places and pairs -----------------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Pairs:
    """Pairs of base and source with their answers, some to fit to (`train`) and some to score on (`test`), by number."""

    base: Batch
    source: Batch
    answers: Int[Tensor, " pair"]
    train: Int[Tensor, " some"]
    test: Int[Tensor, " some"]

    @staticmethod
    def of(model: HookedModel, base: Input, source: Input, answers: Tokens, held_out: float, seed: int) -> Pairs:
        ready, other = inputs.ready(model, base), inputs.ready(model, source)
        rows = len(ready.value)
        if len(other.value) != rows:
            raise InputError(f"There are {rows} bases and {len(other.value)} sources: give a source for each base.")
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
        n = round(rows * held_out)
        if not 0 < n < rows:
            raise InputError(
                f"held_out={held_out} of {rows} pairs leaves {rows - n} to fit to and {n} to score on: give more pairs."
            )
        return Pairs(ready, other, answers_of(answers, rows, model), order[n:].sort().values, order[:n].sort().values)

    def shuffled(self, seed: int) -> Pairs:
        """The same with the answers in another order."""
        order = torch.randperm(len(self.answers), generator=torch.Generator().manual_seed(seed + 1))
        return replace(self, answers=self.answers[order.to(self.answers.device)])


@dataclass(frozen=True)
class Work:
    """What is fitted in each place of a sweep."""

    fit: str
    training: Training
    frames: Mapping[int | str, Frame]
    columns: Mapping[Any, Positions]
    read: Positions
    folder: Path | None
    progress: bool

    def run(self, model: HookedModel, pairs: Pairs, layout: Layout, what: str, stem: str = "") -> Result:
        """Fit in each place, and score."""
        places = []
        for i, (layer, frame) in enumerate(self.frames.items()):
            for j, (label, pos) in enumerate(self.columns.items()):
                file = f"{stem}{what}-{layer}-{label}.safetensors"
                made = self._fitted(model, pairs, frame, pos, what, file)
                test = some_of(pos, pairs.test)
                places.append(Place((i, j), made, test, test))
        base, source = (rows_of(batch, pairs.test.to(batch.value.device)) for batch in (pairs.base, pairs.source))
        effort = Effort(progress=self.progress)
        read = some_of(self.read, pairs.test)
        answers = pairs.answers[pairs.test.to(pairs.answers.device)]
        return scored(model, places, layout, base, source, answers, read, effort)

    def _fitted(self, model: HookedModel, pairs: Pairs, frame: Frame, pos: Positions, what: str, file: str) -> Subspace:
        rows, where = pairs.train, some_of(pos, pairs.train)
        base, source = (rows_of(batch, rows.to(batch.value.device)) for batch in (pairs.base, pairs.source))
        answers = pairs.answers[rows.to(pairs.answers.device)]
        width = frame.width(model)
        chosen_axes: dict[str, Any] = {"axes": frame.axes, **frame.index}
        if what == "random":
            return random(model, frame.name, min(self.training.rank, width), self.training.seed, **chosen_axes)
        if what == "whole":
            return random(model, frame.name, width, **chosen_axes)
        if self.fit == "das":
            training = replace(self.training, epochs=0) if what == "start" else self.training
            fit = Fit.of(model, base, source, answers, frame, where, None, some_of(self.read, rows))
            path = None if self.folder is None or what == "start" else self.folder / file
            return fit.run(training, path, self.progress)
        if self.fit == "pca":
            return pca(model, source, frame.name, self.training.rank, where, **chosen_axes)
        by_class = mean_difference if self.fit == "mean_difference" else lda
        made = by_class(model, source, answers, frame.name, where, **chosen_axes)
        return replace(made, basis=made.basis[: self.training.rank])


def _frames(
    model: HookedModel, names: Name | Sequence[Name], axes: str | Sequence[str] | None, index: Mapping[str, Any]
) -> dict[int | str, Frame]:
    """The points of a sweep by layer."""
    found: dict[int | str, Frame] = {}
    for name in listed(names):
        for hit in model.names.hooked(name):
            if hit.view is not None:
                raise PointError(f"{hit.name} is computed from {', '.join(hit.needs())}: name one of these.")
            layer = layer_of(hit.name)
            key: int | str = hit.name if layer is None else layer
            if key in found and found[key].name != hit.name:
                raise InputError(f"Layer {key} has {found[key].name} and {hit.name}: name one point a layer.")
            found[key] = Frame.of(model, hit.name, axes, index)
    if not found:
        raise PointError("No point was named: names is an empty list.")
    return found


def _columns(pos: Any) -> dict[Any, Positions]:
    """Positions by what they are called."""
    if isinstance(pos, Mapping):
        found = dict(pos)
    elif isinstance(pos, Tensor) and pos.ndim:
        found = {"by row": pos}
    else:
        found = {one: one for one in ([pos] if not isinstance(pos, Sequence) or isinstance(pos, str) else pos)}
    if not found:
        raise InputError("pos is empty: give positions, or a dict of labels to positions.")
    return found


# -- scores ---------------------------------------------------------------------------------------------------------


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

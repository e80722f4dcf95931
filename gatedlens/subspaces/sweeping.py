"""Interchanges over layers and positions: a subspace fitted in each place, and scored on pairs that it has not seen.

    gl.subspaces.sweep(model, base, source, answers, "blocks.*.hook_resid_post", pos=[5, -1])        # ... x layer x pos

What a fit finds without knowing anything, the method finds: so controls stand beside, fitted and scored in the same way on the
same pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatedlens.address.entries import Index
from gatedlens.address.names import Name, listed
from gatedlens.address.positions import Positions
from gatedlens.errors import InputError, PointError, did_you_mean
from gatedlens.metrics import Tokens
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Input
from gatedlens.options import checked
from gatedlens.result.result import Result
from gatedlens.runs.cells import layer_of
from gatedlens.runs.engine import Effort
from gatedlens.runs.vectors import Frame, rows_of
from gatedlens.subspaces.alignment import Fit, Training, some_of
from gatedlens.subspaces.fixed import lda, mean_difference, pca, random
from gatedlens.subspaces.pairs import Pairs
from gatedlens.subspaces.scoring import ACCURACY, MEASURES, Layout, Place, scored
from gatedlens.subspaces.subspace import Subspace

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


# -- the work ----------------------------------------------------------------------------------------------------------


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

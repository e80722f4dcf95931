"""Probes: fitted in one place, or over layer x pos x point, with the controls that say what a score is worth.

    probe = gl.probes.fit(cache, labels, ("resid_post", 1), pos=-1)
    found = gl.probes.sweep(cache, labels, ["blocks.*.hook_resid_post", "blocks.*.mixer.hook_state"], pos=[3, -1])

Selectivity is the accuracy less that of a probe of shuffled labels (Hewitt and Liang 2019, arXiv 1909.03368); random weights:
the same probe on a model that has learnt nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from gatedlens.address.entries import Index
from gatedlens.address.key import Key
from gatedlens.address.positions import Positions
from gatedlens.errors import InputError, PointError
from gatedlens.model.cache import ActivationCache
from gatedlens.options import checked, is_whole
from gatedlens.probes.fitting import Recipe, as_numbers, held_out_score
from gatedlens.probes.probe import Probe
from gatedlens.probes.samples import Labels, Samples, Source, labelled
from gatedlens.result.bootstrap import Estimate
from gatedlens.result.result import Result
from gatedlens.runs.vectors import one_place

SHUFFLED, RANDOM = "shuffled labels", "random weights"


@checked
def fit(
    source: Source,
    labels: Labels,
    name: Key,
    pos: Positions = -1,
    kind: str = "linear",
    axes: str | Sequence[str] | None = None,
    *,
    penalty: int | float = 1.0,
    held_out: int | float = 0.25,
    seed: int = 0,
    **index: Index,
) -> Probe:
    """`gl.probes.fit(cache, labels, ("resid_post", 1), pos=-1)`: a Probe, with its score on rows that it has not seen.

    source: a cache (`run_with_cache`) or a store (`gl.store.open`). labels: one a row or an entry, or [batch, pos] laid out
    as a cache's input; whole numbers, texts, truths are classes, floats a regression. name: the point. pos: positions of each
    row (None: all). kind: "linear" (logistic regression, least squares), "ridge" or "sparse" (the weights' sum of absolutes
    costs). penalty: what weights cost, as scikit-learn's alpha or 1 / C. held_out: the share of rows to test on, of every
    class. axes, index: what of the point is the vector, all of it, or head=2, channel=[3, 5]. seed: of the split.

    `facts` hold "accuracy" (of a regression "R2"), "low", "high" (95 %, bootstrap over rows), "shuffled labels" (the score of
    the same fit to labels in random order) and "baseline" (of always the commonest class). PointError for a point that there
    is not; InputError for labels that do not match the rows, a single class, and a kind that there is not. It needs
    scikit-learn: gatedlens[probes].

    Source: Alain and Bengio 2016 (arXiv 1610.01644); Hewitt and Liang 2019 (selectivity, arXiv 1909.03368).
    """
    recipe = Recipe(kind, float(penalty), float(held_out), seed)
    samples = Samples.of(source, name, pos, axes, index)
    y, classes = as_numbers(labelled(labels, samples))
    return _fitted(recipe, samples, y, classes, pos)


@checked
def sweep(
    source: Source,
    labels: Labels,
    names: Key | Sequence[Key],
    pos: int | Sequence[int] | Mapping[str, Any] | None = -1,
    kind: str = "linear",
    by: str | None = None,
    axes: str | Sequence[str] | None = None,
    *,
    untrained: Source | None = None,
    penalty: int | float = 1.0,
    held_out: int | float = 0.25,
    seed: int = 0,
    progress: bool = True,
    **index: Index,
) -> Result:
    """`gl.probes.sweep(cache, labels, "blocks.*.hook_resid_post", pos=[3, -1])`: a Result, measure x layer x pos.

    Measures: "accuracy" (of a regression "R2") on rows that were held out, "low" and "high" (its 95 % interval), "shuffled
    labels" (the same with labels in random order), "selectivity" (the first less that), and with `untrained` "random
    weights": the cache or store of the same inputs under `gl.probes.untrained(model)`. `found.at(measure="accuracy").plot()`
    is the heat map.

    names: points; several of a layer stand on an axis "point" in front of the layers. pos: positions, each by itself, or a
    dict of label -> positions; None: all of them as samples together. by: an axis of which each entry is probed by itself,
    "head" say, an axis of the result. All else, and errors: as of `fit`.

    Source: Hewitt and Liang 2019 (arXiv 1909.03368); random weights: Zhang and Bowman 2018 (arXiv 1809.10040).
    """
    recipe = Recipe(kind, float(penalty), float(held_out), seed)
    grid = Grid.of(source, names, pos, by, index)
    measure = ""
    found: dict[tuple[int, ...], list[float]] = {}
    facts: Mapping[str, Any] = {}
    with tqdm(total=len(grid.cells), desc="Probes", disable=not progress) as bar:
        for place, name, where, some in grid.cells:
            samples = Samples.of(source, name, where, axes, some)
            y, classes = as_numbers(labelled(labels, samples))
            probe = _fitted(recipe, samples, y, classes, where)
            measure, facts = "R2" if classes is None else "accuracy", probe.facts
            numbers = [probe.facts[one] for one in (measure, "low", "high", SHUFFLED)]
            numbers.append(numbers[0] - numbers[3])
            if untrained is not None:
                other = Samples.of(untrained, name, where, axes, some)
                there = as_numbers(labelled(labels, other))[0]
                numbers.append(_score(recipe, other, there)[1].value)
            found[place] = numbers
            bar.update()
    measures = [measure, "low", "high", SHUFFLED, "selectivity", *([RANDOM] if untrained is not None else [])]
    values = torch.full((len(measures), *grid.sizes), torch.nan, dtype=torch.float64)
    for place, numbers in found.items():
        at: tuple[Any, ...] = (slice(None), *place)
        values[at] = torch.tensor(numbers, dtype=torch.float64)
    told = {name: facts[name] for name in ("model", "train", "test", "baseline") if name in facts}
    told |= {"kind": kind, "penalty": float(penalty), "seed": seed}
    return Result(
        values, ("measure", *grid.axes), {"measure": measures, **grid.labels}, f"Probes, {kind}", measure, told
    )


def _score(recipe: Recipe, samples: Samples, y: Tensor) -> tuple[Any, Estimate]:
    """The map that was fitted, and its score on what was held out."""
    held = recipe.split(samples, y)
    if not y.is_floating_point() and len(y[~held].unique()) < 2:
        raise InputError("Of all but one class there are no rows left to fit to: give more rows.")
    linear = recipe.fit(samples.x[(~held).to(samples.x.device)], y[~held])
    return linear, held_out_score(linear, samples, y, held)


def _fitted(recipe: Recipe, samples: Samples, y: Tensor, classes: list[Any] | None, pos: Positions) -> Probe:
    linear, found = _score(recipe, samples, y)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(recipe.seed + 1))
    held = recipe.split(samples, y)
    shuffled = y[order]
    missed = recipe.fit(samples.x[(~held).to(samples.x.device)], shuffled[~held])
    x = samples.x[(~held).to(samples.x.device)].double()
    means = torch.stack([x[(y[~held] == one).to(x.device)].mean(0) for one in range(len(classes or []))] or [x.mean(0)])
    facts: dict[str, Any] = {"model": samples.model, "train": int((~held).sum()), "test": int(held.sum())}
    facts |= {"R2" if classes is None else "accuracy": found.value, "low": found.low, "high": found.high}
    facts[SHUFFLED] = held_out_score(missed, samples, shuffled, held).value
    facts["baseline"] = 0.0 if classes is None else float((y[held] == y[~held].mode().values).double().mean())
    facts |= {"penalty": recipe.penalty, "seed": recipe.seed, "sparse": float((linear.weight == 0).double().mean())}
    return Probe(samples.frame, linear, x.mean(0), means, classes, recipe.kind, one_place(pos), facts)


@dataclass(frozen=True)
class Grid:
    """The places of a sweep: (place in the result, point, positions, entries) each."""

    axes: tuple[str, ...]
    labels: dict[str, list[Any]]
    sizes: tuple[int, ...]
    cells: list[tuple[tuple[int, ...], str, Positions, dict[str, Any]]]

    @staticmethod
    def of(source: Any, names: Any, pos: Any, by: str | None, index: Mapping[str, Any]) -> Grid:
        """`Grid.of(cache, "blocks.*.hook_resid_post", [3, -1], None, {})`; errors as of `sweep`."""
        found = _points(source, names)
        kinds = list(dict.fromkeys(_kind(name) for name in found))
        layers = list(dict.fromkeys(_layer(name) for name in found))
        layers = sorted(layers) if all(isinstance(one, int) for one in layers) else layers
        columns = _columns(pos)
        each = [None] if by is None else _entries(source, found, by, index)
        axes = (*(("point",) if len(kinds) > 1 else ()), "layer", *((by,) if by else ()), "pos")
        labels: dict[str, list[Any]] = {"layer": layers, "pos": list(columns)}
        labels |= {"point": kinds} if len(kinds) > 1 else {}
        labels |= {by: each} if by else {}
        cells = []
        for name, (i, entry), (j, where) in product(found, enumerate(each), enumerate(columns.values())):
            at = {"point": kinds.index(_kind(name)), "layer": layers.index(_layer(name)), "pos": j, by: i}
            some = dict(index) if by is None else {**index, by: entry}
            cells.append((tuple(at[axis] for axis in axes), name, where, some))
        return Grid(axes, labels, tuple(len(labels[axis]) for axis in axes), cells)


def _points(source: Any, names: Any) -> list[str]:
    """The full names that are meant, of those that a cache or a store holds."""
    several = isinstance(names, list | tuple) and not (
        len(names) in (2, 3) and isinstance(names[0], str) and is_whole(names[1])
    )
    found: dict[str, None] = {}
    for name in names if several else [names]:
        if isinstance(source, ActivationCache):
            if isinstance(name, str):
                hits = [one.name for one in source.model.names.hooked(name) if one.view is None]
                held = [one for one in hits if one in source.cache_dict]
                if not held:
                    source[hits[0] if hits else name]  # says what is lacking, and how to cache it
            else:
                held = [source.find(name).name]
        else:
            held = _stored_names(source, name)
        found |= dict.fromkeys(held)
    if not found:
        raise PointError("No point was named: names is an empty list.")
    return list(found)


def _stored_names(store: Any, name: Any) -> list[str]:
    """Of a store: a glob of its names, or one of them."""
    import fnmatch

    if isinstance(name, str) and any(sign in name for sign in "*?["):
        hits = [one for one in store.names if fnmatch.fnmatchcase(one, name)]
        if not hits:
            raise PointError(f"{name!r} fits no point of the store; it holds {', '.join(store.names[:6])}.")
        return hits
    return [store.find(name).name]


def _kind(name: str) -> str:
    return name.split(".", 2)[2] if name.startswith("blocks.") else name


def _layer(name: str) -> int | str:
    return int(name.split(".")[1]) if name.startswith("blocks.") else name


def _columns(pos: Any) -> dict[Any, Positions]:
    """Positions by what they are called."""
    if pos is None:
        return {"all": None}
    if isinstance(pos, Mapping):
        found = dict(pos)
    elif is_whole(pos):
        found = {int(pos): int(pos)}
    else:
        found = {one: one for one in pos}
    if not found:
        raise InputError("pos is empty: give positions, or a dict of labels to positions.")
    return found


def _entries(source: Any, names: Sequence[str], by: str, index: Mapping[str, Any]) -> list[Any]:
    """The numbers of an axis of which each is probed by itself."""
    if by in index:
        raise InputError(f"by={by!r}, and {by}={index[by]!r}: probe each entry, or some together.")
    if isinstance(source, ActivationCache):
        sizes = source.model.cfg.sizes
        for name in names:
            if by in ("batch", "pos") or by not in sizes or not source.model.names.points[name].reaches(by, sizes):
                raise source.model.names.lacking(name, by, sizes)
        return list(range(sizes[by]))
    layout = source.find(names[0])
    kept, sizes = layout.kept.get(by), dict(layout.sizes)
    own = [dim for dim in layout.axes.split() if dim not in ("batch", "pos")]
    sizes |= dict(zip(own, layout.shape, strict=False))
    if kept is None and by not in sizes:
        raise PointError(f"{layout.name} has no axis {by!r}; its axes are: {layout.axes}.")
    return list(kept) if kept is not None else list(range(sizes[by]))

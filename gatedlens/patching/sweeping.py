"""sweep: patch every entry of some axes of some points, one at a time, clean into corrupted.

    sweep(model, corrupted, clean_cache, metric, "blocks.*.mixer.hook_gate", ("layer", "pos"))
    sweep(model, corrupted, clean_cache, metric, "blocks.*.mixer.hook_dt", ("layer", "channel"), groups={"channel": 8})
    sweep(model, corrupted, clean_cache, metric, "blocks.*.mixer.hook_scan", ("layer", "head"))
    sweep(model, corrupted, clean_cache, metric, "blocks.3.mixer.hook_conv_taps", ("pos", "tap"))
    sweep(model, corrupted, clean_cache, metric, "blocks.*.mixer.hook_state", ("layer", "pos"), edits=carried)

An axis is "layer" or any of the point's own but batch, or one that these make up or are made of: "head" and "value" where a
channel is (head value), "channel" of a state [head value]. What is not named is patched whole: without "layer" all layers at
once, without "pos" all positions. Layers that lack the point (Griffin's attention layers have no gate) are not on the
axis: its labels say which layers there are. Where the pattern names several points of a layer (fwd and bwd of Vision
Mamba) they get an axis "point" in front. Position k is each row's k-th real one; a row without it is left unpatched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, product
from typing import Any

from torch import Tensor

from gatedlens.address import positions
from gatedlens.address.composite import own_indices
from gatedlens.address.names import Name, is_placed, listed
from gatedlens.address.point import refuse_overlap
from gatedlens.errors import InputError, PointError
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Input
from gatedlens.options import checked, taking
from gatedlens.patching.measuring import Options, measure_cells
from gatedlens.result.result import Result
from gatedlens.runs import inputs
from gatedlens.runs.baseline import Baseline
from gatedlens.runs.cells import Cell, Edit, Index, Plan, Put, layer_of, may_start_within
from gatedlens.runs.meter import Metrics
from gatedlens.runs.pair import Cached, Clean

Places = tuple[Mapping[str, Index], ...]  # what an entry of an axis means: all of these indices together
Edits = Callable[[str, Clean], list[tuple[str, Tensor | None]]]


@checked
def copied(name: str, clean: Clean) -> list[tuple[str, Tensor | None]]:
    """`copied("blocks.0.mixer.hook_gate", clean)`: what to put where, [(name, tensor)]: the point gets what the clean run held.

    PointError where the clean cache lacks the point, InputError where its shape is another one.
    """
    return [(name, clean[name])]


@checked
def carried(name: str, clean: Clean) -> list[tuple[str, Tensor | None]]:
    """`carried("blocks.0.mixer.hook_state", clean)`: decay[pos] = 0 (so is a delta rule's erase), write[pos] = clean state[pos],
    as [(name, tensor or None)].

    So later positions go on from the clean state. (`copied` at hook_state changes what is read at that position and nothing
    later.) PointError for a point that is no hook_state.
    """
    stem, word, rest = name.rpartition("hook_state")
    if word == "" or rest:
        raise PointError(f"edits=carried patches the state after a step, at a hook_state; {name} is none.")
    forgotten = [one for one in (f"{stem}hook_decay", f"{stem}hook_erase") if one in clean.model.names.points]
    return [*((one, None) for one in forgotten), (f"{stem}hook_write", clean[name])]


@taking(Options)
@checked
def sweep(
    model: HookedModel,
    corrupted: Input,
    clean_cache: Cached,
    metric: Metrics,
    points: Name | Sequence[Name],
    axes: Sequence[str] = ("layer", "pos"),
    *,
    groups: Mapping[str, Any] | None = None,
    edits: Edits = copied,
    title: str = "",
    **options: Any,
) -> Result:
    """`gl.patching.sweep(model, corrupted, clean_cache, metric, "blocks.*.mixer.hook_gate", ("layer", "pos"))`: a Result.

    values[layer, pos] = the metric with this entry of `points` patched from the clean run into the corrupted one.

    corrupted: what the model reads: text(s), ids, a pair (ids, mask), images. clean_cache: the clean run's, with the
    points to patch in it. metric: logits -> one number a row, or a scalar; or a dict of several by name. points: a
    name, alias or glob, or a list of them. groups: how an axis is divided, for channels that are patched together: a
    number of equal groups, or a dict of label -> indices (of positions: see `gatedlens.address.positions`). edits: what is put
    there, `copied`, or `carried` for states. More options are those of `gl.patching.Options`: normalised=True or
    results="sweep.json", say. Returns a Result on the axes; `facts` hold the metric of the clean and of the corrupted run.

    PointError for a point that does not exist, is a view, lacks an axis, or is not in the cache; InputError for inputs that do
    not fit together, groups that are none, an option that does not exist, and a model in training mode.
    """
    chosen = Options.of(options)
    run = chosen.baseline(model, corrupted)
    clean = Clean(clean_cache, run)
    named = (axes,) if isinstance(axes, str) else tuple(axes)
    spread = Spread(run, clean, points, named, dict(groups or {}), edits)
    facts = {"model": model.cfg.model_name, "points": spread.names, "batch": run.rows}
    return measure_cells(run, clean, spread.plan(title), metric, chosen, facts)


class Spread:
    """The cells of a sweep: which points, which layers, which entries."""

    def __init__(
        self,
        run: Baseline,
        clean: Clean,
        points: Name | Sequence[Name],
        axes: tuple[str, ...],
        groups: dict[str, Any],
        edits: Edits,
    ):
        self.run, self.clean, self.axes, self.edits = run, clean, axes, edits
        self._found: dict[str, list[tuple[str, Tensor | None]]] = {}
        self.names = _find(run.model, points)
        self.kinds = list(dict.fromkeys(_rest(name) for name in self.names))
        self.layers = sorted({layer for name in self.names if (layer := layer_of(name)) is not None})
        self._check(groups)
        first = self.run.model.names.points[self.names[0]]
        shape = clean[self.names[0]].shape
        self.grouped = set(groups)
        self.entries: dict[str, list[tuple[Any, Places]]] = {}
        for axis in axes:
            if axis == "pos":
                self.entries[axis] = _at_positions(run, groups.get(axis))
            elif axis != "layer":
                size = shape[first.axis(axis)] if axis in first.dims else run.model.cfg.sizes[axis]
                each = _entries(axis, size, groups.get(axis))
                self.entries[axis] = [(label, ({axis: index},)) for label, index in each]

    def _check(self, groups: Mapping[str, Any]) -> None:
        names, sizes = self.run.model.names, self.run.model.cfg.sizes
        if not self.axes or len(set(self.axes)) != len(self.axes):
            raise InputError(f"axes={self.axes}: name each axis once, for example ('layer', 'pos').")
        refuse_overlap(self.axes)
        for name in self.names:
            point = names.points[name]
            known = ["layer"] * (layer_of(name) is not None) + [d for d in point.dims if d != "batch"]
            for axis in self.axes:
                if axis not in known and (axis in ("layer", "batch") or not point.reaches(axis, sizes)):
                    hint = " The rows of a batch are patched together: reduce='none' keeps their numbers apart."
                    hint = hint if axis == "batch" else "" if axis == "layer" else names.nearest(name, axis, sizes)
                    raise PointError(f"{name} has no axis {axis!r} to sweep; it has: {', '.join(known)}.{hint}")
        for axis in groups:
            if axis not in self.axes or axis == "layer":
                raise InputError(f"groups={{{axis!r}: ...}} divides an axis that is not swept: axes are {self.axes}.")

    @checked
    def plan(self, title: str) -> Plan:
        """Every cell at its place."""
        several = len(self.kinds) > 1
        along = [range(len(self.layers)) if axis == "layer" else range(len(self.entries[axis])) for axis in self.axes]
        cells = []
        for kind, *places in product(range(len(self.kinds)), *along):
            at = dict(zip(self.axes, places, strict=True))
            names = self._names(self.kinds[kind], at)
            some = product(*(self.entries[axis][at[axis]][1] for axis in self.axes if axis != "layer"))
            indices = [{axis: index for part in parts for axis, index in part.items()} for parts in some]
            if names:
                edits = tuple(edit for name in names for index in indices for edit in self._edits(name, index))
                cells.append(Cell((*((kind,) if several else ()), *places), edits))
        sizes = (*((len(self.kinds),) if several else ()), *map(len, along))
        axes = (*(("point",) if several else ()), *self.axes)
        said = title or f"Patching {', '.join(kind.replace('hook_', '') for kind in self.kinds)}, clean into corrupted"
        return Plan(axes, self._labels(several), sizes, tuple(cells), said)

    def _names(self, kind: str, at: Mapping[str, int]) -> list[str]:
        """The points of one cell: one layer's, or every layer's."""
        layer = self.layers[at["layer"]] if "layer" in at else None
        return [n for n in self.names if _rest(n) == kind and (layer is None or layer_of(n) == layer)]

    def _edits(self, name: str, index: Mapping[str, Index]) -> list[Edit]:
        rows, sizes = self.run.model.names.points, self.run.model.cfg.sizes
        out: list[Edit] = []
        for target, source in self._sources(name):
            dims = rows[target].dims
            local = self.run.causal and may_start_within(dims, sizes)
            own = own_indices(rows[target], index, sizes)
            out.extend(Put(target, dims, one, source, local) for one in own)
        return out

    def _sources(self, name: str) -> list[tuple[str, Tensor | None]]:
        if name not in self._found:
            self._found[name] = self.edits(name, self.clean)
        return self._found[name]

    def _labels(self, several: bool) -> dict[str, list[Any]]:
        labels: dict[str, list[Any]] = {"point": list(self.kinds)} if several else {}
        for axis in self.axes:
            if axis == "layer":
                labels[axis] = list(self.layers)
            elif axis == "pos" and axis not in self.grouped:
                labels[axis] = inputs.labels(self.run.model, self.run.batch)
            else:
                labels[axis] = [label for label, _ in self.entries[axis]]
        return labels


def _find(model: HookedModel, points: Name | Sequence[Name]) -> list[str]:
    """The full names that are meant, in the order in which they fire."""
    found: dict[str, None] = {}
    for name in listed(points):
        if not isinstance(name, str) and not is_placed(name):
            raise PointError(f"{name!r:.80} is no point: name one, or a list of names.")
        try:
            hits = model.names.hooked(name)
        except PointError as error:
            others = model.names.elsewhere(str(name).rpartition(".")[2].lstrip("*"))
            has = f" {' and '.join(others)} {'has' if len(others) == 1 else 'have'} it." if others else ""
            raise PointError(f"{error}{has if has.strip() not in str(error) else ''}") from error
        if any(one.view is not None for one in hits):
            raise PointError(f"{name!r} is computed from {', '.join(hits[0].needs())}: patch these.")
        found |= dict.fromkeys(one.name for one in hits)
    if not found:
        raise PointError("No point was named: points is an empty list.")
    return [name for name in model.names if name in found]


def _rest(name: str) -> str:
    """`mixer.hook_gate` of `blocks.3.mixer.hook_gate`."""
    return name.split(".", 2)[2] if name.startswith("blocks.") else name


def _at_positions(run: Baseline, groups: Any) -> list[tuple[Any, Places]]:
    """(label, places) of each position by itself, or in groups that `positions.py` reads; row by row where rows differ."""
    if not isinstance(groups, Mapping) or not groups:
        return [(label, ({"pos": index},)) for label, index in _entries("pos", run.longest, groups)]
    found: list[tuple[Any, Places]] = []
    for label, given in groups.items():
        rows = positions.listed(
            run.mask_of(given, f"groups={{'pos': {{{label!r}: ...}}}}"), inputs.real(run.model, run.batch)
        )
        if all(row == rows[0] for row in rows):
            found.append((label, ({"pos": rows[0]},)))
        else:
            found.append((label, tuple({"batch": [r], "pos": row} for r, row in enumerate(rows) if row)))
    return found


def _entries(axis: str, size: int, groups: Any) -> list[tuple[Any, Index]]:
    """(label, index) of each entry of an axis: each by itself, or in groups."""
    if groups is None:
        return [(i, slice(i, i + 1)) for i in range(size)]
    if isinstance(groups, int):
        if not 1 <= groups <= size:
            raise InputError(f"groups={{{axis!r}: {groups}}}: the axis has {size} entries, give 1 to {size} groups.")
        cuts = [round(i * size / groups) for i in range(groups + 1)]
        return [(f"{a}-{b - 1}" if b - a > 1 else a, slice(a, b)) for a, b in pairwise(cuts)]
    if not isinstance(groups, Mapping) or not groups:
        raise InputError(f"groups={{{axis!r}: {groups!r}}}: give a number of groups, or a dict of label -> indices.")
    return [(label, _indices(axis, label, given, size)) for label, given in groups.items()]


def _indices(axis: str, label: Any, given: Any, size: int) -> Index:
    chosen = list(range(size))[given] if isinstance(given, slice) else given
    found = [int(i) for i in ([chosen] if isinstance(chosen, int) else chosen)]
    wrong = [i for i in found if not -size <= i < size]
    if wrong or not found:
        why = f"{axis}={wrong[0]} is out of range: there are {size}" if wrong else "it is empty"
        raise InputError(f"groups={{{axis!r}: {{{label!r}: ...}}}}: {why}.")
    return [i % size for i in found]

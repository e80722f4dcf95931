"""Splicing: a dictionary in a model's forward, its features points of their own; nothing changes until something is edited.

    with gl.dictionaries.splice(model, sae):
        logits, cache = model.run_with_cache(tokens, names_filter="*.sae.hook_features")
        with gl.ablation.zero("blocks.3.mixer.hook_gated.sae.hook_features", feature=17).on(model): ...

At the point that is written, with f the features as they were read and f', r', e' what the hooks at their points left:

    hook_features          f = encode(x)
    hook_reconstruction    r = reconstruct(f', x)
    hook_error             e = y - reconstruct(f, x)
    y'                     y + (f' - f) W_dec + (r' - r) + (e' - e)

which is r' + e', written so that what nobody edits is the very y that was there: to the last bit, gradients too. The error stays
as it was when a feature is edited; without it (gl.ablation.zero("...hook_error")) the dictionary stands alone.

A dictionary that writes before it has read all (a crosscoder over layers) needs a first run, without it, that it reads; the run
with it then writes the activations of the first, changed by what its features changed: what one edit does to a later layer is
in its features already.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from gatedlens.address.names import Names
from gatedlens.address.point import Point
from gatedlens.dictionaries.dictionary import Dictionary
from gatedlens.dictionaries.reading import Reading
from gatedlens.errors import InputError, PointError
from gatedlens.model.base import HookedModel
from gatedlens.model.hookpoint import ByPosition, HookPoint
from gatedlens.options import is_many

__all__ = ["Spliced", "splice"]

# What `splice` takes; for editors: what is none gets the errors of the functions below.
if TYPE_CHECKING:
    Given: TypeAlias = Dictionary | Sequence[Dictionary] | Mapping[str, Dictionary]
else:
    Given = Any


@dataclass(frozen=True)
class FeaturePoint(Point):
    """A point whose last axes have sizes that the model does not know: its dictionary's."""

    own: tuple[tuple[str, int], ...] = ()

    def shape(self, sizes: Mapping[str, int]) -> tuple[int | str, ...]:
        """As of any point, with its own sizes."""
        return super().shape({**sizes, **dict(self.own)})

    def elements(self, sizes: Mapping[str, int], **given: int) -> int:
        """As of any point, with its own sizes."""
        return super().elements({**sizes, **dict(self.own)}, **given)


@contextmanager
def splice(model: HookedModel, dictionaries: Given) -> Iterator[list[Spliced]]:
    """`with gl.dictionaries.splice(model, sae) as (spliced,): ...`: dictionaries in the forward while the block lasts.

    dictionaries: one, a list, or {point: dictionary}. Each has three points: `{point}.sae.hook_features` [batch pos feature],
    and, at what it writes, `.sae.hook_reconstruction` and `.sae.hook_error`; `.transcoder.` or `.crosscoder.` by its `kind`. They
    are cached, edited, ablated, patched and swept as any point is, and gone when the block is left. `spliced.features`,
    `.reconstructions`, `.errors` are their names.

    Hooks act in the order in which they are put on: one that was on the point before edits what the dictionary reads.
    PointError for a point that the model lacks, and for one that a dictionary is at already; InputError for a dictionary of
    another width, point or model. Source: the error term: Marks et al. 2024, arXiv 2403.19647.
    """
    made = [Spliced.of(model, dictionary) for dictionary in _listed(model, dictionaries)]
    taken = set(model.names.points)
    for one in made:
        for name in one.rows:
            if name in taken:
                raise PointError(
                    f"{name.rpartition('.')[0]} is there already: a dictionary is spliced at {one.where} and this would be a "
                    "second one. Leave its block first, or splice another kind."
                )
            taken.add(name)
    with model.hooks([hook for one in made for hook in one.hooks()]):
        _add(model, made)
        handles = [model.register_forward_pre_hook(one.read_first, with_kwargs=True) for one in made if one.ahead]
        try:
            yield made
        finally:
            for handle in handles:
                handle.remove()
            _remove(model, made)


def _listed(model: HookedModel, given: Given) -> list[Dictionary]:
    """The dictionaries; InputError where one stands under another point than its own."""
    if isinstance(given, Mapping):
        for name, one in given.items():
            if isinstance(one, Dictionary) and model.names.find(name).name not in _found(model, one):
                raise InputError(
                    f"{name}: this dictionary reads {', '.join(one.points)}. To use it here all the same, say so: "
                    f"dictionary.at({name!r})."
                )
    some: Any = given.values() if isinstance(given, Mapping) else given
    listed: list[Any] = [some] if isinstance(some, Dictionary) or not is_many(some) else list(some)
    for one in listed:
        if not isinstance(one, Dictionary):
            raise InputError(f"{one!r:.80} is no dictionary: gl.dictionaries.load(folder) reads one.")
    if not listed:
        raise InputError("No dictionary was given: splice(model, dictionary), or a list of them.")
    return listed


def _found(model: HookedModel, dictionary: Dictionary) -> list[str]:
    return [model.names.find(name).name for name in dictionary.points]


class Spliced:
    """One dictionary in one model: its points by name, and what its hooks do. `features`, `reconstructions`, `errors`."""

    def __init__(self, model: HookedModel, dictionary: Dictionary, reads: list[Reading], writes: list[Reading]):
        self.model, self.dictionary, self.reads, self.writes = model, dictionary, reads, writes
        order = {name: at for at, name in enumerate(model.names.points)}
        self.last_read = max(reads, key=lambda one: order[one.name]).name
        first_written = min(writes, key=lambda one: order[one.name]).name
        self.ahead = order[first_written] < order[self.last_read]
        self.where = first_written if self.ahead else self.last_read
        kind = dictionary.kind
        self.features = f"{self.where}.{kind}.hook_features"
        self.reconstructions = [f"{one.name}.{kind}.hook_reconstruction" for one in writes]
        self.errors = [f"{one.name}.{kind}.hook_error" for one in writes]
        self.rows = self._rows()
        self.points = {name: HookPoint(row) for name, row in self.rows.items()}
        for name, point in self.points.items():
            point.name = name
        self.run: object = None  # the call that what follows was read in
        self.seen: dict[str, Tensor] = {}  # what was read, by point
        self.held: tuple[Tensor, Tensor, Tensor] | None = None  # x, f, f'
        self.first: dict[str, Tensor] | None = None  # the first run's activations, where the dictionary reads ahead
        self.reading = False

    def __repr__(self) -> str:
        return f"Spliced({self.dictionary!r} in {self.model.cfg.model_name})"

    @staticmethod
    def of(model: HookedModel, dictionary: Dictionary) -> Spliced:
        """`Spliced.of(model, dictionary)`: checked that it fits; nothing is put on the model yet."""
        theirs, ours = str(dictionary.facts.get("model", "")), model.cfg.model_name
        if theirs and theirs.rstrip("/").rpartition("/")[2] != ours.rstrip("/").rpartition("/")[2]:
            raise InputError(
                f"This dictionary is of {theirs}, and the model is {ours}. To use it here all the same, say so: "
                f"dictionary.at(model={ours!r})."
            )
        reads = [Reading.of(model, name, dictionary.axes, dictionary.index) for name in dictionary.points]
        writes = [Reading.of(model, name, dictionary.axes, dictionary.index) for name in dictionary.out_points]
        for verb, some, widths in (("reads", reads, dictionary.d_ins), ("writes", writes, dictionary.d_outs)):
            for one, width in zip(some, widths, strict=True):
                if one.width not in (None, width):
                    raise InputError(
                        f"This dictionary {verb} {width} numbers at {one.name}; {ours} has {one.width} there "
                        f"({one.point.axes}): it is of another model, or reads other axes (axes=, index=)."
                    )
        leads = {one.lead for one in (*reads, *writes)}
        if len(leads) > 1:
            told = ", ".join(f"{one.name} ({' '.join(one.lead)})" for one in (*reads, *writes))
            raise InputError(
                f"The points of one dictionary have the same axes beside what it reads; these have {told}."
            )
        return Spliced(model, dictionary, reads, writes)

    def _rows(self) -> dict[str, FeaturePoint]:
        """The rows of its points, by full name."""
        lead = " ".join(self.reads[0].lead)
        x = " ".join(name.rpartition(".")[2].removeprefix("hook_") for name in self.dictionary.points)
        source = f"a {self.dictionary.kind} of {', '.join(self.dictionary.points)}"
        wide = (("feature", self.dictionary.n_features),)

        rows: dict[str, tuple[str, str, tuple[tuple[str, int], ...]]] = {
            self.features: (f"{lead} feature", f"encode({x})", wide)
        }
        for one, width, r, e in zip(
            self.writes, self.dictionary.d_outs, self.reconstructions, self.errors, strict=True
        ):
            own = ((one.word, width),) if len(one.vector) > 1 else ()
            y = one.name.rpartition(".")[2].removeprefix("hook_")
            rows[r] = (f"{lead} {one.word}", f"reconstruct(features, {x})", own)
            rows[e] = (f"{lead} {one.word}", f"{y} - reconstruct(encode({x}), {x})", own)
        return {
            name: FeaturePoint(
                name.split(".", 2)[-1] if name.startswith("blocks.") else name, axes, said, source, own=own
            )
            for name, (axes, said, own) in rows.items()
        }

    def unheard(self) -> bool:
        """`spliced.unheard()`: whether nobody listens at any of its points: then it has nothing to do."""
        return all(point.at_rest() for point in self.points.values())

    def forget(self) -> None:
        """`spliced.forget()`: let go of what it holds of the last call, and of the hooks at its points."""
        self.run, self.seen, self.held, self.first = None, {}, None, None
        for point in self.points.values():
            point.remove_hooks("both", including_permanent=True)

    # -- in a forward --------------------------------------------------------------------------------------------

    @property
    def within_a_block(self) -> bool:
        """Whether all that it reads and writes is in one block: a run that begins at a later one, or in the midst of the
        positions, needs nothing of what went before."""
        blocks = {
            one.name.split(".")[1] if one.name.startswith("blocks.") else one.name
            for one in (*self.reads, *self.writes)
        }
        return len(blocks) == 1 and not self.ahead

    def hooks(self) -> list[tuple[str, Callable[..., Any]]]:
        """`spliced.hooks()`: [(name, hook)] at the points that it reads and writes, in the order in which they act."""
        kind = _ByPosition if self.within_a_block else _Hook
        found: list[tuple[str, Callable[..., Any]]] = [(one.name, kind(self._reader(one))) for one in self.reads]
        for at, one in enumerate(self.writes):
            found.append((one.name, kind(self._writer(at, one))))
        return found

    def _reader(self, one: Reading) -> Callable[..., None]:
        def read(x: Tensor, hook: HookPoint) -> None:
            if self.unheard() or (self.ahead and not self.reading):  # ahead: it has read the first run
                return
            if self.run is not self.model.running:
                self.run, self.seen, self.held = self.model.running, {}, None
            self.seen[one.name] = one.take(x).clone()  # hooks behind this one may write into x
            if one.name == self.last_read and not self.ahead:
                self._encode(self.seen)

        return read

    def _encode(self, seen: Mapping[str, Tensor]) -> None:
        """Features of what was read; they fire here."""
        missing = [one.name for one in self.reads if one.name not in seen]
        if missing:
            raise InputError(
                f"{self.dictionary!r} reads {', '.join(missing)}, which did not fire in this call: begin it at an earlier layer."
            )
        x = torch.cat([seen[one.name] for one in self.reads], dim=-1) if len(self.reads) > 1 else seen[self.last_read]
        if x.device != self.dictionary.W_enc.device:  # a copy where the model is; the user's stays where it was
            self.dictionary = copy.deepcopy(self.dictionary).to(x.device)
        f = self.dictionary.encode(x)
        # A name of its own for what the hooks get: what they leave differs from f in the graph even where the numbers are f's.
        self.held = x, f, self.points[self.features](f.view_as(f))

    def _writer(self, at: int, one: Reading) -> Callable[..., Tensor | None]:
        start = sum(self.dictionary.d_outs[:at])
        part = slice(start, start + self.dictionary.d_outs[at])
        r_point, e_point = self.points[self.reconstructions[at]], self.points[self.errors[at]]

        def write(y: Tensor, hook: HookPoint) -> Tensor | None:
            if self.unheard():
                return None
            if self.reading:
                assert self.first is not None
                self.first[one.name] = y.clone()
                return None
            whole = y
            if self.ahead:
                whole = self._first_run(one.name)
            if self.held is None or self.run is not self.model.running:
                raise InputError(
                    f"{self.dictionary!r} writes {one.name} in a call in which {self.last_read}, which it reads, did not fire: "
                    "begin it at an earlier layer."
                )
            x, f, left = self.held
            y_part = one.take(whole)
            change = self.dictionary.written(left - f, x)[..., part].to(y.dtype)
            if not (r_point.at_rest() and e_point.at_rest()):
                before = self.dictionary.reconstruct(f, x)[..., part].to(y.dtype)
                r, e = before + change, y_part - before
                change = change + (r_point(r.view_as(r)) - r) + (e_point(e.view_as(e)) - e)
            return one.put(whole, y_part + change)

        return write

    # -- where it writes before it has read all ------------------------------------------------------------------

    def read_first(
        self, model: HookedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`spliced.read_first(model, (tokens,), {})`: before a call the same call without this dictionary, which reads it."""
        if self.reading or self.unheard():
            return args, kwargs
        batch, rest = model.prepare(*args, **kwargs)
        self.reading, self.first, self.seen, self.held = True, {}, {}, None
        try:
            model(batch, **rest)
        finally:
            self.reading = False
        return (batch,), rest

    def _first_run(self, name: str) -> Tensor:
        """The first run's activation at a point that is written; the features fire at the first of these."""
        assert self.first is not None
        if self.held is None:
            self._encode(self.seen)
        self.run = self.model.running
        return self.first[name]


class _Hook:
    """A hook of a dictionary; what it does."""

    def __init__(self, does: Callable[..., Any]):
        self.does = does

    def __call__(self, tensor: Tensor, hook: Any) -> Any:
        return self.does(tensor, hook)


class _ByPosition(_Hook, ByPosition):
    """One that does to each position what it does to it alone: sweeps may run many cells in one batch."""


# -- the model's names while dictionaries are spliced ---------------------------------------------------------------


def _renamed(model: HookedModel, rows: Mapping[str, Point]) -> Names:
    """The model's names with these rows in place of its own."""
    return Names(rows, model.aliases, model.views, model.cfg.n_layers, model.cfg.model_name, model.names.elsewhere)


def _add(model: HookedModel, made: Sequence[Spliced]) -> None:
    """The points of some dictionaries among the model's, each behind the point that it stands at."""
    rows, points = dict(model.names.points), dict(model.hook_dict)
    for one in made:
        ordered = list(rows)
        for name, row in one.rows.items():
            host = name.rsplit(".", 2)[0]
            behind = [n for n in ordered if n == host or n.startswith(f"{host}.")]
            ordered.insert(ordered.index(behind[-1]) + 1, name)
            rows[name], points[name] = row, one.points[name]
        rows, points = {n: rows[n] for n in ordered}, {n: points[n] for n in ordered}
    model.names, model.hook_dict = _renamed(model, rows), points


def _remove(model: HookedModel, made: Sequence[Spliced]) -> None:
    gone = {name for one in made for name in one.rows}
    for one in made:
        one.forget()
    model.hook_dict = {name: point for name, point in model.hook_dict.items() if name not in gone}
    model.names = _renamed(model, {name: row for name, row in model.names.points.items() if name not in gone})

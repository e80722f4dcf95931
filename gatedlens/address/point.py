"""Hook points as rows: what a point is, and what other tools call it. No torch, no search; `names.py` finds a row by a name.

    Point   one row: name, axes, equation, source, lazy
    Alias   another tool's name for the same tensor
    View    another tool's name for a tensor that is computed from points
    Found   what a name turned out to stand for: a point, or a view with its layer and position

Everything that knows points (modules, caches, tables, the catalogue, tests) is derived from these rows. In a template, {l} is
a layer and {t} a position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from gatedlens.errors import PointError

MADE_OF = {"channel": ("head", "value")}  # axes that others make up, in a row: channel = head * value.size + value


@dataclass(frozen=True)
class Point:
    """`Point("mixer.hook_decay", "batch pos channel state", "exp(dt * A)", "Mamba eq. 4", lazy=True)`.

    `name` is relative to its block, or to the model for what stands outside the blocks. `axes` begins with batch.
    `equation` is written in the leaf names of other rows (without `hook_`) and of the module's weights. A lazy point
    builds its tensor only when somebody listens. One that `chooses` says no more than which tokens are looked at: no
    gradient goes through it, and an edit may leave the choice as it was.
    """

    name: str
    axes: str
    equation: str
    source: str
    lazy: bool = False
    chooses: bool = False

    @property
    def leaf(self) -> str:
        """`hook_decay` of `mixer.hook_decay`."""
        return self.name.rpartition(".")[2]

    @property
    def part(self) -> str:
        """`mixer` of `mixer.hook_decay`; empty for a point of the block itself."""
        return self.name.rpartition(".")[0]

    @cached_property
    def dims(self) -> tuple[str, ...]:
        """`("batch", "pos", "channel")` of the axes "batch pos channel"."""
        return tuple(self.axes.split())

    def axis(self, name: str) -> int:
        """`point.axis("channel")`: the dimension that the axis `name` is, or a PointError that lists the axes there are."""
        if name not in self.dims:
            raise PointError(f"{self.name} has no axis {name!r}; its axes are: {self.axes}.")
        return self.dims.index(name)

    def spans(self, name: str) -> tuple[int, ...]:
        """`point.spans("channel")`: the dimensions that an axis name addresses: its own, or those that it is made of: a
        channel is (head value). A PointError that lists the axes there are.
        """
        return tuple(map(self.dims.index, MADE_OF[name])) if self._has_parts_of(name) else (self.axis(name),)

    def reaches(self, name: str, sizes: Mapping[str, int]) -> bool:
        """`point.reaches("head", model.cfg.sizes)`: whether an index may go by this axis: its own, what its axes make up, or a
        part of one.
        """
        return name in self.dims or self._has_parts_of(name) or self.whole(name, sizes) is not None

    def _has_parts_of(self, name: str) -> bool:
        return name not in self.dims and name in MADE_OF and all(part in self.dims for part in MADE_OF[name])

    def whole(self, name: str, sizes: Mapping[str, int]) -> str | None:
        """`point.whole("head", model.cfg.sizes)`: the axis of this point that the axis `name` is a part of, "channel"; None if it
        is none.
        """
        for whole, parts in MADE_OF.items():
            if name in parts and whole in self.dims and all(part in sizes for part in parts):
                return whole
        return None

    def by(self, axes: Iterable[str], sizes: Mapping[str, int]) -> tuple[str, ...]:
        """`point.by(("head",), model.cfg.sizes)`: its dims once each of `axes` is one: "batch pos head value" of "batch pos
        channel". A PointError for an axis that it does not reach, and for two that overlap.
        """
        refuse_overlap(axes)
        dims = " ".join(self.dims)
        for axis in axes:
            if axis in dims.split():
                continue
            whole = self.whole(axis, sizes)
            if whole is None:
                self.spans(axis)  # raises, unless it is made of others
                dims = dims.replace(" ".join(MADE_OF[axis]), axis)
            else:
                dims = dims.replace(whole, " ".join(MADE_OF[whole]))
        return tuple(dims.split())

    def shape(self, sizes: Mapping[str, int]) -> tuple[int | str, ...]:
        """`point.shape({"channel": 1536})`: the axes with known sizes as numbers, the others (batch, pos) by name."""
        return tuple(sizes.get(dim, dim) for dim in self.dims)

    def elements(self, sizes: Mapping[str, int], **given: int) -> int:
        """`point.elements(model.cfg.sizes, batch=2, pos=16)`: how many numbers one activation holds, `given` the sizes of
        batch and pos. A PointError for an axis of no known size.
        """
        unknown = [dim for dim in self.dims if dim not in given and dim not in sizes]
        if unknown:
            raise PointError(
                f"{self.name} has the axis {unknown[0]!r}, and nothing says its size; known are {', '.join({**sizes, **given})}. "
                "An architecture says the sizes of its axes in the `sizes` of its config."
            )
        total = 1
        for dim in self.dims:
            total *= given[dim] if dim in given else sizes[dim]
        return total


def refuse_overlap(axes: Iterable[str]) -> None:
    """`refuse_overlap(("channel", "head"))`: a PointError for an axis beside a part of it."""
    asked = tuple(axes)
    for whole, parts in MADE_OF.items():
        both = [part for part in parts if part in asked]
        if whole in asked and both:
            raise PointError(
                f"{whole} and {both[0]} overlap: a {whole} is ({' '.join(parts)}). Say {whole}, or {' and '.join(parts)}."
            )


def overlaps(axis: str, others: Iterable[str]) -> bool:
    """`overlaps("head", ("channel",))`: whether one of the others is made of an axis, or the axis of it."""
    return any(axis in MADE_OF.get(other, ()) or other in MADE_OF.get(axis, ()) for other in others)


@dataclass(frozen=True)
class Alias:
    """`Alias("blocks.{l}.hook_skip", "blocks.{l}.mixer.hook_gate_pre", "MambaLens")`: one tensor, two names."""

    name: str
    target: str
    tool: str


def block_aliases(tool: str, *pairs: tuple[str, str]) -> tuple[Alias, ...]:
    """`block_aliases("MambaLens", ("hook_skip", "mixer.hook_gate_pre"))`: a tool's names in every block, (theirs, ours)."""
    return tuple(Alias(f"blocks.{{l}}.{theirs}", f"blocks.{{l}}.{ours}", tool) for theirs, ours in pairs)


@dataclass(frozen=True)
class View:
    """Another tool's name for something computed from our points.

    `needs` are the points to cache; `read(model, layer, *values, **params)` computes the tensor from their values.
    `visit(model, layer, values, calls)` serves hooks: `values` are those of the points `at`, in firing order, `calls`
    a list of (params, function) where `function(tensor)` returns the edited tensor; it returns the new value of the
    last point of `at`. A view without `visit` can be read and not hooked; `instead` then says what to hook.
    """

    name: str
    axes: str
    equation: str
    tool: str
    read: Callable[..., Any]
    needs: tuple[str, ...] = ()
    at: tuple[str, ...] = ()
    visit: Callable[..., Any] | None = None
    instead: str = ""


@dataclass(frozen=True)
class Found:
    """What a name stands for: a point by its full name, or a view with its layer and parameters."""

    asked: str
    name: str
    view: View | None = None
    params: Mapping[str, int] = field(default_factory=dict)

    @property
    def layer(self) -> int:
        return self.params["l"]

    def needs(self) -> tuple[str, ...]:
        """The full names of the points behind it."""
        return (self.name,) if self.view is None else tuple(fill(n, self.params) for n in self.view.needs)

    def at(self) -> tuple[str, ...]:
        """The full names of the points at which its hooks run, in firing order."""
        return (self.name,) if self.view is None else tuple(fill(n, self.params) for n in self.view.at)


def fill(template: str, params: Mapping[str, int]) -> str:
    """`fill("blocks.{l}.hook_h.{t}", {"l": 3, "t": 0})`: "blocks.3.hook_h.0"."""
    return template.format(**params)


def block_rows(part: str, rows: Iterable[Point]) -> tuple[Point, ...]:
    """The rows placed under `part`: `block_rows("mixer", rows)` renames `hook_x` to `mixer.hook_x`."""
    return tuple(replace(row, name=f"{part}.{row.name}") for row in rows)

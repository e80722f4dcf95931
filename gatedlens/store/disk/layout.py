"""Layout: how the activations of a point lie in a store, from its row.

    layout = Layout.of(model, "blocks.0.mixer.hook_state", example)
    layout.flat(activation, rows.keep)              # [token, channel, state], padding and unwanted positions gone

A point with a position is stored once a kept token, another once a row. What has one axis a token (or two a row) is a
column of the Arrow folder, Array2D(context, d); what has more is a tensor in safetensors shards, [token, ...].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from gatedlens.address.composite import picked
from gatedlens.address.entries import numbers
from gatedlens.address.names import NamesFilter, Point, listed
from gatedlens.address.point import MADE_OF, refuse_overlap
from gatedlens.errors import InputError, PointError
from gatedlens.model.base import HookedModel
from gatedlens.options import is_whole

DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64", "int64": "I64", "bool": "BOOL"}
ARROW_DTYPES = {torch.float16: "float16", torch.float32: "float32", torch.float64: "float64", torch.int64: "int64"}

OPTIONAL = ("kept", "sizes")  # fields that say nothing where they are empty, and that the first stores lack


@dataclass(frozen=True)
class Layout:
    """One point: `shape` of one entry (a token's, or a row's), `dtype` as stored, `per` "token" or "row".

    kept: the numbers of the entries that are stored along an axis, where not all are. sizes: of the model's axes that are no dims
    here but may be asked for (the head and value of a channel), and of those in `kept`.
    """

    name: str
    axes: str
    equation: str
    per: str
    stored: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kept: dict[str, list[int]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def numbers(self) -> int:
        """In one entry."""
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        """Of one entry."""
        return self.numbers * self.dtype.itemsize

    @property
    def fitting_per(self) -> str:
        """What there is one entry of: a point with a position has one a token."""
        return "token" if "pos" in self.axes.split() else "row"

    @property
    def fitting_stored(self) -> str:
        """Where entries of this shape lie: see the head of this file."""
        is_column = len(self.shape) == 1 or (self.fitting_per == "row" and len(self.shape) == 2)
        return "column" if is_column and self.dtype in ARROW_DTYPES else "tensor"

    @property
    def pos_dim(self) -> int | None:
        dims = self.axes.split()
        return dims.index("pos") if "pos" in dims else None

    def flat(
        self, activation: Shaped[Tensor, "batch ..."], keep: Bool[Tensor, "batch pos"]
    ) -> Shaped[Tensor, "entry ..."]:
        """The entries of an activation, in order, in the stored dtype: [token, ...] or [row, ...]."""
        if self.pos_dim is None:
            return activation.to(self.dtype)
        along = activation.movedim(self.pos_dim, 1)
        return (along.flatten(0, 1) if bool(keep.all()) else along[keep]).to(self.dtype)

    def picked(self, x: Shaped[Tensor, ...], index: Mapping[str, Any], front: Sequence[str]) -> Shaped[Tensor, ...]:
        """Entries of x, whose axes are `front` and those of an entry, at an index of these: heads by their numbers in the model.

        PointError for an axis that is not stored, InputError for a number out of range, or of what was not harvested.
        """
        point, sizes = Point(self.name, " ".join([*front, *self.entry_axes]), "", ""), dict(self.sizes)
        refuse_overlap(index)
        places = {}
        for axis, given in index.items():
            if axis in front or (axis not in self.entry_axes and axis not in sizes):
                raise PointError(f"{self.name} has no axis {axis!r} in this store; its entries have: {self._said()}.")
            size = sizes[axis] if axis in sizes else self.shape[self.entry_axes.index(axis)]
            asked = numbers(axis, given, size, self.name)
            kept = self.kept.get(axis, range(size))
            missing = [one for one in asked if one not in kept]
            if missing:
                raise InputError(f"{axis}={missing[0]} of {self.name} was not harvested; stored are {list(kept)}.")
            found = [kept.index(one) for one in asked]
            places[axis] = found[0] if is_whole(given) else found
        inside = {**sizes, **{axis: len(kept) for axis, kept in self.kept.items()}}
        return picked(x, point, places, inside)

    def _said(self) -> str:
        more = [axis for axis in self.sizes if axis not in self.entry_axes]
        return f"{' '.join(self.entry_axes)}{', or by ' + ' '.join(more) if more else ''}"

    @property
    def entry_axes(self) -> tuple[str, ...]:
        """The axes of one entry."""
        return tuple(axis for axis in self.axes.split()[1:] if axis != "pos")

    def to_dict(self) -> dict[str, Any]:
        told = {**asdict(self), "dtype": str(self.dtype).removeprefix("torch."), "shape": list(self.shape)}
        return {key: value for key, value in told.items() if value or key not in OPTIONAL}

    @staticmethod
    def from_dict(told: Mapping[str, Any]) -> Layout:
        known = {one.name: told[one.name] for one in fields(Layout) if one.name in told or one.name not in OPTIONAL}
        return Layout(**{**known, "dtype": getattr(torch, told["dtype"]), "shape": tuple(told["shape"])})

    @staticmethod
    def of(point: Point, name: str, example: Tensor, dtype: torch.dtype | None, context: int | None) -> Layout:
        """From a point's row and one activation of it, [1, ...]; `context`: the length of every row, if they have one."""
        dims = point.dims[1:]
        if "key_pos" in dims and context is None:
            raise InputError(
                f"{name} ({point.axes}) is as wide as its row is long, and the rows differ: pass context=..., for rows of "
                "one length."
            )
        sizes = [example.shape[1 + i] for i, dim in enumerate(dims) if dim != "pos"]
        sizes = [
            context if dim == "key_pos" and context else size
            for dim, size in zip(_without_pos(dims), sizes, strict=True)
        ]
        kept = example.dtype if dtype is None else dtype
        found = Layout(name, point.axes, point.equation, "", "", tuple(sizes), torch.float32)
        found = replace(found, per=found.fitting_per, stored=found.fitting_stored)
        # Arrow has no bfloat16; float32 holds it exactly.
        return replace(found, dtype=torch.float32 if found.stored == "column" and kept not in ARROW_DTYPES else kept)


def chosen_of(
    point: Point, name: str, example: Tensor, index: Mapping[str, Any], sizes: Mapping[str, int]
) -> tuple[Point, Tensor, dict[str, list[int]], dict[str, int]]:
    """A point and its activation with only the entries of an index, which they are by axis, and the sizes that a reader needs."""
    kept = {axis: numbers(axis, given, sizes[axis], name) for axis, given in index.items()}
    own = replace(point, axes=" ".join(point.by(kept, sizes)))
    known = {axis: sizes[axis] for axis in kept}
    if not kept:
        parts = [axis for whole, some in MADE_OF.items() for axis in (whole, *some)]
        known = {axis: sizes[axis] for axis in parts if axis not in own.dims and own.reaches(axis, sizes)}
    return own, picked(example, point, kept, sizes, name), kept, known


def _without_pos(dims: tuple[str, ...]) -> list[str]:
    return [dim for dim in dims if dim != "pos"]


def resolve(model: HookedModel, names: NamesFilter) -> list[str]:
    """The full names of the points that `names` asks for, in firing order; a name for something computed is refused."""
    for name in listed(names) if isinstance(names, str | list | tuple) else []:
        for found in model.names.hooked(name):
            if found.view is not None:
                raise PointError(
                    f"{name!r} is computed from {', '.join(found.needs()) or 'parameters'} and not stored: harvest these."
                )
    wanted = {name for group in model.names.select(names) for name in group}
    return [name for name in model.names if name in wanted]


def aliases(model: HookedModel, names: list[str]) -> dict[str, str]:
    """Other tools' names for the points of a store."""
    return {alias: target for alias, target in model.names.aliases.items() if target in names}


def last_layer(names: list[str]) -> int | None:
    """How many blocks have to run for these points; None when something behind the blocks is among them."""
    needed = 0
    for name in names:
        if name.startswith("blocks."):
            needed = max(needed, int(name.split(".")[1]) + 1)
        elif not name.endswith("embed"):
            return None
    return needed

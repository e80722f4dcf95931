"""Frame: which numbers of an activation are a vector; what stands below whatever is fitted to vectors (subspaces, probes).

    frame = Frame.of(model, "blocks.1.mixer.hook_state", axes="value", index={"head": 2})
    x = vectors(model, tokens, frame, pos=-1)            # [batch some other d]: d = value, other = all else (state), some = 1
    frame.taken(activation, places); frame.put(activation, places, new)

The vector's axis is made of `axes`, in that order; `index` keeps some entries of an axis. What is neither stands beside it
("other"): each is a vector of its own in the same space. Positions are counted among a row's real ones.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gatedlens.address.composite import turned
from gatedlens.address.entries import numbers
from gatedlens.address.names import Name
from gatedlens.address.point import Point
from gatedlens.address.positions import Positions, mask_of
from gatedlens.errors import InputError, PointError
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Batch
from gatedlens.model.cache import ActivationCache
from gatedlens.options import is_many, is_whole
from gatedlens.runs import inputs

OUTER = ("batch", "pos")
ROWS = 64  # of a run whose activations are read


@dataclass(frozen=True)
class Frame:
    """`name` the full name of a point, `axes` what a vector is made of, `index` the entries kept, as lists of numbers."""

    name: str
    axes: tuple[str, ...]
    index: Mapping[str, list[int]] = field(default_factory=dict)

    @staticmethod
    def of(
        model: HookedModel, name: Name, axes: str | Sequence[str] | None = None, index: Mapping[str, Any] | None = None
    ) -> Frame:
        """`Frame.of(model, ("state", 1), axes="value", index={"head": 2})`; axes: None for all of the point.

        PointError for a point or an axis that there is not, for a view, and for an axis of no fixed size (key_pos).
        """
        found = model.names.find(name)
        if found.view is not None:
            raise PointError(f"{name!r} is computed from {', '.join(found.needs())}: name one of these.")
        point, sizes = model.names.points[found.name], model.cfg.sizes
        given = (axes,) if isinstance(axes, str) else tuple(axes or ())
        kept: dict[str, list[int]] = {}
        for axis in (*given, *(index or {})):
            if axis in OUTER:
                raise InputError(
                    f"{axis!r} is no axis of a vector: rows and positions are told by the input and by `pos`."
                )
            if not point.reaches(axis, sizes):
                raise model.names.lacking(found.name, axis, sizes)
        for axis, chosen in (index or {}).items():
            if axis not in sizes:
                raise PointError(f"{found.name}: the axis {axis!r} has no fixed size, so no entries of it can be kept.")
            kept[axis] = numbers(axis, chosen, sizes[axis], found.name)
        inner = [dim for dim in point.by((*given, *kept), sizes) if dim not in OUTER]
        for axis in inner:
            if axis not in sizes:
                raise PointError(
                    f"{found.name} ({point.axes}): the axis {axis!r} has no fixed size, so there are no vectors."
                )
        return Frame(found.name, given or tuple(inner), kept)

    def places(self, model: HookedModel) -> Int[Tensor, "other d"]:
        """`frame.places(model)`: where the numbers of each vector stand in an activation of one position, flattened.

        PointError for a model without the point.
        """
        point = self._point(model)
        sizes = model.cfg.sizes
        own = [dim for dim in point.dims if dim not in OUTER]
        shape = [sizes[dim] for dim in own]
        x = torch.arange(math.prod(shape)).reshape(shape)
        asked = dict.fromkeys((*self.axes, *self.index))
        dims = [dim for dim in point.by(asked, sizes) if dim not in OUTER]
        x = turned(x, own, dims, sizes)
        for axis, chosen in self.index.items():
            x = x.index_select(dims.index(axis), torch.tensor(chosen))
        order = [dims.index(dim) for dim in dims if dim not in self.axes] + [dims.index(axis) for axis in self.axes]
        width = math.prod(x.shape[dims.index(axis)] for axis in self.axes)
        return x.permute(order).reshape(-1, width)

    def _point(self, model: HookedModel) -> Point:
        if self.name not in model.names.points:
            raise model.names.unknown(self.name)
        return model.names.points[self.name]

    def width(self, model: HookedModel) -> int:
        """`frame.width(model)`: how many numbers a vector has."""
        return self.places(model).shape[1]

    def others(self, model: HookedModel) -> int:
        """`frame.others(model)`: how many vectors one position holds."""
        return self.places(model).shape[0]

    @property
    def said(self) -> str:
        """`blocks.1.mixer.hook_state [value], head 2`"""
        kept = "".join(f", {axis} {', '.join(map(str, some))}" for axis, some in self.index.items())
        return f"{self.name} [{' '.join(self.axes)}]{kept}"

    def to_dict(self) -> dict[str, Any]:
        """`frame.to_dict()`: as JSON holds it."""
        return {"name": self.name, "axes": list(self.axes), "index": {a: list(i) for a, i in self.index.items()}}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Frame:
        """`Frame.from_dict(data)`: what `to_dict` gave."""
        return Frame(data["name"], tuple(data["axes"]), {axis: list(some) for axis, some in data["index"].items()})


def by_place(x: Tensor, point: Point) -> Float[Tensor, "batch pos entry"]:
    """`by_place(x, point)`: an activation as [batch, pos, all else], pos 1 where the point has none."""
    if "pos" not in point.dims:
        return x.reshape(len(x), 1, -1)
    return x.movedim(point.dims.index("pos"), 1).flatten(2)


def back(flat: Float[Tensor, "batch pos entry"], x: Tensor, point: Point) -> Tensor:
    """`back(flat, x, point)`: the way back from `by_place`, in the shape of `x`."""
    if "pos" not in point.dims:
        return flat.reshape(x.shape)
    at = point.dims.index("pos")
    return flat.reshape(x.movedim(at, 1).shape).movedim(1, at)


def chosen(
    pos: Positions, real: Bool[Tensor, "batch pos"], point: Point, what: str = "pos"
) -> Bool[Tensor, "batch pos"]:
    """`chosen(pos, real, point)`: [batch, pos], True where vectors are meant; [batch, 1] of a point without positions.

    InputError for a position of a point that has none, and for what `positions.mask_of` refuses.
    """
    if "pos" in point.dims:
        return mask_of(pos, what, real)
    if pos is not None:
        raise InputError(f"{what}={pos!r}: {point.name} ({point.axes}) has no positions: give {what}=None.")
    return torch.ones(len(real), 1, dtype=torch.bool)


@torch.no_grad()
def entries(
    model: HookedModel, batch: Batch, wanted: Mapping[str, Bool[Tensor, "batch pos"]], batch_size: int = ROWS
) -> dict[str, Float[Tensor, "place number"]]:
    """`entries(model, batch, {name: mask})`: what points hold where their mask is True, row after row, all axes flattened.

    Nothing else of an activation is kept: a state of all positions would be large. batch_size: rows of a run.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in wanted}

    def keeping(name: str, mask: Tensor) -> Any:
        return name, lambda x, hook: found[name].append(by_place(x, hook.point)[mask.to(x.device)])

    for start in range(0, len(batch.value), batch_size):
        some = slice(start, start + batch_size)
        with model.hooks([keeping(name, mask[some]) for name, mask in wanted.items()]):
            model(rows_of(batch, some), return_type=None)
    return {name: torch.cat(parts) for name, parts in found.items()}


def vectors(
    model: HookedModel, batch: Batch, frame: Frame, pos: Positions, what: str = "pos"
) -> Float[Tensor, "batch some other d"]:
    """`vectors(model, batch, frame, pos=-1)`: the vectors of each row at its positions, as many in each row.

    InputError where rows have different numbers of positions.
    """
    mask = chosen(pos, inputs.real(model, batch).cpu(), model.names.points[frame.name], what)
    some = mask.sum(1)
    if bool((some != some[0]).any()) or not bool(some.all()):
        raise InputError(f"{what}={pos!r}: every row needs as many positions; they have {some.tolist()}.")
    flat = entries(model, batch, {frame.name: mask})[frame.name]
    return flat[:, frame.places(model).to(flat.device)].unflatten(0, (len(mask), -1))


def of_cache(cache: ActivationCache, frame: Frame, mask: Bool[Tensor, "batch pos"]) -> Float[Tensor, "entry other d"]:
    """`of_cache(cache, frame, mask)`: the vectors of a cache where `mask` is True, row after row."""
    model = cache.model
    flat = by_place(cache[frame.name], model.names.points[frame.name])
    return flat[mask.to(flat.device)][:, frame.places(model).to(flat.device)]


def rows_of(batch: Batch, rows: slice | Int[Tensor, " some"]) -> Batch:
    """`rows_of(batch, slice(0, 4))`: some rows of an input."""
    return Batch(batch.value[rows], None if batch.mask is None else batch.mask[rows], batch.is_resid)


def one_place(pos: Positions) -> int | None:
    """`one_place(-1)`: a position that is one number for every row; None for any other."""
    return operator.index(pos) if is_whole(pos) else None  # type: ignore[arg-type]


def each_label(labels: Any, what: str = "labels") -> list[Any]:
    """`each_label(labels)`: labels as a list, those of a tensor or array [batch, pos] row after row; InputError for what is no
    list.
    """
    if isinstance(labels, Tensor | numpy.ndarray):
        found = labels.reshape(-1).tolist()
    elif is_many(labels) and not isinstance(labels, str | Mapping):
        found = [one.item() if isinstance(one, Tensor | numpy.generic) and one.ndim == 0 else one for one in labels]
    else:
        found = None
    if found is None or getattr(labels, "ndim", 1) == 0:
        raise InputError(f"{what}={labels!r:.80}: give a list, or a tensor, with one for each row.")
    return found


def orthonormal(rows: Float[Tensor, "some d"], least: float = 1e-9) -> Float[Tensor, "rank d"]:
    """`orthonormal(rows)`: an orthonormal basis of the span of vectors, [rank, d]; directions below `least` of the largest are
    left out, so that vectors which depend on one another give fewer rows.
    """
    if len(rows) == 0:
        return rows
    if not bool(rows.isfinite().all()):
        raise InputError(f"These vectors {list(rows.shape)} hold numbers that are not finite: they span nothing.")
    _, sizes, directions = torch.linalg.svd(rows.double(), full_matrices=False)
    return directions[sizes > least * sizes[0].clamp(min=torch.finfo(sizes.dtype).tiny)].to(rows)

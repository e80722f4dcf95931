"""Reading: the vectors that a dictionary reads or writes at a point, whatever axes the point has.

    reading = Reading.of(model, "blocks.0.mixer.hook_state", axes=None, index={})
    reading.take(states)                  # batch pos vector: all axes behind pos, flat
    Reading.of(model, "blocks.0.mixer.hook_scan", axes=("value",), index={}).take(scan)          # batch pos head vector
    reading.put(states, vectors)          # the states with these vectors in place of theirs

axes: which of the point's axes, or of those that make them up, are one vector; the others stay beside batch and pos. index: one
entry of some axes, the only one that is read or written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Shaped
from torch import Tensor

from gatedlens.address.composite import turned
from gatedlens.address.point import Point
from gatedlens.errors import InputError, PointError
from gatedlens.model.base import HookedModel

LEADING = ("batch", "pos")


@dataclass(frozen=True)
class Reading:
    """`dims`: the point's axes as they are read; `lead` and `vector`: those that stay, and those of one vector, in order."""

    name: str
    point: Point
    dims: tuple[str, ...]
    lead: tuple[str, ...]
    vector: tuple[str, ...]
    index: Mapping[str, int]
    sizes: Mapping[str, int]

    @staticmethod
    def of(model: HookedModel, name: str, axes: Sequence[str] | None, index: Mapping[str, int]) -> Reading:
        """`Reading.of(model, "blocks.0.mixer.hook_scan", ("value",), {"head": 2})`; PointError for a point or an axis that is not
        there, InputError for an index out of range."""
        found = model.names.find(name)
        if found.view is not None:
            raise PointError(
                f"{name} is computed from {', '.join(found.needs())}; a dictionary reads a point of its own."
            )
        point, sizes = model.names.points[found.name], model.cfg.sizes
        for axis in (*(axes or ()), *index):
            if axis in LEADING or not point.reaches(axis, sizes):
                raise model.names.lacking(found.name, axis, sizes)
        dims = point.by((*(axes or ()), *index), sizes)
        for axis, at in index.items():
            if axis in sizes and not -sizes[axis] <= at < sizes[axis]:
                raise InputError(f"{axis}={at} is out of range: {found.name} has {sizes[axis]} of that axis.")
        free = tuple(dim for dim in dims if dim not in index)
        vector = tuple(dim for dim in free if (dim not in LEADING if axes is None else dim in axes))
        if not vector:
            raise PointError(
                f"{found.name} ({point.axes}) has no axis for a dictionary to read, once {dict(index)} is chosen."
            )
        lead = tuple(dim for dim in free if dim not in vector)
        lead = (*(dim for dim in lead if dim in LEADING), *(dim for dim in lead if dim not in LEADING))
        return Reading(found.name, point, dims, lead, vector, dict(index), sizes)

    @property
    def width(self) -> int | None:
        """How wide a vector is; None where the input decides it."""
        known = [self.sizes.get(dim) for dim in self.vector]
        return None if None in known else math.prod(size for size in known if size is not None)

    @property
    def word(self) -> str:
        """What the axis of a vector is called: as the point calls it, or "vector" where it is of several."""
        return self.vector[0] if len(self.vector) == 1 else "vector"

    def _parts(self, x: Tensor) -> Tensor:
        """x as a view by `dims`, the chosen entries of `index` alone, the leading axes in front."""
        x, dims = turned(x, self.point.dims, self.dims, self.sizes), list(self.dims)
        for axis, at in self.index.items():
            x = x.select(dims.index(axis), at)
            dims.remove(axis)
        return x.permute([dims.index(dim) for dim in (*self.lead, *self.vector)])

    def take(self, x: Shaped[Tensor, ...]) -> Shaped[Tensor, ...]:
        """`reading.take(x)`: the vectors at this point, [*lead, width]."""
        return self._parts(x).flatten(len(self.lead))

    def put(self, x: Shaped[Tensor, ...], vectors: Shaped[Tensor, ...]) -> Shaped[Tensor, ...]:
        """`reading.put(x, vectors)`: a copy of x with the vectors in place of its own."""
        if not self.index and self.dims == (*self.lead, *self.vector):  # nothing but a flattening
            return vectors.reshape(x.shape)
        out = x.clone()
        parts = self._parts(out)  # a view into it: what is written there stands in `out`
        parts.copy_(vectors.reshape(parts.shape))
        return out

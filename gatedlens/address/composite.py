"""Composite axes: an activation by axes that its own make up, or are parts of. A channel is (head value), c = h * value.size + v.

    turned(x, point.dims, point.by(("head",), sizes), sizes)       # batch pos head value, of batch pos channel
    picked(x, point, {"head": 2}, sizes)                           # batch pos value: head 2 alone
    own_indices(point, {"head": slice(2, 3)}, sizes)               # [{"channel": slice(16, 24)}]: the same by its own axes

No numbers move: what is turned is the same tensor by other names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Shaped
from torch import Tensor

from gatedlens.address.entries import numbers
from gatedlens.address.point import MADE_OF, Point
from gatedlens.options import is_whole

Own = slice | list[int]  # what an index is once it is read: a range, or numbers


def turned(
    x: Shaped[Tensor, ...], dims: Sequence[str], to: Sequence[str], sizes: Mapping[str, int]
) -> Shaped[Tensor, ...]:
    """`turned(x, "batch pos channel".split(), "batch pos head value".split(), sizes)`: x by the axes `to`."""
    if tuple(dims) == tuple(to):
        return x
    have = dict(zip(dims, x.shape, strict=True))
    shape = [have[axis] if axis in have else _size(axis, have, sizes) for axis in to]
    return x.reshape(shape)


def _size(axis: str, have: Mapping[str, int], sizes: Mapping[str, int]) -> int:
    parts = MADE_OF.get(axis, ())
    return math.prod(have[part] for part in parts) if parts and all(part in have for part in parts) else sizes[axis]


def picked(
    x: Shaped[Tensor, ...], point: Point, index: Mapping[str, Any], sizes: Mapping[str, int], name: str = ""
) -> Shaped[Tensor, ...]:
    """`picked(x, point, {"head": [0, 2]}, sizes)`: the entries of x [all dims of the point] at an index, its axes among the dims.

    A number takes its axis away, as in indexing; several keep it, in their order. InputError for an index out of range.
    """
    dims = list(point.by(index, sizes))
    x = turned(x, point.dims, dims, sizes)
    for axis, given in index.items():
        dim = dims.index(axis)
        chosen = numbers(axis, given, x.shape[dim], name or point.name)
        if is_whole(given):
            x = x.select(dim, chosen[0])
            dims.pop(dim)
        else:
            x = x.index_select(dim, x.new_tensor(chosen).long())
    return x


def own_indices(point: Point, index: Mapping[str, Own], sizes: Mapping[str, int]) -> list[dict[str, Own]]:
    """`own_indices(point, {"head": [2]}, sizes)`: the same entries by the point's own axes. Several indices, which together mean
    them, where channels are said of a point [head value]: they need not be a rectangle of heads and values.
    """
    found = [{axis: given for axis, given in index.items() if axis in point.dims}]
    for whole, (first, second) in MADE_OF.items():
        width = sizes.get(second, 1)
        if whole in point.dims and (first in index or second in index):
            many, few = (_listed(index.get(part), sizes[part]) for part in (first, second))
            channels = [i * width + j for i in many for j in few]
            found = [{**one, whole: _range(channels)} for one in found]
        elif whole in index and whole not in point.dims:
            by_first: dict[int, list[int]] = {}
            for channel in _listed(index[whole], sizes[whole]):
                by_first.setdefault(channel // width, []).append(channel % width)
            found = [{**one, first: [i], second: few} for one in found for i, few in by_first.items()]
    return found


def _listed(given: Own | None, size: int) -> list[int]:
    return list(range(size)) if given is None else list(range(size))[given] if isinstance(given, slice) else given


def _range(places: list[int]) -> Own:
    """A slice, which is faster, where the places are one behind the other."""
    start, stop = places[0], places[-1] + 1
    return slice(start, stop) if places == list(range(start, stop)) else places

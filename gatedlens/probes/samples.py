"""Samples: the vectors that a probe is fitted to, with their labels, from a cache or a store.

    found = Samples.of(cache, ("resid_post", 3), pos=-1)             # found.x [entry, d], found.row [entry]
    y = labelled(labels, found)                                       # one a row, one an entry, or [batch, pos]

An entry is one position of one row (a store's sample). Positions count a row's real ones; of a store its stored ones.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gatedlens.address.key import Key
from gatedlens.address.point import Point
from gatedlens.address.positions import Positions, mask_of
from gatedlens.errors import InputError, PointError
from gatedlens.model.cache import ActivationCache
from gatedlens.options import is_whole
from gatedlens.runs.vectors import Frame, chosen, each_label, of_cache


@runtime_checkable
class Stored(Protocol):
    """What is read of an activation store (`gl.store.open`): its points, and their activations sample by sample."""

    manifest: dict[str, Any]

    @property
    def names(self) -> list[str]: ...

    def __len__(self) -> int: ...
    def __getitem__(self, key: Key) -> Any: ...
    def find(self, key: Key) -> Any:
        """`store.find(("gated", 1))`: the point as it is stored."""
        ...

    def positions(self, sample: int) -> Int[Tensor, " pos"]:
        """`store.positions(7)`: which positions of a sample are stored."""
        ...


# Where vectors come from; labels. For editors and type checkers: whoever passes something else gets the errors of this file.
if TYPE_CHECKING:
    from gatedlens.store.reading import Store

    Source: TypeAlias = ActivationCache | Store
    Labels: TypeAlias = Tensor | Sequence[Hashable]
else:
    Source = Labels = Any


@dataclass(frozen=True)
class Samples:
    """`x` [entry, d] and the `row` of each entry, of `rows` rows; `mask` [batch, pos] is where a cache's entries stand."""

    x: Float[Tensor, "entry d"]
    row: Int[Tensor, " entry"]
    rows: int
    frame: Frame
    model: str
    mask: Bool[Tensor, "batch pos"] | None = None

    @staticmethod
    def of(
        source: Source, name: Key, pos: Positions, axes: str | Sequence[str] | None, index: Mapping[str, Any]
    ) -> Samples:
        """`Samples.of(cache, ("resid_post", 3), -1, None, {})`; PointError for a point that there is not; InputError for what
        is no cache or store, and for a point of which a position holds several vectors.
        """
        if isinstance(source, ActivationCache):
            return _of_cache(source, name, pos, axes, index)
        if isinstance(source, Stored):
            return _of_store(source, name, pos, axes, index)
        raise InputError(
            f"A probe is fitted to the activations of a cache (run_with_cache) or of a store (gl.store.open); this is "
            f"{type(source).__name__}."
        )


def _of_cache(
    cache: ActivationCache, name: Key, pos: Positions, axes: str | Sequence[str] | None, index: Mapping[str, Any]
) -> Samples:
    if cache.sliced or not cache.has_batch_dim:
        raise InputError("This needs a cache of all positions, with its batch axis: no pos_slice or remove_batch_dim.")
    found = cache.find(name)
    frame = Frame.of(cache.model, found.name, axes, index)
    point, x = cache.model.names.points[frame.name], cache[frame.name]
    if frame.others(cache.model) != 1:
        raise InputError(
            f"{frame.said}: a position holds {frame.others(cache.model)} vectors of these axes; a probe reads one. "
            "Name more axes, or one entry of the others (head=2)."
        )
    at = point.dims.index("pos") if "pos" in point.dims else None
    shape = (len(x), 1 if at is None else x.shape[at])
    real = torch.ones(shape, dtype=torch.bool) if cache.mask is None or at is None else cache.mask.bool().cpu()
    mask = chosen(pos, real, point)
    return Samples(
        of_cache(cache, frame, mask)[:, 0], mask.nonzero()[:, 0], len(x), frame, cache.model.cfg.model_name, mask
    )


def _of_store(
    store: Stored, name: Key, pos: Positions, axes: str | Sequence[str] | None, index: Mapping[str, Any]
) -> Samples:
    layout = store.find(name)
    if axes is not None:
        raise InputError(
            f"axes={axes!r}: of a store a vector is all that a position holds; keep some entries by head=2, say."
        )
    column = store[layout.name]
    column = column.select(**index) if index else column
    found: list[Tensor] = []
    for sample in range(len(store)):
        x = column[sample]
        per_row = layout.per == "row"
        if per_row and pos is not None:
            raise InputError(f"pos={pos!r}: {layout.name} ({layout.axes}) has no positions: give pos=None.")
        x = x.unsqueeze(0) if per_row else x
        if pos is not None:
            x = column[sample, pos].unsqueeze(0) if is_whole(pos) else x[_stored(store, sample, pos)]
        found.append(x.flatten(1))
    row = torch.cat([torch.full((len(x),), i) for i, x in enumerate(found)])
    kept = {**layout.kept, **{axis: _listed(given, layout, axis) for axis, given in index.items()}}
    dims = Point(layout.name, layout.axes, "", "").by(kept, layout.sizes)
    frame = Frame(layout.name, tuple(dim for dim in dims if dim not in ("batch", "pos")), kept)
    return Samples(torch.cat(found), row, len(store), frame, str(store.manifest["model"]["name"]))


def _stored(store: Stored, sample: int, pos: Positions) -> Bool[Tensor, " entry"]:
    """Which stored positions of a sample are meant."""
    places = store.positions(sample)
    whole = mask_of(pos, "pos", torch.ones(1, int(places.max()) + 1, dtype=torch.bool))[0]
    return whole[places]


def _listed(given: Any, layout: Any, axis: str) -> list[int]:
    if isinstance(given, slice):
        size = layout.sizes.get(axis)
        if size is None:
            raise PointError(f"{layout.name}: how many entries of {axis!r} there are is not known: list their numbers.")
        return list(range(size))[given]
    return [int(one) for one in torch.as_tensor(given).reshape(-1)]


def labelled(labels: Labels, samples: Samples, what: str = "labels") -> list[Any]:
    """`labelled(labels, samples)`: a label for each entry.

    labels: one a row, one an entry, or of a cache [batch, pos], laid out as the input. InputError for another number.
    """
    each, given = each_label(labels, what), labels
    if isinstance(given, Tensor) and given.ndim == 2:
        if samples.mask is None or tuple(given.shape) != tuple(samples.mask.shape):
            there = "a store's entries" if samples.mask is None else f"positions {list(samples.mask.shape)}"
            raise InputError(f"{what} are {list(given.shape)}: they do not match {there}.")
        found: list[Any] = given.cpu()[samples.mask].tolist()
        return found
    if isinstance(given, Tensor) and given.ndim != 1:
        raise InputError(f"{what} have the shape {list(given.shape)}: give one a row, or [batch, pos].")
    if len(each) == samples.rows:
        return [each[int(row)] for row in samples.row]
    if len(each) == len(samples.row):
        return each
    raise InputError(
        f"There are {len(each)} {what}, {samples.rows} rows and {len(samples.row)} entries of {samples.frame.name}: "
        "give one for each row, or for each entry."
    )

"""Column: one point of a store, sample by sample: `column = store["gated", 1]`; nothing is read before it is asked for."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy
import torch
from jaxtyping import Shaped
from torch import Tensor

from gatedlens.address.entries import Index
from gatedlens.errors import InputError
from gatedlens.options import is_whole
from gatedlens.store.disk.layout import Layout

if TYPE_CHECKING:
    from gatedlens.store.reading import Store
else:
    Store = Any


class Column:
    """One point of a store, sample by sample: `column = store["gated", 1]`. Nothing is read before it is asked for.

        column[7]                 # pos channel: the eighth sample
        column[7, -1]             # channel: at its last stored position; a slice, list or tensor of positions as well
        column[0:16]              # sample pos channel, where the samples have one length
        column.select(head=2)[7]  # pos value: one head, of a point whose channels are (head value)
        for sample in column: ...

    InputError for an index that is no such number, for a sample or position that is not there, and for samples of
    different lengths side by side.
    """

    def __init__(self, store: Store, layout: Layout, index: Mapping[str, Index] | None = None):
        self.store = store
        self.layout = layout
        self.index = dict(index or {})

    def select(self, **index: Index) -> Column:
        """`column.select(head=2)[7]`: the column with only these entries of each activation.

        index: any axis of an entry, or one that these make up or are part of: a number, which takes the axis away, or a slice,
        list or mask, which keeps it; heads by their numbers in the model. PointError for an axis that there is not; InputError
        for an index out of range, and for what was not harvested.
        """
        empty = torch.empty(0, *self.layout.shape, dtype=self.layout.dtype)
        self.layout.picked(empty, index, ("entry",))
        return Column(self.store, self.layout, index)

    @property
    def name(self) -> str:
        return self.layout.name

    def __len__(self) -> int:
        return len(self.store)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[sample] for sample in range(len(self)))

    def __repr__(self) -> str:
        return f"Column({self.name}, {len(self)} samples, {self.layout.axes}, {self.layout.dtype})"

    def __getitem__(self, index: Any) -> Shaped[Tensor, ...]:
        if isinstance(index, tuple) and len(index) != 2:
            raise InputError(f"{self.name}[{_said(index)}]: give a sample, or a sample and a position.")
        sample, position = index if isinstance(index, tuple) else (index, None)
        if isinstance(sample, slice) or _is_several(sample):
            return self._several(sample, position)
        if not is_whole(sample):
            raise InputError(f"{self.name}[{_said(sample)}]: a sample is a number, a slice or a list of numbers.")
        sample = operator.index(sample)
        whole = self._sample(sample)
        return whole if position is None else whole[self._at(sample, position)]

    def _sample(self, sample: int) -> Tensor:
        batch, row = self.store.place(sample)
        values, ends = self.store.batch_of(self.name, batch)
        found = values[row] if self.layout.per == "row" else values[ends[row] : ends[row + 1]]
        front = () if self.layout.per == "row" else ("entry",)
        return self.layout.picked(found, self.index, front).clone()

    def _several(self, samples: Any, position: Any) -> Tensor:
        chosen = self._numbers(samples, len(self), "a sample")
        found = [self[i] if position is None else self[i, position] for i in chosen]
        shapes = {tuple(x.shape) for x in found}
        if len(shapes) != 1:
            raise InputError(
                f"{self.name}[{samples}]: the samples differ in length ({', '.join(map(str, sorted(shapes)[:3]))}): iterate "
                "over them, or read one position of each."
                if shapes
                else f"{self.name}[{samples}] picks no sample: there are {len(self)}."
            )
        return torch.stack(found)

    def _at(self, sample: int, position: Any) -> Any:
        """Where a position (or several) of a sample is among its stored ones; negative ones count these from the end.

        A slice is of the row's positions, too: the stored ones among them.
        """
        if self.layout.per == "row":
            raise InputError(f"{self.name} ({self.layout.axes}) has no positions: leave {position!r} out.")
        if _is_several(position):
            return [self._at(sample, one) for one in self._numbers(position, 0, "a position")]
        stored = self.store.positions(sample).tolist()
        if isinstance(position, slice):
            asked = set(self._numbers(position, stored[-1] + 1, "a position"))
            return [place for place, one in enumerate(stored) if one in asked]
        if not is_whole(position):
            raise InputError(
                f"{self.name}[{sample}, {_said(position)}]: a position is a number, a slice or a list of numbers."
            )
        position = operator.index(position)
        if position < 0 and -position <= len(stored):
            return len(stored) + position
        if position not in stored:
            raise InputError(
                f"Position {position} of sample {sample} is not stored: it has {len(stored)}, {stored[0]} to {stored[-1]}."
            )
        return stored.index(position)

    def _numbers(self, given: Any, count: int, what: str) -> Sequence[int]:
        """The numbers that a slice of `count`, or a list, means; InputError for one that holds anything else."""
        if isinstance(given, slice):
            try:
                return range(count)[given]
            except (TypeError, ValueError) as error:  # a[1.5:], a[::0]
                raise InputError(f"{self.name}[{_said(given)}]: {error}.") from error
        if isinstance(given, Tensor | numpy.ndarray) and given.ndim != 1:
            raise InputError(f"{self.name}[...] has the shape {list(given.shape)}: give a list of numbers, [some].")
        numbers = given.tolist() if isinstance(given, Tensor | numpy.ndarray) else given
        for one in numbers:  # a mask of truths is no list of numbers: as such it would read samples 0 and 1
            if not is_whole(one):
                hint = " Of a mask: `mask.nonzero().flatten()`." if isinstance(one, bool) else ""
                raise InputError(f"{self.name}[{_said(given)}]: {what} is a whole number, and {one!r} is none.{hint}")
        return [operator.index(one) for one in numbers]


def _is_several(given: Any) -> bool:
    """Whether an index lists numbers: a tensor or array of no axes is one number."""
    return bool(given.ndim) if isinstance(given, Tensor | numpy.ndarray) else isinstance(given, list | range)


def _said(index: Any) -> str:
    """An index as its error repeats it."""
    if isinstance(index, slice):
        parts = ["" if one is None else repr(one) for one in (index.start, index.stop, index.step)]
        return ":".join(parts if parts[2] else parts[:2])
    text = ", ".join(map(repr, index)) if isinstance(index, tuple) else repr(index)
    return text if len(text) <= 80 else f"{text[:77]}..."

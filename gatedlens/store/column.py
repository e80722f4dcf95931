"""Column: one point of a store, sample by sample; nothing is read before it is asked for.

gated = store["gated", 1]
gated[7]                                   # pos channel: the eighth sample
gated[7, -1]                               # channel: at its last stored position
gated[0:16]                                # sample pos channel, where the samples have one length
for sample in gated: ...
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from gatedlens.errors import InputError
from gatedlens.store.disk.layout import Layout


class Column:
    """One point of a store: `column[sample]`, `column[sample, position]`, `column[a:b]`, `iter(column)`."""

    def __init__(self, store: Any, layout: Layout):
        self.store = store
        self.layout = layout

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
        sample, position = index if isinstance(index, tuple) else (index, None)
        if isinstance(sample, slice | list | range | Tensor):
            return self._several(sample, position)
        try:
            sample = operator.index(sample)
        except TypeError as error:
            message = f"{self.name}[{sample!r}]: a sample is a number, a slice or a list of numbers."
            raise InputError(message) from error
        whole = self._sample(sample)
        return whole if position is None else whole[self._at(sample, position)]

    def _sample(self, sample: int) -> Tensor:
        batch, row = self.store.place(sample)
        values, ends = self.store.batch_of(self.name, batch)
        return (values[row] if self.layout.per == "row" else values[ends[row] : ends[row + 1]]).clone()

    def _several(self, samples: Any, position: Any) -> Tensor:
        chosen = range(len(self))[samples] if isinstance(samples, slice) else [int(i) for i in samples]
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
        if isinstance(position, list | Tensor | range):
            return [self._at(sample, int(one)) for one in position]
        stored = self.store.positions(sample).tolist()
        if isinstance(position, slice):
            asked = set(range(stored[-1] + 1)[position])
            return [place for place, one in enumerate(stored) if one in asked]
        if position < 0 and -position <= len(stored):
            return len(stored) + position
        if position not in stored:
            raise InputError(
                f"Position {position} of sample {sample} is not stored: it has {len(stored)}, {stored[0]} to {stored[-1]}."
            )
        return stored.index(position)

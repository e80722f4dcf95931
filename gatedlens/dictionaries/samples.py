"""Samples: what a dictionary makes of texts, of a store or a batch, some at a time.

for chunk in Samples(model, spliced, source).chunks():
    for number, tokens, features in chunk.samples(): ...
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gatedlens.dictionaries.splicing import Spliced
from gatedlens.errors import PointError
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Batch
from gatedlens.runs import inputs

ROWS = 64  # of a batch, run together
Read = Callable[[], tuple[Tensor, dict[str, Tensor], list[int]]]  # tokens, what is read by point, where samples begin


class Chunk(NamedTuple):
    """Some samples one behind the other: tokens [entry], features [entry feature], and where each begins and the last ends."""

    first: int
    tokens: Tensor
    features: Tensor
    ends: list[int]

    def samples(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(its number, tokens [pos], features [pos feature]) of each."""
        for i, (begin, end) in enumerate(pairwise(self.ends)):
            yield self.first + i, self.tokens[begin:end], self.features[begin:end]


class Samples:
    """`for chunk in samples.chunks()`: all samples, some at a time; `wanted(first, n)` says which chunks are read at all."""

    def __init__(self, model: HookedModel, one: Spliced, source: Any):
        self.model, self.one = model, one
        self.store = None if isinstance(source, str | list | tuple | Tensor | Batch) else source
        if self.store is None:
            self.batch = inputs.ready(model, source)
            return
        lacking = [reading.name for reading in one.reads if reading.name not in self.store]
        if lacking:
            raise PointError(f"{', '.join(lacking)} is not in {self.store!r}: harvest it.")

    def chunks(self, wanted: Container[int] | None = None) -> Iterator[Chunk]:
        """All samples; of `wanted`, only the chunks that hold one of these."""
        parts = self._of_inputs if self.store is None else self._of_store
        for first, n, read in parts():
            if wanted is None or any(sample in wanted for sample in range(first, first + n)):
                tokens, values, ends = read()
                x = torch.cat([one.take(values[one.name].unsqueeze(0)) for one in self.one.reads], -1)
                f = self.one.dictionary.encode(x)[0]
                yield Chunk(first, tokens.cpu(), (f if f.ndim == 2 else f.flatten(1, -2).amax(1)).cpu(), ends)

    def _of_store(self) -> Iterator[tuple[int, int, Read]]:
        """A batch of the harvest at a time."""
        store: Any = self.store
        for batch, entry in enumerate(store.batches):

            def read(batch: int = batch) -> tuple[Tensor, dict[str, Tensor], list[int]]:
                tokens, ends = store.batch_of("token_ids", batch)
                return tokens, {one.name: store.batch_of(one.name, batch)[0] for one in self.one.reads}, ends

            yield store.first_row[batch], entry.rows, read

    def _of_inputs(self) -> Iterator[tuple[int, int, Read]]:
        """Some rows of the batch at a time."""
        names = [one.name for one in self.one.reads]
        for start in range(0, len(self.batch.value), ROWS):
            some = slice(start, start + ROWS)
            mask = None if self.batch.mask is None else self.batch.mask[some]
            part = Batch(self.batch.value[some], mask, self.batch.is_resid)

            def read(part: Batch = part) -> tuple[Tensor, dict[str, Tensor], list[int]]:
                real = inputs.real(self.model, part)
                _, cache = self.model.run_with_cache(part, names_filter=names)
                return (
                    part.value[real],
                    {name: cache[name][real] for name in names},
                    [0, *accumulate(real.sum(1).tolist())],
                )

            yield start, len(part.value), read

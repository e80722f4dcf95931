"""Corpora: whatever holds documents, as a stream of them, one at a time in memory.

corpus = read("corpus.jsonl", model)          # whatever holds documents: see sources.py
for document in corpus.documents(): ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from jaxtyping import Bool, Shaped
from torch import Tensor

from gatedlens.store.corpus.encoding import Item, Tokens

SAMPLE = 64  # documents from which the length of a corpus is estimated


@dataclass(frozen=True)
class Document:
    """`value`: ids [pos], or pixels [channels, height, width]. `marked`: the positions that positions="mask" keeps."""

    index: int
    value: Shaped[Tensor, ...]
    marked: Bool[Tensor, " pos"] | None = None


def _nothing() -> None:
    return None


@dataclass
class Corpus:
    """`described` goes into the manifest; a corpus that can be told from another has a size or a checksum in it.

    items: a fresh iterator over what it holds. count, size: how many documents or bytes it holds, width: the length of
    each document, where that is known. begin: to be called before the pass that counts (an iterator has only one).
    """

    described: dict[str, Any]
    items: Callable[[], Iterator[Item]]
    encode: Callable[[Item], tuple[Tensor, Tensor | None]]
    count: int | None = None
    size: int | None = None
    width: int | None = None  # the length of every row of a rectangle
    begin: Callable[[], None] = _nothing
    empty: int = 0

    @property
    def is_text(self) -> bool:
        return isinstance(self.encode, Tokens)

    def documents(self) -> Iterator[Document]:
        """Every document that is not empty, in order; `empty` counts the others."""
        self.empty = 0
        for index, item in enumerate(self.items()):
            value, marked = self.encode(item)
            if value.numel():
                yield Document(index, value, marked)
            else:
                self.empty += 1

    def expected_tokens(self) -> int | None:
        """About how many tokens it holds, from its first documents; None for an iterable of unknown length."""
        first = list(islice(self.items(), SAMPLE))
        lengths = [len(self.encode(item)[0]) for item in first]
        if len(first) < SAMPLE:
            return sum(lengths)
        if self.count is not None:
            return sum(lengths) * self.count // len(first)
        read = sum(item.size for item in first)
        return None if self.size is None or not read else sum(lengths) * self.size // read

"""Batches: a stream of documents as the rectangles that the model reads, with what is to be kept of each.

    for rows in Batches(corpus, model, batch_size=8, context=128, max_tokens=10_000): ...

context=None: a row is a document, shorter ones padded on the right; one of more than n_ctx tokens is cut into rows.
context=n: documents stand one behind the other and are cut into rows of n tokens, SAELens's layout; the rest is left out.

b batch, l pos. The batches depend on the corpus and the settings alone: a later run makes the same ones.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from gatedlens.errors import InputError
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Batch
from gatedlens.model.language import HookedLanguageModel
from gatedlens.store.corpus.corpus import Corpus, Document
from gatedlens.store.disk.form import is_whole

POSITIONS = ("all", "last", "mask")


@dataclass
class Rows:
    """One batch. `value`: ids [b, l] or images; `mask`: where a token is real; `keep`: the positions to keep, real ones.

    documents [b, l]: the document of each position. first_token, first_row: how many the batches before hold.
    """

    value: Shaped[Tensor, "batch ..."]
    mask: Bool[Tensor, "batch pos"] | None
    keep: Bool[Tensor, "batch pos"]
    documents: Int[Tensor, "batch pos"]
    index: int = 0
    first_token: int = 0
    first_row: int = 0

    @property
    def counts(self) -> Int[Tensor, " batch"]:
        """How many positions of each row are kept."""
        return self.keep.sum(1)

    @property
    def kept(self) -> int:
        return int(self.keep.sum())

    @property
    def positions(self) -> Int[Tensor, " kept"]:
        """The position in its row of each kept one."""
        return self.keep.nonzero()[:, 1]

    @property
    def is_text(self) -> bool:
        return self.value.ndim == 2

    @property
    def read(self) -> int:
        """How many tokens the model reads."""
        return self.keep.numel() if self.mask is None else int(self.mask.sum())

    def checksum(self) -> int:
        """Tells this batch from another: of what the model reads, and what is kept, and of which documents."""
        parts = [self.value, self.keep.to(torch.uint8), self.documents]
        parts += [] if self.mask is None else [self.mask.to(torch.uint8)]
        total = 0
        for part in parts:
            total = zlib.crc32(part.cpu().contiguous().flatten().view(torch.uint8).numpy().data, total)
        return total


@dataclass
class Row:
    """One row before it is padded: `ids` (or an image), `marked`, and the document of each position."""

    ids: Shaped[Tensor, ...]
    marked: Bool[Tensor, " pos"] | None
    documents: Int[Tensor, " pos"]


@dataclass
class Batches:
    """`for rows in Batches(...)`; afterwards `notes` says what the corpus held that is not in any batch."""

    corpus: Corpus
    model: HookedModel
    batch_size: int
    context: int | None = None
    max_tokens: int | None = None
    positions: str = "all"
    split: int = field(default=0, init=False)  # documents that were cut, since they were longer than n_ctx
    rest: int = field(default=0, init=False)  # tokens at the end that did not fill a row

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            raise InputError(f"positions={self.positions!r}: it is {', '.join(map(repr, POSITIONS))}.")
        for name in ("batch_size", "context", "max_tokens"):
            value = getattr(self, name)
            if value is not None and not is_whole(value, least=1):
                raise InputError(
                    f"{name}={value!r}: it is a number of at least 1{'' if name == 'batch_size' else ', or None'}."
                )
        if self.context is not None and not isinstance(self.model, HookedLanguageModel):
            raise InputError(f"context={self.context}: an image is one row, whose length the model sets; leave it out.")

    def __iter__(self) -> Iterator[Rows]:
        rows, index, tokens = self._limited(self._rows()), 0, 0
        while chunk := list(islice(rows, self.batch_size)):
            batch = self._batch(chunk)
            batch.index, batch.first_token, batch.first_row = index, tokens, index * self.batch_size
            yield batch
            index, tokens = index + 1, tokens + batch.kept

    @property
    def length(self) -> int | None:
        """How many positions every row has; None where rows differ."""
        if not isinstance(self.model, HookedLanguageModel):
            return self.model.positions(Batch(torch.empty(1, *self.model.image_shape)))
        width = self.corpus.width
        return width if self.context is None and width is not None and width <= self.model.cfg.n_ctx else self.context

    @property
    def notes(self) -> list[str]:
        """What a full pass left out or cut."""
        said = {
            f"{self.corpus.empty} empty documents were left out": self.corpus.empty,
            f"{self.split} documents of more than {self.model.cfg.n_ctx} tokens were cut into rows": self.split,
            f"{self.rest} tokens at the end, which fill no row of {self.context}, were left out": self.rest,
        }
        return [note for note, count in said.items() if count]

    # -- rows ----------------------------------------------------------------------------------------------------

    def _rows(self) -> Iterator[Row]:
        self.split = self.rest = 0
        documents = self.corpus.documents()
        if not isinstance(self.model, HookedLanguageModel):
            return map(self._image, documents)
        return self._whole(documents) if self.context is None else self._packed(documents, self.context)

    def _image(self, document: Document) -> Row:
        """An image; how many positions it has is the model's to say."""
        value = self.model.prepare(document.value.unsqueeze(0))[0].value[0]
        length = self.model.positions(Batch(value.unsqueeze(0)))
        return Row(value, None, torch.full((length,), document.index))

    def _whole(self, documents: Iterable[Document]) -> Iterator[Row]:
        longest = self.model.cfg.n_ctx
        for document in documents:
            self.split += len(document.value) > longest
            yield from self._pieces(document, longest)

    def _pieces(self, document: Document, size: int) -> Iterator[Row]:
        for start in range(0, len(document.value), size):
            ids = document.value[start : start + size]
            marked = None if document.marked is None else document.marked[start : start + size]
            yield Row(ids, marked, torch.full_like(ids, document.index))

    def _packed(self, documents: Iterable[Document], context: int) -> Iterator[Row]:
        """Rows of exactly `context` tokens: at most one row and one document are in memory."""
        held: list[Row] = []
        have = 0
        for document in documents:
            start = 0
            while start < len(document.value):
                piece = next(self._pieces(self._from(document, start), context - have))
                held.append(piece)
                have, start = have + len(piece.ids), start + len(piece.ids)
                if have == context:
                    yield _joined(held)
                    held, have = [], 0
        self.rest = have

    def _from(self, document: Document, start: int) -> Document:
        marked = None if document.marked is None else document.marked[start:]
        return Document(document.index, document.value[start:], marked)

    def _limited(self, rows: Iterator[Row]) -> Iterator[Row]:
        """The rows up to `max_tokens`: the row that would exceed it is the first that is left out."""
        total = 0
        for row in rows:
            total += len(row.documents)
            if self.max_tokens is not None and total > self.max_tokens:
                if total == len(row.documents):
                    raise InputError(
                        f"max_tokens={self.max_tokens}: the first row alone has {total} tokens; give more, or a context."
                    )
                return
            if self._kept(row).any():
                yield row

    def _kept(self, row: Row) -> Bool[Tensor, " pos"]:
        """Which positions of a row are kept."""
        keep = torch.zeros(len(row.documents), dtype=torch.bool)
        if self.positions == "mask":
            if row.marked is None:
                raise InputError(
                    f"positions='mask', and document {int(row.documents[0])} has no mask: give the corpus as "
                    '{"ids": ..., "mask": ...}, or records with these fields.'
                )
            return row.marked
        keep[-1 if self.positions == "last" else slice(None)] = True
        return keep

    # -- batches -------------------------------------------------------------------------------------------------

    def _batch(self, rows: list[Row]) -> Rows:
        lengths = torch.tensor([len(row.documents) for row in rows])
        longest = int(lengths.max())
        real = torch.arange(longest) < lengths.unsqueeze(1)
        keep = torch.stack([F.pad(self._kept(row), (0, longest - len(row.documents))) for row in rows])
        documents = torch.stack([F.pad(row.documents, (0, longest - len(row.documents))) for row in rows])
        if rows[0].ids.ndim > 1:
            return Rows(torch.stack([row.ids for row in rows]), None, keep, documents)
        tokenizer = self.model.tokenizer
        known = () if tokenizer is None else (tokenizer.pad_token_id, tokenizer.eos_token_id)
        pad_id = next((i for i in known if i is not None), 0)
        ids = torch.stack([F.pad(row.ids, (0, longest - len(row.ids)), value=pad_id) for row in rows])
        return Rows(ids, None if bool(real.all()) else real, keep, documents)


def _joined(rows: list[Row]) -> Row:
    marked = [row.marked for row in rows]
    both = None if any(m is None for m in marked) else torch.cat([m for m in marked if m is not None])
    return Row(torch.cat([r.ids for r in rows]), both, torch.cat([r.documents for r in rows]))

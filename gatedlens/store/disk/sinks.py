"""Sinks: where batches are committed, one at a time and for good. The same three questions for tensors and statistics:

    sink.done                         # how many batches are committed
    sink.damaged                      # which of these are not what was written, and must be done again
    sink.commit(rows, tensors)        # all of the batch or nothing

A process that is killed loses the batch under way: the journal holds what is committed, and what else lies in the files
is cut off by the next run. When the machine itself stops, the last seconds may be lost as well: their checksums tell.
"""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from gatedlens.errors import StoreError
from gatedlens.files import sync_folder, write_whole
from gatedlens.store.corpus.batches import Rows
from gatedlens.store.disk.arrow import Columns
from gatedlens.store.disk.files import Piece, explained
from gatedlens.store.disk.journal import Entry, Extent, Journal
from gatedlens.store.disk.layout import Layout
from gatedlens.store.disk.shards import ArrowFormat, Format, SafetensorsFormat, Stream, bytes_of, card, checksum
from gatedlens.store.disk.statistics_file import Held, read_statistics, unflattened, write_statistics
from gatedlens.store.statistics import Part, Reduction

log = logging.getLogger(__name__)
SYNC_SECONDS = 5.0  # how often data are brought to the disk: what a power cut may cost


class Sink:
    """What both share: the journal, and that a batch which is there already is the same batch."""

    def __init__(self, folder: Path):
        self.folder = folder
        with explained(folder / "journal.jsonl"):
            self.journal = Journal(folder / "journal.jsonl")
        self.damaged: dict[int, str] = {}

    @property
    def done(self) -> int:
        return len(self.journal.entries)

    @property
    def tokens(self) -> int:
        """Tokens that the committed batches read."""
        return sum(entry.read for entry in self.journal.entries)

    @property
    def safe(self) -> str:
        return f"{self.done} batches ({self.tokens} tokens) are safe: run the same call again to go on from there."

    def wants(self, rows: Rows) -> bool:
        """Whether the batch is still to be done; StoreError if another one stands in its place."""
        if rows.index >= self.done:
            return True
        if self.journal.entries[rows.index].input != rows.checksum():
            raise StoreError(
                f"{self.folder}: batch {rows.index} of this corpus is not the one that was harvested: the corpus has "
                "changed, or is another one. Use another folder."
            )
        return rows.index in self.damaged

    def entry(self, rows: Rows, at: Sequence[Extent] = ()) -> Entry:
        return Entry(rows.index, len(rows.value), rows.kept, rows.read, rows.checksum(), list(at))

    def verify(self) -> None:
        """Fill `damaged`: read all that is committed and compare its checksums."""
        raise NotImplementedError

    def is_sealed(self) -> bool:
        """Whether the files are whole files of their formats."""
        return True

    def begin(self) -> None:
        """Make ready to commit; before that, nothing is written."""

    def commit(self, rows: Rows, tensors: dict[str, Tensor]) -> None:
        raise NotImplementedError

    def seal(self) -> None:
        """Leave whole files behind, on the disk."""
        raise NotImplementedError

    def cards(self) -> list[dict[str, Any]]:
        """The files that hold what is committed, with their bytes and checksums, for the manifest."""
        raise NotImplementedError

    def besides(self) -> list[Path]:
        """The files that say what lies where."""
        return [self.folder / "journal.jsonl"]

    def close(self) -> None:
        self.journal.close()


class TensorSink(Sink):
    """Activations: an Arrow folder for columns, safetensors shards for each point with more axes."""

    def __init__(self, folder: Path, columns: Columns, layouts: Sequence[Layout], shard_bytes: int):
        super().__init__(folder)
        self.columns = columns
        self.tensors = [layout for layout in layouts if layout.stored == "tensor"]
        formats: list[Format] = [ArrowFormat(columns.schema), *map(SafetensorsFormat, self.tensors)]
        strange = [entry.batch for entry in self.journal.entries if len(entry.at) != len(formats)]
        self.journal.keep(min(strange, default=self.done))
        committed = [[entry.at[i] for entry in self.journal.entries] for i in range(len(formats))]
        pairs = zip(formats, committed, strict=True)
        self.streams = [Stream(folder, format, shard_bytes, extents) for format, extents in pairs]
        self.synced = time.monotonic()

    def begin(self) -> None:
        with explained(self.folder, self.safe):
            for stream in self.streams:
                stream.begin()

    def verify(self) -> None:
        for entry in self.journal.entries:
            for stream, extent in zip(self.streams, entry.at, strict=True):
                if not stream.is_whole(extent):
                    self.damaged[entry.batch] = str(stream.path(extent.shard))

    def commit(self, rows: Rows, tensors: dict[str, Tensor]) -> None:
        pieces = [self.columns.encode(rows, tensors), *(bytes_of(tensors[layout.name]) for layout in self.tensors)]
        if rows.index < self.done:
            return self._redo(rows.index, pieces)
        at: list[Extent] = []
        with explained(self.folder, self.safe):
            try:
                for stream, piece in zip(self.streams, pieces, strict=True):
                    at.append(stream.append(piece))  # undone on an error
                self.journal.add(self.entry(rows, at))
            except OSError:
                for stream, extent in zip(self.streams, at, strict=False):
                    stream.undo(extent)
                raise
            if time.monotonic() - self.synced > SYNC_SECONDS:
                self.sync()
        return None

    def _redo(self, batch: int, pieces: list[memoryview]) -> None:
        with explained(self.folder, self.safe):
            for stream, extent, piece in zip(self.streams, self.journal.entries[batch].at, pieces, strict=True):
                if stream.rewrite(extent, piece) != extent:
                    raise StoreError(
                        f"Batch {batch} in {stream.path(extent.shard)} is damaged, and what the model gives now is not what "
                        "was written: another machine, thread count or version of torch? Begin anew in another folder."
                    )
        del self.damaged[batch]

    def sync(self) -> None:
        for stream in self.streams:
            stream.sync()
        self.journal.sync()
        self.synced = time.monotonic()

    def seal(self) -> None:
        """Leave whole files behind: heads, feet, and what makes the folder one of `datasets`."""
        with explained(self.folder, self.safe):
            for stream, shard, end in self._shards():
                if not stream.is_sealed(shard, end):
                    stream.seal(shard, end)
            for path, data in self._info().items():
                write_whole(path, data)
            self.sync()

    def is_sealed(self) -> bool:
        return all(stream.is_sealed(shard, end) for stream, shard, end in self._shards())

    def _info(self) -> dict[Path, bytes]:
        """The files that make the Arrow folder one of `datasets`."""
        files = [stream.path(shard).name for stream, shard, _ in self._shards() if stream is self.streams[0]]
        total = sum(entry.input for entry in self.journal.entries)
        told = self.columns.info(files, f"{total & (2**64 - 1):016x}")
        return {self.folder / "activations" / name: data for name, data in told.items()}

    def besides(self) -> list[Path]:
        return [*super().besides(), *self._info()]

    def cards(self) -> list[dict[str, Any]]:
        """From the journal: what was written is not read again."""
        found = []
        for at, stream in enumerate(self.streams):
            held: dict[int, list[Piece]] = {}
            for entry in self.journal.entries:
                held.setdefault(entry.at[at].shard, []).append(Piece(entry.at[at].crc32, entry.at[at].length))
            found += [card(stream.path(shard), self.folder, stream.crc32(pieces)) for shard, pieces in held.items()]
        return found

    def _shards(self) -> list[tuple[Stream, int, int]]:
        """(stream, shard, end of its last batch) of every file that holds batches."""
        return [
            (stream, shard, end)
            for i, stream in enumerate(self.streams)
            for shard, end in {e.at[i].shard: e.at[i].offset + e.at[i].length for e in self.journal.entries}.items()
        ]

    def close(self) -> None:
        super().close()
        for stream in self.streams:
            stream.close()


class StatisticsSink(Sink):
    """Reductions: one small file, replaced whole at each batch. `harvest` tells this one from others: a checksum."""

    def __init__(self, folder: Path, reductions: Sequence[Reduction], harvest: int):
        super().__init__(folder)
        self.reductions = {reduction.name: reduction for reduction in reductions}
        self.path = folder / "statistics.safetensors"
        self.inputs = [harvest]  # a checksum of the harvest and the input of its first 0, 1, 2, ... batches
        self.parts: dict[str, Part] = {}
        done = 0
        for entry in self.journal.entries:
            self._follow(entry)
        if self.done:
            try:
                held = read_statistics(self.path)
                if held.batches > self.done or held.identity != self.inputs[held.batches]:
                    raise StoreError(f"{self.path} is damaged: it is of other batches than journal.jsonl.")
                done, self.parts = held.batches, held.parts
            except StoreError as error:
                log.warning("%s The harvest begins anew.", error)
                self.damaged = dict.fromkeys(range(self.done), str(self.path))
        self.journal.keep(done)
        del self.inputs[done + 1 :]

    def _follow(self, entry: Entry) -> None:
        self.inputs.append(zlib.crc32(entry.input.to_bytes(4, "little"), self.inputs[-1]))

    def verify(self) -> None:
        """A statistics file that cannot be read was found when it was opened: the harvest begins anew."""

    def commit(self, rows: Rows, tensors: dict[str, Tensor]) -> None:
        self.damaged.pop(rows.index, None)
        for key, part in unflattened(tensors).items():
            merge = self.reductions[key.partition("/")[2]].merge
            self.parts[key] = merge(self.parts[key], part) if key in self.parts else part
        with explained(self.folder, self.safe):
            self.journal.add(self.entry(rows))
            self._follow(self.journal.entries[-1])
            write_statistics(self.path, Held(self.done, self.inputs[-1], self.parts))

    def seal(self) -> None:
        sync_folder(self.folder)

    def cards(self) -> list[dict[str, Any]]:
        return [card(self.path, self.folder, checksum(self.path))]

"""The journal: one line a committed batch. What it does not hold did not happen.

    journal.jsonl       <crc32 of the rest> {"batch": 3, "rows": 8, "tokens": 1024, "read": 1024, "input": crc32, "at": [...]}

A line is written when the batch's data are in their files; a torn line is the batch under way, and is cut off. `at` says
where: for each stream [shard, offset, length, crc32].
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple


class Extent(NamedTuple):
    """Where a batch lies in a stream: the shard's number, bytes from its start, and a checksum of them."""

    shard: int
    offset: int
    length: int
    crc32: int


@dataclass
class Entry:
    """A committed batch. `tokens` are kept, `read` those the model read; `input` is the checksum of its input."""

    batch: int
    rows: int
    tokens: int
    read: int
    input: int
    at: list[Extent]

    def line(self) -> bytes:
        text = json.dumps(asdict(self), separators=(",", ":")).encode()
        return b"%08x %s\n" % (zlib.crc32(text), text)

    @staticmethod
    def of(line: bytes) -> Entry | None:
        """The entry of a line; None if it is torn or damaged."""
        stamp, _, text = line.rstrip(b"\n").partition(b" ")
        if not line.endswith(b"\n") or stamp != b"%08x" % zlib.crc32(text):
            return None
        told = json.loads(text)
        return Entry(**{**told, "at": [Extent(*extent) for extent in told["at"]]})


def entries(path: Path) -> Iterator[Entry]:
    """The committed batches, up to the first line that is torn, damaged or out of turn."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file):
            entry = Entry.of(line)
            if entry is None or entry.batch != number:
                return
            yield entry


class Journal:
    """`journal.add(entry)`. Opening it cuts off what is torn; `entries` are the batches that it holds."""

    def __init__(self, path: Path):
        self.entries = list(entries(path))
        self.length = sum(len(entry.line()) for entry in self.entries)
        self.file = path.open("ab")
        self.file.truncate(self.length)

    def add(self, entry: Entry) -> None:
        line = entry.line()
        try:
            self.file.write(line)
            self.file.flush()
        except OSError:
            os.ftruncate(self.file.fileno(), self.length)
            raise
        self.entries.append(entry)
        self.length += len(line)

    def keep(self, n: int) -> None:
        """Forget all but the first `n` batches."""
        del self.entries[n:]
        self.length = sum(len(entry.line()) for entry in self.entries)
        self.file.truncate(self.length)

    def sync(self) -> None:
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()

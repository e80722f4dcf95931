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

from gatedlens.errors import StoreError
from gatedlens.store.disk.files import explained_reading
from gatedlens.store.disk.form import CHECKSUM, COUNT, Kind, is_whole, misfit

EXTENT = Kind(
    "a list [shard, offset, length, crc32]",
    lambda value: isinstance(value, list) and len(value) == 4 and all(map(is_whole, value)) and value[3] < 2**32,
)
AGAIN = "The same call of `gl.store.harvest` mends it: what is not whole is done again."
FORM = {"batch": COUNT, "rows": COUNT, "tokens": COUNT, "read": COUNT, "input": CHECKSUM, "at": [EXTENT]}


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
    def of(line: bytes) -> Entry:
        """The entry of a line; ValueError with the reason if it is torn or damaged."""
        stamp, _, text = line.rstrip(b"\n").partition(b" ")
        if not line.endswith(b"\n"):
            raise ValueError("it has no end")
        if stamp != b"%08x" % zlib.crc32(text):
            raise ValueError(
                f"its checksum is {stamp[:16].decode(errors='replace')!r}, expected '{zlib.crc32(text):08x}'"
            )
        told = json.loads(text)
        said = misfit(told, FORM)
        if said:
            raise ValueError(said)
        return Entry(**{key: told[key] for key in FORM if key != "at"}, at=[Extent(*extent) for extent in told["at"]])


def entries(path: Path) -> Iterator[Entry]:
    """The committed batches, up to the first line that is torn, damaged or out of turn."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file):
            try:
                entry = Entry.of(line)
            except (ValueError, RecursionError):
                return
            if entry.batch != number:
                return
            yield entry


def read(path: Path) -> list[Entry]:
    """All committed batches; StoreError for a line that is damaged or out of turn. A last line that has no end is the batch
    under way."""
    lines: list[bytes] = []
    with explained_reading(path):
        if path.exists():
            with path.open("rb") as file:
                lines = file.readlines()
    found: list[Entry] = []
    for number, line in enumerate(lines):
        if number == len(lines) - 1 and not line.endswith(b"\n"):
            break
        where = f"{path} is damaged: line {number + 1}"
        try:
            found.append(Entry.of(line))
        except (ValueError, RecursionError) as error:
            raise StoreError(f"{where}: {error}. {AGAIN}") from error
        if found[-1].batch != number:
            raise StoreError(f"{where}: batch is {found[-1].batch}, expected {number}. {AGAIN}")
    return found


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

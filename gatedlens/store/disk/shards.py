"""Shards: files that grow by one batch at a time, and are ordinary files of their format when they are closed.

    stream = Stream(folder, ArrowFormat(schema), shard_bytes)
    extent = stream.append(data)                # where the batch lies now
    stream.rewrite(extent, data)                # a damaged batch, in its place
    stream.seal(...)                            # head and foot that make the last shard a whole file

Arrow's stream format grows by nature: schema, batch, batch, end. A safetensors file has its header in front; room for it
is left, and it is written when the shard is closed, so nothing is ever copied from small files into large ones. What a
shard holds depends on the batches alone: interrupted or not, the files are the same to the bit.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatedlens.store.disk.files import Piece, joined
from gatedlens.store.disk.journal import Extent
from gatedlens.store.disk.layout import DTYPES, Layout

HEAD = 1024  # bytes of a safetensors header, length included


class Format:
    """How a kind of file begins and ends, given the bytes of its body; `stem`, `suffix` name the files."""

    stem: str
    suffix: str

    def head(self, body: int) -> bytes:
        raise NotImplementedError

    def foot(self) -> bytes:
        """What ends a whole file: nothing, in most formats."""
        return b""


class ArrowFormat(Format):
    """An Arrow IPC stream, what `datasets` keeps in its folders."""

    stem, suffix = "activations/data", ".arrow"

    def __init__(self, schema: Any):
        self.schema = schema.serialize().to_pybytes()

    def head(self, body: int) -> bytes:
        return self.schema

    def foot(self) -> bytes:
        return b"\xff\xff\xff\xff\x00\x00\x00\x00"


class SafetensorsFormat(Format):
    """A safetensors file of one tensor, [entry, ...], under the point's name."""

    suffix = ".safetensors"

    def __init__(self, layout: Layout):
        self.layout = layout
        self.stem = f"tensors/{layout.name}"

    def head(self, body: int) -> bytes:
        layout = self.layout
        shape = [body // layout.bytes, *layout.shape]
        dtype = DTYPES[str(layout.dtype).removeprefix("torch.")]
        told = {
            "__metadata__": {
                "axes": " ".join([layout.per, *[a for a in layout.axes.split() if a not in ("batch", "pos")]])
            },
            layout.name: {"dtype": dtype, "shape": shape, "data_offsets": [0, body]},
        }
        return (HEAD - 8).to_bytes(8, "little") + json.dumps(told).encode().ljust(HEAD - 8)


class Stream:
    """The shards of one format in a folder, `committed` the extents of the batches that they hold."""

    def __init__(self, folder: Path, format: Format, shard_bytes: int, committed: Sequence[Extent] = ()):
        self.folder = folder
        self.format = format
        self.shard_bytes = shard_bytes
        self.shard = committed[-1].shard if committed else 0
        self.length = committed[-1].offset + committed[-1].length if committed else len(format.head(0))
        self.file: Any = None

    def begin(self) -> None:
        """Make ready to append: until then a stream only reads."""
        self.path(0).parent.mkdir(parents=True, exist_ok=True)
        self.file = self._open()

    def path(self, shard: int) -> Path:
        return self.folder / f"{self.format.stem}-{shard:05}{self.format.suffix}"

    def _open(self) -> Any:
        """The last shard, cut to what is committed (or grown to it: what is missing there is found damaged)."""
        path = self.path(self.shard)
        is_new = not path.exists()
        file = path.open("r+b" if not is_new else "w+b", buffering=0)
        file.truncate(self.length)
        if is_new or self.length == len(self.format.head(0)):
            _write_at(file, 0, self.format.head(0))
        return file

    def append(self, data: memoryview) -> Extent:
        """Write a batch behind the others; a full shard is sealed first. After an error nothing has changed."""
        if self.length > len(self.format.head(0)) and self.length + len(data) > self.shard_bytes:
            self.seal()
            self.file.close()
            self.shard, self.length = self.shard + 1, len(self.format.head(0))
            self.file = self._open()
        try:
            _write_at(self.file, self.length, data)
        except OSError:
            os.ftruncate(self.file.fileno(), self.length)
            raise
        extent = Extent(self.shard, self.length, len(data), zlib.crc32(data))
        self.length += len(data)
        return extent

    def undo(self, extent: Extent) -> None:
        """Take back the batch that was appended last."""
        if extent.shard == self.shard:
            self.length = extent.offset
            os.ftruncate(self.file.fileno(), self.length)

    def is_whole(self, extent: Extent) -> bool:
        """Whether the bytes of a batch are those that were written."""
        try:
            with self.path(extent.shard).open("rb") as file:
                file.seek(extent.offset)
                left, total = extent.length, 0
                while left and (piece := file.read(min(left, 1 << 20))):
                    total = zlib.crc32(piece, total)
                    left -= len(piece)
        except OSError:  # it is not there, or is a folder
            return False
        return not left and total == extent.crc32

    def rewrite(self, extent: Extent, data: memoryview) -> Extent:
        """Write a batch anew where it was; what is written must be what was."""
        path = self.path(extent.shard)
        with path.open("r+b" if path.exists() else "w+b", buffering=0) as file:
            _write_at(file, extent.offset, data)
            os.fsync(file.fileno())
        return Extent(extent.shard, extent.offset, len(data), zlib.crc32(data))

    def seal(self, shard: int | None = None, end: int | None = None) -> None:
        """Give a shard (the last) its head and its foot behind `end`, and bring it to the disk."""
        end = self.length if end is None else end
        head, foot = self.format.head(end - len(self.format.head(0))), self.format.foot()
        path = self.path(self.shard if shard is None else shard)
        with path.open("r+b" if path.exists() else "w+b", buffering=0) as file:
            _write_at(file, 0, head)
            file.truncate(end + len(foot))
            _write_at(file, end, foot)
            os.fsync(file.fileno())

    def crc32(self, pieces: Sequence[Piece]) -> int:
        """Of a whole shard that holds these batches."""
        head = self.format.head(sum(piece.length for piece in pieces))
        return joined([Piece.of(head), *pieces, Piece.of(self.format.foot())])

    def is_sealed(self, shard: int, end: int) -> bool:
        """Whether a shard has the head and the foot that `seal` gives it."""
        path = self.path(shard)
        head, foot = self.format.head(end - len(self.format.head(0))), self.format.foot()
        try:
            if path.stat().st_size != end + len(foot):
                return False
            with path.open("rb") as file:
                return file.read(len(head)) == head and file.seek(end) == end and file.read() == foot
        except OSError:
            return False

    def sync(self) -> None:
        os.fsync(self.file.fileno())

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def _write_at(file: Any, offset: int, data: bytes | memoryview) -> None:
    file.seek(offset)
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def bytes_of(tensor: Tensor) -> memoryview:
    """The numbers of a tensor on the CPU as bytes, without a copy where they lie in order."""
    flat: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(flat)


def checksum(path: Path) -> int:
    """crc32 of a whole file."""
    total = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            total = zlib.crc32(piece, total)
    return total


def card(path: Path, folder: Path, crc32: int) -> dict[str, Any]:
    """A file in the manifest."""
    return {"bytes": path.stat().st_size, "crc32": crc32, "name": path.relative_to(folder).as_posix()}


def fits(told: dict[str, Any], folder: Path) -> bool:
    """Whether the file of a card is what was written."""
    path = folder / told["name"]
    try:
        return path.stat().st_size == told["bytes"] and checksum(path) == told["crc32"]
    except OSError:
        return False

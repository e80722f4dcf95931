"""Files of a store: one writer a folder, errors of the disk in words, and checksums of what is written in pieces.

with locked(folder): ...            # one run a folder; the lock goes when its process does, however it ends
with explained(path): ...           # an OSError of the disk becomes a StoreError, as a full disk's
with explained_reading(path): ...   # the same, where a file is read
joined([Piece.of(a), Piece.of(b)]) == zlib.crc32(a + b)         # nothing is read again
"""

from __future__ import annotations

import functools
import os
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from gatedlens.errors import StoreError

# -- checksums ------------------------------------------------------------------------------------------------------

# A crc32 is a polynomial over GF(2) modulo the CRC's own: appending n bytes multiplies it by x^(8 n). So the crc32 of a whole
# follows from those of its pieces and their lengths. This is zlib's crc32_combine, which Python does not offer.
POLYNOMIAL = 0xEDB88320  # bits reversed: the highest bit is x^0
ONE = 1 << 31


class Piece(NamedTuple):
    """Some bytes: their checksum and how many they are."""

    crc32: int
    length: int

    @staticmethod
    def of(data: bytes) -> Piece:
        return Piece(zlib.crc32(data), len(data))


def joined(pieces: Iterable[Piece]) -> int:
    """crc32 of the pieces, one behind the other."""
    total = 0
    for piece in pieces:
        total = _times(_power(piece.length), total) ^ piece.crc32
    return total


def _times(a: int, b: int) -> int:
    """a * b modulo the polynomial."""
    product, bit = 0, ONE
    while bit:
        if a & bit:
            product ^= b
        b = (b >> 1) ^ POLYNOMIAL if b & 1 else b >> 1
        bit >>= 1
    return product


@functools.lru_cache(4096)
def _power(length: int) -> int:
    """x^(8 length), by squaring; batches have few different lengths."""
    power, square = ONE, ONE >> 8
    while length:
        if length & 1:
            power = _times(square, power)
        square, length = _times(square, square), length >> 1
    return power


# -- errors of the disk, and the lock -------------------------------------------------------------------------------


@contextmanager
def explained(path: Path, safe: str = "") -> Iterator[None]:
    """StoreError in place of what the operating system says of `path`; `safe`: what is not lost."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise StoreError(f"{error.filename or path} cannot be written: {reason}. {safe}".rstrip()) from error


@contextmanager
def explained_reading(path: Path) -> Iterator[None]:
    """StoreError in place of what the operating system says when it shall read `path`."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}; expected a file of the store.") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder: a second run into it is refused. The lock is the kernel's, so no crash leaves it behind."""
    path = folder / "lock"
    with explained(path):
        handle = path.open("a+")
    with handle:
        if not _lock(handle):
            handle.seek(0)
            raise StoreError(
                f"Another run writes into {folder} (process {handle.read().strip() or 'unknown'}). Wait for it, or use "
                "another folder."
            )
        with explained(path):
            handle.truncate(0)
            handle.write(str(os.getpid()))
            handle.flush()
        yield


def _lock(handle: Any) -> bool:
    """Whether the lock was free and now is ours."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True

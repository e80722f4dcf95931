"""crc32 of what was written in pieces, from the crc32 of each: nothing is read again.

    joined([Piece(zlib.crc32(a), len(a)), Piece(zlib.crc32(b), len(b))]) == zlib.crc32(a + b)

A crc32 is a polynomial over GF(2) modulo the CRC's own: appending n bytes multiplies it by x^(8 n). zlib's crc32_combine,
which Python does not offer.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterable
from typing import NamedTuple

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

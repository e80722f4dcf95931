"""The statistics of a store as one small file, statistics.safetensors, replaced whole at each batch.

write_statistics(path, Held(batches=3, identity=crc32, parts={"point/mean": {"n": ..., "mean": ...}}))
held = read_statistics(path)                        # a StoreError says why it cannot be read
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gatedlens.errors import StoreError
from gatedlens.files import write_whole
from gatedlens.store.disk.files import explained_reading
from gatedlens.store.disk.journal import AGAIN
from gatedlens.store.disk.shards import bytes_of
from gatedlens.store.statistics import Part


def flattened(parts: dict[str, Part]) -> dict[str, Tensor]:
    """{"point/reduction": {"mean": ...}} as {"point/reduction/mean": ...}."""
    return {f"{key}/{name}": value for key, part in parts.items() for name, value in part.items()}


def unflattened(tensors: dict[str, Tensor]) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    for key, value in tensors.items():
        parts.setdefault(key.rpartition("/")[0], {})[key.rpartition("/")[2]] = value
    return parts


class Held(NamedTuple):
    """Parts of so many batches; `identity` tells of which: a checksum of harvest and input."""

    batches: int
    identity: int
    parts: dict[str, Part]


def write_statistics(path: Path, held: Held) -> None:
    tensors = {key: value.contiguous() for key, value in flattened(held.parts).items()}
    # One key: safetensors writes several in an order of its own, and the file would not be the same twice.
    write_whole(path, save(tensors, {"gatedlens": f"{held.batches} {_sum(tensors):08x} {held.identity:08x}"}))


def read_statistics(path: Path) -> Held:
    """What a file holds; StoreError if it is missing or damaged."""
    try:
        with explained_reading(path), safe_open(str(path), "pt") as file:
            meta = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise StoreError(f"{path} is damaged: it is no safetensors file ({error}). {AGAIN}") from error
    batches, stamp, identity = (*meta.get("gatedlens", "").split(), "", "", "0")[:3]
    if not batches.isdigit() or stamp != f"{_sum(tensors):08x}":
        raise StoreError(f"{path} is damaged: its checksum is {stamp!r}, expected '{_sum(tensors):08x}'. {AGAIN}")
    return Held(int(batches), int(identity, 16), unflattened(tensors))


def _sum(tensors: dict[str, Tensor]) -> int:
    total = 0
    for key in sorted(tensors):
        total = zlib.crc32(bytes_of(tensors[key]), zlib.crc32(key.encode(), total))
    return total

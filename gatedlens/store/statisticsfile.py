"""The statistics of a store as one small file, statistics.safetensors, replaced whole at each batch.

write_statistics(path, batches=3, parts={"point/mean": {"n": ..., "mean": ...}})
batches, parts = read_statistics(path)              # (0, {}) if it is missing or damaged
"""

from __future__ import annotations

import zlib
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gatedlens.saved import write_whole
from gatedlens.store.reductions import Part
from gatedlens.store.shards import bytes_of


def flattened(parts: dict[str, Part]) -> dict[str, Tensor]:
    """{"point/reduction": {"mean": ...}} as {"point/reduction/mean": ...}."""
    return {f"{key}/{name}": value for key, part in parts.items() for name, value in part.items()}


def unflattened(tensors: dict[str, Tensor]) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    for key, value in tensors.items():
        parts.setdefault(key.rpartition("/")[0], {})[key.rpartition("/")[2]] = value
    return parts


def write_statistics(path: Path, batches: int, parts: dict[str, Part]) -> None:
    tensors = {key: value.contiguous() for key, value in flattened(parts).items()}
    # One key: safetensors writes several in an order of its own, and the file would not be the same twice.
    write_whole(path, save(tensors, {"gatedlens": f"{batches} {_sum(tensors):08x}"}))


def read_statistics(path: Path) -> tuple[int, dict[str, Part]]:
    """(batches, parts) of a file; (0, {}) if it is missing or damaged."""
    try:
        with safe_open(str(path), "pt") as file:
            meta = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError):
        return 0, {}
    batches, _, stamp = meta.get("gatedlens", "0 ").partition(" ")
    return (int(batches), unflattened(tensors)) if stamp == f"{_sum(tensors):08x}" else (0, {})


def _sum(tensors: dict[str, Tensor]) -> int:
    total = 0
    for key in sorted(tensors):
        total = zlib.crc32(bytes_of(tensors[key]), zlib.crc32(key.encode(), total))
    return total

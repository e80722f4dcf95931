"""Memory: what would take too much is refused by name before it is allocated, with what to ask for instead.

afford("mean() at 30000 positions", size, max_bytes, "Ask for row(i).")      # TooLargeError
afford("The pattern of layer 2", size, free(device), "Run it in parts.", "the {} that are free on cpu")
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from gatedlens.errors import TooLargeError, in_bytes

try:
    import resource
except ImportError:  # there are no such limits on Windows
    resource = None  # type: ignore[assignment]

SMALL = 256 * 2**20  # bytes; less than this is not worth asking the machine for
MEMINFO = Path("/proc/meminfo")
STATM = Path("/proc/self/statm")
CONTAINER = Path("/sys/fs/cgroup/memory.max")


def afford(what: str, size: int, limit: int | None, instead: str, than: str = "max_bytes={}") -> None:
    """TooLargeError if `size` bytes are more than `limit`; None: there is none. `than` says whose limit it is."""
    if limit is not None and size > limit:
        raise TooLargeError(f"{what} would take {in_bytes(size)}, more than {than.format(in_bytes(limit))}. {instead}")


def free(device: torch.device) -> int | None:
    """How many bytes can still be allocated on a device; None where nothing tells."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return min(_on_cpu(), default=None) if device.type == "cpu" else None


def _on_cpu() -> Iterator[int]:
    """What the machine, this process's own limit and its container leave."""
    if MEMINFO.exists():
        lines = MEMINFO.read_text().splitlines()
        yield from (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    if resource is not None and STATM.exists():
        own = resource.getrlimit(resource.RLIMIT_AS)[0]
        if own != resource.RLIM_INFINITY:
            yield max(0, own - int(STATM.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE"))
    if CONTAINER.exists() and CONTAINER.read_text().strip() != "max":
        yield int(CONTAINER.read_text())  # of all its processes, caches included: more than this never fits

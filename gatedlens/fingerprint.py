"""Fingerprint: a checksum by which two models, or two tensors, are known to be the same.

fingerprint(model)             # "9a0c12ff": of every number of every parameter and buffer
checksum(tensor, total)        # the crc32 of its bytes, going on from that of what came before
"""

from __future__ import annotations

import zlib
from itertools import chain
from typing import Any

import torch
from torch import Tensor


def fingerprint(model: Any) -> str:
    """Another checkpoint under the same name, or one changed number, is another model."""
    total = 0
    for name, tensor in chain(model.wrapped.named_parameters(), model.wrapped.named_buffers()):
        total = checksum(tensor, zlib.crc32(name.encode(), total))
    return f"{total:08x}"


def checksum(tensor: Tensor, total: int = 0) -> int:
    """crc32 of a tensor's dtype, shape and bytes; of one without bytes (on "meta") of dtype and shape."""
    total = zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode(), total)
    if tensor.is_meta or tensor.numel() == 0:
        return total
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data, total)

"""Fingerprint: checksums by which two models, or two tensors, are known to be the same.

fingerprint(model)             # "9a0c12ff": of every number of every parameter and buffer
settings(model)                # of what it computes by besides these
checksum(tensor, total)        # the crc32 of a tensor, going on from that of what came before
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from gatedlens.model.base import HookedModel
from gatedlens.model.placement import at_hand

PLAIN = (bool, int, float)
ELSEWHERE = ("model_name", "device")  # of a config: compared by itself; decides no number


def fingerprint(model: HookedModel) -> str:
    """A checksum of all of every parameter and buffer of the wrapped model: another checkpoint of one name is another model."""
    total = 0
    for place, module in model.wrapped.named_modules():
        with at_hand([module]):
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for name, tensor in own:
                total = checksum(tensor, zlib.crc32(f"{place}.{name}".encode(), total))
    return f"{total:08x}"


def settings(model: HookedModel) -> str:
    """A checksum of what a model computes by besides its weights: its config, its modules' classes and numbers (an eps)."""
    config = {key: value for key, value in model.cfg.to_dict().items() if key not in ELSEWHERE}
    modules = [
        (name, type(module).__qualname__, sorted((k, v) for k, v in vars(module).items() if type(v) in PLAIN))
        for name, module in model.wrapped.named_modules()
    ]
    return f"{zlib.crc32(repr((sorted(config.items()), modules)).encode()):08x}"


def checksum(tensor: Tensor, total: int = 0) -> int:
    """crc32 of a tensor's dtype, shape and bytes; `total` is that of what came before."""
    return bytes_checksum(tensor, zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode(), total))


def bytes_checksum(tensor: Tensor, total: int = 0) -> int:
    """crc32 of a tensor's bytes alone; one on "meta" has none."""
    if tensor.is_meta or tensor.numel() == 0:
        return total
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data, total)

"""Which reader reads a module, and why a module that none reads is refused."""

from __future__ import annotations

from torch import nn

from gatedlens.weights.adapters import Lora, is_peft, swapped
from gatedlens.weights.quantised import CompressedTensors, EightBit, FourBit, Fp8Blocks, Fp8Experts, TorchAo
from gatedlens.weights.reader import Reader

READERS: tuple[Reader, ...] = (Lora(), FourBit(), EightBit(), TorchAo(), CompressedTensors(), Fp8Blocks(), Fp8Experts())
READ = (
    "Read as they are: LoRA and DoRA of peft, and weights that bitsandbytes (8 and 4 bit), torchao or compressed-tensors "
    "quantised, or that are fp8 in blocks."
)


def reader_of(module: nn.Module) -> Reader | None:
    """`reader_of(module)`: what reads the module's weight; None: its parameters hold it, or nothing here reads it."""
    return next((reader for reader in READERS if reader.fits(module)), None)


def why_not_read(module: nn.Module) -> str:
    """`why_not_read(module)`: why a module whose weight is not plain cannot be read; an empty text if it can, or need not."""
    reader = reader_of(module)
    if reader is not None:
        inner = reader.inner(module)
        why = reader.why_not(module) or (why_not_read(inner) if inner is not module else "")
        return why or ("" if reader.kind(module) is not None else f"it stands for no Linear and no Embedding. {READ}")
    if is_peft(module) and swapped(module) is None:
        return f"peft put it there, and of peft's adapters LoRA and DoRA are merged on read. {READ}"
    return ""

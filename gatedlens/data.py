"""The bundled data: the beginning of Moby-Dick, and 1,797 handwritten digits; provenance in bundled/data/README.md."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor

from gatedlens.loading import BUNDLED

__all__ = ["digits", "text"]


def text() -> tuple[Int[Tensor, " train"], Int[Tensor, " held_out"]]:
    """`train, held_out = gl.data.text()`: (training bytes, held-out bytes) of the bundled book: the first nine tenths and
    the last.
    """
    data = torch.frombuffer(bytearray((BUNDLED / "data" / "moby-dick.txt").read_bytes()), dtype=torch.uint8).long()
    cut = int(0.9 * len(data))
    return data[:cut], data[cut:]


def digits() -> dict[str, tuple[Float[Tensor, "n 1 8 8"], Int[Tensor, " n"]]]:
    """`gl.data.digits()`: {"train": (images in [-1, 1], labels), "test": ...}: 1,437 handwritten digits and 360 held out."""
    data = load_file(BUNDLED / "data" / "digits.safetensors")
    images, labels = data["images"].float().unsqueeze(1) / 8 - 1, data["labels"].long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return {"train": (images[order[360:]], labels[order[360:]]), "test": (images[order[:360]], labels[order[:360]])}

"""The causal convolution within documents: a row of the batch may hold several, and none reads another's tokens.

b batch, l pos, c channel, K taps; `document` [b, l] numbers the documents of each row, ascending.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def conv(
    x: Float[Tensor, "batch pos channel"], taps: Float[Tensor, "channel tap"], document: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos channel"]:
    """M x: sum over k of taps[K - 1 - k] x[i - k], those of the same document."""
    total = x * taps[:, -1]
    for k in range(1, min(taps.shape[1], x.shape[1])):
        total = total + F.pad(x[:, :-k], (0, 0, k, 0)) * taps[:, -1 - k] * _same(document, k)
    return total


def conv_transposed(
    g: Float[Tensor, "batch pos channel"], taps: Float[Tensor, "channel tap"], document: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos channel"]:
    """M^T g: sum over k of taps[K - 1 - k] g[j + k], those of the same document."""
    total = g * taps[:, -1]
    for k in range(1, min(taps.shape[1], g.shape[1])):
        total = total + F.pad((g * _same(document, k))[:, k:], (0, 0, 0, k)) * taps[:, -1 - k]
    return total


def within(
    matrix: Float[Tensor, "batch some dst src"], document: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch some dst src"]:
    """The matrix without its entries between documents."""
    return matrix * (document.unsqueeze(2) == document.unsqueeze(1)).unsqueeze(1)


def _same(document: Int[Tensor, "batch pos"], k: int) -> Bool[Tensor, "batch pos one"]:
    """Where the position k before is of the same document (False where there is none)."""
    return (F.pad(document[:, :-k], (k, 0), value=-1) == document).unsqueeze(-1)

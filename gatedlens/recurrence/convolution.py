"""The causal depthwise convolution: of a row, and within documents, where a row holds several and none reads another's tokens.

b batch, l pos, c channel, K taps; `document` [b, l] numbers the documents of each row, ascending.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gatedlens.recurrence.autocast import is_on
from gatedlens.recurrence.transforms import transformed

FEW = 8  # taps; each costs a pass over the sequence


def slide(
    long: Float[Tensor, "batch long channel"],
    taps: Float[Tensor, "channel tap"],
    bias: Float[Tensor, " channel"] | None = None,
) -> Float[Tensor, "batch pos channel"]:
    """`slide(F.pad(x, (0, 0, K - 1, 0)), taps, bias)`: sum over tap of taps[tap] long[i + tap], + bias; K - 1 places shorter."""
    width = taps.shape[1]
    length = long.shape[1] - width + 1
    if width > FEW or long.device.type != "cpu" or long.dtype not in (torch.float32, torch.float64) or is_on(long):
        return F.conv1d(long.mT, taps.unsqueeze(1), bias, groups=len(taps)).mT
    # On a CPU a multiply-add a tap is three times as fast as conv1d by groups of one channel, at any length that matters.
    part = long[:, :length]
    total = part * taps[:, 0] if bias is None else torch.addcmul(bias, part, taps[:, 0])
    free = not (transformed() or total.requires_grad)
    for k in range(1, width):
        part = long[:, k : k + length]
        total = total.addcmul_(part, taps[:, k]) if free else torch.addcmul(total, part, taps[:, k])
    return total


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

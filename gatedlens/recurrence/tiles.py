"""The absolutes of a head's matrices with a convolution behind them, summed over its channels, tile by tile.

    A[i, j, v] = left_i[v] * sum_k S[i, j + k] * weight_k[j, v]          k < K

One S for all channels v; what each makes of it does not factor, for K > 1. Of a tile of rows and sources all [i, j, v] are one
product of matrices over k, and stay in the cache while they are weighed and summed. b batch, l pos (i row, j source), v channel.
"""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatedlens.recurrence.transforms import transformed

ROWS, ELEMENTS = 64, 1 << 17  # rows of a tile, and its numbers: 512 KiB of float32


def shifted(
    x: Float[Tensor, "batch pos value"], taps: Float[Tensor, "value tap"]
) -> Float[Tensor, "batch pos tap value"]:
    """weight_k[j] = x_{j + k} taps[K - 1 - k], 0 behind the end."""
    width = taps.shape[1]
    long = F.pad(x, (0, 0, 0, width - 1))
    return torch.stack([long[:, k : k + x.shape[1]] * taps[:, width - 1 - k] for k in range(width)], dim=2)


def add_absolute(
    total: Float[Tensor, "batch dst src"],
    S: Float[Tensor, "batch dst src"],
    left: Float[Tensor, "batch dst value"],
    weights: Float[Tensor, "batch src tap value"],
) -> None:
    """total[i, j] += sum over v of left_i[v] |sum_k S[i, j + k] weight_k[j, v]|; left is at least 0."""
    batch, length, width = weights.shape[:3]
    if width == 1:
        total += S.abs() * (left @ weights.squeeze(2).abs().mT)
        return
    long = F.pad(S, (0, width - 1))
    for first in range(0, length, ROWS):
        rows = slice(first, min(first + ROWS, length))
        here = left[:, rows].unsqueeze(1)
        step = max(1, ELEMENTS // (batch * here.numel() // len(here)))
        for begin in range(0, rows.stop, step):
            end = min(begin + step, rows.stop)
            seen = long[:, rows, begin : end + width - 1].unfold(-1, width, 1).transpose(1, 2)  # b src dst tap
            each = seen.contiguous() @ weights[:, begin:end]
            total[:, rows, begin:end] += _weighed(each, here).mT


def _weighed(each: Float[Tensor, "batch src dst value"], left: Float[Tensor, "batch one dst value"]) -> Tensor:
    """sum over v of |each| left"""
    if each.requires_grad or left.requires_grad or transformed():
        return (each.abs() * left).sum(-1)
    return each.abs_().mul_(left).sum(-1)


def add_band(
    near: Float[Tensor, "batch tap pos"],
    S: Float[Tensor, "batch dst src"],
    left: Float[Tensor, "batch pos value"],
    weights: Float[Tensor, "batch pos tap value"],
    skip: Float[Tensor, "batch pos tap value"],
) -> None:
    """near[d, i] += sum over v of |A[i, i - d, v]|, where a skip of its own joins: weight_d[i - d] S[i, i] + skip_d[i - d]."""
    for d in range(min(near.shape[1], near.shape[2])):
        ago = weights.shape[1] - d
        each = [S.diagonal(k - d, -2, -1)[:, k:, None] * weights[:, :ago, k] for k in range(d)]
        each.append(S.diagonal(0, -2, -1)[:, d:, None] * weights[:, :ago, d] + skip[:, :ago, d])
        near[:, d, d:] += (left[:, d:] * reduce(torch.add, each)).abs().sum(-1)

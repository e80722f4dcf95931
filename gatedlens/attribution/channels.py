"""From the matrices of a layer's channels to one: how channels are put together, and what becomes of signs.

    row(attention, read)                                   # batch src: the signed mean over channels of the rows that are read
    row(attention, read, channels="max", sign="abs")
    matrix(attention, channels="product")                  # batch dst src

channels: "mean", "max", "min", or "product" (its root of the number of channels, with its sign: a product of a thousand
small numbers is no number). sign, before that: "signed" (as it is), "abs", or "clamp" (negative entries become 0).
The choices of the papers' ablations: HA (arXiv 2403.01590), UIA (arXiv 2405.16504).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

from gatedlens.attention.layer import ABS_ELEMENTS, ImplicitAttention
from gatedlens.errors import InputError, did_you_mean


@dataclass(frozen=True)
class Reduction:
    """How channels are put together, some at a time: `part` of some [..., channel], `join` two parts, `whole` of n channels."""

    part: Callable[[Tensor], Tensor]
    join: Callable[[Tensor, Tensor], Tensor]
    whole: Callable[[Tensor, int], Tensor] = lambda total, n: total

    def __call__(self, x: Float[Tensor, "*some channel"]) -> Float[Tensor, "*some"]:
        return self.whole(self.part(x), x.shape[-1])


def _signs_and_logs(x: Tensor) -> Tensor:
    return torch.stack([x.sign().prod(-1), x.abs().log().sum(-1)])


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([a[0] * b[0], a[1] + b[1]])


REDUCTIONS = {
    "mean": Reduction(lambda x: x.sum(-1), torch.add, lambda total, n: total / n),
    "max": Reduction(lambda x: x.amax(-1), torch.maximum),
    "min": Reduction(lambda x: x.amin(-1), torch.minimum),
    "product": Reduction(_signs_and_logs, _multiply, lambda total, n: total[0] * torch.exp(total[1] / n)),
}
SIGNS: dict[str, Callable[[Tensor], Tensor]] = {
    "signed": lambda x: x,
    "abs": torch.abs,
    "clamp": lambda x: x.clamp(min=0),
}


def check(channels: str, sign: str) -> None:
    """InputError for a choice that there is not."""
    for what, given, known in (("channels", channels, REDUCTIONS), ("sign", sign, SIGNS)):
        if given not in known:
            raise InputError(f"{what}={given!r}: it is {', '.join(map(repr, known))}.{did_you_mean(str(given), known)}")


def rows(attention: ImplicitAttention, read: Float[Tensor, "batch pos"]) -> Float[Tensor, "batch src channel"]:
    """sum over i of read[i] A[i, :], channel by channel: linear in pos, no matrix is built."""
    g = read.to(attention.dtype).unsqueeze(-1).expand(attention.shape)
    return attention.T @ g


def row(
    attention: ImplicitAttention, read: Float[Tensor, "batch pos"], channels: str = "mean", sign: str = "signed"
) -> Float[Tensor, "batch src"]:
    """The rows that are read, one number a source."""
    return REDUCTIONS[channels](SIGNS[sign](rows(attention, read)))


def matrix(
    attention: ImplicitAttention, channels: str = "mean", sign: str = "signed"
) -> Float[Tensor, "batch dst src"]:
    """One matrix for all channels, some channels at a time where there is no shorter way."""
    if channels == "mean" and sign != "clamp":
        return attention.mean() if sign == "signed" else attention.abs_mean()
    batch, length, total = attention.shape
    size, reduction = max(1, ABS_ELEMENTS // (batch * length * length)), REDUCTIONS[channels]
    chunks = (range(total)[start : start + size] for start in range(0, total, size))
    parts = (reduction.part(SIGNS[sign](attention.dense(chunk, max_bytes=None)).movedim(1, -1)) for chunk in chunks)
    return reduction.whole(reduce(reduction.join, parts), total)

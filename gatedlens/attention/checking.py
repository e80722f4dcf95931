"""Check: how exactly an implicit attention says what its layer did, and its views what `@` does.

A.check()                 # Check(absolute=2e-16, relative=8e-16)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gatedlens.options import checked
from gatedlens.recurrence.autocast import exact

if TYPE_CHECKING:
    from gatedlens.attention.layer import ImplicitAttention
else:
    ImplicitAttention = Any

CHECK_ELEMENTS = 1 << 24  # numbers in the matrices that check() looks at


class Check(NamedTuple):
    """The largest absolute error of what was compared (in the units of the layer's output), and the largest relative one
    (each error relative to the largest number that it is an error of)."""

    absolute: float
    relative: float


def off(got: Tensor, wanted: Tensor) -> Check:
    """How far `got` is from `wanted`."""
    error = (got - wanted).abs().max().item()
    return Check(error, error / max(wanted.abs().max().item(), torch.finfo(wanted.dtype).tiny))


@checked
def worst(checks: Iterable[Check]) -> Check:
    """The largest errors; NaN is the largest of all."""
    return Check(*torch.tensor(list(checks), dtype=torch.float64).amax(0).tolist())


def views(operator: ImplicitAttention) -> Iterator[tuple[Tensor, Tensor]]:
    """What each view of the matrix makes of random inputs, beside what the operator does with them."""
    A, (batch, length, channels) = replace(operator, transposed=False), operator.shape
    generator = torch.Generator().manual_seed(0)

    def signs(*shape: int) -> Tensor:
        return (2 * torch.randint(2, shape, generator=generator) - 1).to(operator.branches[0].x)

    v = A.content() * signs(*operator.shape)
    g = signs(*operator.shape) / length
    forward, back = A @ v, A.T @ g
    for i in sorted({length - 1, length // 2}):  # places of the input, real or not
        place = torch.full((batch,), i, device=v.device)
        yield (A.at(place) * v.mT).sum(-1), forward[:, i]
        yield (A.T.at(place) * g.mT).sum(-1) * v[:, i], back[:, i] * v[:, i]
    some = min(3, channels, CHECK_ELEMENTS // (batch * length * length))
    if some == 0:
        return
    chosen = list(range(0, channels, -(-channels // some)))
    few, weights = A.select(chosen), signs(len(chosen)) / len(chosen)
    with exact(v):
        yield torch.einsum("bcij,bjc->bic", few.dense(max_bytes=None), v[..., chosen]), forward[..., chosen]
        yield (
            few.weighted(weights, max_bytes=None) @ v[..., :1],
            (A @ v[..., :1].expand_as(v))[..., chosen] @ weights[:, None],
        )

"""StreamNorm: a norm of the residual stream itself, as a branch of its own.

    out = kept * norm(x) - x          behind it the stream is kept * norm(x), and what else is written beside it

x is the stream. A model that norms its stream in front of a layer, n = norm(x), and goes on with kept * n + f(n), is two
parallel branches: this one, and f behind a norm. So the stream stays the sum of what is written into it, and everything that
rests on that sum holds as it is. What this branch writes takes away what stood there, and puts its normed form in its place.
With its scale held it is linear in what stood there: `seen_before` goes back through it, as shares of a logit do.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from gatedlens.address.point import Point
from gatedlens.model.hookpoint import NORM, rows_of
from gatedlens.model.mixer import multiplied
from gatedlens.model.norm import Norm, norm_rows
from gatedlens.model.run import Run
from gatedlens.parts.attention import RMSNORM


def stream_norm_rows(name: str) -> tuple[Point, ...]:
    """`stream_norm_rows("norm1")`: the points of a `StreamNorm` that stands in its block under this name."""
    return rows_of(name, norm_rows(name, f"{name}_in", RMSNORM))


class StreamNorm(Norm):
    """out = kept * norm(x) - x, an RMSNorm with its points as everywhere: scale, normalized, out."""

    role = NORM

    def __init__(self, weights: Any, rows: tuple[Point, ...], eps: float, kept: float = 1.0):
        super().__init__(weights, rows, eps)
        self.kept = kept

    def forward(  # type: ignore[override]  # a branch is called with its run, a norm in front of one without
        self, x: Float[Tensor, "batch pos d_model"], run: Run
    ) -> Float[Tensor, "batch pos d_model"]:
        return multiplied(super().forward(x), self.kept) - x

    def seen_before(
        self, direction: Float[Tensor, "batch pos d_model"], scale: Float[Tensor, "batch pos one"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """`norm1.seen_before(u, cache["blocks.0.norm1.hook_scale"])`: with its scale held, u . (the stream behind) is this
        times the stream before."""
        return direction * (self.kept * self.gain / scale).to(direction)

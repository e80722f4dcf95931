"""StreamNorm: a norm of the residual stream itself, as a branch of its own.

    out = kept * norm(x) - x          behind it the stream is kept * norm(x), and what else is written beside it

x is the stream. A model that norms its stream in front of a layer, n = norm(x), and goes on with kept * n + f(n), is two
parallel branches: this one, and f behind a norm. So the stream stays the sum of what is written into it, and everything that
rests on that sum holds as it is. What this branch writes takes away what stood there, and puts its normed form in its place.
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
    """out = kept * norm(x) - x, the norm's points as everywhere: scale, normalized, out."""

    role = NORM

    def __init__(self, weights: Any, rows: tuple[Point, ...], eps: float, kept: float = 1.0):
        super().__init__(weights, rows, eps)
        self.kept = kept

    def forward(  # type: ignore[override]  # a branch is called with its run, a norm in front of one without
        self, x: Float[Tensor, "batch pos d_model"], run: Run
    ) -> Float[Tensor, "batch pos d_model"]:
        return multiplied(super().forward(x), self.kept) - x

"""Behind: a part that may stand between another and the residual stream, linear in what it reads once its points are held."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from gatedlens.model.hookpoint import Part


class Behind(Part):
    """`held_points`: the points that it is held by, relative to it; out[(k d)] = held[k] gain[d] x[d] for each copy k of the
    stream at each position."""

    held_points: ClassVar[tuple[str, ...]]
    reads_norm: ClassVar[bool] = False  # whether it reads, too, what the norm in front of the branch has normed

    @property
    def gain(self) -> Float[Tensor, " d_out"] | None:
        """`part.gain`: by what each number is multiplied, the same at every position; None: by nothing."""
        return None

    def held(self, cached: Callable[[str], Tensor]) -> Float[Tensor, "*batch pos copy"]:
        """`part.held(cached)`: by what each position is multiplied for each copy, of its held points."""
        raise NotImplementedError

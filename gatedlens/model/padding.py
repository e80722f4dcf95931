"""Padding: which positions are real, and what a window of the last K inputs sees across padding and calls.

A masked position enters neither a conv or shift window nor a state: a padded batch equals its rows run alone. The real
positions of each row are packed to the left, windows run over the packed row behind its tail (what the last call left),
and the result is spread back; masked positions get zeros. Without a mask all of it is the identity.

b batch, l pos, c channel, K the window's width; a tail holds the last K-1 inputs, oldest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from gatedlens.address import positions
from gatedlens.recurrence.transforms import anywhere


@dataclass(frozen=True)
class Padding:
    """`Padding.of(mask)`; `mask` is True where a token is real, None when all are."""

    mask: Bool[Tensor, "batch pos"] | None = None
    order: Int[Tensor, "batch pos"] | None = None  # packed position -> position
    rank: Int[Tensor, "batch pos"] | None = None  # position -> packed position
    # How many documents have begun in this call, up to each position (0: the state's goes on); None: each row is one.
    documents: Int[Tensor, "batch pos"] | None = None

    @staticmethod
    def of(mask: Shaped[Tensor, "batch pos"] | None) -> Padding:
        """Padding from a [batch, pos] mask; one that masks nothing is none."""
        if mask is None:
            return Padding()
        mask = mask.bool()
        if not anywhere(~mask):
            return Padding()
        order = positions.order(mask)
        return Padding(mask, order, torch.argsort(order, dim=1))

    def zero(self, x: Shaped[Tensor, "batch pos ..."]) -> Shaped[Tensor, "batch pos ..."]:
        """`x` with zeros at masked positions."""
        return x if self.mask is None else self.fill(x, 0.0)

    def fill(self, x: Shaped[Tensor, "batch pos ..."], value: float) -> Shaped[Tensor, "batch pos ..."]:
        """`x` with `value` at masked positions, whatever stood there (NaN too)."""
        return (
            x if self.mask is None else x.masked_fill(~self.mask.reshape(*self.mask.shape, *[1] * (x.ndim - 2)), value)
        )

    def longest(self, length: int) -> int:
        """How many real positions the longest row has, of `length` places."""
        return length if self.mask is None else int(self.mask.sum(1).max())

    def counts(self, x: Shaped[Tensor, "batch pos ..."]) -> Int[Tensor, " batch"]:
        """How many real positions each row of `x` [batch, pos, ...] has."""
        if self.mask is None:
            return torch.full((x.shape[0],), x.shape[1], device=x.device, dtype=torch.long)
        return self.mask.sum(1)

    def behind(
        self, x: Shaped[Tensor, "batch pos channel"], tail: Shaped[Tensor, "batch tail channel"]
    ) -> Shaped[Tensor, "batch long channel"]:
        """The packed row behind its tail: [b, K-1+l, c]; a window of K ending at K-1+rank is what a position sees."""
        return torch.cat([tail.to(x.dtype), self.pack(x)], dim=1)

    def pack(self, x: Shaped[Tensor, "batch pos ..."]) -> Shaped[Tensor, "batch pos ..."]:
        """Each row's real positions first, in their order."""
        return x if self.order is None else _take(x, self.order)

    def by_number(self, x: Shaped[Tensor, "batch ..."], dims: Sequence[str]) -> Shaped[Tensor, "batch ..."]:
        """An activation with these axes, each row's real positions first along pos and key_pos: k stands at k."""
        return _permuted(x, dims, self.order)

    def by_place(self, x: Shaped[Tensor, "batch ..."], dims: Sequence[str]) -> Shaped[Tensor, "batch ..."]:
        """The way back from `by_number`."""
        return _permuted(x, dims, self.rank)

    def packed_mask(self, x: Float[Tensor, "batch pos channel"]) -> Float[Tensor, "batch pos one"]:
        """1 at packed positions that are real, 0 behind them, in x's dtype."""
        real = torch.arange(x.shape[1], device=x.device) < self.counts(x).unsqueeze(1)
        return real.unsqueeze(-1).to(x.dtype)

    def spread(self, packed: Shaped[Tensor, "batch pos ..."]) -> Shaped[Tensor, "batch pos ..."]:
        """Back from packed to real positions; zeros at masked ones."""
        return packed if self.rank is None else self.zero(_take(packed, self.rank))

    def tail(self, long: Shaped[Tensor, "batch long channel"], width: int) -> Shaped[Tensor, "batch tail channel"]:
        """The last K-1 real inputs of each row, from `behind`: the tail for the next call."""
        if self.mask is None:
            return long[:, long.shape[1] - (width - 1) :]
        return _take(long, self.mask.sum(1, keepdim=True) + torch.arange(width - 1, device=long.device))


def _take(x: Shaped[Tensor, "batch pos ..."], index: Int[Tensor, "batch some"]) -> Shaped[Tensor, "batch some ..."]:
    return x.gather(1, index.reshape(*index.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))


def _permuted(x: Tensor, dims: Sequence[str], index: Tensor | None) -> Tensor:
    """`x` by another order of its positions; an axis of another length (keys that a state brought) stays as it is."""
    if index is None:
        return x
    for axis, name in enumerate(dims):
        if name in ("pos", "key_pos") and x.shape[axis] == index.shape[1]:
            x = _take(x.movedim(axis, 1), index).movedim(1, axis)
    return x


def windows(long: Shaped[Tensor, "batch long channel"], width: int) -> Shaped[Tensor, "batch pos channel tap"]:
    """Every window of `width` over a row from `behind`, oldest tap first."""
    return long.unfold(1, width, 1)

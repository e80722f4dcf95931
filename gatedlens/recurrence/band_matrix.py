"""BandScan: a causal depthwise convolution as the matrix that mixes tokens: a band of K diagonals, and no state.

    S[i, j] = taps[K - 1 - (i - j)], 0 <= i - j < K, within a document

For layers whose whole mixing of tokens is such a convolution (LFM2's). b batch, l pos (i row, j source), c channel, K taps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from gatedlens.recurrence import convolution
from gatedlens.recurrence.matrix import ScanMatrix


@dataclass(frozen=True)
class BandScan(ScanMatrix):
    """`BandScan(taps, 12)`: S over so many positions; `document` [b, l] numbers the documents of packed rows (None: each row is
    one). It starts from the inputs before the first, [batch, K - 1, channel]."""

    taps: Float[Tensor, "channel tap"]
    positions: int
    rows: int
    document: Int[Tensor, "batch pos"] | None = None
    start_axis: ClassVar[int] = 2

    @property
    def length(self) -> int:
        return self.positions

    def select(self, channels: Tensor | slice | list[int]) -> BandScan:
        """The band of some channels."""
        return replace(self, taps=self.taps[channels])

    def apply(
        self, u: Float[Tensor, "batch pos channel"], start: Float[Tensor, "batch carried channel"] | None = None
    ) -> Float[Tensor, "batch pos channel"]:
        """S u (+ what the inputs before the first bring)."""
        width = self.taps.shape[1]
        if self.document is not None:
            found = convolution.conv(u, self.taps, self.document)
            if start is None:
                return found
            tail = convolution.slide(torch.cat([start.to(u), torch.zeros_like(u)], dim=1), self.taps)
            return found + tail * (self.document == 0).unsqueeze(-1)
        before = u.new_zeros(u.shape[0], width - 1, u.shape[2]) if start is None else start.to(u)
        return convolution.slide(torch.cat([before, u], dim=1), self.taps)

    def apply_transposed(self, g: Float[Tensor, "batch pos channel"]) -> Float[Tensor, "batch pos channel"]:
        """S^T g"""
        if self.document is not None:
            return convolution.conv_transposed(g, self.taps, self.document)
        return convolution.slide(F.pad(g, (0, 0, 0, self.taps.shape[1] - 1)), self.taps.flip(1))

    def _diagonals(self) -> Iterator[tuple[int, Float[Tensor, "batch pos channel"]]]:
        """(k, S[i, i - k] for i = k, k + 1, ...), [batch, pos - k, channel]."""
        for k in range(min(self.taps.shape[1], self.positions)):
            tap = self.taps[:, -1 - k].expand(self.rows, self.positions - k, -1)
            if self.document is not None:
                tap = tap * (self.document[:, k:] == self.document[:, : self.positions - k]).unsqueeze(-1)
            yield k, tap

    def _banded(self, of: Iterator[tuple[int, Tensor]], like: Tensor) -> Tensor:
        total = like.new_zeros(self.rows, *like.shape[1:-1], self.positions, self.positions)
        for k, diagonal in of:
            total.diagonal(-k, -2, -1).add_(diagonal)
        return total

    def dense(self) -> Float[Tensor, "batch channel dst src"]:
        """S channel by channel."""
        like = self.taps.new_empty(self.rows, len(self.taps), 0)
        return self._banded(((k, own.mT) for k, own in self._diagonals()), like)

    def contracted(
        self, left: Float[Tensor, "batch pos channel"], right: Float[Tensor, "batch pos channel"]
    ) -> Float[Tensor, "batch dst src"]:
        """sum_c left_i[c] * S[i, j][c] * right_j[c], diagonal by diagonal."""
        ends = self.positions
        given = ((k, (left[:, k:] * own * right[:, : ends - k]).sum(-1)) for k, own in self._diagonals())
        total = left.new_zeros(self.rows, ends, ends)
        return total + sum(torch.diag_embed(diagonal, offset=-k) for k, diagonal in given)

    def own(self) -> Float[Tensor, "batch pos channel"]:
        """S[i, i]"""
        return self.taps[:, -1].expand(self.rows, self.positions, -1)

    def seen(self, i: Int[Tensor, " batch"]) -> Float[Tensor, "batch src channel"]:
        """S[i_b, :] for a row of its own in each batch element."""
        here = F.one_hot(i, self.positions).to(self.taps.dtype).unsqueeze(-1)
        return self.apply_transposed(here.expand(-1, -1, len(self.taps)).contiguous())

"""A softmax pattern as a scan matrix: S is the attention pattern of a channel's head.

b batch, l pos (i row, j source), h head, c channel = head * d_head; `carried` are the sources that a state brought along.
The matrix exists already, a head at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gatedlens.recurrence.matrix import ScanMatrix


@dataclass(frozen=True)
class PatternScan(ScanMatrix):
    """`PatternScan(pattern, head)`: `pattern` over this call's positions, `before` over the carried ones."""

    pattern: Float[Tensor, "batch head pos key_pos"]
    before: Float[Tensor, "batch head pos carried"]
    head: Int[Tensor, " channel"]
    start_axis: ClassVar[int] = 2  # it starts from carried values, [batch, carried, channel]

    @property
    def length(self) -> int:
        return self.pattern.shape[2]

    def select(self, channels: Tensor | slice | list[int]) -> PatternScan:
        """The scan of some channels."""
        return replace(self, head=self.head[channels])

    def _apply(
        self, pattern: Float[Tensor, "batch head dst src"], u: Float[Tensor, "batch src channel"]
    ) -> Float[Tensor, "batch dst channel"]:
        """Each channel's head times its values, a head at a time."""
        out = u.new_zeros(u.shape[0], pattern.shape[2], u.shape[2])
        for head in self.head.unique().tolist():
            mine = self.head == head
            out[:, :, mine] = pattern[:, head] @ u[:, :, mine]
        return out

    def apply(
        self, u: Float[Tensor, "batch pos channel"], start: Float[Tensor, "batch carried channel"] | None = None
    ) -> Float[Tensor, "batch pos channel"]:
        """S u (+ what the carried values contribute)."""
        own = self._apply(self.pattern, u)
        return own if start is None else own + self._apply(self.before, start)

    def mass(self, kept: Float[Tensor, "batch pos channel"]) -> Float[Tensor, "batch pos channel"]:
        """How much of each row's sum is left when only the sources `kept` (1, else 0) and the carried ones are."""
        return self._apply(self.pattern, kept) + self.before.sum(-1)[:, self.head].mT

    def apply_transposed(self, g: Float[Tensor, "batch pos channel"]) -> Float[Tensor, "batch pos channel"]:
        """S^T g"""
        return self._apply(self.pattern.mT, g)

    def contracted(
        self, left: Float[Tensor, "batch pos channel"], right: Float[Tensor, "batch pos channel"]
    ) -> Float[Tensor, "batch dst src"]:
        """sum_c left_i[c] * S[i, j][c] * right_j[c], a head at a time."""
        total = torch.zeros_like(self.pattern[:, 0])
        for head in self.head.unique().tolist():
            mine = self.head == head
            total = total + self.pattern[:, head] * (left[:, :, mine] @ right[:, :, mine].mT)
        return total

    def dense(self) -> Float[Tensor, "batch channel dst src"]:
        """S channel by channel."""
        return self.pattern[:, self.head]

    def seen(self, i: Int[Tensor, " batch"]) -> Float[Tensor, "batch src channel"]:
        """S[i_b, :] for a row of its own in each batch element."""
        row = self.pattern[torch.arange(len(i), device=i.device), :, i]  # b head src
        return row[:, self.head].mT

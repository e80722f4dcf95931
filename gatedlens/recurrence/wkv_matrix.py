"""The WKV scan as a matrix: a row softmax over the past, with what a carried state holds in every row's sum.

    S[i, j] = e^{w (i - j - 1) + k_j} / Z_i  (j < i),   e^{u + k_i} / Z_i  (j = i)
    Z_i = e^{w i} D_start + sum_{j < i} e^{w (i - j - 1) + k_j} + e^{u + k_i}

b batch, l pos (i row, j source), c channel; k keys [b, l, c], w < 0 and u [c].
As in decay_matrix.py a block of rows i >= m and sources j < m is one matrix product: with P the running maximum at m - 1,

    S[i, j] = e^{w (i - m) + P - log Z_i} * e^{w (m - 1 - j) + k_j - P},   both factors at most 1.

Exponents are formed in float64: w i alone may be in the thousands. Where documents begin (`fresh`), `K`, what the resets up to a
position leave, as a logarithm, goes with w: e^{w (i - j - 1) + K_i - K_j + k_j}.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from gatedlens.recurrence.decay_matrix import CHUNK_ELEMENTS, GONE, NARROW, blocks
from gatedlens.recurrence.matrix import ScanMatrix
from gatedlens.recurrence.wkv_scan import TINY, Carry, log_kept, wkv


@dataclass(frozen=True)
class WkvScan(ScanMatrix):
    """`WkvScan(k, w, u, den, max)`: den and max are those of the carry that the scan began from."""

    k: Float[Tensor, "batch pos channel"]
    w: Float[Tensor, " channel"]
    u: Float[Tensor, " channel"]
    den: Float[Tensor, "batch channel"]
    max: Float[Tensor, "batch channel"]
    fresh: Float[Tensor, "batch pos one"] | None = None  # 1 where the state before is forgotten

    @property
    def length(self) -> int:
        return self.k.shape[1]

    def select(self, channels: Tensor | slice | list[int]) -> WkvScan:
        """The scan of some channels."""
        start = {"den": self.den[:, channels], "max": self.max[:, channels]}
        return replace(self, k=self.k[:, :, channels], w=self.w[channels], u=self.u[channels], **start)

    # -- as an operator ------------------------------------------------------------------------------------------

    def apply(
        self, u: Float[Tensor, "batch pos channel"], start: Float[Tensor, "batch channel one"] | None = None
    ) -> Float[Tensor, "batch pos channel"]:
        """S u (+ what the start numerator contributes), by the recurrence."""
        num = torch.zeros_like(self.den) if start is None else start.squeeze(-1)
        return wkv(self.k, u, self.w, self.u, None, Carry(num, self.den, self.max), self.fresh)[0]

    def mean_log_decay(self, real: Float[Tensor, "batch pos one"]) -> Float[Tensor, "batch channel one"]:
        """w, which no token moves."""
        return self.w.double().expand(len(real), -1).unsqueeze(-1)

    def mass(self, kept: Float[Tensor, "batch pos channel"]) -> Float[Tensor, "batch pos channel"]:
        """How much of each row's sum is left when only the sources `kept` (1, else 0) and the carried state are."""
        return self.apply(kept, self.den.unsqueeze(-1))

    def apply_transposed(self, g: Float[Tensor, "batch pos channel"]) -> Float[Tensor, "batch pos channel"]:
        """S^T g: S u is linear in u, so this is its gradient."""
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            u = torch.zeros_like(g).requires_grad_()
            return torch.autograd.grad(self.apply(u), u, g, create_graph=again)[0]

    # -- the matrix ----------------------------------------------------------------------------------------------

    @property
    def _clock(self) -> Float[Tensor, "#batch pos channel"]:
        """w i + K_i: the decay of a state up to a position, as a logarithm; float64."""
        clock = self.w.double() * torch.arange(self.length, device=self.k.device).unsqueeze(-1)
        return clock.unsqueeze(0) if self.fresh is None else clock + log_kept(self.fresh.double(), GONE).cumsum(1)

    @property
    def _key_from_start(self) -> Float[Tensor, "batch pos channel"]:
        """k_j - w j - K_j: a key as it is seen from position 0, whatever the row; float64."""
        return self.k.double() - self._clock

    @property
    def _log_total(self) -> Float[Tensor, "batch pos channel"]:
        """log Z; float64."""
        start = self.max.double() + self.den.double().clamp(min=TINY).log() + self.w.double()
        past = torch.cat([start.unsqueeze(1), self._key_from_start[:, :-1]], dim=1).logcumsumexp(1)
        past = past + self._clock - self.w.double()
        return torch.logaddexp(past, (self.u + self.k).double())

    def seen(self, i: Int[Tensor, " batch"]) -> Float[Tensor, "batch src channel"]:
        """S[i_b, :] for a row of its own in each batch element; zeros behind it."""
        batch, ago = (
            torch.arange(len(i), device=i.device),
            i[:, None, None] - torch.arange(self.length, device=i.device)[:, None],
        )
        clock = self._clock.expand(len(i), -1, -1)
        past = clock[batch, i].unsqueeze(1) - clock - self.w.double()
        score = self.k.double() + torch.where(ago == 0, self.u.double(), past)
        score = score - self._log_total[batch, i].unsqueeze(1)
        return torch.exp(score.masked_fill(ago < 0, -torch.inf)).to(self.k.dtype)

    def _diagonal(
        self, offset: int, log_total: Float[Tensor, "batch pos channel"]
    ) -> Float[Tensor, "batch some channel"]:
        """S[i, i - offset] for i >= offset."""
        source, clock = self.k[:, : self.length - offset].double(), self._clock
        past = clock[:, offset:] - clock[:, : self.length - offset] - self.w.double()
        score = source + (self.u.double() if offset == 0 else past)
        return torch.exp(score - log_total[:, offset:]).to(self.k.dtype)

    def _blocks(
        self, log_total: Float[Tensor, "batch pos channel"]
    ) -> Iterator[tuple[int, int, int, Float[Tensor, "batch rows channel"], Float[Tensor, "batch some channel"]]]:
        """(lo, mid, hi, left, right): S[mid:hi, lo:mid] = left * right, channel by channel."""
        keys, rows = self._key_from_start, self._clock - self.w.double()
        with torch.no_grad():
            tops = keys.cummax(1).values
        for lo, mid, hi in blocks(self.length):
            top = tops[:, mid - 1 : mid]
            left = torch.exp(rows[:, mid:hi] + top - log_total[:, mid:hi])
            right = torch.exp(keys[:, lo:mid] - top)
            yield lo, mid, hi, left.to(self.k.dtype), right.to(self.k.dtype)

    def contracted(
        self, left: Float[Tensor, "batch pos channel"], right: Float[Tensor, "batch pos channel"]
    ) -> Float[Tensor, "batch dst src"]:
        """sum_c left_i[c] * S[i, j][c] * right_j[c], block by block."""
        total = left.new_zeros(left.shape[0], self.length, self.length)
        size = max(1, CHUNK_ELEMENTS // (left.shape[0] * self.length))
        for first in range(0, left.shape[2], size):
            some = slice(first, first + size)
            self.select(some)._add_contracted(total, left[..., some], right[..., some])
        return total

    def _add_contracted(
        self,
        total: Float[Tensor, "batch pos pos"],
        left: Float[Tensor, "batch pos channel"],
        right: Float[Tensor, "batch pos channel"],
    ) -> None:
        log_total = self._log_total
        for lo, mid, hi, rows, sources in self._blocks(log_total):
            total[:, mid:hi, lo:mid] += (rows * left[:, mid:hi]) @ (sources * right[:, lo:mid]).mT
        for offset in range(min(NARROW, self.length)):
            values = self._diagonal(offset, log_total) * left[:, offset:] * right[:, : self.length - offset]
            rows = self._narrow_rows(offset)
            total[:, rows, rows - offset] += values.sum(-1)[:, rows - offset]

    def dense(self) -> Float[Tensor, "batch channel dst src"]:
        """S channel by channel: [b, c, l, l]."""
        batch, length, channels = self.k.shape
        total, log_total = self.k.new_zeros(batch, channels, length, length), self._log_total
        for lo, mid, hi, rows, sources in self._blocks(log_total):
            total[:, :, mid:hi, lo:mid] = rows.mT.unsqueeze(-1) * sources.mT.unsqueeze(-2)
        for offset in range(min(NARROW, length)):
            rows = self._narrow_rows(offset)
            values = self._diagonal(offset, log_total)[:, rows - offset]
            total[:, :, rows, rows - offset] = rearrange(values, "b i c -> b c i")
        return total

    def _narrow_rows(self, offset: int) -> Int[Tensor, " row"]:
        """The rows whose source `offset` places before is in their own narrow block."""
        rows = torch.arange(offset, self.length, device=self.k.device)
        return rows[rows % NARROW >= offset]

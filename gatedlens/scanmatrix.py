"""The scan as a matrix: S[i, j] = sum_n read_i[n] * exp(rate[n] * (time_i - time_j)) * amount_j * key_j[n], j <= i.

It is never built with a state axis. b batch, l pos (i row, j source), c channel, n state. `time` grows along pos (the
cumulative dt, or log decay) and `rate` <= 0 turns it into a log decay, so every exponential below is of a number <= 0:

    a block of rows behind a boundary m and sources up to it is one matrix product, since
    exp(rate (time_i - time_j)) = exp(rate (time_i - time_m)) * exp(rate (time_m - time_j)),
    both factors at most 1: left[i, cn] @ right[j, cn].T; halve until blocks are narrow and go by diagonals there.

Differences of `time` are taken in float64: a long cumulative sum would lose them in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from gatedlens.recurrence import scan

NARROW = 4  # blocks of this many positions go by diagonals
CHUNK_ELEMENTS = 1 << 22  # numbers in a temporary [rows, channels, state]: 16 MiB of float32


@dataclass(frozen=True)
class DecayScan:
    """The factors of S. `document` [b, l] numbers the documents of a packed row: none sees another's tokens."""

    time: Float[Tensor, "batch pos channel"]  # float64
    rate: Float[Tensor, "channel state"]
    read: Float[Tensor, "batch pos state"]
    amount: Float[Tensor, "batch pos channel"]
    key: Float[Tensor, "batch pos state"]
    document: Int[Tensor, "batch pos"] | None = None

    @property
    def length(self) -> int:
        return self.time.shape[1]

    @property
    def channels(self) -> int:
        return self.time.shape[2]

    def select(self, channels: Tensor | slice | list[int]) -> DecayScan:
        """The scan of some channels."""
        time, amount = self.time[:, :, channels], self.amount[:, :, channels]
        return DecayScan(time, self.rate[channels], self.read, amount, self.key, self.document)

    def decay(self, later: Tensor, earlier: Tensor) -> Float[Tensor, ...]:
        """exp(rate * (later - earlier)) with a state axis behind: [..., c] float64 times to [..., c, n]."""
        return torch.exp((later - earlier).to(self.rate.dtype).unsqueeze(-1) * self.rate)

    # -- as an operator ------------------------------------------------------------------------------------------

    def apply(
        self, u: Float[Tensor, "batch pos channel"], start: Float[Tensor, "batch channel state"] | None = None
    ) -> Float[Tensor, "batch pos channel"]:
        """S u (+ what the start state contributes), by the recurrence."""
        step = torch.diff(self.time, dim=1, prepend=self.time.new_zeros(1, 1, 1).expand_as(self.time[:, :1]))
        if start is None:
            start = u.new_zeros(u.shape[0], u.shape[2], self.rate.shape[1])
        sequences = (step.to(u.dtype), self.fresh().to(u.dtype), self.amount * u, self.key, self.read)
        return scan(_terms, sequences, (self.rate,), start)[0]

    def apply_transposed(self, g: Float[Tensor, "batch pos channel"]) -> Float[Tensor, "batch pos channel"]:
        """S^T g: the same recurrence from the end, with read and key in each other's place."""
        ahead = torch.diff(self.time, dim=1, append=self.time[:, -1:]).flip(1)
        fresh = torch.cat([self.fresh()[:, 1:], self.fresh()[:, :1]], dim=1).flip(1)
        # decay between i and i + 1 stands before the step: shift it by one
        ahead = torch.cat([torch.zeros_like(ahead[:, :1]), ahead[:, 1:]], dim=1)
        start = g.new_zeros(g.shape[0], g.shape[2], self.rate.shape[1])
        sequences = (ahead.to(g.dtype), fresh.to(g.dtype), g.flip(1), self.read.flip(1), self.key.flip(1))
        return self.amount * scan(_terms, sequences, (self.rate,), start)[0].flip(1)

    def fresh(self) -> Float[Tensor, "batch pos one"]:
        """1 where a document begins anew (the state before it is forgotten), 0 elsewhere."""
        if self.document is None:
            return self.read.new_zeros(*self.time.shape[:2], 1)
        first = torch.diff(self.document, dim=1, prepend=self.document[:, :1]) != 0
        return first.unsqueeze(-1).to(self.read.dtype)

    # -- rows and columns ----------------------------------------------------------------------------------------

    def row(self, i: int) -> Float[Tensor, "batch channel src"]:
        """S[i, :]; zeros behind i."""
        decay = self.decay(self.time[:, i : i + 1], self.time[:, : i + 1])
        weight = einsum(decay, self.read[:, i], self.key[:, : i + 1], "b j c n, b n, b j n -> b c j")
        weight = weight * rearrange(self.amount[:, : i + 1], "b j c -> b c j")
        if self.document is not None:
            weight = weight * (self.document[:, : i + 1] == self.document[:, i : i + 1]).unsqueeze(1)
        return torch.nn.functional.pad(weight, (0, self.length - 1 - i))

    def column(self, j: int) -> Float[Tensor, "batch channel dst"]:
        """S[:, j]; zeros before j."""
        decay = self.decay(self.time[:, j:], self.time[:, j : j + 1])
        weight = einsum(decay, self.read[:, j:], self.key[:, j], "b i c n, b i n, b n -> b c i")
        weight = weight * self.amount[:, j].unsqueeze(-1)
        if self.document is not None:
            weight = weight * (self.document[:, j:] == self.document[:, j : j + 1]).unsqueeze(1)
        return torch.nn.functional.pad(weight, (j, 0))

    # -- the whole matrix, channels summed or apart --------------------------------------------------------------

    def summed(
        self,
        left: Float[Tensor, "batch pos channel"],
        right: Float[Tensor, "batch pos channel"],
        taps: Float[Tensor, "channel tap"],
    ) -> Float[Tensor, "batch dst src"]:
        """sum_c left_i[c] * sum_k S[i, j + k] * right_{j + k}[c] * taps[c, K - 1 - k]: channels summed, conv included."""
        width = taps.shape[1]
        total = left.new_zeros(left.shape[0], self.length, self.length + width - 1)
        for channels in self._channel_chunks():
            part = self.select(channels)
            part._add_summed(total, left[..., channels], right[..., channels], taps[channels])
        return self._within_documents(total[..., width - 1 :], width)

    def _add_summed(self, total: Tensor, left: Tensor, right: Tensor, taps: Tensor) -> None:
        """Add to `total`, whose columns begin K - 1 places before position 0."""
        width = taps.shape[1]
        source = (right * self.amount).unsqueeze(-1) * self.key.unsqueeze(-2)
        for lo, mid, hi in blocks(self.length):
            boundary = self.time[:, mid - 1 : mid]
            rows = left[:, mid:hi].unsqueeze(-1) * self.read[:, mid:hi].unsqueeze(-2)
            rows = rearrange(rows * self.decay(self.time[:, mid:hi], boundary), "b i c n -> b i (c n)")
            sources = source[:, lo:mid] * self.decay(boundary, self.time[:, lo:mid])
            spread = sources.new_zeros(sources.shape[0], mid - lo + width - 1, *sources.shape[2:])
            for k in range(width):  # tap K - 1 - k brings token j = m - k to source m
                spread[:, width - 1 - k : spread.shape[1] - k] += sources * taps[:, width - 1 - k, None]
            product = rows @ rearrange(spread, "b j c n -> b (c n) j")
            total[:, mid:hi, lo : mid + width - 1] += product
        for offset in range(min(NARROW, self.length)):
            values = self._diagonal(offset) * left[:, offset:] * right[:, : self.length - offset]
            rows = torch.arange(offset, self.length, device=left.device)
            near = rows % NARROW >= offset
            weighted = values[:, near] @ taps  # b i tap
            for k in range(width):
                columns = rows[near] - offset - k + width - 1
                total[:, rows[near], columns] += weighted[..., width - 1 - k]

    def _diagonal(self, offset: int) -> Float[Tensor, "batch some channel"]:
        """S[i, i - offset] for i >= offset."""
        stop = self.length - offset
        pair = self.read[:, offset:] * self.key[:, :stop]
        if offset == 0:
            return pair.sum(-1, keepdim=True) * self.amount
        decay = self.decay(self.time[:, offset:], self.time[:, :stop])
        return torch.matmul(decay, pair.unsqueeze(-1)).squeeze(-1) * self.amount[:, :stop]

    def dense(self) -> Float[Tensor, "batch channel dst src"]:
        """S channel by channel: [b, c, l, l]."""
        total = self.read.new_zeros(self.time.shape[0], self.channels, self.length, self.length)
        source = self.amount.unsqueeze(-1) * self.key.unsqueeze(-2)
        for lo, mid, hi in blocks(self.length):
            boundary = self.time[:, mid - 1 : mid]
            rows = self.read[:, mid:hi].unsqueeze(-2) * self.decay(self.time[:, mid:hi], boundary)
            sources = source[:, lo:mid] * self.decay(boundary, self.time[:, lo:mid])
            total[:, :, mid:hi, lo:mid] = rearrange(rows, "b i c n -> b c i n") @ rearrange(
                sources, "b j c n -> b c n j"
            )
        for offset in range(min(NARROW, self.length)):
            rows = torch.arange(offset, self.length, device=total.device)
            near = rows % NARROW >= offset
            total[:, :, rows[near], rows[near] - offset] = rearrange(self._diagonal(offset)[:, near], "b i c -> b c i")
        return self._within_documents(total, 1)

    def _within_documents(self, total: Tensor, width: int) -> Tensor:
        if self.document is None:
            return total
        same = self.document.unsqueeze(2) == self.document.unsqueeze(1)
        return total * (same if total.ndim == 3 else same.unsqueeze(1))

    def _channel_chunks(self) -> Iterator[slice]:
        size = max(1, CHUNK_ELEMENTS // (self.time.shape[0] * self.length * self.rate.shape[1]))
        for start in range(0, self.channels, size):
            yield slice(start, start + size)


def _terms(
    step: Tensor, fresh: Tensor, push: Tensor, key: Tensor, read: Tensor, rate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    decay = torch.exp(step.unsqueeze(-1) * rate) * (1 - fresh).unsqueeze(-1)
    return decay, push.unsqueeze(-1) * key.unsqueeze(-2), read


def blocks(length: int) -> Iterator[tuple[int, int, int]]:
    """(lo, mid, hi): rows mid..hi see sources lo..mid; together with the NARROW diagonal blocks they tile the triangle."""
    size = NARROW
    while size < length:
        for lo in range(0, length - size, 2 * size):
            yield lo, lo + size, min(lo + 2 * size, length)
        size *= 2

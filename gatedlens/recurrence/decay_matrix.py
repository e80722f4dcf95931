"""The scan as a matrix: S[i, j] = sum_n read_i[n] * exp(rate[n] * (time_i - time_j)) * amount_j * key_j[n], j <= i.

It is never built with a state axis. b batch, l pos (i row, j source), c channel, n state. `time` grows along pos (the
cumulative dt, or log decay) and `rate` <= 0 turns it into a log decay, so every exponential below is of a number <= 0
(so are those of `document` and `kept`, where a state is forgotten or partly so):

    a block of rows behind a boundary m and sources up to it is one matrix product, since
    exp(rate (time_i - time_j)) = exp(rate (time_i - time_m)) * exp(rate (time_m - time_j)),
    both factors at most 1: left[i, cn] @ right[j, cn].T; halve until blocks are narrow and go by diagonals there.

Differences of `time` are taken in float64: a long cumulative sum would lose them in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gatedlens.recurrence.channels import ChannelTerms
from gatedlens.recurrence.decay_blocks import DiagonalTile, Halving, Pieces, Scratch, scaled_by_power, scratch_for
from gatedlens.recurrence.head_matrix import HeadScan
from gatedlens.recurrence.matrix import ScanMatrix
from gatedlens.recurrence.matrix_vector import times
from gatedlens.recurrence.scanning import scan
from gatedlens.recurrence.terms import Terms
from gatedlens.recurrence.transforms import anywhere

GONE = -2000.0  # the logarithm of what a reset leaves: nothing in float64, and small beside its digits when many add up
NARROW = 4  # blocks of this many positions go by diagonals
ROW_ELEMENTS = 1 << 18  # numbers in a temporary [sources, channels, state] of `seen`, for a single row
CHUNK_ELEMENTS = 1 << 19  # numbers in a temporary [rows, channels, state]: 2 MiB of float32, about the L2 cache


@dataclass(frozen=True)
class DecayScan(ScanMatrix):
    """The factors of S. `document` [b, l] numbers the documents of a packed row: none sees another's tokens. `kept` [b, l] is
    the logarithm of what the resets up to a position leave, as far as they are no whole ones: S[i, j] exp(kept_i - kept_j)."""

    time: Float[Tensor, "batch pos channel"]  # float64
    rate: Float[Tensor, "channel state"]
    read: Float[Tensor, "batch pos state"]
    amount: Float[Tensor, "batch pos channel"]
    key: Float[Tensor, "batch pos state"]
    document: Int[Tensor, "batch pos"] | None = None
    kept: Float[Tensor, "batch pos"] | None = None  # float64

    @classmethod
    def of(cls, terms: ChannelTerms) -> DecayScan:
        """`DecayScan.of(ChannelTerms(dt, amount=dt, key=B, read=C, rate=A))`: the matrix of these terms."""
        log, amount = terms.log_decay, terms.amount
        one = torch.ones_like(log[..., :1])
        rate = log.new_ones(log.shape[2], 1) if terms.rate is None else terms.rate
        read, key = (one if x is None else x for x in (terms.read, terms.key))
        amount = torch.ones_like(log) if amount is None else amount
        document, kept = (None, None) if terms.fresh is None else resets(terms.fresh)
        return cls(log.double().cumsum(1), rate, read, amount, key, document, kept)

    @property
    def length(self) -> int:
        return self.time.shape[1]

    @property
    def channels(self) -> int:
        return self.time.shape[2]

    def select(self, channels: Tensor | slice | list[int]) -> DecayScan:
        """The scan of some channels."""
        time, amount = self.time[:, :, channels], self.amount[:, :, channels]
        return replace(self, time=time, rate=self.rate[channels], amount=amount)

    def undecayed(self, own: Bool[Tensor, "batch pos"]) -> DecayScan:
        """With exp(rate * (time_{i - 1} - time_j)) in the rows i of `own`; it is meant for these rows alone."""
        before = torch.cat([self.time[:, :1], self.time[:, :-1]], dim=1)
        kept = self.kept
        if kept is not None:
            kept = torch.where(own, torch.cat([kept[:, :1], kept[:, :-1]], dim=1), kept)
        return replace(self, time=torch.where(own.unsqueeze(-1), before, self.time), kept=kept)

    def decay(
        self, later: Float[Tensor, "... channel"], earlier: Float[Tensor, "... channel"]
    ) -> Float[Tensor, "... channel state"]:
        """exp(rate * (later - earlier)) with a state axis behind: [..., c] float64 times to [..., c, n]."""
        return torch.exp((later - earlier).to(self.rate.dtype).unsqueeze(-1) * self.rate)

    # -- as an operator ------------------------------------------------------------------------------------------

    def recurrence(self) -> Terms:
        """`ChannelTerms.as_heads` of what it was made of."""
        steps = torch.diff(self.time, dim=1, prepend=torch.zeros_like(self.time[:, :1])).to(self.rate.dtype)
        fresh = None if self.document is None and self.kept is None else self.fresh()
        key, read = self.key.unsqueeze(2), self.read.unsqueeze(2)
        return Terms(steps.unsqueeze(-1), key, read, self.amount, rate=self.rate, fresh=fresh)

    def rewritten(self, key: Float[Tensor, "group key"]) -> ScanMatrix:
        """Of the same recurrence, of heads."""
        return HeadScan.of(self.recurrence(), 1).rewritten(key)

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
        """1 where a document begins anew (the state before it is forgotten), 0 elsewhere; between them in part."""
        fresh = self.read.new_zeros(*self.time.shape[:2], 1)
        if self.kept is not None:
            fresh = -torch.expm1(torch.diff(self.kept, dim=1, prepend=torch.zeros_like(self.kept[:, :1])))
            fresh = fresh.unsqueeze(-1).to(self.read.dtype)
        if self.document is None:
            return fresh
        first = torch.diff(self.document, dim=1, prepend=self.document[:, :1]) != 0
        return torch.where(first.unsqueeze(-1), 1.0, fresh)

    # -- rows and columns ----------------------------------------------------------------------------------------

    def row(self, i: int) -> Float[Tensor, "batch channel src"]:
        """S[i, :]; zeros behind i."""
        place = torch.full((self.time.shape[0],), i, device=self.time.device)
        return rearrange(self.seen(place), "b j c -> b c j")

    def seen(self, i: Int[Tensor, " batch"]) -> Float[Tensor, "batch src channel"]:
        """S[i_b, :] for a row of its own in each batch element; zeros behind it."""
        batch, scratch = torch.arange(len(i), device=i.device), self._scratch()
        reach = int(i.max()) + 1
        now, read = self.time[batch, i].unsqueeze(1), self.read[batch, i].unsqueeze(1)
        visible = torch.arange(reach, device=i.device) <= i.unsqueeze(1)
        if self.document is not None:
            visible = visible & (self.document[:, :reach] == self.document[batch, i].unsqueeze(1))
        size = max(1, ROW_ELEMENTS // (len(i) * self.rate.numel()))
        pieces = []
        for start in range(0, reach, size):
            part = slice(start, min(start + size, reach))
            ago = ((now - self.time[:, part]) * visible[:, part].unsqueeze(-1)).to(self.rate.dtype)
            decay = scratch.empty("decay", *ago.shape, self.rate.shape[1])
            decay = scratch.exp(
                scratch.multiply(decay, ago.unsqueeze(-1), self.rate), torch.finfo(self.rate.dtype).tiny ** 0.8
            )
            pieces.append(times(decay, read * self.key[:, part]))
        weight = torch.cat(pieces, dim=1) * self.amount[:, :reach] * visible.unsqueeze(-1)
        if self.kept is not None:
            left = ((self.kept[batch, i].unsqueeze(1) - self.kept[:, :reach]) * visible).exp()
            weight = weight * left.to(weight.dtype).unsqueeze(-1)
        return torch.nn.functional.pad(weight, (0, 0, 0, self.length - reach))

    def column(self, j: int) -> Float[Tensor, "batch channel dst"]:
        """S[:, j]; zeros before j."""
        decay = self.decay(self.time[:, j:], self.time[:, j : j + 1])
        weight = einsum(decay, self.read[:, j:], self.key[:, j], "b i c n, b i n, b n -> b c i")
        weight = weight * self.amount[:, j].unsqueeze(-1)
        if self.document is not None:
            weight = weight * (self.document[:, j:] == self.document[:, j : j + 1]).unsqueeze(1)
        if self.kept is not None:
            weight = weight * (self.kept[:, j:] - self.kept[:, j : j + 1]).exp().to(weight.dtype).unsqueeze(1)
        return torch.nn.functional.pad(weight, (j, 0))

    # -- the whole matrix, channels summed or apart --------------------------------------------------------------

    def summed(
        self,
        left: Float[Tensor, "batch pos channel"],
        right: Float[Tensor, "batch pos channel"],
        taps: Float[Tensor, "channel tap"],
    ) -> Float[Tensor, "batch dst src"]:
        """sum_c left_i[c] * sum_k S[i, j + k] * right_{j + k}[c] * taps[c, K - 1 - k]: channels summed, conv included."""
        halving = Halving(self.length, taps.shape[1])
        size = max(1, CHUNK_ELEMENTS // (left.shape[0] * halving.padded * self.rate.shape[1]))
        scratch = self._scratch(left, right, taps)
        scan, left, right, taps, power = self._rescaled(scratch, left, right, taps)
        tiles, products = halving.zeros(left)
        for start in range(0, self.channels, size):
            some = slice(start, start + size)
            blocks = scan.select(some)._pieces(halving, left[..., some], right[..., some], taps[some], scratch)
            _add_contracted(blocks, tiles, products)
        return halving.assemble(tiles, products, power)

    def folded(
        self,
        left: Float[Tensor, "batch pos channel"],
        right: Float[Tensor, "batch pos channel"],
        taps: Float[Tensor, "channel tap"],
    ) -> Float[Tensor, "batch channel dst src"]:
        """What `summed` sums, channel by channel."""
        halving = Halving(self.length, taps.shape[1])
        scratch = self._scratch(left, right, taps)
        scan, left, right, taps, power = self._rescaled(scratch, left, right, taps)
        tiles, *products = _apart(scan._pieces(halving, left, right, taps, scratch))
        return halving.assemble(tiles, products, power)

    def dense(self) -> Float[Tensor, "batch channel dst src"]:
        """S channel by channel: [b, c, l, l]."""
        ones = torch.ones_like(self.amount)
        return self.folded(ones, ones, ones.new_ones(self.channels, 1))

    def _rescaled(
        self, scratch: Scratch, left: Tensor, right: Tensor, taps: Tensor
    ) -> tuple[DecayScan, Tensor, Tensor, Tensor, int]:
        """The scan and its weights, each times a power of two, and the power of two by which the result is then too large.

        The largest number of each factor comes near 1, so that no product of some of them leaves the dtype's range: in
        float32 a key of 1e-25 times an amount of 1e-25 is zero, even where `read` and `left` make up for it.
        """
        given = (self.read, self.amount, self.key, taps, left, right)
        powers = [scratch.rescaling_power(x) for x in given]
        # `left` is in the rows and `right` in the columns: both sides of every block get the same headroom.
        powers[-2] += scratch.headroom
        powers[-1] += scratch.headroom
        read, amount, key, taps, left, right = (
            scaled_by_power(x, power) for x, power in zip(given, powers, strict=True)
        )
        return replace(self, read=read, amount=amount, key=key), left, right, taps, sum(powers)

    def _scratch(self, *others: Tensor) -> Scratch:
        return scratch_for(self.rate, self.time, self.read, self.amount, self.key, *others)

    def _pieces(self, halving: Halving, left: Tensor, right: Tensor, taps: Tensor, scratch: Scratch) -> Pieces:
        cut, over = halving.cut_into_tiles, halving.padded - halving.length
        time, kept = self.time, self._log_left()
        if over:
            time = torch.cat([time, time[:, -1:].expand(-1, over, -1)], dim=1)
            kept = None if kept is None else torch.cat([kept, kept[:, -1:].expand(-1, over)], dim=1)
        weights = cut(left), cut(right * self.amount), taps
        return Pieces(halving, time, kept, self.rate, cut(self.read), cut(self.key), *weights, scratch)

    def _log_left(self) -> Float[Tensor, "batch pos"] | None:
        """`kept`, and nothing of what is of another document."""
        if self.document is None:
            return self.kept
        whole = GONE * self.document.double()
        return whole if self.kept is None else whole + self.kept


def resets(
    fresh: Float[Tensor, "batch pos one"],
) -> tuple[Int[Tensor, "batch pos"] | None, Float[Tensor, "batch pos"] | None]:
    """(document, kept) of resets: which positions a whole reset lies between, and the logarithm of what the others leave.

    None where there is nothing of the kind behind the first position: a row has no sources before that.
    """
    whole = fresh.squeeze(-1) >= 1
    document = whole.long().cumsum(1) if anywhere(whole[:, 1:]) else None
    partly = fresh.squeeze(-1).double().masked_fill(whole, 0)
    kept = torch.log1p(-partly).cumsum(1) if anywhere(partly != 0) or partly.requires_grad else None
    return document, kept


def _add_contracted(blocks: Pieces, tiles: Tensor, products: list[Tensor]) -> None:
    """Add to diagonal tiles [b, t, row, column] and off-diagonal blocks [b, p, h, column]; channel and state are summed."""
    rest = iter(products)
    for part in blocks:
        if isinstance(part, DiagonalTile):
            tiles[:, :, part.row, part.source : part.source + blocks.halving.taps] += part.values @ blocks.taps
        else:
            # One batched product sums over channel and state at once: no axis of either is left in memory.
            rows, columns = (x.flatten(0, 1).flatten(2) for x in part)
            next(rest).flatten(0, 1).baddbmm_(rows, columns.mT)


def _apart(blocks: Pieces) -> list[Tensor]:
    """The same for each channel: [b, c, t, row, column], then [b, c, p, h, column] span by span."""
    b, t, place, c = blocks.left.shape
    tiles = blocks.left.new_zeros(b, c, t, place, place + blocks.halving.taps - 1)
    parts = [tiles]
    for part in blocks:
        if isinstance(part, DiagonalTile):
            spread = part.values.mT.unsqueeze(-1) * blocks.taps.unsqueeze(1)  # b c t tap
            tiles[:, :, :, part.row, part.source : part.source + blocks.halving.taps] += spread
        else:
            parts.append(torch.einsum("bphcn,bpjcn->bcphj", part.rows, part.columns))
    return parts


def _terms(
    step: Float[Tensor, "... channel"],
    fresh: Float[Tensor, "... one"],
    push: Float[Tensor, "... channel"],
    key: Float[Tensor, "... state"],
    read: Float[Tensor, "... state"],
    rate: Float[Tensor, "channel state"],
) -> tuple[Float[Tensor, "... channel state"], Float[Tensor, "... channel state"], Float[Tensor, "... state"]]:
    decay = torch.exp(step.unsqueeze(-1) * rate) * (1 - fresh).unsqueeze(-1)
    return decay, push.unsqueeze(-1) * key.unsqueeze(-2), read


def blocks(length: int) -> Iterator[tuple[int, int, int]]:
    """(lo, mid, hi): rows mid..hi see sources lo..mid; together with the NARROW diagonal blocks they tile the triangle."""
    size = NARROW
    while size < length:
        for lo in range(0, length - size, 2 * size):
            yield lo, lo + size, min(lo + 2 * size, length)
        size *= 2

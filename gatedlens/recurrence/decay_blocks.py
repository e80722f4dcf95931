"""The triangle of a decaying scan as blocks, each one matrix product: what `DecayScan` (decay_matrix.py) sums and lays out.

    A[i, j] = left_i sum_k S[i, j + k] right_{j + k} taps[K - 1 - k]
    S[i, m] = sum_n read_i[n] exp(rate[n] (time_i - time_m)) amount_m key_m[n] ,  m <= i

b batch, l pos (i row, m source, j column), c channel, n state, t tile of TILE positions, p pair of blocks, h rows, K taps.

The triangle is diagonal tiles of TILE x TILE positions, and below them off-diagonal blocks of 1, 2, 4, ... tiles a side:

    D . . . . . . .      D   a diagonal tile: each pair of its positions by itself
    1 D . . . . . .      1   the block of two neighbouring tiles: rows of the lower, sources of the upper one
    2 2 D . . . . .      2   the block of two neighbouring pairs of tiles, and so on
    2 2 1 D . . . .

Rows in a block [lo, hi) carry exp(rate (time_i - time_{lo-1})), sources exp(rate (time_{hi-1} - time_m)), both at most 1. An
off-diagonal block is one matrix product, `rows of the right neighbour @ sources of the left one`; then the two become one of
twice the size: the right's rows and the left's sources are multiplied by the decay of the other block. The conv is folded into
the sources, so a block of s sources has s + K - 1 columns, which begin K - 1 places before it; those of neighbours overlap.

Exponentials are of the steps alone (b l c n of them); all else is multiplication. No number on the way exceeds what it stands
for. Everything here is out of place where a gradient may need the old value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatedlens.recurrence.transforms import transformed

TILE = 4  # positions: a smaller tile means more levels of blocks, a larger one more pairs that are taken by themselves


def scratch_for(like: Float[Tensor, ...], *tensors: Tensor) -> Scratch:
    """The scratch memory to compute in, of the dtype of `like`: fresh tensors if a derivative or a vmap follows any of them."""
    if transformed():  # a buffer must have every axis that a vmap hides in any of them
        return Scratch(torch.stack([x.flatten()[0].to(like.dtype) for x in (like, *tensors)]).sum())
    if torch.is_grad_enabled() and any(x.requires_grad for x in (like, *tensors)):
        return Scratch(like)
    return ScratchBuffers(like)


class Scratch:
    """Where intermediate tensors are written: a fresh tensor each time, since a backward pass may need the old value."""

    def __init__(self, like: Float[Tensor, ...]):
        self.like = like
        self.floor = torch.finfo(like.dtype).tiny ** 0.75
        # The power of two by which weights start above 1, so that what decays stays above `floor` for long. With gradients
        # none: a scale of the numbers would be one of the gradients too, and these may already be large.
        self.headroom = 0

    def power(self, x: Float[Tensor, ...]) -> int:
        """The power of two that brings the largest number of `x` near 1; 0 where there is none to bring, or vmap hides it."""
        if torch._C._are_functorch_transforms_active() or x.numel() == 0:
            return 0
        largest = x.detach().abs().amax().item()
        return -math.frexp(largest)[1] if 0 < largest < math.inf else 0

    def empty(self, name: str, *shape: int) -> Float[Tensor, ...]:
        return self.like.new_empty(shape)

    def own(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """A copy of `x` to write on."""
        return x.clone()

    def put(
        self, target: Float[Tensor, "*shape"], a: Float[Tensor, ...], b: Float[Tensor, ...]
    ) -> Float[Tensor, "*shape"]:
        """target <- a * b"""
        return target.copy_(a * b)

    def exp(self, x: Float[Tensor, "*shape"], floor: float) -> Float[Tensor, "*shape"]:
        """exp(x); what is below `floor` is zero, at full speed."""
        return F.hardshrink(x.clamp(min=math.log(floor) - 1).exp(), floor)

    def shrink(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Zero what is below `floor`: on CPUs, products of denormal numbers cost tenfold."""
        return F.hardshrink(x, self.floor)

    def lower(self, target: Float[Tensor, "*shape"], a: Float[Tensor, ...], b: Float[Tensor, ...]) -> None:
        """target <- a * b, shrunk"""
        target.copy_(self.shrink(a * b))


class ScratchBuffers(Scratch):
    """Without gradients: buffers that are used again. Fresh pages of memory cost more than the arithmetic on them."""

    def __init__(self, like: Float[Tensor, ...]):
        super().__init__(like)
        self.buffers: dict[str, Tensor] = {}
        # Two numbers above the floor have a normal product. A denormal one costs a processor ten times as much.
        self.floor = torch.finfo(like.dtype).tiny ** 0.5
        self.headroom = round(-0.4 * math.log2(torch.finfo(like.dtype).tiny))

    def empty(self, name: str, *shape: int) -> Float[Tensor, ...]:
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = self.like.new_empty(size)
        return self.buffers[name][:size].view(shape)

    def own(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return x

    def put(
        self, target: Float[Tensor, "*shape"], a: Float[Tensor, ...], b: Float[Tensor, ...]
    ) -> Float[Tensor, "*shape"]:
        return torch.mul(a, b, out=target)

    def exp(self, x: Float[Tensor, "*shape"], floor: float) -> Float[Tensor, "*shape"]:
        x.clamp_(min=math.log(floor) - 1).exp_()
        return torch.ops.aten.hardshrink.out(x, floor, out=x)

    def shrink(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return torch.ops.aten.hardshrink.out(x, self.floor, out=x)

    def lower(self, target: Float[Tensor, "*shape"], a: Float[Tensor, ...], b: Float[Tensor, ...]) -> None:
        self.shrink(self.put(target, a, b))


def powers_of_two(power: int, dtype: torch.dtype) -> list[float]:
    """2^power as a product of numbers that a dtype holds: `powers_of_two(-200, torch.float32)` is [2^-100, 2^-100]."""
    most = round(-math.log2(torch.finfo(dtype).tiny)) - 2
    count = max(1, -(-abs(power) // most))
    return [2.0 ** (power * (i + 1) // count - power * i // count) for i in range(count)]


def scaled_by_power(x: Float[Tensor, "*shape"], power: int) -> Float[Tensor, "*shape"]:
    """x * 2^power, exact."""
    return x if power == 0 else reduce(torch.mul, powers_of_two(power, x.dtype), x)


class OffDiagonalBlock(NamedTuple):
    """Rows of `pairs` right blocks and columns of the left blocks beside them, not yet summed over the state."""

    rows: Float[Tensor, "batch pair row channel state"]
    columns: Float[Tensor, "batch pair column channel state"]


class DiagonalTile(NamedTuple):
    """S[row, source] * left * right inside every tile, before the conv."""

    row: int
    source: int
    values: Float[Tensor, "batch tile channel"]


class Span(NamedTuple):
    """`pairs` pairs of blocks side by side from position `start`: `size` sources each, `height` rows behind them."""

    start: int
    pairs: int
    size: int
    height: int


@dataclass(frozen=True)
class Halving:
    """How `length` positions and `taps` taps are cut into tiles and pairs of blocks."""

    length: int
    taps: int

    @property
    def padded(self) -> int:
        """Whole tiles; what is behind `length` has decay 1 and no weight."""
        return -(-self.length // TILE) * TILE

    def levels(self) -> Iterator[tuple[int, list[Span]]]:
        """(block size, its spans): full pairs, and perhaps one whose right block is the shorter end of the sequence."""
        size = TILE
        while size < self.padded:
            full = self.padded // (2 * size)
            spans = [Span(0, full, size, size)] if full else []
            rest = self.padded - full * 2 * size
            if rest > size:
                spans.append(Span(full * 2 * size, 1, size, rest - size))
            yield size, spans
            size *= 2

    def tiles(self, x: Float[Tensor, "batch pos some"]) -> Float[Tensor, "batch tile place some"]:
        """Cut along pos, zeros behind the end."""
        return F.pad(x, (0, 0, 0, self.padded - self.length)).unflatten(1, (-1, TILE))

    def zeros(self, like: Float[Tensor, "batch pos channel"]) -> tuple[Tensor, list[Tensor]]:
        """Empty sums as `place` takes them, channels summed."""
        b, overlap = like.shape[0], self.taps - 1
        spans = [span for _, spans in self.levels() for span in spans]
        products = [like.new_zeros(b, span.pairs, span.height, span.size + overlap) for span in spans]
        return like.new_zeros(b, self.padded // TILE, TILE, TILE + overlap), products

    def place(self, diagonal: Tensor, products: list[Tensor], up: int) -> Float[Tensor, "batch *rest dst src"]:
        """The matrix from diagonal tiles [b, ..., t, row, column] and blocks [b, ..., p, h, column], all over 2^up."""
        total = diagonal.new_zeros(*diagonal.shape[:-3], self.padded, self.padded + self.taps - 1)
        spans = [span for _, spans in self.levels() for span in spans]
        first, *rest = powers_of_two(-up, diagonal.dtype)
        for span, product in zip([Span(0, self.padded // TILE, 0, TILE), *spans], [diagonal, *products], strict=True):
            self._along(total, span).add_(product, alpha=first)
        for step in rest:
            total = total * step
        return total[..., : self.length, self.taps - 1 : self.taps - 1 + self.length]

    def _along(self, total: Tensor, span: Span) -> Tensor:
        """The blocks of a span as a view of `total`: [..., p, h, column]."""
        start, pairs, size, height = span
        period, stop = size + height, start + pairs * (size + height)
        # Of the matrix's [row, column] cut out the span, slide a window of one period along the columns, and take the
        # diagonal of (pair of rows, pair of columns): a view, so that `add_` writes into the matrix itself.
        sub = total[..., start:stop, start : stop + self.taps - 1]
        sub = sub.unfold(-1, period + self.taps - 1, period).unflatten(-3, (pairs, period))
        sub = sub.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
        return sub[..., size:, : (size or height) + self.taps - 1]


@dataclass(frozen=True)
class Pieces:
    """A scan, its factors and taps, cut into tiles; it yields diagonal tiles and off-diagonal blocks, every weight once."""

    halving: Halving
    time: Float[Tensor, "batch pos channel"]  # float64, padded
    rate: Float[Tensor, "channel state"]
    read: Float[Tensor, "batch tile place state"]
    key: Float[Tensor, "batch tile place state"]
    left: Float[Tensor, "batch tile place channel"]
    right: Float[Tensor, "batch tile place channel"]  # times amount
    taps: Float[Tensor, "channel tap"]
    scratch: Scratch

    def __iter__(self) -> Iterator[DiagonalTile | OffDiagonalBlock]:
        """First what is inside the tiles, then block sizes as `Halving.levels` has them. A buffer lives until the next."""
        # Differences of float64 times are exact to rounding where the sums are long; only then do they become float32.
        b, t, _, c = self.left.shape
        step = torch.diff(self.time, dim=1, prepend=self.time[:, :1]).unflatten(1, (-1, TILE))
        decays = self._exp(step, self.scratch.empty("decays", b, t, TILE, c, self.rate.shape[1])).unbind(
            2
        )  # each b t c n
        passed = self._passed(decays)
        yield from self._diagonal_tiles(passed)
        columns = self._columns(passed)
        yield from self._off_diagonal_blocks(self._rows(passed), columns)

    def _exp(self, time: Tensor, out: Tensor) -> Tensor:
        """exp(time rate), from float64 [..., c] to [..., c, n]."""
        self.scratch.put(out, time.to(self.rate.dtype).unsqueeze(-1), self.rate)
        return self.scratch.exp(out, self.scratch.floor)

    def _block_decay(self, begin: Tensor, end: Tensor) -> Tensor:
        """The decay of whole blocks. Clamped at the floor, not zeroed: below it a source is as good as forgotten, and a
        product with a denormal number is slow."""
        time = (end - begin).to(self.rate.dtype).unsqueeze(-1) * self.rate
        return torch.exp(time.clamp(min=math.log(self.scratch.floor)))

    def _passed(self, decays: tuple[Tensor, ...]) -> dict[tuple[int, int], Tensor]:
        """[i, m]: the decay from place m to place i of a tile."""
        # Products of single steps, never exp of a difference of sums: each is at most 1, and nothing cancels.
        passed = {(i, i - 1): decays[i] for i in range(TILE)}
        for i in range(1, TILE):
            for m in range(i - 2, -1, -1):
                passed[i, m] = self.scratch.empty(f"passed {i} {m}", *decays[i].shape)
                self.scratch.put(passed[i, m], passed[i - 1, m], decays[i])
        return passed

    def _diagonal_tiles(self, passed: dict[tuple[int, int], Tensor]) -> Iterator[DiagonalTile]:
        for i in range(TILE):
            for m in range(i + 1):
                pair = self.read[:, :, i] * self.key[:, :, m]
                seen = pair.sum(-1, keepdim=True) if m == i else (passed[i, m] @ pair.unsqueeze(-1)).squeeze(-1)
                yield DiagonalTile(i, m, seen * self.left[:, :, i] * self.right[:, :, m])

    def _rows(self, passed: dict[tuple[int, int], Tensor]) -> Float[Tensor, "batch pos channel state"]:
        """Rows of each tile, seen from the last place before it."""
        b, t, _, c = self.left.shape
        first, n = passed[0, -1], self.rate.shape[1]
        rows = self.scratch.empty("rows", b, t, TILE, c, n)
        for i in range(TILE):
            # row i has decayed once per position since the place before its tile: passed[0, -1], then on to place i
            reach = first if i == 0 else self.scratch.put(self.scratch.empty("reach", b, t, c, n), first, passed[i, 0])
            weight = self.scratch.empty("weight", b, t, c, n)
            self.scratch.put(weight, self.left[:, :, i].unsqueeze(-1), self.read[:, :, i].unsqueeze(-2))
            self.scratch.put(rows[:, :, i], weight, reach)
        return self.scratch.shrink(rows.flatten(1, 2))

    def _columns(self, passed: dict[tuple[int, int], Tensor]) -> Tensor:
        """Sources of each tile, seen from its last place, spread over the columns that the conv brings them from."""
        b, t, _, c = self.left.shape
        n, K = self.rate.shape[1], self.halving.taps
        columns = self.scratch.empty("columns", b, t, TILE + K - 1, c, n).zero_()
        for m in range(TILE):
            source = self.key[:, :, m].unsqueeze(-2).expand(b, t, c, n)
            if m < TILE - 1:
                source = self.scratch.put(self.scratch.empty("source", b, t, c, n), source, passed[TILE - 1, m])
            # tap k brings source m from column m + k: one source is added to K neighbouring columns
            weight = self.right[:, :, m].unsqueeze(2) * self.taps.mT  # b t tap c
            columns[:, :, m : m + K].addcmul_(source.unsqueeze(2), weight.unsqueeze(-1))
        return self.scratch.shrink(columns)

    def _off_diagonal_blocks(self, rows: Tensor, columns: Tensor) -> Iterator[OffDiagonalBlock]:
        """rows [b, l, c, n] of blocks of one tile, columns [b, t, TILE + K - 1, c, n] likewise."""
        for size, spans in self.halving.levels():
            for start, pairs, _, height in spans:
                period, first = size + height, start // size
                own = rows[:, start : start + pairs * period].unflatten(1, (pairs, period))[:, :, size:]
                yield OffDiagonalBlock(own, columns[:, first : first + 2 * pairs : 2][:, :pairs])
            if 2 * size < self.halving.padded:
                rows, columns = (
                    self._rows_of_larger_blocks(rows, size, spans),
                    self._columns_of_larger_blocks(columns, size),
                )

    def _rows_of_larger_blocks(self, rows: Tensor, size: int, spans: list[Span]) -> Tensor:
        """Rows of blocks twice the size: those of each right block have come one block further."""
        # time just before each block; before the first there is nothing to see, so any time will do
        begin = torch.cat([self.time[:, :1], self.time[:, size - 1 : -1 : size]], dim=1)
        grown = self.scratch.own(rows)
        for start, pairs, _, height in spans:
            first, period = start // size, size + height
            further = self._block_decay(
                begin[:, first : first + 2 * pairs : 2][:, :pairs], begin[:, first + 1 : first + 2 * pairs : 2]
            )
            old, new = (
                x[:, start : start + pairs * period].unflatten(1, (pairs, period))[:, :, size:] for x in (rows, grown)
            )
            self.scratch.lower(new, old, further.unsqueeze(2))
        return grown

    def _columns_of_larger_blocks(self, columns: Tensor, size: int) -> Tensor:
        """Columns of full blocks twice the size: those of each left block are seen from the end of the right one."""
        pairs, overlap = columns.shape[1] // 2, self.halving.taps - 1
        end = self.time[:, size - 1 :: size]
        further = self._block_decay(end[:, 0 : 2 * pairs : 2], end[:, 1 : 2 * pairs : 2])
        left, right = columns[:, 0 : 2 * pairs : 2], columns[:, 1 : 2 * pairs : 2]
        shape = columns.shape[0], pairs, 2 * size + overlap, *columns.shape[3:]
        # Two buffers in turn: while one level is written, the level below is still read.
        merged = self.scratch.empty(f"columns {size.bit_length() % 2}", *shape)
        self.scratch.lower(merged[:, :, : size + overlap], left, further.unsqueeze(2))
        # The last K - 1 columns of the left block are the first ones of the right: both blocks have sources there.
        merged[:, :, size : size + overlap] += right[:, :, :overlap]
        merged[:, :, size + overlap :] = right[:, :, overlap:]
        return merged

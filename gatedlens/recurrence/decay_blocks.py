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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatedlens.recurrence.matrix_vector import times
from gatedlens.recurrence.transforms import transformed

TILE = 4  # positions: a smaller tile means more levels of blocks, a larger one more pairs that are taken by themselves


def scratch_for(like: Float[Tensor, ...], *tensors: Tensor) -> Scratch:
    """Scratch buffers in the dtype of `like` for a computation with these tensors: reused ones where nothing needs old values."""
    if transformed():
        # Under vmap a buffer must have every axis that is hidden in any of the tensors. The sum of one number of each has them.
        return Scratch(torch.stack([x.flatten()[0].to(like.dtype) for x in (like, *tensors)]).sum())
    if torch.is_grad_enabled() and any(x.requires_grad for x in (like, *tensors)):
        return Scratch(like)
    return ScratchBuffers(like)


class Scratch:
    """Memory for intermediate tensors, new each time: autograd may keep any of them, so none is overwritten by another."""

    def __init__(self, like: Float[Tensor, ...]):
        self.like = like
        self.floor = torch.finfo(like.dtype).tiny ** 0.75
        # The power of two by which weights start above 1, so that what decays stays above `floor` for long. It is
        # used without gradients alone, where the floor is the higher one.
        self.headroom = 0

    def rescaling_power(self, x: Float[Tensor, ...]) -> int:
        """The power of two that brings the largest number of `x` near 1; 0 if it is 0 or not finite, or under torch.func."""
        if torch._C._are_functorch_transforms_active() or x.numel() == 0:
            return 0
        largest = x.detach().abs().amax().item()
        return -math.frexp(largest)[1] if 0 < largest < math.inf else 0

    def empty(self, name: str, *shape: int) -> Float[Tensor, ...]:
        """A buffer with this name. Where buffers are reused, the next one of the same name takes its memory."""
        return self.like.new_empty(shape)

    def writable(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """`x` to be overwritten: a copy if `x` may still be needed, else `x` itself."""
        return x.clone()

    def multiply(
        self, target: Float[Tensor, "*shape"], a: Float[Tensor, ...], b: Float[Tensor, ...]
    ) -> Float[Tensor, "*shape"]:
        """target <- a * b"""
        return target.copy_(a * b)

    def exp(self, x: Float[Tensor, "*shape"], floor: float) -> Float[Tensor, "*shape"]:
        """exp(x), with zero for what is below `floor`."""
        # The clamp stops just below `floor`, so exp makes no denormal numbers, which are slow; hardshrink clears the rest.
        return F.hardshrink(x.clamp(min=math.log(floor) - 1).exp(), floor)

    def flush(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Zero for what is below `floor`: on CPUs, products of denormal numbers cost tenfold."""
        return F.hardshrink(x, self.floor)

    def multiply_and_flush(self, target: Float[Tensor, "*shape"], a: Float[Tensor, ...], b: Float[Tensor, ...]) -> None:
        """target <- flush(a * b)"""
        target.copy_(self.flush(a * b))


class ScratchBuffers(Scratch):
    """Without gradients: one buffer a name, overwritten. Fresh memory pages cost more than the arithmetic on them."""

    def __init__(self, like: Float[Tensor, ...]):
        super().__init__(like)
        self.buffers: dict[str, Tensor] = {}
        self.floor = torch.finfo(like.dtype).tiny ** 0.5  # two numbers above it have a normal product
        self.headroom = round(-0.4 * math.log2(torch.finfo(like.dtype).tiny))

    def empty(self, name: str, *shape: int) -> Float[Tensor, ...]:
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = self.like.new_empty(size)
        return self.buffers[name][:size].view(shape)

    def writable(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return x

    def multiply(
        self, target: Float[Tensor, "*shape"], a: Float[Tensor, ...], b: Float[Tensor, ...]
    ) -> Float[Tensor, "*shape"]:
        return torch.mul(a, b, out=target)

    def exp(self, x: Float[Tensor, "*shape"], floor: float) -> Float[Tensor, "*shape"]:
        x.clamp_(min=math.log(floor) - 1).exp_()
        return torch.ops.aten.hardshrink.out(x, floor, out=x)

    def flush(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return torch.ops.aten.hardshrink.out(x, self.floor, out=x)

    def multiply_and_flush(self, target: Float[Tensor, "*shape"], a: Float[Tensor, ...], b: Float[Tensor, ...]) -> None:
        self.flush(self.multiply(target, a, b))


def powers_of_two(power: int, dtype: torch.dtype) -> list[float]:
    """2^power as a product of numbers that a dtype holds: `powers_of_two(-200, torch.float32)` is [2^-100, 2^-100]."""
    # Two powers less than the range, so that both 2^most and 2^-most are normal numbers.
    most = round(-math.log2(torch.finfo(dtype).tiny)) - 2
    count = max(1, -(-abs(power) // most))
    return [2.0 ** (power * (i + 1) // count - power * i // count) for i in range(count)]


def scaled_by_power(x: Float[Tensor, "*shape"], power: int) -> Float[Tensor, "*shape"]:
    """x * 2^power, exact."""
    return x if power == 0 else reduce(torch.mul, powers_of_two(power, x.dtype), x)


class OffDiagonalBlock(NamedTuple):
    """Rows of the right blocks and columns of the left blocks of some pairs, not yet summed over the state."""

    rows: Float[Tensor, "batch pair row channel state"]
    columns: Float[Tensor, "batch pair column channel state"]


class DiagonalTile(NamedTuple):
    """One entry of every diagonal tile, S[row, source] * left * right, before the conv."""

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
        """The length in whole tiles. The positions past `length` have decay 1 and weight 0, so they change nothing."""
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

    def cut_into_tiles(self, x: Float[Tensor, "batch pos some"]) -> Float[Tensor, "batch tile place some"]:
        """`x` cut along pos, zeros past the end."""
        return F.pad(x, (0, 0, 0, self.padded - self.length)).unflatten(1, (-1, TILE))

    def zeros(self, like: Float[Tensor, "batch pos channel"]) -> tuple[Tensor, list[Tensor]]:
        """Zeros in the shapes that `assemble` takes, channels summed: the tiles and, span by span, the off-diagonal blocks."""
        b, overlap = like.shape[0], self.taps - 1
        spans = [span for _, spans in self.levels() for span in spans]
        products = [like.new_zeros(b, span.pairs, span.height, span.size + overlap) for span in spans]
        return like.new_zeros(b, self.padded // TILE, TILE, TILE + overlap), products

    def assemble(self, tiles: Tensor, products: list[Tensor], power: int) -> Float[Tensor, "batch *rest dst src"]:
        """The matrix, over 2^power, from tiles [b, ..., t, row, column] and off-diagonal blocks [b, ..., p, h, column]."""
        total = tiles.new_zeros(*tiles.shape[:-3], self.padded, self.padded + self.taps - 1)
        spans = [span for _, spans in self.levels() for span in spans]
        # 2^-power may be outside the dtype's range: then it is several factors, the first taken as the blocks are added.
        first, *rest = powers_of_two(-power, tiles.dtype)
        # A tile is its own pair of blocks: no sources before its rows, so size 0.
        for span, product in zip([Span(0, self.padded // TILE, 0, TILE), *spans], [tiles, *products], strict=True):
            self._blocks_of(span, total).add_(product, alpha=first)
        for factor in rest:
            total = total * factor
        # The columns begin K - 1 places before the first position; what the conv would read there is nothing.
        return total[..., : self.length, self.taps - 1 : self.taps - 1 + self.length]

    def _blocks_of(self, span: Span, total: Tensor) -> Tensor:
        """The blocks of a span as a view of `total`: [..., p, h, column]."""
        start, pairs, size, height = span
        period, stop = size + height, start + pairs * (size + height)
        sub = total[..., start:stop, start : stop + self.taps - 1]
        # [..., pair of the rows, period, pair of the columns, column]; windows of columns overlap by the K - 1 of the conv.
        sub = sub.unfold(-1, period + self.taps - 1, period).unflatten(-3, (pairs, period))
        # Rows and columns of the same pair: still a view, so that `add_` writes into the matrix itself. Different pairs have
        # different rows, so no number is in it twice.
        sub = sub.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
        return sub[..., size:, : (size or height) + self.taps - 1]


@dataclass(frozen=True)
class Pieces:
    """The blocks of a scan, its factors and its taps: `for blocks in Pieces(...)` gives every weight once."""

    halving: Halving
    time: Float[Tensor, "batch pos channel"]  # float64, padded
    kept: Float[Tensor, "batch pos"] | None  # the same of what resets leave, as a logarithm; None: there are none
    rate: Float[Tensor, "channel state"]
    read: Float[Tensor, "batch tile place state"]
    key: Float[Tensor, "batch tile place state"]
    left: Float[Tensor, "batch tile place channel"]
    right: Float[Tensor, "batch tile place channel"]  # times amount
    taps: Float[Tensor, "channel tap"]
    scratch: Scratch

    def __iter__(self) -> Iterator[DiagonalTile | OffDiagonalBlock]:
        """The diagonal tiles, then the off-diagonal blocks, sizes ascending as in `Halving.levels`.

        What is given is read before the next is asked for: the next may overwrite it.
        """
        b, t, _, c = self.left.shape
        step = torch.diff(self.time, dim=1, prepend=self.time[:, :1]).unflatten(1, (-1, TILE))
        decays = self._exp(step, self.scratch.empty("decays", b, t, TILE, c, self.rate.shape[1]))
        if self.kept is not None:
            kept = torch.diff(self.kept, dim=1, prepend=self.kept[:, :1]).exp().to(decays.dtype)
            decays = decays * kept.unflatten(1, (-1, TILE))[..., None, None]
        within = self._decays_within_tiles(decays.unbind(2))  # b t c n
        yield from self._diagonal_tiles(within)
        columns = self._columns(within)
        yield from self._off_diagonal_blocks(self._rows(within), columns)

    def _exp(self, time: Tensor, out: Tensor) -> Tensor:
        """exp(time rate), from float64 [..., c] to [..., c, n]."""
        self.scratch.multiply(out, time.to(self.rate.dtype).unsqueeze(-1), self.rate)
        return self.scratch.exp(out, self.scratch.floor)

    def _block_decay(self, begin: Sequence[int], end: Sequence[int]) -> Tensor:
        """The decay of whole blocks, from some positions to others. Clamped at the floor, not zeroed: below it a source is as
        good as forgotten, and a product with a denormal number is slow."""
        # The difference is taken in float64, before the cast: two late times differ little beside their own size.
        begin, end = list(begin), list(end)
        time = (self.time[:, end] - self.time[:, begin]).to(self.rate.dtype).unsqueeze(-1) * self.rate
        decay = torch.exp(time.clamp(min=math.log(self.scratch.floor)))
        if self.kept is None:
            return decay
        return decay * (self.kept[:, end] - self.kept[:, begin]).exp().to(decay.dtype)[..., None, None]

    def _decays_within_tiles(self, decays: tuple[Tensor, ...]) -> dict[tuple[int, int], Tensor]:
        """[i, m]: the decay from place m to place i of a tile; place -1 is the last one before the tile."""
        # Products of single steps, never exp of a difference of sums: each is at most 1, and nothing cancels.
        within = {(i, i - 1): decays[i] for i in range(TILE)}
        for i in range(1, TILE):
            for m in range(i - 2, -1, -1):
                within[i, m] = self.scratch.empty(f"within {i} {m}", *decays[i].shape)
                self.scratch.multiply(within[i, m], within[i - 1, m], decays[i])
        return within

    def _diagonal_tiles(self, within: dict[tuple[int, int], Tensor]) -> Iterator[DiagonalTile]:
        for i in range(TILE):
            for m in range(i + 1):
                pair = self.read[:, :, i] * self.key[:, :, m]
                # sum_n decay read key; on the diagonal there is no decay.
                weight = pair.sum(-1, keepdim=True) if m == i else times(within[i, m], pair)
                yield DiagonalTile(i, m, weight * self.left[:, :, i] * self.right[:, :, m])

    def _rows(self, within: dict[tuple[int, int], Tensor]) -> Float[Tensor, "batch pos channel state"]:
        """left_i read_i of each tile, with the decay since the last position before the tile."""
        b, t, _, c = self.left.shape
        first, n = within[0, -1], self.rate.shape[1]
        rows = self.scratch.empty("rows", b, t, TILE, c, n)
        for i in range(TILE):
            # From the position before the tile to its place 0, and on to place i.
            decay = (
                first if i == 0 else self.scratch.multiply(self.scratch.empty("decay", b, t, c, n), first, within[i, 0])
            )
            weight = self.scratch.empty("weight", b, t, c, n)
            self.scratch.multiply(weight, self.left[:, :, i].unsqueeze(-1), self.read[:, :, i].unsqueeze(-2))
            self.scratch.multiply(rows[:, :, i], weight, decay)
        return self.scratch.flush(rows.flatten(1, 2))

    def _columns(self, within: dict[tuple[int, int], Tensor]) -> Tensor:
        """key_m right_m of each tile, with the decay until its last place, as columns: [b, t, TILE + K - 1, c, n]."""
        b, t, _, c = self.left.shape
        n, K = self.rate.shape[1], self.halving.taps
        columns = self.scratch.empty("columns", b, t, TILE + K - 1, c, n).zero_()
        for m in range(TILE):
            source = self.key[:, :, m].unsqueeze(-2).expand(b, t, c, n)
            if m < TILE - 1:
                source = self.scratch.multiply(self.scratch.empty("source", b, t, c, n), source, within[TILE - 1, m])
            weight = self.right[:, :, m].unsqueeze(2) * self.taps.mT  # b t tap c
            # Column q is the token at place q - (K - 1). The last tap reads the token itself, so the taps end at m + K - 1.
            columns[:, :, m : m + K].addcmul_(source.unsqueeze(2), weight.unsqueeze(-1))
        return self.scratch.flush(columns)

    def _off_diagonal_blocks(self, rows: Tensor, columns: Tensor) -> Iterator[OffDiagonalBlock]:
        """Pairs of ever larger blocks, from rows [b, l, c, n] and columns [b, t, TILE + K - 1, c, n] of blocks of one tile."""
        for size, spans in self.halving.levels():
            for start, pairs, _, height in spans:
                period, first = size + height, start // size
                right = rows[:, start : start + pairs * period].unflatten(1, (pairs, period))[:, :, size:]
                # Every second block is the left one of a pair.
                yield OffDiagonalBlock(right, columns[:, first : first + 2 * pairs : 2][:, :pairs])
            if 2 * size < self.halving.padded:
                rows, columns = (
                    self._rows_of_larger_blocks(rows, size, spans),
                    self._columns_of_larger_blocks(columns, size),
                )

    def _rows_of_larger_blocks(self, rows: Tensor, size: int, spans: list[Span]) -> Tensor:
        """Rows of blocks twice the size. Those of each right block take the decay across the left one; the left rows stay."""
        # Time just before each block. The first block has no sources before it, so any time will do.
        begin = [0, *range(size - 1, self.halving.padded - 1, size)]
        doubled = self.scratch.writable(rows)
        for start, pairs, _, height in spans:
            first, period = start // size, size + height
            right = begin[first + 1 : first + 2 * pairs : 2]
            decay = self._block_decay(begin[first : first + 2 * pairs : 2][:pairs], right)
            old, new = (
                x[:, start : start + pairs * period].unflatten(1, (pairs, period))[:, :, size:] for x in (rows, doubled)
            )
            self.scratch.multiply_and_flush(new, old, decay.unsqueeze(2))
        return doubled

    def _columns_of_larger_blocks(self, columns: Tensor, size: int) -> Tensor:
        """Columns of full blocks twice the size. Those of each left block take the decay across the right one."""
        # A last block without a right neighbour is dropped: rows behind it, where there are any, have read it already.
        pairs, overlap = columns.shape[1] // 2, self.halving.taps - 1
        end = range(size - 1, self.halving.padded, size)
        decay = self._block_decay(end[0 : 2 * pairs : 2], end[1 : 2 * pairs : 2])
        left, right = columns[:, 0 : 2 * pairs : 2], columns[:, 1 : 2 * pairs : 2]
        shape = columns.shape[0], pairs, 2 * size + overlap, *columns.shape[3:]
        # Two names in turn: this level reads the buffer that the level before wrote.
        doubled = self.scratch.empty(f"columns {size.bit_length() % 2}", *shape)
        self.scratch.multiply_and_flush(doubled[:, :, : size + overlap], left, decay.unsqueeze(2))
        # The conv of the right block reads K - 1 tokens of the left one: there both add up.
        doubled[:, :, size : size + overlap] += right[:, :, :overlap]
        doubled[:, :, size + overlap :] = right[:, :, overlap:]
        return doubled

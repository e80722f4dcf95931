"""The matrices of heads with matrix states, patch by patch: what `HeadScan` (head_matrix.py) sums and lays out.

    S[i, j] = read_i . E(i, j) key_j ,  j <= i             E(i, j) = transition_i ... transition_{j+1}

Two ways, by what a transition is:

    one decay a head    a patch is (read @ key^T) * exp(cum_i - cum_j); the product is shared by the heads of a group, and the
                        decays are an outer product of numbers that are at most 1
    anything else       blocks: rows seen from a block's start, sources seen from its end, and its transition [k, k] (a delta
                        rule) or [k] (decays by key). Neighbours meet as rows(right) @ sources(left); then the two are one block:
                        rows(right) @= transition(left), sources(left) @= transition(right)^T

So a delta rule costs what a decay by key costs, pos^2 k a head, and the system of no whole matrix is ever solved.
b batch, l pos, h head, g group, k key, C positions of the smallest blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatedlens.recurrence.chunk import GONE, Chunk, chunk_of, solve
from gatedlens.recurrence.chunks import chunk_size, cut, laid_out, parts_of
from gatedlens.recurrence.terms import Terms

Joined = TypeVar("Joined")

PATCH = 256  # positions: rows and sources of a patch; its numbers stay in the cache while channels are summed


@dataclass(frozen=True)
class Patch:
    """`patch.of(head)`: S[rows, sources] of one head, [b, rows, sources], in memory of its own. Ask heads in ascending order."""

    rows: slice
    sources: slice
    of: Callable[[int], Tensor]


def patches(terms: Terms) -> Iterator[Patch]:
    """Patches that tile the lower triangle, each entry once."""
    return _in_blocks(terms) if terms.has_delta_rule or terms.by_key else _by_head(terms)


# -- one decay a head ----------------------------------------------------------------------------------------------


def _by_head(terms: Terms) -> Iterator[Patch]:
    length, dtype = terms.key.shape[1], terms.key.dtype
    # In float64, where differences of long sums keep their digits.
    cum = terms.log_decays().squeeze(-1).double().clamp(min=GONE).cumsum(1)  # b l h
    share = terms.heads // terms.key.shape[2]
    some = parts_of(length, PATCH)
    for rows, sources in ((rows, sources) for i, rows in enumerate(some) for sources in some[: i + 1]):
        products: dict[int, Tensor] = {}

        def of(
            head: int, rows: slice = rows, sources: slice = sources, products: dict[int, Tensor] = products
        ) -> Tensor:
            group = head // share
            if group not in products:
                products.clear()  # one group's product at a time
                products[group] = terms.read[:, rows, group] @ terms.key[:, sources, group].mT
            late, early = cum[:, rows, head], cum[:, sources, head]
            if rows == sources:
                ago = (late.unsqueeze(-1) - early.unsqueeze(-2)).to(dtype)
                return torch.exp(ago.masked_fill(~_seen(ago), -torch.inf)) * products[group]
            border = cum[:, rows.start - 1, head].unsqueeze(-1)
            before, since = torch.exp(border - early).to(dtype), torch.exp(late - border).to(dtype)
            return products[group] * since.unsqueeze(-1) * before.unsqueeze(-2)

        yield Patch(rows, sources, of)


def _seen(matrix: Float[Tensor, "batch dst src"]) -> Tensor:
    """True at and below the diagonal."""
    return torch.ones(matrix.shape[-2:], dtype=torch.bool, device=matrix.device).tril()


# -- delta rules, and decays by key --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """Some positions, seen from outside: all heads, [b, h, ...]. They lie in pieces, each as long as a patch or shorter."""

    pieces: tuple[slice, ...]
    rows: tuple[Float[Tensor, "batch head _ key"], ...]  # how the scan of a position reads the state before the block
    sources: tuple[Float[Tensor, "batch head _ key"], ...]  # what a position has left in the state behind the block
    transition: Float[Tensor, "batch head key *key"]  # what has become of the state itself: a matrix, or decays by key

    def joined(self, right: Block) -> Block:
        """This block and its right neighbour as one."""
        rows = (*self.rows, *(_through(x, self.transition) for x in right.rows))
        sources = (*(_through(x, _turned(right.transition)) for x in self.sources), *right.sources)
        by_key = self.transition.ndim == 3
        both = right.transition * self.transition if by_key else right.transition @ self.transition
        return Block(self.pieces + right.pieces, rows, sources, both)

    def meeting(self, right: Block) -> Iterator[Patch]:
        """Its right neighbour's rows read its sources."""
        for some, rows in zip(right.pieces, right.rows, strict=True):
            for others, sources in zip(self.pieces, self.sources, strict=True):

                def of(head: int, rows: Tensor = rows, sources: Tensor = sources) -> Tensor:
                    return rows[:, head] @ sources[:, head].mT

                yield Patch(some, others, of)


@dataclass(frozen=True)
class Tile:
    """A block that is no longer than a patch, with its own matrix."""

    matrix: Float[Tensor, "batch head pos pos"]
    block: Block

    def joined(self, right: Tile) -> Tile:
        """This tile and its right neighbour as one: its own matrix is laid out, which is little, and one product a head."""
        meeting = torch.cat(right.block.rows, dim=2) @ torch.cat(self.block.sources, dim=2).mT
        above = F.pad(self.matrix, (0, right.matrix.shape[-1]))
        return Tile(
            torch.cat([above, torch.cat([meeting, right.matrix], dim=-1)], dim=-2), self.block.joined(right.block)
        )

    def whole(self) -> Block:
        """The block in one piece."""
        some, block = self.block.pieces, self.block
        rows, sources = torch.cat(block.rows, dim=2), torch.cat(block.sources, dim=2)
        return Block((slice(some[0].start, some[-1].stop),), (rows,), (sources,), block.transition)


def _pairs(level: list[Joined], join: Callable[[Joined, Joined], Joined]) -> list[Joined]:
    """Neighbours as one; the last waits for the next level if it has no right neighbour."""
    alone = level[len(level) - len(level) % 2 :]
    return [*(join(left, right) for left, right in zip(level[0::2], level[1::2], strict=False)), *alone]


def _through(x: Tensor, transition: Tensor) -> Tensor:
    """x @ transition, whichever it is."""
    return x * transition.unsqueeze(-2) if transition.ndim == 3 else x @ transition


def _turned(transition: Tensor) -> Tensor:
    return transition if transition.ndim == 3 else transition.mT


def _in_blocks(terms: Terms) -> Iterator[Patch]:
    same, (log, key, read, erase, probe) = laid_out(terms)
    length, size = key.shape[1], chunk_size(terms)
    level = list[Block]()
    for patch in parts_of(length, size * max(1, PATCH // size)):
        tiles = list[Tile]()
        for inside in parts_of(patch.stop - patch.start, size):
            part = slice(patch.start + inside.start, patch.start + inside.stop)
            tiles.append(_tile(chunk_of(cut(same, part, log, key, key[..., :1], read, erase, probe)), part))
        while len(tiles) > 1:
            tiles = _pairs(tiles, Tile.joined)
        (tile,) = tiles
        yield Patch(patch, patch, _heads_of(tile.matrix))
        level.append(tile.whole())
    while len(level) > 1:
        for left, right in zip(level[0::2], level[1::2], strict=False):
            yield from left.meeting(right)
        level = _pairs(level, Block.joined) if len(level) > 2 else level[:1]


def _heads_of(matrix: Tensor) -> Callable[[int], Tensor]:
    return lambda head: matrix[:, head]


def _tile(chunk: Chunk, part: slice) -> Tile:
    """A chunk's own matrix, and the chunk as a block: all of it with the system of its delta rule solved."""
    rows, sources, inside = chunk.rows_from_start(), chunk.sources_to_end(), chunk.matrices[0]
    if not chunk.delta:
        return Tile(inside, Block((part,), (rows,), (sources,), chunk.decay))
    # What is written in the chunk, by the state before it and by its sources: w = (I + T)^-1 (p S_0 + M<(probe, key) value).
    T, reading, erased = chunk.strict[-1], chunk.matrices[-1], chunk.sources_to_end(len(chunk.sources) - 1)
    by_state, by_source = solve(T, chunk.rows_from_start(1)), solve(T, chunk.strict[0])
    transition = -erased.mT @ by_state
    transition.diagonal(dim1=-2, dim2=-1).add_(chunk.decay)
    left = sources - by_source.mT @ erased
    return Tile(inside - reading @ by_source, Block((part,), (rows - reading @ by_state,), (left,), transition))

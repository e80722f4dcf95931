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

import torch
from jaxtyping import Float
from torch import Tensor

from gatedlens.recurrence.chunk import GONE, Chunk, chunk_of, solve
from gatedlens.recurrence.chunks import chunk_size, cut, laid_out, parts_of
from gatedlens.recurrence.terms import Terms

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


def _squares(rows: slice, sources: slice) -> Iterator[tuple[slice, slice]]:
    """A block cut into patches."""
    for first in range(rows.start, rows.stop, PATCH):
        for begin in range(sources.start, sources.stop, PATCH):
            yield slice(first, min(first + PATCH, rows.stop)), slice(begin, min(begin + PATCH, sources.stop))


# -- one decay a head ----------------------------------------------------------------------------------------------


def _by_head(terms: Terms) -> Iterator[Patch]:
    length, dtype = terms.key.shape[1], terms.key.dtype
    # In float64, where differences of long sums keep their digits.
    cum = terms.log_decays().squeeze(-1).double().clamp(min=GONE).cumsum(1)  # b l h
    share = terms.heads // terms.key.shape[2]
    everything = slice(0, length)
    for rows, sources in _squares(everything, everything):
        if sources.start > rows.start:
            continue
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
    """Positions start ... stop, seen from outside: all heads, [b, h, ...]."""

    start: int
    stop: int
    rows: Float[Tensor, "batch head pos key"]  # how the scan of a position reads the state before the block
    sources: Float[Tensor, "batch head pos key"]  # what a position has left in the state behind the block
    transition: Float[Tensor, "batch head key *key"]  # what has become of the state itself: a matrix, or decays by key

    def joined(self, right: Block) -> Block:
        """This block and its right neighbour as one."""
        rows = torch.cat([self.rows, _through(right.rows, self.transition)], dim=2)
        sources = torch.cat([_through(self.sources, _turned(right.transition)), right.sources], dim=2)
        by_key = self.transition.ndim == 3
        both = right.transition * self.transition if by_key else right.transition @ self.transition
        return Block(self.start, right.stop, rows, sources, both)


def _through(x: Tensor, transition: Tensor) -> Tensor:
    """x @ transition, whichever it is."""
    return x * transition.unsqueeze(-2) if transition.ndim == 3 else x @ transition


def _turned(transition: Tensor) -> Tensor:
    return transition if transition.ndim == 3 else transition.mT


def _in_blocks(terms: Terms) -> Iterator[Patch]:
    same, (log, key, read, erase, probe) = laid_out(terms)
    level = []
    for part in parts_of(key.shape[1], chunk_size(terms)):
        chunk = chunk_of(cut(same, part, log, key, key[..., :1], read, erase, probe))
        matrix, block = _block(chunk, part)
        yield Patch(part, part, _heads_of(matrix))
        level.append(block)
    while len(level) > 1:
        above = []
        for left, right in zip(level[0::2], level[1::2], strict=False):
            yield from _meeting(left, right)
            if len(level) > 2:
                above.append(left.joined(right))
        # A last block without a right neighbour waits for the next level.
        level = [*above, level[-1]] if len(level) % 2 else above


def _heads_of(matrix: Tensor) -> Callable[[int], Tensor]:
    return lambda head: matrix[:, head]


def _meeting(left: Block, right: Block) -> Iterator[Patch]:
    """The rows of the right block that read the sources of the left one."""
    for rows, sources in _squares(slice(right.start, right.stop), slice(left.start, left.stop)):
        mine = right.rows[:, :, rows.start - right.start : rows.stop - right.start]
        theirs = left.sources[:, :, sources.start - left.start : sources.stop - left.start]

        def of(head: int, mine: Tensor = mine, theirs: Tensor = theirs) -> Tensor:
            return mine[:, head] @ theirs[:, head].mT

        yield Patch(rows, sources, of)


def _block(chunk: Chunk, part: slice) -> tuple[Tensor, Block]:
    """A chunk's own matrix, and the chunk as a block: all of it with the system of its delta rule solved."""
    rows, sources, inside = chunk.rows_from_start(), chunk.sources_to_end(), chunk.matrices[0]
    decay = chunk.decay
    if not chunk.delta:
        return inside, Block(part.start, part.stop, rows, sources, decay)
    # What is written in the chunk, by the state before it and by its sources: w = (I + T)^-1 (p S_0 + M<(probe, key) value).
    T, reading, erased = chunk.strict[-1], chunk.matrices[-1], chunk.sources_to_end(len(chunk.sources) - 1)
    by_state, by_source = solve(T, chunk.rows_from_start(1)), solve(T, chunk.strict[0])
    transition = torch.diag_embed(decay.expand(*decay.shape[:-1], rows.shape[-1])) - erased.mT @ by_state
    left = sources - by_source.mT @ erased
    return inside - reading @ by_source, Block(part.start, part.stop, rows - reading @ by_state, left, transition)

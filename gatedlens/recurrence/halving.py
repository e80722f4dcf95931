"""Decays by key inside a chunk: its triangle by halves, with products of numbers that are at most 1.

    M[i, j] = sum_k row_i[k] decay_i[k] ... decay_{j+1}[k] source_j[k] ,  j <= i        (a strict row: decay_{i-1} ..., j < i)

b batch, h head, n block, s positions of a block, C of the chunk (a power of 2), k key. Blocks of 1, 2, 4, ... positions meet in
pairs: rows(right) @ sources(left) is what the right block reads of the left one. Then the two are one block:

    rows(right)   *= decay(left)          what a row sees of the state before its block
    sources(left) *= decay(right)         what is left of a source behind its block

No exponential is of a positive number and nothing is subtracted, so any decay will do, 0 too; and so in the backward pass:
the gradient of a decay is a sum over all that lies across it, right relatively however small the decay is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Meeting:
    """What a level of halving multiplied: of the pairs of blocks that met, for the way back."""

    rows: list[Tensor]  # of the right blocks: [b, h, n, s, k]
    sources: list[Tensor]  # of the left blocks
    left: Tensor  # decay of the left blocks, [b, h, n, 1, k]
    right: Tensor


@dataclass(frozen=True)
class Triangle:
    """`climb(...)`: M of each row kind with each source kind; rows seen from the chunk's start, sources from its end."""

    matrices: list[list[Tensor]]  # [row kind][source kind]: [b, h, C, C]
    rows: list[Tensor]  # [b, h, C, k]
    sources: list[Tensor]
    decay: Tensor  # of the whole chunk: [b, h, k]


def climb(
    decay: Float[Tensor, "batch head chunk key"],
    rows: list[Float[Tensor, "batch head chunk key"]],
    sources: list[Float[Tensor, "batch head chunk key"]],
    meetings: list[Meeting] | None = None,
) -> Triangle:
    """The triangle from single positions up. rows[0] reads after its position's own step, rows[1] (if any) before it: strict.

    `meetings` takes down what `descend` goes back by; without it the memory of each level is free for the next.
    """
    length = decay.shape[-2]
    # Blocks of one position: a row after its step sees its own source, a strict row sees nothing.
    own = [[(row * source).sum(-1)[..., None, None] for source in sources] for row in rows]
    matrices = [own[0], *([torch.zeros_like(m) for m in kinds] for kinds in own[1:])]
    rows = [row.unsqueeze(-2) for row in rows]
    sources = [source.unsqueeze(-2) for source in sources]
    decay = decay.unsqueeze(-2)
    rows[0] = rows[0] * decay
    size = 1
    while size < length:
        left, right = _pairs(decay)
        row_pairs, source_pairs = [_pairs(x) for x in rows], [_pairs(x) for x in sources]
        if meetings is not None:
            meetings.append(Meeting([r for _, r in row_pairs], [s for s, _ in source_pairs], left, right))
        matrices = [
            [_joined(matrices[i][j], r @ s.mT) for j, (s, _) in enumerate(source_pairs)]
            for i, (_, r) in enumerate(row_pairs)
        ]
        rows = [torch.cat([first, second * left], -2) for first, second in row_pairs]
        sources = [torch.cat([first * right, second], -2) for first, second in source_pairs]
        decay = left * right
        size *= 2

    def whole(x: Tensor) -> Tensor:
        return x.squeeze(-3)

    return Triangle(
        [[whole(m) for m in kinds] for kinds in matrices],
        [whole(x) for x in rows],
        [whole(x) for x in sources],
        decay.squeeze(-2).squeeze(-2),
    )


def descend(
    meetings: list[Meeting],
    decay: Float[Tensor, "batch head chunk key"],
    read: Float[Tensor, "batch head chunk key"],
    matrices: list[list[Tensor]],
    rows: list[Tensor],
    sources: list[Tensor],
    whole: Float[Tensor, "batch head key"],
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The adjoint of `climb`: from the gradients of what it gave (`whole`: of the chunk's decay) to those of the rows, the
    sources and the decays that it was given. The diagonals of `matrices` are left to the caller, who has them cheaper."""
    grad = whole.unsqueeze(-2)  # of the decays of the blocks: [b, h, n, k]
    rows, sources = [x.unsqueeze(-3) for x in rows], [x.unsqueeze(-3) for x in sources]
    for met in reversed(meetings):
        size = met.rows[0].shape[-2]
        blocks = [[_below(m, size) for m in kinds] for kinds in matrices]
        of_left, of_right = grad * met.right.squeeze(-2), grad * met.left.squeeze(-2)
        for row, seen in zip(rows, met.rows, strict=True):
            of_left = of_left + (row[..., size:, :] * seen).sum(-2)
        for source, seen in zip(sources, met.sources, strict=True):
            of_right = of_right + (source[..., :size, :] * seen).sum(-2)
        grad = torch.stack([of_left, of_right], -2).flatten(-3, -2)
        rows_before, sources_before = [], []
        for i, row in enumerate(rows):
            low = row[..., size:, :] * met.left
            for j, source in enumerate(met.sources):
                low = low + blocks[i][j] @ source
            rows_before.append(_apart(row[..., :size, :], low))
        for j, source in enumerate(sources):
            high = source[..., :size, :] * met.right
            for i, row in enumerate(met.rows):
                high = high + blocks[i][j].mT @ row
            sources_before.append(_apart(high, source[..., size:, :]))
        rows, sources = rows_before, sources_before
    rows, sources = [x.squeeze(-2) for x in rows], [x.squeeze(-2) for x in sources]
    grad = grad + rows[0] * read
    rows[0] = rows[0] * decay
    return rows, sources, grad


def _pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """[b, h, n, s, k] -> its left and its right blocks, [b, h, n / 2, s, k]."""
    return x[..., 0::2, :, :], x[..., 1::2, :, :]


def _apart(left: Tensor, right: Tensor) -> Tensor:
    """The way back from `_pairs`, for blocks that are halves: [b, h, n, s, k] twice -> [b, h, 2 n, s, k]."""
    return torch.stack([left, right], -3).flatten(-4, -3)


def _joined(squares: Tensor, below: Tensor) -> Tensor:
    """The squares [b, h, 2 n, s, s] of pairs of blocks, with what stands below them [b, h, n, s, s], as squares of 2 s."""
    size = below.shape[-1]
    out = below.new_zeros(*below.shape[:-2], 2 * size, 2 * size)
    out[..., :size, :size], out[..., size:, size:] = squares[..., 0::2, :, :], squares[..., 1::2, :, :]
    out[..., size:, :size] = below
    return out


def _below(matrix: Tensor, size: int) -> Tensor:
    """Of [b, h, C, C] the squares where right blocks of `size` read left ones: [b, h, n, s, s]."""
    pairs = matrix.shape[-1] // (2 * size)
    squares = matrix.unflatten(-1, (pairs, 2 * size)).unflatten(-3, (pairs, 2 * size)).diagonal(dim1=-4, dim2=-2)
    return squares.movedim(-1, -3)[..., size:, :size]

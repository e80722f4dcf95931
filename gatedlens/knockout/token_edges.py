"""Edges: which source positions are cut off from which target positions, checked to be there to cut.

    Edges(((src, dst), ...)).matrix(real, visible)       # batch dst src, True at the edges
    for src, dst in alike(matrix): ...                   # targets that lose the same sources, together: batch pos each

src and dst are positions as `positions.py` reads them. Every one of them must take part in an edge that exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from gatedlens.address.positions import Positions, listed, mask_of
from gatedlens.errors import InputError
from gatedlens.recurrence.factors import Factors


@dataclass(frozen=True)
class Edges:
    """All sources to all targets of each pair (src, dst). Not `strict`: what cannot be cut is left as it is."""

    pairs: tuple[tuple[Positions, Positions], ...]
    strict: bool = True

    def matrix(
        self, real: Bool[Tensor, "batch pos"], visible: Bool[Tensor, "dst src"]
    ) -> Bool[Tensor, "batch dst src"]:
        """`Edges(((3, -1),)).matrix(real, visible)`: True at the edges [batch, dst, src].

        real: where a token is no padding. visible: which sources the layer lets a target see at all. InputError for positions
        that do not exist and, if strict, for one that has no edge in a row.
        """
        total = torch.zeros(len(real), *visible.shape, dtype=torch.bool, device=real.device)
        for src, dst in self.pairs:
            sources, targets = mask_of(src, "src", real), mask_of(dst, "dst", real)
            edges = targets.unsqueeze(2) & sources.unsqueeze(1) & visible
            if self.strict:
                _check(sources, targets, edges, real)
            total |= edges
        return total


@dataclass(frozen=True)
class GivenEdges:
    """`GivenEdges(matrix)`: edges told one by one, [batch, dst, src]; those that a layer does not have are left as they are."""

    given: Bool[Tensor, "batch dst src"]

    def matrix(
        self, real: Bool[Tensor, "batch pos"], visible: Bool[Tensor, "dst src"]
    ) -> Bool[Tensor, "batch dst src"]:
        """As of `Edges`. Rows that have not entered a run yet have none."""
        return self.given[: len(real)].to(real.device) & real.unsqueeze(2) & real.unsqueeze(1) & visible


def _check(sources: Tensor, targets: Tensor, edges: Tensor, real: Tensor) -> None:
    """Refuse a position without an edge, in a row for which both sources and targets were given."""
    asked = sources.any(1, keepdim=True) & targets.any(1, keepdim=True)
    for what, given, has in (("src", sources, edges.any(1)), ("dst", targets, edges.any(2))):
        lone = given & asked & ~has
        if bool(lone.any()):
            row = int(lone.nonzero()[0, 0])
            others = _say(listed(targets if what == "src" else sources, real)[row])
            why = f"after the target{others}" if what == "src" else f"before the source{others}"
            raise InputError(
                f"{what}={listed(lone, real)[row][0]} has no edge in row {row}: it stands {why}, and this layer lets a target "
                "see only what the scan has read before it. There is nothing to cut."
            )


def _say(places: list[int]) -> str:
    """` 3`, or `s 3, 4`"""
    return f"{'s' * (len(places) > 1)} {', '.join(map(str, places[:6]))}{', ...' * (len(places) > 6)}"


def visible(branches: Sequence[Factors]) -> Bool[Tensor, "dst src"]:
    """Which sources a target can see through any of these branches, windows and documents aside."""
    x = branches[0].x
    everything = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
    seen = torch.zeros_like(everything)
    for factors in branches:
        ways = (everything.tril(), everything.triu())
        seen |= everything if factors.ahead else ways[int(factors.reverse)]
    return seen


def alike(
    edges: Bool[Tensor, "batch dst src"],
) -> Iterator[tuple[Bool[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]]:
    """(src, dst) masks: the targets that lose the same sources, one group at a time."""
    rows = edges.any(0).any(1).nonzero().flatten()
    if len(rows) == 0:
        return
    patterns, which = edges[:, rows].transpose(0, 1).flatten(1).unique(dim=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        src = pattern.reshape(edges.shape[0], edges.shape[2])
        dst = torch.zeros_like(src)
        dst[:, rows[which == number]] = True
        yield src, dst & src.any(1, keepdim=True)

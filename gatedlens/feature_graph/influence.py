"""Influence: how much of what reaches the logits comes through each node and edge, and what may go without much of it.

    a[t, s] = |A[t, s]| / sum over s of |A[t, s]|          A [target, source]: the edges, the bias left out
    node influence    w (a + a^2 + a^3 + ...), w [node]: the probabilities of the logits, 0 elsewhere
    edge influence    a[t, s] (w + node influence)[t]

Ameisen et al. 2025 (Circuit tracing), as circuit-tracer computes it. Sources are all n nodes; targets are some of them, and `at`
says which: most nodes, the errors and tokens, are made of nothing.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def shares(edges: Float[Tensor, "target n"]) -> Float[Tensor, "target n"]:
    """`shares(A)`: each edge as a share of all that come in, without signs; a node that none comes into has none."""
    size = edges.abs()
    total = size.sum(1, keepdim=True)
    return torch.where(total > 0, size / total, 0)


def of_nodes(a: Float[Tensor, "target n"], at: Int[Tensor, " target"], w: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """`of_nodes(shares(A), at, w)`: the influence of each node. No node reaches itself, so the sum ends."""
    step = w[at] @ a
    total = step.clone()
    while bool(step[at].any()):
        step = step[at] @ a
        total = total + step
    return total


def of_edges(
    a: Float[Tensor, "target n"], at: Int[Tensor, " target"], w: Float[Tensor, " n"]
) -> Float[Tensor, "target n"]:
    """`of_edges(shares(A), at, w)`: the influence of each edge."""
    return a * (of_nodes(a, at, w) + w)[at].unsqueeze(1)


def least(scores: Float[Tensor, ...], share: float) -> float:
    """`least(scores, 0.8)`: the score from which on the largest make up this share of the sum; 0 of none."""
    ordered = scores.flatten().sort(descending=True).values
    total = ordered.sum()
    if not bool(total > 0):
        return 0.0
    reached = torch.searchsorted(ordered.cumsum(0) / total, share)
    return float(ordered[min(int(reached), len(ordered) - 1)])


def cumulative(scores: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """`cumulative(scores)`: which share of the sum is reached with each, taken from the largest on."""
    ordered, order = scores.sort(descending=True, stable=True)
    total = ordered.sum()
    found = torch.zeros_like(scores)
    found[order] = ordered.cumsum(0) / total if bool(total > 0) else found
    return found


def pruned(
    edges: Float[Tensor, "target n"],
    at: Int[Tensor, " target"],
    w: Float[Tensor, " n"],
    nodes: float,
    among: float,
    stay: Bool[Tensor, " n"],
) -> tuple[Bool[Tensor, " n"], Bool[Tensor, "target n"]]:
    """`kept, joined = pruned(A, at, w, 0.8, 0.98, stay)`: the nodes that make up 0.8 of the influence of all nodes, and of the
    edges between them those that make up 0.98.

    stay: the nodes that are kept whatever they do (tokens, logits). What is left without an edge that goes out, and a target
    without one that comes in, goes too.
    """
    influence = of_nodes(shares(edges), at, w)
    kept = (influence >= least(influence, nodes)) & (influence > 0) | stay
    between = edges * kept[at].unsqueeze(1) * kept
    scores = of_edges(shares(between), at, w)
    joined = (scores >= least(scores, among)) & (scores > 0)
    before = None
    while before is None or bool((before != kept).any()):
        before = kept.clone()
        kept &= stay | joined.any(0)
        kept[at] &= stay[at] | joined.any(1)
        joined &= kept[at].unsqueeze(1) & kept
    return kept, joined


def replacement(influence: Float[Tensor, " n"], tokens: Bool[Tensor, " n"], errors: Bool[Tensor, " n"]) -> float:
    """`replacement(influence, tokens, errors)`: of what ends in tokens and errors, the share that ends in tokens."""
    told, left = float(influence[tokens].sum()), float(influence[errors].sum())
    return told / (told + left) if told + left > 0 else 1.0


def completeness(
    a: Float[Tensor, "target n"],
    at: Int[Tensor, " target"],
    influence: Float[Tensor, " n"],
    w: Float[Tensor, " n"],
    errors: Bool[Tensor, " n"],
) -> float:
    """`completeness(a, at, influence, w, errors)`: the share of the edges that come from no error, a mean over nodes by what
    they give to the logits."""
    given = influence + w
    return 1 - float((a[:, errors].sum(1) * given[at]).sum() / given.sum())

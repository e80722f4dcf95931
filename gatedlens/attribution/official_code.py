"""Official: what the papers' own code does, step by step, where it differs from their formulas.

l layer, v_l [batch src] one row for each layer, q the rollout's row, s the gradient by position.

    rows      only the row of the class token is computed, the sum of both directions, neither halved
    s_l       relu of the gradient at the layer's output, its largest channel, min-maxed over positions
    hidden    v_l = channel mean of the min-maxed relu of the row, times s_l          (HA, without the own column, and
              without the class token's own step: see below)
    unified   v_l = min-max of (channel mean of the relu of the row, times s_l)       (UIA, with it, of both directions)
    rollout   v_l is added to *every* row of I, rows are normalised, matrices multiplied, and the class token's row read

Since each matrix is (I + 1 v^T) / (1 + sum v), the product has a closed form: from the last layer to the first
q <- (q + v_l) / (1 + sum v_l), beginning with 0, is its row without what I leaves on the diagonal. Layers before 15 of 24
take no part: of a model with two layers the last is left, whose gradient stands at the class token alone, so that nothing
remains; give `start_layer=0` there.

HA's code has no decay of the class token's own step: source j reaches the class token i through the steps j + 1 to i - 1,
where the recurrence, and the paper, go to i. Each state decays at its own rate, so this is no factor of the row and no
detail: it can turn a rollout's order round (on a random ViM the rank correlation of the two maps was -0.77). It is reproduced
here, since the published numbers hang on it; mode="paper" has the matrix of the formula. Of a delta rule, which their code does
not know, it is the same row: what the state before the class token's step holds, read by the class token; so it has neither the
decay nor the erase of that step.

HA is HiddenMambaAttn (arXiv 2403.01590), UIA UnifiedImplicitAttnRepr (arXiv 2405.16504). Min-max is over a row of the
batch, as their batches of one are; a constant map becomes 0 (theirs divides 0 by 0).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gatedlens.attention.layer import ImplicitAttention
from gatedlens.attribution.channels import rows
from gatedlens.result.rounding import noise

START = (15, 24)  # the first layer that takes part, of so many


@dataclass(frozen=True)
class Steps:
    """own: the row keeps its own column, and the decay of its own step; attention, product: what is min-maxed."""

    own: bool
    attention: bool
    product: bool


HIDDEN, UNIFIED = Steps(own=False, attention=True, product=False), Steps(own=True, attention=False, product=True)


def steps(factors: object) -> Steps:
    """HA's steps for its matrix, UIA's for every other."""
    return HIDDEN if factors == "hidden" else UNIFIED


def start(n_layers: int) -> int:
    return n_layers * START[0] // START[1]


def official_rows(
    attention: ImplicitAttention, read: Float[Tensor, "batch pos"], own: Bool[Tensor, "batch pos"], steps: Steps
) -> Float[Tensor, "batch src channel"]:
    """The row that is read, the directions as they are (not halved)."""
    branches = tuple(replace(factors, scale=1.0) for factors in attention.branches)
    if steps.own:
        return rows(replace(attention, branches=branches), read)
    packed = attention.padding.pack(own.unsqueeze(-1)).squeeze(-1)
    bare = (
        f if f.scan is None else replace(f, scan=f.scan.undecayed(packed.flip(1) if f.reverse else packed))
        for f in branches
    )
    return rows(replace(attention, branches=tuple(bare)), read).masked_fill(own.unsqueeze(-1), 0)


def minmax(
    x: Float[Tensor, "batch pos *rest"], real: Bool[Tensor, "batch pos"] | None
) -> Float[Tensor, "batch pos *rest"]:
    """(x - min) / (max - min) over all but the batch, padding left out; 0 where a row is constant, but for rounding."""
    hidden = torch.zeros_like(x, dtype=torch.bool)
    if real is not None:
        hidden = hidden | ~real.reshape(*real.shape, *[1] * (x.ndim - 2))
    dims = tuple(range(1, x.ndim))
    low = x.masked_fill(hidden, torch.inf).amin(dims, keepdim=True)
    high = x.masked_fill(hidden, -torch.inf).amax(dims, keepdim=True)
    constant = noise(high - low, torch.maximum(high.abs(), low.abs()), x.dtype)
    return ((x - low) / (high - low).masked_fill(constant, 1)).masked_fill(hidden | constant, 0)


def gradient_weight(
    gradient: Float[Tensor, "batch pos d_model"], real: Bool[Tensor, "batch pos"] | None
) -> Float[Tensor, "batch pos"]:
    """s: the largest positive entry of each position's gradient, min-maxed over positions."""
    return minmax(gradient.clamp(min=0).amax(-1), real)


def weighted_row(
    row: Float[Tensor, "batch src channel"],
    gradient: Float[Tensor, "batch src d_model"],
    steps: Steps,
    real: Bool[Tensor, "batch pos"] | None,
) -> Float[Tensor, "batch src"]:
    """v of one layer."""
    row = row.clamp(min=0)
    row = minmax(row, real) if steps.attention else row
    product = row.mean(-1) * gradient_weight(gradient, real)
    return minmax(product, real) if steps.product else product


def broadcast_rollout(rows: list[Float[Tensor, "batch src"]]) -> Float[Tensor, "batch src"]:
    """q of the rows v_l of ascending layers."""
    q = torch.zeros_like(rows[0])
    for v in reversed(rows):
        q = (q + v) / (1 + v.sum(1, keepdim=True))
    return q

"""Rounding: what is noise in a computed number, and orders that noise does not move.

    total(terms)                  # their sum; 0 where it is no more than the rounding of such terms
    moved(a, b)                   # where the vectors of a differ from those of b by more than rounding
    order(scores)                 # places, the highest first
    levels(scores)                # what it compares: scores in whole steps of `STEP` of the largest
    figures(values)               # each to five figures of its own

A sum of terms of any sign is about the root of the sum of their squares, and its rounding some eps of that root. What lies
below eps^(3/4) of it is noise and counts as 0: 2e-12 in float64, 6e-6 in float32, 3 % in bfloat16.

Scores that are computed in another batch, after a resume or on another processor differ in their last digits. An order is
that of their levels, and what has one level stays in the order of positions, so that such digits decide nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

NOISE = 0.75  # the power of eps
BITS = 17  # five figures. A power of two: half a step is then no simple fraction that scores are likely to be
STEP = 2.0**-BITS  # of the largest score


def noise(value: Float[Tensor, "*shape"], size: Float[Tensor, "*shape"], dtype: torch.dtype) -> Bool[Tensor, "*shape"]:
    """Where a number is rounding alone, `size` being that of what it was made of, in `dtype`."""
    return value.abs() <= torch.finfo(dtype).eps ** NOISE * size


def total(terms: Float[Tensor, "*shape term"], dtype: torch.dtype | None = None) -> Float[Tensor, "*shape"]:
    """The sum over the last axis; 0 where it is noise. dtype: in which the terms were computed, if it is not theirs."""
    found = terms.sum(-1)
    size = torch.linalg.vector_norm(terms, dim=-1)
    return found.masked_fill(noise(found, size, terms.dtype if dtype is None else dtype), 0)


def moved(a: Float[Tensor, "*shape entry"], b: Float[Tensor, "*any entry"]) -> Bool[Tensor, "*shape"]:
    """Where the vectors of a are not those of b, but for rounding."""
    size = torch.linalg.vector_norm(a, dim=-1)
    return ~noise(torch.linalg.vector_norm(a - b, dim=-1), size, a.dtype)


def levels(
    scores: Shaped[Tensor, "*shape place"], among: Bool[Tensor, "*shape place"] | None = None
) -> Float[Tensor, "*shape place"]:
    """Scores over the largest size of their row (among some places), in whole steps of `STEP`, 8e-6; NaN stays NaN."""
    exact = scores.detach().double()
    if exact.shape[-1] == 0:
        return exact
    counted = exact.isfinite() if among is None else exact.isfinite() & among
    largest = exact.abs().masked_fill(~counted, 0).amax(-1, keepdim=True)
    return (exact / largest.masked_fill(largest == 0, 1) / STEP).round()


def order(
    scores: Shaped[Tensor, "*shape place"] | Sequence[float], among: Bool[Tensor, "*shape place"] | None = None
) -> Int[Tensor, "*shape place"]:
    """The places of each row by their scores, the highest first, of equal levels the first first; those that are not
    `among` the counted come last, NaN behind all others."""
    found = levels(torch.as_tensor(scores), among)
    found = found if among is None else found.masked_fill(~among, -torch.inf)
    return (-found).argsort(dim=-1, stable=True)  # ascending, since descending NaN would be first


def figures(values: Shaped[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Each value to `BITS` binary digits of its own, exactly; what is not finite stays."""
    mantissa, exponent = torch.frexp(values.detach().double())
    return (mantissa * 2**BITS).round() / 2**BITS * 2.0 ** exponent.double()

"""Truth: where the answer is known to stand, does a method put it there?

    found = gl.evaluation.located(scores, truth)
    found.rank            # sample: the place of the best truth in the order of the scores; 0 is the first
    found.mass            # sample: its share of the positive scores
    found.hit             # sample: 1 where the strongest place is a truth

truth: booleans of the scores' shape, True where the answer stands (of `gl.tasks.recall`: `answer_pos`; of an image: the
object's mask). free: the places that take part (all if None). Of n places chance gives rank (n - 1) / 2 and mass 1 / n.
mass is the relevance mass accuracy of Arras et al. 2022 (arXiv 2003.07258), hit the pointing game of Zhang et al. 2016.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gatedlens.errors import InputError
from gatedlens.evaluation.case import Scores, numbers_of
from gatedlens.result.rounding import order


@dataclass(frozen=True)
class Located:
    """See the head of this file."""

    rank: Float[Tensor, " sample"]
    mass: Float[Tensor, " sample"]
    hit: Float[Tensor, " sample"]


def located(
    scores: Scores, truth: Bool[Tensor, "sample ..."], free: Bool[Tensor, "sample ..."] | None = None
) -> Located:
    """`gl.evaluation.located(scores, truth)`: rank, mass and hit, sample by sample. Where no score is positive, the mass
    is 0. Scores are compared in steps of a
    130,000th of the largest that takes part; of equal ones the first is first.
    """
    values = numbers_of(scores).cpu()
    truth = truth.cpu()
    part = torch.ones_like(truth) if free is None else free.cpu()
    if values.shape != truth.shape or part.shape != truth.shape:
        raise InputError(f"The scores have shape {list(values.shape)} and the truth {list(truth.shape)}.")
    if not bool((truth & part).flatten(1).any(1).all()):
        raise InputError("A sample has no place where the answer stands (among those that take part).")
    values, truth, part = values.flatten(1), (truth & part).flatten(1), part.flatten(1)
    rank = truth.gather(1, order(values, part)).double().argmax(1).double()
    positive = values.clamp(min=0) * part
    total = positive.sum(1)
    mass = (positive * truth).sum(1) / total.masked_fill(total == 0, 1)
    return Located(rank, mass, (rank == 0).double())

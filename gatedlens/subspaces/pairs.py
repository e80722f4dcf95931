"""Pairs: bases and sources with their answers, some to fit a subspace to and some to score it on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from gatedlens.errors import InputError
from gatedlens.metrics import Tokens
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Batch, Input
from gatedlens.runs import inputs
from gatedlens.subspaces.alignment import answers_of


@dataclass(frozen=True)
class Pairs:
    """Pairs of base and source with their answers, some to fit to (`train`) and some to score on (`test`), by number."""

    base: Batch
    source: Batch
    answers: Int[Tensor, " pair"]
    train: Int[Tensor, " some"]
    test: Int[Tensor, " some"]

    @staticmethod
    def of(model: HookedModel, base: Input, source: Input, answers: Tokens, held_out: float, seed: int) -> Pairs:
        ready, other = inputs.ready(model, base), inputs.ready(model, source)
        rows = len(ready.value)
        if len(other.value) != rows:
            raise InputError(f"There are {rows} bases and {len(other.value)} sources: give a source for each base.")
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
        n = round(rows * held_out)
        if not 0 < n < rows:
            raise InputError(
                f"held_out={held_out} of {rows} pairs leaves {rows - n} to fit to and {n} to score on: give more pairs."
            )
        return Pairs(ready, other, answers_of(answers, rows, model), order[n:].sort().values, order[:n].sort().values)

    def shuffled(self, seed: int) -> Pairs:
        """The same with the answers in another order."""
        order = torch.randperm(len(self.answers), generator=torch.Generator().manual_seed(seed + 1))
        return replace(self, answers=self.answers[order.to(self.answers.device)])

"""Chance: random scores, the level that every method has to beat.

gl.attribution.random(model, "The cat sat on the mat", seed=0)
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor
from tqdm.auto import tqdm

from gatedlens.attribution.empty_input import Baseline, baseline_of
from gatedlens.attribution.question import Question
from gatedlens.attribution.scores import Attribution
from gatedlens.attribution.target import Asked
from gatedlens.errors import InputError
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Input
from gatedlens.options import checked
from gatedlens.result.rounding import total

# Attribution by perturbation: put "nothing" in the place of each token or patch, and see what that costs.
#
#     gl.attribution.occlusion(model, "The cat sat on the mat", baseline="<unk>")
#
# scores[j] = number(x) - number(x with the baseline at j): exact, model-agnostic, and as many forwards as there are places.
# A place that holds the baseline already, and a loss that is rounding of the two numbers, score 0.


@checked
@torch.no_grad()
def occlusion(
    model: HookedModel,
    input: Input,
    target: Asked = None,
    *,
    baseline: Baseline = None,
    batch_size: int = 32,
    progress: bool = True,
    attention_mask: Tensor | None = None,
) -> Attribution:
    """`gl.attribution.occlusion(model, text)`: what the number loses when a place holds the baseline (see
    `empty_input.py`); `batch_size` inputs a forward.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}: give at least 1.")
    question = Question.of(model, input, target, attention_mask)
    nothing, said = baseline_of(question, baseline)
    rows, length = question.features.shape[:2]
    width = max(1, batch_size // rows)
    lost = []
    for start in tqdm(range(0, length, width), disable=not progress, desc="occlusion", unit="batch"):
        places = range(start, min(start + width, length))
        without = question.features.repeat(len(places), 1, 1, 1).unflatten(0, (len(places), -1)).squeeze(1)
        for copy, place in zip(without, places, strict=True):
            copy[:, place] = nothing[:, place]
        left = question.measure(without.flatten(0, 1)).unflatten(0, (len(places), rows))
        lost.append(total(torch.stack([question.explained.expand_as(left), -left], -1), question.logits.dtype))
    there_already = (question.features == nothing).all(-1)
    scores = torch.cat(lost).T.masked_fill(there_already, 0)
    return question.answer(scores, "occlusion", "loss under occlusion", baseline=said)


@checked
def random(
    model: HookedModel, input: Input, target: Asked = None, *, seed: int = 0, attention_mask: Tensor | None = None
) -> Attribution:
    """`gl.attribution.random(model, text, seed=0)`: uniform in [0, 1), drawn from the seed and the row's own content: the
    batch that it is in does not matter.
    """
    question = Question.of(model, input, target, attention_mask)
    scores = []
    for row in question.rows():
        content = zlib.crc32(row.batch.value.cpu().double().numpy().tobytes(), seed)
        generator = torch.Generator().manual_seed(content)
        scores.append(torch.rand(row.features.shape[:2], generator=generator, dtype=torch.float64).to(row.features))
    return question.answer(question.spread(scores), "random", "chance", seed=seed)

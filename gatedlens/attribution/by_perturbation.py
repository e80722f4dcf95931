"""Attribution without gradients or attention: occlusion, and random scores, the level that every method has to beat.

    gl.attribution.occlusion(model, "The cat sat on the mat", baseline="<unk>")      # what the number loses without a token
    gl.attribution.random(model, "The cat sat on the mat", seed=0)                   # uniform in [0, 1)

Occlusion puts "nothing" (`empty_input.py`) in the place of each token or patch: scores[j] = number(x) - number(x with the
baseline at j). That is exact, works with any model, and costs as many forwards as there are places.
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
    """`gl.attribution.occlusion(model, text, baseline="<unk>")`: scores[j] = number(x) - number(x with the baseline at j).

    baseline: what stands for "nothing", see `empty_input.py`. batch_size: how many inputs one forward holds. A place that
    holds the baseline already, and a loss that is rounding of the two numbers, score 0.

    InputError for a batch_size below 1, and for a baseline or a target that there is not.
    Source: Zeiler and Fergus 2014 (arXiv 1311.2901), with one token or patch at a time.
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
    """`gl.attribution.random(model, text, seed=0)`: scores that know nothing, uniform in [0, 1).

    They are drawn from the seed and the row's own content, so a row's scores do not depend on the batch that it is in.
    """
    question = Question.of(model, input, target, attention_mask)
    scores = []
    for row in question.rows():
        content = zlib.crc32(row.batch.value.cpu().double().numpy().tobytes(), seed)
        generator = torch.Generator().manual_seed(content)
        scores.append(torch.rand(row.features.shape[:2], generator=generator, dtype=torch.float64).to(row.features))
    return question.answer(question.spread(scores), "random", "chance", seed=seed)

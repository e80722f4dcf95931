"""Chance: random scores, the level that every method has to beat.

gl.attribution.random(model, "The cat sat on the mat", seed=0)
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from gatedlens.attribution.question import Question
from gatedlens.attribution.scores import Attribution
from gatedlens.options import checked


@checked
def random(
    model: Any, input: Any, target: Any = None, *, seed: int = 0, attention_mask: Tensor | None = None
) -> Attribution:
    """Uniform in [0, 1), drawn from the seed and the row's own content: the batch that it is in does not matter."""
    question = Question.of(model, input, target, attention_mask)
    scores = []
    for row in question.rows():
        content = zlib.crc32(row.batch.value.cpu().double().numpy().tobytes(), seed)
        generator = torch.Generator().manual_seed(content)
        scores.append(torch.rand(row.features.shape[:2], generator=generator, dtype=torch.float64).to(row.features))
    return question.answer(question.spread(scores), "random", "chance", seed=seed)

"""Relevance: layer-wise relevance propagation for gated-linear models (MambaLRP), by gradients under rules.

    gl.attribution.lrp(model, "The cat sat on the mat")
    gl.attribution.lrp(model, tokens, target=(7, 3)).facts["remainder"]     # what biases got, one number a row

scores[j] = sum over d of x_j[d] * (d number / d x_j[d]) with the gradient of `relevance_rules.py`, x the embedded tokens
(or an image's pixels, through their patches). Relevance is conserved: scores and remainder sum to the number that is
explained, where the remainder is what additive constants get (biases; for images also positions, the class token). For a
logit or a difference of logits; another metric's relevance sums to gradient x logits.

Seen from a layer's implicit attention A: what x passes on through the scan is x . A^T g / 2, g the gradient at the layer's
o, since half of it goes to the gate (x . A^T g where the gate is a sigmoid, as in RWKV, and in attention layers).

Jafari et al. 2024 (MambaLRP, arXiv 2406.07592), extended to every architecture. What gates get is a choice, `gates`: see
`relevance_rules.py`.
"""

from __future__ import annotations

from torch import Tensor

from gatedlens.attribution.question import Question
from gatedlens.attribution.scores import Attribution
from gatedlens.attribution.target import Asked
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Input
from gatedlens.options import checked
from gatedlens.result.rounding import total
from gatedlens.runs.relevance_rules import Rules


@checked
def lrp(
    model: HookedModel,
    input: Input,
    target: Asked = None,
    *,
    gates: str = "content",
    attention_mask: Tensor | None = None,
) -> Attribution:
    """`gl.attribution.lrp(model, text)`: the relevance of each token or patch: see the head of this file. One forward, one
    backward.

    gates: "content" gives half of a gated product to a gate that has content (SiLU, GELU: Mamba, ViM, Griffin) and none to
    one that only weighs (sigmoid: RWKV); "half" gives every gate half, "none" gives no gate any. facts["gates"] says which.
    """
    question = Question.of(model, input, target, attention_mask)
    with Rules.of(model, gates).on(model):
        gradient = question.gradient()
    scores = total(question.content * gradient).double()
    if question.real is not None:
        scores = scores.masked_fill(~question.real, 0)
    remainder = question.explained.double() - scores.sum(1)
    scores = scores.to(gradient.dtype)
    return question.answer(scores, "lrp", "relevance", gates=gates, remainder=remainder.tolist())

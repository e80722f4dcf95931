"""Attribution by implicit attention: raw, rolled out through the layers, and weighted by gradients.

    gl.attribution.raw_attention(model, text)                     # the row that is read, mean over channels and layers
    gl.attribution.rollout(model, text, start_layer=1)            # the row of (I + E A_last) ... (I + E A_first)
    gl.attribution.gradient_attention(model, text, target=7)      # with relu(E grad y_l * E A_l) in place of E A_l
    gl.attribution.gradient_attention(model, text, mode="official")      # as the papers' code does

A_l the implicit attention of layer l, E the mean over channels, y_l the mixer's output after its projection, its gradient
that of the explained number. The row is that of the position that the prediction is read from: the last real token, the
class token. HA (arXiv 2403.01590), sec. 3.4; UIA (arXiv 2405.16504), sec. 3.4. The options that all three have:
`attention_options.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from gatedlens.address.entries import Index
from gatedlens.address.layers import Layers
from gatedlens.attention.layer import ImplicitAttention
from gatedlens.attention.stack import Step
from gatedlens.attribution import official_code
from gatedlens.attribution.attention_options import AttentionReader, Options, through
from gatedlens.attribution.question import Question
from gatedlens.attribution.scores import Attribution
from gatedlens.attribution.target import Asked
from gatedlens.errors import InputError
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Input
from gatedlens.options import checked
from gatedlens.result.rounding import total

WEIGHTED = ("dst", "src")
CENTRED = "LN"  # the normalization_type of norms that take the mean away


@checked
def raw_attention(
    model: HookedModel,
    input: Input,
    target: Asked = None,
    *,
    layers: Layers = None,
    start_layer: Layers = None,
    factors: str | Sequence[str] = "unified",
    channels: str = "mean",
    sign: str = "signed",
    own: bool | None = None,
    mode: str = "paper",
    heads: Index | None = None,
    attention_mask: Tensor | None = None,
) -> Attribution:
    """`gl.attribution.raw_attention(model, text)`: mean over layers of the row that is read, E A_l[i, :], own column kept.

    The target plays no part in the scores. layers, start_layer, factors, channels, sign, own, mode, heads: see
    `attention_options.py`. mode="official": each layer's row min-maxed over channels and positions, negative means cut off,
    without the own column, layers from 15/24 of the depth on.

    InputError for an option or a target that there is not, or one that mode="official" would ignore.
    Source: HA (arXiv 2403.01590), sec. 3.4.
    """
    question = Question.of(model, input, target, attention_mask)
    options = Options(layers, start_layer, factors, channels, sign, own, mode, heads)
    reader = AttentionReader.of(question, options, keeps_own=True)
    if reader.steps is None:
        rows = [reader.row(A) for A in reader.stack]
    else:
        rows = [official_code.minmax(reader.official_row(A), question.real).mean(-1) for A in reader.stack]
    return reader.answer(torch.stack(rows).mean(0), "raw_attention", "attention")


@checked
def rollout(
    model: HookedModel,
    input: Input,
    target: Asked = None,
    *,
    layers: Layers = None,
    start_layer: Layers = None,
    factors: str | Sequence[str] = "unified",
    channels: str = "mean",
    sign: str = "signed",
    own: bool | None = None,
    mode: str = "paper",
    heads: Index | None = None,
    attention_mask: Tensor | None = None,
) -> Attribution:
    """`gl.attribution.rollout(model, text, start_layer=1)`: the row that is read of (I + E A_last) ... (I + E A_first).

    Signed, not normalised, without its own column; the target plays no part in the scores. The signed mean costs no matrix:
    the row goes back through the layers, q <- q + E A_l^T q. layers, start_layer, factors, channels, sign, own, mode, heads: see
    `attention_options.py`. mode="official": the rollout of one broadcast row a layer (see `official_code.py`), negative
    scores cut off.

    InputError for an option or a target that there is not, or one that mode="official" would ignore.
    Source: HA (arXiv 2403.01590), sec. 3.4; Abnar and Zuidema 2020 (arXiv 2005.00928).
    """
    question = Question.of(model, input, target, attention_mask)
    options = Options(layers, start_layer, factors, channels, sign, own, mode, heads)
    reader = AttentionReader.of(question, options, keeps_own=False)
    if reader.steps is None:
        q = reader.read
        for step in reversed(list(reader.stack.steps())):
            q = went_back(q, step, reader.back)
    else:
        q = official_code.broadcast_rollout([reader.official_row(A).mean(-1) for A in reader.stack])
    return reader.answer(q, "rollout", "attention rollout")


@checked
def gradient_attention(
    model: HookedModel,
    input: Input,
    target: Asked = None,
    *,
    layers: Layers = None,
    start_layer: Layers = None,
    factors: str | Sequence[str] = "unified",
    channels: str = "mean",
    sign: str = "signed",
    weighted: str | None = None,
    own: bool | None = None,
    mode: str = "paper",
    heads: Index | None = None,
    attention_mask: Tensor | None = None,
) -> Attribution:
    """`gl.attribution.gradient_attention(model, text, target=7)`: the row that is read of the product over layers of
    I + relu(E grad y_l * E A_l), without its own column.

    layers, start_layer, factors, channels, sign, own, mode, heads: see `attention_options.py`.
    weighted: which end of A_l[dst, src] the gradient stands at. The formula leaves it open. "dst" (the default): what
    y_l[dst] does to the target times what src does to y_l[dst]; where the mean gradient at the position that is read is
    negative, relu leaves its row only negative attention. "src": as the papers' code has it. mode="official": that code.

    Under LayerNorms (RWKV-4) the formula says nothing: they take the mean of the stream away, so the mean gradient over
    d_model is 0. What is computed of it is rounding, which counts as 0 (`rounding.py`): every score is 0, and a warning says
    so. mode="official" takes the largest channel instead.

    InputError for an option or a target that there is not, or one that mode="official" would ignore.
    Source: UIA (arXiv 2405.16504), sec. 3.4; HA (arXiv 2403.01590), sec. 3.4.
    """
    if weighted not in (None, *WEIGHTED):
        raise InputError(f"weighted={weighted!r}: the gradient stands at 'dst' or 'src'.")
    question = Question.of(model, input, target, attention_mask)
    options = Options(layers, start_layer, factors, channels, sign, own, mode, heads)
    reader = AttentionReader.of(question, options, keeps_own=False, weighted=weighted)
    end = "src" if mode == "official" else weighted or "dst"
    names = [f"blocks.{layer}.{model.blocks[layer].written(place)}" for layer, place in reader.stack.mixers]
    found = question.gradients(*names)
    gradients = [found[name].to(reader.read.dtype) for name in names]
    if reader.steps is None:
        means = [total(g, found[name].dtype) / g.shape[-1] for name, g in zip(names, gradients, strict=True)]
        _tell_if_the_mean_is_zero(question, means)
        by_mixer = dict(zip(reader.stack.mixers, means, strict=True))

        def weighing(q: Float[Tensor, "batch dst"], A: ImplicitAttention) -> Float[Tensor, "batch src"]:
            weight = by_mixer[A.layer, A.mixer.place].unsqueeze(2 if end == "dst" else 1)
            return through(q, (weight * reader.matrix(A)).clamp(min=0))

        q = reader.read
        for step in reversed(list(reader.stack.steps())):
            q = went_back(q, step, weighing)
    else:
        q = official_code.broadcast_rollout(
            [
                official_code.weighted_row(reader.official_row(A), g, reader.steps, question.real)
                for g, A in zip(gradients, reader.stack, strict=True)
            ]
        )
    return reader.answer(q, "gradient_attention", "gradient-weighted attention", weighted=end)


def went_back(
    q: Float[Tensor, "batch dst"],
    step: Step,
    back: Callable[[Float[Tensor, "batch dst"], ImplicitAttention], Float[Tensor, "batch src"]],
) -> Float[Tensor, "batch src"]:
    """q^T (I + what the step brings), `back(q, A)` q^T of the matrix of A; see `AttentionStack.rollout`."""
    brought = torch.stack([back(q, A) for A in step.beside]).sum(0) if step.beside else q
    for A in reversed(step.inside):
        brought = brought + back(brought, A)
    return q + brought if step.beside else brought


def _tell_if_the_mean_is_zero(question: Question, means: list[Tensor]) -> None:
    """A warning where every layer's mean gradient is 0, so that the formula weighs everything by 0."""
    cfg = question.model.cfg
    if not any(bool(mean.any()) for mean in means):
        why = "has LayerNorms, under which" if cfg.normalization_type == CENTRED else "answers so that"
        warnings.warn(
            f"gradient_attention: {cfg.model_name} {why} the mean gradient of a layer's output is 0 but for rounding errors: "
            'the formula weighs everything by 0. mode="official" takes the largest channel instead.',
            stacklevel=3,
        )

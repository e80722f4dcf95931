"""Attribution by implicit attention: raw, rolled out through the layers, and weighted by gradients.

    gl.attribution.raw_attention(model, text)                     # the row that is read, mean over channels and layers
    gl.attribution.rollout(model, text, start_layer=1)            # the row of (I + E A_last) ... (I + E A_first)
    gl.attribution.gradient_attention(model, text, target=7)      # with relu(E grad y_l * E A_l) in place of E A_l
    gl.attribution.gradient_attention(model, text, mode="official")      # as the papers' code does

A_l the implicit attention of layer l, E the mean over channels, y_l the mixer's output after its projection, its gradient
that of the explained number. The row is that of the position that the prediction is read from: the last real token, the
class token. HA (arXiv 2403.01590), sec. 3.4; UIA (arXiv 2405.16504), sec. 3.4.

Options of all three: `layers` (a slice or a sequence; None: all) or `start_layer`; `factors` (see `operators.py`); `channels`
and `sign` in place of the signed mean (see `channels.py`; not with mode="official", which has its own); `own`: whether
the row's own column is kept. It holds what the residual stream carries straight through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gatedlens.attribution import channels as channels_
from gatedlens.attribution import official
from gatedlens.attribution.attribution import Attribution
from gatedlens.attribution.operators import operators
from gatedlens.attribution.question import Question
from gatedlens.errors import InputError, did_you_mean
from gatedlens.stack import AttentionStack

MODES = ("paper", "official")
WEIGHTED = ("dst", "src")


def raw_attention(
    model: Any,
    input: Any,
    target: Any = None,
    *,
    layers: Any = None,
    start_layer: int | None = None,
    factors: str | Sequence[str] = "unified",
    channels: str = "mean",
    sign: str = "signed",
    own: bool = True,
    mode: str = "paper",
    attention_mask: Tensor | None = None,
) -> Attribution:
    """Mean over layers of the row that is read, E A_l[i, :]. The target plays no part in it.

    mode="official": each layer's row min-maxed over channels and positions, negative means cut off, without the own
    column, layers from 15/24 of the depth on.
    """
    question = Question.of(model, input, target, attention_mask)
    stack = _stack(question, layers, start_layer, factors, channels, sign, mode)
    if mode == "official":
        steps = official.steps(factors)
        rows = [official.official_rows(A, question.read, question.own, steps.own) for A in stack]
        scores = torch.stack([official.minmax(row, question.real).mean(-1) for row in rows]).mean(0).clamp(min=0)
        scores = _without_own(question, scores)
    else:
        scores = torch.stack([channels_.row(A, question.read, channels, sign) for A in stack]).mean(0)
        scores = scores if own else _without_own(question, scores)
    facts = {
        "factors": factors if isinstance(factors, str) else list(factors),
        "channels": channels,
        "sign": sign,
        "mode": mode,
    }
    return question.answer(scores, "raw_attention", "attention", stack.layers, **facts)


def rollout(
    model: Any,
    input: Any,
    target: Any = None,
    *,
    layers: Any = None,
    start_layer: int | None = None,
    factors: str | Sequence[str] = "unified",
    channels: str = "mean",
    sign: str = "signed",
    own: bool = False,
    mode: str = "paper",
    attention_mask: Tensor | None = None,
) -> Attribution:
    """The row that is read of (I + E A_last) ... (I + E A_first), signed and not normalised. The target plays no part.

    mode="official": the rollout of one broadcast row a layer (see `official.py`), negative scores cut off. The signed
    mean costs no matrix: the row goes back through the layers, q <- q + E A_l^T q. Abnar and Zuidema 2020.
    """
    question = Question.of(model, input, target, attention_mask)
    stack = _stack(question, layers, start_layer, factors, channels, sign, mode)
    if mode == "official":
        steps = official.steps(factors)
        rows = [official.official_rows(A, question.read, question.own, steps.own).mean(-1) for A in stack]
        scores = _without_own(question, official.broadcast_rollout(rows).clamp(min=0))
    else:
        q = question.read.to(question.features.dtype)
        for A in reversed(list(stack)):
            signed_mean = channels == "mean" and sign == "signed"
            q = q + (channels_.row(A, q) if signed_mean else _through(q, channels_.matrix(A, channels, sign)))
        scores = q if own else _without_own(question, q)
    facts = {
        "factors": factors if isinstance(factors, str) else list(factors),
        "channels": channels,
        "sign": sign,
        "mode": mode,
    }
    return question.answer(scores, "rollout", "attention rollout", stack.layers, **facts)


def gradient_attention(
    model: Any,
    input: Any,
    target: Any = None,
    *,
    layers: Any = None,
    start_layer: int | None = None,
    factors: str | Sequence[str] = "unified",
    channels: str = "mean",
    sign: str = "signed",
    weighted: str = "dst",
    own: bool = False,
    mode: str = "paper",
    attention_mask: Tensor | None = None,
) -> Attribution:
    """The row that is read of the product over layers of I + relu(E grad y_l * E A_l): Mamba-Attribution.

    weighted: which end of A_l[dst, src] the gradient stands at. The formula leaves it open: "dst" is what y_l[dst] does
    to the target times what src does to y_l[dst]; "src" is what the papers' code does. mode="official": that code. Where
    the mean gradient at the position that is read is negative, relu leaves its row in that layer only negative attention.
    """
    if weighted not in WEIGHTED:
        raise InputError(f"weighted={weighted!r}: the gradient stands at 'dst' or 'src'.")
    question = Question.of(model, input, target, attention_mask)
    stack = _stack(question, layers, start_layer, factors, channels, sign, mode)
    names = [f"blocks.{layer}.hook_mixer_out" for layer in stack.layers]
    gradients = question.gradients(*names)
    if mode == "official":
        steps, rows = official.steps(factors), []
        for name, A in zip(names, stack, strict=True):
            s = official.gradient_weight(gradients[name].to(A.dtype), question.real)
            row = official.official_rows(A, question.read, question.own, steps.own)
            rows.append(official.weighted_row(row, s, steps, question.real))
        scores = _without_own(question, official.broadcast_rollout(rows).clamp(min=0))
    else:
        q = question.read.to(question.features.dtype)
        for name, A in reversed(list(zip(names, stack, strict=True))):
            g = gradients[name].to(A.dtype).mean(-1).unsqueeze(2 if weighted == "dst" else 1)
            q = q + _through(q, (g * channels_.matrix(A, channels, sign)).clamp(min=0))
        scores = q if own else _without_own(question, q)
    facts = {
        "factors": factors if isinstance(factors, str) else list(factors),
        "channels": channels,
        "sign": sign,
        "mode": mode,
        "weighted": weighted,
    }
    return question.answer(scores, "gradient_attention", "gradient-weighted attention", stack.layers, **facts)


def _stack(
    question: Question, layers: Any, start_layer: int | None, factors: Any, channels: str, sign: str, mode: str
) -> AttentionStack:
    """The layers' operators, every option checked."""
    if mode not in MODES:
        raise InputError(f"mode={mode!r}: it is 'paper' or 'official'.{did_you_mean(mode, MODES)}")
    channels_.check(channels, sign)
    if mode == "official" and (channels, sign) != ("mean", "signed"):
        raise InputError(
            f"mode='official' has its own steps: channels={channels!r} and sign={sign!r} would be ignored."
        )
    default = official.start(question.model.cfg.n_layers) if mode == "official" else 0
    return operators(question, layers, start_layer, factors, default)


def _through(q: Float[Tensor, "batch dst"], matrix: Float[Tensor, "batch dst src"]) -> Float[Tensor, "batch src"]:
    """q^T matrix"""
    return torch.einsum("bi,bij->bj", q.to(matrix.dtype), matrix)


def _without_own(question: Question, scores: Float[Tensor, "batch src"]) -> Float[Tensor, "batch src"]:
    """0 at the position that is read, where it is one (a class token stands in no image anyway)."""
    return scores.masked_fill(question.own, 0)

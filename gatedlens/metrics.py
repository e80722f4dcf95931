"""Metrics: what an intervention is measured by. Each is made once and then called with logits: one number a row.

    metric = gl.metrics.logit_difference(right, wrong)             # token ids: one, or one a row
    metric(model(tokens))                                          # [batch]
    score = gl.metrics.normalised(metric, clean_logits, corrupted_logits)    # 1 as clean, 0 as corrupted

logits are [batch, pos, d_vocab], read at `pos` (the last position; one number or one a row), or a classifier's [batch, d_vocab].
A metric of your own is any function logits -> [batch] (or -> a scalar, where no row is asked for).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, SupportsFloat

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from gatedlens.errors import InputError
from gatedlens.language import next_token_loss

Metric = Callable[[Tensor], Tensor]
Tokens = Any  # a whole number, or a sequence or tensor of one a row; what is neither is explained


def at_position(logits: Float[Tensor, "batch *pos d_vocab"], pos: Tokens = -1) -> Float[Tensor, "batch d_vocab"]:
    """The logits of one position a row (`pos`: one for all, or one a row); a classifier's as they are."""
    if logits.ndim == 2:
        return logits
    length = logits.shape[1]
    place = _one_a_row(pos, logits, "pos")
    if bool(((place < -length) | (place >= length)).any()):
        raise InputError(f"pos={_say(pos)} is out of range: the logits have {length} positions.")
    return logits[torch.arange(len(logits), device=logits.device), place]


def _one_a_row(given: Tokens, logits: Float[Tensor, "batch *pos d_vocab"], what: str) -> Int[Tensor, " batch"]:
    try:
        value = torch.as_tensor(given, device=logits.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{what}={given!r}: whole numbers are meant; model.to_single_token(text) is a token's."
        ) from error
    if value.is_floating_point() or value.dtype == torch.bool:
        raise InputError(f"{what}={_say(given)}: whole numbers are meant, this is {value.dtype}.")
    if value.ndim > 1 or (value.ndim == 1 and len(value) not in (1, len(logits))):
        raise InputError(
            f"{what} has shape {list(value.shape)} and the logits have {len(logits)} rows: give one for all, or one a row."
        )
    return value.reshape(-1).expand(len(logits))


def _say(given: Any) -> str:
    return str(given.tolist() if isinstance(given, Tensor) else given)


def _chosen(values: Float[Tensor, "batch d_vocab"], tokens: Tokens, what: str) -> Float[Tensor, " batch"]:
    ids, size = _one_a_row(tokens, values, what), values.shape[-1]
    if bool(((ids < 0) | (ids >= size)).any()):
        raise InputError(f"{what}={_say(tokens)} is out of range: the logits have {size} entries (0 to {size - 1}).")
    return values.gather(1, ids.unsqueeze(1)).squeeze(1)


# -- what is measured -----------------------------------------------------------------------------------------------


def logit(token: Tokens, pos: Tokens = -1) -> Metric:
    """logit[token]"""
    return lambda logits: _chosen(at_position(logits, pos), token, "token")


def logit_difference(right: Tokens, wrong: Tokens, pos: Tokens = -1) -> Metric:
    """logit[right] - logit[wrong]"""

    def metric(logits: Float[Tensor, "batch *pos d_vocab"]) -> Float[Tensor, " batch"]:
        here = at_position(logits, pos)
        return _chosen(here, right, "right") - _chosen(here, wrong, "wrong")

    return metric


def log_probability(token: Tokens, pos: Tokens = -1) -> Metric:
    """log softmax(logits)[token], in nats"""
    return lambda logits: _chosen(at_position(logits, pos).log_softmax(-1), token, "token")


def probability(token: Tokens, pos: Tokens = -1) -> Metric:
    """softmax(logits)[token]"""
    return lambda logits: _chosen(at_position(logits, pos).softmax(-1), token, "token")


def kl(reference: Float[Tensor, "batch *pos d_vocab"], pos: Tokens = -1) -> Metric:
    """KL(reference || logits) = sum p_ref (log p_ref - log p), in nats: how far the output is from a run's logits."""

    def metric(logits: Float[Tensor, "batch *pos d_vocab"]) -> Float[Tensor, " batch"]:
        if logits.shape != reference.shape:
            raise InputError(f"kl compares with logits {list(reference.shape)}; these are {list(logits.shape)}.")
        want, have = (at_position(one, pos).log_softmax(-1) for one in (reference.to(logits), logits))
        return (want.exp() * (want - have)).sum(-1)

    return metric


def loss(tokens: Int[Tensor, "batch pos"], mask: Shaped[Tensor, "batch pos"] | None = None) -> Metric:
    """-log p(token[t + 1] | tokens[..t]), mean over each row's targets, in nats; `mask` as in the model's call."""

    def metric(logits: Float[Tensor, "batch *pos d_vocab"]) -> Float[Tensor, " batch"]:
        if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
            raise InputError(f"loss needs logits for tokens {list(tokens.shape)}; these are {list(logits.shape)}.")
        losses = next_token_loss(logits, tokens.to(logits.device), mask, per_token=True)
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        targets = real.sum(1).to(logits.device) - 1
        if bool((targets < 1).any()):
            raise InputError("loss by row needs two tokens in every row: one to read and one to predict.")
        return losses.sum(1) / targets

    return metric


def cross_entropy(labels: Tokens) -> Metric:
    """-log softmax(logits)[label] of a classifier, in nats"""
    return lambda logits: F.cross_entropy(at_position(logits), _one_a_row(labels, logits, "labels"), reduction="none")


def normalised(metric: Metric, clean: Float[Tensor, "batch ..."], corrupted: Float[Tensor, "batch ..."]) -> Metric:
    """(metric - corrupted) / (clean - corrupted): 1 as in the clean run, 0 as in the corrupted one.

    clean, corrupted: the two runs' logits. Both baselines are means over rows, so the mean of the rows is the
    normalised mean.
    """
    high, low = (float(per_row(metric, logits).mean()) for logits in (clean, corrupted))
    if abs(high - low) < 1e-12 * max(abs(high), abs(low), 1e-12):
        raise InputError(f"The metric is {high:.6g} in the clean and in the corrupted run: nothing to normalise by.")
    return lambda logits: (metric(logits) - low) / (high - low)


# -- calling one ----------------------------------------------------------------------------------------------------


def per_row(metric: Any, logits: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
    """The metric's numbers, one a row, checked: no other shape, nothing that is not a number."""
    value = measure(metric, logits)
    if value.numel() == 1 and len(logits) > 1:
        raise InputError(
            f"The metric returned one number for {len(logits)} rows; here each row needs its own: leave out the mean."
        )
    return value.reshape(-1)


def measure(metric: Any, logits: Float[Tensor, "batch ..."]) -> Float[Tensor, ...]:
    """The metric's value: one number, or one a row [batch]; an InputError for anything else, and for NaN.

    Whole numbers and truths (a rank, whether a prediction is right) become floats.
    """
    if not callable(metric):
        raise InputError(
            f"The metric is {metric!r}; it is a function of logits: gl.metrics.logit_difference(...), say."
        )
    value = metric(logits)
    if not isinstance(value, Tensor):
        if not isinstance(value, SupportsFloat) or isinstance(value, str):
            raise InputError(f"The metric returned {type(value).__name__}; it must return a tensor, one number a row.")
        value = torch.tensor(float(value))
    if value.ndim > 1 or (value.ndim == 1 and len(value) not in (1, len(logits))):
        raise InputError(
            f"The metric returned shape {list(value.shape)} for {len(logits)} rows; it must return one number a row "
            f"[{len(logits)}], or one scalar."
        )
    if value.is_complex():
        raise InputError(f"The metric returned {value.dtype}; it must return real numbers.")
    if not value.is_floating_point():
        value = value.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    if bool(value.isnan().any()):
        raise InputError("The metric returned NaN: are the logits finite, and is what it divides by not zero?")
    return value

"""Metrics: what an intervention is measured by. Each is made once and then called with logits: one number a row.

    metric = gl.metrics.logit_difference(right, wrong)             # token ids: one, or one a row
    metric(model(tokens))                                          # [batch]
    score = gl.metrics.normalised(metric, clean_logits, corrupted_logits)    # 1 as clean, 0 as corrupted

logits are [batch, pos, d_vocab], read at `pos` (the last position; one number or one a row), or a classifier's [batch, d_vocab].
A metric of your own is any function logits -> [batch] (or -> a scalar, where no row is asked for). `AtPosition(function, pos)`
makes one that says which position it reads: a sweep then computes no logits of others.

`pos` counts a row's real positions (`positions.py`). Whoever measures a padded batch hands a metric `Logits`, which know where
they are; call a metric yourself with `Logits.of(logits, mask)`. In plain logits every position counts as real. A metric of
your own reads `at_position(logits, -1)`, or hands the logits on to one of these; `logits[:, -1]` is padding where rows are
padded on the right, and you are warned.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, SupportsFloat, TypeAlias

import numpy
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from gatedlens.address.positions import Positions, one_a_row
from gatedlens.errors import InputError
from gatedlens.model.loss import next_token_loss

__all__ = [
    "AtPosition",
    "Logits",
    "Metric",
    "at_position",
    "by_rows",
    "cross_entropy",
    "kl",
    "log_probability",
    "logit",
    "logit_difference",
    "loss",
    "measure",
    "normalised",
    "per_row",
    "probability",
    "real_positions",
]

Metric = Callable[[Tensor], Tensor]
# Tokens: a whole number, or a sequence or tensor of one a row. UserMetric: a function of logits that gives a tensor, or one
# number. For editors and type checkers: what is neither gets the error of the functions below.
if TYPE_CHECKING:
    Tokens: TypeAlias = int | Sequence[int] | numpy.ndarray[Any, Any] | Tensor
    UserMetric: TypeAlias = Callable[[Tensor], Tensor | SupportsFloat]
else:
    Tokens = UserMetric = Any


# -- logits of a padded batch ---------------------------------------------------------------------------------------


@dataclass
class Rows:
    """Where the rows of some logits are real, and whether anybody has asked."""

    real: Bool[Tensor, "batch pos"]
    asked: bool = False


class Logits(Tensor):
    """`Logits.of(logits, mask)`: logits [batch, pos, d_vocab] of a padded batch, which know where its rows are real.

    A tensor like any other. What is computed from them and keeps their [batch, pos] knows it too.
    """

    rows: Rows

    @staticmethod
    def of(logits: Tensor, mask: Shaped[Tensor, "batch pos"] | None) -> Tensor:
        """`Logits.of(logits, mask)`: logits [batch, pos, d_vocab] that know where their rows are real.

        The logits as they are where nothing is padding, or where they have no positions. mask [batch, pos]: 1 or True at
        real tokens.
        """
        if mask is None or logits.ndim != 3 or bool(mask.all()):
            return logits
        if tuple(mask.shape) != tuple(logits.shape[:2]):
            raise InputError(
                f"The mask is {list(mask.shape)} and the logits {list(logits.shape)}: [batch, pos] of both."
            )
        return _knowing(logits, Rows(mask.bool()))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
        rows = next((one.rows for one in args if isinstance(one, Logits)), None)
        if rows is None or type(out) is not Tensor or out.ndim != 3 or out.shape[:2] != rows.real.shape:
            return out
        return _knowing(out, rows)


def _knowing(logits: Tensor, rows: Rows) -> Tensor:
    found = logits.as_subclass(Logits)
    found.rows = rows
    return found


def real_positions(logits: Float[Tensor, "batch pos d_vocab"]) -> Bool[Tensor, "batch pos"]:
    """`real_positions(logits)`: [batch, pos], where the rows of logits are real: everywhere, unless they are `Logits`,
    which know better.
    """
    if not isinstance(logits, Logits):
        return torch.ones(logits.shape[:2], dtype=torch.bool)
    logits.rows.asked = True
    return logits.rows.real


def by_rows(logits: Float[Tensor, "many ..."], rows: int) -> list[Tensor]:
    """`by_rows(logits, 8)`: the parts of `rows` rows each, which know what the whole knew."""
    parts, mask = logits.split(rows), _mask(logits)
    return [*parts] if mask is None else [Logits.of(*one) for one in zip(parts, mask.split(rows), strict=True)]


def _tell_of_padding(logits: Tensor) -> None:
    """A warning if a metric read right-padded rows and never asked where they end."""
    if isinstance(logits, Logits) and not logits.rows.asked and not bool(logits.rows.real[:, -1].all()):
        warnings.warn(
            "Some rows are padded on the right, and this metric did not ask where they end: logits[:, -1] is padding there. "
            "Read gl.metrics.at_position(logits, -1), use a metric of gl.metrics, or pad on the left.",
            stacklevel=4,
        )


# -- reading them ---------------------------------------------------------------------------------------------------


def at_position(logits: Float[Tensor, "batch *pos d_vocab"], pos: Positions = -1) -> Float[Tensor, "batch d_vocab"]:
    """`at_position(logits, -1)`: the logits of one position a row (`pos`: one for all, or one a row); a classifier's as
    they are.
    """
    if logits.ndim == 2:
        return logits
    place = one_a_row(pos, "pos", real_positions(logits)).to(logits.device)
    found: Tensor = logits.as_subclass(Tensor)[torch.arange(len(logits), device=logits.device), place]
    return found


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


class AtPosition:
    """`gl.metrics.AtPosition(lambda logits: logits[:, 3] - logits[:, 5], -1)`: a metric of one position a row.

    of: logits there [batch, d_vocab] -> one number a row. reads: the position, or one a row. name: what pictures call it. It is
    called with logits of all positions, or [batch, d_vocab] of these alone.
    """

    def __init__(self, of: Callable[[Float[Tensor, "batch d_vocab"]], Tensor], reads: Positions = -1, name: str = ""):
        self.of = of
        self.reads = reads
        self.name = name

    def __call__(self, logits: Float[Tensor, "batch *pos d_vocab"]) -> Float[Tensor, " batch"]:
        return self.of(at_position(logits, self.reads))


def logit(token: Tokens, pos: Positions = -1) -> Metric:
    """`gl.metrics.logit(token)`: logit[token] at `pos`, one number a row.

    token: an id for all rows or one a row. pos: a real position, or one a row (a classifier has none).
    """
    return AtPosition(lambda here: _chosen(here, token, "token"), pos, "logit")


def logit_difference(right: Tokens, wrong: Tokens, pos: Positions = -1) -> Metric:
    """`gl.metrics.logit_difference(right, wrong)`: logit[right] - logit[wrong] at `pos`, one number a row."""
    return AtPosition(
        lambda here: _chosen(here, right, "right") - _chosen(here, wrong, "wrong"), pos, "logit difference"
    )


def log_probability(token: Tokens, pos: Positions = -1) -> Metric:
    """`gl.metrics.log_probability(token)`: log softmax(logits)[token] at `pos`, in nats."""
    return AtPosition(lambda here: _chosen(here.log_softmax(-1), token, "token"), pos, "log probability")


def probability(token: Tokens, pos: Positions = -1) -> Metric:
    """`gl.metrics.probability(token)`: softmax(logits)[token] at `pos`, from 0 to 1."""
    return AtPosition(lambda here: _chosen(here.softmax(-1), token, "token"), pos, "probability")


def kl(reference: Float[Tensor, "batch *pos d_vocab"], pos: Positions = -1) -> Metric:
    """`gl.metrics.kl(reference)`: KL(reference || logits) = sum p_ref (log p_ref - log p), in nats: how far the output is
    from a run's logits.
    """

    def metric(logits: Float[Tensor, "batch *pos d_vocab"]) -> Float[Tensor, " batch"]:
        if logits.shape != reference.shape:
            raise InputError(f"kl compares with logits {list(reference.shape)}; these are {list(logits.shape)}.")
        # A reference that does not know its rows was padded as these are: it has their shape.
        own = reference if isinstance(reference, Logits) else Logits.of(reference, _mask(logits))
        want, have = (at_position(one, pos).log_softmax(-1) for one in (own.to(logits), logits))
        return (want.exp() * (want - have)).sum(-1)

    return _named(metric, "KL divergence")


def loss(tokens: Int[Tensor, "batch pos"], mask: Shaped[Tensor, "batch pos"] | None = None) -> Metric:
    """`gl.metrics.loss(tokens)`: -log p(token[t + 1] | tokens[..t]), mean over each row's targets, in nats.

    mask: as in the model's call; None: that of the logits, where they know it.
    """

    def metric(logits: Float[Tensor, "batch *pos d_vocab"]) -> Float[Tensor, " batch"]:
        if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
            raise InputError(f"loss needs logits for tokens {list(tokens.shape)}; these are {list(logits.shape)}.")
        real = (real_positions(logits) if mask is None else mask.bool()).to(logits.device)
        losses = next_token_loss(logits.as_subclass(Tensor), tokens.to(logits.device), real, per_token=True)
        targets = real.sum(1) - 1
        if bool((targets < 1).any()):
            raise InputError("loss by row needs two tokens in every row: one to read and one to predict.")
        return losses.sum(1) / targets

    return _named(metric, "loss")


def cross_entropy(labels: Tokens) -> Metric:
    """`gl.metrics.cross_entropy(labels)`: -log softmax(logits)[label] of a classifier, in nats."""

    def metric(logits: Float[Tensor, "batch *pos d_vocab"]) -> Float[Tensor, " batch"]:
        return F.cross_entropy(at_position(logits), _one_a_row(labels, logits, "labels"), reduction="none")

    return _named(metric, "cross-entropy")


def normalised(
    metric: Metric,
    clean: Float[Tensor, "batch ..."],
    corrupted: Float[Tensor, "batch ..."],
    mask: Shaped[Tensor, "batch pos"] | None = None,
) -> Metric:
    """`gl.metrics.normalised(metric, clean_logits, corrupted_logits)`: (metric - corrupted) / (clean - corrupted): 1 as in
    the clean run, 0 as in the corrupted one.

    clean, corrupted: the two runs' logits; mask: where their rows are real (None: everywhere). Both baselines are means
    over rows, so the mean of the rows is the normalised mean.
    """
    high, low = (float(per_row(metric, Logits.of(logits, mask)).mean()) for logits in (clean, corrupted))
    if abs(high - low) < 1e-12 * max(abs(high), abs(low), 1e-12):
        raise InputError(f"The metric is {high:.6g} in the clean and in the corrupted run: nothing to normalise by.")
    if isinstance(metric, AtPosition):
        of = metric.of
        return AtPosition(lambda here: (of(here) - low) / (high - low), metric.reads, f"normalised {name_of(metric)}")
    return _named(lambda logits: (metric(logits) - low) / (high - low), f"normalised {name_of(metric)}")


# -- what one is called ---------------------------------------------------------------------------------------------


def _named(metric: Metric, name: str) -> Metric:
    metric.__name__ = name
    return metric


def name_of(metric: UserMetric) -> str:
    """`name_of(gl.metrics.logit_difference(1, 2))`: "logit difference": what pictures call it: a function of yours by its name,
    "metric" where it has none.
    """
    said = metric.name if isinstance(metric, AtPosition) else getattr(metric, "__name__", "")
    return "metric" if said in ("", "<lambda>") else said.replace("_", " ")


# -- calling one ----------------------------------------------------------------------------------------------------


def per_row(metric: UserMetric, logits: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
    """`per_row(metric, logits)`: [batch], the metric's numbers, one a row, checked: no other shape, nothing that is not a
    number.
    """
    value = measure(metric, logits)
    if value.numel() == 1 and len(logits) > 1:
        raise InputError(
            f"The metric returned one number for {len(logits)} rows; here each row needs its own: leave out the mean."
        )
    return value.reshape(-1)


def _mask(logits: Tensor) -> Tensor | None:
    return logits.rows.real if isinstance(logits, Logits) else None


def measure(metric: UserMetric, logits: Float[Tensor, "batch ..."]) -> Float[Tensor, ...]:
    """`measure(metric, logits)`: the metric's value: one number, or one a row [batch]; an InputError for anything else,
    and for NaN.

    Whole numbers and truths (a rank, whether a prediction is right) become floats.
    """
    if not callable(metric):
        raise InputError(
            f"The metric is {metric!r}; it is a function of logits: gl.metrics.logit_difference(...), say."
        )
    value = metric(logits)
    _tell_of_padding(logits)
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

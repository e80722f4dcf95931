"""Measures: what is left of an answer, one number a row.

    MEASURES["probability"](logits, labels, clean)       # all [row, d_vocab], labels [row] -> [row]

logits: of the changed input; clean: of the input as it was; labels: the right class or token. One more measure is one
more line.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float, Int
from torch import Tensor

from gatedlens.errors import InputError, did_you_mean

Measure = Callable[[Tensor, Tensor, Tensor], Tensor]


def accuracy(
    logits: Float[Tensor, "row d_vocab"], labels: Int[Tensor, " row"], clean: Float[Tensor, "row d_vocab"]
) -> Float[Tensor, " row"]:
    """1 where the label has the largest logit (the first of equal ones), else 0."""
    return (logits.argmax(-1) == labels).to(logits)


def probability(
    logits: Float[Tensor, "row d_vocab"], labels: Int[Tensor, " row"], clean: Float[Tensor, "row d_vocab"]
) -> Float[Tensor, " row"]:
    """softmax(logits)[label]"""
    return logits.softmax(-1).gather(1, labels.unsqueeze(1)).squeeze(1)


def logit(
    logits: Float[Tensor, "row d_vocab"], labels: Int[Tensor, " row"], clean: Float[Tensor, "row d_vocab"]
) -> Float[Tensor, " row"]:
    """logits[label]"""
    return logits.gather(1, labels.unsqueeze(1)).squeeze(1)


def squared_error(
    logits: Float[Tensor, "row d_vocab"], labels: Int[Tensor, " row"], clean: Float[Tensor, "row d_vocab"]
) -> Float[Tensor, " row"]:
    """mean over logits of (logits - clean)^2"""
    return (logits - clean).square().mean(-1)


MEASURES: dict[str, Measure] = {f.__name__: f for f in (accuracy, probability, logit, squared_error)}


def check(name: str) -> str:
    """The name, if there is such a measure."""
    if name not in MEASURES:
        raise InputError(f"measure={name!r}: it is {', '.join(MEASURES)}.{did_you_mean(name, MEASURES)}")
    return name

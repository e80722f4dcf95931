"""Protocols and their measures: in which order places are taken away or put back, how many, and what is then measured.

    perturbation(model, images, scores, labels)                        # most relevant first: down is better
    perturbation(model, images, scores, labels, order="negative")      # least relevant first: up is better
    activation_curve(model, tokens, scores, labels)                    # put back, most relevant first (AUAC): up
    pruning_curve(model, tokens, scores)                               # smallest scores first (AU-MSE): down
    deletion(model, images, scores), insertion(model, images, scores)  # 0 to 100 %: down, up
    difference(insertion(...), deletion(...))                          # one curve for both: up

All are `measured(case, scores, protocol, measures)`; one of your own is one more `Protocol`. Beside `scores` (an
Attribution, or numbers [batch, pos]; of images [batch, row, column] of patches or pixels) and `labels` (None: what the model
predicts) each takes

    measure          a name of MEASURES         nothing       what is put in a place: see `removal.py`
    shares           of the places              keep, among, attention_mask       see `case.py`
    batch_size       inputs in one forward      progress      a bar, or none

A measure says what is left of an answer, one number a row: `MEASURES["probability"](logits, labels, clean)` -> [row], with the
logits [row, d_vocab] of the changed input, the labels [row], and the logits of the input as it was. One more measure is one
more function in MEASURES.

Perturbation as in HA (arXiv 2403.01590) and Chefer et al. 2021 (arXiv 2012.09838); activation and pruning Ali et al. 2022
(arXiv 2202.07304), as in UIA (arXiv 2405.16504); insertion and deletion Petsiuk et al. 2018 (arXiv 1806.07421).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from gatedlens.errors import InputError, did_you_mean
from gatedlens.evaluation.case import Case, Labels, Scores
from gatedlens.evaluation.curves import AXES, Curve
from gatedlens.evaluation.removal import Nothing
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Input
from gatedlens.options import checked, taking

# -- measures ---------------------------------------------------------------------------------------------------------

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


# -- protocols --------------------------------------------------------------------------------------------------------

TENTHS = tuple(round(0.1 * i, 1) for i in range(11))
TWENTIETHS = tuple(round(0.05 * i, 2) for i in range(21))


@dataclass(frozen=True)
class Protocol:
    """most_first: the order of the scores (of their sizes, if `absolute`); restores: from nothing, places are put back;
    better: which way a better explanation moves the curve; nothing: what is put in a pixel's place, if not black."""

    name: str
    better: str
    most_first: bool
    restores: bool
    shares: tuple[float, ...]
    measure: str
    absolute: bool = False
    nothing: str | None = None


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("positive", "down", most_first=True, restores=False, shares=TENTHS[1:-1], measure="accuracy"),
        Protocol("negative", "up", most_first=False, restores=False, shares=TENTHS[1:-1], measure="accuracy"),
        Protocol("activation", "up", most_first=True, restores=True, shares=TENTHS, measure="probability"),
        Protocol("pruning", "down", most_first=False, restores=False, shares=TENTHS, measure="squared_error", absolute=True),
        Protocol("deletion", "down", most_first=True, restores=False, shares=TWENTIETHS, measure="probability"),
        Protocol("insertion", "up", most_first=True, restores=True, shares=TWENTIETHS, measure="probability", nothing="blur"),
    )
}  # fmt: skip
ORDERS = ("positive", "negative")


@checked
def perturbation(
    model: HookedModel, input: Input, scores: Scores, labels: Labels = None, *, order: str = "positive", **options: Any
) -> Curve:
    """`gl.evaluation.perturbation(model, images, scores, labels).area`: take away 10 % to 90 % of the places; the accuracy.

    order: "positive" takes the most relevant first, so down is better; "negative" the least relevant, so up is better.
    More options are those of `curve`. InputError for an order, scores or labels that do not fit the input.
    Source: Chefer et al. 2021 (arXiv 2012.09838); HA (arXiv 2403.01590).
    """
    if order not in ORDERS:
        raise InputError(f"order={order!r}: it is 'positive' or 'negative'.{did_you_mean(str(order), ORDERS)}")
    return curve(PROTOCOLS[order], model, input, scores, labels, **options)


@checked
def activation_curve(model: HookedModel, input: Input, scores: Scores, labels: Labels = None, **options: Any) -> Curve:
    """`gl.evaluation.activation_curve(model, tokens, scores, labels).area`: from an input that holds nothing, put places
    back, most relevant first; the label's probability. Its area is AUAC; up is better.

    More options are those of `curve`. Source: Ali et al. 2022 (arXiv 2202.07304); UIA (arXiv 2405.16504).
    """
    return curve(PROTOCOLS["activation"], model, input, scores, labels, **options)


@checked
def pruning_curve(model: HookedModel, input: Input, scores: Scores, labels: Labels = None, **options: Any) -> Curve:
    """`gl.evaluation.pruning_curve(model, tokens, scores).area`: take places away, those with the smallest |score| first;
    mean over logits of (logit - clean logit)^2. Its area is AU-MSE; down is better.

    More options are those of `curve`. Source: Ali et al. 2022 (arXiv 2202.07304); UIA (arXiv 2405.16504).
    """
    return curve(PROTOCOLS["pruning"], model, input, scores, labels, **options)


@checked
def deletion(model: HookedModel, input: Input, scores: Scores, labels: Labels = None, **options: Any) -> Curve:
    """`gl.evaluation.deletion(model, images, scores).area`: take away 0 % to 100 % of the places, most relevant first; the
    label's probability. Down is better. More options are those of `curve`. Source: Petsiuk et al. 2018 (arXiv 1806.07421).
    """
    return curve(PROTOCOLS["deletion"], model, input, scores, labels, **options)


@checked
def insertion(model: HookedModel, input: Input, scores: Scores, labels: Labels = None, **options: Any) -> Curve:
    """`gl.evaluation.insertion(model, images, scores).area`: from the blurred image (or from tokens that say nothing) put back
    0 % to 100 % of the places, most relevant first; the label's probability. Up is better.

    More options are those of `curve`. Source: Petsiuk et al. 2018 (arXiv 1806.07421).
    """
    return curve(PROTOCOLS["insertion"], model, input, scores, labels, **options)


def difference(insertion: Curve, deletion: Curve) -> Curve:
    """`gl.evaluation.difference(insertion, deletion)`: insertion - deletion, sample by sample: its area is the difference
    of the areas, and large where both are good. InputError for curves that were not measured alike.
    """
    alike = insertion.shares == deletion.shares and insertion.shape == deletion.shape
    if not alike or insertion.facts["measure"] != deletion.facts["measure"]:
        raise InputError("These curves were not measured alike: shares, samples or measures differ.")
    facts = {**insertion.facts, "protocol": "difference", "better": "up"}
    value = f"difference of {insertion.value}"
    return replace(
        insertion, values=insertion.values - deletion.values, title="insertion - deletion", value=value, facts=facts
    )


# -- the engine -----------------------------------------------------------------------------------------------------


@checked
def curve(
    protocol: Protocol,
    model: HookedModel,
    input: Input,
    scores: Scores,
    labels: Labels = None,
    *,
    measure: str | None = None,
    shares: Sequence[float] | None = None,
    nothing: Nothing = None,
    keep: Tensor | None = None,
    among: Labels = None,
    attention_mask: Tensor | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> Curve:
    """`gl.evaluation.curve(gl.evaluation.PROTOCOLS["positive"], model, tokens, scores)`: the curve of any protocol.

    scores: an Attribution, or numbers [batch, pos] (of images [batch, row, column]). labels: the right classes or tokens, one a
    row; None: what the model predicts. measure: a name of MEASURES. shares: of the places, ascending from 0 to 1. nothing:
    what is put in a place, see `removal.py`. keep: booleans, True where a place always stays. among: the ids of the only
    answers that count; labels are then their indices. batch_size: inputs in one forward.

    InputError for scores, labels, shares or a measure that do not fit.
    """
    chosen = replace(
        protocol,
        measure=check(protocol.measure if measure is None else measure),
        shares=_shares(protocol.shares if shares is None else shares),
    )
    nothing = protocol.nothing if nothing is None and getattr(model, "grid", None) is not None else nothing
    case = Case.of(model, input, labels, nothing=nothing, keep=keep, among=among, attention_mask=attention_mask)
    found = measured(case, scores, chosen, (chosen.measure,), batch_size=batch_size, progress=progress)
    return as_curve(found[chosen.measure], chosen, chosen.measure, model=model.cfg.model_name, nothing=case.said)


def as_curve(values: Float[Tensor, "sample share"], protocol: Protocol, measure: str, **facts: Any) -> Curve:
    """Values of a protocol as a Curve, its title and facts filled in."""
    verb = "put back" if protocol.restores else "taken away"
    first = ("largest first" if protocol.most_first else "smallest first") if protocol.absolute else (
        "most relevant first" if protocol.most_first else "least relevant first"
    )  # fmt: skip
    given = {"protocol": protocol.name, "measure": measure, "better": protocol.better, **facts}
    title = f"{protocol.name}: {verb}, {first}"
    return Curve(values, AXES, {"share": list(protocol.shares)}, title, measure.replace("_", " "), given)


@torch.no_grad()
def measured(
    case: Case,
    scores: Scores,
    protocol: Protocol,
    measures: Sequence[str],
    *,
    batch_size: int = 64,
    progress: bool = True,
) -> dict[str, Float[Tensor, "sample share"]]:
    """Several measures of one protocol in one pass, by their names."""
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}: give at least 1.")
    ranks = case.ranks(scores, protocol.most_first, protocol.absolute)
    counts = case.counts(protocol.shares)
    found: dict[str, list[Tensor]] = {check(name): [] for name in measures}
    total = counts.numel()
    for start in tqdm(range(0, total, batch_size), disable=not progress, desc=protocol.name, unit="batch"):
        flat = torch.arange(start, min(start + batch_size, total), device=counts.device)
        rows, steps = flat // counts.shape[1], flat % counts.shape[1]
        reached = ranks[rows] < counts[rows, steps].unsqueeze(1)
        gone = ~reached & case.free[rows] if protocol.restores else reached
        empty = case.nothing.expand_as(case.values)[rows]
        logits = case.logits(torch.where(gone.unsqueeze(1), empty, case.values[rows]), rows)
        for name in measures:
            found[name].append(MEASURES[name](logits, case.labels[rows], case.clean[rows]))
    return {name: torch.cat(parts).reshape(counts.shape).cpu() for name, parts in found.items()}


def _shares(given: Sequence[float]) -> tuple[float, ...]:
    shares = tuple(float(share) for share in given)
    if len(shares) < 2 or shares[0] < 0 or shares[-1] > 1 or any(b <= a for a, b in pairwise(shares)):
        raise InputError(f"shares={list(shares)}: give at least two, ascending, from 0 to 1.")
    return shares


for _of_one in (perturbation, activation_curve, pruning_curve, deletion, insertion):
    taking(curve)(_of_one)  # here, since `curve` is defined behind them

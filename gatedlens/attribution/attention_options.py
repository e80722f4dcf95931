"""Reading: which layers, factors and channels of the implicit attention an attribution reads, and how; all checked.

layers       a slice or a sequence of layers (None: all), or start_layer: all from that one on
factors      "unified" (gate, scan, act, conv: the matrix of UIA), "hidden" (the scan alone: that of HA), "all" (the skip
             as well: the whole layer), or names of factors, ("scan", "gate")
channels     "mean", "max", "min", "product", and sign: "signed", "abs", "clamp" (see `channels.py`)
own          whether the row that is read keeps its own column, which holds what the residual stream carries straight
             through; None: as the method does. (Class tokens stand in no image anyway.)
mode         "paper": the formulas; "official": the papers' code (`official_code.py`), which has its own channels, sign and own
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gatedlens.address.layers import START, Layers, layer_of
from gatedlens.attention.layer import PAPERS, ImplicitAttention
from gatedlens.attention.stack import AttentionStack, implicit_attention
from gatedlens.attribution import channels as channels_
from gatedlens.attribution import official_code
from gatedlens.attribution.question import Question
from gatedlens.attribution.scores import Attribution
from gatedlens.errors import InputError, did_you_mean
from gatedlens.recurrence.autocast import exact
from gatedlens.recurrence.factors import NAMES
from gatedlens.recurrence.scanning import at_least_float32

MODES = ("paper", "official")


@dataclass(frozen=True)
class Reading:
    """What was asked for, with the operators in `stack`; `steps` are the official ones, None for the formulas."""

    question: Question
    stack: AttentionStack
    factors: str | list[str]
    channels: str
    sign: str
    own: bool
    steps: official_code.Steps | None

    @staticmethod
    def of(
        question: Question,
        layers: Layers,
        start_layer: Layers,
        factors: str | Sequence[str],
        channels: str,
        sign: str,
        own: bool,
        mode: str,
        given: dict[str, Any],
    ) -> Reading:
        """given: options that only the formulas know; with mode="official" each must be None."""
        if mode not in MODES:
            raise InputError(f"mode={mode!r}: it is 'paper' or 'official'.{did_you_mean(mode, MODES)}")
        channels_.check(channels, sign)
        _check_factors(factors)
        given = {
            **given,
            "channels": None if channels == "mean" else channels,
            "sign": None if sign == "signed" else sign,
        }
        told = [f"{name}={value!r}" for name, value in given.items() if value is not None]
        if mode == "official" and told:
            raise InputError(f"mode='official' has its own steps: {' and '.join(told)} would be ignored.")
        is_official = mode == "official"
        default = official_code.start(question.model.cfg.n_layers) if is_official else 0
        stack = _operators(question, layers, start_layer, default)
        if isinstance(factors, str):
            stack = stack if factors == "all" else stack.paper(factors)
        else:
            stack, factors = stack.only(*factors), list(factors)
        steps = official_code.steps(factors) if is_official else None
        return Reading(question, stack, factors, channels, sign, own and not is_official, steps)

    @property
    def read(self) -> Float[Tensor, "batch pos"]:
        """The positions that the prediction is read from, as shares."""
        return self.question.read.to(at_least_float32(self.question.features).dtype)

    # -- the formulas --------------------------------------------------------------------------------------------

    def row(self, attention: ImplicitAttention) -> Float[Tensor, "batch src"]:
        """The row that is read, channels put together."""
        return channels_.row(attention, self.read, self.channels, self.sign)

    def matrix(self, attention: ImplicitAttention) -> Float[Tensor, "batch dst src"]:
        """The whole matrix, channels put together."""
        return channels_.matrix(attention, self.channels, self.sign)

    def back(self, q: Float[Tensor, "batch dst"], attention: ImplicitAttention) -> Float[Tensor, "batch src"]:
        """q^T of the matrix; of the signed mean without building it."""
        if self.channels == "mean" and self.sign == "signed":
            return channels_.row(attention, q)
        return through(q, self.matrix(attention))

    # -- the papers' code ----------------------------------------------------------------------------------------

    def official_row(self, attention: ImplicitAttention) -> Float[Tensor, "batch src channel"]:
        assert self.steps is not None
        return official_code.official_rows(attention, self.read, self.question.own, self.steps)

    # -- the end -------------------------------------------------------------------------------------------------

    def answer(self, scores: Float[Tensor, "batch src"], method: str, value: str, **facts: Any) -> Attribution:
        """The Attribution: official scores are cut off at 0, the own column is dropped unless it is to be kept."""
        scores = scores if self.steps is None else scores.clamp(min=0)
        scores = scores if self.own else scores.masked_fill(self.question.own, 0)
        mode = "paper" if self.steps is None else "official"
        self._tell_if_nothing_is_left(scores, method)
        own = {"factors": self.factors, "channels": self.channels, "sign": self.sign, "own": self.own, "mode": mode}
        return self.question.answer(scores, method, value, self.stack.layers, **own, **facts)

    def _tell_if_nothing_is_left(self, scores: Tensor, method: str) -> None:
        """A warning for rows that are 0 throughout: they rank nothing."""
        real = self.question.real
        several = scores.shape[1] > 1 if real is None else real.sum(1) > 1
        empty = ((scores == 0).all(1) & several).nonzero().flatten().tolist()
        if empty:
            layers, n = list(self.stack.layers), self.question.model.cfg.n_layers
            more = f" Only layers {layers} of {n} took part: start_layer=0 takes all." if len(layers) < n else ""
            warnings.warn(
                f"{method}: all scores of rows {empty} are 0, nothing was positive there.{more}", stacklevel=4
            )


def through(q: Float[Tensor, "batch dst"], matrix: Float[Tensor, "batch dst src"]) -> Float[Tensor, "batch src"]:
    """q^T matrix"""
    with exact(matrix):
        return torch.einsum("bi,bij->bj", q, matrix)


def _operators(question: Question, layers: Layers, start_layer: Layers, default: int) -> AttentionStack:
    """The implicit attention of the layers that were asked for; from `default` on if none was."""
    model = question.model
    if layers is not None and start_layer is not None:
        raise InputError(f"layers={layers!r} and start_layer={start_layer}: give one of them.")
    start = default if start_layer is None else layer_of(model, start_layer, START)
    with torch.no_grad():
        return implicit_attention(model, question.batch, layers=slice(start, None) if layers is None else layers)


def _check_factors(factors: Any) -> None:
    """InputError for factors that there are not."""
    sets = (*PAPERS, "all")
    known = f"it is {', '.join(map(repr, sets))}, or a sequence of {', '.join(NAMES)}."
    if isinstance(factors, str):
        if factors not in sets:
            hint = f" One alone: ({factors!r},)." if factors in NAMES else did_you_mean(factors, sets)
            raise InputError(f"factors={factors!r}: {known}{hint}")
        return
    if not isinstance(factors, Sequence) or not factors:
        raise InputError(f"factors={factors!r}: {known}")
    for name in factors:
        if name not in NAMES:
            raise InputError(f"factors={factors!r}: {name!r} is no factor; {known}{did_you_mean(str(name), NAMES)}")

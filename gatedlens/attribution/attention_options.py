"""The options that the three attention methods share, and what is read of the implicit attention under them.

    options = Options(layers=None, start_layer=1, factors="hidden")
    reader = AttentionReader.of(question, options, keeps_own=False)     # every option checked, the operators built
    reader.row(attention), reader.matrix(attention)                     # of each layer in reader.stack
    reader.answer(scores, "rollout", "attention rollout")               # the Attribution

layers       a slice or a sequence of layers (None: all), or start_layer: all from that one on
factors      "unified" (gate, scan, act, conv: the matrix of UIA), "hidden" (the scan alone: that of HA), "all" (the skip
             as well: the whole layer), or names of factors, ("scan", "gate")
channels     "mean", "max", "min", "product", and sign: "signed", "abs", "clamp" (see `channels.py`)
own          whether the row that is read keeps its own column, which holds what the residual stream carries straight
             through; None: as the method does. (Class tokens stand in no image anyway.)
heads        which heads' channels count (a number, a slice, a list or a mask; None: all channels); of layers that have heads
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

from gatedlens.address.entries import Index, numbers
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
class Options:
    """What a caller of an attention method may choose: see the head of this file. Nothing is checked yet."""

    layers: Layers = None
    start_layer: Layers = None
    factors: str | Sequence[str] = "unified"
    channels: str = "mean"
    sign: str = "signed"
    own: bool | None = None
    mode: str = "paper"
    heads: Index | None = None

    @property
    def is_official(self) -> bool:
        return self.mode == "official"

    def check(self, **formula: Any) -> None:
        """InputError for a choice that there is not. `formula`: the method's own options that only its formula knows."""
        if self.mode not in MODES:
            raise InputError(f"mode={self.mode!r}: it is 'paper' or 'official'.{did_you_mean(self.mode, MODES)}")
        channels_.check(self.channels, self.sign)
        _check_factors(self.factors)
        chosen = {
            "own": self.own,
            **formula,
            "channels": None if self.channels == Options.channels else self.channels,
            "sign": None if self.sign == Options.sign else self.sign,
        }
        said = [f"{name}={value!r}" for name, value in chosen.items() if value is not None]
        if self.is_official and said:  # the papers' code fixes all of these: to take them silently would mislead
            raise InputError(f"mode='official' has its own steps: {' and '.join(said)} would be ignored.")


@dataclass(frozen=True)
class AttentionReader:
    """The operators of the layers that take part, in `stack`, and how they are read.

    factors: as in `Options`, names as a list. own: whether the own column is kept. heads: their numbers in the first layer,
    None for all channels. steps: the official ones, None for the formulas.
    """

    question: Question
    stack: AttentionStack
    factors: str | list[str]
    channels: str
    sign: str
    own: bool
    steps: official_code.Steps | None
    heads: list[int] | None = None

    @staticmethod
    def of(question: Question, options: Options, keeps_own: bool, **formula: Any) -> AttentionReader:
        """The checked options and the operators that they ask for.

        keeps_own: whether the method's formula keeps the own column, where the caller does not say. formula: options that
        the method has beside the common ones and that mode="official" does not know; None where the caller gave none.
        """
        options.check(**formula)
        stack, factors = _operators(question, options), options.factors
        if isinstance(factors, str):
            stack = stack if factors == "all" else stack.paper(factors)
        else:
            stack, factors = stack.only(*factors), list(factors)
        heads = None
        if options.heads is not None:
            first = next(iter(stack))
            stack, heads = stack.select(options.heads), numbers("heads", options.heads, first.n_heads, repr(first))
        if options.is_official and len(set(stack.layers)) < len(stack):
            raise InputError(
                f"mode='official' chains one mixer a layer, and {question.model.cfg.model_name} has layers of two: say which are "
                "meant, layers=gl.layers.where(kind='recurrent')."
            )
        own = keeps_own if options.own is None else options.own
        steps = official_code.steps(factors) if options.is_official else None
        return AttentionReader(
            question, stack, factors, options.channels, options.sign, own and not options.is_official, steps, heads
        )

    @property
    def read(self) -> Float[Tensor, "batch pos"]:
        """The positions that the prediction is read from, as shares of 1; at least float32."""
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
        """The row that is read as the papers' code computes it, channel by channel."""
        assert self.steps is not None
        return official_code.official_rows(attention, self.read, self.question.own, self.steps)

    # -- the end -------------------------------------------------------------------------------------------------

    def answer(self, scores: Float[Tensor, "batch src"], method: str, value: str, **facts: Any) -> Attribution:
        """The Attribution: official scores are cut off at 0, the own column is dropped unless it is to be kept."""
        scores = scores if self.steps is None else scores.clamp(min=0)
        scores = scores if self.own else scores.masked_fill(self.question.own, 0)
        mode = "paper" if self.steps is None else "official"
        self._tell_if_nothing_is_left(scores, method)
        common: dict[str, Any] = {
            "factors": self.factors,
            "channels": self.channels,
            "sign": self.sign,
            "own": self.own,
            "mode": mode,
        }
        if self.heads is not None:
            common["heads"] = self.heads
        return self.question.answer(scores, method, value, tuple(dict.fromkeys(self.stack.layers)), **common, **facts)

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


def _operators(question: Question, options: Options) -> AttentionStack:
    """The implicit attention of the layers that were asked for; where none were, of those that the mode starts with."""
    model, layers, start = question.model, options.layers, options.start_layer
    if layers is not None and start is not None:
        raise InputError(f"layers={layers!r} and start_layer={start}: give one of them.")
    if layers is None and start is None:
        first = official_code.start(model.cfg.n_layers) if options.is_official else 0
        layers = slice(first, None)
    elif layers is None:
        layers = slice(layer_of(model, start, START), None)
    with torch.no_grad():
        return implicit_attention(model, question.batch, layers=layers)


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

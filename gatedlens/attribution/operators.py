"""Operators: the implicit attention of the layers, and of the factors, that an attribution is made of.

    operators(question, layers=None, start_layer=2, factors="unified")     # an AttentionStack

factors: "unified" (gate, scan, act, conv: the matrix of UIA), "hidden" (the scan alone: that of HA), "all" (the skip as
well: the whole layer), or names of factors, ("scan", "gate").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gatedlens.attention import PAPERS, implicit_attention
from gatedlens.attribution.question import Question
from gatedlens.errors import InputError, did_you_mean
from gatedlens.factors import NAMES
from gatedlens.stack import AttentionStack


def operators(
    question: Question, layers: Any, start_layer: int | None, factors: str | Sequence[str], default_start: int = 0
) -> AttentionStack:
    """The layers that were asked for (all, or those from `start_layer` on), each with these factors alone."""
    model = question.model
    check_factors(factors)
    if layers is not None and start_layer is not None:
        raise InputError(f"layers={layers!r} and start_layer={start_layer}: give one of them.")
    start = default_start if start_layer is None else start_layer
    n = model.cfg.n_layers
    if not -n <= start < n:
        raise InputError(f"start_layer={start}: {model.cfg.model_name} has layers 0 to {n - 1}.")
    chosen = slice(start, None) if layers is None else layers
    with torch.no_grad():
        stack = implicit_attention(model, question.batch, layers=chosen)
    if isinstance(factors, str):
        return stack if factors == "all" else stack.paper(factors)
    return stack.only(*factors)


def check_factors(factors: Any) -> None:
    """InputError for factors that there are not."""
    sets = (*PAPERS, "all")
    if isinstance(factors, str):
        if factors not in sets:
            hint = did_you_mean(factors, sets) or f" A factor alone is a sequence: ({factors!r},)." * (factors in NAMES)
            raise InputError(f"factors={factors!r}: it is {', '.join(map(repr, sets))}, or names of {NAMES}.{hint}")
        return
    if not isinstance(factors, Sequence) or not factors:
        raise InputError(f"factors={factors!r}: it is {', '.join(map(repr, sets))}, or names of {NAMES}.")
    for name in factors:
        if name not in NAMES:
            hint = did_you_mean(str(name), NAMES)
            raise InputError(f"factors={factors!r}: {name!r} is no factor; they are {', '.join(NAMES)}.{hint}")

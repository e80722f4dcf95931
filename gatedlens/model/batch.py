"""What a forward takes and what it returns: Input, made ready as a Batch, and Output, by `return_type` as in TransformerLens.

    logits = model(tokens)                                    # "logits"
    loss = model(tokens, return_type="loss")
    both = model(tokens, return_type="both"); both.loss       # an Output, also a pair: logits, loss = both
    model(tokens, return_type=None)                           # None: only hooks are of interest; no logits without a hook there

b batch; an image has one row of logits, a text one a position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy
from jaxtyping import Float
from torch import Tensor

from gatedlens.errors import InputError

RETURN_TYPES = ("logits", "loss", "both", None)


@dataclass
class Batch:
    """An input made ready: `value` is tokens [batch, pos] (or images), or the residual stream if `is_resid`."""

    value: Tensor
    mask: Tensor | None = None
    is_resid: bool = False


class Output(NamedTuple):
    """`logits, loss = model(tokens, return_type="both")`."""

    logits: Float[Tensor, "batch ..."]
    loss: Float[Tensor, ...]


# For editors and type checkers; whoever passes something else gets the error of the function that reads it.
#
# Input          what a model is called on: a text, several, ids [batch, pos] or [pos], images, a Batch that `prepare` made,
#                a tokenizer's mapping
# Array          numbers: a tensor, numpy's array, lists
# Option         what `forward` takes beside its input; run_with_cache and run_with_hooks hand it on
# Earlier        what blocks before the first that runs hand on: the cache of a run, or activations by point
# ForwardOutput  what `forward` gives: logits, a loss, a residual stream, or as `return_type` and `return_state` say
if TYPE_CHECKING:
    from gatedlens.model.cache import ActivationCache
    from gatedlens.model.state import RecurrentState

    Input: TypeAlias = str | Sequence[Any] | Mapping[str, Any] | Tensor | Batch
    Earlier: TypeAlias = ActivationCache | Mapping[str, Tensor] | None
    Array: TypeAlias = Tensor | numpy.ndarray[Any, Any] | Sequence[Any]
    Option: TypeAlias = Array | str | int | RecurrentState | Earlier
    ForwardOutput: TypeAlias = Tensor | Output | tuple[Tensor | Output | None, RecurrentState] | None
else:
    Input = Array = Earlier = Option = ForwardOutput = Any


def check_return_type(return_type: Any) -> None:
    """`check_return_type("loss")`; InputError for what is none."""
    if return_type not in RETURN_TYPES:
        raise InputError(f"return_type={return_type!r}: it is 'logits', 'loss', 'both' or None.")

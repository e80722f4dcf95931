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


# What a model is called on: a text, several, ids [batch, pos] or [pos], images, a Batch that `prepare` made, a tokenizer's
# mapping. For editors and type checkers: whoever passes something else gets the error of `prepare`.
if TYPE_CHECKING:
    Input: TypeAlias = str | Sequence[Any] | Mapping[str, Any] | Tensor | Batch
else:
    Input = Any


class Output(NamedTuple):
    """`logits, loss = model(tokens, return_type="both")`."""

    logits: Float[Tensor, "batch ..."]
    loss: Float[Tensor, ...]


def check_return_type(return_type: Any) -> None:
    """`check_return_type("loss")`; InputError for what is none."""
    if return_type not in RETURN_TYPES:
        raise InputError(f"return_type={return_type!r}: it is 'logits', 'loss', 'both' or None.")

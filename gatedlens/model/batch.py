"""Output: what a forward returns, by `return_type`, as in TransformerLens.

    logits = model(tokens)                                    # "logits"
    loss = model(tokens, return_type="loss")
    both = model(tokens, return_type="both"); both.loss       # an Output, also a pair: logits, loss = both
    model(tokens, return_type=None)                           # None: only hooks are of interest; no logits without a hook there

b batch; an image has one row of logits, a text one a position.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from gatedlens.errors import InputError

RETURN_TYPES = ("logits", "loss", "both", None)


class Output(NamedTuple):
    """`logits, loss = model(tokens, return_type="both")`."""

    logits: Float[Tensor, "batch ..."]
    loss: Float[Tensor, ...]


def check_return_type(return_type: Any) -> None:
    """`check_return_type("loss")`; InputError for what is none."""
    if return_type not in RETURN_TYPES:
        raise InputError(f"return_type={return_type!r}: it is 'logits', 'loss', 'both' or None.")

"""Layers of a hybrid by what stands in them, wherever `layers=` is asked for.

    gl.ablation.zero_scan(layers=gl.layers.where(kind="recurrent"))
    gl.knockout.cut(3, -1, layers=gl.layers.where(kind="attention"))
    gl.layers.where(kind="recurrent").of(model)          # their numbers

Kinds: "recurrent" and "attention" of what mixes tokens, "mlp" and "experts" of what mixes channels. A layer of two mixers side
by side is of both kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from gatedlens.address.layers import Where
from gatedlens.errors import InputError

__all__ = ["Where", "where"]

# For editors and type checkers: whoever passes something else gets the error of `where`.
if TYPE_CHECKING:
    Kind: TypeAlias = str | Sequence[str]
else:
    Kind = Any


def where(kind: Kind) -> Where:
    """`gl.layers.where(kind="attention")`: the layers in which that stands, of whichever model it is asked.

    kind: "recurrent", "attention", "mlp", "experts", or several of them, of which one is enough. InputError, once the model is
    known, if none of its layers is of this kind.
    """
    kinds = tuple(kind) if isinstance(kind, list | tuple) else (kind,)
    if not kinds or not all(isinstance(one, str) for one in kinds):
        raise InputError(f"layers.where(kind={kind!r}): give a kind, 'recurrent' or 'attention' say, or several.")
    return Where(kinds)

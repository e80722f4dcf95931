"""Layers of a hybrid by what stands in them, wherever `layers=` is asked for.

    gl.ablation.no_scan(layers=gl.layers.where(kind="recurrent"))
    gl.knockout.cut(3, -1, layers=gl.layers.where(kind="attention"))
    gl.knockout.cut(3, -1, layers=gl.layers.where(kind="attention", layers=[1, 2]))
    gl.layers.where(kind="recurrent").of(model)          # their numbers

Kinds: "recurrent", "attention" and "conv" of what mixes tokens, "mlp" and "experts" of what mixes channels. A layer of two
mixers, side by side (Falcon-H1) or one before the other (Zamba2), is of both kinds; then what acts on mixers (knockout,
implicit attention and what is made of it) acts on those of the kind alone, and on both without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from gatedlens.address.layers import Layers, Where
from gatedlens.errors import InputError

__all__ = ["Where", "where"]

# For editors and type checkers: whoever passes something else gets the error of `where`.
if TYPE_CHECKING:
    Kind: TypeAlias = str | Sequence[str]
else:
    Kind = Any


def where(kind: Kind, layers: Layers = None) -> Where:
    """`gl.layers.where(kind="attention")`: the layers in which that stands, of whichever model it is asked.

    kind: "recurrent", "attention", "conv", "mlp", "experts", or several of them, of which one is enough. layers: of these alone.
    InputError, once the model is known, if none of its layers, or of these, is of this kind.
    """
    kinds = tuple(kind) if isinstance(kind, list | tuple) else (kind,)
    if not kinds or not all(isinstance(one, str) for one in kinds):
        raise InputError(f"layers.where(kind={kind!r}): give a kind, 'recurrent' or 'attention' say, or several.")
    return Where(kinds, layers)

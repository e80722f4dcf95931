"""What every picture needs: labels, colour bars, panels, and numbers from whatever is drawn.

matplotlib is an extra and imported when a figure is asked for. Its math text is off: a `$` in a token or a title is a `$`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from gatedlens.attention.contributions import Contributions
from gatedlens.attention.layer import ImplicitAttention
from gatedlens.attention.stack import AttentionStack
from gatedlens.errors import InputError
from gatedlens.foreign import Image
from gatedlens.options import checked

UNSAID = "attention"  # what a number is where neither the caller nor the view says it
MAX_LABELS = 80  # token labels an axis can hold and stay legible

# What is drawn: numbers, or an attention, whose mean is meant. For type checkers: something else is an InputError.
if TYPE_CHECKING:
    Matrix: TypeAlias = Tensor | Sequence[Any] | ImplicitAttention | Contributions
    Matrices: TypeAlias = AttentionStack | Mapping[Any, Matrix] | Sequence[Matrix] | ImplicitAttention | Tensor
    Pixels: TypeAlias = Tensor | Sequence[Any] | Image
else:
    Matrix = Matrices = Pixels = Any


def pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'gatedlens[plot]'.") from error
    return plt


def label(token: object) -> str:
    """`gl.plot.label(token)`: a token as it can stand in a plot: white space made visible, and what has no sign of its own
    by its code.
    """
    shown = str(token).replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
    shown = "".join(ascii(c)[1:-1] if unicodedata.category(c) in ("Cc", "Cs") else c for c in shown)
    return shown if shown else "∅"


def plain(*texts: Any) -> None:
    """Math text off, in texts of matplotlib: every sign stands for itself."""
    for one in texts:
        one.set(parse_math=False, usetex=False)


@checked
def label_axis(ticks: Any, names: Sequence[str], places: Sequence[int] | None = None, **style: Any) -> None:
    """`label_axis(ax.set_xticks, names)`: a label at each place (0, 1, ...), every sign of it for itself."""
    ticks(range(len(names)) if places is None else places, names, parse_math=False, usetex=False, **style)


def colour_bar(shown: Any, ax: Any, value: str, shrink: float = 0.8) -> None:
    """The bar of a picture, which says what a number is."""
    bar = ax.figure.colorbar(shown, ax=ax, shrink=shrink)
    bar.set_label(value, parse_math=False, usetex=False)


@checked
def farthest(values: Tensor) -> float:
    """How far the farthest number is from 0; what is no number counts for nothing."""
    finite = values[values.isfinite()]
    return max(float(finite.abs().max()), 1e-12) if finite.numel() else 1.0


@checked
def labels_of(attention: ImplicitAttention | AttentionStack, row: int = 0) -> list[str]:
    """`gl.plot.labels_of(attention)`: the tokens that an attention is of as strings, where there are any; else the
    positions' numbers.
    """
    source = attention.cache if isinstance(attention, AttentionStack) else attention
    tokens, model = source.tokens, source.model
    if tokens is None or tokens.ndim != 2:
        one = next(iter(attention)) if isinstance(attention, AttentionStack) else attention
        return [str(position) for position in range(one.shape[1])]
    if model.tokenizer is None:
        return [str(token) for token in tokens[row].tolist()]
    return list(model.to_str_tokens(tokens[row]))


def numbers_of(values: Any, who: str) -> Tensor:
    """What is to be drawn as a tensor, with the label it carries."""
    if isinstance(values, AttentionStack):
        raise InputError(f"{who} draws one matrix, and this is a stack of {len(values)} layers: gl.plot.layers(stack).")
    if isinstance(values, Contributions):
        raise InputError(f"{who} draws numbers: take contributions.norms()[0], or contributions.along(direction)[0].")
    if isinstance(values, ImplicitAttention):
        return values.mean()
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{who} draws numbers, not a {type(values).__name__}: {error}.") from error


@checked
def panels(rows: int, columns: int, size: float = 5.0) -> tuple[Any, Any]:
    """`figure, axes = gl.plot.panels(2, 3)`: (figure, axes [rows, columns]): an empty figure of square panels, for the
    `ax` of the others.
    """
    return pyplot().subplots(
        rows, columns, figsize=(size * columns, (size - 0.6) * rows), squeeze=False, layout="constrained"
    )

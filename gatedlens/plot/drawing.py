"""What every picture needs: labels, colour bars, and numbers from whatever is drawn. What size it has says `sheet.py`.

matplotlib is an extra and imported when a figure is asked for. Its math text is off: a `$` in a token or a title is a `$`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from gatedlens.attention.contributions import Contributions
from gatedlens.attention.layer import ImplicitAttention
from gatedlens.attention.stack import AttentionStack
from gatedlens.errors import InputError
from gatedlens.foreign import Image
from gatedlens.options import checked
from gatedlens.result.labelled_tensor import LabelledTensor

UNSAID = "attention"  # what a number is where neither the caller nor the view says it
LONGEST = 24  # signs of a label that stand at an axis
FONTS = (9.0, 8.0, 7.0, 6.0)  # points, the largest that fits; of what does not fit at the last every k-th label stands
LINE = 1.3 / 72  # inches of a line, a point of its font
BAR = 6.0  # inches of a colour bar, at most
MARK = "…"  # behind a label after which others are left out

# What is drawn: numbers, or an attention, whose mean is meant. For type checkers: something else is an InputError.
if TYPE_CHECKING:
    Matrix: TypeAlias = Tensor | Sequence[Any] | ImplicitAttention | Contributions
    Matrices: TypeAlias = AttentionStack | Mapping[Any, Matrix] | Sequence[Matrix] | ImplicitAttention | Tensor
    Pixels: TypeAlias = Tensor | Sequence[Any] | Image
else:
    Matrix = Matrices = Pixels = Any


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


def wrapped(said: str, signs: int) -> str:
    """A title or the name of a number in lines of so many signs."""
    return fill(said, max(signs, 12), break_long_words=False)


# -- labels that fit -----------------------------------------------------------------------------------------------


def inches(ax: Any, axis: str) -> float:
    """How long an axis of matplotlib is, before its figure is laid out."""
    box = ax.get_window_extent()
    return float(box.width if axis == "x" else box.height) / ax.figure.dpi


def fitted(labels: Sequence[Any], room: float) -> tuple[list[int], list[str], float]:
    """(places, names, points): the labels that fit on an axis of `room` inches, and how large.

    All of them, if they do; else every k-th, with a mark for those between, and its number where names occur again.
    """
    names = [_short(label(given)) for given in labels]
    each = room / max(len(names), 1)
    for points in FONTS:
        if points * LINE <= each:
            return list(range(len(names))), names, points
    step = -(-int(1000 * FONTS[-2] * LINE) // max(int(1000 * each), 1))
    places = list(range(0, len(names), step))
    alike = len(set(names)) < len(names)  # tokens that occur again: which one is meant?
    numbered = [f"{i} {names[i]}" if alike else names[i] for i in places]
    return places, [f"{name} {MARK}" for name in numbered], FONTS[-2]


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}{MARK}"


def label_axis(ax: Any, axis: str, labels: Sequence[Any], room: float | None = None) -> None:
    """`label_axis(ax, "x", tokens)`: a label at 0, 1, ..., or at every k-th where more do not fit into `room` inches (None: the
    axis as it stands); every sign of a label for itself.
    """
    room = inches(ax, axis) if room is None else room
    places, names, points = fitted(labels, room)
    style: dict[str, Any] = {"fontsize": points, "parse_math": False, "usetex": False}
    if axis == "x":
        longest, each = max(map(len, names), default=0), room / max(len(names), 1)
        style["rotation"] = 90 if longest > 2 or longest * 0.7 * points / 72 > 0.8 * each else 0
        ax.set_xticks(places, names, **style)
    else:
        ax.set_yticks(places, names, **style)


# -- numbers ---------------------------------------------------------------------------------------------------------


def colour_bar(shown: Any, axes: Any, value: str, height: float, shrink: float = 0.9) -> Any:
    """The bar of a picture, `height` inches high, which says what a number is. axes: one, or all that share the colours."""
    figure = (axes if not isinstance(axes, list) else axes[0]).figure
    shrink = min(shrink, BAR / height)
    bar = figure.colorbar(shown, ax=axes, shrink=shrink, aspect=max(8.0, 7.0 * height * shrink))
    bar.ax.tick_params(labelsize=8)
    bar.set_label(wrapped(value, int(height * shrink * 12)), parse_math=False, usetex=False, fontsize=9)
    return bar


def colour(share: float) -> str:
    """A background for a value in [-1, 1]: red above zero, blue below, none for what is no number."""
    share = share if share == share else 0.0
    r, g, b = (214, 40, 40) if share > 0 else (29, 78, 216)
    return f"rgba({r},{g},{b},{min(abs(share), 1):.3f})"


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
    return attention.words(row)


def words_of(matrix: Any) -> Sequence[str] | None:
    """The tokens that a [dst, src] matrix carries, or an attention is of; None where it has none."""
    if isinstance(matrix, ImplicitAttention):
        return matrix.words()
    if isinstance(matrix, LabelledTensor) and matrix.axes and matrix.axes[-2:] == ("dst", "src"):
        here, there = (matrix.labels.get(axis) for axis in ("dst", "src"))
        return here if here == there else None
    return None


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

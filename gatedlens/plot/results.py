"""The figure of a Result: bars for one axis, a heat map for two, one heat map an entry of the first axis for three."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import Any

import torch

from gatedlens.errors import InputError
from gatedlens.foreign import Axes, Figure
from gatedlens.plot.drawing import MAX_LABELS, colour_bar, farthest, label, label_axis, panels, plain
from gatedlens.result.result import Result

MAX_PANELS = 24


def result(found: Result, ax: Axes | None = None) -> Figure:
    """`gl.plot.result(found)`, or `found.plot()`: a Figure titled by what was done, with axis names, labels and what a
    number is.
    """
    if not 1 <= len(found.axes) <= 3:
        raise InputError(f"A plot shows one to three axes; this has {found.axes}. Take entries with .at(axis=...).")
    if not found.values.numel():
        raise InputError(f"There is nothing to plot: the axes {found.axes} have {list(found.values.shape)} entries.")
    if len(found.axes) == 3:
        return _panels(found, ax)
    if ax is None:
        along = found.size(found.axes[-1])
        width = min(4.5 + 0.22 * along, 16)
        height = 4.0 if len(found.axes) == 1 else min(2.2 + 0.3 * found.size(found.axes[0]), 14)
        figure, axes = panels(1, 1)
        ax = axes[0][0]
        figure.set_size_inches(width, max(height, 3.0))
    return _bars(found, ax) if len(found.axes) == 1 else _map(found, ax, _bound(found))


def _bound(found: Result) -> float:
    """How far the farthest number is from the baseline."""
    return farthest(found.values - found.baseline)


def _bars(found: Result, ax: Any) -> Any:
    (axis,) = found.axes
    values = found.values.detach().float().cpu()
    colours = ["#b2182b" if v > found.baseline else "#2166ac" for v in values.tolist()]
    heights = (values - found.baseline).masked_fill(~values.isfinite(), torch.nan)  # no bar
    ax.bar(range(len(values)), heights, bottom=found.baseline, color=colours)
    ax.axhline(found.baseline, color="black", linewidth=0.6)
    plain(ax.set_title(found.title), ax.set_xlabel(axis), ax.set_ylabel(fill(found.value, 32)))
    _ticks(ax.set_xticks, found[axis], vertical=True)
    return ax.figure


def _map(found: Result, ax: Any, bound: float) -> Any:
    values = found.values.detach().float().cpu()
    zero, signed = found.baseline, bool((values < found.baseline).any())
    colours, least = ("RdBu_r", zero - bound) if signed else ("Reds", zero)
    shown = ax.imshow(values, aspect="auto", cmap=colours, vmin=least, vmax=zero + bound)
    rows, columns = found.axes
    plain(ax.set_title(found.title), ax.set_ylabel(rows), ax.set_xlabel(columns))
    _ticks(ax.set_yticks, found[rows], vertical=False)
    _ticks(ax.set_xticks, found[columns], vertical=True)
    colour_bar(shown, ax, fill(found.value, 24), shrink=0.9)
    return ax.figure


def _ticks(ticks: Any, labels: Sequence[Any], vertical: bool) -> None:
    """Every label while they fit; every n-th of more."""
    names = [label(given) for given in labels]
    step = -(-len(names) // MAX_LABELS)
    small = 9 if len(names) <= 32 else 7 if len(names) <= 56 else 5
    turned = vertical and max(map(len, names)) > 2
    places = range(0, len(names), step)
    label_axis(ticks, [names[i] for i in places], places, rotation=90 if turned else 0, fontsize=small)


def _panels(found: Result, ax: Any) -> Any:
    first, size = found.axes[0], found.size(found.axes[0])
    if ax is not None or size > MAX_PANELS:
        why = "into one ax" if ax is not None else f"for {size} entries of {first!r} (at most {MAX_PANELS})"
        raise InputError(
            f"Three axes take a panel for each {first}: they cannot be drawn {why}. Take .at({first}=...)."
        )
    columns = min(size, 4)
    figure, axes = panels(-(-size // columns), columns)
    bound = _bound(found)
    for i, one in enumerate(axes.flat):
        if i >= size:
            one.remove()
            continue
        part = found._without(first, found.values[i])
        _map(part, one, bound)
        plain(one.set_title(f"{first} {label(found[first][i])}"))
    plain(figure.suptitle(found.title))
    return figure


def words(found: Result, cells: Sequence[Sequence[str]], ax: Axes | None = None) -> Figure:
    """A heat map with a word in each cell: `found` [rows, columns] and as many words. Returns the Figure."""
    figure = result(found, ax)
    axes = figure.axes[0] if ax is None else ax
    longest = max((len(word) for row in cells for word in row), default=1)
    if ax is None:
        width = max(0.22, 0.1 * min(longest, 12)) * len(cells[0])
        figure.set_size_inches(min(4.5 + width, 30), figure.get_size_inches()[1])
    bound = _bound(found)
    for y, row in enumerate(cells):
        for x, word in enumerate(row):
            dark = abs(float((found.values[y, x] - found.baseline).nan_to_num())) > 0.6 * bound
            colour = "white" if dark else "black"
            plain(axes.text(x, y, label(word)[:12], ha="center", va="center", fontsize=7, color=colour))
    return figure

"""The figure of a Result: bars for one axis, a heat map for two, one heat map an entry of the first axis for three.

An axis with one entry is no axis of the picture: the title says which entry it is. Results whose facts say `"scale": "log"`
(ranks) are drawn on a logarithmic scale with the smallest number, the best, dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gatedlens.errors import InputError
from gatedlens.foreign import Axes, Figure
from gatedlens.plot.backends import plotly
from gatedlens.plot.drawing import colour_bar, farthest, inches, label, label_axis, plain, wrapped
from gatedlens.plot.sheet import grid, room, sheet
from gatedlens.result.result import Result

MAX_PANELS = 72
FEW = 4  # panels: so many have labels each
WORDS = 24  # positions whose words are legible side by side
RED, BLUE = "#b2182b", "#2166ac"


def result(found: Result, ax: Axes | None = None, backend: str = "matplotlib") -> Figure:
    """`gl.plot.result(found)`, or `found.plot()`: a Figure titled by what was done, with axis names, labels and what a
    number is. backend="plotly": one to hover over, of one or two axes.
    """
    if not 1 <= len(found.axes) <= 3:
        raise InputError(f"A plot shows one to three axes; this has {found.axes}. Take entries with .at(axis=...).")
    if not found.values.numel():
        raise InputError(f"There is nothing to plot: the axes {found.axes} have {list(found.values.shape)} entries.")
    found = squeezed(found)
    if plotly(backend, ax):
        from gatedlens.plot.interactive import of_result

        return of_result(found)
    if len(found.axes) == 3:
        return _panels(found, ax)
    if ax is None:
        ax = _sheet(found)
    return _bars(found, ax) if len(found.axes) == 1 else _map(found, ax)


def squeezed(found: Result) -> Result:
    """Without the axes that have one entry, which the title names instead; the last axis stays."""
    title, out = found.title, found
    for axis in found.axes:
        if out.size(axis) == 1 and len(out.axes) > 1:
            title += f", {axis} {label(out[axis][0])}"
            out = out._without(axis, out.values.select(out.dim(axis), 0))
    return out._titled(title) if out is not found else found


def _sheet(found: Result) -> Any:
    """One panel, as large as its labels need it."""
    width = room(found.size(found.axes[-1]), 0.2, 3.4, 11.4) + 2.4
    if len(found.axes) == 1:
        return sheet(width, 3.6)
    return sheet(width, room(found.size(found.axes[0]), 0.2, 1.2, 13.0) + 2.0)


def limits(found: Result) -> tuple[float, float]:
    """The least and the largest number that have a colour of their own, seen from the baseline."""
    bound = farthest(found.values - found.baseline)
    signed = bool((found.values < found.baseline).any())
    return found.baseline - bound * signed, found.baseline + bound


def is_log(found: Result) -> bool:
    return found.facts.get("scale") == "log" and not bool((found.values < 0).any())


def _bars(found: Result, ax: Any) -> Any:
    (axis,) = found.axes
    values = found.values.detach().float().cpu()
    colours = [RED if v > found.baseline else BLUE for v in values.tolist()]
    heights = (values - found.baseline).masked_fill(~values.isfinite(), torch.nan)  # no bar
    ax.bar(range(len(values)), heights, bottom=found.baseline, color=colours, width=0.8 if len(values) < 150 else 1.0)
    ax.axhline(found.baseline, color="black", linewidth=0.6)
    ax.set_xlim(-0.7, len(values) - 0.3)
    ax.ticklabel_format(axis="y", useOffset=False)
    if is_log(found):
        ax.set_yscale("symlog")
    plain(ax.set_title(wrapped(found.title, int(inches(ax, "x") * 10))), ax.set_xlabel(axis))
    plain(ax.set_ylabel(wrapped(found.value, int(inches(ax, "y") * 11))))
    label_axis(ax, "x", found[axis])
    return ax.figure


def _map(found: Result, ax: Any) -> Any:
    shown = _image(found, ax, limits(found))
    rows, columns = found.axes
    title = wrapped(found.title, int(inches(ax, "x") * 10))
    plain(ax.set_title(title), ax.set_ylabel(rows), ax.set_xlabel(columns))
    _bar(found, shown, ax, inches(ax, "y"))
    return ax.figure


def _image(
    found: Result,
    ax: Any,
    ends: tuple[float, float],
    sides: str = "xy",
    rooms: tuple[float | None, float | None] = (None, None),
) -> Any:
    """The colours of a Result with two axes, with labels on some sides; rooms: inches of the axes (None: as they stand)."""
    values = found.values.detach().float().cpu()
    if is_log(found):
        from matplotlib.colors import LogNorm

        most = max(float(values[values.isfinite()].max()) if bool(values.isfinite().any()) else 0.0, 1.0)
        shown = ax.imshow(values + 1, aspect="auto", cmap="Blues_r", norm=LogNorm(1, most + 1))
    else:
        colours = "RdBu_r" if ends[0] < found.baseline else "Reds"
        shown = ax.imshow(values, aspect="auto", cmap=colours, vmin=ends[0], vmax=ends[1])
    for side, axis, inner in zip("yx", found.axes, rooms, strict=True):
        if side in sides:
            label_axis(ax, side, found[axis], inner)
        else:
            (ax.set_xticks if side == "x" else ax.set_yticks)([])
    return shown


def _bar(found: Result, shown: Any, axes: Any, height: float) -> None:
    bar = colour_bar(shown, axes, found.value, height)
    if is_log(found):
        most = int(shown.norm.vmax) - 1
        ticks = [0, *(10**i for i in range(8) if 10**i <= most)]
        bar.set_ticks([one + 1 for one in ticks], labels=[f"{one:,}" for one in ticks])
        bar.minorticks_off()


def _panels(found: Result, ax: Any) -> Any:
    first, size = found.axes[0], found.size(found.axes[0])
    if ax is not None or size > MAX_PANELS:
        why = "into one ax" if ax is not None else f"for {size} entries of {first!r} (at most {MAX_PANELS})"
        raise InputError(
            f"Three axes take a panel for each {first}: they cannot be drawn {why}. Take .at({first}=...)."
        )
    rows, columns = (found.size(axis) for axis in found.axes[1:])
    width = room(columns, 0.16, 1.6, 6.0 if size <= FEW else 3.6)
    height = room(rows, 0.16, 1.2, 6.0 if size <= FEW else 3.0 if size <= 24 else 2.2)
    figure, axes = grid(size, width + (1.3 if size <= FEW else 0.3), height + (1.2 if size <= FEW else 0.4), 1.2)
    ends, many = limits(found), size > FEW
    for i, row in enumerate(axes):
        for j, one in enumerate(row):
            place = i * len(axes[0]) + j
            below = i + 1 < len(axes) and j < len(axes[i + 1])
            sides = ("" if many and j else "y") + ("" if many and below else "x")
            shown = _image(found._without(first, found.values[place]), one, ends, sides, (height, width))
            plain(one.set_title(f"{first} {label(found[first][place])}", fontsize=10))
            if "y" in sides:
                plain(one.set_ylabel(found.axes[1]))
            if "x" in sides:
                plain(one.set_xlabel(found.axes[2]))
    _bar(found, shown, [one for row in axes for one in row], figure.get_size_inches()[1])
    plain(figure.suptitle(wrapped(found.title, int(9 * figure.get_size_inches()[0]))))
    return figure


def words(found: Result, cells: Sequence[Sequence[str]], ax: Axes | None = None) -> Figure:
    """A heat map with a word in each cell: `found` [rows, columns] and as many words. Returns the Figure.

    Of more columns than have room for words the last ones are shown, which the title says.
    """
    rows, columns = found.axes
    total = found.size(columns)
    if total > WORDS:
        found = found.some(**{columns: slice(-WORDS, None)})
        found = found._titled(f"{found.title} (the last {WORDS} of {total}: choose others by {columns}=slice(...))")
        cells = [row[-WORDS:] for row in cells]
    if ax is None:
        longest = min(max((len(label(word)) for row in cells for word in row), default=1), 10)
        width = room(found.size(columns), 0.14 + 0.075 * longest, 3.4, 13.0) + 2.4
        ax = sheet(width, room(found.size(rows), 0.22, 1.2, 16.0) + 2.0)
    figure = _map(found, ax)
    each = inches(ax, "x") / found.size(columns)
    fits, (least, most) = max(int((each - 0.03) / 0.062), 2), limits(found)
    for y, row in enumerate(cells):
        for x, word in enumerate(row):
            dark = abs(float((found.values[y, x] - found.baseline).nan_to_num())) > 0.6 * max(most, -least)
            name = label(word)
            name = name if len(name) <= fits else f"{name[: fits - 1]}…"
            plain(ax.text(x, y, name, ha="center", va="center", fontsize=7, color="white" if dark else "black"))
    return figure

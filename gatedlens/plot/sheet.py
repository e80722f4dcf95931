"""Sheet: how large a picture is, and where its panels stand.

    ax = sheet(6.0, 4.0)                                  # one empty panel of 6 x 4 inches, in a Picture of its own
    figure, axes = grid(12, 3.0, 2.5)                     # twelve panels of that size, side by side as far as they go

A picture is as large as its labels need it, and at most as wide as a page shows: what is wider is scaled down there, and
then nobody reads it.
"""

from __future__ import annotations

import math
from typing import Any

from gatedlens.options import checked

WIDEST = 14.0  # inches of a picture


def room(entries: int, each: float, least: float, most: float) -> float:
    """Inches of an axis: `each` for an entry, but not less or more than what it may be."""
    return min(max(each * entries, least), most)


def sheet(width: float, height: float) -> Any:
    """One empty panel of its own, in inches with all that stands around it."""
    return _picture(width, height).subplots()


def grid(count: int, width: float, height: float, beside: float = 0.0) -> tuple[Any, list[list[Any]]]:
    """(figure, rows of panels): `count` panels of a size, in rows that make the whole about one and a half times as wide as
    high, and no wider than `WIDEST`. What is left over of the last row is empty; `beside` is for a bar that all share.
    """

    def off(columns: int) -> float:
        rows = -(-count // columns)
        return abs(math.log(columns * width / (rows * height) / 1.5)) + 0.5 * (rows * columns - count) / count

    columns = min(range(1, max(2, min(count, int(WIDEST // width)) + 1)), key=off)
    rows = -(-count // columns)
    figure = _picture(columns * width + beside, rows * height + 0.5)
    axes = [list(row) for row in figure.subplots(rows, columns, squeeze=False)]
    for ax in axes[-1][columns - (rows * columns - count) :]:
        ax.remove()
    return figure, [[*axes[i][: min(columns, count - i * columns)]] for i in range(rows)]


@checked
def panels(rows: int, columns: int, size: float = 5.0) -> tuple[Any, Any]:
    """`figure, axes = gl.plot.panels(2, 3)`: (figure, axes [rows, columns]): an empty figure of square panels, for the
    `ax` of the others.
    """
    figure = _picture(size * columns, (size - 0.6) * rows)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _picture(width: float, height: float) -> Any:
    try:
        from gatedlens.plot.picture import Picture
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'gatedlens[plot]'.") from error
    return Picture(figsize=(width, height), layout="constrained")

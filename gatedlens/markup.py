"""Markup: how a value shows itself in a notebook: a short table, with its picture where there is one.

    card("AttentionStack: mamba-130m", {"layers": "0 to 23", "positions": 12}, table(["layer", "share"], rows), picture(figure))
    number(-3.2e-5)                          # "-3.2e-05": four figures, whatever the size; never "-0.0000"

What stands in a cell is escaped. Nothing is fetched, and nothing has a colour of its own, so it is legible on dark pages and on
light ones. The text repr stays one line.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

BORDER = "border:1px solid rgba(128,128,128,.4)"
ROWS = 12  # of a table; of longer ones the first and the last stand
CELL = "text-align:left;padding:2px 10px 2px 0;vertical-align:top"


def number(value: float, figures: int = 4, sign: str = "") -> str:
    """`number(0.123456)`: "0.1235": so many figures of a number; sign="+": with its sign. 0 is 0, never "-0.0000"."""
    return f"{value + 0.0:{sign}.{figures}g}"  # -0.0 + 0.0 is 0.0


def shown(value: object) -> str:
    """What a cell shows: numbers in four figures, all else as text, escaped."""
    return html.escape(number(value) if isinstance(value, float) else str(value))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], most: int = ROWS) -> str:
    """`table(["layer", "share"], [(0, 0.5)])`: a table; of more than `most` rows the first and the last."""
    lines = [list(row) for row in rows]
    head = "".join(f"<th style='{CELL}'>{html.escape(column)}</th>" for column in columns)
    kept = most * 2 // 3 if len(lines) > most else len(lines)
    last = lines[len(lines) - (most - kept) :] if len(lines) > most else []
    body = "".join(map(_row, lines[:kept]))
    if last:
        between = len(lines) - kept - len(last)
        body += f"<tr><td style='{CELL};opacity:.7' colspan='{len(columns)}'>… {between:,} more …</td></tr>"
    return (
        f"<table style='border-collapse:collapse;margin:.3em 0'><tr>{head}</tr>{body}{''.join(map(_row, last))}</table>"
    )


def _row(cells: Sequence[object]) -> str:
    return "<tr>" + "".join(f"<td style='{CELL}'>{shown(cell)}</td>" for cell in cells) + "</tr>"


def card(title: str, facts: Mapping[str, object] | None = None, *parts: str) -> str:
    """`card("LogitLens: mamba-130m", {"positions": 12}, table(...))`: a title, a line of facts, and parts that are HTML."""
    said = " · ".join(f"{html.escape(name)} {shown(value)}" for name, value in (facts or {}).items())
    line = f"<div style='opacity:.8'>{said}</div>" if said else ""
    return (
        f"<div style='margin:.3em 0;overflow-x:auto'><div><b>{html.escape(title)}</b></div>{line}{''.join(parts)}</div>"
    )


def picture(draw: Callable[[], Any]) -> str:
    """`picture(result.plot)`: what a function draws as a part of a card; nothing without matplotlib."""
    try:
        figure = draw()
    except ImportError:
        return ""
    said = figure._repr_html_()  # of coloured text; matplotlib's figures give None
    if said is not None:
        return str(said)
    data = base64.b64encode(figure._repr_png_()).decode()
    return f"<img style='max-width:100%;background:#fff' alt='' src='data:image/png;base64,{data}'>"

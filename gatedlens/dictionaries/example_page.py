"""A feature's page: how often it fires, how strongly, at which tokens, what it writes, and the texts themselves."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import NamedTuple

from gatedlens.dictionaries.example import Example
from gatedlens.markup import BORDER, number
from gatedlens.plot.coloured_text import legend, style
from gatedlens.plot.drawing import label


class Shown(NamedTuple):
    """What a page says of a feature beside its Examples: the share of positions at which it fires; how many are in each part of
    its values; tokens with the mean value there; those that its decoder row speaks for, and against (None: it writes elsewhere).
    """

    rate: float
    bars: Sequence[int]
    firing: Sequence[tuple[str, float]]
    writes: tuple[tuple[str, ...], tuple[str, ...]] | None


def section(feature: int, found: Sequence[Example], shown: Shown) -> str:
    """`section(17, found, shown)`: what a page says of one feature, as HTML."""
    head = f"<h2 style='font-size:1.1em;margin:1.2em 0 .2em'>feature {feature}</h2>"
    if not found:
        return f"{head}<p>It fires nowhere here.</p>"
    top = found[0].value
    said = [f"fires at {shown.rate:.2%} of the positions, up to {number(top)}"]
    said.append("at " + ", ".join(f"{_code(word)} ({number(mean)})" for word, mean in shown.firing))
    if shown.writes is not None:
        up, down = shown.writes
        said.append(f"writes for {', '.join(map(_code, up))}; against {', '.join(map(_code, down))}")
    lines = "".join(f"<div>{line}</div>" for line in said)
    rows = "".join(_row(example, top) for example in found)
    table = f"<div style='overflow-x:auto'><table style='border-collapse:collapse;margin:.4em 0'>{rows}</table></div>"
    return f"{head}{lines}{_bars(shown.bars, top)}{table}{legend(0.0, top, 'activation')}"


def _code(word: str) -> str:
    return f"<code>{html.escape(label(word))}</code>"


def _row(example: Example, top: float) -> str:
    spans = ""
    for i, (word, value) in enumerate(zip(example.words, example.activations, strict=True)):
        hover = html.escape(f"{word!r}: {number(value)}", quote=True)
        mark = ";outline:2px solid currentColor" if i == example.at else ""
        spans += f"<span title='{hover}' style='{style(value / top)}{mark}'>{html.escape(label(word))}</span>"
    cell = "padding:2px 10px 2px 0;vertical-align:top;white-space:nowrap"
    where = f"sample {example.sample}, position {example.pos}"
    return (
        f"<tr><td style='{cell}'>{number(example.value)}</td>"
        f"<td style='font-family:monospace;line-height:1.9'>{spans}</td>"
        f"<td style='{cell};opacity:.7;padding-left:10px'>{where}</td></tr>"
    )


def _bars(counts: Sequence[int], top: float) -> str:
    """How often which values occur: a bar for each twentieth of the largest."""
    most = max(max(counts), 1)
    bars = "".join(
        f"<span title='{number(i * top / len(counts))} to {number((i + 1) * top / len(counts))}: {count}' "
        f"style='display:inline-block;width:.6em;height:{2.2 * count / most:.2f}em;background:rgba(214,40,40,.6)'></span>"
        for i, count in enumerate(counts)
    )
    ends = f"<small>0</small> {bars} <small>{number(top)}</small>"
    return f"<div style='margin:.3em 0;{BORDER};display:inline-block;padding:.2em .4em' title='values above 0'>{ends}</div>"

"""The figures of plotly, to hover over: heat maps, bars, token maps and circuits. `backend="plotly"` of the others makes them.

plotly is an extra (`pip install gatedlens[plotly]`) and imported when a figure is asked for.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gatedlens.files import optional
from gatedlens.plot.drawing import colour, farthest, label
from gatedlens.result.result import Result

SIGNED, POSITIVE, BEST_DARK = "RdBu_r", "Blues", "Blues_r"
LINE = 64  # signs of a line of tokens
TICKS = 40  # labels of an axis


def _go() -> Any:
    return optional("plotly.graph_objects", "plotly")


def heat(
    data: Tensor,
    down: Sequence[Any] | None,
    across: Sequence[Any] | None,
    axes: tuple[str, str],
    title: str,
    value: str,
    scale: str = POSITIVE,
    baseline: float = 0.0,
) -> Any:
    """A heat map [down, across]: hover for both labels, their numbers and the value."""
    go, numbers = _go(), data.detach().double().cpu()
    bound, signed = farthest(numbers - baseline), bool((numbers < baseline).any())
    names = [_names(given, size) for given, size in zip((down, across), numbers.shape, strict=True)]
    said = [[f"{a} ({i})<br>{b} ({j})" for j, b in enumerate(names[1])] for i, a in enumerate(names[0])]
    shown = go.Heatmap(
        z=[[v if v == v else None for v in row] for row in numbers.tolist()],
        colorscale=SIGNED if signed else scale,
        zmin=baseline - bound if signed else baseline,
        zmax=baseline + bound,
        text=said,
        hovertemplate="%{text}<br>%{z:.4g}<extra></extra>",
        colorbar={"title": {"text": html.escape(value), "side": "right"}},
    )
    figure = go.Figure(shown)
    high, wide = (min(max(18 * size, 220), 900) for size in numbers.shape)
    figure.update_layout(title=html.escape(title), width=wide + 220, height=high + 180)
    figure.update_yaxes(title=html.escape(axes[0]), autorange="reversed", **_ticks(names[0]))
    figure.update_xaxes(title=html.escape(axes[1]), **_ticks(names[1]))
    return figure


def _names(given: Sequence[Any] | None, size: int) -> list[str]:
    return [html.escape(label(one)) for one in (range(size) if given is None else given)]


def _ticks(names: Sequence[str]) -> dict[str, Any]:
    """Every label while they fit; every k-th of more."""
    places = list(range(0, len(names), -(-len(names) // TICKS)))
    return {"tickvals": places, "ticktext": [names[i] for i in places]}


def of_result(found: Result) -> Any:
    """The figure of a Result: bars for one axis, a heat map for two; three have one a frame of a slider."""
    go = _go()
    if len(found.axes) == 3:
        return _with_slider(found)
    if len(found.axes) == 2:
        down, across = found.axes
        ranks = found.facts.get("scale") == "log"
        return heat(
            (found.values + 1).log10() if ranks else found.values,
            found[down],
            found[across],
            (down, across),
            found.title,
            f"log10({found.value} + 1)" if ranks else found.value,
            BEST_DARK if ranks else "Reds",
            0.0 if ranks else found.baseline,
        )
    (axis,) = found.axes
    values, names = found.values.detach().double().cpu().tolist(), _names(found[axis], found.size(axis))
    bars = go.Bar(
        x=list(range(len(names))),
        y=[v - found.baseline if v == v else None for v in values],
        base=found.baseline,
        text=[f"{name} ({i})<br>{v:.4g}" for i, (name, v) in enumerate(zip(names, values, strict=True))],
        textposition="none",
        hovertemplate="%{text}<extra></extra>",
        marker={"color": ["#b2182b" if v > found.baseline else "#2166ac" for v in values]},
    )
    figure = go.Figure(bars)
    figure.update_layout(title=html.escape(found.title), width=min(max(14 * len(names), 420), 1200) + 120, height=380)
    figure.update_xaxes(title=html.escape(axis), **_ticks(names))
    figure.update_yaxes(title=html.escape(found.value))
    return figure


def _with_slider(found: Result) -> Any:
    """A heat map of two axes, and a slider for the first."""
    go, first = _go(), found.axes[0]
    parts = [of_result(found._without(first, values)) for values in found.values]
    bound = farthest(found.values - found.baseline)
    signed = bool((found.values < found.baseline).any())
    ends = {"zmin": found.baseline - bound * signed, "zmax": found.baseline + bound}
    figure = go.Figure(layout=parts[0].layout)
    for i, part in enumerate(parts):
        figure.add_trace(part.data[0])
        figure.data[-1].update(visible=i == 0, colorscale=SIGNED if signed else "Reds", **ends)
    steps = [
        {"method": "update", "label": name, "args": [{"visible": [i == j for j in range(len(parts))]}]}
        for i, name in enumerate(_names(found[first], len(parts)))
    ]
    figure.update_layout(sliders=[{"steps": steps, "currentvalue": {"prefix": f"{html.escape(first)} "}}])
    return figure


def token_map(words: Sequence[tuple[str, int, float]], bound: float, title: str, value: str) -> Any:
    """The text in lines, each token (token, position, score) a box of its colour: hover for the number."""
    go, x, y = _go(), 0.0, 0
    figure, ends = go.Figure(), []
    for token, place, score in words:
        name = label(token)
        if x and x + len(name) > LINE:
            x, y = 0.0, y + 1
        share = score / bound
        figure.add_shape(
            type="rect", x0=x, x1=x + len(name), y0=y - 0.42, y1=y + 0.42, fillcolor=colour(share),
            line={"width": 1, "color": "rgba(128,128,128,.35)"}, layer="below",
        )  # fmt: skip
        ends.append((x + len(name) / 2, y, html.escape(name), f"{html.escape(repr(token))} at {place}<br>{score:.4g}"))
        x += len(name) + 0.2
        if "\n" in token:
            x, y = 0.0, y + 1
    figure.add_trace(
        go.Scatter(
            x=[e[0] for e in ends],
            y=[e[1] for e in ends],
            text=[e[2] for e in ends],
            mode="text+markers",
            hovertext=[e[3] for e in ends],
            hoverinfo="text",
            textfont={"family": "monospace", "size": 13},
            marker={
                "color": [score for _, _, score in words],
                "opacity": 0,
                "size": 14,
                "cmin": -bound,
                "cmax": bound,
                "colorscale": [[0, "rgb(29,78,216)"], [0.5, "white"], [1, "rgb(214,40,40)"]],
                "showscale": True,
                "colorbar": {"title": {"text": html.escape(value), "side": "right"}},
            },
        )
    )
    hidden = {"visible": False}
    figure.update_layout(title=html.escape(title), xaxis=hidden, yaxis={**hidden, "autorange": "reversed"})
    figure.update_layout(width=860, height=170 + 30 * (y + 1), plot_bgcolor="white")
    return figure


def circuit(
    places: Mapping[str, tuple[float, float]],
    arcs: Sequence[tuple[str, str, float, float]],
    joined: Sequence[str],
    title: str,
) -> Any:
    """Nodes at their places, and arcs (sender, receiver, score, how far its middle is above the straight line)."""
    go = _go()
    figure, most = go.Figure(), max((abs(score) for *_, score, _ in arcs), default=1.0) or 1.0
    t = torch.linspace(0, 1, 21)
    for sender, receiver, score, above in arcs:
        (x0, y0), (x1, y1) = places[sender], places[receiver]
        x, y = x0 + (x1 - x0) * t, y0 + (y1 - y0) * t + above * 4 * t * (1 - t)
        line = {"width": 0.8 + 6 * abs(score) / most, "color": "#b2182b" if score > 0 else "#2166ac"}
        said = f"{html.escape(sender)} → {html.escape(receiver)}<br>{score:.4g}"
        figure.add_trace(
            go.Scatter(
                x=x.tolist(), y=y.tolist(), mode="lines", line=line, opacity=0.75, hoverinfo="text", hovertext=said
            )
        )
    names = list(places)
    figure.add_trace(
        go.Scatter(
            x=[places[name][0] for name in names],
            y=[places[name][1] for name in names],
            text=[html.escape(name) for name in names],
            mode="markers+text",
            textposition="bottom center",
            hoverinfo="text",
            marker={"size": 12, "color": ["black" if name in joined else "#bdbdbd" for name in names]},
        )
    )
    hidden = {"visible": False}
    figure.update_layout(title=html.escape(title), showlegend=False, xaxis=hidden, yaxis=hidden, plot_bgcolor="white")
    figure.update_layout(width=min(max(90 * len(names), 520), 1300), height=480)
    return figure

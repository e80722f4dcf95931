"""Drawing: the picture of a feature graph. Red edges add, blue ones take away; a circle is a feature, a diamond an error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gatedlens.feature_graph.layout import Layout
from gatedlens.feature_graph.node import ERROR, KINDS, LOGIT, MIXER, TOKEN
from gatedlens.foreign import Axes, Figure
from gatedlens.plot.drawing import label, label_axis, plain, wrapped
from gatedlens.plot.sheet import WIDEST, room, sheet

if TYPE_CHECKING:
    from gatedlens.feature_graph.graph import FeatureGraph
else:  # that file imports this one
    FeatureGraph = Any

RED, BLUE, GREY = (0.84, 0.16, 0.16), (0.11, 0.31, 0.85), "#555555"
MARKERS = {ERROR: "D", TOKEN: "s", LOGIT: "s", MIXER: "h"}
NAMED = 40  # nodes besides tokens and errors, up to which each has its name
FAINT = 0.02  # of the strongest edge: what is weaker is as faint


def draw(graph: FeatureGraph, ax: Axes | None = None) -> Figure:
    """`graph.plot()`: the Figure (that of `ax` if given)."""
    laid = Layout.of(graph)
    width = room(int(laid.width) + 1, 0.42, 6.0, WIDEST)
    if ax is None:
        ax = sheet(width, 1.0 * len(laid.rows) + 1.2)
    from matplotlib.collections import LineCollection

    most = max((abs(edge.weight) for edge in laid.edges), default=1.0) or 1.0
    shares = [max(abs(edge.weight) / most, FAINT) for edge in laid.edges]
    ax.add_collection(
        LineCollection(
            [[laid.places[edge.source], laid.places[edge.target]] for edge in laid.edges],
            colors=[
                (*(RED if edge.weight > 0 else BLUE), 0.25 + 0.65 * share)
                for edge, share in zip(laid.edges, shares, strict=True)
            ],
            linewidths=[0.4 + 2.6 * share for share in shares],
            zorder=1,
        )
    )
    for kind in KINDS:
        spots = [laid.places[node.id] for node in laid.nodes if node.kind == kind]
        across, up = [x for x, _ in spots], [y for _, y in spots]
        ax.scatter(across, up, marker=MARKERS.get(kind, "o"), s=46, facecolor="white", edgecolor=GREY, zorder=2)
    between = [node for node in laid.nodes if node.kind not in (TOKEN, ERROR)]
    named = between if len(between) <= NAMED else [node for node in between if node.kind == LOGIT]
    for node in named:
        x, y = laid.places[node.id]
        name = label(node.said.removeprefix("logit of ").strip("'")) if node.kind == LOGIT else f"{node.rank}"
        plain(ax.annotate(name, (x, y), (0, 6), textcoords="offset points", ha="center", fontsize=7, zorder=3))
    ax.set_ylim(-0.5, len(laid.rows) - 0.4)
    ax.set_xlim(-0.8, laid.width - 0.2)
    ax.set_yticks(range(len(laid.rows)), laid.rows, parse_math=False, usetex=False, fontsize=8)
    label_axis(ax, "x", graph.words)
    names = [text.get_text() for text in ax.get_xticklabels()]
    at = [laid.columns[int(place)] for place in ax.get_xticks()]
    ax.set_xticks(at, names, parse_math=False, usetex=False, fontsize=8)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    shown = "" if not laid.left_out else f", the {len(laid.edges)} strongest edges"
    scores = f"replacement {graph.replacement:.2f}, completeness {graph.completeness:.2f}"
    said = f"Feature graph of {graph.facts.get('model', '')}: {scores}"
    plain(
        ax.set_title(
            wrapped(f"{said}{shown} (red adds, blue takes away; diamonds are errors)", int(width * 12)), fontsize=10
        )
    )
    drawn: Any = ax.figure  # a figure, unless `ax` stands in a part of one
    return drawn

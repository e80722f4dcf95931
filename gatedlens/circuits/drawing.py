"""The picture of a circuit: nodes from left to right in running order, mixers above, MLPs below, the stream between.

Edges are arcs as wide as their |score|, red where the clean value raises the metric and blue where it lowers it, as in
the other plots. Nodes outside the circuit are grey, and left out of a model with many. Of very many edges the strongest stand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gatedlens.foreign import Axes, Figure
from gatedlens.plot.drawing import label, plain, wrapped
from gatedlens.plot.sheet import WIDEST, room, sheet

if TYPE_CHECKING:
    from gatedlens.circuits.circuit import Circuit
else:  # that file draws by this one
    Circuit = Any

HEIGHT = {"mixer": 1.0, "attn": 1.0, "mlp": -1.0}  # by the last word of a node's name; embed and logits lie between
RED, BLUE, GREY = "#b2182b", "#2166ac", "#bdbdbd"
ALL_NODES = 30  # of a larger graph the nodes in the circuit alone
MOST_EDGES, OF_MANY = 150, 60  # the strongest are drawn, of a larger graph fewer
LEGEND = "red raises the metric, blue lowers it"
UP = 0.85  # inches from row to row
Place = tuple[float, float]


def draw(circuit: Circuit, ax: Axes | None = None) -> Figure:
    """`circuit.plot()`: the Figure (that of `ax` if given)."""
    places, totals, said = laid_out(circuit)
    width = room(len(places), 0.95, 5.0, WIDEST)
    top, bottom = _ends(places, totals)
    if ax is None:
        ax = sheet(width, UP * (top - bottom) + 0.9)
    across = width / (len(places) + 0.6)  # inches between neighbours
    points = _points(places, across)
    most = max(map(abs, totals.values()), default=1.0) or 1.0
    for (sender, receiver), score in totals.items():
        boxes = [(len(name) * 0.33 * points / 72 + 0.06, 0.7 * points / 72 + 0.06) for name in (sender, receiver)]
        sizes = [(x / across, y / UP) for x, y in boxes]
        _arc(ax, places[sender], places[receiver], sizes, score, abs(score) / most)
    joined = set(circuit.nodes)
    for name, (x, y) in places.items():
        colour = "black" if name in joined else GREY
        box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": colour}
        plain(ax.text(x, y, label(name), ha="center", va="center", fontsize=points, color=colour, bbox=box, zorder=3))
    ax.set_xlim(-0.8, len(places) - 0.2)
    ax.set_ylim(bottom, top)
    ax.set_axis_off()
    plain(ax.set_title(wrapped(said, int(width * 12)), fontsize=10))
    drawn: Any = ax.figure  # a figure, unless `ax` stands in a part of one
    return drawn


def _points(places: dict[str, Place], across: float) -> float:
    """The size of the nodes' names: the largest in which those of one height stand side by side."""
    points = 9.0
    for (name, (x, y)), others in ((one, places) for one in places.items()):
        near = [(other, there[0] - x) for other, there in others.items() if there[1] == y and there[0] > x]
        if near:
            other, gap = min(near, key=lambda pair: pair[1])
            points = min(points, (gap * across - 0.12) * 72 / (0.33 * (len(name) + len(other))))
    return max(points, 4.5)


def hovered(circuit: Circuit) -> Figure:
    """`circuit.plot(backend="plotly")`: plotly's figure of the same."""
    from gatedlens.plot import interactive

    places, totals, said = laid_out(circuit)
    arcs = [(a, b, score, bend(places[a], places[b])) for (a, b), score in totals.items()]
    figure: Any = interactive.circuit(places, arcs, circuit.nodes, said)
    return figure


def laid_out(circuit: Circuit) -> tuple[dict[str, Place], dict[tuple[str, str], float], str]:
    """(places, scores, title): where each node stands, the score of each edge that is drawn, and what the picture is of."""
    totals = _totals(circuit)
    few = len(circuit.graph) <= ALL_NODES
    strongest = sorted(totals, key=lambda edge: -abs(totals[edge]))[: MOST_EDGES if few else OF_MANY]
    joined = {name for edge in strongest for name in edge}
    names = [name for name in circuit.graph if few or name in joined or name in ("embed", "logits")]
    places, seen = {}, dict[float, int]()
    for i, name in enumerate(names):
        y = HEIGHT.get(name.rpartition(".")[2], 0.0)
        seen[y] = seen.get(y, -1) + 1
        steps = 3 if len(names) > 40 else 2 if len(names) > 14 else 1  # names side by side would overlap
        places[name] = (float(i), y + 0.32 * (seen[y] % steps) * (-1 if y < 0 else 1))
    count = (
        f"{len(totals)} edges"
        if len(strongest) == len(totals)
        else f"the {len(strongest)} strongest of {len(totals)} edges"
    )
    nodes = "" if len(names) == len(circuit.graph) else f", {len(names)} of {len(circuit.graph)} nodes"
    return places, {edge: totals[edge] for edge in strongest}, f"{circuit.scores.title}: {count}{nodes} ({LEGEND})"


def _totals(circuit: Circuit) -> dict[tuple[str, str], float]:
    """The score of each edge, summed over its positions."""
    totals: dict[tuple[str, str], float] = {}
    for edge in circuit.edges:
        key = (edge.sender, edge.receiver)
        totals[key] = totals.get(key, 0.0) + circuit.score(*edge)
    return totals


def bend(start: Place, end: Place) -> float:
    """How far the middle of an arc stands above the straight line: not at all between neighbours, below it among MLPs."""
    far = end[0] - start[0]
    return 0.0 if far <= 1 else (0.42 if start[1] + end[1] >= 0 else -0.42) * math.sqrt(far)


def _ends(places: dict[str, Place], edges: Any) -> tuple[float, float]:
    """What the frame must hold: the nodes, and the middle of every arc."""
    heights = [y for _, y in places.values()]
    heights += [(places[a][1] + places[b][1]) / 2 + bend(places[a], places[b]) for a, b in edges]
    return max([*heights, 0.5]) + 0.45, min([*heights, -0.3]) - 0.45


def _arc(ax: Axes, start: Place, end: Place, sizes: Sequence[Place], score: float, share: float) -> None:
    """A parabola from node to node, in the units of the frame, so that it stays inside: from rim to rim of their boxes, half as
    wide and high as `sizes` say.
    """
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path

    middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 2 * bend(start, end))

    def at(s: float, t: float) -> Place:
        """The blossom of the parabola: its point at t for s = t, and the corner of the piece from s to t."""
        a, b, c = (1 - s) * (1 - t), s * (1 - t) + (1 - s) * t, s * t
        return (a * start[0] + b * middle[0] + c * end[0], a * start[1] + b * middle[1] + c * end[1])

    def outside(t: float, node: Place, size: Place) -> bool:
        x, y = at(t, t)
        return abs(x - node[0]) > size[0] or abs(y - node[1]) > size[1]

    steps = [i / 100 for i in range(101)]
    first = next((t for t in steps if outside(t, start, sizes[0])), 0.0)
    last = next((t for t in reversed(steps) if outside(t, end, sizes[1])), 1.0)
    first, last = (first, last) if first < last else (0.0, 1.0)  # boxes that touch
    path = Path([at(first, first), at(first, last), at(last, last)], [Path.MOVETO, Path.CURVE3, Path.CURVE3])
    colour, width = RED if score > 0 else BLUE, 0.5 + 3.0 * share
    style: dict[str, Any] = {
        "arrowstyle": "-|>",
        "mutation_scale": 7 + 6 * share,
        "color": colour,
        "linewidth": width,
        "alpha": 0.75,
    }
    ax.add_patch(FancyArrowPatch(path=path, zorder=2, **style))

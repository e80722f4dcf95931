"""The picture of a circuit: nodes from left to right in running order, mixers above, MLPs below, the stream between.

Edges are arcs as wide as their |score|, red where the clean value raises the metric and blue where it lowers it, as in
the other plots. Nodes outside the circuit are grey, and left out of a model with many. Of very many edges the strongest are drawn.
"""

from __future__ import annotations

import math
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
ALL_NODES, MOST_EDGES = 30, 150  # of a larger graph the nodes in the circuit alone; of more edges the strongest
LEGEND = "red raises the metric, blue lowers it"
Place = tuple[float, float]


def draw(circuit: Circuit, ax: Axes | None = None) -> Figure:
    """`circuit.plot()`: the Figure (that of `ax` if given)."""
    places, totals, said = laid_out(circuit)
    width = room(len(places), 0.95, 5.0, WIDEST)
    top, bottom = _ends(places, totals)
    if ax is None:
        ax = sheet(width, 0.85 * (top - bottom) + 0.9)
    most = max(map(abs, totals.values()), default=1.0) or 1.0
    for (sender, receiver), score in totals.items():
        _arc(ax, places[sender], places[receiver], score, abs(score) / most)
    joined, points = set(circuit.nodes), min(9.0, max(5.0, 9.0 * width / (0.95 * len(places))))
    for name, (x, y) in places.items():
        colour = "black" if name in joined else GREY
        box = {"boxstyle": "round", "facecolor": "white", "edgecolor": colour}
        plain(ax.text(x, y, label(name), ha="center", va="center", fontsize=points, color=colour, bbox=box, zorder=3))
    ax.set_xlim(-0.8, len(places) - 0.2)
    ax.set_ylim(bottom, top)
    ax.set_axis_off()
    plain(ax.set_title(wrapped(said, int(width * 12)), fontsize=10))
    drawn: Any = ax.figure  # a figure, unless `ax` stands in a part of one
    return drawn


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
    strongest = sorted(totals, key=lambda edge: -abs(totals[edge]))[:MOST_EDGES]
    joined = {name for edge in strongest for name in edge}
    few = len(circuit.graph) <= ALL_NODES
    names = [name for name in circuit.graph if few or name in joined or name in ("embed", "logits")]
    places = {name: (float(i), HEIGHT.get(name.rpartition(".")[2], 0.0)) for i, name in enumerate(names)}
    if not few and len(names) > 14:  # names side by side would overlap
        places = {name: (x, y + 0.28 * (i % 2) * (-1 if y < 0 else 1)) for i, (name, (x, y)) in enumerate(places.items())}
    count = f"{len(totals)} edges" if len(strongest) == len(totals) else f"the {MOST_EDGES} strongest of {len(totals)} edges"
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
    return 0.0 if far <= 1 else (0.32 if start[1] + end[1] >= 0 else -0.32) * math.sqrt(far)


def _ends(places: dict[str, Place], edges: Any) -> tuple[float, float]:
    """What the frame must hold: the nodes, and the middle of every arc."""
    heights = [y for _, y in places.values()]
    heights += [(places[a][1] + places[b][1]) / 2 + bend(places[a], places[b]) for a, b in edges]
    return max([*heights, 0.5]) + 0.45, min([*heights, -0.3]) - 0.45


def _arc(ax: Axes, start: Place, end: Place, score: float, share: float) -> None:
    """A parabola from node to node, in the units of the frame, so that it stays inside."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path

    middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 2 * bend(start, end))
    path = Path([start, middle, end], [Path.MOVETO, Path.CURVE3, Path.CURVE3])
    colour, width = RED if score > 0 else BLUE, 0.4 + 3.6 * share
    arrow = FancyArrowPatch(path=path, arrowstyle="-|>", mutation_scale=8 + 6 * share, color=colour, linewidth=width, alpha=0.75)
    ax.add_patch(arrow)

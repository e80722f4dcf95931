"""The picture of a circuit: nodes from left to right in running order, mixers above, MLPs below, the stream between.

Edges are arcs as wide as their |score|, red where the clean value raises the metric and blue where it lowers it, as in
the other plots. Nodes outside the circuit are grey.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gatedlens.foreign import Axes, Figure
from gatedlens.plot.drawing import panels, plain

if TYPE_CHECKING:
    from gatedlens.circuits.circuit import Circuit
else:  # that file draws by this one
    Circuit = Any

HEIGHT = {"mixer": 1.0, "mlp": -1.0}  # by the last word of a node's name; embed and logits lie between
RED, BLUE, GREY = "#b2182b", "#2166ac", "#bdbdbd"


def draw(circuit: Circuit, ax: Axes | None = None) -> Figure:
    """`circuit.plot()`: the Figure (that of `ax` if given)."""
    if ax is None:
        figure, axes = panels(1, 1)
        ax = axes[0][0]
        figure.set_size_inches(max(5.0, 1.1 * len(circuit.graph)), 4.5)
    places = {name: (float(i), HEIGHT.get(name.rpartition(".")[2], 0.0)) for i, name in enumerate(circuit.graph)}
    totals = _totals(circuit)
    most = max(map(abs, totals.values()), default=1.0) or 1.0
    for (sender, receiver), score in totals.items():
        _arc(ax, places[sender], places[receiver], score, abs(score) / most)
    joined = set(circuit.nodes)
    for name, (x, y) in places.items():
        colour = "black" if name in joined else GREY
        box = {"boxstyle": "round", "facecolor": "white", "edgecolor": colour}
        plain(ax.text(x, y, name, ha="center", va="center", fontsize=9, color=colour, bbox=box, zorder=3))
    ax.set_xlim(-0.7, len(places) - 0.3)
    lowest = min(y for _, y in places.values())
    ax.set_ylim(lowest - (0.4 if lowest == 0 else 1.2), 2.2)
    ax.set_axis_off()
    said = f"{circuit.scores.title}: {len(circuit)} edges (red raises the metric, blue lowers it)"
    plain(ax.set_title(said, fontsize=10))
    drawn: Any = ax.figure  # a figure, unless `ax` stands in a part of one
    return drawn


def _totals(circuit: Circuit) -> dict[tuple[str, str], float]:
    """The score of each edge, summed over its positions."""
    totals: dict[tuple[str, str], float] = {}
    for edge in circuit.edges:
        key = (edge.sender, edge.receiver)
        totals[key] = totals.get(key, 0.0) + circuit.score(*edge)
    return totals


def _arc(ax: Axes, start: tuple[float, float], end: tuple[float, float], score: float, share: float) -> None:
    style = {"arrowstyle": "-|>", "color": RED if score > 0 else BLUE, "linewidth": 0.4 + 3.6 * share, "alpha": 0.75}
    bend = 0.0 if end[0] - start[0] <= 1 else -0.25 if start[1] >= 0 else 0.25
    arrow = {**style, "connectionstyle": f"arc3,rad={bend}", "shrinkA": 14, "shrinkB": 14}
    ax.annotate("", xy=end, xytext=start, arrowprops=arrow, zorder=2)

"""Layout: where the nodes of a feature graph stand in a picture: positions from left to right, what runs later above.

laid = Layout.of(graph)
laid.rows, laid.columns, laid.places["1_12_7"]     # ["tokens", "1.mixer.gated", "logits"], where each position is, (x, y)
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gatedlens.feature_graph.node import BIAS, LOGIT, TOKEN, Node

if TYPE_CHECKING:
    from gatedlens.feature_graph.graph import Edge, FeatureGraph
else:  # that file imports this one
    Edge = FeatureGraph = Any

MOST_EDGES = 400  # that are drawn, the strongest


@dataclass(frozen=True)
class Layout:
    """rows: from below, what stands in each; columns: the middle of each position; width: how many nodes stand side by side;
    places: (x, y) of the nodes that are shown, y the number of their row; edges: those that are shown, the strongest first."""

    rows: tuple[str, ...]
    columns: tuple[float, ...]
    width: float
    places: dict[str, tuple[float, float]]
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    left_out: int

    @staticmethod
    def of(graph: FeatureGraph) -> Layout:
        """`Layout.of(graph)`: of the nodes that edges join, tokens and logits."""
        edges = tuple(graph.top(MOST_EDGES))
        joined = {name for edge in edges for name in (edge.source, edge.target)}
        nodes = tuple(
            node
            for node, kept in zip(graph.nodes, graph.kept.tolist(), strict=True)
            if kept and (node.id in joined or node.kind in (TOKEN, LOGIT))
        )
        order = [point for point in graph.facts.get("points", ()) if any(node.point == point for node in nodes)]
        rows = ("tokens", *(point.removeprefix("blocks.").replace("hook_", "") for point in order), "logits")
        cells: dict[tuple[int, int], list[Node]] = defaultdict(list)
        for node in nodes:
            # Biases stand in front of the first token.
            cells[_row(node, order), -1 if node.kind == BIAS else node.pos].append(node)
        wide = [max([1, *(len(cells[row, pos]) for row in range(len(rows)))]) for pos in range(-1, len(graph.tokens))]
        wide[0] = 1 if any(node.kind == BIAS for node in nodes) else 0
        columns, start = [], 0.0
        for count in wide:
            columns.append(start + (count - 1) / 2)
            start += count
        places = {
            node.id: (columns[pos + 1] + i - (len(some) - 1) / 2, float(row))
            for (row, pos), some in cells.items()
            for i, node in enumerate(some)
        }
        return Layout(rows, tuple(columns[1:]), start, places, nodes, edges, int(graph.joined.sum()) - len(edges))


def _row(node: Node, order: list[str]) -> int:
    if node.kind in (TOKEN, BIAS):
        return 0
    return len(order) + 1 if node.kind == LOGIT else 1 + order.index(node.point)

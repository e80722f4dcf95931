"""circuit-tracer's JSON of a feature graph: what its pages and Neuronpedia's show.

    {"metadata": {...}, "qParams": {...}, "nodes": [{"node_id": "1_12_7", ...}], "links": [{"source", "target", "weight"}]}

By the models of safety-research/circuit-tracer, `frontend/graph_models.py`, schema 1. `influence` is the share of the whole
influence that is reached with a node, from the most influential on. A mixer's write is told as a feature; the bias, which theirs
lack, is a node of type "bias" where a graph is not pruned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gatedlens.feature_graph import influence
from gatedlens.feature_graph.node import BIAS, ERROR, FEATURE, LOGIT, MIXER, TOKEN, Node

if TYPE_CHECKING:
    from gatedlens.feature_graph.graph import FeatureGraph
else:  # that file imports this one
    FeatureGraph = Any

SCHEMA = 1
TYPES = {
    FEATURE: "cross layer transcoder",
    MIXER: "cross layer transcoder",
    ERROR: "mlp reconstruction error",
    TOKEN: "embedding",
    LOGIT: "logit",
    BIAS: "bias",
}


def circuit_tracer(graph: FeatureGraph, slug: str) -> dict[str, Any]:
    """`circuit_tracer(graph, "recall")`: `FeatureGraph.to_circuit_tracer`."""
    reached, edges = influence.cumulative(graph.influence).tolist(), graph.edges
    joined = {name for edge in edges for name in (edge.source, edge.target)}
    probability, first = graph.probability.tolist(), next(node.id for node in graph.nodes if node.kind == LOGIT)
    nodes = [
        _node(node, reached[place], probability[place], node.id == first)
        for place, (node, kept) in enumerate(zip(graph.nodes, graph.kept.tolist(), strict=True))
        if kept and (node.id in joined or node.kind in (TOKEN, LOGIT))
    ]
    kept = graph.facts.get("pruned", {})
    return {
        "metadata": {
            "slug": slug,
            "scan": graph.facts["model"],
            "transcoder_list": list(graph.facts["dictionaries"]),
            "prompt_tokens": list(graph.words),
            "prompt": " ".join(graph.words),
            "node_threshold": kept.get("nodes"),
            "schema_version": SCHEMA,
        },
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": nodes,
        "links": [{"source": edge.source, "target": edge.target, "weight": edge.weight} for edge in edges],
    }


def _node(node: Node, reached: float, probability: float, first: bool) -> dict[str, Any]:
    word = "E" if node.kind in (TOKEN, BIAS) else node.id.partition("_")[0]
    return {
        "node_id": node.id,
        "feature": _feature(node),
        "layer": word,
        "ctx_idx": node.pos,
        "feature_type": TYPES[node.kind],
        "token_prob": probability,
        "is_target_logit": first,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": _in_scripts(node),
        "clerp": f"{node.said} (p={probability:.3f})" if node.kind == LOGIT else node.said,
        "influence": None if node.kind in (LOGIT, BIAS) else reached,
        "activation": node.activation if node.kind in (FEATURE, MIXER) else None,
    }


def _feature(node: Node) -> int:
    """A feature's number among those of all layers, by Cantor's pairing; of a token its position, of a logit its token."""
    if node.kind in (FEATURE, MIXER):
        return (node.layer + node.rank) * (node.layer + node.rank + 1) // 2 + node.rank
    return node.pos if node.kind == TOKEN else node.rank


def _in_scripts(node: Node) -> str:
    """What a page calls a node: a feature's is the same at every position."""
    first, rank, _ = node.id.split("_")
    if node.kind in (FEATURE, MIXER):
        return f"{first}_{rank}-0"
    return f"{'L' if node.kind == LOGIT else first}_{rank}-{node.pos}"

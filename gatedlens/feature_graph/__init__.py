"""Feature graphs: which feature at which token made which other one, through scans, and the logits: see `graph.py`.

graph = gl.feature_graph.attribute(model, text, [sae], logits="1")
graph.check(); graph.prune().plot(); graph.intervene({"1_12_7": 0.0}).gap
"""

from gatedlens.feature_graph.attributing import attribute
from gatedlens.feature_graph.graph import Check, Edge, FeatureGraph
from gatedlens.feature_graph.node import Node

__all__ = ["Check", "Edge", "FeatureGraph", "Node", "attribute"]

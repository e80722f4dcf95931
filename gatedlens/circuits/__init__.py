"""Circuits: which parts of a model carry a behaviour, by gradients (fast, approximate) and by patching (exact).

    clean, corrupted = tokens, other_tokens
    metric = gl.metrics.logit_difference(right, wrong)
    found = gl.circuits.attribution_patch(model, clean, corrupted, metric, "blocks.*.hook_resid_pre")   # layer pos
    circuit = gl.circuits.eap_ig(model, clean, corrupted, metric).top(8)                                 # nodes and edges
    circuit.faithfulness(model, clean, corrupted, metric); circuit.save("circuit.json"); circuit.plot()
    gl.circuits.path_patch(model, clean, corrupted, metric, sender="0.mixer", receivers="1.mixer")

All go one way, that of activation patching: values of the clean run are put into the corrupted run, and a number says by
how much the metric rises above the corrupted run's. Swap the inputs for the other way.

    attribution_patch                 every cell of every point, one forward and one backward     (Nanda 2023)
    attribution_patch_ig              ... gradients averaged along the line between the inputs    (Hanna et al. 2024)
    attribution_patch_ig_activations  ... between the activations, one point at a time            (Marks et al. 2024)
    eap, eap_ig                       every edge between blocks                    (Syed et al. 2023, Hanna et al. 2024)
    eap_heads, eap_ig_heads           ... from every head of every layer
    edge_patch                        the same, exact: one forward an edge
    path_patch, path_patch_senders    a sender into chosen receivers, the rest frozen      (Goldowsky-Dill et al. 2023)
    path_patch_heads                  ... from every head of every layer
"""

from gatedlens.circuits.attribution_patching import (
    attribution_patch,
    attribution_patch_ig,
    attribution_patch_ig_activations,
)
from gatedlens.circuits.circuit import Circuit
from gatedlens.circuits.edge_scores import eap, eap_ig, edge_patch
from gatedlens.circuits.graph import Edge, Graph, Node
from gatedlens.circuits.head_scores import eap_heads, eap_ig_heads
from gatedlens.circuits.path_patching import path_patch, path_patch_heads, path_patch_senders

# fmt: off
__all__ = [
    "Circuit", "Edge", "Graph", "Node", "attribution_patch", "attribution_patch_ig", "attribution_patch_ig_activations",
    "eap", "eap_heads", "eap_ig", "eap_ig_heads", "edge_patch", "path_patch", "path_patch_heads", "path_patch_senders",
]
# fmt: on

"""Edges: what each path from one node straight to another is worth, by gradients (EAP, EAP-IG) or exactly.

    circuit = eap_ig(model, clean, corrupted, metric)              # a Circuit of all edges, with their scores
    circuit.scores.top(5); circuit.top(10).faithfulness(model, clean, corrupted, metric)
    eap(model, clean, corrupted, metric, positions=True)           # edges at each position

    score(s -> r) = (s clean - s corrupted) * d metric / d input of r

summed over d_model (and over positions, unless they are kept apart) and averaged over rows; the gradient is that of the
corrupted run (EAP) or a mean along the line between the inputs (EAP-IG). It approximates the exact `edge_patch`: on the
bundled recall models (6 edges in Mamba, 28 in Griffin, 15 in RWKV) with a linear correlation of 0.71, 0.76 and 0.89
(EAP), 0.98, 0.98 and 0.99 (EAP-IG); the rank correlations are 0.94, 0.92, 0.93 and 0.83, 0.98, 1.00.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gatedlens.circuits.circuit import Circuit
from gatedlens.circuits.graph import Graph, Node
from gatedlens.circuits.path_patching import Paths
from gatedlens.errors import InputError
from gatedlens.metrics import Metric
from gatedlens.options import checked
from gatedlens.recurrence.scanning import at_least_float32
from gatedlens.result.result import Result
from gatedlens.runs.cells import Plan
from gatedlens.runs.engine import Effort
from gatedlens.runs.gradients import Listener, along_input, listen
from gatedlens.runs.pair import Pair, steps_of, subtracting

APPROXIMATE = "approximate rise of the metric"


@checked
def eap(model: Any, clean: Any, corrupted: Any, metric: Metric, positions: bool = False, **options: Any) -> Circuit:
    """Edge attribution patching: two forwards and one backward for all edges. Syed et al. 2023 (arXiv 2310.10348), eq. 3.

    positions: tell edges apart by the position at which they pass. metric: logits -> one number a row. options: the
    forward's, attention_mask say.
    """
    pair, graph = Pair.of(model, clean, corrupted, options), Graph.of(model)
    _, store = pair.cached(pair.clean, (node.writes for node in graph.senders))
    scores = _Scores(pair, graph, store, positions, 1)
    listen(pair, metric, scores.listeners(), subtracting(store))
    return _circuit(model, graph, scores.total(), "EAP", {})


@checked
def eap_ig(
    model: Any,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    steps: int = 5,
    positions: bool = False,
    progress: bool = True,
    **options: Any,
) -> Circuit:
    """EAP with integrated gradients: the gradient is a mean over `steps` runs between the corrupted and the clean embedding.

    Hanna, Pezzelle and Belinkov 2024 (Have faith in faithfulness, arXiv 2403.17806), eq. 5; at the midpoints of the
    steps. For the rest see `eap`.
    """
    pair, graph = Pair.of(model, clean, corrupted, options), Graph.of(model)
    steps_of(steps)
    scores = _Scores(pair, graph, pair.differences(node.writes for node in graph.senders), positions, steps)
    along_input(pair, metric, scores.listeners(), steps, progress)
    return _circuit(model, graph, scores.total(), "EAP-IG", {"steps": steps})


@checked
def edge_patch(
    model: Any,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    progress: bool = True,
    results: Any = None,
    max_bytes: int | None = None,
    max_rows: int | None = None,
    **options: Any,
) -> Circuit:
    """The exact score of every edge: metric(patched) - metric(corrupted), the edge alone patched; many edges a batch.

    What `path_patch(sender, receiver)` is, for all of them: the truth that EAP and EAP-IG approximate. results, max_bytes,
    max_rows: as in every sweep, `gl.patching.Options`; what is written and taken up is a Result, the circuit's `scores`.
    """
    pair, graph = Pair.of(model, clean, corrupted, options), Graph.of(model)
    paths = Paths(pair, metric, graph.senders, graph.receivers)
    cells = [
        paths.cell((graph.place(sender), graph.place(receiver) - 1), sender, [receiver])
        for receiver in graph.receivers
        for sender in graph.before(receiver)
    ]
    size = (len(graph.senders), len(graph.receivers))
    plan = Plan(("sender", "receiver"), _labels(graph), size, tuple(cells), "Edge patching")
    effort = Effort(results, max_bytes, max_rows, progress)
    found = paths.rises(plan, {"model": model.cfg.model_name}, effort)
    return Circuit.of(replace(found, values=found.values.double().cpu()))


class _Scores:
    """The sums of sender difference * receiver gradient, receiver by receiver, of `runs` backward passes."""

    def __init__(self, pair: Pair, graph: Graph, store: dict[str, Tensor], positions: bool, runs: int):
        self.pair = pair
        self.graph = graph
        self.store = store
        self.positions = positions
        self.runs = runs
        some = next(iter(store.values()))[..., 0]
        self.found = _empty(graph, *([self._by_number(some).shape[1]] if positions else []))
        self.found[~self.found.isnan()] = 0

    def listeners(self) -> dict[str, Listener]:
        return {node.reads: self._listener(node) for node in self.graph.receivers}

    def _listener(self, receiver: Node) -> Listener:
        column = self.graph.place(receiver) - 1

        def listener(gradient: Tensor) -> None:
            wide = at_least_float32(gradient)
            for row, sender in enumerate(self.graph.before(receiver)):
                product = (at_least_float32(self.store[sender.writes]) * wide).sum(-1)
                by_pos = self._by_number(product).mean(0) / self.runs
                self.found[row, column] += (by_pos if self.positions else by_pos.sum()).to(self.found)

        return listener

    def _by_number(self, x: Float[Tensor, "batch pos"]) -> Float[Tensor, "batch some"]:
        return self.pair.by_number(x, ("batch", "pos"))

    def total(self) -> Tensor:
        if self.found.isnan().sum() > _empty(self.graph, *self.found.shape[2:]).isnan().sum():
            raise InputError("The gradient of the metric is NaN: does the metric divide by zero, or take its root?")
        return self.found


def _empty(graph: Graph, *length: int) -> Tensor:
    """Scores [sender, receiver, ...]: infinite where there is an edge, NaN where a receiver does not come later."""
    size = len(graph.senders)
    edge = torch.ones(size, size, dtype=torch.bool).triu()
    scores = torch.full((size, size), torch.nan, dtype=torch.float64).masked_fill(edge, torch.inf)
    return scores.reshape(size, size, *(1 for _ in length)).expand(size, size, *length).clone()


def _circuit(model: Any, graph: Graph, scores: Tensor, title: str, facts: dict[str, Any]) -> Circuit:
    axes = ("sender", "receiver", "pos")[: scores.ndim]
    return Circuit.of(
        Result(scores, axes, _labels(graph), title, APPROXIMATE, {"model": model.cfg.model_name, **facts})
    )


def _labels(graph: Graph) -> dict[str, list[str]]:
    return {"sender": [node.name for node in graph.senders], "receiver": [node.name for node in graph.receivers]}

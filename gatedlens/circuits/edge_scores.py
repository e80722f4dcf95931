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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gatedlens import fused
from gatedlens.circuits.circuit import Circuit
from gatedlens.circuits.graph import Graph, Node
from gatedlens.circuits.path_patching import Paths
from gatedlens.errors import InputError
from gatedlens.metrics import Metric
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Input
from gatedlens.model.language import OF_INPUT, HookedLanguageModel
from gatedlens.options import checked, taking
from gatedlens.recurrence.scanning import at_least_float32
from gatedlens.result.result import Result
from gatedlens.runs.cells import Plan
from gatedlens.runs.engine import Earlier, Effort
from gatedlens.runs.gradients import Listener, approximate_rise, between, by_secants, collected, listen, on_the_way
from gatedlens.runs.pair import Pair, steps_of, subtracting


@taking(HookedLanguageModel.forward, only=OF_INPUT)
@checked
def eap(
    model: HookedModel,
    clean: Input,
    corrupted: Input,
    metric: Metric,
    positions: bool = False,
    rule: str = "gradient",
    **options: Any,
) -> Circuit:
    """`gl.circuits.eap(model, clean, corrupted, metric).top(8)`: edge attribution patching, a Circuit of every edge.

    Two forwards and one backward for all edges together. clean, corrupted: texts, ids, pairs (ids, mask) or images, of one shape
    and padded alike. metric: logits -> one number a row. positions: tell edges apart by the position at which they pass; then
    `scores` is [sender, receiver, pos]. rule: as in `attribution_patch`. options: the forward's, attention_mask say.

    InputError for inputs that do not fit together, and for a metric without a gradient or whose gradient is NaN.
    Syed et al. 2023 (arXiv 2310.10348), eq. 3.
    """
    secant, pair, graph = by_secants(rule), Pair.of(model, clean, corrupted, options), Graph.of(model)
    if secant:
        scores = Scores(pair, graph, pair.differences(node.writes for node in graph.senders), positions)
        with fused.off():
            found = scores.of(lambda listeners: listen(pair, metric, listeners, [between(pair)]))
        return _circuit(model, graph, found, metric, "EAP by secants", {"rule": rule})
    _, store = pair.cached(pair.clean, (node.writes for node in graph.senders))
    found = Scores(pair, graph, store, positions).at_once(metric)
    return _circuit(model, graph, found, metric, "EAP", {})


@taking(HookedLanguageModel.forward, only=OF_INPUT)
@checked
def eap_ig(
    model: HookedModel,
    clean: Input,
    corrupted: Input,
    metric: Metric,
    steps: int = 5,
    positions: bool = False,
    progress: bool = True,
    results: Earlier = None,
    **options: Any,
) -> Circuit:
    """`gl.circuits.eap_ig(model, clean, corrupted, metric, steps=5)`: EAP with integrated gradients, a Circuit of every edge.

    The gradient is a mean over `steps` runs between the corrupted and the clean embedding, at the midpoints of equal steps; each
    costs a forward and a backward. results: a path to which the steps are written as they come and from which an interrupted call
    goes on, or the Result that `gl.patching.Interrupted` holds; it has an axis step in front, over which the circuit's scores
    are the mean. The rest, and the errors, are those of `eap`; InputError too if results is of another call.

    Hanna, Pezzelle and Belinkov 2024 (Have faith in faithfulness, arXiv 2403.17806), eq. 5.
    """
    pair, graph = Pair.of(model, clean, corrupted, options), Graph.of(model)
    scores = Scores(pair, graph, pair.differences(node.writes for node in graph.senders), positions)
    axes = ("sender", "receiver", "pos")[: len(scores.shape)]
    found = integrated(scores, metric, steps, axes, _labels(graph), "EAP-IG", Effort(results, progress=progress))
    return _circuit(model, graph, found, metric, "EAP-IG", {"steps": steps})


@taking(HookedLanguageModel.forward, only=OF_INPUT)
@checked
def edge_patch(
    model: HookedModel,
    clean: Input,
    corrupted: Input,
    metric: Metric,
    progress: bool = True,
    results: Earlier = None,
    max_bytes: int | None = None,
    max_rows: int | None = None,
    **options: Any,
) -> Circuit:
    """`gl.circuits.edge_patch(model, clean, corrupted, metric)`: the exact score of every edge, as a Circuit.

    score = metric(patched) - metric(corrupted), the mean over rows, with one edge alone patched; many edges go in one batch. It
    is `path_patch(sender, receiver)` for every edge: the truth that EAP and EAP-IG approximate. results, max_bytes, max_rows: as
    in every sweep, see `gl.patching.Options`; what is written and taken up is a Result, the circuit's `scores`.
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


class Scores:
    """sender difference * receiver gradient, summed over d_model (and positions) and averaged over rows, of a backward pass.

    store: by point, what senders wrote in the clean run (`at_once` takes the corrupted run's off), or the difference.
    """

    def __init__(self, pair: Pair, graph: Graph, store: dict[str, Tensor], positions: bool = False):
        self.pair = pair
        self.graph = graph
        self.store = store
        self.positions = positions

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the scores: sender, receiver (and pos)."""
        size, some = len(self.graph.senders), next(iter(self.store.values()))[..., 0]
        return (size, size, *([self._by_number(some).shape[1]] if self.positions else []))

    def at_once(self, metric: Metric) -> Float[Tensor, "sender ..."]:
        """The scores by the gradient of the corrupted run, whose own values are taken off the store on the way."""
        return self.of(lambda listeners: listen(self.pair, metric, listeners, self.subtracting()))

    def subtracting(self) -> list[tuple[str, Any]]:
        """Hooks under which a run of the corrupted input turns the store into differences."""
        return list(subtracting(self.store))

    def of(self, backward: Callable[[dict[str, Listener]], Any]) -> Float[Tensor, "sender ..."]:
        """The scores of the pass that `backward(listeners)` makes; 0 where there is no edge."""
        found = torch.zeros(self.shape, dtype=torch.float64)
        readings = [(node, *reading) for node in self.graph.receivers for reading in self.graph.readings(node)]
        backward({point: self._listener(node, senders, found) for node, point, senders in readings})
        if bool(found.isnan().any()):
            raise InputError("The gradient of the metric is NaN: does the metric divide by zero, or take its root?")
        return found

    def _listener(self, receiver: Node, senders: Sequence[Node], found: Tensor) -> Listener:
        def listener(gradient: Tensor) -> None:
            self.score(receiver, senders, at_least_float32(gradient), found)

        return listener

    def score(
        self, receiver: Node, senders: Sequence[Node], gradient: Float[Tensor, "batch pos d_model"], found: Tensor
    ) -> None:
        """Add to the scores of the edges from some senders into a receiver, by the gradient at a point where it reads them."""
        column = self.graph.place(receiver) - 1
        for sender in senders:
            product = (at_least_float32(self.store[sender.writes]) * gradient).sum(-1)
            by_pos = self._by_number(product).mean(0)
            found[self.graph.place(sender), column] += (by_pos if self.positions else by_pos.sum()).to(found)

    def _by_number(self, x: Float[Tensor, "batch pos"]) -> Float[Tensor, "batch some"]:
        return self.pair.by_number(x, ("batch", "pos"))


def integrated(
    scores: Scores,
    metric: Metric,
    steps: int,
    axes: Sequence[str],
    labels: Mapping[str, Sequence[Any]],
    title: str,
    effort: Effort,
) -> Float[Tensor, "sender ..."]:
    """The mean of `scores` over `steps` runs between the corrupted and the clean embedding; the steps stop and go on."""
    pair, shares = scores.pair, steps_of(steps)
    hook = on_the_way(pair)

    def one(step: int) -> Tensor:
        return scores.of(lambda listeners: listen(pair, metric, listeners, [hook(shares[step])]))

    values = torch.full((steps, *scores.shape), torch.nan, dtype=torch.float64)
    facts = {"model": pair.model.cfg.model_name, "steps": steps}
    blank = Result(values, ("step", *axes), dict(labels), f"{title}, step by step", approximate_rise(metric), facts)
    return collected(pair, metric, blank, one, {}, effort).values.mean(0)


def _circuit(
    model: HookedModel, graph: Graph, scores: Tensor, metric: Metric, title: str, facts: dict[str, Any]
) -> Circuit:
    """The circuit of all edges; `scores` get NaN where a receiver does not come after the sender."""
    axes = ("sender", "receiver", "pos")[: scores.ndim]
    edge = torch.tensor([[sender.reaches(receiver) for receiver in graph.receivers] for sender in graph.senders])
    values = scores.masked_fill(~edge.reshape(*edge.shape, *(1 for _ in scores.shape[2:])), torch.nan)
    facts = {"model": model.cfg.model_name, **facts}
    return Circuit.of(Result(values, axes, _labels(graph), title, approximate_rise(metric), facts))


def _labels(graph: Graph) -> dict[str, list[str]]:
    return {"sender": [node.name for node in graph.senders], "receiver": [node.name for node in graph.receivers]}

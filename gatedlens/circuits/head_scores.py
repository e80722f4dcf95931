"""Edges from single heads: what each head says straight to each later receiver, by gradients.

    by = gl.circuits.eap_ig_heads(model, clean, corrupted, metric)      # layer x head x receiver
    by.at(receiver="logits").plot()                                     # layer x head

    score(h -> r) = (o_h clean - o_h corrupted) . (W_h^T d metric / d input of r)

o_h a head's part of the mixer's output point, W_h its columns of the output projection (what stands behind it, numbers of each
position, is in o_h, of either run): summed over a layer's heads it is the
score of the edge mixer -> r (`edge_scores.py`), for the projection's bias is no head's. It approximates
`path_patch_heads`, which is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gatedlens.circuits.edge_scores import Scores, integrated
from gatedlens.circuits.graph import Graph, Node
from gatedlens.circuits.head_contents import Contents, differences, in_clean, subtracting
from gatedlens.metrics import Metric
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Input
from gatedlens.model.by_head import with_heads
from gatedlens.model.language import OF_INPUT, HookedLanguageModel
from gatedlens.options import checked, taking
from gatedlens.recurrence.scanning import at_least_float32
from gatedlens.result.result import Result
from gatedlens.runs.engine import Earlier, Effort
from gatedlens.runs.gradients import approximate_rise
from gatedlens.runs.pair import Pair

AXES = ("layer", "head", "receiver")


@taking(HookedLanguageModel.forward, only=OF_INPUT)
@checked
def eap_heads(model: HookedModel, clean: Input, corrupted: Input, metric: Metric, **options: Any) -> Result:
    """`gl.circuits.eap_heads(model, clean, corrupted, metric).at(receiver="logits").plot()`: `eap` with heads as senders.

    A Result layer x head x receiver, NaN where a receiver does not come after the layer's mixer; two forwards and one backward.
    Layers without heads are not on the axis. Options and errors as in `eap`; PointError for a model without heads.
    """
    pair, graph = Pair.of(model, clean, corrupted, options), Graph.of(model)
    scores = HeadScores(pair, graph, in_clean(pair, with_heads(model)))
    return scores.result(scores.at_once(metric), metric, "EAP by head", {})


@taking(HookedLanguageModel.forward, only=OF_INPUT)
@checked
def eap_ig_heads(
    model: HookedModel,
    clean: Input,
    corrupted: Input,
    metric: Metric,
    steps: int = 5,
    progress: bool = True,
    results: Earlier = None,
    **options: Any,
) -> Result:
    """`gl.circuits.eap_ig_heads(model, clean, corrupted, metric, steps=5)`: `eap_ig` with heads as senders, as in `eap_heads`.

    The rest, and the errors, are those of `eap_ig`; PointError for a model without heads.
    """
    pair, graph = Pair.of(model, clean, corrupted, options), Graph.of(model)
    scores = HeadScores(pair, graph, differences(pair, with_heads(model)))
    title, effort = "EAP-IG by head", Effort(results, progress=progress)
    found = integrated(scores, metric, steps, AXES, scores.labels, title, effort)
    return scores.result(found, metric, title, {"steps": steps})


class HeadScores(Scores):
    """As `Scores`, each head of a mixer a sender: `store` holds what their layers' heads hold (`head_contents.py`)."""

    def __init__(self, pair: Pair, graph: Graph, contents: Contents):
        super().__init__(pair, graph, {})
        self.contents = contents

    def subtracting(self) -> list[tuple[str, Any]]:
        return subtracting(self.pair.model, self.contents)

    @property
    def senders(self) -> dict[int, Node]:
        """By layer, the node of each mixer with heads."""
        return {layer: self.graph.find(f"blocks.{layer}.hook_mixer_out") for layer in with_heads(self.pair.model)}

    @property
    def labels(self) -> dict[str, list[Any]]:
        heads = list(range(self.pair.model.cfg.sizes["head"]))
        return {"layer": list(self.senders), "head": heads, "receiver": [node.name for node in self.graph.receivers]}

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(self.labels[axis]) for axis in AXES)

    def score(
        self, receiver: Node, senders: Sequence[Node], gradient: Float[Tensor, "batch pos d_model"], found: Tensor
    ) -> None:
        column, (_, heads, _) = self.graph.place(receiver) - 1, self.shape
        for row, (layer, sender) in enumerate(self.senders.items()):
            if sender in senders:
                block = self.pair.model.blocks[layer]
                seen = block.writing(block.mixer.place, None).seen(gradient)  # from the mixer's output
                product = (at_least_float32(self.contents[layer]) * seen).sum(2)
                found[row, :, column] = product.unflatten(2, (heads, -1)).sum((1, 3)).mean(0).to(found)

    def result(
        self, scores: Float[Tensor, "layer head receiver"], metric: Metric, title: str, facts: Mapping[str, Any]
    ) -> Result:
        """The Result of these scores, NaN where there is no edge."""
        there = [[sender.reaches(node) for node in self.graph.receivers] for sender in self.senders.values()]
        values = scores.masked_fill(~torch.tensor(there).unsqueeze(1), torch.nan)
        facts = {"model": self.pair.model.cfg.model_name, **facts}
        return Result(values, AXES, self.labels, title, approximate_rise(metric), facts)

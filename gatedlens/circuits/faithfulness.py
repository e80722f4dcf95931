"""EdgePatch: the clean run with some edges of the residual graph corrupted, exactly.

    patch = EdgePatch.of(model, clean, corrupted)
    patch.logits(kept)                                 # kept [sender, receiver]: the edges that stay
    patch.faithfulness(metric, [kept])

    input of r = stream - sum over cut senders s of (s - s corrupted)

s is what the sender writes in this very run (a node behind a cut edge writes something else than in the clean run), so
a node's input is the sum of its kept senders as they are and of its cut senders as in the corrupted run. With every edge
it is the clean run, with none the corrupted one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gatedlens.circuits.graph import Graph, Node
from gatedlens.errors import InputError
from gatedlens.metrics import Metric, per_row
from gatedlens.model.hookpoint import Capture
from gatedlens.model.padding import Padding
from gatedlens.runs.pair import Pair


class EdgePatch:
    """One pair of inputs and the corrupted run's senders, for any number of circuits."""

    def __init__(self, pair: Pair, graph: Graph):
        self.pair = pair
        self.graph = graph
        self.padding = Padding.of(pair.clean.mask)
        self.corrupted_logits, self.corrupted = pair.cached(pair.corrupted, (node.writes for node in graph.senders))

    @classmethod
    def of(
        cls,
        model: Any,
        clean: Any,
        corrupted: Any,
        options: Mapping[str, Any] | None = None,
        nodes: Sequence[str] | None = None,
    ) -> EdgePatch:
        """nodes: those that `model` must have, in order."""
        graph = Graph.of(model)
        if nodes is not None and tuple(nodes) != graph.names:
            raise InputError(
                f"The circuit is one of a model with the nodes {_ends(nodes)}; {model.cfg.model_name} has "
                f"{_ends(graph.names)}."
            )
        return cls(Pair.of(model, clean, corrupted, options or {}), graph)

    @torch.no_grad()
    def logits(self, kept: Bool[Tensor, "sender receiver ..."]) -> Float[Tensor, "batch ..."]:
        """The clean input's logits; edges [sender, receiver] or [sender, receiver, pos] that are not kept are cut."""
        some = next(iter(self.corrupted.values()))
        longest = self.padding.longest(some.shape[1])
        if kept.ndim == 3 and kept.shape[2] != longest:
            raise InputError(f"The circuit tells {kept.shape[2]} positions apart; this input has {longest}.")
        live: dict[str, Tensor] = {}
        cut = ~kept.reshape(*kept.shape[:2], -1).to(some.device)  # sender receiver pos, or 1 for all of them
        writing = [(node.writes, Capture(live)) for node in self.graph.senders]
        reading = [(node.reads, self._reading(node, cut[:, i], live)) for i, node in enumerate(self.graph.receivers)]
        return self.pair.run(self.pair.clean, [*writing, *reading])

    def _reading(self, receiver: Node, cut: Tensor, live: dict[str, Tensor]) -> Callable[..., Tensor]:
        """The hook that takes the cut senders out of a receiver's input, and puts their corrupted values in."""
        senders = [
            (node, gone) for node, gone in zip(self.graph.before(receiver), cut, strict=False) if bool(gone.any())
        ]

        def hook(x: Tensor, hook: Any) -> Tensor:
            for node, gone in senders:
                here = self._laid_out(gone, x).unsqueeze(-1)
                x = x - here * (live[node.writes] - self.corrupted[node.writes])
            return x

        return hook

    def _laid_out(
        self, gone: Bool[Tensor, " some"], x: Float[Tensor, "batch pos d_model"]
    ) -> Bool[Tensor, "#batch #pos"]:
        """Where a sender is cut in each row, of the positions by their numbers (or 1 for all of them)."""
        if self.padding.mask is None or len(gone) == 1:
            return gone.unsqueeze(0)
        by_number = torch.nn.functional.pad(gone, (0, x.shape[1] - len(gone)))
        return self.padding.by_place(by_number.expand(len(x), -1), ("batch", "pos"))

    def faithfulness(self, metric: Metric, circuits: Iterable[Tensor]) -> list[float]:
        """(m(circuit) - m(corrupted)) / (m(clean) - m(corrupted)) of each set of kept edges, m the mean over rows."""
        with torch.no_grad():
            whole = float(per_row(metric, self.pair.run(self.pair.clean)).mean())
            nothing = float(per_row(metric, self.corrupted_logits).mean())
        if abs(whole - nothing) < 1e-12 * max(abs(whole), abs(nothing), 1e-12):
            raise InputError(
                f"The metric is {whole:.6g} in the clean and in the corrupted run: nothing to be faithful to."
            )
        found = [float(per_row(metric, self.logits(kept)).mean()) for kept in circuits]
        return [(value - nothing) / (whole - nothing) for value in found]


def _ends(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}, ..., {names[-1]} ({len(names)})"

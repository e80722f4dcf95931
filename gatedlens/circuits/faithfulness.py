"""EdgePatch: the clean run with some edges of the residual graph corrupted, exactly.

    patch = EdgePatch.of(model, clean, corrupted)
    patch.logits(kept)                                 # kept [sender, receiver]: the edges that stay
    patch.faithfulness(metric, kept)
    patch.curve(metric, [(4, kept), (8, more)], title, facts, effort)   # a Result; many circuits to a batch, by the engine

    input of r = stream - sum over cut senders s of (s - s corrupted)

s is what the sender writes in this very run (a node behind a cut edge writes something else than in the clean run), so
a node's input is the sum of its kept senders as they are and of its cut senders as in the corrupted run. With every edge
it is the clean run, with none the corrupted one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gatedlens.circuits.graph import Graph, Node
from gatedlens.errors import InputError
from gatedlens.metrics import Metric, per_row
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Input
from gatedlens.model.hookpoint import Capture
from gatedlens.model.padding import Padding
from gatedlens.result.result import Result
from gatedlens.runs.baseline import Baseline
from gatedlens.runs.cells import Cell, Plan
from gatedlens.runs.engine import Effort, Question, answer
from gatedlens.runs.meter import Meter
from gatedlens.runs.pair import Pair

ByPlace = Callable[[Tensor, Sequence[str]], Tensor]


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
        model: HookedModel,
        clean: Input,
        corrupted: Input,
        options: Mapping[str, Any] | None = None,
        nodes: Sequence[str] | None = None,
    ) -> EdgePatch:
        """nodes: those that `model` must have, in order."""
        graph = Graph.of(model)
        if nodes is not None and tuple(nodes) != graph.names:
            raise InputError(
                f"The circuit is one of a model with the nodes {_first_and_last(nodes)}; {model.cfg.model_name} has "
                f"{_first_and_last(graph.names)}."
            )
        return cls(Pair.of(model, clean, corrupted, options or {}), graph)

    @torch.no_grad()
    def logits(self, kept: Bool[Tensor, "sender receiver ..."]) -> Float[Tensor, "batch ..."]:
        """The clean input's logits; edges [sender, receiver] or [sender, receiver, pos] that are not kept are cut."""
        self._check(kept)
        hooks = cutting(self.graph, kept.unsqueeze(0), self.corrupted, self.padding.by_place)
        return self.pair.run(self.pair.clean, hooks)

    def _check(self, kept: Bool[Tensor, "sender receiver ..."]) -> None:
        longest = self.padding.longest(next(iter(self.corrupted.values())).shape[1])
        if kept.ndim == 3 and kept.shape[2] != longest:
            raise InputError(f"The circuit tells {kept.shape[2]} positions apart; this input has {longest}.")

    @torch.no_grad()
    def faithfulness(self, metric: Metric, kept: Bool[Tensor, "sender receiver ..."]) -> float:
        """(m(circuit) - m(corrupted)) / (m(clean) - m(corrupted)), m the metric's mean over rows."""
        whole, nothing = self._ends(metric, self.pair.run(self.pair.clean))
        return (float(per_row(metric, self.logits(kept)).mean()) - nothing) / (whole - nothing)

    def _ends(self, metric: Metric, clean: Tensor) -> tuple[float, float]:
        """The metric's mean over rows in the clean run (its logits) and in the corrupted one; InputError if they are the same."""
        whole, nothing = (float(per_row(metric, logits).mean()) for logits in (clean, self.corrupted_logits))
        if abs(whole - nothing) < 1e-12 * max(abs(whole), abs(nothing), 1e-12):
            raise InputError(
                f"The metric is {whole:.6g} in the clean and in the corrupted run: nothing to be faithful to."
            )
        return whole, nothing

    @torch.no_grad()
    def curve(
        self,
        metric: Metric,
        circuits: Sequence[tuple[int, Tensor]],
        title: str,
        facts: Mapping[str, Any],
        effort: Effort,
    ) -> Result:
        """The faithfulness of each set of kept edges, by how many they are: a Result with one axis, edges."""
        for _, kept in circuits:
            self._check(kept)
        run = Baseline(self.pair.model, self.pair.clean, options=self.pair.options)
        corrupted = {name: run.as_run(value) for name, value in self.corrupted.items()}
        cells = tuple(CutEdges((i,), (), self.graph, kept, corrupted) for i, (_, kept) in enumerate(circuits))
        plan = Plan(("edges",), {"edges": [n for n, _ in circuits]}, (len(cells),), cells, title)
        changing = {i for i in run.prepare(cells) if cells[i].cuts}
        whole, nothing = self._ends(metric, run.logits)
        question = Question(
            plan,
            Meter(metric, "none", run.rows),
            lambda cell, value: (value.mean().double().cpu() - nothing) / (whole - nothing),
            value="faithfulness",
            verb="kept",
            facts={**facts, "clean": whole, "corrupted": nothing},
            unit=abs(whole - nothing),
        )
        low = torch.full((1, 1), whole, dtype=torch.float64)
        return answer(question, [run], changing, low, effort)


def cutting(
    graph: Graph, kept: Bool[Tensor, "cell sender receiver ..."], corrupted: Mapping[str, Tensor], by_place: ByPlace
) -> list[tuple[str, Callable[..., Any]]]:
    """The hooks of a run in which each cell has some edges cut, the rows of one cell behind those of another.

    corrupted: what the senders wrote in the corrupted run, by point. by_place: positions by number -> as the run is laid out.
    """
    live: dict[str, Tensor] = {}
    device = next(iter(corrupted.values())).device
    cut = ~kept.reshape(*kept.shape[:3], -1).to(device)  # cell sender receiver pos, or 1 for all of them
    writing = [(node.writes, Capture(live)) for node in graph.senders]

    def reading(number: int, point: str, senders: Sequence[Node]) -> tuple[str, Callable[..., Tensor]]:
        """The hook that takes the cut senders out of a receiver's input, and puts their corrupted values in."""
        cuts = [(node, cut[:, graph.place(node), number]) for node in senders]
        cuts = [(node, gone) for node, gone in cuts if bool(gone.any())]

        def hook(x: Tensor, hook: Any) -> Tensor:
            x = x.unflatten(0, (len(kept), -1))
            for node, gone in cuts:
                here = _laid_out(gone, x, by_place)
                x = x - here * (live[node.writes].reshape(x.shape) - corrupted[node.writes])
            return x.flatten(0, 1)

        return point, hook

    receivers = enumerate(graph.receivers)
    return [*writing, *(reading(i, *one) for i, node in receivers for one in graph.readings(node))]


def _laid_out(
    gone: Bool[Tensor, "cell some"], x: Float[Tensor, "cell batch pos d_model"], by_place: ByPlace
) -> Bool[Tensor, "cell some_rows some_pos 1"]:
    """Where a sender is cut in each row, of the positions by their numbers (or 1 for all of them)."""
    if gone.shape[1] == 1:
        return gone[:, None, :, None]
    by_number = torch.nn.functional.pad(gone, (0, x.shape[2] - gone.shape[1]))
    cells = [by_place(one.expand(x.shape[1], -1), ("batch", "pos")) for one in by_number]
    return torch.stack(cells).unsqueeze(-1)


@dataclass(frozen=True)
class CutEdges(Cell):
    """The clean run with the edges of `graph` cut that are not `kept`; `corrupted` as in `cutting`."""

    graph: Graph
    kept: Bool[Tensor, "sender receiver ..."]
    corrupted: Mapping[str, Tensor]

    @functools.cached_property
    def first(self) -> int:
        return 0

    @property
    def cuts(self) -> bool:
        """Whether an edge is cut; without one it is the clean run itself."""
        edges = [[sender.reaches(receiver) for receiver in self.graph.receivers] for sender in self.graph.senders]
        return not bool(self.kept[torch.tensor(edges)].all())

    @property
    def tells(self) -> bool:
        """Without an edge it is the corrupted run, whose faithfulness is 0 by any metric."""
        return bool(self.kept.any())

    def entry(self, run: Baseline) -> int:
        """Block 0: its input is the first sender, and what each sender writes is heard from there on."""
        return 0

    def hooks(self, cells: Sequence[Any], run: Baseline) -> list[tuple[str, Any]]:
        return cutting(self.graph, torch.stack([cell.kept for cell in cells]), self.corrupted, run.by_place)


def _first_and_last(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}, ..., {names[-1]} ({len(names)})"

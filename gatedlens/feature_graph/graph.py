"""FeatureGraph: which feature at which token made which other one, and the logits.

    graph = gl.feature_graph.attribute(model, text, [sae], logits="1")
    graph.nodes; graph.edges                        # Nodes; Edges (source, target, weight), the strongest first
    graph.into("3_17_20"), graph.out_of("E_21_7")   # the edges of one node
    small = graph.prune(0.8, 0.98)                  # what makes up 0.8 of the nodes' influence, 0.98 of the edges'
    small.facts["kept"], small.replacement, small.completeness
    small.intervene({"1_12_7": 0.0})                # clamp a feature: as the graph says, as frozen, in truth
    small.plot(); small.page().save("graph.html"); small.save("graph.safetensors")
    small.to_circuit_tracer("recall")               # the JSON of circuit-tracer's pages

`adjacency` [target, n] is what each of the n nodes adds to p, the sum that a target's activation is made of, or to a logit;
`values` [n] are these sums (of what is no target 1). Targets are features, mixers' writes and logits, in the order of the nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gatedlens.errors import InputError, did_you_mean
from gatedlens.feature_graph import influence
from gatedlens.feature_graph.circuit_tracer import circuit_tracer
from gatedlens.feature_graph.drawing import draw
from gatedlens.feature_graph.frozen import FrozenRun
from gatedlens.feature_graph.intervening import Intervened, intervened, predicted
from gatedlens.feature_graph.logits import Logits
from gatedlens.feature_graph.node import BIAS, ERROR, KINDS, LOGIT, TARGETS, TOKEN, Node
from gatedlens.feature_graph.page import page_of
from gatedlens.feature_graph.saving import read, write
from gatedlens.files import write_json
from gatedlens.foreign import Axes, Figure
from gatedlens.markup import card, picture, table
from gatedlens.options import checked
from gatedlens.plot.coloured_text import Html
from gatedlens.result.result import Result
from gatedlens.result.rounding import figures

# What a node is called by. For editors and type checkers: whoever passes something else gets the error of `node`.
if TYPE_CHECKING:
    Called: TypeAlias = str | Node
else:
    Called = Any


class Edge(NamedTuple):
    """`Edge("E_21_7", "1_12_7", 0.3)`: the source adds 0.3 to what the target is made of."""

    source: str
    target: str
    weight: float


class Check(NamedTuple):
    """`graph.check()`: how far a target is from the sum of its edges, at most: in its own unit, and as a share of the sum of
    their sizes."""

    absolute: float
    relative: float


@dataclass(frozen=True, eq=False)
class FeatureGraph:
    """`attribute(...)` makes one; see the head of this file. slopes [node]: how the activation hangs on p; probability [node]:
    of the logits, 0 elsewhere; kept, joined: which nodes and edges are in it, after pruning."""

    nodes: tuple[Node, ...]
    adjacency: Float[Tensor, "target n"]
    values: Float[Tensor, " n"]
    slopes: Float[Tensor, " n"]
    probability: Float[Tensor, " n"]
    tokens: Int[Tensor, " pos"]
    words: tuple[str, ...]
    kept: Bool[Tensor, " n"]
    joined: Bool[Tensor, "target n"]
    facts: Mapping[str, Any] = field(default_factory=dict)
    frozen: FrozenRun | None = None  # of a graph that was loaded there is no run
    logits: Logits | None = None

    # -- what is in it -------------------------------------------------------------------------------------------

    @cached_property
    def _places(self) -> dict[str, int]:
        return {node.id: place for place, node in enumerate(self.nodes)}

    def place(self, called: Called) -> int:
        """`graph.place("1_12_7")`: the number of a node, in the graph or pruned from it; InputError for what is none."""
        name = called.id if isinstance(called, Node) else called
        if not isinstance(name, str) or name not in self._places:
            near = [one.id for one in self.nodes if one.kind in TARGETS]
            raise InputError(
                f"{called!r:.80} is no node of this graph; it has {', '.join(near[-4:])}, ... (`graph.nodes`); a feature that "
                f"was not on is none.{did_you_mean(str(name), self._places)}"
            )
        return self._places[name]

    def node(self, called: Called) -> Node:
        """`graph.node("1_12_7")`: the node of a name."""
        return self.nodes[self.place(called)]

    def of(self, kind: str, pos: int | None = None) -> list[Node]:
        """`graph.of("feature", pos=7)`: the nodes of a kind that are in the graph, at a position (None: anywhere)."""
        if kind not in KINDS:
            raise InputError(
                f"kind={kind!r}: it is one of {', '.join(map(repr, KINDS))}.{did_you_mean(str(kind), KINDS)}"
            )
        length = len(self.tokens)
        if pos is not None and not -length <= pos < length:
            raise InputError(f"pos={pos} is out of range: the prompt has {length} positions.")
        at = None if pos is None else pos % length
        return [
            node
            for node, kept in zip(self.nodes, self.kept.tolist(), strict=True)
            if kept and node.kind == kind and at in (None, node.pos)
        ]

    def are(self, *kinds: str) -> Bool[Tensor, " n"]:
        """`graph.are("token", "error")`: which nodes are of some kinds."""
        return torch.tensor([node.kind in kinds for node in self.nodes], device=self.adjacency.device)

    @cached_property
    def targets(self) -> Int[Tensor, " target"]:
        """`graph.targets`: [target], the numbers of the nodes that edges come into, row by row of `adjacency`."""
        return self.are(*TARGETS).nonzero().squeeze(1)

    def __len__(self) -> int:
        return int(self.kept.sum())

    @cached_property
    def edges(self) -> list[Edge]:
        """`graph.edges`: its edges, the strongest first."""
        return self._edges(self.joined)

    @checked
    def top(self, n: int) -> list[Edge]:
        """`graph.top(20)`: the `n` strongest edges."""
        if n < 0:
            raise InputError(f"top({n}): give how many edges, a whole number.")
        return self._edges(self.joined, n)

    def _edges(self, mask: Bool[Tensor, "target n"], most: int | None = None) -> list[Edge]:
        rows, sources = (mask & (self.adjacency != 0)).nonzero(as_tuple=True)
        weights, targets = self.adjacency[rows, sources], self.targets[rows]
        order = figures(weights.abs()).argsort(descending=True, stable=True)[:most]
        return [
            Edge(self.nodes[s].id, self.nodes[t].id, w)
            for s, t, w in zip(sources[order].tolist(), targets[order].tolist(), weights[order].tolist(), strict=True)
        ]

    def into(self, target: Called) -> list[Edge]:
        """`graph.into("3_17_20")`: the edges that come into a node, the strongest first; they sum to `graph.value(target)` before
        any is pruned. InputError for a node that is no target.
        """
        row = self.targets == self._target(target)
        return self._edges(self.joined & row.unsqueeze(1))

    def out_of(self, source: Called) -> list[Edge]:
        """`graph.out_of("E_21_7")`: the edges that go out of a node, the strongest first."""
        place = self.place(source)
        mask = torch.zeros_like(self.joined)
        mask[:, place] = self.joined[:, place]
        return self._edges(mask)

    def value(self, target: Called) -> float:
        """`graph.value("3_17_20")`: the sum that a target's activation is made of, or the logit, as the run had it."""
        return float(self.values[self._target(target)])

    def _target(self, called: Called) -> int:
        place = self.place(called)
        if self.nodes[place].kind not in TARGETS:
            raise InputError(
                f"{self.nodes[place]} is no target: edges come into features, mixers' writes and logits alone."
            )
        return place

    def reaches(self, source: Called, target: Called) -> bool:
        """`graph.reaches("E_21_7", "3_17_20")`: whether edges of the graph lead from one node to another."""
        start, end = self.place(source), self.place(target)
        seen, new = torch.zeros_like(self.kept), torch.zeros_like(self.kept)
        new[start] = True
        while bool(new.any()):
            seen |= new
            reached, new = self.joined[:, new].any(1), torch.zeros_like(new)
            new[self.targets] = reached & ~seen[self.targets]
        return bool(seen[end])

    # -- how exact, how much -------------------------------------------------------------------------------------

    def check(self) -> Check:
        """`graph.check()`: how far the targets are from the sums of their edges, errors and the bias among them, at most."""
        size = self.adjacency.abs().sum(1).clamp(min=torch.finfo(self.adjacency.dtype).tiny)
        off = (self.adjacency.sum(1) - self.values[self.targets]).abs()
        return Check(float(off.max()), float((off / size).max()))

    @cached_property
    def _shares(self) -> Float[Tensor, "target n"]:
        return influence.shares(self._unbiased)

    @property
    def _unbiased(self) -> Float[Tensor, "target n"]:
        return self.adjacency.masked_fill(self.are(BIAS), 0)

    @cached_property
    def influence(self) -> Float[Tensor, " n"]:
        """`graph.influence`: [node], how much of what reaches the logits, by their probabilities, comes through each node."""
        return influence.of_nodes(self._shares, self.targets, self.probability)

    @property
    def replacement(self) -> float:
        """`graph.replacement`: of what ends in tokens and errors the share that ends in tokens, circuit-tracer's replacement
        score; of the whole graph, whatever is pruned."""
        return influence.replacement(self.influence, self.are(TOKEN), self.are(ERROR))

    @property
    def completeness(self) -> float:
        """`graph.completeness`: the share of edges that come from no error, by the influence of their targets, circuit-tracer's
        completeness score; of the whole graph, whatever is pruned."""
        return influence.completeness(self._shares, self.targets, self.influence, self.probability, self.are(ERROR))

    @checked
    def prune(self, nodes: float = 0.8, edges: float = 0.98) -> FeatureGraph:
        """`graph.prune(0.8, 0.98)`: the graph of the nodes that make up `nodes` of the influence of all, and of the edges between
        them those that make up `edges`; tokens and logits stay.

        facts["kept"]: the share of nodes and edges, and of their influence, that is kept. InputError for a share outside 0 to 1.
        """
        for name, asked in (("nodes", nodes), ("edges", edges)):
            if not 0 <= asked <= 1:
                raise InputError(f"prune({name}={asked}): a share, from 0 to 1.")
        at, w, stay = self.targets, self.probability, self.are(TOKEN, LOGIT)
        kept, joined = influence.pruned(self._unbiased, at, w, nodes, edges, stay)
        of_edges, there = influence.of_edges(self._shares, at, w), (self._unbiased != 0).double()
        said = {
            "nodes": _share(kept.double(), (~self.are(BIAS)).double()),
            "edges": _share(joined.double(), there),
            "influence of nodes": _share(self.influence * kept, self.influence),
            "influence of edges": _share(of_edges * joined, of_edges),
        }
        facts = {**self.facts, "pruned": {"nodes": nodes, "edges": edges}, "kept": said}
        return replace(self, kept=kept, joined=joined, facts=facts)

    # -- what it says of interventions ---------------------------------------------------------------------------

    def predict(self, clamped: Mapping[Called, float], through: Iterable[Called] | None = None) -> Result:
        """`graph.predict({"1_12_7": 0.0})`: what each logit changes by, by the edges alone, a Result [logit]; see `intervene`."""
        return predicted(self, clamped, through)

    def intervene(self, clamped: Mapping[Called, float], through: Iterable[Called] | None = None) -> Intervened:
        """`graph.intervene({"1_12_7": 0.0}, through=["2_3_9"])`: nodes clamped at activations: what each logit changes by, by the
        edges, in a frozen run (the same to rounding) and in the model; `.gap` is what the graph does not know.

        clamped: by node the activation; of a token or an error the share of what it writes that stays. through: the features and
        mixers' writes that respond (None: all of the graph; []: none, so that direct edges alone count). Edges between these
        count whether they are pruned or not. InputError for a node that is none, or cannot be clamped, or does not respond.
        """
        return intervened(self, clamped, through)

    # -- as something else ---------------------------------------------------------------------------------------

    def plot(self, ax: Axes | None = None) -> Figure:
        """`graph.prune().plot()`: a matplotlib Figure: positions from left to right, what runs later above; red edges add, blue
        ones take away. Of many edges the strongest."""
        return draw(self, ax)

    def page(self) -> Html:
        """`graph.prune().page().save("graph.html")`: a self-contained page on which a click on a node shows its edges."""
        return page_of(self)

    @checked
    def to_circuit_tracer(self, slug: str = "graph") -> dict[str, Any]:
        """`graph.prune().to_circuit_tracer("recall")`: the JSON of circuit-tracer's and Neuronpedia's pages, as a dict."""
        return circuit_tracer(self, slug)

    @checked
    def save(self, path: str | Path) -> Path:
        """`graph.save("graph.safetensors")`: all of it but the run, what `load` reads; `.json`: circuit-tracer's JSON; `.html`:
        the page. Returns the path; InputError for another ending."""
        path = Path(path)
        if path.suffix == ".json":
            return write_json(path, self.to_circuit_tracer(path.stem))
        if path.suffix == ".html":
            return self.page().save(path)
        if path.suffix != ".safetensors":
            raise InputError(
                f"save({str(path)!r}): a graph is written as .safetensors, .json or .html, not {path.suffix!r}."
            )
        return write(self, path)

    @staticmethod
    @checked
    def load(path: str | Path) -> FeatureGraph:
        """`FeatureGraph.load("graph.safetensors")`: what `save` wrote: it predicts, and has no run to intervene in.
        CheckpointError for a file that holds none."""
        return FeatureGraph(**read(path))

    # -- what it shows -------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        parts = [f"{len(self.of(kind))} of kind {kind}" for kind in KINDS if self.of(kind)]
        name = self.facts.get("model", "")
        return (
            f"FeatureGraph({name}: {len(self)} of {len(self.nodes)} nodes ({', '.join(parts)}), {int(self.joined.sum())} edges, "
            f"replacement {self.replacement:.3f}, completeness {self.completeness:.3f})"
        )

    def _repr_html_(self) -> str:
        facts: dict[str, object] = {"nodes": len(self), "edges": int(self.joined.sum())}
        facts |= {"replacement": round(self.replacement, 3), "completeness": round(self.completeness, 3)}
        rows = [(str(self.node(e.source)), str(self.node(e.target)), e.weight) for e in self.top(12)]
        return card(
            repr(self).partition(":")[0] + ")", facts, table(["source", "target", "adds"], rows), picture(self.plot)
        )


def _share(some: Float[Tensor, ...], of: Float[Tensor, ...]) -> float:
    """The sum of some as a share of that of all; 1 of nothing."""
    total = float(of.sum())
    return float(some.sum()) / total if total > 0 else 1.0

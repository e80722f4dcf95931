"""Intervening: nodes of a feature graph clamped, and what the graph says of it held against runs.

    graph.predict({"1_12_7": 0.0})                      # what each logit changes by, by the edges alone: a Result
    done = graph.intervene({"1_12_7": 0.0}, through=["2_3_9"])
    done.predicted, done.frozen, done.true              # the change of each logit: by the edges, in a frozen run, in the model
    done.rounding, done.gap                             # frozen - predicted: rounding; true - predicted: what was held

A node is clamped at an activation; an error, a token at a share of what it writes (1: as it is, 0: removed). `through` respond to
it, by p and as long as they are on, all others stay as they were; so with one node after the other it is one path:

    change of p_t = sum over s of A[t, s] * change of activation_s / activation_s
    change of activation_s = slope_s * change of p_s

The frozen run does the same with activations, sums and writes. In the model gates, norms and the features of all layers are free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gatedlens.errors import InputError
from gatedlens.feature_graph.node import BIAS, ERROR, FEATURE, LOGIT, MIXER, TOKEN
from gatedlens.feature_graph.sites import BEFORE, Site
from gatedlens.markup import card, table
from gatedlens.options import is_many, is_number
from gatedlens.recurrence.scanning import at_least_float32
from gatedlens.result.result import Result
from gatedlens.runs.relevance_rules import NORMED

if TYPE_CHECKING:
    from gatedlens.feature_graph.graph import Called, FeatureGraph
else:  # that file imports this one
    Called = FeatureGraph = Any


@dataclass(frozen=True, eq=False)
class Intervened:
    """`graph.intervene(...)`: see the head of this file. predicted, frozen, true: Results [logit]."""

    clamped: Mapping[str, float]
    through: tuple[str, ...]
    predicted: Result
    frozen: Result
    true: Result

    @property
    def gap(self) -> Float[Tensor, " logit"]:
        """`done.gap`: by how much the model's own change is more than the graph's: what gates, norms and other features do."""
        return self.true.values - self.predicted.values

    @property
    def rounding(self) -> float:
        """`done.rounding`: how far the frozen run is from the graph, at most."""
        return float((self.frozen.values - self.predicted.values).abs().max())

    def __repr__(self) -> str:
        said = ", ".join(f"{name}={value:.4g}" for name, value in self.clamped.items())
        parts = [f"{logit} {a:+.4g} (in truth {b:+.4g})" for logit, a, b in self._rows]
        return f"Intervened({said}; through {len(self.through)} nodes: {'; '.join(parts)})"

    @property
    def _rows(self) -> list[tuple[str, float, float]]:
        values = (self.predicted.values.tolist(), self.true.values.tolist())
        return list(zip(self.predicted["logit"], *values, strict=True))

    def _repr_html_(self) -> str:
        rows = [(name, a, b, b - a) for name, a, b in self._rows]
        facts = {"clamped": ", ".join(self.clamped), "through": f"{len(self.through)} nodes"}
        return card("Intervened", facts, table(["logit", "predicted", "true", "gap"], rows))


def intervened(graph: FeatureGraph, clamped: Mapping[Called, float], through: Iterable[Called] | None) -> Intervened:
    """`intervened(graph, {"1_12_7": 0.0}, None)`: `FeatureGraph.intervene`."""
    if graph.frozen is None or graph.logits is None:
        raise InputError("This graph was loaded, and no run came with it: attribute again, or ask `graph.predict`.")
    plan = Plan.of(graph, clamped, through)
    names = [graph.nodes[place].id for place in plan.free.nonzero().flatten().tolist()]
    said = {graph.nodes[place].id: value for place, value in plan.clamped.items()}
    with torch.no_grad():
        frozen, true = plan.in_frozen_run(), plan.in_the_model()
    found = {"graph": plan.predicted(), "frozen run": frozen, "model": true}
    results = (_result(graph, values, what) for what, values in found.items())
    return Intervened(said, tuple(names), *results)


def predicted(graph: FeatureGraph, clamped: Mapping[Called, float], through: Iterable[Called] | None) -> Result:
    """`predicted(graph, {"1_12_7": 0.0}, None)`: `FeatureGraph.predict`."""
    return _result(graph, Plan.of(graph, clamped, through).predicted(), "graph")


def _result(graph: FeatureGraph, values: Float[Tensor, " logit"], what: str) -> Result:
    names = [node.said for node in graph.nodes if node.kind == LOGIT]
    return Result(values, ("logit",), {"logit": names}, f"Clamped: in the {what}", "change", dict(graph.facts))


@dataclass(frozen=True)
class Plan:
    """Which nodes are clamped, by number, and which are free to respond."""

    graph: FeatureGraph
    clamped: Mapping[int, float]
    free: Bool[Tensor, " n"]

    @staticmethod
    def of(graph: FeatureGraph, clamped: Mapping[Called, float], through: Iterable[Called] | None) -> Plan:
        """InputError for no node, one that cannot be clamped or does not respond, and for what is no number."""
        if not isinstance(clamped, Mapping) or not clamped:
            raise InputError(f"{clamped!r:.80}: say which nodes are clamped at what: {{'1_12_7': 0.0}}.")
        found = {}
        for called, value in clamped.items():
            node = graph.node(called)
            if node.kind in (LOGIT, BIAS):
                raise InputError(
                    f"{node}: features, mixers' writes, errors and tokens are clamped; a {node.kind} is not."
                )
            if not is_number(value):
                raise InputError(f"{node} is clamped at {value!r:.80}: give a number.")
            found[graph.place(called)] = float(value)
        free = torch.zeros_like(graph.kept)
        if through is None:
            free |= graph.kept & graph.are(FEATURE, MIXER)
        elif isinstance(through, str) or not is_many(through):
            raise InputError(f"through={through!r:.80}: give a list of nodes.")
        else:
            for called in through:
                if graph.node(called).kind not in (FEATURE, MIXER):
                    raise InputError(f"through: {graph.node(called)} does not respond; features and mixers' writes do.")
                free[graph.place(called)] = True
        free[list(found)] = False
        return Plan(graph, found, free)

    def predicted(self) -> Float[Tensor, " logit"]:
        """By the edges."""
        graph = self.graph
        active = torch.tensor([node.activation for node in graph.nodes], dtype=torch.float64).to(graph.adjacency)
        share = torch.zeros_like(active)
        for place, value in self.clamped.items():
            share[place] = value / active[place] - 1
        at, slope = graph.targets, torch.where(self.free, graph.slopes / active, 0)
        change = graph.adjacency @ share
        for _ in graph.nodes:  # no path is longer than there are nodes; it ends when nothing changes any more
            after = graph.adjacency @ share.index_add(0, at, slope[at] * change)
            if torch.equal(after, change):
                break
            change = after
        return change[graph.are(LOGIT)[at]]

    # -- in runs -------------------------------------------------------------------------------------------------

    def in_frozen_run(self) -> Float[Tensor, " logit"]:
        """The same in a frozen run: activations clamped, sums read, writes written."""
        frozen, logits = self.graph.frozen, self.graph.logits
        assert frozen is not None and logits is not None
        leaves = frozen.leaves(1)
        for point, added in self._scaled():
            leaves[point] = leaves[point] + added
        starts = self._starts()

        def more(site: Site, x: Tensor) -> Tensor:
            assert site.nodes is not None
            nodes, some = site.nodes, slice(starts[site.point], starts[site.point] + len(site.nodes))
            change = torch.where(self.free[some], nodes.slope * (nodes.reads.of(x[0]) - nodes.reads.p), 0)
            for place, value in self._within(some).items():
                change[place] = value - nodes.activation[place]
            return nodes.spread(change, len(site.leaf))

        return logits.reads.of(frozen.run(leaves, 1, more)[NORMED][0]) - logits.reads.p

    def in_the_model(self) -> Float[Tensor, " logit"]:
        """The same in the model itself, where everything is free but what is clamped."""
        frozen, logits = self.graph.frozen, self.graph.logits
        assert frozen is not None and logits is not None
        hooks: list[tuple[str, Callable[..., Any]]] = [(point, _adding(added)) for point, added in self._scaled()]
        starts = self._starts()
        for site in frozen.sites:
            if site.nodes is None:
                continue
            start = starts[site.point]
            mine = self._within(slice(start, start + len(site.nodes)))
            if mine:
                seen: dict[str, Tensor] = {}
                hooks.append((site.nodes.reads.point.removesuffix(BEFORE), _seeing(seen)))
                hooks.append((site.point, _clamping(site, mine, seen)))
        out = frozen.model.run_with_hooks(frozen.tokens, fwd_hooks=hooks, **frozen.options)
        now = at_least_float32(out[0, int(logits.reads.pos[0])])
        right = torch.stack([now[token] for token, _ in logits.ids])
        wrong = torch.stack([now.new_zeros(()) if other is None else now[other] for _, other in logits.ids])
        return (right - wrong).to(logits.reads.p) - logits.reads.p

    def _starts(self) -> dict[str, int]:
        """The number of the first node of each site."""
        assert self.graph.frozen is not None
        starts, count = {}, 0
        for site in self.graph.frozen.sites:
            starts[site.point] = count
            count += 0 if site.nodes is None else len(site.nodes)
        return starts

    def _within(self, some: slice) -> dict[int, float]:
        """Those that are clamped among the nodes of a site, by their numbers in it."""
        return {place - some.start: value for place, value in self.clamped.items() if some.start <= place < some.stop}

    def _scaled(self) -> list[tuple[str, Float[Tensor, "pos width"]]]:
        """What errors and tokens write more or less, by point."""
        graph, frozen = self.graph, self.graph.frozen
        assert frozen is not None
        errors = {site.point: site.error for site in frozen.sites}
        found = []
        for place, value in self.clamped.items():
            node = graph.nodes[place]
            if node.kind in (ERROR, TOKEN):
                whole = frozen.embedded if node.kind == TOKEN else errors[node.point]
                assert whole is not None
                added = torch.zeros_like(whole)
                added[node.pos] = (value - 1) * whole[node.pos]
                found.append((node.point, added))
        return found


def _adding(added: Float[Tensor, "pos width"]) -> Callable[..., Tensor]:
    return lambda x, hook: x + added.reshape(x.shape).to(x.dtype)


def _seeing(seen: dict[str, Tensor]) -> Callable[..., None]:
    def seeing(x: Tensor, hook: Any) -> None:
        seen["x"] = at_least_float32(x[0].flatten(1))

    return seeing


def _clamping(site: Site, clamped: Mapping[int, float], seen: Mapping[str, Tensor]) -> Callable[..., Tensor]:
    """The hook that writes what some nodes would write if they were as they are clamped, in place of what they write now."""

    def clamping(x: Tensor, hook: Any) -> Tensor:
        assert site.nodes is not None
        now = site.now(seen["x"])
        change = torch.zeros_like(now)
        for place, value in clamped.items():
            change[place] = value - now[place]
        return x + site.nodes.spread(change, len(site.leaf)).reshape(x.shape).to(x.dtype)

    return clamping

"""Assembly: the nodes of a frozen run, by their names, and the edges between them as one graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gatedlens.feature_graph.frozen import FrozenRun
from gatedlens.feature_graph.graph import FeatureGraph
from gatedlens.feature_graph.logits import Logits
from gatedlens.feature_graph.node import BIAS, ERROR, FEATURE, LOGIT, TOKEN, Node


def graph_of(
    frozen: FrozenRun, logits: Logits, chosen: Int[Tensor, " kept"], rows: Float[Tensor, "target source"]
) -> FeatureGraph:
    """`graph_of(frozen, logits, chosen, rows)`: the graph of the edges into the chosen nodes and the logits, from all sources.

    What the nodes that are not chosen write is counted with the error of their site and position.
    """
    edges, on = _counted(frozen, chosen, rows), sum(len(site.nodes) for site in frozen.sites if site.nodes is not None)
    frozen = _with(frozen, chosen)
    nodes = (*_of_sites(frozen), *_of_errors(frozen), *_of_ends(frozen, logits))
    size, first, last = len(nodes), len(chosen), len(nodes) - len(logits.ids)
    targets = [*range(first), *range(last, size)]
    adjacency = torch.cat([edges, rows.new_zeros(len(rows), len(logits.ids))], 1)  # no logit adds to anything
    with_nodes = [site.nodes for site in frozen.sites if site.nodes is not None]
    values, slopes, probability = (rows.new_full((size,), given) for given in (1.0, 0.0, 0.0))
    values[targets] = torch.cat([*(one.reads.p for one in with_nodes), logits.reads.p]).to(rows)
    slopes[targets] = torch.cat([*(one.slope for one in with_nodes), torch.ones_like(logits.reads.p)]).to(rows)
    probability[last:] = logits.probability.to(rows)
    tokens = frozen.tokens[0]
    facts = {
        "model": frozen.model.cfg.model_name,
        "layers": frozen.model.cfg.n_layers,
        "dictionaries": [repr(one.dictionary) for one in frozen.places.dictionaries],
        "counted with errors": on - first,
        "points": [site.point for site in frozen.sites],
    }
    kept = torch.ones(size, dtype=torch.bool, device=rows.device)
    words = tuple(frozen.words(tokens))
    return FeatureGraph(
        nodes, adjacency, values, slopes, probability, tokens, words, kept, adjacency != 0, facts, frozen, logits
    )


def _counted(frozen: FrozenRun, chosen: Int[Tensor, " kept"], rows: Tensor) -> Float[Tensor, "target source"]:
    """The edges of the chosen nodes and of errors, tokens and the bias; those of the others added to their errors."""
    total = sum(len(site.nodes) for site in frozen.sites if site.nodes is not None)
    others, rest = torch.ones(total, dtype=torch.bool), rows[:, total:].clone()
    others[chosen] = False
    start = error = 0
    for site in frozen.sites:
        count = 0 if site.nodes is None else len(site.nodes)
        if site.nodes is not None and site.error is not None:
            left = others[start : start + count].nonzero().squeeze(1).to(rows.device)
            rest.index_add_(1, error + site.nodes.reads.pos[left], rows[:, start + left])
        start += count
        error += 0 if site.error is None else len(site.leaf)
    return torch.cat([rows[:, chosen.to(rows.device)], rest], dim=1)


def _with(frozen: FrozenRun, chosen: Int[Tensor, " kept"]) -> FrozenRun:
    """The run whose sites have the chosen nodes alone."""
    sites, start = [], 0
    for site in frozen.sites:
        count = 0 if site.nodes is None else len(site.nodes)
        mine = chosen[(chosen >= start) & (chosen < start + count)] - start
        sites.append(site.some(mine))
        start += count
    return replace(frozen, sites=tuple(sites))


# -- the nodes, in the order of the sources, and the logits behind ----------------------------------------------------


def _of_sites(frozen: FrozenRun) -> Iterator[Node]:
    words, before = frozen.words(frozen.tokens[0]), dict[int, int]()
    for site in frozen.sites:
        if site.nodes is None:
            continue
        first = before.get(site.layer, 0)
        before[site.layer] = first + site.names
        parts = (site.nodes.reads.pos, site.nodes.feature, site.nodes.activation)
        for pos, number, activation in zip(*(part.tolist() for part in parts), strict=True):
            what = f" feature {number}" if site.kind == FEATURE else ""
            said = f"{_short(site.point)}{what} at {pos} {words[pos]!r}"
            yield Node(
                f"{site.layer}_{first + number}_{pos}", site.kind, site.layer, pos, number, site.point, activation, said
            )


def _of_errors(frozen: FrozenRun) -> Iterator[Node]:
    words, before = frozen.words(frozen.tokens[0]), dict[int, int]()
    for site in frozen.sites:
        if site.error is None:
            continue
        before[site.layer] = rank = before.get(site.layer, 0) - 1
        what = "" if site.dictionary is None else " error"
        for pos, word in enumerate(words):
            said = f"{_short(site.point)}{what} at {pos} {word!r}"
            yield Node(f"{site.layer}_{rank}_{pos}", ERROR, site.layer, pos, rank, site.point, 1.0, said)


def _of_ends(frozen: FrozenRun, logits: Logits) -> Iterator[Node]:
    entrance, layers = frozen.places.entrance, frozen.model.cfg.n_layers
    ids = frozen.tokens[0].tolist()
    for pos, (token, word) in enumerate(zip(ids, frozen.words(frozen.tokens[0]), strict=True)):
        yield Node(f"E_{token}_{pos}", TOKEN, -1, pos, token, entrance, 1.0, f"token {word!r} at {pos}")
    yield Node("E_-1_0", BIAS, -1, 0, -1, "", 1.0, "biases")
    size = frozen.logits.shape[-1]
    for i, ((token, other), said) in enumerate(zip(logits.ids, logits.said, strict=True)):
        number = (
            token if other is None else size + i
        )  # no token's: circuit-tracer counts such targets behind the vocabulary
        pos, value = int(logits.reads.pos[i]), float(logits.reads.p[i])
        yield Node(f"{layers + 1}_{number}_{pos}", LOGIT, layers, pos, number, "", value, f"logit of {said!r}")


def _short(point: str) -> str:
    """`blocks.1.mixer.hook_gated` as "1.mixer.gated"."""
    return point.removeprefix("blocks.").replace("hook_", "")

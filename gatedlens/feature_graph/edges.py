"""Edges: what each source adds to what each target reads, straight, through nothing but frozen mixers and norms.

    A[t, s] = activation_s * write_s . (d p_t / d what is written at s's site and position)

One backward pass through a frozen run (frozen.py) for as many targets as it has rows. Where sites hold more features than are
asked for, the most influential are chosen, a batch at a time, by what is known of their influence (Ameisen et al. 2025).
n sources: features and mixers' writes, then errors, tokens and the bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from gatedlens.feature_graph import influence
from gatedlens.feature_graph.frozen import FrozenRun
from gatedlens.feature_graph.logits import Logits
from gatedlens.feature_graph.node import MIXER
from gatedlens.feature_graph.sites import Nodes, Reads, Site


@dataclass
class Edges:
    """`Edges(frozen, rows=16)`: a frozen run of so many rows, ready for backward passes."""

    frozen: FrozenRun
    rows: int
    leaves: dict[str, Tensor] = field(init=False)
    read: Mapping[str, Tensor] = field(init=False)
    biases: Mapping[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        with torch.no_grad():
            self.biases = self.frozen.run(self.frozen.nothing(), 1)
        with torch.enable_grad():
            self.leaves = {name: leaf.requires_grad_() for name, leaf in self.frozen.leaves(self.rows).items()}
            self.read = self.frozen.run(self.leaves, self.rows)

    @property
    def sites(self) -> tuple[Site, ...]:
        """`edges.sites`: those of the run."""
        return self.frozen.sites

    @property
    def with_nodes(self) -> list[tuple[str, Nodes]]:
        """`edges.with_nodes`: the sites that have nodes, by their points, and the nodes."""
        return [(site.point, site.nodes) for site in self.sites if site.nodes is not None]

    def into(self, reads: Reads) -> Float[Tensor, "target n"]:
        """`edges.into(reads)`: [target, source], of at most `rows` targets that read one point."""
        x, count = self.read[reads.point], len(reads.p)
        seed = torch.zeros_like(x)
        seed[torch.arange(count, device=x.device), reads.pos] = reads.read.to(x)
        found = torch.autograd.grad(x, list(self.leaves.values()), seed, retain_graph=True, allow_unused=True)
        back = {
            name: torch.zeros_like(leaf[:count]) if g is None else g[:count]
            for (name, leaf), g in zip(self.leaves.items(), found, strict=True)
        }
        by_nodes = [
            (back[point][:, nodes.reads.pos] * nodes.write).sum(-1) * nodes.activation
            for point, nodes in self.with_nodes
        ]
        by_errors = [(back[site.point] * site.error).sum(-1) for site in self.sites if site.error is not None]
        by_tokens = (back[self.frozen.places.entrance] * self.frozen.embedded).sum(-1)
        bias = reads.of(self.biases[reads.point][0]).unsqueeze(1)
        return torch.cat([*by_nodes, *by_errors, by_tokens, bias], dim=1)

    def of_all(
        self, logits: Logits, most: int, progress: bool
    ) -> tuple[Int[Tensor, " kept"], Float[Tensor, "target n"]]:
        """`chosen, rows = edges.of_all(logits, 4096, True)`: which nodes are kept, every mixer's and at most so many features, by
        their numbers; and the edges into them and, behind them, into the logits. The sources are all nodes."""
        mixers = torch.tensor(
            [site.kind == MIXER for site in self.sites for _ in range(len(site.nodes or ()))], dtype=torch.bool
        )
        total, wanted = len(mixers), min(len(mixers), most + int(mixers.sum()))
        rows = {total + i: row for i, row in enumerate(self._batched(logits.reads))}
        waiting = torch.ones(total, dtype=torch.bool)
        with tqdm(total=wanted, disable=not progress, desc="feature graph", unit="node") as bar:
            some = mixers.nonzero().squeeze(1) if wanted < total else torch.arange(total)
            while True:
                rows |= self._rows_of(some)
                waiting[some] = False
                bar.update(len(some))
                left = wanted - int((~waiting).sum())
                if not left:
                    break
                some = self._next(rows, waiting, logits, min(left, 4 * self.rows))
        chosen = (~waiting).nonzero().squeeze(1)
        order = [*chosen.tolist(), *range(total, total + len(logits.ids))]
        return chosen, torch.stack([rows[number] for number in order])

    def _next(self, rows: Mapping[int, Tensor], waiting: Tensor, logits: Logits, count: int) -> Int[Tensor, " some"]:
        """The most influential of the nodes that wait, as far as the rows that are known tell."""
        total, known = len(waiting), sorted(rows)
        found = torch.stack([rows[number] for number in known])
        a = torch.cat([influence.shares(found[:, :-1])[:, :total], found.new_zeros(len(known), len(logits.ids))], 1)
        w = torch.cat([found.new_zeros(total), logits.probability.to(found)])
        score = influence.of_nodes(a, torch.tensor(known, device=a.device), w)[:total].cpu().masked_fill(~waiting, -1)
        return score.argsort(descending=True, stable=True)[:count].sort().values

    def _rows_of(self, some: Int[Tensor, " some"]) -> dict[int, Float[Tensor, " n"]]:
        """The edges into some nodes, by their numbers."""
        found: dict[int, Tensor] = {}
        start = 0
        for _, nodes in self.with_nodes:
            mine = some[(some >= start) & (some < start + len(nodes))]
            found |= dict(zip(mine.tolist(), self._batched(nodes.reads.some(mine - start)), strict=True))
            start += len(nodes)
        return found

    def _batched(self, reads: Reads) -> list[Float[Tensor, " n"]]:
        parts = torch.arange(len(reads.p)).split(self.rows)
        return [row for part in parts if len(part) for row in self.into(reads.some(part)).unbind(0)]

"""The residual graph: who writes into the residual stream, and who reads it.

    graph = Graph.of(model)
    graph.names                       # ("embed", "0.mixer", "0.mlp", "1.mixer", ..., "logits")
    graph.find("1.mixer").reads       # "blocks.1.hook_mixer_in"; writes "blocks.1.hook_mixer_out"

A receiver reads the sum of what all senders before it have written, so there is an edge from each sender to each later
receiver (Elhage et al. 2021). `embed` is the stream as block 0 gets it (behind RWKV's first norm, scaled in Griffin),
`logits` the final norm and the unembedding. Nodes are in the order in which they run. A part that writes to no stream but into
what one branch reads (Zamba2's shared block, `1.shared`) has one edge, to that branch (`1.mixer`); what it reads of the embedding
beside the stream belongs to its edge from embed. What a block reads of an earlier one beside the stream (RWKV-7's first values)
is no edge: path patching holds it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from gatedlens.address.names import is_glob
from gatedlens.errors import InputError, PointError, did_you_mean
from gatedlens.model.base import HookedModel

# For editors and type checkers: whoever passes something else gets the error of `Graph.find`.
if TYPE_CHECKING:
    Name: TypeAlias = str
else:
    Name = Any


@dataclass(frozen=True)
class Node:
    """`Node("1.mixer", 1, reads="blocks.1.hook_mixer_in", writes="blocks.1.hook_mixer_out")`.

    An edit of what it `reads` reaches it alone. `layer` is the block that holds these points; `turn` counts from embed, and
    parallel branches have the same. only: the one node that reads what it writes (none: every later one). beside: where it reads
    the embedding once more, beside the stream (none: nowhere).
    """

    name: str
    layer: int
    reads: str = ""  # embed reads nothing of the stream
    writes: str = ""  # and logits write nothing into it
    turn: int = 0
    only: str = ""
    beside: str = ""

    def reaches(self, receiver: Node) -> bool:
        """`sender.reaches(receiver)`: whether the receiver reads what it writes."""
        return self.turn < receiver.turn and self.only in ("", receiver.name)


class Edge(NamedTuple):
    """`Edge("embed", "1.mixer")`; with a position where edges are told apart by it."""

    sender: str
    receiver: str
    pos: int | None = None

    def __str__(self) -> str:
        return f"{self.sender} -> {self.receiver}" + ("" if self.pos is None else f" @ {self.pos}")


@dataclass(frozen=True)
class Graph:
    """All nodes of one model, from `embed` to `logits`."""

    nodes: tuple[Node, ...]

    @classmethod
    def of(cls, model: HookedModel) -> Graph:
        """`Graph.of(model)`: embed, then what each layer adds to the stream (a mixer, and an MLP where there is one), then
        logits."""
        nodes, turn, last = [Node("embed", 0, writes="blocks.0.hook_resid_pre")], 0, model.cfg.n_layers - 1
        for layer in range(last + 1):
            for group in model.names.branches(layer):
                for one in (one for one in model.blocks[layer].inner if one.reader in group):
                    turn += 1
                    part = f"blocks.{layer}.{one.name}"
                    points, only = (f"{part}.hook_read", f"{part}.hook_out"), f"{layer}.{one.reader}"
                    nodes.append(Node(f"{layer}.{one.name}", layer, *points, turn, only, f"{part}.hook_embed"))
                turn += 1
                for kind in group:
                    point = f"blocks.{layer}.hook_{kind}"
                    nodes.append(Node(f"{layer}.{kind}", layer, f"{point}_in", f"{point}_out", turn))
        # Behind the last block the stream goes to the final norm and nowhere else.
        return cls((*nodes, Node("logits", last, reads=f"blocks.{last}.hook_resid_post", turn=turn + 1)))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(node.name for node in self.nodes)

    @property
    def senders(self) -> tuple[Node, ...]:
        return self.nodes[:-1]

    @property
    def receivers(self) -> tuple[Node, ...]:
        return self.nodes[1:]

    def place(self, node: Node) -> int:
        """`graph.place(node)`: the node's number in running order, 0 for embed."""
        return self.nodes.index(node)

    def before(self, receiver: Node) -> tuple[Node, ...]:
        """`graph.before(graph.find("1.mixer"))`: the senders whose sum a receiver reads; parallel branches do not read one
        another."""
        return tuple(node for node in self.nodes if node.reaches(receiver))

    def readings(self, receiver: Node) -> list[tuple[str, tuple[Node, ...]]]:
        """`graph.readings(graph.find("1.shared"))`: the points at which a receiver reads, each with the senders whose sum stands
        there."""
        beside = [(receiver.beside, self.nodes[:1])] if receiver.beside else []
        return [(receiver.reads, self.before(receiver)), *beside]

    def edges(self) -> list[Edge]:
        """`graph.edges()`: every edge, by receiver in running order."""
        return [Edge(sender.name, node.name) for node in self.receivers for sender in self.before(node)]

    # -- by name -------------------------------------------------------------------------------------------------

    def find(self, name: Name) -> Node:
        """`graph.find("1.mixer")`: the node of this name, or whose point it is (`blocks.1.hook_mixer_out`).

        PointError if there is none.
        """
        for node in self.nodes:
            if name and name in (node.name, node.reads, node.writes):
                return node
        raise PointError(
            f"{name!r} is no node of the residual graph.{did_you_mean(str(name), self.names)} The nodes are "
            f"{', '.join(self.names[:4])}, ..., {self.names[-1]}."
        )

    def some(self, names: str | Sequence[str]) -> list[Node]:
        """`graph.some("*.mixer")`: the nodes of a name, a glob or a list of these, in running order.

        PointError for a name that no node has, or a glob that matches none; InputError for an empty list.
        """
        asked = [names] if isinstance(names, str) else list(names)
        if not asked:
            raise InputError("No node is named: the list is empty.")
        wanted = [node for name in asked for node in (self._matching(name) if is_glob(name) else [self.find(name)])]
        return [node for node in self.nodes if node in wanted]

    def _matching(self, pattern: str) -> list[Node]:
        found = [node for node in self.nodes if fnmatch.fnmatchcase(node.name, pattern)]
        if not found:
            raise PointError(f"The pattern {pattern!r} matches no node; the nodes are {', '.join(self.names)}.")
        return found

    def sender(self, name: str) -> Node:
        """`graph.sender("0.mixer")`: as `find`; InputError for `logits`, which writes nothing into the stream."""
        node = self.find(name)
        if not node.writes:
            raise InputError(f"{node.name!r} sends nothing: it is where the stream ends.")
        return node

    def check_order(self, sender: Node, receivers: Sequence[Node]) -> None:
        """`graph.check_order(sender, receivers)`: InputError unless every receiver comes after the sender."""
        for receiver in receivers:
            if not sender.reaches(receiver):
                later = [node.name for node in self.nodes if sender.reaches(node)]
                raise InputError(
                    f"{sender.name!r} does not reach {receiver.name!r}: a receiver reads what was written before it. After "
                    f"{sender.name!r} come {', '.join(later[:4])}."
                )

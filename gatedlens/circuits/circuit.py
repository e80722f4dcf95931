"""Circuit: some edges of a model's residual graph, with a score each; a value that can be run, judged, saved and drawn.

    circuit = gl.circuits.eap_ig(model, clean, corrupted, metric).top(8)
    circuit.nodes, circuit.edges                       # ("embed", "0.mixer", ...), [Edge("embed", "0.mixer"), ...]
    circuit.faithfulness(model, clean, corrupted, metric)          # 1: as the whole model; 0: as with everything corrupted
    circuit.curve(model, clean, corrupted, metric).plot()          # faithfulness by the number of edges
    circuit.save("circuit.json"); Circuit.load("circuit.json"); circuit.plot()

`scores` is a Result [sender, receiver] (and pos, where edges are told apart by it), NaN where there is no edge; `kept`
says which edges are in the circuit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gatedlens.circuits.faithfulness import EdgePatch
from gatedlens.circuits.graph import Edge
from gatedlens.errors import InputError
from gatedlens.files import Fields, read_json, write_json
from gatedlens.foreign import Axes, DataFrame, Figure
from gatedlens.markup import card, picture, table
from gatedlens.metrics import Metric
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Input
from gatedlens.options import checked
from gatedlens.plot.backends import plotly
from gatedlens.result.result import Result
from gatedlens.runs.engine import Earlier, Effort

# A `data` of another kind gets the error of `Fields`: for editors and type checkers alone.
if TYPE_CHECKING:
    Data: TypeAlias = Mapping[str, Any]
else:
    Data = Any

FORMAT = 1  # of the JSON


@dataclass(frozen=True, eq=False)
class Circuit:
    """`Circuit.of(scores)` holds every edge; `top` and `keep` give circuits with fewer."""

    scores: Result
    kept: Bool[Tensor, "sender receiver ..."]

    @classmethod
    def of(cls, scores: Result) -> Circuit:
        """`Circuit.of(scores)`: the circuit of every edge that has a score."""
        return cls(scores, ~scores.values.isnan())

    # -- what is in it -------------------------------------------------------------------------------------------

    @property
    def graph(self) -> tuple[str, ...]:
        """Every node of the model, in the circuit or not."""
        return (*self.scores["sender"], "logits")

    @property
    def edges(self) -> list[Edge]:
        """The edges, the strongest first."""
        return [self._edge(place) for place in self._strongest(self.kept)]

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes that its edges join, in running order."""
        joined = {name for edge in self.edges for name in (edge.sender, edge.receiver)}
        return tuple(name for name in self.graph if name in joined)

    def __len__(self) -> int:
        return int(self.kept.sum())

    @checked
    def score(self, sender: str, receiver: str, pos: int | None = None) -> float:
        """`circuit.score("embed", "1.mixer")`: the score of an edge, in the circuit or not; InputError for what is none."""
        return float(self.scores.values[self._place(Edge(sender, receiver, pos))])

    def __repr__(self) -> str:
        shown = "".join(f", {edge} ({self.score(*edge):+.3g})" for edge in self.edges[:3])
        idle = len(self) - len(self.pruned())
        count = f"{len(self)} of {int((~self.scores.values.isnan()).sum())} edges"
        count += f" ({idle} on no path from embed to logits)" if idle else ""
        return f"Circuit({self.scores.title}: {count}, {len(self.nodes)} of {len(self.graph)} nodes{shown})"

    # -- circuits with fewer edges -------------------------------------------------------------------------------

    @checked
    def top(self, n: int) -> Circuit:
        """`circuit.top(8)`: its `n` edges of the largest |score|; `top(8).pruned()` leaves out those on no path to the logits.

        Such edges change nothing in a run: what they carry is corrupted anyway, or nobody reads it.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise InputError(f"top({n!r}): give how many edges to keep, a whole number.")
        kept = torch.zeros_like(self.kept)
        for place in self._strongest(self.kept)[:n]:
            kept[place] = True
        return Circuit(self.scores, kept)

    @checked
    def keep(self, edges: Iterable[Sequence[Any]]) -> Circuit:
        """`circuit.keep([("embed", "0.mixer"), ("0.mixer", "logits")])`: these edges, whatever their scores."""
        kept = torch.zeros_like(self.kept)
        for edge in edges:
            if isinstance(edge, str) or len(edge) not in (2, 3):
                raise InputError(f"{edge!r} is no edge: give (sender, receiver), with a position where they have one.")
            kept[self._place(Edge(*edge))] = True
        return Circuit(self.scores, kept)

    def pruned(self) -> Circuit:
        """`circuit.top(8).pruned()`: without the edges that lie on no path from embed to logits.

        Positions are left out of it: a mixer may carry what it read at one position to any other.
        """
        joined = self.kept if self.kept.ndim == 2 else self.kept.any(-1)
        size = len(joined)
        fed, heard = torch.zeros(size + 1, dtype=torch.bool), torch.zeros(size + 1, dtype=torch.bool)
        fed[0] = heard[size] = True  # by number of the node: receiver r is node r + 1
        for node in range(1, size + 1):
            fed[node] = (joined[:, node - 1] & fed[:-1]).any()
        for node in reversed(range(size)):
            heard[node] = (joined[node] & heard[1:]).any()
        on_path = fed[:-1].unsqueeze(1) & heard[1:]
        return Circuit(self.scores, self.kept & on_path.reshape(size, size, *(1 for _ in self.kept.shape[2:])))

    def _strongest(self, among: Tensor) -> list[tuple[int, ...]]:
        size = self.scores.values.detach().double().abs().masked_fill(~among, -1).flatten()
        order = size.argsort(descending=True, stable=True)[: int(among.sum())]
        return [tuple(int(i) for i in torch.unravel_index(place, among.shape)) for place in order]

    def _edge(self, place: tuple[int, ...]) -> Edge:
        sender, receiver, *pos = place
        return Edge(self.scores["sender"][sender], self.scores["receiver"][receiver], *pos)

    def _place(self, edge: Edge) -> tuple[int, ...]:
        place = [self.scores.place("sender", edge.sender), self.scores.place("receiver", edge.receiver)]
        if (edge.pos is None) == (self.kept.ndim == 3):
            told = "are told apart by position: name it too" if edge.pos is None else "have no positions here"
            raise InputError(f"{edge}: edges {told}.")
        if edge.pos is not None:
            place.append(self.scores.place("pos", edge.pos))
        if bool(self.scores.values[tuple(place)].isnan()):
            raise InputError(f"{edge} is no edge: {edge.receiver!r} does not come after {edge.sender!r}.")
        return tuple(place)

    # -- run it --------------------------------------------------------------------------------------------------

    def run(self, model: HookedModel, clean: Input, corrupted: Input, **options: Any) -> Float[Tensor, "batch ..."]:
        """`circuit.run(model, clean, corrupted)`: the clean input's logits, every edge outside the circuit corrupted.

        What a receiver reads is the sum of its kept senders as they are in this run, and of its cut senders as in the corrupted
        run. options: the forward's, attention_mask say. InputError for a model with other nodes, inputs that do not fit together,
        and another number of positions than the circuit tells apart.
        """
        return EdgePatch.of(model, clean, corrupted, options, self.graph).logits(self.kept)

    def faithfulness(self, model: HookedModel, clean: Input, corrupted: Input, metric: Metric, **options: Any) -> float:
        """`circuit.faithfulness(model, clean, corrupted, metric)`: 1 if it does what the model does, 0 if it does nothing.

        (m(circuit) - m(corrupted)) / (m(clean) - m(corrupted)), m the metric's mean over rows. metric: logits -> one number a
        row. The rest, and the errors, are those of `run`; InputError too where the metric is the same in the clean and in the
        corrupted run. Hanna et al. 2024 (arXiv 2403.17806), sec. 2.
        """
        return EdgePatch.of(model, clean, corrupted, options, self.graph).faithfulness(metric, self.kept)

    @checked
    def curve(
        self,
        model: HookedModel,
        clean: Input,
        corrupted: Input,
        metric: Metric,
        sizes: Sequence[int] | None = None,
        progress: bool = True,
        results: Earlier = None,
        max_bytes: int | None = None,
        max_rows: int | None = None,
        **options: Any,
    ) -> Result:
        """`circuit.curve(model, clean, corrupted, metric, sizes=[1, 2, 4]).plot()`: the faithfulness of `top(n)` by n.

        A Result with one axis, edges: an entry for each n of `sizes` (None: none, one, two, four, ..., all edges). Many circuits
        run in one batch. results, max_bytes, max_rows: as in every sweep, see `gl.patching.Options`. The rest, and the errors,
        are those of `faithfulness`; InputError too for no sizes, and for a model in training mode.
        """
        chosen = _doubling(len(self)) if sizes is None else list(sizes)
        if not chosen:
            raise InputError("sizes is empty: give numbers of edges, or None.")
        circuits = [(n, self.top(n)) for n in chosen]
        patch = EdgePatch.of(model, clean, corrupted, options, self.graph)
        # What the scores' own sweep says of its progress is not this one's.
        facts = {name: said for name, said in self.scores.facts.items() if name not in ("cells", "measured", "run")}
        facts["edges_on_paths"] = [len(circuit.pruned()) for _, circuit in circuits]
        kept = [(n, circuit.kept) for n, circuit in circuits]
        effort = Effort(results, max_bytes, max_rows, progress)
        return patch.curve(metric, kept, f"Circuits by {self.scores.title}", facts, effort)

    # -- as something else ---------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """`circuit.to_dict()`: all of it as JSON holds it, what `save` writes."""
        places = self.kept.nonzero().tolist()
        return {"format": FORMAT, "kept": places, "nodes": list(self.nodes), "scores": self.scores.to_dict()}

    @classmethod
    @checked
    def from_dict(cls, data: Data, where: str | Path = "This") -> Circuit:
        """`Circuit.from_dict(circuit.to_dict())`: the circuit again. InputError names the field that is not as it should be."""
        fields = Fields(data, "circuit", where)
        fields.format(FORMAT)
        scores = Result.from_dict(fields.fields("scores"), f"{where}, field 'scores',")
        fields.check(
            scores.axes[:2] == ("sender", "receiver") and scores.axes[2:] in ((), ("pos",)),
            "scores",
            "a result with the axes sender, receiver (and pos)",
        )
        named = all(isinstance(label, str) for axis in ("sender", "receiver") for label in scores[axis])
        fields.check(named, "scores", "nodes that are named: labels of sender and receiver that are texts")
        there = {tuple(place) for place in (~scores.values.isnan()).nonzero().tolist()}
        expected = f"places [sender, receiver{', pos' * (scores.ndim == 3)}] at which there is a score"
        places = fields.get("kept", expected, lambda v: isinstance(v, list) and all(isinstance(p, list) for p in v))
        kept = torch.zeros(scores.shape, dtype=torch.bool)
        for place in places:
            fields.check(all(type(i) is int for i in place) and tuple(place) in there, "kept", expected)
            kept[tuple(place)] = True
        return cls(scores, kept)

    @checked
    def save(self, path: str | Path) -> Path:
        """`circuit.save("circuit.json")`: write JSON, and return the path."""
        return write_json(path, self.to_dict())

    @classmethod
    @checked
    def load(cls, path: str | Path) -> Circuit:
        """`Circuit.load("circuit.json")`: what `save` wrote; InputError for a file that holds none."""
        return cls.from_dict(read_json(path, "circuit"), path)

    def to_dataframe(self) -> DataFrame:
        """`circuit.to_dataframe()`: a pandas DataFrame: a row an edge, the strongest first: sender, receiver (pos), score."""
        import pandas

        return pandas.DataFrame(self._rows(self.edges), columns=[*self.scores.axes, "score"])

    def _rows(self, edges: Sequence[Edge]) -> list[list[Any]]:
        return [[*edge[: self.kept.ndim], self.score(*edge)] for edge in edges]

    @checked
    def plot(self, ax: Axes | None = None, backend: str = "matplotlib") -> Figure:
        """`circuit.plot()`: a matplotlib Figure, that of `ax` if given; backend="plotly": one to hover over.

        Nodes stand in running order from embed to logits; edges are as wide as their scores are large, red for positive.
        """
        from gatedlens.circuits import drawing

        return drawing.hovered(self) if plotly(backend, ax) else drawing.draw(self, ax)

    def _repr_html_(self) -> str:
        every = int((~self.scores.values.isnan()).sum())
        facts = {"edges": f"{len(self)} of {every}", "nodes": f"{len(self.nodes)} of {len(self.graph)}"}
        strongest = table([*self.scores.axes, "score"], self._rows(self.edges[:8]))
        return card(f"Circuit: {self.scores.title}", facts, strongest, picture(self.plot))


def _doubling(n: int) -> list[int]:
    """0, 1, 2, 4, ... up to `n`, and `n`."""
    powers = [2**i for i in range(n.bit_length()) if 2**i < n]
    return [0, *powers, n] if n else [0]

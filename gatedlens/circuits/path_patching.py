"""Path patching: what one sender says to chosen receivers through the residual stream, with everything else frozen.

    path_patch(model, clean, corrupted, metric, "0.mixer", "logits")             # the direct effect, [batch]
    path_patch(model, clean, corrupted, metric, "embed", ["1.mixer", "2.mixer"], pos=[3, 4])
    path_patch_senders(model, clean, corrupted, metric, "1.mixer").plot()        # every sender before it
    path_patch_heads(model, clean, corrupted, metric, "logits").plot()           # every head before them, layer head

The sender's output is the clean run's, every other node's output the corrupted run's; what each receiver then reads is
put into the corrupted run, which goes on from there. The number is metric(patched) - metric(corrupted). Wang et al. 2022
(arXiv 2211.00593), appendix B; Goldowsky-Dill et al. 2023 (arXiv 2304.05969).

The stream is a sum, so what a receiver reads then is its corrupted input + (sender clean - sender corrupted): exactly,
and without a run of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gatedlens.address.positions import Positions, mask_of
from gatedlens.circuits.graph import Graph, Node
from gatedlens.circuits.head_contents import differences
from gatedlens.errors import InputError
from gatedlens.metrics import Metric
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Input
from gatedlens.model.by_head import with_heads
from gatedlens.model.language import OF_INPUT, HookedLanguageModel
from gatedlens.options import checked, taking
from gatedlens.result.result import Result
from gatedlens.runs import inputs
from gatedlens.runs.baseline import Baseline
from gatedlens.runs.cells import Add, Cell, Plan
from gatedlens.runs.engine import Earlier, Effort, Question, answer
from gatedlens.runs.meter import Meter
from gatedlens.runs.pair import Pair


@taking(HookedLanguageModel.forward, only=OF_INPUT)
@checked
def path_patch(
    model: HookedModel,
    clean: Input,
    corrupted: Input,
    metric: Metric,
    sender: str,
    receivers: str | Sequence[str] = "logits",
    pos: Positions = None,
    **options: Any,
) -> Result:
    """`gl.circuits.path_patch(model, clean, corrupted, metric, "0.mixer", "logits")`: the direct effect, a Result [batch].

    metric(patched) - metric(corrupted), one number a row, of the paths sender -> receivers.

    sender, receivers: nodes (`Graph.of(model).names`), their points, or globs of receivers; every receiver comes
    after the sender. The path into `logits` is the direct effect. pos: the positions at which the sender is patched
    (all if None; a tensor [batch] for one a row, see `positions.py`). Several receivers are patched at once, each
    with what it reads while the others are frozen: what one of them then says to another is not counted (so with
    `logits` among them, only the direct effect). clean, corrupted: texts, ids, pairs (ids, mask) or images, of one shape and
    padded alike. metric: logits -> one number a row. options: the forward's, attention_mask say.

    PointError for a node that does not exist; InputError for a receiver that does not come after the sender, inputs that do not
    fit together, and positions that do not exist. Wang et al. 2022 (arXiv 2211.00593), appendix B; Goldowsky-Dill et al. 2023
    (arXiv 2304.05969).
    """
    graph = Graph.of(model)
    source, chosen = graph.sender(sender), graph.some(receivers)
    graph.check_order(source, chosen)
    paths = Paths(Pair.of(model, clean, corrupted, options), metric, [source], chosen)
    title = f"Path patching from {source.name} into {', '.join(node.name for node in chosen)}"
    plan = Plan((), {}, (), (paths.cell((), source, chosen, pos),), title)
    facts = {"model": model.cfg.model_name}
    return paths.rises(plan, facts, Effort(progress=False), by_row=True)


@taking(HookedLanguageModel.forward, only=OF_INPUT)
@checked
def path_patch_senders(
    model: HookedModel,
    clean: Input,
    corrupted: Input,
    metric: Metric,
    receivers: str | Sequence[str] = "logits",
    pos: Positions = None,
    progress: bool = True,
    results: Earlier = None,
    max_bytes: int | None = None,
    max_rows: int | None = None,
    **options: Any,
) -> Result:
    """`gl.circuits.path_patch_senders(model, clean, corrupted, metric, "1.mixer").plot()`: `path_patch` of every sender.

    A Result with one axis, sender: those that come before the receivers; means over rows. results, max_bytes, max_rows: as in
    every sweep, see `gl.patching.Options`. The rest, and the errors, are those of `path_patch`; InputError too for a receiver
    before which nothing is written.
    """
    graph = Graph.of(model)
    chosen = graph.some(receivers)
    senders = graph.before(chosen[0])
    if not senders:
        raise InputError(f"Nothing is written before {chosen[0].name!r}: it receives nothing.")
    paths = Paths(Pair.of(model, clean, corrupted, options), metric, senders, chosen)
    cells = [paths.cell((i,), sender, chosen, pos) for i, sender in enumerate(senders)]
    into = ", ".join(node.name for node in chosen)
    labels = {"sender": [node.name for node in senders]}
    plan = Plan(("sender",), labels, (len(cells),), tuple(cells), f"Path patching into {into}")
    facts = {"model": model.cfg.model_name, "receivers": [node.name for node in chosen]}
    return paths.rises(plan, facts, Effort(results, max_bytes, max_rows, progress))


@taking(HookedLanguageModel.forward, only=OF_INPUT)
@checked
def path_patch_heads(
    model: HookedModel,
    clean: Input,
    corrupted: Input,
    metric: Metric,
    receivers: str | Sequence[str] = "logits",
    pos: Positions = None,
    progress: bool = True,
    results: Earlier = None,
    max_bytes: int | None = None,
    max_rows: int | None = None,
    **options: Any,
) -> Result:
    """`gl.circuits.path_patch_heads(model, clean, corrupted, metric, "logits").plot()`: path patching from every head.

    A Result layer x head: the layers with heads that come before the receivers; means over rows. What a head writes is its part
    of the output projection, so the heads of a layer write what the layer does, but for the projection's bias. The rest, and
    the errors, are those of `path_patch_senders`; PointError
    for a model without heads, InputError where no layer before the receivers has them.
    """
    graph = Graph.of(model)
    chosen = graph.some(receivers)
    mixers = {node.layer: node for node in graph.before(chosen[0]) if node.writes.endswith(".hook_mixer_out")}
    if not mixers:
        raise InputError(f"No mixer writes before {chosen[0].name!r}: it receives from no head.")
    outputs = {layer: name for layer, name in with_heads(model).items() if layer in mixers}
    if not outputs:
        raise InputError(
            f"No mixer before {chosen[0].name!r} has heads; the first with heads is in layer {min(with_heads(model))}."
        )
    layers = list(outputs)
    paths = Paths(Pair.of(model, clean, corrupted, options), metric, [mixers[layer] for layer in layers], chosen)
    heads, cells = model.cfg.sizes["head"], []
    found = differences(paths.pair, layers)
    for row, layer in enumerate(layers):
        block = model.blocks[layer]
        written = block.writing(block.mixer.place, None).of_heads(found.pop(layer), heads)
        cells += [
            paths.putting((row, head), mixers[layer], written[..., head, :], chosen, pos) for head in range(heads)
        ]
    labels = {"layer": layers, "head": list(range(heads))}
    into = ", ".join(node.name for node in chosen)
    plan = Plan(("layer", "head"), labels, (len(layers), heads), tuple(cells), f"Path patching by head into {into}")
    facts = {"model": model.cfg.model_name, "receivers": [node.name for node in chosen]}
    return paths.rises(plan, facts, Effort(results, max_bytes, max_rows, progress))


class Paths:
    """One pair of runs, cached once for any number of paths from some senders to some receivers."""

    @torch.no_grad()
    def __init__(self, pair: Pair, metric: Metric, senders: Sequence[Node], receivers: Sequence[Node]):
        self.pair = pair
        self.run = Baseline(pair.model, pair.corrupted, options=pair.options)
        self.real = inputs.real(pair.model, pair.clean)
        self.meter = Meter(metric, "none", self.run.rows)
        self.written = pair.differences(node.writes for node in senders)
        self.graph = Graph.of(pair.model)
        points = [point for node in receivers for point, _ in self.graph.readings(node)]
        _, self.frozen = pair.cached(pair.corrupted, dict.fromkeys(points))

    @checked
    def cell(self, place: tuple[int, ...], sender: Node, receivers: Sequence[Node], pos: Positions = None) -> Cell:
        """The run in which each receiver reads what it does while all but the sender are frozen."""
        return self.putting(place, sender, self.written[sender.writes], receivers, pos)

    def putting(
        self,
        place: tuple[int, ...],
        sender: Node,
        written: Float[Tensor, "batch pos d_model"],
        receivers: Sequence[Node],
        pos: Positions,
    ) -> Cell:
        """The same of what a sender has written, clean minus corrupted: into those of the receivers that read it."""
        pack = self.run.padding.pack
        said = pack(at_positions(written, pos, self.real))
        readings = [reading for node in receivers for reading in self.graph.readings(node)]
        points = [point for point, senders in readings if sender in senders]
        return Cell(place, tuple(Add(point, pack(self.frozen[point]), said) for point in points))

    @checked
    @torch.no_grad()
    def rises(self, plan: Plan, facts: Mapping[str, Any], effort: Effort, by_row: bool = False) -> Result:
        """metric(patched) - metric(corrupted) of each cell; means over rows, unless rows stay apart."""
        changing = self.run.prepare(plan.cells)
        base = self.meter(self.run.logits, "In the corrupted run")

        def rise(cell: Cell, value: Tensor) -> Tensor:
            return value - base if by_row else (value - base).mean()

        value = f"rise of the {self.meter.said}"
        question = Question(plan, self.meter, rise, value=value, verb="patched", facts=facts, by_row=by_row)
        return answer(question, [self.run], changing, base, effort)


@checked
def at_positions(
    x: Float[Tensor, "batch pos d_model"], pos: Positions, real: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos d_model"]:
    """`x` at some positions, zero at the others."""
    return x if pos is None else x * mask_of(pos, "pos", real).to(x.device).unsqueeze(-1)

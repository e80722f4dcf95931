"""Path patching: what one sender says to chosen receivers through the residual stream, with everything else frozen.

    path_patch(model, clean, corrupted, metric, "0.mixer", "logits")             # the direct effect, [batch]
    path_patch(model, clean, corrupted, metric, "embed", ["1.mixer", "2.mixer"], pos=[3, 4])
    path_patch_senders(model, clean, corrupted, metric, "1.mixer").plot()        # every sender before it

The sender's output is the clean run's, every other node's output the corrupted run's; what each receiver then reads is
put into the corrupted run, which goes on from there. The number is metric(patched) - metric(corrupted). Wang et al. 2022
(arXiv 2211.00593), appendix B; Goldowsky-Dill et al. 2023 (arXiv 2304.05969).

The stream is a sum, so what a receiver reads then is its corrupted input + (sender clean - sender corrupted): exactly,
and without a run of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from gatedlens.circuits.graph import Graph, Node
from gatedlens.errors import InputError
from gatedlens.hooking import Batch
from gatedlens.metrics import Metric, per_row
from gatedlens.positions import mask_of
from gatedlens.result import Result
from gatedlens.runs.pair import Pair


def path_patch(
    model: Any,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    sender: str,
    receivers: str | Sequence[str] = "logits",
    pos: Any = None,
    **options: Any,
) -> Float[Tensor, " batch"]:
    """metric(patched) - metric(corrupted), one number a row, of the paths sender -> receivers.

    sender, receivers: nodes (`Graph.of(model).names`), their points, or globs of receivers; every receiver comes
    after the sender. The path into `logits` is the direct effect. pos: the positions at which the sender is patched
    (all if None; a tensor [batch] for one a row, see `positions.py`). Several receivers are patched at once, each
    with what it reads while the others are frozen: what one of them then says to another is not counted (so with
    `logits` among them, only the direct effect).
    """
    graph = Graph.of(model)
    source, chosen = graph.sender(sender), graph.some(receivers)
    graph.check_order(source, chosen)
    return Paths(Pair.of(model, clean, corrupted, options), metric, [source], chosen).effect(source, chosen, pos)


def path_patch_senders(
    model: Any,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    receivers: str | Sequence[str] = "logits",
    pos: Any = None,
    progress: bool = True,
    **options: Any,
) -> Result:
    """`path_patch` of every sender that comes before the receivers: a Result with one axis, sender; means over rows."""
    graph = Graph.of(model)
    chosen = graph.some(receivers)
    senders = graph.before(chosen[0])
    if not senders:
        raise InputError(f"Nothing is written before {chosen[0].name!r}: it receives nothing.")
    paths = Paths(Pair.of(model, clean, corrupted, options), metric, senders, chosen)
    bar = tqdm(senders, disable=not progress, desc="path patching", unit="sender")
    values = torch.stack([paths.effect(sender, chosen, pos).mean() for sender in bar])
    into = ", ".join(node.name for node in chosen)
    labels = {"sender": [node.name for node in senders]}
    facts = {"model": model.cfg.model_name, "receivers": [node.name for node in chosen]}
    return Result(values, ("sender",), labels, f"Path patching into {into}", "rise of the metric", facts)


class Paths:
    """One pair of runs, cached once for any number of paths from some senders to some receivers."""

    @torch.no_grad()
    def __init__(self, pair: Pair, metric: Metric, senders: Sequence[Node], receivers: Sequence[Node]):
        self.pair = pair
        self.metric = metric
        self.written = pair.differences(node.writes for node in senders)
        needed = [name for node in receivers for name in (_start(node.layer), node.reads)]
        logits, self.frozen = pair.cached(pair.corrupted, dict.fromkeys(needed))
        self.base = per_row(metric, logits)

    @torch.no_grad()
    def effect(self, sender: Node, receivers: Sequence[Node], pos: Any = None) -> Float[Tensor, " batch"]:
        """metric(patched) - metric(corrupted), run from the first receiver's block on; the sender comes before them all."""
        said = at_positions(self.written[sender.writes], pos)
        hooks = [(node.reads, _reading(self.frozen[node.reads] + said)) for node in receivers]
        layer = min(node.layer for node in receivers)
        start = Batch(self.frozen[_start(layer)], self.pair.corrupted.mask, is_resid=True)
        return per_row(self.metric, self.pair.run(start, hooks, start_at_layer=layer)) - self.base


def _start(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_pre"


def _reading(value: Tensor) -> Any:
    return lambda x, hook: value.to(x.dtype)


def at_positions(x: Float[Tensor, "batch pos d_model"], pos: Any) -> Float[Tensor, "batch pos d_model"]:
    """`x` at some positions, zero at the others."""
    if pos is None:
        return x
    return x * mask_of(pos, "pos", x.shape[0], x.shape[1], x.device).unsqueeze(-1)

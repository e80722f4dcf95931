"""Attributing: from a prompt to its feature graph.

sae = gl.dictionaries.Dictionary.load("gated.safetensors")
graph = gl.feature_graph.attribute(model, "B 4 dog F 1 ? F", [sae], logits="1")
graph.check()                                    # every target is the sum of what comes in, bias and errors included
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gatedlens.dictionaries import Dictionary
from gatedlens.errors import InputError
from gatedlens.feature_graph.assembly import graph_of
from gatedlens.feature_graph.edges import Edges
from gatedlens.feature_graph.frozen import FrozenRun
from gatedlens.feature_graph.graph import FeatureGraph
from gatedlens.feature_graph.logits import Asked, Logits
from gatedlens.model.batch import Input
from gatedlens.model.language import OF_INPUT, HookedLanguageModel
from gatedlens.options import checked, taking, tensor_of
from gatedlens.runs import inputs
from gatedlens.runs.gradients import check_allowed


@taking(HookedLanguageModel.forward, only=OF_INPUT)
@checked
def attribute(
    model: HookedLanguageModel,
    input: Input,
    dictionaries: Sequence[Dictionary] = (),
    logits: Asked = None,
    pos: int = -1,
    mixers: bool | None = None,
    max_nodes: int = 4096,
    batch_size: int = 16,
    progress: bool = True,
    **options: Any,
) -> FeatureGraph:
    """`gl.feature_graph.attribute(model, text, [sae], logits="1")`: the FeatureGraph of one prompt.

    Nodes are the features of `dictionaries` that are on, what they leave over (errors), tokens, biases and logits; an edge is
    what a source adds to the sum that a target is made of, through mixers and norms as the run had them, and nothing else: each
    sum is exactly that of its edges. An MLP without a transcoder is an error node a position.

    logits: None for the most likely, a token, several, or pairs (right, wrong) whose difference is meant: see `logits.py`. pos:
    where they are read, counted among the row's real positions. mixers: whether what a mixer writes at a position is a node of
    its own, and not a way that edges pass (None: where there are no dictionaries). max_nodes: of more features the most
    influential are kept, the others are counted with the errors. batch_size: targets a backward pass. options: the forward's.

    InputError for several rows, a token that is none, and for dictionaries that do not fit: see `places.py`.
    Dunefsky et al. 2024 (arXiv 2406.11944); Ameisen et al. 2025 (Circuit tracing); through the scan: docs/feature-graphs.md.
    """
    for name, number in (("batch_size", batch_size), ("max_nodes", max_nodes)):
        if number < 1:
            raise InputError(f"{name}={number}: give at least 1.")
    check_allowed()
    for one in dictionaries:
        if not isinstance(one, Dictionary):
            raise InputError(
                f"dictionaries holds {one!r:.80}: give dictionaries, gl.dictionaries.Dictionary.load(path) say."
            )
    tokens, position_ids = _one_row(model, input, options)
    length = tokens.shape[1]
    if not -length <= pos < length:
        raise InputError(f"pos={pos} is out of range: the prompt has {length} positions.")
    of_mixers = not dictionaries if mixers is None else mixers
    end = int(pos) % length + 1  # what comes behind is read by nothing
    documents = None if position_ids is None else position_ids[:, :end]
    frozen = FrozenRun.of(model, tokens[:, :end], dictionaries, of_mixers, documents)
    wanted = Logits.of(frozen, logits, end - 1)
    edges = Edges(frozen, batch_size)
    chosen, rows = edges.of_all(wanted, max_nodes, progress)
    return graph_of(frozen, wanted, chosen, rows.detach())


def _one_row(model: HookedLanguageModel, input: Input, options: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """The prompt's tokens without padding, and its position ids."""
    documents = options.pop("position_ids", None)
    batch, _ = inputs.prepared(model, input, **options)
    if batch.is_resid or len(batch.value) != 1:
        raise InputError(
            f"A feature graph is of one prompt; this input has {len(batch.value)} rows: make a graph of each."
        )
    real = torch.ones_like(batch.value[0], dtype=torch.bool) if batch.mask is None else batch.mask[0].bool()
    if documents is None:
        return batch.value[:, real], None
    ids = tensor_of(documents, "position_ids")
    if ids.numel() != len(real):
        raise InputError(f"position_ids has shape {list(ids.shape)}; the prompt has {len(real)} positions.")
    return batch.value[:, real], ids.reshape(1, -1).to(batch.value.device)[:, real]

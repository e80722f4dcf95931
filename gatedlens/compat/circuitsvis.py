"""Implicit attention as circuitsvis draws it: one head a layer, a group of channels, or a channel.

    import circuitsvis
    shown = for_circuitsvis(gl.implicit_attention(model, "Call me Ishmael"))             # one head a layer
    circuitsvis.attention.attention_heads(**shown)
    for_circuitsvis(gl.implicit_attention(cache, layer=3), groups=[[0, 1], slice(8, 16)])  # one head a group of channels
    circuitsvis.attention.attention_patterns(shown["tokens"], shown["attention"])

circuitsvis itself is not needed here and not imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gatedlens.address.entries import Index, numbers
from gatedlens.attention.layer import ImplicitAttention
from gatedlens.attention.stack import AttentionStack
from gatedlens.errors import InputError
from gatedlens.plot.drawing import labels_of


def for_circuitsvis(
    attention: ImplicitAttention | AttentionStack,
    tokens: Sequence[str] | None = None,
    row: int = 0,
    groups: Sequence[Any] | None = None,
    absolute: bool = False,
    heads: Index | None = None,
) -> dict[str, Any]:
    """`circuitsvis.attention.attention_heads(**for_circuitsvis(attention))`: the arguments, of one row of the batch.

    attention: a stack, whose layers become heads (their means over channels); or one layer's operator, whose mean is one
    head, or the mean of each of `groups` of channels (as in `grouped`), or of each of its `heads` (`slice(None)`: all).
    absolute: means of absolute values. tokens: those of the input if None. Holds `attention` [head, dst, src] as a numpy
    array, `tokens`, `attention_head_names`, `max_value` and `min_value` (the largest magnitude: these are no probabilities)
    and `mask_upper_tri` (causal or not).
    """
    matrices, names = _heads(attention, groups, absolute, heads)
    if not -len(matrices) <= row < len(matrices):
        raise InputError(f"row={row}: the batch has rows 0 to {len(matrices) - 1}.")
    heads = matrices[row].detach().float().cpu()
    labels = list(tokens) if tokens is not None else labels_of(attention, row)
    if len(labels) != heads.shape[-1]:
        raise InputError(f"There are {len(labels)} tokens for an attention of {heads.shape[-1]} positions.")
    largest = heads.abs().max().item()
    return {
        "attention": heads.numpy(),
        "tokens": labels,
        "attention_head_names": names,
        "max_value": largest,
        "min_value": -largest,
        "mask_upper_tri": not bool(heads.triu(1).any()),
    }


def _heads(
    attention: Any, groups: Sequence[Any] | None, absolute: bool, heads: Index | None
) -> tuple[Tensor, list[str]]:
    """([batch, head, dst, src], the heads' names)."""
    if heads is not None and (groups is not None or isinstance(attention, AttentionStack)):
        raise InputError("heads are those of one layer, and no groups: for_circuitsvis(stack[3], heads=slice(None)).")
    if isinstance(attention, AttentionStack):
        if groups is not None:
            raise InputError("groups are channels of one layer: pick it, as in stack[3].")
        means = attention.abs_mean(progress=False) if absolute else attention.mean(progress=False)
        return means.transpose(0, 1), [f"layer {name}" for name in attention.names]
    if not isinstance(attention, ImplicitAttention):
        raise InputError(
            f"for_circuitsvis takes an implicit attention, and this is {type(attention).__name__}: "
            "for_circuitsvis(gl.implicit_attention(...))."
        )
    if heads is not None:
        means = attention.abs_mean(heads=heads) if absolute else attention.mean(heads=heads)
        chosen = numbers("heads", heads, attention.n_heads, repr(attention))
        return means, [f"layer {attention.layer}, head {head}" for head in chosen]
    if groups is None:
        mean = attention.abs_mean() if absolute else attention.mean()
        return mean.unsqueeze(1), [f"layer {attention.layer}"]
    names = [f"layer {attention.layer}, {group}" for group in groups]
    if absolute:
        return torch.stack([attention.select(group).abs_mean() for group in groups], dim=1), names
    return attention.grouped(groups), names

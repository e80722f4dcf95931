"""Direct logit attribution by head: what each head of each layer gives to a logit, in all or by source token.

    by = gl.lens.head_attribution(model, prompt, " Mary", " John")        # batch x layer x head
    by = gl.lens.head_token_attribution(model, prompt, " Mary", " John")  # batch x layer x head x src, and a remainder

The output projection W is linear, and a head owns some of its columns, so a layer's share of the logit (`logit_shares.py`)
is a sum over its heads:

    u . W o[i] = sum over heads h of (W^T u)[c in h] . o[i, c in h] ,   o[i] = sum over j of A[i, j] x[j] + r[i]
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gatedlens.address.positions import Positions
from gatedlens.attention.layer import points_of
from gatedlens.attention.stack import implicit_attention
from gatedlens.lens.logit_shares import Reading, Tokens
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Input
from gatedlens.model.by_head import held_of, with_heads, writing_of
from gatedlens.model.writing import Writing
from gatedlens.options import checked
from gatedlens.result.result import Result

BIAS = "bias"  # of the output projection, on the axis of the heads
AXES = ("batch", "layer", "head")
TITLE = "Direct logit attribution, by head"


@checked
@torch.no_grad()
def head_attribution(
    model: HookedModel, input: Input, right: Tokens, wrong: Tokens | None = None, pos: Positions = None
) -> Result:
    """`gl.lens.head_attribution(model, text, " whale")`: what each head of each layer gives to the logit, batch x layer x head.

    A layer's heads, and the bias of its output projection where there is one (the last on the axis), sum to its `mixer_out` in
    `logit_attribution`; the fact `error` says how exactly. Layers without heads are not on the axis. Options as in
    `logit_attribution`; PointError for a model without heads.
    """
    outputs = with_heads(model)
    held = [name for layer in outputs for name in held_of(model, layer)]
    reading = Reading.of(model, input, right, wrong, pos, (*outputs.values(), *held))
    rows = {}
    for layer, name in outputs.items():
        here, writing = reading.at(f"{layer}_mixer_out"), writing_of(model, layer, reading.cache.__getitem__)
        seen = writing.seen(here.direction)  # from the mixer's output
        each = _by_head(model, (seen * writing.contents(reading.cache[name].double())).sum((1, 2)))
        rows[layer] = torch.cat([each, _of_bias(here, writing).unsqueeze(1)], dim=1)
    return _titled(reading, rows, AXES, {}, TITLE)


@checked
@torch.no_grad()
def head_token_attribution(
    model: HookedModel, input: Input, right: Tokens, wrong: Tokens | None = None, pos: Positions = None
) -> Result:
    """`gl.lens.head_token_attribution(model, text, " whale")`: `head_attribution` by source, batch x layer x head x src.

    src are a row's positions and `remainder`, what no token brings; so a head's row says which tokens it carried to the logit,
    by its implicit attention. Summed over src it is `head_attribution`, over heads (and the bias) the mixer's row of
    `token_attribution`. Options, facts and errors as in `head_attribution`.
    """
    outputs = with_heads(model)
    mixers = {layer: model.blocks[layer].mixer for layer in outputs}
    inside = [name for layer, mixer in mixers.items() for name in points_of(model.blocks[layer], mixer)]
    reading = Reading.of(model, input, right, wrong, pos, tuple(inside))
    rows = {}
    for layer in mixers:
        A, here = implicit_attention(reading.cache, layer=layer), reading.at(f"{layer}_mixer_out")
        writing = writing_of(model, layer, reading.cache.__getitem__)
        rest = (writing.seen(here.direction) * writing.contents(A.bias.double())).sum((1, 2))
        each = _by_head(model, torch.cat([here.through(A.contributions()), rest.unsqueeze(-1)], dim=-1))
        bias = torch.zeros_like(each[:, :1])
        bias[:, 0, -1] = _of_bias(here, writing)
        rows[layer] = torch.cat([each, bias], dim=1)
    numbered = {layer: reading.by_number(row) for layer, row in rows.items()}
    labels = {"src": next(iter(numbered.values()))[1]}
    rows = {layer: row for layer, (row, _) in numbered.items()}
    return _titled(reading, rows, (*AXES, "src"), labels, f"{TITLE} and source token")


def _by_head(model: HookedModel, x: Float[Tensor, "batch channel *rest"]) -> Float[Tensor, "batch head *rest"]:
    return x.unflatten(1, (model.cfg.sizes["head"], -1)).sum(2)


def _of_bias(reading: Reading, writing: Writing) -> Float[Tensor, " batch"]:
    """What the bias of a layer's output projection gives to the logit, which is no head's; 0 where there is none."""
    return (reading.direction * writing.of_bias(reading.direction)).sum((1, 2))


def _titled(
    reading: Reading, rows: dict[int, Tensor], axes: tuple[str, ...], labels: dict[str, Any], title: str
) -> Result:
    """The Result of the layers' rows, in which the bias is the last head; it is left out where it gives nothing."""
    names = {layer: f"{layer}_mixer_out" for layer in rows}
    outputs = {
        layer: reading.at(name).of_stream(reading.cache[f"blocks.{layer}.hook_mixer_out"])
        for layer, name in names.items()
    }
    off = max((row.flatten(1).sum(1) - outputs[layer]).abs().max().item() for layer, row in rows.items())
    values, heads = torch.stack(list(rows.values()), dim=1), [*range(reading.model.cfg.sizes["head"]), BIAS]
    if not bool(values[:, :, -1].any()):
        values, heads = values[:, :, :-1], heads[:-1]
    return reading.titled(values, axes, {"layer": list(rows), "head": heads, **labels}, title, off)

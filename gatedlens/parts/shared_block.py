"""A transformer block that several layers share, before the mixer of each: the Zambas.

    t  = linear(mlp(norm(attention(norm([h, embed])))))          of a shared block; t enters the mixer's input alone
    h += mixer(norm(h + t))

The block reads the stream and the embedding side by side and has no residual stream of its own. Its points, and what a state
carries of it, are those of each layer; its weights are of all of them. Zamba, arXiv 2405.16712, fig. 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatedlens.address.point import Point, block_rows
from gatedlens.model.block import Block, Inner, Sub, Way, residual_rows
from gatedlens.model.hookpoint import ATTENTION, MLP, Part, rows_of
from gatedlens.model.norm import Norm, norm_rows
from gatedlens.model.run import DocumentRun, Run
from gatedlens.parts.attention import RMSNORM, Attention
from gatedlens.parts.hybrid import EMBED, Branch, Family

INNER = Inner("shared", "shared.attn", "shared.hook_attn_out", "mixer", (ATTENTION, MLP))


class SharedAttention(Attention):
    """The attention of such a block."""

    place = INNER.mixer


def shared_rows(attention: tuple[Point, ...], mlp: tuple[Point, ...], source: str) -> tuple[Point, ...]:
    """`shared_rows(ATTENDS.rows(PAPER), gated_mlp_rows("GELU"), PAPER)`: the points of a `SharedBlock`."""
    return (
        Point("hook_read", "batch pos d_model", "resid_pre (a copy: edits reach the shared block only)", source),
        Point(
            "hook_embed",
            "batch pos d_model",
            "embed (a copy: edits reach the shared block only)",
            source,
        ),
        Point("hook_in", "batch pos d_concat", "read and shared.embed side by side", source),
        *norm_rows("ln1", "shared.in", RMSNORM, axes="batch pos d_concat"),
        *block_rows("attn", attention),
        Point("hook_attn_out", "batch pos d_model", "o_proj(attn.z)", source),
        *norm_rows("ln2", "shared.attn_out", RMSNORM),
        *block_rows("mlp", mlp),
        Point("hook_out", "batch pos d_model", "linear(down_proj(mlp.post))", source),
    )


class SharedBlock(Part):
    """t = linear(mlp(ln2(attn(ln1([x, embed]))))). weights: the layer's, `linear` among them; shared: the block's."""

    def __init__(self, weights: Any, rows: tuple[Point, ...], shared: Any, eps: float, attn: Attention, mlp: Part):
        super().__init__(weights, rows)
        self.ln1 = Norm(shared.input_layernorm, rows_of("ln1", rows), eps)
        self.attn = attn
        self.ln2 = Norm(shared.pre_ff_layernorm, rows_of("ln2", rows), eps)
        self.mlp = mlp

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], embed: Float[Tensor, "batch pos d_model"], run: DocumentRun
    ) -> Float[Tensor, "batch pos d_model"]:
        both = self.hook_in(torch.cat([self.hook_read(x), self.hook_embed(embed)], dim=-1))
        attended = self.hook_attn_out(self.attn(self.ln1(both), run))
        mixed, last = self.mlp(self.ln2(attended), run), self.weights.linear
        return self.hook_out(F.linear(mixed, last.weight, last.bias))


class SharingBlock(Block):
    """A layer: what its mixer reads is the stream and, if there is one, what a shared block makes of it and of the embedding."""

    def __init__(self, weights: Any, rows: tuple[Point, ...], layer: int, sub: Sub, shared: SharedBlock | None):
        super().__init__(weights, rows, sub, inner=() if shared is None else (INNER,))
        self.layer = layer
        self.shared = shared

    def branch(
        self, way: Way, resid: Float[Tensor, "batch pos d_model"], run: Run
    ) -> Float[Tensor, "batch pos d_model"]:
        if self.layer == 0:  # the stream as hooks leave it
            run.hand_on(EMBED, resid)
        if self.shared is not None:
            resid = resid + self.shared(resid, run.handed_on(EMBED, self.layer, resid), run)
        return super().branch(way, resid, run)


@dataclass(frozen=True, kw_only=True)
class SharedFamily(Family):
    """`SharedFamily("Zamba2", ..., mixer=MAMBA, plain="Mamba-2", blocks={"Mamba-2 behind a shared block": ROWS}, made=shared)`.

    A family whose layers have one mixer, some of them behind a shared block. mixer: its branch; plain: what a layer without a
    block is called; blocks: the rows of the block by what a layer with one is called; made(layer's weights, rows, layer, wrapped
    model): the block.
    """

    mixer: Branch
    plain: str
    blocks: Mapping[str, tuple[Point, ...]]
    made: Callable[[Any, tuple[Point, ...], int, Any], SharedBlock]

    @cached_property
    def rows(self) -> dict[str, tuple[Point, ...]]:
        plain = residual_rows(self.mixer.sub_rows())
        return {self.plain: plain, **{kind: _behind(rows, plain) for kind, rows in self.blocks.items()}}

    def block(self, kind: str, layer: int, wrapped: Any) -> Block:
        inside, rows = wrapped.model.layers[layer], self.rows[kind]
        decoder = inside._modules.get("mamba_decoder", inside)
        eps = float(getattr(wrapped.config, self.eps))

        def norm_of(name: str, ln: str) -> Norm:
            return self.norm(getattr(decoder, name), rows_of(ln, rows), eps)

        sub = self.mixer.sub(layer, wrapped, decoder, rows, norm_of)
        shared = None if decoder is inside else self.made(inside, rows_of(INNER.name, rows), layer, wrapped)
        return SharingBlock(inside, rows, layer, sub, shared)


def _behind(shared: tuple[Point, ...], plain: tuple[Point, ...]) -> tuple[Point, ...]:
    """The rows of a layer with a shared block before its mixer."""
    first, read, *rest = plain
    joined = Point(read.name, read.axes, "resid_pre + shared.out (a copy: edits reach the mixer only)", read.source)
    return (first, *block_rows(INNER.name, shared), joined, *rest)

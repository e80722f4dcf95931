"""Zamba2: Mamba-2 in every layer; before some of them a transformer block whose weights several layers share.

    t  = linear(mlp(norm(attention(norm([h, embed])))))          of a shared block; t enters the mixer's input alone
    h += mamba(norm(h + t))

The shared block reads the stream and the embedding side by side and has no residual stream of its own. There are num_mem_blocks
of them, used in turn; a layer's own are adapters of low rank, added to q, k, v (if the config says so) and to gate and up. Scores
are divided by sqrt(d_head / 2); the MLP's activation is GELU. Points and what a state carries are those of each layer. The time
step is at least time_step_min and has no upper limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatedlens.address.point import Point, block_rows
from gatedlens.hooks.mamba2 import mixer_rows
from gatedlens.hooks.mamba2_hybrid.bamba import mamba
from gatedlens.model.block import Block, Sub, Way, residual_rows
from gatedlens.model.hookpoint import Part, rows_of
from gatedlens.model.norm import Norm, norm_rows
from gatedlens.model.run import DocumentRun, Run
from gatedlens.parts.activation import ACTIVATIONS
from gatedlens.parts.attention import RMSNORM, Attention, AttentionKind, Multipliers
from gatedlens.parts.glu import FusedMlp, fused_mlp_rows
from gatedlens.parts.hybrid import Branch, Family

PAPER = "Zamba2, arXiv 2411.15242"
EMBED = "hook_embed"  # what shared blocks read beside the stream
ACT = ACTIVATIONS["gelu"]
MAMBA = Branch("mixer", mixer_rows(), "out_proj(gated)", mamba, "mamba", "input_layernorm")


def attends(rotary: bool) -> AttentionKind:
    return AttentionKind(rotary=rotary, head="q_head", scores="(d_head / 2)^-0.5")


def shared_rows(rotary: bool) -> tuple[Point, ...]:
    """The points of a `SharedBlock`."""
    attention = attends(rotary).rows(f"{PAPER}; its adapter is in q_proj, k_proj and v_proj", "ln1.out")
    mlp = fused_mlp_rows(ACT.word, up="(gate_up_proj + its adapter)")
    return (
        Point("hook_in", "batch pos d_concat", "mixer_in and embed side by side", PAPER),
        *norm_rows("ln1", "shared.in", RMSNORM, axes="batch pos d_concat"),
        *block_rows("attn", attention),
        Point("hook_attn_out", "batch pos d_model", "o_proj(attn.z)", PAPER),
        *norm_rows("ln2", "shared.attn_out", RMSNORM),
        *block_rows("mlp", mlp),
        Point("hook_out", "batch pos d_model", "linear(down_proj(mlp.post))", PAPER),
    )


def rows_with(rotary: bool) -> tuple[Point, ...]:
    """The rows of a layer with a shared block before its mixer."""
    plain = residual_rows(MAMBA.sub_rows())
    before = [row for row in plain if row.name in ("hook_resid_pre", "hook_mixer_in")]
    joined = Point("hook_joined", "batch pos d_model", "mixer_in + shared.out", PAPER)
    ln1 = norm_rows("ln1", "joined", RMSNORM)
    rest = [row for row in plain if row not in before and not row.name.startswith("ln1.")]
    return (*before, *block_rows("shared", shared_rows(rotary)), joined, *ln1, *rest)


class AdaptedAttention(Attention):
    """Attention whose q, k and v are those of the shared block plus a layer's own adapter's."""

    place = "shared.attn"

    def __init__(self, *args: Any, number: int, **options: Any):
        super().__init__(*args, **options)
        self.number = number  # of the layers that have a shared block, which this is

    def projected(self, n: Float[Tensor, "batch pos d_concat"], name: str) -> Float[Tensor, "batch pos some"]:
        own = super().projected(n, name)
        adapters = self.weights._modules.get(f"linear_{name}_adapter_list")
        return own if adapters is None else own + low_rank(adapters[self.number], n)


class AdaptedMlp(FusedMlp):
    """out = down_proj(gelu(gate) * up), gate and up those of the shared block plus a layer's own adapter's."""

    def __init__(self, weights: Any, rows: tuple[Point, ...], number: int):
        super().__init__(weights, rows, ACT, up="gate_up_proj", down="down_proj")
        self.number = number

    def both(self, m: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos some"]:
        return super().both(m) + low_rank(self.weights.gate_up_proj_adapter_list[self.number], m)


def low_rank(adapter: nn.Sequential, x: Float[Tensor, "batch pos some"]) -> Float[Tensor, "batch pos other"]:
    """An adapter's two matrices, one behind the other."""
    narrow, wide = adapter
    return wide(narrow(x))


class SharedBlock(Part):
    """t = linear(mlp(norm(attention(norm([x, embed])))))."""

    def __init__(self, weights: Any, rows: tuple[Point, ...], layer: int, wrapped: Any):
        super().__init__(weights, rows)
        config, w = wrapped.config, weights.shared_transformer
        number, rotary = config.hybrid_layer_ids.index(layer), wrapped.model._modules.get("rotary_emb")
        scale, of_attn = Multipliers(scores=(config.attention_head_dim / 2) ** -0.5), rows_of("attn", rows)
        kind, eps = attends(rotary is not None), config.rms_norm_eps
        self.ln1 = Norm(w.input_layernorm, rows_of("ln1", rows), eps)
        self.attn = AdaptedAttention(
            w.self_attn, of_attn, layer, kind, config.attention_head_dim, None, rotary, multipliers=scale, number=number
        )
        self.ln2 = Norm(w.pre_ff_layernorm, rows_of("ln2", rows), eps)
        self.mlp = AdaptedMlp(w.feed_forward, rows_of("mlp", rows), number)

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], embed: Float[Tensor, "batch pos d_model"], run: DocumentRun
    ) -> Float[Tensor, "batch pos d_model"]:
        both = self.hook_in(torch.cat([x, embed], dim=-1))
        attended = self.hook_attn_out(self.attn(self.ln1(both), run))
        mixed, last = self.mlp(self.ln2(attended), run), self.weights.linear
        return self.hook_out(F.linear(mixed, last.weight, last.bias))


class Zamba2Block(Block):
    """A layer: what its mixer reads is the stream and, if there is one, what a shared block makes of it and of the embedding."""

    def __init__(self, weights: Any, rows: tuple[Point, ...], layer: int, sub: Sub, shared: SharedBlock | None):
        super().__init__(weights, rows, sub)
        self.layer = layer
        self.shared = shared
        self.inner = () if shared is None else ("shared.attn",)

    def forward(self, resid: Float[Tensor, "batch pos d_model"], run: Run) -> Float[Tensor, "batch pos d_model"]:
        if self.layer == 0:
            run.hand_on(EMBED, resid)
        return super().forward(resid, run)

    def branch(
        self, way: Way, resid: Float[Tensor, "batch pos d_model"], run: Run
    ) -> Float[Tensor, "batch pos d_model"]:
        if self.shared is None:
            return super().branch(way, resid, run)
        x = self.hook_mixer_in(resid)
        x = self.hook_joined(x + self.shared(x, run.handed_on(EMBED, self.layer, resid), run))
        return self.hook_mixer_out(self.mixer(self.ln1(x), run))


@dataclass(frozen=True)
class Zamba2Family(Family):
    """The same with blocks and rows of its own."""

    @cached_property
    def rows(self) -> dict[str, tuple[Point, ...]]:
        plain = residual_rows(MAMBA.sub_rows())
        return {
            "Mamba-2": plain,
            "Mamba-2 behind a shared block": rows_with(False),
            "Mamba-2 behind a shared rotary block": rows_with(True),
        }

    def block(self, kind: str, layer: int, wrapped: Any) -> Block:
        inside, rows = wrapped.model.layers[layer], self.rows[kind]
        decoder = inside._modules.get("mamba_decoder", inside)
        eps = float(wrapped.config.rms_norm_eps)

        def norm_of(name: str, ln: str) -> Norm:
            return self.norm(getattr(decoder, name), rows_of(ln, rows), eps)

        sub = MAMBA.sub(layer, wrapped, decoder, rows, norm_of)
        shared = None if decoder is inside else SharedBlock(inside, rows_of("shared", rows), layer, wrapped)
        return Zamba2Block(inside, rows, layer, sub, shared)


def kind_of(layer: Any, config: Any) -> str:
    if "mamba_decoder" not in layer._modules:
        return "Mamba-2"
    return "Mamba-2 behind a shared rotary block" if config.use_mem_rope else "Mamba-2 behind a shared block"


def told(config: Any) -> Mapping[str, Any]:
    return {
        "d_mlp": config.intermediate_size,
        "act_fn": config.hidden_act,
        "d_head": config.attention_head_dim,
        "positional_embedding_type": "rotary" if config.use_mem_rope else "none",
    }


ZAMBA2 = Zamba2Family("Zamba2", "Zamba2ForCausalLM", {}, kind_of, told, act="gelu")

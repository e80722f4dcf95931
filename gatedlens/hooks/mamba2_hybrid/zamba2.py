"""Zamba2: Mamba-2 in every layer; before some of them a transformer block whose weights several layers share.

    t  = linear(mlp(norm(attention(norm([h, embed])))))          of a shared block; t enters the mixer's input alone
    h += mamba(norm(h + t))

There are num_mem_blocks shared blocks (parts/shared_block.py), used in turn; a layer's own are adapters of low rank, added to
q, k, v (if the config says so) and to gate and up. Scores are divided by sqrt(d_head / 2); the MLP's activation is GELU. The
time step is at least time_step_min and has no upper limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from gatedlens.address.point import Point
from gatedlens.hooks.mamba2 import mixer_rows
from gatedlens.hooks.mamba2_hybrid.bamba import mamba
from gatedlens.model.hookpoint import rows_of
from gatedlens.parts.activation import ACTIVATIONS
from gatedlens.parts.attention import AttentionKind, Multipliers
from gatedlens.parts.glu import FusedMlp, fused_mlp_rows
from gatedlens.parts.hybrid import Branch
from gatedlens.parts.shared_block import SharedAttention, SharedBlock, SharedFamily, shared_rows

PAPER = "Zamba2, arXiv 2411.15242"
ACT = ACTIVATIONS["gelu"]
MAMBA = Branch("mixer", mixer_rows(), "out_proj(gated)", mamba, "mamba", "input_layernorm")


def attends(rotary: bool) -> AttentionKind:
    return AttentionKind(rotary=rotary, head="q_head", scores="(d_head / 2)^-0.5")


def rows_with(rotary: bool) -> tuple[Point, ...]:
    """The points of a shared block."""
    attention = attends(rotary).rows(f"{PAPER}; its adapter is in q_proj, k_proj and v_proj", "ln1.out")
    return shared_rows(attention, fused_mlp_rows(ACT.word, up="(gate_up_proj + its adapter)"), PAPER)


class AdaptedAttention(SharedAttention):
    """Attention whose q, k and v are those of the shared block plus a layer's own adapter's."""

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


def shared(weights: Any, rows: tuple[Point, ...], layer: int, wrapped: Any) -> SharedBlock:
    config, w = wrapped.config, weights.shared_transformer
    number, rotary = config.hybrid_layer_ids.index(layer), wrapped.model._modules.get("rotary_emb")
    d_head, of_attn = config.attention_head_dim, rows_of("attn", rows)
    kind, scale = attends(rotary is not None), Multipliers(scores=(d_head / 2) ** -0.5)
    attn = AdaptedAttention(w.self_attn, of_attn, layer, kind, d_head, None, rotary, multipliers=scale, number=number)
    mlp = AdaptedMlp(w.feed_forward, rows_of("mlp", rows), number)
    return SharedBlock(weights, rows, w, config.rms_norm_eps, attn, mlp)


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


ZAMBA2 = SharedFamily(
    "Zamba2",
    "Zamba2ForCausalLM",
    {},
    kind_of,
    told,
    act="gelu",
    mixer=MAMBA,
    plain="Mamba-2",
    blocks={"Mamba-2 behind a shared block": rows_with(False), "Mamba-2 behind a shared rotary block": rows_with(True)},
    made=shared,
)

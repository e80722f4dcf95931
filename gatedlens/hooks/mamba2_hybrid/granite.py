"""Granite-4-H (GraniteMoeHybrid): a Mamba-2 or an attention, then experts and an MLP that every token passes; multipliers.

    h  = embedding_multiplier embed
    h += residual_multiplier mix(norm(h))
    h += residual_multiplier (moe(m) + shared_mlp(m))

The router's softmax is over the chosen experts alone; a model of no experts has the MLP alone. Attention scores are multiplied
by attention_multiplier, and q and k turned by position only if the config says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gatedlens.hooks.mamba2 import Mamba2Mixer, Mamba2Shape, mixer_rows
from gatedlens.model.hookpoint import rows_of
from gatedlens.parts.activation import SILU
from gatedlens.parts.attention import Attention, AttentionKind, Multipliers
from gatedlens.parts.experts import EXPERTS_ALONE, Experts, experts_rows, softmax_top
from gatedlens.parts.glu import FusedMlp, fused_mlp_rows
from gatedlens.parts.hybrid import Branch, Family, Site

PAPER = "Granite 4.0, transformers' GraniteMoeHybrid"
ROTARY = AttentionKind(head="q_head", scores="attention_multiplier")
NO_POSITIONS = replace(ROTARY, rotary=False)
WEIGHTS = "softmax over the k largest of router"


def mamba(site: Site) -> Mamba2Mixer:
    shape = Mamba2Shape.of(site.weights, site.config.to_dict())
    shape = replace(shape, output=site.config.residual_multiplier)
    return Mamba2Mixer(site.weights, site.rows, site.layer, shape)


def attention(site: Site) -> Attention:
    config, rotary = site.config, site.wrapped.model.rotary_emb
    by = Multipliers(scores=config.attention_multiplier, output=config.residual_multiplier)
    kind = NO_POSITIONS if rotary is None else ROTARY
    return Attention(site.weights, site.rows, site.layer, kind, site.weights.head_dim, None, rotary, multipliers=by)


def shared_mlp(site: Site) -> FusedMlp:
    return FusedMlp(site.weights.shared_mlp, site.rows, SILU)


def experts(site: Site) -> Experts:
    w, k = site.weights, site.config.num_experts_per_tok
    shared = FusedMlp(w.shared_mlp, rows_of("shared", site.rows), SILU)
    return Experts(w.block_sparse_moe, site.rows, SILU, softmax_top(k, True), router="router", shared=shared)


def residual_multiplier(config: Any) -> float:
    return config.residual_multiplier


def kind_of(layer: Any, config: Any) -> str:
    attends = "attention" if config.position_embedding_type != "rope" else "rotary attention"
    mixing = "Mamba-2" if layer._modules.get("mamba") is not None else attends
    return f"{mixing}, experts" if layer._modules.get("block_sparse_moe") is not None else f"{mixing}, MLP"


def told(config: Any) -> Mapping[str, Any]:
    chosen = {"n_experts": config.num_local_experts, "n_experts_per_token": config.num_experts_per_tok}
    sizes = {"d_expert": config.intermediate_size, "d_shared": config.shared_intermediate_size}
    return {
        "d_mlp": config.shared_intermediate_size,
        **(chosen | sizes if config.num_local_experts else {}),
        "embedding_multiplier": float(config.embedding_multiplier),
        "logits_multiplier": 1 / config.logits_scaling,
        "positional_embedding_type": "rotary" if config.position_embedding_type == "rope" else "none",
    }


BY = "residual_multiplier * "
MIXING = {
    "Mamba-2": Branch("mixer", mixer_rows(), f"{BY}out_proj(gated)", mamba, "mamba", "input_layernorm"),
    **{
        word: Branch(
            "mixer", kind.rows(PAPER), f"{BY}o_proj(z)", attention, "self_attn", "input_layernorm", place="attn"
        )
        for word, kind in {"attention": NO_POSITIONS, "rotary attention": ROTARY}.items()
    },
}
SHARED = fused_mlp_rows(SILU.word, width="d_shared")
CHANNEL_MIXING = {
    "experts": Branch(
        "mlp",
        experts_rows(SILU.word, WEIGHTS, router="router", shared=SHARED),
        f"{BY}({EXPERTS_ALONE}, + output_linear(shared.post))",
        experts,
        "",
        "post_attention_layernorm",
        "ln2",
        scale=residual_multiplier,
    ),
    "MLP": Branch(
        "mlp",
        fused_mlp_rows(SILU.word),
        f"{BY}output_linear(post)",
        shared_mlp,
        "",
        "post_attention_layernorm",
        "ln2",
        scale=residual_multiplier,
    ),
}
GRANITE = Family(
    "Granite-4-H",
    "GraniteMoeHybridForCausalLM",
    {
        f"{mixing}, {channels}": (MIXING[mixing], CHANNEL_MIXING[channels])
        for mixing in MIXING
        for channels in CHANNEL_MIXING
    },
    kind_of,
    told,
    final_norm="norm",
)

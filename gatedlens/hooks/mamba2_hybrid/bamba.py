"""Bamba: a Mamba-2 or a half rotary attention, then an MLP, each behind a norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gatedlens.hooks.mamba2 import Mamba2Mixer, Mamba2Shape, mixer_rows
from gatedlens.parts.activation import SILU
from gatedlens.parts.attention import Attention, AttentionKind
from gatedlens.parts.glu import GatedMlp, gated_mlp_rows
from gatedlens.parts.hybrid import Branch, Family, Site

PAPER = "Bamba, huggingface.co/blog/bamba"
ATTENDS = AttentionKind(head="q_head")


def mamba(site: Site) -> Mamba2Mixer:
    return Mamba2Mixer(site.weights, site.rows, site.layer, Mamba2Shape.of(site.weights, site.config.to_dict()))


def attention(site: Site) -> Attention:
    rotary = site.wrapped.model.rotary_emb
    return Attention(site.weights, site.rows, site.layer, ATTENDS, site.weights.head_dim, None, rotary)


def mlp(site: Site) -> GatedMlp:
    return GatedMlp(site.weights, site.rows, SILU)


def kind_of(layer: Any, config: Any) -> str:
    return "Mamba-2, MLP" if "mamba" in layer._modules else "attention, MLP"


def told(config: Any) -> Mapping[str, Any]:
    return {"d_mlp": config.intermediate_size}


MAMBA = Branch("mixer", mixer_rows(), "out_proj(gated)", mamba, "mamba", "input_layernorm")
ATTENTION = Branch("mixer", ATTENDS.rows(PAPER), "o_proj(z)", attention, "self_attn", "input_layernorm", place="attn")
MLP = Branch("mlp", gated_mlp_rows(SILU.word), "down_proj(post)", mlp, "feed_forward", "pre_ff_layernorm", "ln2")
BAMBA = Family(
    "Bamba",
    "BambaForCausalLM",
    {"Mamba-2, MLP": (MAMBA, MLP), "attention, MLP": (ATTENTION, MLP)},
    kind_of,
    told,
)

"""LFM2 (Liquid AI 2025, arXiv 2511.23404): gated short convolutions, and attention in some layers; no recurrence at all.

    h += out_proj(C conv(B x)), B, C, x = in_proj(norm(h))          or attention, rotary, with norms of q and k
    h += w2(SiLU(w1(m)) w3(m)), m = norm(h)                         or experts: the k largest of sigmoid(gate(m)) + expert_bias

What a convolution mixes is its kind, "conv": see parts/short_conv.py. Wraps transformers' Lfm2ForCausalLM and Lfm2MoeForCausalLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from gatedlens.compat.names.hybrid import ALIASES
from gatedlens.errors import CheckpointError
from gatedlens.formats.lfm2 import FIELDS, TINY
from gatedlens.model.base import Wrapped
from gatedlens.model.hookpoint import rows_of
from gatedlens.model.norm import Norm
from gatedlens.model.state import Carried
from gatedlens.parts.activation import SILU
from gatedlens.parts.attention import CARRIED_WINDOW, Attention, AttentionKind
from gatedlens.parts.experts import EXPERTS_ALONE, Experts, experts_rows, sigmoid_top
from gatedlens.parts.glu import GatedMlp, gated_mlp_rows
from gatedlens.parts.hybrid import Branch, Family, HybridConfig, HybridModel, Site, points_of
from gatedlens.parts.positioned import NEXT_POSITION
from gatedlens.parts.short_conv import ShortConv, short_conv_rows

PAPER = "LFM2, arXiv 2511.23404"
ATTENDS = AttentionKind(normed="w * normalized")
WEIGHTS = (
    "sigmoid(router) of the k experts in which sigmoid(router) + expert_bias is largest, divided by their sum (if the config "
    "says so), times routed_scaling_factor"
)


class Lfm2Attention(Attention):
    """The same with another name of its output projection."""

    last = "out_proj"


def conv(site: Site) -> ShortConv:
    return ShortConv(site.weights, site.rows, site.layer)


def attention(site: Site) -> Lfm2Attention:
    w, rows, eps, inside = site.weights, site.rows, site.config.norm_eps, site.wrapped.model._modules
    rotary = inside["rotary_emb" if "rotary_emb" in inside else "pos_emb"]
    norms = Norm(w.q_layernorm, rows_of("q_norm", rows), eps), Norm(w.k_layernorm, rows_of("k_norm", rows), eps)
    return Lfm2Attention(w, rows, site.layer, ATTENDS, w.head_dim, None, rotary, norms)


def mlp(site: Site) -> GatedMlp:
    return GatedMlp(site.weights, site.rows, SILU, names=("w1", "w3", "w2"))


def experts(site: Site) -> Experts:
    config, w = site.config, site.weights
    router = w if config.use_expert_bias else None
    scale, k = float(config.routed_scaling_factor), config.num_experts_per_tok
    routing = sigmoid_top(k, router, normalised=config.norm_topk_prob, scale=scale, bias="expert_bias", eps=1e-6)
    return Experts(w, site.rows, SILU, routing)


def kind_of(layer: Any, config: Any) -> str:
    mixing = "attention" if "self_attn" in layer._modules else "short conv"
    return f"{mixing}, experts" if "experts" in layer.feed_forward._modules else f"{mixing}, MLP"


def told(config: Any) -> Mapping[str, Any]:
    return {}


def told_of_experts(config: Any) -> Mapping[str, Any]:
    chosen = {"n_experts": config.num_experts, "n_experts_per_token": config.num_experts_per_tok}
    return {**chosen, "d_expert": config.moe_intermediate_size}


MIXING = {
    "short conv": Branch("mixer", short_conv_rows(PAPER), "out_proj(gated)", conv, "conv", "operator_norm"),
    "attention": Branch(
        "mixer", ATTENDS.rows(PAPER), "out_proj(z)", attention, "self_attn", "operator_norm", place="attn"
    ),
}
OF_MLP = tuple(
    replace(row, equation=row.equation.replace("gate_proj", "w1").replace("up_proj", "w3"))
    for row in gated_mlp_rows(SILU.word)
)
CHANNEL_MIXING = {
    "MLP": Branch("mlp", OF_MLP, "w2(post)", mlp, "feed_forward", "ffn_norm", "ln2"),
    "experts": Branch(
        "mlp", experts_rows(SILU.word, WEIGHTS), EXPERTS_ALONE, experts, "feed_forward", "ffn_norm", "ln2"
    ),
}


def _layers(*channels: str) -> dict[str, tuple[Branch, ...]]:
    return {f"{mixing}, {one}": (MIXING[mixing], CHANNEL_MIXING[one]) for mixing in MIXING for one in channels}


FAMILIES = {
    "lfm2": Family(
        "LFM2", "Lfm2ForCausalLM", _layers("MLP"), kind_of, told, final_norm="embedding_norm", eps="norm_eps"
    ),
    "lfm2_moe": Family(
        "LFM2-MoE",
        "Lfm2MoeForCausalLM",
        _layers("MLP", "experts"),
        kind_of,
        told_of_experts,
        final_norm="embedding_norm",
        eps="norm_eps",
    ),
}


@dataclass(kw_only=True)
class Lfm2Config(HybridConfig):
    """cfg of LFM2. n_heads and d_head are the attention's; d_inner, d_conv: the channels and taps of its convolutions."""

    d_inner: int = 0
    d_conv: int = 0

    @property
    def sizes(self) -> dict[str, int]:
        return {**super().sizes, "channel": self.d_inner, "tap": self.d_conv}


class HookedLFM2(HybridModel):
    """`HookedLFM2(Lfm2ForCausalLM(...))`, or better `gl.wrap(...)`: LFM2 opened up, the short convolutions and the attention.

    It has no scan: `gl.states.patch` and the profiles of states say so, and `gl.layers.where(kind="conv")` names the layers of
    convolutions, whose implicit attention, knockout and relevance are as everywhere. Padding on either side or inside a row, and
    documents packed in a row, are as if each row stood alone.
    """

    title = "LFM2"
    paper = "Liquid AI, LFM2 Technical Report (arXiv 2511.23404)"
    reference = (
        "LiquidAI/LFM2-1.2B",
        {"d_model": 2048, "channel": 2048, "tap": 3, "head": 32, "kv_head": 8, "d_head": 64, "d_mlp": 8192, "expert": 32,
        "d_expert": 1792},
    )  # fmt: skip
    recurrence: ClassVar = {
        "decay": "none: it has no recurrence; tokens are mixed by a causal depthwise conv of few taps, and by attention",
        "skip": "none",
        "conv": "causal depthwise conv over u = in_gate * x, the whole of the mixing",
        "gate": "gate_pre, as it is",
    }
    attention_words: ClassVar = {
        "x": "x",
        "o": "gated",
        "gate": "gate",
        "scan": "S[i, j] = conv.weight[K - 1 - (i - j)], 0 <= i - j < K taps, within a document",
        "act": "in_gate: u = in_gate * x",
        "r": "gate * conv.bias; with a carried state also what its conv tail brings",
        "attention layers": ATTENDS.words,
    }
    families = FAMILIES
    config_class = Lfm2Config
    wraps = tuple(family.wraps for family in FAMILIES.values())
    hub_types = tuple(FAMILIES)
    hub_fields = FIELDS
    small = TINY
    block_points = points_of(FAMILIES)
    aliases = ALIASES
    carried: ClassVar = {"conv": Carried("conv", "batch tail channel"), **CARRIED_WINDOW, **NEXT_POSITION}
    cfg: Lfm2Config

    @classmethod
    def sizes_of_mixers(cls, wrapped: Wrapped, model_name: str) -> dict[str, Any]:
        """`HookedLFM2.sizes_of_mixers(wrapped, "mine")`: the sizes of its convolutions, 0 where it has none, and its MLPs'
        width."""
        layers = wrapped.model.layers
        found = {tuple(layer.conv.conv.weight.shape) for layer in layers if "conv" in layer._modules}
        if len(found) > 1:
            raise CheckpointError(f"{model_name} has convolutions of different sizes: {sorted(found)}.")
        channels, _, taps = found.pop() if found else (0, 1, 0)
        widths = [layer.feed_forward.w1.weight.shape[0] for layer in layers if "w1" in layer.feed_forward._modules]
        return {"d_inner": channels, "d_conv": taps, "d_mlp": widths[0] if widths else None}


HOOKED = HookedLFM2

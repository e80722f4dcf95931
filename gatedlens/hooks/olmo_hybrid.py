"""OLMo-hybrid (huggingface.co/allenai/Olmo-Hybrid-7B): gated delta nets with beta up to 2, attention normed behind, MLPs.

b batch, l pos, d d_model, h head (of values), g group (a key head).

    delta net layer    h += delta_net(RMSNorm(h))             h += mlp(RMSNorm(h))
    attention layer    h += RMSNorm(attention(h))             h += RMSNorm(mlp(h))
    delta net          q, k, x, gate_pre, beta_pre, dt_pre = proj(n) (+ dt_bias); the rest is parts/delta_net.py
                       beta = 2 sigmoid(beta_pre): above 1 a step turns round what it finds (linear_allow_neg_eigval)
    attention          q and k normed over all heads together, rotary if the config says so

The scale of the norm behind an attention is held where it is asked what the attention writes into the stream (contributions,
heads): W z + b of its o_proj, times the norm's gain, divided by the scale of each position. Wraps transformers'
OlmoHybridForCausalLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatedlens.address.point import Point
from gatedlens.compat.names.qwen3_next import ALIASES
from gatedlens.formats.olmo_hybrid import FIELDS, TINY
from gatedlens.model.base import Wrapped
from gatedlens.model.hookpoint import rows_of
from gatedlens.model.norm import LateNorm, NormOfHeads
from gatedlens.model.weights import linear
from gatedlens.parts.activation import SILU
from gatedlens.parts.attention import CARRIED_WINDOW, Attention, AttentionKind
from gatedlens.parts.delta_net import CARRIED_DELTA, DeltaKind, DeltaMixer, Projected
from gatedlens.parts.glu import GatedMlp, gated_mlp_rows
from gatedlens.parts.hybrid import Branch, Family, HybridConfig, HybridModel, Site, points_of
from gatedlens.parts.positioned import NEXT_POSITION, PositionedModel

PAPER = "OLMo-hybrid"
GDN = "Gated DeltaNet, arXiv 2412.06464"
NORM_EPS = 1e-5  # of the norm behind the scan, whatever the config says
DELTA = DeltaKind(
    rule=f"{GDN}, eq. 10", block=f"{GDN}, fig. 1", forgets=f"{GDN}, sec. 3.4", norm="o_norm", output="o_proj"
)
DELTAS = {doubled: replace(DELTA, doubled=doubled) for doubled in (True, False)}
ATTENDS = {
    rotary: AttentionKind(rotary=rotary, normed="w * normalized", head="q_head", together=True)
    for rotary in (True, False)
}
PROJECTED = (
    Point("hook_q_pre", "batch pos group state", "q_proj(ln1.out)", DELTA.block),
    Point("hook_k_pre", "batch pos group state", "k_proj(ln1.out)", DELTA.block),
    Point("hook_x", "batch pos channel", "v_proj(ln1.out)", DELTA.block),
    Point("hook_gate_pre", "batch pos channel", "g_proj(ln1.out)", DELTA.block),
    Point("hook_beta_pre", "batch pos head", "b_proj(ln1.out)", DELTA.block),
    Point("hook_dt_pre", "batch pos head", "a_proj(ln1.out) + dt_bias", DELTA.block),
)


class OlmoDeltaMixer(DeltaMixer):
    """Every stream has a projection of its own."""

    def projected(self, n: Float[Tensor, "batch pos d_model"]) -> Projected:
        w = self.weights
        projections = (w.q_proj, w.k_proj, w.v_proj, w.g_proj, w.b_proj, w.a_proj)
        q, k, x, z, b, a = (F.linear(n, one.weight, one.bias) for one in projections)
        return Projected(q.unflatten(-1, self.key_shape), k.unflatten(-1, self.key_shape), x, z, b, a)

    def read_with(self) -> dict[str, Tensor]:
        w = self.weights
        words = {"Q": w.q_proj, "K": w.k_proj, "in": w.v_proj, "gate": w.g_proj, "beta": w.b_proj, "dt": w.a_proj}
        return {name: weight for word, one in words.items() for name, weight in linear(word, one).items()}


def delta_net(site: Site) -> OlmoDeltaMixer:
    kind = DELTAS[site.config.linear_allow_neg_eigval]
    return OlmoDeltaMixer(site.weights, site.rows, site.layer, kind, sizes_of(site.config), NORM_EPS)


def attention(site: Site) -> Attention:
    w, rotary = site.weights, site.wrapped.model.rotary_emb
    norms = tuple(
        NormOfHeads(getattr(w, name), rows_of(name, site.rows), site.config.rms_norm_eps)
        for name in ("q_norm", "k_norm")
    )
    kind = ATTENDS[rotary is not None]
    return Attention(w, site.rows, site.layer, kind, w.head_dim, None, rotary, (norms[0], norms[1]))


def mlp(site: Site) -> GatedMlp:
    return GatedMlp(site.weights, site.rows, SILU)


def kind_of(layer: Any, config: Any) -> str:
    if "self_attn" in layer._modules:
        return "attention" if (config.rope_parameters or {}).get("rope_theta") else "attention without positions"
    return "delta net, beta up to 2" if config.linear_allow_neg_eigval else "delta net"


def told(config: Any) -> Mapping[str, Any]:
    rotary = bool((config.rope_parameters or {}).get("rope_theta"))
    return {"d_mlp": config.intermediate_size, "positional_embedding_type": "rotary" if rotary else "none"}


def sizes_of(config: Any) -> dict[str, int]:
    """The sizes of its delta nets, by our axes."""
    heads, value = config.linear_num_value_heads, config.linear_value_head_dim
    return {
        "channel": heads * value, "head": heads, "value": value, "group": config.linear_num_key_heads,
        "state": config.linear_key_head_dim, "tap": config.linear_conv_kernel_dim,
    }  # fmt: skip


def _before(doubled: bool) -> tuple[Branch, Branch]:
    rows = DELTAS[doubled].rows(*PROJECTED)
    mlp_rows = gated_mlp_rows(SILU.word)
    return (
        Branch("mixer", rows, "o_proj(gated)", delta_net, "linear_attn", "input_layernorm"),
        Branch("mlp", mlp_rows, "down_proj(post)", mlp, "mlp", "post_attention_layernorm", "ln2"),
    )


def _behind(rotary: bool) -> tuple[Branch, Branch]:
    kind, mlp_rows = ATTENDS[rotary], gated_mlp_rows(SILU.word, reads="mlp_in")
    return (
        Branch(
            "mixer",
            kind.rows(PAPER, "mixer_in"),
            "o_proj(attn.z)",
            attention,
            "self_attn",
            None,
            place="attn",
            after="post_attention_layernorm",
        ),
        Branch("mlp", mlp_rows, "down_proj(mlp.post)", mlp, "mlp", None, "ln2", after="post_feedforward_layernorm"),
    )


OLMO_HYBRID = Family(
    "OLMo-hybrid",
    "OlmoHybridForCausalLM",
    {
        "delta net, beta up to 2": _before(True),
        "delta net": _before(False),
        "attention": _behind(True),
        "attention without positions": _behind(False),
    },
    kind_of,
    told,
    final_norm="norm",
    norm=LateNorm,
)
FAMILIES = {"olmo_hybrid": OLMO_HYBRID}


@dataclass(kw_only=True)
class OlmoHybridConfig(HybridConfig):
    """cfg of OLMo-hybrid; `of_delta_nets`: their sizes."""

    head = "q_head"
    of_delta_nets: Mapping[str, int]

    @property
    def sizes(self) -> dict[str, int]:
        return {**super().sizes, **self.of_delta_nets}


class HookedOlmoHybrid(HybridModel):
    """`HookedOlmoHybrid(OlmoHybridForCausalLM(...))`, or better `gl.wrap(...)`: OLMo-hybrid opened up.

    Heads (axis `head`) are those of the delta nets; the attention's are `q_head`. Padding on either side or inside a row, and
    documents packed in a row, are as if each row stood alone. (In transformers padding on the right is in the state that a call
    leaves, and so is padding inside a row.)
    """

    title = "OLMo-hybrid"
    paper = "OLMo-hybrid (huggingface.co/allenai/Olmo-Hybrid-7B), with gated delta nets (arXiv 2412.06464)"
    reference = (
        "allenai/Olmo-Hybrid-7B",
        {
            "d_model": 3840, "channel": 5760, "head": 30, "value": 192, "group": 30, "state": 96, "tap": 4, "q_head": 30,
            "kv_head": 30, "d_head": 128, "d_mlp": 11008,
        },
    )  # fmt: skip
    first_points = PositionedModel.first_points
    last_points = PositionedModel.last_points
    recurrence: ClassVar = DELTA.recurrence
    attention_words: ClassVar = {**DELTA.words, "attention layers": ATTENDS[True].words}
    wraps = ("OlmoHybridForCausalLM",)
    hub_types = tuple(FAMILIES)
    hub_fields = FIELDS
    small = TINY
    families = FAMILIES
    config_class = OlmoHybridConfig
    block_points = points_of(FAMILIES)
    aliases = ALIASES
    carried: ClassVar = {**CARRIED_DELTA, **CARRIED_WINDOW, **NEXT_POSITION}
    cfg: OlmoHybridConfig

    @classmethod
    def sizes_of_mixers(cls, wrapped: Wrapped, model_name: str) -> dict[str, Any]:
        """`HookedOlmoHybrid.sizes_of_mixers(wrapped, "mine")`: those of its delta nets."""
        return {"of_delta_nets": sizes_of(wrapped.config)}


HOOKED = HookedOlmoHybrid

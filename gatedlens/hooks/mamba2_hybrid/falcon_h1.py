"""Falcon-H1: a Mamba-2 and an attention side by side on the same normed stream, then an MLP; multipliers everywhere.

    h += ssm_out_multiplier mamba(ssm_in_multiplier n) + attention_out_multiplier attention(attention_in_multiplier n)
    h += mlp_multipliers[1] down(SiLU(mlp_multipliers[0] gate(m)) up(m))

The two read one norm, n = norm(h); here each has it for itself, ln1 and ln1_attn with the same weights, so that an edit of what
one reads leaves the other alone. The parts of in_proj's output are multiplied by ssm_multipliers, keys by key_multiplier.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from gatedlens.hooks.mamba2 import MULTIPLIED, NORMS, Mamba2Mixer, Mamba2Shape, mixer_rows
from gatedlens.parts.activation import SILU
from gatedlens.parts.attention import Attention, AttentionKind, Multipliers
from gatedlens.parts.glu import GatedMlp, gated_mlp_rows
from gatedlens.parts.hybrid import Branch, Family, Site

PAPER = "Falcon-H1, arXiv 2507.22448"
ATTENDS = AttentionKind(head="q_head", keys="key_multiplier")


class MultipliedMixer(Mamba2Mixer):
    """The same with what in_proj gives multiplied, part by part."""

    def projected(self, n: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos some"]:
        return super().projected(n) * self.weights.mup_vector

    def read_with(self) -> tuple[Float[Tensor, "some d_model"], Float[Tensor, " some"] | None]:
        (weight, bias), by = super().read_with(), self.weights.mup_vector.flatten()
        return weight * by.unsqueeze(-1), None if bias is None else bias * by


def mamba(site: Site) -> MultipliedMixer:
    config, shape = site.config, Mamba2Shape.of(site.weights, site.config.to_dict())
    shape = replace(shape, input=config.ssm_in_multiplier, output=config.ssm_out_multiplier)
    return MultipliedMixer(site.weights, site.rows, site.layer, shape)


def attention(site: Site) -> Attention:
    config, rotary = site.config, site.wrapped.model.rotary_emb
    by = Multipliers(config.attention_in_multiplier, config.key_multiplier, output=config.attention_out_multiplier)
    return Attention(site.weights, site.rows, site.layer, ATTENDS, site.weights.head_dim, None, rotary, multipliers=by)


def mlp(site: Site) -> GatedMlp:
    return GatedMlp(site.weights, site.rows, SILU, site.config.mlp_multipliers[0])


def mlp_out_multiplier(config: Any) -> float:
    return config.mlp_multipliers[1]


def kind_of(layer: Any, config: Any) -> str:
    return _kind(Mamba2Shape.of(layer.mamba, config.to_dict()).norm)


def _kind(norm: str) -> str:
    where = {"after the gate": "", "before the gate": " (its norm before the gate)", "none": " (without a norm)"}
    return f"Mamba-2{where[norm]} beside attention, MLP"


def told(config: Any) -> Mapping[str, Any]:
    return {
        "d_mlp": config.intermediate_size,
        "embedding_multiplier": float(config.embedding_multiplier),
        "logits_multiplier": float(config.lm_head_multiplier),
    }


ATTENTION = Branch(
    "attn",
    ATTENDS.rows(PAPER, "attention_in_multiplier * ln1_attn.out"),
    "attention_out_multiplier * o_proj(z)",
    attention,
    "self_attn",
    "input_layernorm",
    "ln1_attn",
)
MLP = Branch(
    "mlp",
    gated_mlp_rows(SILU.word, gate="mlp_multipliers[0] * gate_proj({})"),
    "mlp_multipliers[1] * down_proj(post)",
    mlp,
    "feed_forward",
    "pre_ff_layernorm",
    "ln2",
    scale=mlp_out_multiplier,
)


def _mamba(norm: str) -> Branch:
    rows = mixer_rows(norm, MULTIPLIED)
    return Branch("mixer", rows, "ssm_out_multiplier * out_proj(gated)", mamba, "mamba", "input_layernorm")


FALCON_H1 = Family(
    "Falcon-H1",
    "FalconH1ForCausalLM",
    {_kind(norm): ((_mamba(norm), ATTENTION), MLP) for norm in NORMS},
    kind_of,
    told,
)

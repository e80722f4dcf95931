"""Jamba (Lieber et al. 2024, arXiv 2403.19887): Mamba with norms of dt, B and C, attention without positions, MLPs and experts.

    mamba        as in hooks/mamba.py, with dt, B, C = x_proj(u), each behind an RMSNorm with a gain
    attention    softmax attention over all positions; no positions, no bias
    channel mix  down(SiLU(gate(m)) up(m)), or experts: weights are the k largest of a softmax over all; none is shared

Wraps transformers' JambaForCausalLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from gatedlens.address.point import Point
from gatedlens.compat.names.hybrid import ALIASES
from gatedlens.errors import CheckpointError
from gatedlens.formats.jamba import FIELDS, TINY
from gatedlens.hooks.mamba import MIXER_ROWS as MAMBA_ROWS
from gatedlens.hooks.mamba import HookedMamba, MambaMixer
from gatedlens.model.base import Wrapped
from gatedlens.model.hookpoint import rows_of
from gatedlens.model.norm import Norm, norm_rows
from gatedlens.model.run import Run
from gatedlens.model.state import CARRIED
from gatedlens.parts.activation import SILU
from gatedlens.parts.attention import CARRIED_WINDOW, RMSNORM, Attention, AttentionKind
from gatedlens.parts.experts import EXPERTS_ALONE, Experts, experts_rows, softmax_top
from gatedlens.parts.glu import GatedMlp, gated_mlp_rows
from gatedlens.parts.hybrid import Branch, Family, HybridConfig, HybridModel, Site, points_of
from gatedlens.parts.positioned import NEXT_POSITION

PAPER = "Jamba, arXiv 2403.19887"
ATTENDS = AttentionKind(rotary=False)
WEIGHTS = "the k largest of softmax over expert of router"
NORMED = {  # the norms of what x_proj gives: where each stands, and what it reads
    "dt_norm": ("dt_rank", "batch pos dt_rank"),
    "B_norm": ("B_pre", "batch pos state"),
    "C_norm": ("C_pre", "batch pos state"),
}


def _mixer_rows() -> tuple[Point, ...]:
    """Mamba's, with a norm behind dt_rank, B and C."""
    rows, known = [], {row.name: row for row in MAMBA_ROWS}
    norms = {part: norm_rows(part, reads, RMSNORM, axes=axes) for part, (reads, axes) in NORMED.items()}
    before = [
        *(known["hook_dt_rank"], *norms["dt_norm"]),
        *(replace(known["hook_B"], name="hook_B_pre"), *norms["B_norm"]),
        *(replace(known["hook_C"], name="hook_C_pre"), *norms["C_norm"]),
    ]
    anew = {"hook_B": "B_norm.out", "hook_C": "C_norm.out", "hook_dt_pre": "dt_proj(dt_norm.out)"}
    for row in MAMBA_ROWS:
        row = replace(row, equation=anew.get(row.name, row.equation))
        rows += before if row.name == "hook_dt_rank" else [row]
    return tuple(rows)


class JambaMixer(MambaMixer):
    """Mamba's mixer with a norm of dt, B and C."""

    def __init__(self, weights: Any, rows: tuple[Point, ...], layer: int, eps: float):
        super().__init__(weights, rows, layer)
        self.dt_norm = Norm(weights.dt_layernorm, rows_of("dt_norm", rows), eps)
        self.B_norm = Norm(weights.b_layernorm, rows_of("B_norm", rows), eps)
        self.C_norm = Norm(weights.c_layernorm, rows_of("C_norm", rows), eps)

    def selected(self, u: Float[Tensor, "batch pos channel"]) -> tuple[Tensor, Tensor, Tensor]:
        dt_rank, B, C = self.projected(u)
        dt_rank = self.dt_norm(self.hook_dt_rank(dt_rank))
        return dt_rank, self.B_norm(self.hook_B_pre(B)), self.C_norm(self.hook_C_pre(C))

    def plain(self, run: Run) -> bool:
        """Never what mamba-ssm's fused mixer computes: it knows no such norms."""
        return False


def mamba(site: Site) -> JambaMixer:
    return JambaMixer(site.weights, site.rows, site.layer, site.config.rms_norm_eps)


def attention(site: Site) -> Attention:
    return Attention(site.weights, site.rows, site.layer, ATTENDS, site.weights.head_dim)


def mlp(site: Site) -> GatedMlp:
    return GatedMlp(site.weights, site.rows, SILU)


def experts(site: Site) -> Experts:
    routing = softmax_top(site.config.num_experts_per_tok, normalised=False)
    return Experts(site.weights, site.rows, SILU, routing, router="router")


def kind_of(layer: Any, config: Any) -> str:
    mixing = "Mamba" if "mamba" in layer._modules else "attention"
    return f"{mixing}, experts" if "experts" in layer.feed_forward._modules else f"{mixing}, MLP"


def told(config: Any) -> Mapping[str, Any]:
    chosen = {
        "n_experts": config.num_experts,
        "n_experts_per_token": config.num_experts_per_tok,
        "d_expert": config.intermediate_size,
    }
    return {
        "d_mlp": config.intermediate_size,
        "positional_embedding_type": "none",
        **(chosen if config.num_experts > 1 else {}),
    }


MIXING = {
    "Mamba": Branch("mixer", _mixer_rows(), "out_proj(gated)", mamba, "mamba", "input_layernorm"),
    "attention": Branch(
        "mixer", ATTENDS.rows(PAPER), "o_proj(z)", attention, "self_attn", "input_layernorm", place="attn"
    ),
}
OF_EXPERTS = experts_rows(SILU.word, WEIGHTS, router="router")
CHANNEL_MIXING = {
    "MLP": Branch("mlp", gated_mlp_rows(SILU.word), "down_proj(post)", mlp, "feed_forward", "pre_ff_layernorm", "ln2"),
    "experts": Branch("mlp", OF_EXPERTS, EXPERTS_ALONE, experts, "feed_forward", "pre_ff_layernorm", "ln2"),
}
FAMILIES = {
    "jamba": Family(
        "Jamba",
        "JambaForCausalLM",
        {
            f"{mixing}, {channels}": (MIXING[mixing], CHANNEL_MIXING[channels])
            for mixing in MIXING
            for channels in CHANNEL_MIXING
        },
        kind_of,
        told,
    )
}


@dataclass(kw_only=True)
class JambaConfig(HybridConfig):
    """cfg of Jamba; the sizes of its mixers are 0 where it has none."""

    d_inner: int = 0
    d_state: int = 0
    d_conv: int = 0
    dt_rank: int = 0

    @property
    def sizes(self) -> dict[str, int]:
        own = {"channel": self.d_inner, "state": self.d_state, "tap": self.d_conv, "dt_rank": self.dt_rank}
        return {**super().sizes, **own}


class HookedJamba(HybridModel):
    """`HookedJamba(JambaForCausalLM(...))`, or better `gl.wrap(...)`: Jamba opened up.

    Heads (axis `head`) are the attention's. Padding on either side or inside a row, documents packed in a row, and a text that
    goes on from a state are as if each row stood alone. (transformers drops a carried state where more than one token follows,
    and lets a bias of in_proj and padding on the right into the state.)
    """

    title = "Jamba"
    paper = "Lieber et al., Jamba: A Hybrid Transformer-Mamba Language Model (arXiv 2403.19887)"
    reference = (
        "ai21labs/Jamba-v0.1",
        {
            "d_model": 4096, "channel": 8192, "state": 16, "tap": 4, "dt_rank": 256, "head": 32, "kv_head": 8, "d_head": 128,
            "d_mlp": 14336, "expert": 16, "d_expert": 14336,
        },
    )  # fmt: skip
    recurrence: ClassVar = HookedMamba.recurrence
    attention_words: ClassVar = {**HookedMamba.attention_words, "attention layers": ATTENDS.words}
    families = FAMILIES
    config_class = JambaConfig
    wraps = ("JambaForCausalLM",)
    hub_types = tuple(FAMILIES)
    hub_fields = FIELDS
    small = TINY
    block_points = points_of(FAMILIES)
    aliases = ALIASES
    carried: ClassVar = {**CARRIED, **CARRIED_WINDOW, **NEXT_POSITION}
    cfg: JambaConfig

    @classmethod
    def sizes_of_mixers(cls, wrapped: Wrapped, model_name: str) -> dict[str, int]:
        """`HookedJamba.sizes_of_mixers(wrapped, "mine")`: the sizes by name, none where there are no mixers."""
        mixers = [layer.mamba for layer in wrapped.model.layers if "mamba" in layer._modules]
        for mixer in mixers:
            if mixer.A_log.ndim != 2:
                raise CheckpointError(f"{model_name} has a mixer whose A_log is not [channel, state].")
        if not mixers:
            return {}
        d_inner, d_state = mixers[0].A_log.shape
        ranks, taps = mixers[0].dt_proj.weight.shape[1], mixers[0].conv1d.weight.shape[-1]
        return {"d_inner": d_inner, "d_state": d_state, "d_conv": taps, "dt_rank": ranks}


HOOKED = HookedJamba

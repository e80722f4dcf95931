"""Zamba (Glorioso et al. 2024, arXiv 2405.16712): a Mamba in every layer, before some of them one transformer block that they
share.

    t  = linear(mlp(norm(attention(norm([h, embed])))))          of the shared block; t enters the mixer's input alone
    h += mamba(norm(h + t))

The Mamba is that of hooks/mamba.py with its channels in n_mamba_heads groups (axis `group`), each with an x_proj, a dt_proj and
so with a dt, a B and a C of its own; in_proj gives content and gate in turn, row by row. The attention has no positions; its
scores are divided by sqrt(d_head / 2); the MLP's activation is GELU.

Wraps transformers' ZambaForCausalLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatedlens.address.point import Point
from gatedlens.compat.names.hybrid import ALIASES
from gatedlens.errors import CheckpointError
from gatedlens.formats.zamba import FIELDS, TINY
from gatedlens.hooks.mamba import MIXER_ROWS as MAMBA_ROWS
from gatedlens.hooks.mamba import HookedMamba, MambaMixer
from gatedlens.model.base import Wrapped
from gatedlens.model.hookpoint import rows_of
from gatedlens.model.path import Kernel, PathMixer, Streams
from gatedlens.model.run import Run
from gatedlens.model.state import CARRIED
from gatedlens.model.weights import given
from gatedlens.parts.activation import ACTIVATIONS
from gatedlens.parts.attention import CARRIED_WINDOW, AttentionKind, Multipliers
from gatedlens.parts.glu import GatedMlp, gated_mlp_rows
from gatedlens.parts.hybrid import Branch, HybridConfig, HybridModel, Site, points_of
from gatedlens.parts.positioned import NEXT_POSITION
from gatedlens.parts.shared_block import SharedAttention, SharedBlock, SharedFamily, shared_rows
from gatedlens.recurrence.channels import ChannelTerms
from gatedlens.recurrence.scanning import at_least_float32

PAPER = "Zamba, arXiv 2405.16712"
ATTENDS = AttentionKind(rotary=False, scores="(d_head / 2)^-0.5")
ACT = ACTIVATIONS["gelu"]
GROUPED = {  # what each group has of its own
    "hook_x": ("batch pos channel", "in_proj(ln1.out)[0::2]"),
    "hook_gate_pre": ("batch pos channel", "in_proj(ln1.out)[1::2]"),
    "hook_dt_rank": ("batch pos group dt_rank", "x_proj_weight[group](u of the group's channels)[:dt_rank]"),
    "hook_B": ("batch pos group state", "x_proj_weight[group](u of the group's channels)[dt_rank:dt_rank + state]"),
    "hook_C": ("batch pos group state", "x_proj_weight[group](u of the group's channels)[dt_rank + state:]"),
    "hook_dt_pre": ("batch pos channel", "dt_proj_weight[group](dt_rank) + dt_proj_bias"),
    "hook_scan": ("batch pos channel", "sum over state of C of the channel's group * state"),
    "hook_write": ("batch pos channel state", "dt * B of the channel's group * u"),
}
MIXER_ROWS = tuple(
    replace(row, axes=GROUPED[row.name][0], equation=GROUPED[row.name][1]) if row.name in GROUPED else row
    for row in MAMBA_ROWS
)


class ZambaMixer(MambaMixer):
    """Mamba's mixer with its channels in groups that select apart."""

    @property
    def A(self) -> Float[Tensor, "channel state"]:  # type: ignore[override]
        """-exp(A_log), at least float32."""
        return -torch.exp(at_least_float32(self.weights.A_log.flatten(0, 1)))

    def project(self, n: Float[Tensor, "batch pos d_model"], run: Run) -> Streams:
        given = F.linear(n, self.weights.in_proj.weight, self.weights.in_proj.bias)
        x, z = given.unflatten(-1, (-1, 2)).unbind(-1)
        # In memory of their own: a copy that a hook gets has the same layout then, and so the same rounding behind it.
        return {"x": self.hook_x(run.padding.zero(x.contiguous())), "gate_pre": self.hook_gate_pre(z.contiguous())}

    def select(self, u: Float[Tensor, "batch pos channel"], streams: Streams, run: Run) -> None:
        w, pad = self.weights, run.padding
        groups, ranks, n_state = len(w.A_log), w.dt_proj_weight.shape[2], w.A_log.shape[2]
        given = torch.einsum("blgc,grc->blgr", u.unflatten(2, (groups, -1)), w.x_proj_weight)
        dt_rank, B, C = (part.contiguous() for part in given.split([ranks, n_state, n_state], dim=-1))
        dt_rank = self.hook_dt_rank(dt_rank)
        streams["B"] = self.hook_B(B)
        streams["C"] = self.hook_C(C)
        dt_pre = torch.einsum("blgr,gcr->blgc", dt_rank, w.dt_proj_weight) + w.dt_proj_bias
        dt_pre = self.hook_dt_pre(dt_pre.flatten(2))
        # 0 at a masked position: the state passes unchanged
        streams["dt"] = pad.zero(self.hook_dt(pad.zero(F.softplus(dt_pre))))

    def terms(  # type: ignore[override]
        self,
        dt: Float[Tensor, "batch pos channel"],
        B: Float[Tensor, "batch pos group state"],
        C: Float[Tensor, "batch pos group state"],
    ) -> ChannelTerms:
        """decay = exp(dt A), write = dt B u, read = C: Mamba, eq. 2 and 4."""
        return ChannelTerms(dt, amount=dt, key=B, read=C, rate=self.A.to(dt))

    def kernel(self, terms: ChannelTerms, u: Float[Tensor, "batch pos channel"], run: Run) -> Kernel | None:
        """None: mamba-ssm's scan knows no groups of this kind."""
        return None

    def forward(self, n: Float[Tensor, "batch pos d_model"], run: Run) -> Float[Tensor, "batch pos d_model"]:
        return PathMixer.forward(self, n, run)

    def named_weights(self) -> dict[str, Tensor]:
        w = self.weights.in_proj  # x and z by turns
        b_in, b_gate = (None, None) if w.bias is None else (w.bias[::2], w.bias[1::2])
        read = given(W_in=w.weight[::2].mT, b_in=b_in, W_gate=w.weight[1::2].mT, b_gate=b_gate)
        return {**read, "A": self.A, **PathMixer.named_weights(self)}


def mamba(site: Site) -> ZambaMixer:
    return ZambaMixer(site.weights, site.rows, site.layer)


def shared(weights: Any, rows: tuple[Point, ...], layer: int, wrapped: Any) -> SharedBlock:
    config, w = wrapped.config, weights.shared_transf
    d_head, scale = config.attention_head_dim, Multipliers(scores=(config.attention_head_dim / 2) ** -0.5)
    attn = SharedAttention(w.self_attn, rows_of("attn", rows), layer, ATTENDS, d_head, multipliers=scale)
    mlp = GatedMlp(w.feed_forward, rows_of("mlp", rows), ACT)
    return SharedBlock(weights, rows, w, config.rms_norm_eps, attn, mlp)


def kind_of(layer: Any, config: Any) -> str:
    return "Mamba behind a shared block" if "mamba_decoder" in layer._modules else "Mamba"


def told(config: Any) -> Mapping[str, Any]:
    return {
        "d_mlp": config.intermediate_size,
        "act_fn": config.hidden_act,
        "d_head": config.attention_head_dim,
        "positional_embedding_type": "none",
    }


FAMILIES = {
    "zamba": SharedFamily(
        "Zamba",
        "ZambaForCausalLM",
        {},
        kind_of,
        told,
        act="gelu",
        mixer=Branch("mixer", MIXER_ROWS, "out_proj(gated)", mamba, "mamba", "input_layernorm"),
        plain="Mamba",
        blocks={
            "Mamba behind a shared block": shared_rows(ATTENDS.rows(PAPER), gated_mlp_rows(ACT.word), PAPER),
        },
        made=shared,
    )
}


@dataclass(kw_only=True)
class ZambaConfig(HybridConfig):
    """cfg of Zamba. n_groups: of channels that select apart."""

    d_inner: int
    d_state: int
    d_conv: int
    dt_rank: int
    n_groups: int

    @property
    def sizes(self) -> dict[str, int]:
        own = {"channel": self.d_inner, "state": self.d_state, "tap": self.d_conv, "dt_rank": self.dt_rank}
        return {**super().sizes, **own, "group": self.n_groups, "d_concat": 2 * self.d_model}


class HookedZamba(HybridModel):
    """`HookedZamba(ZambaForCausalLM(...))`, or better `gl.wrap(...)`: the first Zamba opened up.

    Heads (axis `head`) are the attention's; what Zamba calls the heads of a Mamba, which select apart, is the axis `group`.
    Padding on either side or inside a row, documents packed in a row, and a text that goes on from a state are as if each row
    stood alone. (transformers drops a carried state where more than one token follows, and lets a bias of in_proj and padding
    on the right into the state.)
    """

    title = "Zamba"
    paper = "Glorioso et al., Zamba: A Compact 7B SSM Hybrid Model (arXiv 2405.16712)"
    reference = (
        "Zyphra/Zamba-7B-v1",
        {
            "d_model": 3712, "channel": 7424, "group": 2, "state": 16, "tap": 4, "dt_rank": 232, "head": 16, "kv_head": 16,
            "d_head": 464, "d_mlp": 14848, "d_concat": 7424,
        },
    )  # fmt: skip
    recurrence: ClassVar = {
        **HookedMamba.recurrence,
        "write": "dt * B of the channel's group * u, [channel, state]",
        "read": "C of the channel's group, [group, state]",
    }
    attention_words: ClassVar = {
        **HookedMamba.attention_words,
        "scan": f"{HookedMamba.attention_words['scan']}; B and C are those of the channel's group",
        "attention layers": ATTENDS.words,
    }
    families = FAMILIES
    config_class = ZambaConfig
    wraps = ("ZambaForCausalLM",)
    hub_types = tuple(FAMILIES)
    hub_fields = FIELDS
    small = TINY
    block_points = points_of(FAMILIES)
    aliases = ALIASES
    carried: ClassVar = {**CARRIED, **CARRIED_WINDOW, **NEXT_POSITION}
    cfg: ZambaConfig

    @classmethod
    def sizes_of_mixers(cls, wrapped: Wrapped, model_name: str) -> dict[str, int]:
        """`HookedZamba.sizes_of_mixers(wrapped, "mine")`: the sizes by name."""
        found = set()
        for layer in wrapped.model.layers:
            mixer = layer._modules.get("mamba_decoder", layer).mamba
            groups, width, d_state = mixer.A_log.shape
            found.add((groups * width, d_state, mixer.conv1d.weight.shape[-1], mixer.dt_proj_weight.shape[2], groups))
        if len(found) > 1:
            raise CheckpointError(f"{model_name} has mixers of different sizes: {sorted(found)}.")
        return dict(zip(("d_inner", "d_state", "d_conv", "dt_rank", "n_groups"), found.pop(), strict=True))


HOOKED = HookedZamba

"""Bailing hybrid (Ling 3, inclusionAI): Kimi delta attention with a bounded decay, gated latent attention, experts.

The letters are those of kimi_linear.py, and so is all that is not said here:

    delta net    dt_pre = f_proj(n) + dt_bias and gate_pre = g_proj(n), each one projection
                 log decay = low * sigmoid(exp(A_log) dt_pre), low = -5: no step forgets more (or Kimi's, unbounded)
    attention    q and the shared part of the keys turned by position, neighbours in pairs; z of each head times a sigmoid of one
                 number, g_proj(n)

Wraps transformers' BailingHybridForCausalLM. (There log decays are rounded to the model's dtype; here they stay float32.) What a
checkpoint holds for predicting several tokens, the layers behind the last, is not read, as in transformers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatedlens.address.point import Point
from gatedlens.formats.bailing_hybrid import TINY
from gatedlens.formats.transformers_config import BAILING_HYBRID
from gatedlens.hooks.kimi_linear import (
    BLOCK,
    CHANNEL_MIXING,
    DELTA,
    LATENT,
    HookedKimiLinear,
    KimiDeltaMixer,
    KimiLinearConfig,
)
from gatedlens.model.base import Wrapped
from gatedlens.model.norm import Norm
from gatedlens.model.path import Content
from gatedlens.parts.attention import Multipliers, check_rope
from gatedlens.parts.delta_net import DeltaMixer
from gatedlens.parts.latent_attention import LatentAttention
from gatedlens.parts.layer_kind import LayerKind, rows_by_kind

BOUNDED, UNBOUNDED = "delta net of bounded decay", "delta net"
DELTAS = {BOUNDED: replace(DELTA, bounded=True), UNBOUNDED: DELTA}
GATED = {
    narrow: replace(kind, rotary=True, pairs=True, gated=True, gate_of_heads=True) for narrow, kind in LATENT.items()
}
PROJECTED = (
    Point("hook_q_pre", "batch pos head state", "q_proj(ln1.out)", BLOCK),
    Point("hook_k_pre", "batch pos head state", "k_proj(ln1.out)", BLOCK),
    Point("hook_x", "batch pos channel", "v_proj(ln1.out)", BLOCK),
    Point("hook_gate_pre", "batch pos channel", "g_proj(ln1.out)", BLOCK),
    Point("hook_beta_pre", "batch pos head", "b_proj(ln1.out)", BLOCK),
    Point("hook_dt_pre", "batch pos head state", "f_proj(ln1.out) + dt_bias", BLOCK),
)
MIXING = {
    **{word: ("mixer", delta.rows(*PROJECTED), "o_proj(gated)") for word, delta in DELTAS.items()},
    "attention": ("attn", GATED[False].rows(), "o_proj(gated)"),
    "attention of narrow queries": ("attn", GATED[True].rows(), "o_proj(gated)"),
}
ROWS = rows_by_kind(MIXING, CHANNEL_MIXING)


class BailingDeltaMixer(KimiDeltaMixer):
    """What the gate and the decay are made of are projections of full rank."""

    def gate_of(self, n: Float[Tensor, "batch pos d_model"]) -> Content:
        return F.linear(n, self.weights.g_proj.weight)

    def dt_of(self, n: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos key"]:
        return F.linear(n, self.weights.forget_gate.f_proj.weight)

    def gates(self) -> dict[str, Any]:
        return {"gate": self.weights.g_proj, "dt": self.weights.forget_gate.f_proj}


class HookedBailingHybrid(HookedKimiLinear):
    """`HookedBailingHybrid(BailingHybridForCausalLM(...))`, or better `gl.wrap(...)`: Ling 3 opened up.

    Heads (axis `head`) are those of the delta nets; the attention's are `q_head`. Padding on either side or inside a row, and
    documents packed in a row, are as if each row stood alone.
    """

    title = "Bailing hybrid"
    paper = "Ling 3 (huggingface.co/inclusionAI/Ling-3.0-Flash), with Kimi delta attention (arXiv 2510.26692)"
    reference = (
        "inclusionAI/Ling-3.0-Flash",
        {
            "d_model": 2560, "channel": 4096, "head": 32, "value": 128, "state": 128, "tap": 4, "q_head": 32, "d_head": 128,
            "d_qk": 192, "d_shared_key": 64, "kv_latent": 512, "d_mlp": 6144, "expert": 512, "d_expert": 768, "d_shared": 768,
        },
    )  # fmt: skip
    recurrence: ClassVar = DELTAS[BOUNDED].recurrence
    attention_words: ClassVar = {**DELTAS[BOUNDED].words, "attention layers": GATED[False].words}
    wraps = ("BailingHybridForCausalLM",)
    hub_types = ("bailing_hybrid",)
    hub_fields = BAILING_HYBRID
    small = TINY
    architecture = "bailing_hybrid"
    rows_by_kind = ROWS
    block_points = tuple(
        {row.name: row for rows in ROWS.values() for row in rows}.values()
    )  # of all kinds; see rows_for

    @classmethod
    def describe(cls, wrapped: Wrapped, model_name: str) -> KimiLinearConfig:
        """The cfg of a wrapped model, as Kimi Linear's."""
        check_rope(wrapped.model.rotary_emb, model_name)
        return super().describe(wrapped, model_name)

    @staticmethod
    def kind_of(layer: Wrapped) -> LayerKind:
        """`model.kind_of(model.wrapped.model.layers[0])`: what a wrapped layer is, by the parts it has."""
        kind = HookedKimiLinear.kind_of(layer)
        if kind.mixing == UNBOUNDED and layer.self_attn.forget_gate.safe_gate:
            return kind._replace(mixing=BOUNDED)
        return kind

    def _make_delta_net(self, weights: Wrapped, points: tuple[Point, ...], layer: int) -> DeltaMixer:
        delta = DELTAS[self.cfg.kinds[layer].mixing]
        return BailingDeltaMixer(weights, points, layer, delta, self.cfg.sizes, self.cfg.eps)

    def _make_attention(
        self, weights: Wrapped, points: tuple[Point, ...], layer: int, narrow: bool, norms: tuple[Norm | None, Norm]
    ) -> LatentAttention:
        scores = Multipliers(scores=float(weights.scaling))  # longer contexts scale it (yarn)
        rotary = self.wrapped.model.rotary_emb
        return LatentAttention(weights, points, layer, GATED[narrow], self.cfg.d_head, norms, rotary, scores)


HOOKED = HookedBailingHybrid

"""Kimi Linear (Kimi Team 2025, arXiv 2510.26692): Kimi delta attention, latent attention (MLA) without positions, experts.

b batch, l pos, d d_model, h head, v value (of a head), c channel = (head value), n state (numbers of a key), K taps of the conv,
low the width of a narrow projection; unit(x) = x / sqrt(sum x^2 + 1e-6).

    delta net    q, k, x = proj(n), beta_pre = b_proj(n), dt_pre = f_b(f_a(n)) + dt_bias; the rest is parts/delta_net.py
                 log decay = -exp(A_log) softplus(dt_pre), a number for each of a key's
                 state_t = (1 - beta_t k_t k_t^T) diag(decay_t) state_{t-1} + beta_t k_t u_t^T
                 scan_t  = state_t q_t / sqrt(n)         out = o_proj(RMSNorm(scan) sigmoid(g_b(g_a(n)))), head by head
    attention    keys and values from one latent; no positions
    channel mix  down(SiLU(gate(m)) up(m)), or experts and a shared expert

Wraps transformers' KimiLinearForCausalLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatedlens.address.point import Point
from gatedlens.compat.names.qwen3_next import ALIASES
from gatedlens.errors import CheckpointError
from gatedlens.formats.kimi_linear import TINY
from gatedlens.formats.transformers_config import KIMI_LINEAR
from gatedlens.model import fields
from gatedlens.model.base import Wrapped
from gatedlens.model.block import Block, Sub
from gatedlens.model.config import HookedConfig
from gatedlens.model.hookpoint import rows_of
from gatedlens.model.norm import Norm
from gatedlens.model.path import Content, Streams
from gatedlens.model.run import Run
from gatedlens.parts.activation import SILU
from gatedlens.parts.delta_net import CARRIED_DELTA, DeltaKind, DeltaMixer
from gatedlens.parts.experts import EXPERTS_OUT_UNGATED, MOE, Experts, experts_rows, sigmoid_top
from gatedlens.parts.glu import GatedMlp, gated_mlp_rows
from gatedlens.parts.latent_attention import LatentAttention, LatentKind, carried_by
from gatedlens.parts.layer_kind import LayerKind, rows_by_kind
from gatedlens.parts.positioned import NEXT_POSITION, PositionedModel
from gatedlens.recurrence.scanning import at_least_float32

PAPER = "Kimi Linear, arXiv 2510.26692"
BLOCK = f"{PAPER}, sec. 4"
EPS = 1e-6  # of the latents' norms, whatever the config says

DELTA = DeltaKind(
    rule=f"{PAPER}, eq. 1",
    block=BLOCK,
    forgets=BLOCK,
    keys="head",
    by_key=True,
    gate="sigmoid",
    norm="o_norm",
    output="o_proj",
)
MIXER_ROWS = DELTA.rows(
    Point("hook_q_pre", "batch pos head state", "q_proj(ln1.out)", BLOCK),
    Point("hook_k_pre", "batch pos head state", "k_proj(ln1.out)", BLOCK),
    Point("hook_x", "batch pos channel", "v_proj(ln1.out)", BLOCK),
    Point("hook_gate_low", "batch pos low", "g_a_proj(ln1.out)", BLOCK),
    Point("hook_gate_pre", "batch pos channel", "g_b_proj(gate_low)", BLOCK),
    Point("hook_beta_pre", "batch pos head", "b_proj(ln1.out)", BLOCK),
    Point("hook_dt_low", "batch pos low", "f_a_proj(ln1.out)", BLOCK),
    Point("hook_dt_pre", "batch pos head state", "f_b_proj(dt_low) + dt_bias", BLOCK),
)

LATENT = {narrow: LatentKind(rotary=False, narrow_q=narrow, head="q_head") for narrow in (False, True)}
WEIGHTS = (
    "sigmoid(router) of the k experts in which sigmoid(router) + e_score_correction_bias is largest within the best groups, "
    "divided by their sum (if the config says so), times routed_scaling_factor"
)
MIXING = {
    "delta net": ("mixer", MIXER_ROWS, "o_proj(gated)"),
    "attention": ("attn", LATENT[False].rows(), "o_proj(z)"),
    "attention of narrow queries": ("attn", LATENT[True].rows(), "o_proj(z)"),
}
CHANNEL_MIXING = {
    "MLP": (gated_mlp_rows(SILU.word), "down_proj(post)"),
    "experts": (
        experts_rows(SILU.word, WEIGHTS, shared=gated_mlp_rows(SILU.word, MOE, width="d_shared")),
        EXPERTS_OUT_UNGATED,
    ),
}


ROWS = rows_by_kind(MIXING, CHANNEL_MIXING)


# -- Kimi delta attention -------------------------------------------------------------------------------------------


class KimiDeltaMixer(DeltaMixer):
    """What the gate and the decay are made of goes through narrow projections."""

    @property
    def forgetting(self) -> Any:
        return self.weights.forget_gate

    def project(self, n: Float[Tensor, "batch pos d_model"], run: Run) -> Streams:
        w, pad = self.weights, run.padding

        def by_head(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1))

        q = pad.zero(self.hook_q_pre(by_head(pad.zero(F.linear(n, w.q_proj.weight)))))
        k = pad.zero(self.hook_k_pre(by_head(pad.zero(F.linear(n, w.k_proj.weight)))))
        x = self.hook_x(pad.zero(F.linear(n, w.v_proj.weight)))
        gate = self.hook_gate_pre(self.gate_of(n))
        beta = self.hook_beta_pre(F.linear(n, w.b_proj.weight))
        dt = self.hook_dt_pre(by_head(at_least_float32(self.dt_of(n)) + w.forget_gate.dt_bias))
        return {"q": q, "k": k, "x": x, "gate_pre": gate, "beta_pre": beta, "dt_pre": dt}

    def gate_of(self, n: Float[Tensor, "batch pos d_model"]) -> Content:
        """What the gate is the sigmoid of."""
        w = self.weights
        return F.linear(self.hook_gate_low(F.linear(n, w.g_a_proj.weight)), w.g_b_proj.weight)

    def dt_of(self, n: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos key"]:
        """What the decay is made of, before its bias."""
        w = self.weights.forget_gate
        return F.linear(self.hook_dt_low(F.linear(n, w.f_a_proj.weight)), w.f_b_proj.weight)

    def read_with(self) -> dict[str, Tensor]:
        w = self.weights
        words = {"Q": w.q_proj, "K": w.k_proj, "in": w.v_proj, "beta": w.b_proj, **self.gates()}
        return {f"W_{word}": one.weight.mT for word, one in words.items()}

    def gates(self) -> dict[str, Any]:
        """The projections of gate and decay, by their words."""
        w, forget = self.weights, self.weights.forget_gate
        return {"gate_low": w.g_a_proj, "gate": w.g_b_proj, "dt_low": forget.f_a_proj, "dt": forget.f_b_proj}


# -- the model ------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class KimiLinearConfig(HookedConfig):
    """cfg of Kimi Linear. n_heads, d_head (of a value) and d_qk are the attention's; `kinds`: what each layer is.

    0 stands for the sizes of what a model has none of.
    """

    kinds: tuple[LayerKind, ...]
    n_linear_heads: int
    d_state: int  # numbers of a key
    d_inner: int  # channels: values of all heads
    d_conv: int
    d_low: int
    d_qk: int
    d_shared_key: int
    kv_latent: int
    q_latent: int = 0
    n_experts: int = 0
    n_experts_per_token: int = 0
    n_expert_groups: int = 1
    n_groups_per_token: int = 1
    normalised_weights: bool = True  # of the experts that a token has chosen
    weights_scale: float = 1.0
    d_expert: int = 0
    d_shared: int = 0
    tie_word_embeddings: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        heads = {"channel": self.d_inner, "head": self.n_linear_heads, "value": self.d_inner // self.n_linear_heads}
        keys = {"state": self.d_state, "tap": self.d_conv, "low": self.d_low}
        attention = {
            "q_head": self.n_heads,
            "d_head": self.d_head,
            "d_qk": self.d_qk,
            "d_shared_key": self.d_shared_key,
        }
        latents = {"kv_latent": self.kv_latent, "q_latent": self.q_latent}
        experts = {"expert": self.n_experts, "d_expert": self.d_expert, "d_shared": self.d_shared}
        return {**super().sizes, **heads, **keys, **attention, **latents, "d_mlp": self.d_mlp or 0, **experts}


class HookedKimiLinear(PositionedModel):
    """`HookedKimiLinear(KimiLinearForCausalLM(...))`, or better `gl.wrap(...)`: Kimi Linear opened up.

    Heads (axis `head`) are those of the delta nets; the attention's are `q_head`. Padding on either side or inside a row, and
    documents packed in a row, are as if each row stood alone.
    """

    title = "Kimi Linear"
    paper = "Kimi Team, Kimi Linear: An Expressive, Efficient Attention Architecture (arXiv 2510.26692)"
    reference = (
        "moonshotai/Kimi-Linear-48B-A3B-Instruct",
        {
            "d_model": 2304, "channel": 4096, "head": 32, "value": 128, "state": 128, "tap": 4, "low": 128, "q_head": 32,
            "d_head": 128, "d_qk": 192, "d_shared_key": 64, "kv_latent": 512, "d_mlp": 9216, "expert": 256, "d_expert": 1024,
            "d_shared": 1024,
        },
    )  # fmt: skip
    recurrence: ClassVar = DELTA.recurrence
    attention_words: ClassVar = {**DELTA.words, "attention layers": LATENT[False].words}
    wraps = ("KimiLinearForCausalLM",)
    architecture: ClassVar[str] = "kimi_linear"
    rows_by_kind: ClassVar[Mapping[LayerKind, tuple[Point, ...]]] = ROWS
    hub_types = ("kimi_linear",)
    hub_fields = KIMI_LINEAR
    small = TINY
    block_points = tuple(
        {row.name: row for rows in ROWS.values() for row in rows}.values()
    )  # of all kinds; see rows_for
    aliases = ALIASES
    carried: ClassVar = {
        **CARRIED_DELTA,
        **carried_by("q_head"),
        **NEXT_POSITION,
    }
    cfg: KimiLinearConfig

    @classmethod
    def describe(cls, wrapped: Wrapped, model_name: str) -> KimiLinearConfig:
        """The cfg of a wrapped model, from the shapes of its parameters and the few numbers that shapes do not tell."""
        config, layers = wrapped.config, wrapped.model.layers
        fields.check(config.to_dict(), cls.hub_fields, f"{model_name}'s config")
        if len(layers) == 0:
            raise CheckpointError(f"{model_name} has no layers.")
        if config.hidden_act not in ("silu", "swish"):
            raise CheckpointError(f"{model_name} has hidden_act={config.hidden_act!r}; supported is 'silu'.")
        weight, kinds = wrapped.model.embed_tokens.weight, tuple(map(cls.kind_of, layers))
        mlps = {kind.channels: layer.mlp for kind, layer in zip(kinds, layers, strict=True)}
        experts: dict[str, Any] = {}
        if "experts" in mlps:
            chosen = mlps["experts"]
            experts = {
                "n_experts": chosen.experts.down_proj.shape[0],
                "n_experts_per_token": config.num_experts_per_tok,
                "n_expert_groups": config.n_group,
                "n_groups_per_token": config.topk_group,
                "normalised_weights": config.norm_topk_prob,
                "weights_scale": float(config.routed_scaling_factor),
                "d_expert": chosen.experts.down_proj.shape[2],
                "d_shared": chosen.shared_experts.down_proj.weight.shape[1],
            }
        return KimiLinearConfig(
            model_name=model_name,
            architecture=cls.architecture,
            n_layers=len(layers),
            d_model=weight.shape[1],
            d_vocab=weight.shape[0],
            n_heads=config.num_attention_heads,
            d_head=config.v_head_dim,
            d_mlp=mlps["MLP"].up_proj.weight.shape[0] if "MLP" in mlps else None,
            act_fn=config.hidden_act,
            attn_only=False,
            positional_embedding_type="rotary" if "rotary_emb" in wrapped.model._modules else "none",
            eps=float(config.rms_norm_eps),
            dtype=weight.dtype,
            device=str(weight.device),
            original_architecture=type(wrapped).__name__,
            kinds=kinds,
            n_linear_heads=config.linear_num_heads,
            d_state=config.linear_head_dim,
            d_inner=config.linear_num_heads * config.linear_head_dim,
            d_conv=config.linear_conv_kernel_dim,
            d_low=config.linear_head_dim if any("g_a_proj" in one.self_attn._modules for one in layers) else 0,
            d_qk=config.qk_nope_head_dim + config.qk_rope_head_dim,
            d_shared_key=config.qk_rope_head_dim,
            kv_latent=config.kv_lora_rank,
            q_latent=config.q_lora_rank or 0,
            tie_word_embeddings=wrapped.lm_head.weight is weight,
            **experts,
        )

    @classmethod
    def kinds(cls) -> dict[str, tuple[Point, ...]]:
        """The rows of each kind of block."""
        return {str(kind): rows for kind, rows in cls.rows_by_kind.items()}

    def rows_for(self, layer: int) -> tuple[Point, ...]:
        return self.rows_by_kind[self.cfg.kinds[layer]]

    @staticmethod
    def kind_of(layer: Wrapped) -> LayerKind:
        """`model.kind_of(model.wrapped.model.layers[0])`: what a wrapped layer is, by the parts it has."""
        mixing = "delta net" if "forget_gate" in layer.self_attn._modules else "attention"
        if layer.self_attn._modules.get("q_a_proj") is not None:
            mixing = "attention of narrow queries"
        return LayerKind(mixing, "experts" if "experts" in layer.mlp._modules else "MLP")

    def make_block(self, layer: int) -> Block:
        w, cfg, kind, rows = self.wrapped.model.layers[layer], self.cfg, self.cfg.kinds[layer], self.rows_for(layer)
        ln1 = Norm(w.input_layernorm, rows_of("ln1", rows), cfg.eps)
        ln2 = Norm(w.post_attention_layernorm, rows_of("ln2", rows), cfg.eps)
        of_mlp: Any = rows_of("mlp", rows)
        if kind.channels == "experts":
            groups = (cfg.n_expert_groups, cfg.n_groups_per_token)
            routing = sigmoid_top(
                cfg.n_experts_per_token, w.mlp.gate, *groups, cfg.normalised_weights, cfg.weights_scale
            )
            shared = GatedMlp(w.mlp.shared_experts, rows_of("shared", of_mlp), SILU)
            mlp = Sub("mlp", Experts(w.mlp, of_mlp, SILU, routing, shared=shared), ln2, ln="ln2")
        else:
            mlp = Sub("mlp", GatedMlp(w.mlp, of_mlp, SILU), ln2, ln="ln2")
        if kind.mixing.startswith("delta net"):
            return Block(
                w, rows, Sub("mixer", self._make_delta_net(w.self_attn, rows_of("mixer", rows), layer), ln1), mlp
            )
        points, heads, narrow = rows_of("attn", rows), w.self_attn, "narrow" in kind.mixing
        norms = (
            Norm(heads.q_a_layernorm, rows_of("q_norm", points), EPS) if narrow else None,
            Norm(heads.kv_a_layernorm, rows_of("kv_norm", points), EPS),
        )
        attn = self._make_attention(heads, points, layer, narrow, norms)
        return Block(w, rows, Sub("mixer", attn, ln1, place="attn"), mlp)  # where TransformerLens has attention

    def _make_delta_net(self, weights: Wrapped, points: tuple[Point, ...], layer: int) -> DeltaMixer:
        """The mixer of a delta net over its weights, with these points."""
        return KimiDeltaMixer(weights, points, layer, DELTA, self.cfg.sizes, self.cfg.eps)

    def _make_attention(
        self, weights: Wrapped, points: tuple[Point, ...], layer: int, narrow: bool, norms: tuple[Norm | None, Norm]
    ) -> LatentAttention:
        """The same of a layer of attention, of narrow queries or not."""
        return LatentAttention(weights, points, layer, LATENT[narrow], self.cfg.d_head, norms)

    def make_final_norm(self, rows: tuple[Point, ...]) -> Norm:
        return Norm(self.wrapped.model.norm, rows, self.cfg.eps)

    @property
    def embedding(self) -> Any:
        return self.wrapped.model.embed_tokens

    @property
    def unembedding(self) -> Any:
        return self.wrapped.lm_head


HOOKED = HookedKimiLinear

"""Qwen3-Next and Qwen3.5: gated delta nets (Yang et al. 2024, arXiv 2412.06464), gated attention, MLPs or experts.

b batch, l pos, d d_model, h head (of values), v value (of a head), c channel = (head value), g group (a key head, shared by
heads in a row), n state (a key head's numbers), K taps of the conv; unit(x) = x / sqrt(sum x^2 + 1e-6).

    delta net    q, k, x, z, b, a = in_proj(n)           q, k, x through one causal conv, with SiLU; q, k unit; u of x
                 beta = sigmoid(b)                       log decay = -exp(A_log) softplus(a + dt_bias), numbers a head
                 state_t = decay_t (state_{t-1} - beta_t (state_{t-1} k_t) k_t^T) + beta_t u_t k_t^T
                 scan_t  = state_t q_t / sqrt(n)         out = out_proj(RMSNorm(scan) SiLU(z)), the norm head by head
    attention    softmax attention over all positions, q and k normed and partly rotary, a sigmoid gate before o_proj
    channel mix  down(SiLU(gate(m)) up(m)), or experts and a shared expert

What a step removes is erase (probe . state): erase = beta k, and probe = decay k, because it looks at the decayed state.

Wraps transformers' Qwen3NextForCausalLM, and of Qwen3.5 and Qwen3.5-MoE the language model, alone (Qwen3_5ForCausalLM) or inside
a model of images and text (Qwen3_5ForConditionalGeneration), whose images are not read. The two generations differ in how the
input projections are laid out. What a checkpoint holds for predicting several tokens (mtp.*) is not read, as in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatedlens.address.point import Point
from gatedlens.compat.names.qwen3_next import ALIASES
from gatedlens.errors import CheckpointError
from gatedlens.formats.qwen3_next import TINY
from gatedlens.formats.transformers_config import QWEN3_NEXT
from gatedlens.model import fields
from gatedlens.model.base import Wrapped
from gatedlens.model.block import Block, Sub
from gatedlens.model.config import HookedConfig
from gatedlens.model.hookpoint import rows_of
from gatedlens.model.norm import GemmaNorm, Norm, eps_of, norm_rows
from gatedlens.model.path import PathMixer, Stage, Streams
from gatedlens.model.run import Run
from gatedlens.model.stages import Conv, Gate, GroupNorm, Named, Scan, SiLU
from gatedlens.model.state import Carried
from gatedlens.parts.activation import SILU, wide_silu
from gatedlens.parts.attention import CARRIED_WINDOW, Attention, AttentionKind
from gatedlens.parts.delta_rule import delta_terms, unit
from gatedlens.parts.experts import EXPERTS_OUT, Experts, experts_rows, softmax_top
from gatedlens.parts.glu import GatedMlp, gated_mlp_rows
from gatedlens.parts.layer_kind import LayerKind, rows_by_kind
from gatedlens.parts.positioned import NEXT_POSITION, PositionedModel
from gatedlens.recurrence.scanning import at_least_float32
from gatedlens.recurrence.terms import Terms

GDN = "Gated DeltaNet, arXiv 2412.06464"
RULE = f"{GDN}, eq. 10"
BLOCK = f"{GDN}, fig. 1"
RMSNORM = "RMSNorm, arXiv 1910.07467"
UIA = "UIA, arXiv 2405.16504"

TAPS = "conv1d.weight[tap] * {}[pos - (tap.size - 1) + tap], 0 from another document"
MIXER_ROWS = (
    Point("hook_q_pre", "batch pos group state", "in_proj(ln1.out), the query of each key head", BLOCK),
    Point("hook_k_pre", "batch pos group state", "in_proj(ln1.out), the key of each key head", BLOCK),
    Point("hook_x", "batch pos channel", "in_proj(ln1.out), the values of the heads", BLOCK),
    Point("hook_gate_pre", "batch pos channel", "in_proj(ln1.out), z of the heads", BLOCK),
    Point("hook_beta_pre", "batch pos head", "in_proj(ln1.out), b of the heads", BLOCK),
    Point("hook_dt_pre", "batch pos head", "in_proj(ln1.out), a of the heads, + dt_bias", BLOCK),
    Point("hook_q_conv_taps", "batch pos group state tap", TAPS.format("q_pre"), BLOCK, True),
    Point("hook_k_conv_taps", "batch pos group state tap", TAPS.format("k_pre"), BLOCK, True),
    Point("hook_conv_taps", "batch pos channel tap", TAPS.format("x"), f"{UIA}, eq. 9", True),
    Point("hook_q_conv", "batch pos group state", "sum over tap of q_conv_taps", BLOCK),
    Point("hook_k_conv", "batch pos group state", "sum over tap of k_conv_taps", BLOCK),
    Point("hook_conv", "batch pos channel", "sum over tap of conv_taps", BLOCK),
    Point("hook_u", "batch pos channel", "SiLU(conv)", BLOCK),
    Point("hook_q", "batch pos group state", "SiLU(q_conv) / sqrt(sum over state of SiLU(q_conv)^2 + 1e-6)", BLOCK),
    Point("hook_k", "batch pos group state", "SiLU(k_conv) / sqrt(sum over state of SiLU(k_conv)^2 + 1e-6)", BLOCK),
    Point("hook_beta", "batch pos head", "sigmoid(beta_pre)", RULE),
    Point("hook_dt", "batch pos head", "softplus(dt_pre)", f"{GDN}, sec. 3.4"),
    Point("hook_log_decay", "batch pos head", "-exp(A_log) * dt", f"{GDN}, sec. 3.4"),
    Point("hook_reset", "batch pos one", "1 where a document begins (position 0 of position_ids), else 0", RULE),
    Point("hook_state_start", "batch head value state", "state before the first position (zero without one)", RULE, True),
    Point("hook_decay", "batch pos head value state", "exp(log_decay) * (1 - reset), one for all of a head", RULE, True),
    Point("hook_write", "batch pos head value state", "u * beta * k", RULE, True),
    Point("hook_erase", "batch pos head value state", "beta * k, the same for each value", RULE, True),
    Point("hook_probe", "batch pos head state", "exp(log_decay) * (1 - reset) * k", RULE, True),
    Point(
        "hook_state",
        "batch pos head value state",
        "decay * state[pos - 1] - erase * (sum over state of probe * state[pos - 1]) + write",
        RULE,
        True,
    ),
    Point("hook_scan", "batch pos channel", "sum over state of q * state / sqrt(state.size)", RULE),
    Point("hook_y", "batch pos channel", "scan (no skip)", BLOCK),
    Point("hook_scale", "batch pos head", "sqrt(mean over the head's channels of y^2 + eps)", RMSNORM),
    Point("hook_normed", "batch pos channel", "norm.weight * y / scale, one weight for all heads", RMSNORM),
    Point("hook_gate", "batch pos channel", "SiLU(gate_pre)", BLOCK),
    Point("hook_gated", "batch pos channel", "normed * gate", BLOCK),
)  # fmt: skip

QWEN = "Qwen3-Next"
NORMED = "(1 + w) * normalized"
ATTENTION = AttentionKind(gated=True, normed=NORMED, head="q_head")
WEIGHTS = "softmax over expert of router, the k largest, divided by their sum (if the config says so)"
MIXING = {
    "delta net": ("mixer", MIXER_ROWS, "out_proj(gated)"),
    "attention": ("attn", ATTENTION.rows(f"{QWEN}, gated attention"), "o_proj(gated)"),
}
CHANNEL_MIXING = {
    "MLP": (gated_mlp_rows(SILU.word), "down_proj(post)"),
    "experts": (experts_rows(SILU.word, WEIGHTS), EXPERTS_OUT),
}


def kind_of(layer: Wrapped) -> LayerKind:
    """What a wrapped layer is, by the parts it has: configs name it differently from one transformers to the next."""
    attends, chooses = "self_attn" in layer._modules, "experts" in layer.mlp._modules
    return LayerKind("attention" if attends else "delta net", "experts" if chooses else "MLP")


ROWS = rows_by_kind(MIXING, CHANNEL_MIXING, NORMED)


# -- the gated delta net --------------------------------------------------------------------------------------------


class Projected(NamedTuple):
    """What a gated delta net reads off the stream."""

    q: Float[Tensor, "batch pos group state"]
    k: Float[Tensor, "batch pos group state"]
    x: Float[Tensor, "batch pos channel"]
    z: Float[Tensor, "batch pos channel"]
    b: Float[Tensor, "batch pos head"]
    a: Float[Tensor, "batch pos head"]


class GatedDeltaMixer(PathMixer):
    """out = out_proj(gated), every intermediate a point; `projected` says how the input projections are laid out.

    An edit of hook_log_decay moves the probe with the decay. hook_decay and hook_probe stand alone: an edit of one leaves the
    other as it is.
    """

    selection = ("q", "k", "beta", "log_decay")

    def __init__(self, weights: Any, rows: tuple[Point, ...], layer: int, cfg: Qwen3NextConfig):
        super().__init__(weights, rows, layer)
        self.cfg = cfg
        self.norm_eps = eps_of(weights.norm, cfg.eps)

    @property
    def heads(self) -> int:
        return self.cfg.n_value_heads

    @property
    def sizes(self) -> Mapping[str, int]:  # type: ignore[override]
        """Of the streams that go through the convolution."""
        keys = self.cfg.n_key_heads * self.cfg.d_state
        return {"q": keys, "k": keys, "x": self.cfg.d_inner}

    @property
    def path(self) -> tuple[Stage, ...]:  # type: ignore[override]
        norm = GroupNorm(self.heads, self.norm_eps, out="normed")
        return Conv("conv1d", ("q", "k", "x")), SiLU(("q", "k")), Scan(), Named("y"), norm, Gate(wide_silu)

    def projected(self, n: Float[Tensor, "batch pos d_model"]) -> Projected:
        """What the input projections give."""
        raise NotImplementedError

    def project(self, n: Float[Tensor, "batch pos d_model"], run: Run) -> Streams:
        pad, given = run.padding, self.projected(n)
        return {
            "q": pad.zero(self.hook_q_pre(pad.zero(given.q))),
            "k": pad.zero(self.hook_k_pre(pad.zero(given.k))),
            "x": self.hook_x(pad.zero(given.x)),
            "gate_pre": self.hook_gate_pre(given.z),
            "beta_pre": self.hook_beta_pre(given.b),
            "dt_pre": self.hook_dt_pre(at_least_float32(given.a) + self.weights.dt_bias),
        }

    def select(self, u: Float[Tensor, "batch pos channel"], streams: Streams, run: Run) -> None:
        zero = run.padding.zero
        streams["q"] = self.hook_q(unit(streams["q"]))
        # k, beta and log decay are 0 at a masked position: it writes and erases nothing, and the state passes unchanged
        streams["k"] = zero(self.hook_k(unit(streams["k"])))
        streams["beta"] = zero(self.hook_beta(zero(torch.sigmoid(streams["beta_pre"]))))
        dt = self.hook_dt(zero(F.softplus(streams["dt_pre"])))
        rate = torch.exp(at_least_float32(self.weights.A_log))
        streams["log_decay"] = zero(self.hook_log_decay(zero(-rate * dt)))

    def terms(  # type: ignore[override]
        self,
        q: Float[Tensor, "batch pos group state"],
        k: Float[Tensor, "batch pos group state"],
        beta: Float[Tensor, "batch pos head"],
        log_decay: Float[Tensor, "batch pos head"],
    ) -> Terms:
        return delta_terms(q, k, beta, log_decay.unsqueeze(-1))

    def output_weights(self) -> tuple[Float[Tensor, "d_model channel"], Float[Tensor, " d_model"] | None]:
        return self.weights.out_proj.weight, self.weights.out_proj.bias


class MixerByKeyHead(GatedDeltaMixer):
    """Qwen3-Next's: in_proj_qkvz and in_proj_ba are laid out key head by key head, each with what its heads have."""

    def projected(self, n: Float[Tensor, "batch pos d_model"]) -> Projected:
        w, cfg = self.weights, self.cfg
        values = cfg.d_inner // cfg.n_key_heads
        qkvz = F.linear(n, w.in_proj_qkvz.weight, w.in_proj_qkvz.bias).unflatten(-1, (cfg.n_key_heads, -1))
        q, k, x, z = qkvz.split([cfg.d_state, cfg.d_state, values, values], dim=-1)
        b, a = F.linear(n, w.in_proj_ba.weight, w.in_proj_ba.bias).unflatten(-1, (cfg.n_key_heads, -1)).chunk(2, dim=-1)
        return Projected(q, k, x.flatten(2), z.flatten(2), b.flatten(2), a.flatten(2))


class MixerSideBySide(GatedDeltaMixer):
    """Qwen3.5's: in_proj_qkv holds all queries, all keys, all values; z, b and a have projections of their own."""

    def projected(self, n: Float[Tensor, "batch pos d_model"]) -> Projected:
        w, keys = self.weights, (self.cfg.n_key_heads, self.cfg.d_state)
        q, k, x = F.linear(n, w.in_proj_qkv.weight, w.in_proj_qkv.bias).split(list(self.sizes.values()), dim=-1)
        z, b, a = (F.linear(n, p.weight, p.bias) for p in (w.in_proj_z, w.in_proj_b, w.in_proj_a))
        return Projected(q.unflatten(-1, keys), k.unflatten(-1, keys), x, z, b, a)


# -- the model ------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Qwen3NextConfig(HookedConfig):
    """cfg of Qwen3-Next and Qwen3.5. n_heads and d_head are the attention's; `kinds`: what each layer is.

    0 stands for the sizes of what a model has none of.
    """

    kinds: tuple[LayerKind, ...]
    n_value_heads: int
    n_key_heads: int
    d_state: int  # numbers of a key head
    d_inner: int  # channels: numbers of all value heads
    d_conv: int
    n_key_value_heads: int
    n_experts: int = 0
    n_experts_per_token: int = 0
    normalised_weights: bool = True  # of the experts that a token has chosen
    d_expert: int = 0
    d_shared: int = 0
    tie_word_embeddings: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        heads = {"channel": self.d_inner, "head": self.n_value_heads, "value": self.d_inner // self.n_value_heads}
        keys = {"group": self.n_key_heads, "state": self.d_state, "tap": self.d_conv}
        attention = {"q_head": self.n_heads, "kv_head": self.n_key_value_heads, "d_head": self.d_head}
        experts = {"expert": self.n_experts, "d_expert": self.d_expert, "d_shared": self.d_shared}
        return {**super().sizes, **heads, **keys, **attention, "d_mlp": self.d_mlp or 0, **experts}


class HookedQwen3Next(PositionedModel):
    """`HookedQwen3Next(Qwen3NextForCausalLM(...))`, or better `gl.wrap(...)`: Qwen3-Next, or Qwen3.5's language model, opened up.

    Heads (axis `head`) are those of the delta nets' values; the attention's are `q_head`. Padding on either side or inside a row,
    and documents packed in a row, are as if each row stood alone. (In transformers padding on the right is in the state that a
    call leaves, and so is padding inside a row.)
    """

    title = "Qwen3-Next"
    paper = "Yang, Kautz and Hatamizadeh, Gated Delta Networks: Improving Mamba2 with Delta Rule (arXiv 2412.06464)"
    reference = (
        "Qwen/Qwen3-Next-80B-A3B-Instruct",
        {
            "d_model": 2048, "channel": 4096, "head": 32, "value": 128, "group": 16, "state": 128, "tap": 4, "q_head": 16,
            "kv_head": 2, "d_head": 256, "d_mlp": 5120, "expert": 512, "d_expert": 512, "d_shared": 512,
        },
    )  # fmt: skip
    recurrence: ClassVar = {
        "decay": "exp(log_decay), [head]",
        "write": "u * beta * k, [head, value, state]; the heads of a group share k",
        "erase": "beta * k of what the probe finds, [head, state]",
        "probe": "exp(log_decay) * k: it looks at the decayed state",
        "read": "q / sqrt(state.size), [group, state]",
        "skip": "none",
        "conv": "causal depthwise conv over q, k and x, no bias",
        "activation before the scan": "SiLU: u = sigmoid(c) * c",
        "gate": "an RMSNorm of the scan head by head, then SiLU(gate_pre)",
    }
    attention_words: ClassVar = {
        "x": "x",
        "o": "gated",
        "gate": "gate * norm.weight / scale",
        "scan": "S[i, j] = q[i] / sqrt(state.size) . T[i] ... T[j + 1] beta[j] * k[j], j <= i, of each head, where "
        "T[t] = exp(log_decay[t]) * (1 - beta[t] * k[t] k[t]^T); 0 where a reset lies between, j < reset <= i",
        "skip": "none",
        "act": "sigmoid(conv): u = act * conv",
        "conv": "M[i, j] = conv1d.weight[K - 1 - (i - j)], 0 <= i - j < K taps, within a document",
        "r": "0; with a carried state what its conv tail and its scan state bring",
        "attention layers": ATTENTION.words,
    }
    wraps = (
        "Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM", "Qwen3_5ForConditionalGeneration",
        "Qwen3_5MoeForConditionalGeneration",
    )  # fmt: skip
    hub_types = ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")
    hub_fields = QWEN3_NEXT
    small = TINY
    block_points = tuple(
        {row.name: row for rows in ROWS.values() for row in rows}.values()
    )  # of all kinds; see rows_for
    final_points = norm_rows("ln_final", "blocks.-1.hook_resid_post", "the final norm", NORMED)
    aliases = ALIASES
    carried: ClassVar = {
        "scan": Carried("scan", "batch head value state"),
        "conv": Carried("conv", "batch tail conv_channel"),
        **CARRIED_WINDOW,
        **NEXT_POSITION,
    }
    cfg: Qwen3NextConfig

    @classmethod
    def describe(cls, wrapped: Wrapped, model_name: str) -> Qwen3NextConfig:
        """The cfg of a wrapped model, from the shapes of its parameters and the few numbers that shapes do not tell."""
        fields.check(wrapped.config.to_dict(), cls.hub_fields, f"{model_name}'s config")
        config, model = wrapped.config.get_text_config(), text_model(wrapped)
        layers = model.layers
        if len(layers) == 0:
            raise CheckpointError(f"{model_name} has no layers.")
        if config.hidden_act not in ("silu", "swish"):
            raise CheckpointError(f"{model_name} has hidden_act={config.hidden_act!r}; supported is 'silu'.")
        rope = vars(model.rotary_emb).get("rope_type", "default")
        if rope in ("dynamic", "longrope"):
            raise CheckpointError(
                f"{model_name} has rope_type={rope!r}, frequencies that go by length: it is not supported."
            )
        weight, kinds = model.embed_tokens.weight, tuple(map(kind_of, layers))
        mlps = {kind.channels: layer.mlp for kind, layer in zip(kinds, layers, strict=True)}
        experts: dict[str, Any] = {}
        if "experts" in mlps:
            chosen = mlps["experts"]
            experts = {
                "n_experts": chosen.experts.down_proj.shape[0],
                "n_experts_per_token": config.num_experts_per_tok,
                "normalised_weights": config.to_dict().get("norm_topk_prob", True),  # always in Qwen3.5
                "d_expert": chosen.experts.down_proj.shape[2],
                "d_shared": chosen.shared_expert.down_proj.weight.shape[1],
            }
        return Qwen3NextConfig(
            model_name=model_name,
            architecture="qwen3_next",
            n_layers=len(layers),
            d_model=weight.shape[1],
            d_vocab=weight.shape[0],
            n_heads=config.num_attention_heads,
            d_head=config.head_dim,
            d_mlp=mlps["MLP"].up_proj.weight.shape[0] if "MLP" in mlps else None,
            act_fn=config.hidden_act,
            attn_only=False,
            positional_embedding_type="rotary",
            eps=float(config.rms_norm_eps),
            dtype=weight.dtype,
            device=str(weight.device),
            original_architecture=type(wrapped).__name__,
            kinds=kinds,
            n_value_heads=config.linear_num_value_heads,
            n_key_heads=config.linear_num_key_heads,
            d_state=config.linear_key_head_dim,
            d_inner=config.linear_num_value_heads * config.linear_value_head_dim,
            d_conv=config.linear_conv_kernel_dim,
            n_key_value_heads=config.num_key_value_heads,
            tie_word_embeddings=wrapped.lm_head.weight is weight,
            **experts,
        )

    @classmethod
    def kinds(cls) -> dict[str, tuple[Point, ...]]:
        """The rows of each kind of block."""
        return {str(kind): rows for kind, rows in ROWS.items()}

    def rows_for(self, layer: int) -> tuple[Point, ...]:
        return ROWS[self.cfg.kinds[layer]]

    def make_block(self, layer: int) -> Block:
        model, cfg, kind, rows = text_model(self.wrapped), self.cfg, self.cfg.kinds[layer], self.rows_for(layer)
        w = model.layers[layer]
        ln1 = GemmaNorm(w.input_layernorm, rows_of("ln1", rows), cfg.eps)
        ln2 = GemmaNorm(w.post_attention_layernorm, rows_of("ln2", rows), cfg.eps)
        if kind.channels == "experts":
            routing = softmax_top(cfg.n_experts_per_token, cfg.normalised_weights)
            mlp = Sub("mlp", Experts(w.mlp, rows_of("mlp", rows), SILU, routing), ln2, ln="ln2")
        else:
            mlp = Sub("mlp", GatedMlp(w.mlp, rows_of("mlp", rows), SILU), ln2, ln="ln2")
        if kind.mixing == "delta net":
            laid_out = MixerByKeyHead if "in_proj_qkvz" in w.linear_attn._modules else MixerSideBySide
            return Block(w, rows, Sub("mixer", laid_out(w.linear_attn, rows_of("mixer", rows), layer, cfg), ln1), mlp)
        points, heads = rows_of("attn", rows), w.self_attn
        norms = (
            GemmaNorm(heads.q_norm, rows_of("q_norm", points), cfg.eps),
            GemmaNorm(heads.k_norm, rows_of("k_norm", points), cfg.eps),
        )
        attn = Attention(heads, points, layer, ATTENTION, heads.head_dim, None, model.rotary_emb, norms)
        return Block(w, rows, Sub("mixer", attn, ln1, place="attn"), mlp)  # where TransformerLens has attention

    def make_final_norm(self, rows: tuple[Point, ...]) -> Norm:
        return GemmaNorm(text_model(self.wrapped).norm, rows, self.cfg.eps)

    @property
    def embedding(self) -> Any:
        return text_model(self.wrapped).embed_tokens

    @property
    def unembedding(self) -> Any:
        return self.wrapped.lm_head


def text_model(wrapped: Wrapped) -> Any:
    """The layers with their embedding and final norm: all but the head, also of a model of images and text."""
    inner: nn.Module = wrapped.model
    return inner._modules.get("language_model", inner)


HOOKED = HookedQwen3Next

"""MiniMax (MiniMax-Text-01 and M1, arXiv 2501.08313): lightning attention, softmax attention in some layers, experts.

b batch, l pos, d d_model, h head, D head_dim, v value and n state (D numbers each, of a head), c channel = (head value).

    block        n = norm1(h)      h = alpha n + beta mixer(n)            the residual stream itself is normed
                 m = norm2(h)      h = alpha' m + beta' experts(m)
    lightning    q, k, u = SiLU(qkv_proj(n)), head by head; decay = exp(-slope), fixed
                 state_t = decay state_{t-1} + u_t k_t^T                  scan_t = state_t q_t, not divided by sqrt(n)
                 out = out_proj(sigmoid(output_gate(n)) RMSNorm(scan)), the norm over all channels together
    attention    softmax attention, rotary, over all positions or a window
    experts      the k largest of softmax(gate(m)), divided by their sum

The norm of the stream is a branch of its own (parts/stream_norm.py), beside what reads the normed stream:

    h += (alpha norm1(h) - h) + beta mixer(ln1(h)),  then  h += (alpha' norm2(h) - h) + beta' experts(ln2(h))

norm1 and ln1 are the same module of the wrapped model: an edit at `ln1` reaches the mixer alone, one at `norm1` the stream alone,
and one at `hook_resid_pre` both. `0_norm1_out` in a decomposition takes away what stood in the stream; what it puts in its place
is linear in that with the norm's scale held.

slope is the module's buffer slope_rate, which a checkpoint holds: 2^(-8 (h + 1) / H), times what the layer's depth leaves of it.
Wraps transformers' MiniMaxForCausalLM. (What that makes of slope_rate for blocks of a text, query_decay and the like, is not
read; router_jitter_noise, which is for training, is not added.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatedlens.address.point import Point
from gatedlens.compat.names.hybrid import ALIASES
from gatedlens.errors import CheckpointError
from gatedlens.formats.minimax import FIELDS, TINY
from gatedlens.model.base import Wrapped
from gatedlens.model.mixer import multiplied
from gatedlens.model.norm import eps_of
from gatedlens.model.path import Content, PathMixer, Streams
from gatedlens.model.run import Run
from gatedlens.model.stages import Gate, GroupNorm, Named, Scan, SiLU
from gatedlens.model.state import Carried
from gatedlens.parts.activation import SILU
from gatedlens.parts.attention import CARRIED_WINDOW, RMSNORM, Attention, AttentionKind, Multipliers
from gatedlens.parts.experts import EXPERTS_ALONE, Experts, experts_rows, softmax_top
from gatedlens.parts.hybrid import Branch, Family, HybridConfig, HybridModel, Site, points_of
from gatedlens.parts.positioned import NEXT_POSITION, PositionedModel
from gatedlens.parts.stream_norm import StreamNorm, stream_norm_rows
from gatedlens.recurrence.scanning import at_least_float32
from gatedlens.recurrence.terms import Terms

PAPER = "MiniMax-01, arXiv 2501.08313"
LIGHTNING = "Lightning Attention, arXiv 2405.17381"
NORM_EPS = 1e-6  # of the norm behind the scan, unless the module says another; the config says none
WINDOWED = {False: AttentionKind(head="q_head"), True: AttentionKind(windowed=True, head="q_head")}
WEIGHTS = "softmax over expert of router, the k largest, divided by their sum"
KEYS, STATE = "batch pos head state", "batch pos head value state"
MIXER_ROWS = (
    Point("hook_q_pre", KEYS, "qkv_proj(ln1.out), the query of each head", PAPER),
    Point("hook_k_pre", KEYS, "qkv_proj(ln1.out), the key of each head", PAPER),
    Point("hook_x", "batch pos channel", "qkv_proj(ln1.out), the value of each head", PAPER),
    Point("hook_gate_pre", "batch pos channel", "output_gate(ln1.out)", PAPER),
    Point("hook_u", "batch pos channel", "SiLU(x)", PAPER),
    Point("hook_q", KEYS, "SiLU(q_pre)", PAPER),
    Point("hook_k", KEYS, "SiLU(k_pre)", PAPER),
    Point("hook_log_decay", "batch pos head", "-slope_rate of the head", f"{LIGHTNING}, sec. 3"),
    Point("hook_reset", "batch pos one", "1 where a document begins (position 0 of position_ids), else 0", LIGHTNING),
    Point("hook_state_start", "batch head value state", "state before the first position (zero without one)", LIGHTNING, True),
    Point("hook_decay", STATE, "exp(log_decay) * (1 - reset), the same for each value", LIGHTNING, True),
    Point("hook_write", STATE, "u * k", LIGHTNING, True),
    Point("hook_state", STATE, "decay * state[pos - 1] + write", LIGHTNING, True),
    Point("hook_scan", "batch pos channel", "sum over state of q * state", LIGHTNING),
    Point("hook_y", "batch pos channel", "scan (no skip)", LIGHTNING),
    Point("hook_scale", "batch pos one", "sqrt(mean over channel of y^2 + eps)", RMSNORM),
    Point("hook_normed", "batch pos channel", "w * y / scale, w of the norm", RMSNORM),
    Point("hook_gate", "batch pos channel", "sigmoid(gate_pre)", PAPER),
    Point("hook_gated", "batch pos channel", "normed * gate", PAPER),
)  # fmt: skip


class LightningMixer(PathMixer):
    """Lightning attention: linear attention with a fixed decay of each head. beta: what its output is multiplied by."""

    selection = ("q", "k", "log_decay")

    def __init__(self, weights: Any, rows: tuple[Point, ...], layer: int, heads: int, beta: float):
        super().__init__(weights, rows, layer)
        self.n_heads, self.beta = heads, beta
        norm = GroupNorm(1, eps_of(weights.norm, NORM_EPS), out="normed")
        self.path = (SiLU(("q", "k"), of="x"), Scan(), Named("y"), norm, Gate(torch.sigmoid))

    @property
    def heads(self) -> int:
        return self.n_heads

    def project(self, n: Float[Tensor, "batch pos d_model"], run: Run) -> Streams:
        zero = run.padding.zero
        qkv = zero(F.linear(n, self.weights.qkv_proj.weight)).unflatten(-1, (self.heads, 3, -1))
        # In memory of their own: a copy that a hook gets has the same layout then, and so the same rounding behind it.
        q, k, x = (one.contiguous() for one in qkv.unbind(-2))
        q, k, x = zero(self.hook_q_pre(q)), zero(self.hook_k_pre(k)), self.hook_x(x.flatten(2))
        return {"q": q, "k": k, "x": x, "gate_pre": self.hook_gate_pre(F.linear(n, self.weights.output_gate.weight))}

    def select(self, u: Content, streams: Streams, run: Run) -> None:
        zero = run.padding.zero  # k and log decay 0 at padding: nothing is written, and the state passes unchanged
        streams["q"], streams["k"] = self.hook_q(streams["q"]), zero(self.hook_k(streams["k"]))
        slope = at_least_float32(self.weights.slope_rate).flatten()
        log_decay = (-slope).to(at_least_float32(u)).expand(*u.shape[:2], self.heads)
        streams["log_decay"] = zero(self.hook_log_decay(zero(log_decay)))

    def terms(  # type: ignore[override]
        self,
        q: Float[Tensor, "batch pos head state"],
        k: Float[Tensor, "batch pos head state"],
        log_decay: Float[Tensor, "batch pos head"],
    ) -> Terms:
        return Terms(log_decay.unsqueeze(-1), key=k, read=q)

    def forward(self, n: Float[Tensor, "batch pos d_model"], run: Run) -> Float[Tensor, "batch pos d_model"]:
        return multiplied(F.linear(self.walk(self.project(n, run), run), self.weights.out_proj.weight), self.beta)

    def output_weights(self) -> tuple[Float[Tensor, "d_model channel"], Float[Tensor, " d_model"] | None]:
        return multiplied(self.weights.out_proj.weight, self.beta), None

    def named_weights(self) -> dict[str, Tensor]:
        w = self.weights
        each = w.qkv_proj.weight.unflatten(0, (self.heads, 3, -1)).unbind(1)
        read = {f"W_{word}": one.flatten(0, 1).mT for word, one in zip(("Q", "K", "in"), each, strict=True)}
        return {**read, "W_gate": w.output_gate.weight.mT, **super().named_weights()}


# -- what stands in a layer -----------------------------------------------------------------------------------------


def is_lightning(layer: Any) -> bool:
    """Whether a wrapped layer mixes tokens by lightning attention, by the parts it has."""
    return "qkv_proj" in layer.self_attn._modules


def norm_of_stream(kept: Callable[[Any], float]) -> Callable[[Site], StreamNorm]:
    """What makes a norm of the stream; kept(config): what the normed stream is multiplied by."""
    return lambda site: StreamNorm(site.weights, site.rows, site.config.rms_norm_eps, float(kept(site.config)))


def lightning(site: Site) -> LightningMixer:
    config = site.config
    return LightningMixer(
        site.weights, site.rows, site.layer, config.num_attention_heads, float(config.linear_attn_beta_factor)
    )


def attention(site: Site) -> Attention:
    w, config, window = site.weights, site.config, site.config.sliding_window
    kind, beta = WINDOWED[window is not None], Multipliers(output=float(config.full_attn_beta_factor))
    return Attention(
        w, site.rows, site.layer, kind, w.head_dim, window, site.wrapped.model.rotary_emb, multipliers=beta
    )


def experts(site: Site) -> Experts:
    return Experts(site.weights, site.rows, SILU, softmax_top(site.config.num_experts_per_tok, normalised=True))


def kind_of(layer: Any, config: Any) -> str:
    return (
        "lightning" if is_lightning(layer) else "attention" if config.sliding_window is None else "windowed attention"
    )


def told(config: Any) -> Mapping[str, Any]:
    chosen = {"n_experts": config.num_local_experts, "n_experts_per_token": config.num_experts_per_tok}
    return {**chosen, "d_expert": config.intermediate_size, "window": config.sliding_window}


def _norm(name: str, kept: Callable[[Any], float], alpha: str, weights: str) -> Branch:
    out = f"{alpha} * {name}.out - {name}_in"
    return Branch(name, stream_norm_rows(name), out, norm_of_stream(kept), weights, None)


def _layer(kept: Callable[[Any], float], *mixing: Branch) -> tuple[tuple[Branch, ...], ...]:
    ends = f"mlp_beta * ({EXPERTS_ALONE})"
    mlp = Branch(
        "mlp", experts_rows(SILU.word, WEIGHTS), ends, experts, "mlp", "post_attention_layernorm", "ln2",
        scale=lambda config: float(config.mlp_beta_factor),
    )  # fmt: skip
    kept_by_mlp = _norm("norm2", lambda config: config.mlp_alpha_factor, "mlp_alpha", "post_attention_layernorm")
    return (_norm("norm1", kept, "attn_alpha", "input_layernorm"), *mixing), (kept_by_mlp, mlp)


def _attention(windowed: bool) -> tuple[tuple[Branch, ...], ...]:
    rows, out = WINDOWED[windowed].rows("Transformer, arXiv 1706.03762"), "attn_beta * o_proj(z)"
    mixing = Branch("mixer", rows, out, attention, "self_attn", "input_layernorm", place="attn")
    return _layer(lambda config: config.full_attn_alpha_factor, mixing)


MINIMAX = Family(
    "MiniMax",
    "MiniMaxForCausalLM",
    {
        "lightning": _layer(
            lambda config: config.linear_attn_alpha_factor,
            Branch("mixer", MIXER_ROWS, "attn_beta * out_proj(gated)", lightning, "self_attn", "input_layernorm"),
        ),
        "attention": _attention(windowed=False),
        "windowed attention": _attention(windowed=True),
    },
    kind_of,
    told,
    final_norm="norm",
)
FAMILIES = {"minimax": MINIMAX}


# -- the model ------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class MiniMaxConfig(HybridConfig):
    """cfg of MiniMax. n_heads and d_head are those of every layer; window: of the layers of attention, None: all positions."""

    head = "q_head"
    window: int | None = None

    @property
    def sizes(self) -> dict[str, int]:
        heads = {
            "channel": self.n_heads * self.d_head,
            "head": self.n_heads,
            "value": self.d_head,
            "state": self.d_head,
        }
        return {**super().sizes, **heads}


class HookedMiniMax(HybridModel):
    """`HookedMiniMax(MiniMaxForCausalLM(...))`, or better `gl.wrap(...)`: MiniMax-Text-01 or M1 opened up.

    Heads (axis `head`) are those of the lightning attention; the attention's are `q_head`. The norms of the residual stream are
    branches of their own, `hook_norm1_out` and `hook_norm2_out`: the file says how. Padding on either side or inside a row, and
    documents packed in a row, are as if each row stood alone. (In transformers padding on the right is in the state that a call
    leaves, and so is padding inside a row.)
    """

    title = "MiniMax"
    paper = "MiniMax, MiniMax-01: Scaling Foundation Models with Lightning Attention (arXiv 2501.08313)"
    reference = (
        "MiniMaxAI/MiniMax-Text-01-hf",
        {
            "d_model": 6144, "channel": 8192, "head": 64, "value": 128, "state": 128, "q_head": 64, "kv_head": 8, "d_head": 128,
            "expert": 32, "d_expert": 9216,
        },
    )  # fmt: skip
    recurrence: ClassVar = {
        "decay": "exp(log_decay) = exp(-slope_rate), fixed, of each head",
        "write": "u * k, [head, value, state]",
        "read": "q, [head, state]",
        "skip": "none",
        "conv": "none",
        "activation before the scan": "SiLU: u = sigmoid(x) * x",
        "gate": "an RMSNorm of the scan over all channels, then sigmoid(gate_pre)",
    }
    attention_words: ClassVar = {
        "x": "x",
        "o": "gated",
        "gate": "gate * w / scale",
        "scan": "S[i, j] = q[i] . k[j] exp(log_decay[j + 1] + ... + log_decay[i]), j <= i, of each head; 0 where a reset lies "
        "between, j < reset <= i",
        "skip": "none",
        "act": "sigmoid(x): u = act * x",
        "conv": "none",
        "r": "0; with a carried state what that brings",
        "attention layers": WINDOWED[False].words,
    }
    first_points = PositionedModel.first_points
    last_points = PositionedModel.last_points
    families = FAMILIES
    config_class = MiniMaxConfig
    wraps = ("MiniMaxForCausalLM",)
    hub_types = tuple(FAMILIES)
    hub_fields = FIELDS
    hub_renames: ClassVar = {".block_sparse_moe.": ".mlp."}
    small = TINY
    block_points = points_of(FAMILIES)
    aliases = ALIASES
    carried: ClassVar = {"scan": Carried("scan", "batch head value state"), **CARRIED_WINDOW, **NEXT_POSITION}
    cfg: MiniMaxConfig

    @classmethod
    def sizes_of_mixers(cls, wrapped: Wrapped, model_name: str) -> dict[str, Any]:
        """`HookedMiniMax.sizes_of_mixers(wrapped, "mine")`: nothing, for the heads of its attention say them; CheckpointError
        where a layer has others, or experts are fewer than a token takes."""
        config = wrapped.config
        heads, each = config.num_attention_heads, config.head_dim or config.hidden_size // config.num_attention_heads
        for number, layer in enumerate(wrapped.model.layers):
            if not is_lightning(layer):
                continue
            mixer = layer.self_attn
            held = (mixer.qkv_proj.weight.shape[0], mixer.slope_rate.numel())
            if held != (3 * heads * each, heads):
                raise CheckpointError(
                    f"Layer {number} of {model_name} has {held[0]} numbers of queries, keys and values, and {held[1]} slopes; "
                    f"its config says {3 * heads * each} and {heads}."
                )
        if config.num_experts_per_tok > config.num_local_experts:
            raise CheckpointError(
                f"{model_name} has num_experts_per_tok={config.num_experts_per_tok} of {config.num_local_experts} experts: no "
                "token can take so many."
            )
        return {}


HOOKED = HookedMiniMax

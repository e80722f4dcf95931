"""Griffin (De et al. 2024, arXiv 2402.19427): gated linear recurrences and local attention; Hawk: no attention.

b batch, l pos, d d_model, c channel (lru_width), K taps of the causal conv, h head, k key position, W the attention
window; a decay, i input gate, r recurrence gate, m multiplier (in the mixer) or the MLP's input (elsewhere). A document
is a run of tokens whose first has position 0: nothing passes from one document into the next.

    recurrent    x, y = linear_x(n), linear_y(n)             u = conv1d(x) + bias          gate = gelu(y)
                 i, r = sigmoid(block-diagonal(u))           log a = -8 r softplus(param)  m = sqrt(1 - a^2)
                 state_t = a_t state_{t-1} + m_t i_t u_t     out = linear_out(state gate)
    attention    q, k, v = proj(n), half of each head rotary; softmax(q k / sqrt(d_head)) v over the last W tokens
    channel mix  down(gelu(gate(m)) up(m))

Wraps transformers' RecurrentGemmaForCausalLM; formats/recurrentgemma.py reads the original checkpoints' layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import Function

from gatedlens.address.point import Point, block_rows
from gatedlens.compat.names.griffin import ALIASES
from gatedlens.errors import CheckpointError
from gatedlens.formats.recurrentgemma import TINY, RecurrentGemma
from gatedlens.formats.transformers_config import RECURRENT_GEMMA
from gatedlens.model import fields
from gatedlens.model.base import Wrapped
from gatedlens.model.block import Block, Sub, SubRows, residual_rows
from gatedlens.model.config import HookedConfig
from gatedlens.model.hookpoint import rows_of
from gatedlens.model.norm import GemmaNorm, Norm, norm_rows
from gatedlens.model.path import PathMixer, Streams
from gatedlens.model.run import DocumentRun, Run
from gatedlens.model.stages import ChannelScan, Conv, Gate, Named, Real
from gatedlens.model.state import CARRIED
from gatedlens.model.weights import linear
from gatedlens.parts.activation import GELU_TANH
from gatedlens.parts.attention import CARRIED_WINDOW, Attention, AttentionKind
from gatedlens.parts.glu import GatedMlp, gated_mlp_rows
from gatedlens.parts.positioned import NEXT_POSITION, PositionedModel
from gatedlens.recurrence.channels import ChannelTerms
from gatedlens.recurrence.scanning import at_least_float32
from gatedlens.recurrence.transforms import of_one_number, transformed

PAPER = "Griffin, arXiv 2402.19427"
UIA = "UIA, arXiv 2405.16504"

TAPS = "conv_1d.weight[tap] * x[pos - (tap.size - 1) + tap], 0 from another document"
I_GATE = "sigmoid(u @ input_gate_weight + input_gate_bias), by head"
R_GATE = "sigmoid(u @ recurrent_gate_weight + recurrent_gate_bias), by head"
LOG_A = "-8 * recurrence_gate * softplus(recurrent_param)"
MULTIPLIER = "reset + (1 - reset) * sqrt(max(1 - exp(2 * log_decay), 0))"
MIXER_ROWS = (
    Point("hook_x", "batch pos channel", "linear_x(ln1.out)", f"{PAPER}, fig. 2c"),
    Point("hook_gate_pre", "batch pos channel", "linear_y(ln1.out)", f"{PAPER}, fig. 2c"),
    Point("hook_conv_taps", "batch pos channel tap", TAPS, f"{UIA}, eq. 9", True),
    Point("hook_conv", "batch pos channel", "sum over tap of conv_taps + conv_1d.bias", f"{PAPER}, fig. 2c"),
    Point("hook_u", "batch pos channel", "conv", f"{PAPER}, fig. 2c"),
    Point("hook_input_gate", "batch pos channel", I_GATE, f"{PAPER}, eq. 2"),
    Point("hook_recurrence_gate", "batch pos channel", R_GATE, f"{PAPER}, eq. 1"),
    Point("hook_log_decay", "batch pos channel", LOG_A, f"{PAPER}, app. A"),
    Point("hook_reset", "batch pos one", "1 where a document begins (position 0), else 0", f"{PAPER}, app. A"),
    Point("hook_multiplier", "batch pos channel", MULTIPLIER, f"{PAPER}, eq. 4"),
    Point("hook_state_start", "batch channel", "state before the first position", f"{PAPER}, eq. 4", True),
    Point("hook_decay", "batch pos channel", "exp(log_decay) * (1 - reset)", f"{PAPER}, eq. 3", True),
    Point("hook_write", "batch pos channel", "multiplier * input_gate * u", f"{PAPER}, eq. 4", True),
    Point("hook_state", "batch pos channel", "decay * state[pos - 1] + write", f"{PAPER}, eq. 4", True),
    Point("hook_scan", "batch pos channel", "state", f"{PAPER}, eq. 4"),
    Point("hook_y", "batch pos channel", "scan (no skip)", f"{PAPER}, fig. 2c"),
    Point("hook_gate", "batch pos channel", "gelu_tanh(gate_pre)", f"{PAPER}, fig. 2c"),
    Point("hook_gated", "batch pos channel", "y * gate", f"{PAPER}, fig. 2c"),
)  # fmt: skip

LOCAL = f"{PAPER}, sec. 2.3"
LOCAL_ATTENTION = AttentionKind(windowed=True)
ATTENTION_ROWS = LOCAL_ATTENTION.rows(LOCAL)

MLP_ROWS = gated_mlp_rows(GELU_TANH.word, f"{PAPER}, fig. 2b")

RMSNORM = "RMSNorm, arXiv 1910.07467"
NORMED = "(1 + w) * normalized"


def _rows(part: str, rows: tuple[Point, ...], out: str) -> tuple[Point, ...]:
    """The rows of a block whose token mixing stands under `part`."""
    ln1, ln2 = norm_rows("ln1", "mixer_in", RMSNORM, NORMED), norm_rows("ln2", "mlp_in", RMSNORM, NORMED)
    mixer = SubRows("mixer", block_rows(part, rows), out, ln1)
    return residual_rows(mixer, SubRows("mlp", block_rows("mlp", MLP_ROWS), "down_proj(post)", ln2))


RECURRENT_BLOCK = _rows("mixer", MIXER_ROWS, "linear_out(gated)")
ATTENTION_BLOCK = _rows("attn", ATTENTION_ROWS, "o_proj(z)")


# -- the recurrent block's mixer ------------------------------------------------------------------------------------

MAX_SQRT_SLOPE = 1000.0
STEEP = 1 / (4 * MAX_SQRT_SLOPE**2)  # below it a square root is steeper


class BoundedSqrt(Function):
    """`bounded_sqrt`, in two operations each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0).sqrt()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        return grads[0] * (0.5 * x.clamp(min=STEEP).rsqrt()).masked_fill(x < 0, 0)


@of_one_number
def bounded_sqrt(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """sqrt(max(x, 0)) with its slope bounded by 1000, as Griffin is trained: where it would be steeper, it is 1000.

    Below 0, which only an edit that makes a decay exceed 1 can bring about, it is 0 and flat.
    """
    if not (torch.compiler.is_compiling() or transformed()):
        return BoundedSqrt.apply(x)
    here = x.detach()
    line = here.clamp(min=0).sqrt() + MAX_SQRT_SLOPE * (x - here)
    return torch.where(x < STEEP, line.masked_fill(x < 0, 0), x.clamp(min=STEEP).sqrt())


def block_diagonal(
    x: Float[Tensor, "batch pos channel"],
    weight: Float[Tensor, "head width width"],
    bias: Float[Tensor, "head width"],
) -> Float[Tensor, "batch pos channel"]:
    """x_h @ weight_h + bias_h for each head h of the channels, in at least float32."""
    heads = rearrange(at_least_float32(x), "b l (h i) -> b l h i", h=weight.shape[0])
    out = torch.einsum("blhi,hij->blhj", heads, at_least_float32(weight)) + at_least_float32(bias)
    return out.flatten(2)


class GriffinMixer(PathMixer):
    """The gated recurrent block around an RG-LRU, every intermediate a point."""

    path = (Conv("conv_1d"), Real("u"), ChannelScan(), Named("y"), Gate(partial(F.gelu, approximate="tanh")))
    selection = ("input_gate", "log_decay", "reset", "multiplier")

    def project(self, n: Float[Tensor, "batch pos d_model"], run: Run) -> Streams:
        w = self.weights
        x = self.hook_x(run.padding.zero(F.linear(n, w.linear_x.weight, w.linear_x.bias)))
        return {"x": x, "gate_pre": self.hook_gate_pre(F.linear(n, w.linear_y.weight, w.linear_y.bias))}

    def select(self, u: Float[Tensor, "batch pos channel"], streams: Streams, run: DocumentRun) -> None:  # type: ignore[override]
        lru, pad = self.weights.rg_lru, run.padding
        i = torch.sigmoid(block_diagonal(u, lru.input_gate_weight, lru.input_gate_bias))
        streams["input_gate"] = self.hook_input_gate(i)
        r = torch.sigmoid(block_diagonal(u, lru.recurrent_gate_weight, lru.recurrent_gate_bias))
        r = self.hook_recurrence_gate(r)
        log_a = r * (-8.0 * F.softplus(at_least_float32(lru.recurrent_param)))
        # a = 1, m = 0 at a masked position: the state passes unchanged
        log_a = pad.zero(self.hook_log_decay(pad.zero(log_a)))
        reset = self.hook_reset(run.begins.unsqueeze(-1).to(log_a.dtype))
        m = self.hook_multiplier(reset + (1 - reset) * bounded_sqrt(-torch.expm1(2 * log_a)))
        streams |= {"log_decay": log_a, "reset": reset, "multiplier": m}

    def terms(  # type: ignore[override]
        self,
        input_gate: Float[Tensor, "batch pos channel"],
        log_decay: Float[Tensor, "batch pos channel"],
        reset: Float[Tensor, "batch pos one"],
        multiplier: Float[Tensor, "batch pos channel"],
    ) -> ChannelTerms:
        """decay = a, 0 at resets, write = m i u, read = 1: Griffin, eq. 4."""
        return ChannelTerms(log_decay, amount=multiplier * input_gate, fresh=reset)

    def output_weights(self) -> tuple[Float[Tensor, "d_model channel"], Float[Tensor, " d_model"] | None]:
        return self.weights.linear_out.weight, self.weights.linear_out.bias

    def named_weights(self) -> dict[str, Tensor]:
        w, lru = self.weights, self.weights.rg_lru
        gates = {"W_input_gate": lru.input_gate_weight, "W_recurrence_gate": lru.recurrent_gate_weight}
        rate = -8.0 * F.softplus(at_least_float32(lru.recurrent_param))
        return {
            **linear("in", w.linear_x),
            **linear("gate", w.linear_y),
            **gates,
            "A": rate,
            **super().named_weights(),
        }


# -- the model ------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class GriffinConfig(HookedConfig):
    """cfg of Griffin and Hawk. `layer_types`: "recurrent" or "attention" for each layer. `window_size`: how many tokens
    a query sees, its own included."""

    lru_width: int
    d_conv: int
    layer_types: tuple[str, ...]
    window_size: int
    n_key_value_heads: int
    tie_word_embeddings: bool = True

    @property
    def sizes(self) -> dict[str, int]:
        attention = {"head": self.n_heads, "kv_head": self.n_key_value_heads, "d_head": self.d_head}
        own = {"channel": self.lru_width, "tap": self.d_conv, "d_mlp": self.d_mlp or 0}
        return {**super().sizes, **own, **attention}


class HookedGriffin(PositionedModel):
    """`HookedGriffin(RecurrentGemmaForCausalLM(...))`, or better `gl.wrap(...)`: Griffin (and Hawk) opened up.

    Documents packed in a row, told apart by `position_ids`, are as if each stood alone: conv, recurrence and attention
    stop at position 0. (So it is in Google's code. In transformers the recurrence does; the attention without a cache
    only; the conv never.)
    """

    title = "Griffin"
    paper = "De et al., Griffin: Mixing Gated Linear Recurrences with Local Attention (arXiv 2402.19427)"
    reference = (
        "google/recurrentgemma-2b",
        {"d_model": 2560, "channel": 2560, "tap": 4, "d_mlp": 7680, "head": 10, "kv_head": 1, "d_head": 256},
    )
    recurrence: ClassVar = {
        "decay": "a = exp(log_decay), 0 at resets, [channel]",
        "write": "multiplier * input_gate * u, [channel]; multiplier = sqrt(1 - a^2), 1 at resets",
        "read": "1: the state has no axis of its own",
        "skip": "none",
        "conv": "causal depthwise conv over x, with bias, within a document",
        "activation before the scan": "none",
        "gate": "gelu_tanh(gate_pre)",
    }
    attention_words: ClassVar = {
        "x": "x",
        "o": "gated",
        "gate": "gate",
        "scan": "S[i, j] = exp(log_decay[j + 1] + ... + log_decay[i]) * multiplier[j] * input_gate[j], j <= i; "
        "0 where a reset lies between, j < reset <= i",
        "skip": "none",
        "act": "none",
        "conv": "M[i, j] = conv_1d.weight[K - 1 - (i - j)], 0 <= i - j < K taps, within a document",
        "r": "gate * S * conv_1d.bias; with a carried state also what its conv tail and its scan state bring",
        "attention layers": LOCAL_ATTENTION.words,
    }
    wraps = ("RecurrentGemmaForCausalLM",)
    hub_types = ("recurrent_gemma",)
    hub_fields = RECURRENT_GEMMA
    layout = RecurrentGemma()
    small = TINY
    block_points = (*RECURRENT_BLOCK, *block_rows("attn", ATTENTION_ROWS))  # of either kind; see rows_for
    final_points = norm_rows("ln_final", "blocks.-1.hook_resid_post", "the final norm", NORMED)
    first_points = (Point("hook_embed", "batch pos d_model", "sqrt(d_model) * embedding[token]", "the embedding"),)
    last_points = (
        Point("hook_logits", "batch pos d_vocab", "cap * tanh(unembedding(ln_final.out) / cap)", "the unembedding"),
    )
    aliases = ALIASES
    carried: ClassVar = {
        **CARRIED,
        **CARRIED_WINDOW,
        **NEXT_POSITION,
    }
    cfg: GriffinConfig

    @classmethod
    def describe(cls, wrapped: Wrapped, model_name: str) -> GriffinConfig:
        """The cfg of a wrapped model, from the shapes of its parameters and the few numbers that shapes do not tell."""
        config, layers = wrapped.config, wrapped.model.layers
        fields.check(config.to_dict(), cls.hub_fields, f"{model_name}'s config")
        if len(layers) == 0:
            raise CheckpointError(f"{model_name} has no layers.")
        if config.hidden_activation != "gelu_pytorch_tanh":
            raise CheckpointError(
                f"{model_name} has hidden_activation={config.hidden_activation!r}; supported is 'gelu_pytorch_tanh'."
            )
        weight, blocks = wrapped.model.embed_tokens.weight, [layer.temporal_block for layer in layers]
        return GriffinConfig(
            model_name=model_name,
            architecture="griffin",
            n_layers=len(layers),
            d_model=weight.shape[1],
            d_vocab=weight.shape[0],
            n_heads=config.num_attention_heads,
            d_head=next((a.head_dim for a in blocks if _kind(a) == "attention"), config.head_dim),
            d_mlp=layers[0].mlp_block.up_proj.weight.shape[0],
            act_fn=config.hidden_activation,
            attn_only=False,
            positional_embedding_type="rotary",
            eps=float(config.rms_norm_eps),
            dtype=weight.dtype,
            device=str(weight.device),
            original_architecture=type(wrapped).__name__,
            lru_width=config.lru_width,
            d_conv=config.conv1d_width,
            layer_types=tuple(map(_kind, blocks)),
            window_size=config.attention_window_size,
            n_key_value_heads=config.num_key_value_heads,
            logits_soft_cap=config.logits_soft_cap
            or None,  # transformers' logits are all 0 for a cap of 0: we take none
            tie_word_embeddings=wrapped.lm_head.weight is weight,
        )

    @classmethod
    def kinds(cls) -> dict[str, tuple[Point, ...]]:
        """The rows of each kind of block."""
        return {"recurrent": RECURRENT_BLOCK, "attention": ATTENTION_BLOCK}

    def rows_for(self, layer: int) -> tuple[Point, ...]:
        return self.kinds()[self.cfg.layer_types[layer]]

    def make_block(self, layer: int) -> Block:
        w, cfg, rows = self.wrapped.model.layers[layer], self.cfg, self.rows_for(layer)
        ln1 = GemmaNorm(w.temporal_pre_norm, rows_of("ln1", rows), cfg.eps)
        ln2 = GemmaNorm(w.channel_pre_norm, rows_of("ln2", rows), cfg.eps)
        mlp = Sub("mlp", GatedMlp(w.mlp_block, rows_of("mlp", rows), GELU_TANH), ln2, ln="ln2")
        if cfg.layer_types[layer] == "recurrent":
            mixer = GriffinMixer(w.temporal_block, rows_of("mixer", rows), layer)
            return Block(w, rows, Sub("mixer", mixer, ln1), mlp)
        heads: Any = w.temporal_block
        attn = Attention(
            heads, rows_of("attn", rows), layer, LOCAL_ATTENTION, heads.head_dim, cfg.window_size, heads.rotary_emb
        )
        return Block(w, rows, Sub("mixer", attn, ln1, place="attn"), mlp)  # where TransformerLens has attention

    def make_final_norm(self, rows: tuple[Point, ...]) -> Norm:
        return GemmaNorm(self.wrapped.model.final_norm, rows, self.cfg.eps)

    @property
    def embedding(self) -> Any:
        return self.wrapped.model.embed_tokens

    @property
    def unembedding(self) -> Any:
        return self.wrapped.lm_head

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """The embedding as it enters the residual stream: scaled, by sqrt(d_model) rounded to bfloat16."""
        return self.embedding.weight * self.embed_scale

    @property
    def embed_scale(self) -> Float[Tensor, ""]:
        return self.wrapped.model.normalizer.to(self.embedding.weight.dtype)

    def embed(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        return super().embed(tokens) * self.embed_scale

    def apply_output_logits_transform(self, logits: Float[Tensor, "... d_vocab"]) -> Float[Tensor, "... d_vocab"]:
        """Logits, softly capped: cap * tanh(logits / cap)."""
        cap = self.cfg.logits_soft_cap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        total = torch.zeros(self.cfg.d_model, device=self.W_U.device)
        blocks: Any = self.blocks[: layer + int(mlp_input)]
        for number, block in enumerate(blocks):
            kind, w = self.cfg.layer_types[number], block.mixer.weights
            total = total + (w.linear_out.bias if kind == "recurrent" else w.o_proj.bias)
            if include_mlp_biases and number < layer:
                total = total + block.mlp.weights.down_proj.bias
        return total


def _kind(temporal_block: nn.Module) -> str:
    """What a layer is, by the parameters it has: configs name it differently from one transformers to the next."""
    return "attention" if "q_proj" in dict(temporal_block.named_children()) else "recurrent"


HOOKED = HookedGriffin

"""RWKV-4 (Peng et al. 2023, arXiv 2305.13048): token shift, the WKV recurrence, receptance gates, and a channel mix.

b batch, l pos, d d_model, c channel (attention_hidden_size), f d_mlp; n a norm's output, s the one of the position
before; w = -exp(time_decay), u = time_first; the state of a channel is the pair (N, D), numerator and denominator.

    time mix      x_m = n time_mix_m + s (1 - time_mix_m)  for m = k, v, r
                  k, v, r = key(x_k), value(x_v), receptance(x_r)
                  N_t = e^w N_{t-1} + e^{k_t} v_t          D_t = e^w D_{t-1} + e^{k_t}
                  scan_t = (N_{t-1} + e^{time_first + k_t} v_t) / (D_{t-1} + e^{time_first + k_t})
                  out = output(sigmoid(r) scan)
    channel mix   x_m as above for m = k, r               out = sigmoid(receptance(x_r)) value(relu(key(x_k))^2)

**Rescaling.** In evaluation transformers (and the official code) halve the stream after every `rescale_every` blocks
and divide the output weights of the blocks behind by the same power of two, *in place*, to stay in float16's range.
Here the stream, and so every hook point, is never halved: stored weights are multiplied back if `layers_are_rescaled`
says so, and since LayerNorm(h / 2^p; eps) = LayerNorm(h; 4^p eps), evaluation shows in the norms' eps alone. Hook
values are the same whatever transformers has done to its weights, the blocks' outputs sum to the stream, and the
logits are transformers' in either mode. Its `hidden_states` after block i are, in evaluation, ours / 2^((i + 1) //
rescale_every).

Wraps transformers' RwkvForCausalLM; the official .pth key layout is renamed to its names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatedlens.address.point import Point, block_rows
from gatedlens.compat.names.rwkv import ALIASES
from gatedlens.errors import CheckpointError
from gatedlens.formats.rwkv_lm import TINY, RwkvLm
from gatedlens.formats.transformers_config import RWKV
from gatedlens.model import fields
from gatedlens.model.base import Wrapped
from gatedlens.model.block import Block, Sub, SubRows, residual_rows
from gatedlens.model.config import HookedConfig
from gatedlens.model.hookpoint import Part, rows_of
from gatedlens.model.mixer import TokenMixing
from gatedlens.model.norm import Norm, eps_of, norm_rows
from gatedlens.model.path import Content, Held, PathMixer, Stage, Streams
from gatedlens.model.run import Run
from gatedlens.model.stages import Gate, Named
from gatedlens.model.state import Carried, RecurrentState
from gatedlens.model.weights import linear
from gatedlens.parts.first_norm import NormedStream
from gatedlens.recurrence.scanning import at_least_float32
from gatedlens.recurrence.wkv_matrix import WkvScan
from gatedlens.recurrence.wkv_scan import NOTHING, Carry, OpenWkv, wkv

PAPER = "RWKV, arXiv 2305.13048"
EQ16 = f"{PAPER}, eq. 16; numerator and denominator as they are, in float64"
STABLE = f"{PAPER}, appendix (time mixing as an RNN cell); the next position reads it"


def _mixed(norm: str, mix: str) -> str:
    return f"{norm}.out * time_mix_{mix} + shift * (1 - time_mix_{mix})"


MIXER_ROWS = (
    Point("hook_shift", "batch pos d_model", "ln1.out[pos - 1], 0 from another document", f"{PAPER}, sec. 3.1.1 (token shift)"),
    Point("hook_xk", "batch pos d_model", _mixed("ln1", "key"), f"{PAPER}, eq. 12"),
    Point("hook_xv", "batch pos d_model", _mixed("ln1", "value"), f"{PAPER}, eq. 13"),
    Point("hook_xr", "batch pos d_model", _mixed("ln1", "receptance"), f"{PAPER}, eq. 11"),
    Point("hook_k", "batch pos channel", "key(xk)", f"{PAPER}, eq. 12"),
    Point("hook_x", "batch pos channel", "value(xv)", f"{PAPER}, eq. 13 (v)"),
    Point("hook_gate_pre", "batch pos channel", "receptance(xr)", f"{PAPER}, eq. 11 (r)"),
    Point("hook_u", "batch pos channel", "x", f"{PAPER}, eq. 16"),
    Point("hook_reset", "batch pos one", "1 where a document begins (position 0 of position_ids), else 0", f"{PAPER}, eq. 16"),
    Point("hook_state_start", "batch channel state", "state before the first position (zero without one)", EQ16, True),
    Point("hook_decay", "batch pos channel state", "exp(-exp(time_decay)) * (1 - reset)", EQ16, True),
    Point("hook_write", "batch pos channel state", "exp(k) * (u, 1)", EQ16, True),
    Point("hook_state", "batch pos channel state", "decay * state[pos - 1] + write", EQ16, True),
    Point("hook_num", "batch pos channel", "state[0] * exp(-max)", STABLE, True),
    Point("hook_den", "batch pos channel", "state[1] * exp(-max)", STABLE, True),
    Point("hook_max", "batch pos channel", "max(max[pos - 1] + log(decay), log(write[1]))", STABLE, True),
    Point(
        "hook_scan",
        "batch pos channel",
        "(past * num[pos - 1] + bonus * u) / (past * den[pos - 1] + bonus), "
        "past = exp(max[pos - 1]) * (1 - reset), bonus = exp(time_first + k)",
        f"{PAPER}, eq. 16 (wkv)",
    ),
    Point("hook_y", "batch pos channel", "scan (the bonus at pos itself is inside)", f"{PAPER}, eq. 16"),
    Point("hook_gate", "batch pos channel", "sigmoid(gate_pre)", f"{PAPER}, eq. 17"),
    Point("hook_gated", "batch pos channel", "y * gate", f"{PAPER}, eq. 17"),
)  # fmt: skip
INSIDE = ("state_start", "decay", "write", "state", "num", "den", "max")  # the points inside the scan, in firing order
PASSED = {"decay": 1.0, "write": 0.0}
EMPTY = {"num": 0.0, "den": 0.0, "max": NOTHING}  # the state before anything was read

MLP_ROWS = (
    Point(
        "hook_shift",
        "batch pos d_model",
        "ln2.out[pos - 1], 0 from another document",
        f"{PAPER}, sec. 3.1.1 (token shift)",
    ),
    Point("hook_xk", "batch pos d_model", _mixed("ln2", "key"), f"{PAPER}, eq. 15"),
    Point("hook_xr", "batch pos d_model", _mixed("ln2", "receptance"), f"{PAPER}, eq. 14"),
    Point("hook_k", "batch pos d_mlp", "key(xk)", f"{PAPER}, eq. 15"),
    Point("hook_k_act", "batch pos d_mlp", "relu(k)^2", f"{PAPER}, eq. 18"),
    Point("hook_kv", "batch pos d_model", "value(k_act)", f"{PAPER}, eq. 18"),
    Point("hook_gate_pre", "batch pos d_model", "receptance(xr)", f"{PAPER}, eq. 14 (r)"),
    Point("hook_gate", "batch pos d_model", "sigmoid(gate_pre)", f"{PAPER}, eq. 18"),
)


def _layer_norm_rows(part: str, reads: str) -> tuple[Point, ...]:
    source = "LayerNorm, arXiv 1607.06450; eps * 4^(halvings so far) in evaluation"
    return norm_rows(part, f"({reads} - mean({reads}))", source, "weight * normalized + bias")


LN0_ROWS = _layer_norm_rows("ln0", "embed")
BLOCK_ROWS = residual_rows(
    SubRows("mixer", block_rows("mixer", MIXER_ROWS), "output(gated)", _layer_norm_rows("ln1", "mixer_in")),
    SubRows("mlp", block_rows("mlp", MLP_ROWS), "mlp.kv * mlp.gate", _layer_norm_rows("ln2", "mlp_in")),
)
FIRST_BLOCK_ROWS = (*LN0_ROWS, replace(BLOCK_ROWS[0], equation="ln0.out"), *BLOCK_ROWS[1:])


@dataclass(frozen=True)
class Rescale:
    """By which power of two evaluation scales down at one depth; what the wrapped model says is read at every call."""

    backbone: Any
    depth: int  # blocks before this place

    def power(self) -> int:
        every = self.backbone.config.rescale_every
        return self.depth // every if every > 0 else 0

    def eps(self, eps: float) -> float:
        """LayerNorm(h / 2^power; eps) = LayerNorm(h; this)."""
        return eps if self.backbone.training else eps * 4.0 ** self.power()

    def whole(self, out: Tensor) -> Tensor:
        """What the unscaled weights would have put out; float32 in float16 models, as the stream may need the range."""
        out = _stream_dtype(out)
        return out * 2.0 ** self.power() if self.backbone.layers_are_rescaled and self.power() else out


def _stream_dtype(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float16 else x


class RwkvNorm(Norm):
    """out = weight * (x - mean) / sqrt(var + 4^power eps) + bias: evaluation's LayerNorm, of the unscaled stream."""

    torch_norms = (nn.LayerNorm,)

    def __init__(self, weights: Any, rows: tuple[Point, ...], eps: float, rescale: Rescale):
        Part.__init__(self, weights, rows)
        self.centred = True
        self.own_eps = eps_of(weights, eps)
        self.rescale = rescale

    @property
    def eps(self) -> float:  # type: ignore[override]
        return self.rescale.eps(self.own_eps)


class RwkvMix(TokenMixing):
    """What both mixes share: weights that may be scaled."""

    def __init__(self, weights: Any, rows: tuple[Point, ...], layer: int, rescale: Rescale):
        super().__init__(weights, rows, layer)
        self.rescale = rescale


def _mix(n: Tensor, shift: Tensor, share: Tensor) -> Tensor:
    """n * share + shift * (1 - share)"""
    return torch.lerp(shift, n, share)


@dataclass(frozen=True)
class Wkv(Stage):
    """scan = the WKV recurrence with its lazy points: in segments if nobody listens, else laid open."""

    def reads(self, mixer: PathMixer) -> tuple[str, ...]:
        return "k", "reset"

    def forward(self, mixer: PathMixer, content: Content, streams: Streams, run: Run) -> Content:
        k, v = (at_least_float32(run.padding.zero(x)) for x in (streams["k"], content))
        reset, layer, shape = mixer.resets(run, k), mixer.layer, (k.shape[0], k.shape[2])
        starts = (run.start(name, layer, shape, k, nothing) for name, nothing in EMPTY.items())
        given = k, v, *rates(mixer.weights), run.padding.mask, Carry(*starts), reset
        inside: OpenWkv | None = None
        for name in INSIDE:  # each is asked right before it fires: an nnsight trace parks on one location at a time
            if getattr(mixer, f"hook_{name}").heard():
                inside = inside or OpenWkv(*given)
                value = mixer.fire(name, getattr(inside, name))
                if name in PASSED:  # a masked position passes the state on, whatever a hook does there
                    value = run.padding.fill(value, PASSED[name])
                setattr(inside, name, value)
        scan, last = wkv(*given) if inside is None else (inside.scan, inside.last)
        for name, value in zip(last._fields, last, strict=True):
            run.leave(name, layer, value)
        return mixer.fire("scan", scan.to(content.dtype))

    def hold(self, mixer: PathMixer, held: Held) -> None:
        """S is a softmax over the past: UIA, sec. 3.3."""
        k, fresh = held.cached("k"), held.fresh
        nothing = k.new_zeros(k.shape[0], k.shape[2])
        carry = Carry(nothing, nothing, nothing + NOTHING)
        if held.state is not None:
            carry = Carry(*(held.state[name, mixer.layer].to(k) for name in Carry._fields))
            held.factors["start"] = carry.num.unsqueeze(-1)
        w, u = (rate.to(k.dtype) for rate in rates(mixer.weights))
        held.factors["scan"] = WkvScan(k, w, u, carry.den, carry.max, fresh)


def rates(weights: Any) -> tuple[Float[Tensor, " channel"], Float[Tensor, " channel"]]:
    """(w, u) = (-exp(time_decay), time_first), at least float32."""
    return -torch.exp(at_least_float32(weights.time_decay)), at_least_float32(weights.time_first)


class RwkvMixer(RwkvMix, PathMixer):
    """The time mix, every intermediate a point."""

    path = (Named("u"), Wkv(), Named("y"), Gate(torch.sigmoid))

    def project(self, n: Float[Tensor, "batch pos d_model"], run: Run) -> Streams:
        w = self.weights
        n = n.to(w.key.weight.dtype)
        shift = self.hook_shift(self.shifted(n, run, "shift"))
        xk = self.hook_xk(_mix(n, shift, w.time_mix_key))
        xv = self.hook_xv(_mix(n, shift, w.time_mix_value))
        xr = self.hook_xr(_mix(n, shift, w.time_mix_receptance))
        k = self.hook_k(F.linear(xk, w.key.weight))
        v = self.hook_x(F.linear(xv, w.value.weight))
        return {"k": k, "x": v, "gate_pre": self.hook_gate_pre(F.linear(xr, w.receptance.weight))}

    def state_of(self, state: RecurrentState) -> Tensor:
        """(N, D) = (num, den) e^max, in float64."""
        num, den, top = (state[name, self.layer].double() for name in Carry._fields)
        return torch.stack([num, den], dim=-1) * top.exp().unsqueeze(-1)

    def output_weights(self) -> tuple[Float[Tensor, "d_model channel"], Float[Tensor, " d_model"] | None]:
        return self.rescale.whole(self.weights.output.weight), None

    def named_weights(self) -> dict[str, Tensor]:
        w, rate = self.weights, rates(self.weights)[0]
        read = {**linear("in", w.value), **linear("K", w.key), **linear("gate", w.receptance)}
        return {**read, "A": rate, **super().named_weights()}

    def forward(self, n: Float[Tensor, "batch pos d_model"], run: Run) -> Float[Tensor, "batch pos d_model"]:
        # Rescaled behind the product: before it the weight might leave float16's range.
        return self.rescale.whole(F.linear(self.walk(self.project(n, run), run), self.weights.output.weight))


class RwkvMlp(RwkvMix):
    """The channel mix, every intermediate a point."""

    def forward(self, m: Float[Tensor, "batch pos d_model"], run: Run) -> Float[Tensor, "batch pos d_model"]:
        w = self.weights
        m = m.to(w.key.weight.dtype)
        shift = self.hook_shift(self.shifted(m, run, "mlp_shift"))
        xk = self.hook_xk(_mix(m, shift, w.time_mix_key))
        xr = self.hook_xr(_mix(m, shift, w.time_mix_receptance))
        k = self.hook_k(F.linear(xk, w.key.weight))
        k_act = self.hook_k_act(torch.relu(k).square())
        kv = self.hook_kv(self.rescale.whole(F.linear(k_act, w.value.weight)))
        r = self.hook_gate_pre(F.linear(xr, w.receptance.weight))
        gate = self.hook_gate(torch.sigmoid(r))
        return kv * gate

    def named_weights(self) -> dict[str, Tensor]:
        w = self.weights
        return {
            **linear("in", w.key),
            **linear("gate", w.receptance),
            "W_out": self.rescale.whole(w.value.weight).mT,
        }


# -- the model ------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class RWKVConfig(HookedConfig):
    """cfg of RWKV-4. `rescale_every` is a record: the forward reads the wrapped model's."""

    d_inner: int
    rescale_every: int = 6
    tie_word_embeddings: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        return {**super().sizes, "channel": self.d_inner, "state": 2, "d_mlp": self.d_mlp or 0}


class HookedRWKV(NormedStream):
    """`HookedRWKV(RwkvForCausalLM(...))`, or better `gl.wrap(...)`: RWKV-4 with every intermediate a hook point."""

    title = "RWKV"
    paper = "Peng et al., RWKV: Reinventing RNNs for the Transformer Era (arXiv 2305.13048), version 4"
    reference = ("RWKV/rwkv-4-169m-pile", {"d_model": 768, "channel": 768, "state": 2, "d_mlp": 3072})
    recurrence: ClassVar = {
        "decay": "exp(-exp(time_decay)), constant, [channel]; the same for both states",
        "write": "exp(k) * u (numerator), exp(k) (denominator), [channel, 2]",
        "read": "numerator / denominator of the state before, with the position's own bonus exp(time_first + k) in both",
        "skip": "none (the bonus is inside)",
        "conv": "none; token shift on the inputs of k, v and r",
        "activation before the scan": "none",
        "gate": "sigmoid(gate_pre), the receptance",
    }
    attention_words: ClassVar = {
        "x": "x (v in the paper)",
        "o": "gated",
        "gate": "gate",
        "scan": "S[i, j] = exp(w (i - j - 1) + k[j]) / Z[i], j < i; exp(time_first + k[i]) / Z[i], j = i; w = -exp(time_decay); "
        "Z[i] their sum, with a carried state also its denominator: rows sum to 1 without one; "
        "0 where a reset lies between, j < reset <= i",
        "skip": "none",
        "act": "none",
        "conv": "none",
        "r": "0; with a carried state what its numerator brings, over the same Z",
    }
    wraps = ("RwkvForCausalLM",)
    hub_types = ("rwkv",)
    hub_fields = RWKV
    layout = RwkvLm()
    small = TINY
    block_points = BLOCK_ROWS
    final_points = _layer_norm_rows("ln_final", "blocks.-1.hook_resid_post")
    aliases = ALIASES
    has_positions = True
    carried: ClassVar = {
        **{name: Carried("scan", "batch channel", divides=name != "num") for name in Carry._fields},
        "shift": Carried("shift", "batch tail d_model"),
        "mlp_shift": Carried("mlp_shift", "batch tail d_model"),
    }
    cfg: RWKVConfig

    @classmethod
    def describe(cls, wrapped: Wrapped, model_name: str) -> RWKVConfig:
        """The cfg of a wrapped model, from the shapes of its parameters and its config."""
        fields.check(wrapped.config.to_dict(), cls.hub_fields, f"{model_name}'s config")
        if len(wrapped.rwkv.blocks) == 0:
            raise CheckpointError(f"{model_name} has no layers.")
        first, config = wrapped.rwkv.blocks[0], wrapped.config
        weight = wrapped.rwkv.embeddings.weight
        return RWKVConfig(
            model_name=model_name,
            architecture="rwkv",
            n_layers=len(wrapped.rwkv.blocks),
            d_model=weight.shape[1],
            d_vocab=weight.shape[0],
            n_ctx=config.context_length,
            act_fn="relu2",
            normalization_type="LN",
            eps=config.layer_norm_epsilon,
            dtype=first.attention.key.weight.dtype,
            device=str(weight.device),
            d_mlp=first.feed_forward.key.weight.shape[0],
            attn_only=False,
            original_architecture=type(wrapped).__name__,
            d_inner=first.attention.key.weight.shape[0],
            rescale_every=config.rescale_every,
            tie_word_embeddings=wrapped.head.weight is weight,
        )

    @classmethod
    def kinds(cls) -> dict[str, tuple[Point, ...]]:
        return {"the first, with ln0": FIRST_BLOCK_ROWS, "all others": BLOCK_ROWS}

    def rows_for(self, layer: int) -> tuple[Point, ...]:
        return FIRST_BLOCK_ROWS if layer == 0 else BLOCK_ROWS

    def make_block(self, layer: int) -> Block:
        backbone, eps = self.wrapped.rwkv, self.cfg.eps
        w, rows, rescale = backbone.blocks[layer], self.rows_for(layer), Rescale(backbone, layer)
        ln1, ln2 = (RwkvNorm(norm, rows_of(ln, rows), eps, rescale) for ln, norm in (("ln1", w.ln1), ("ln2", w.ln2)))
        mixer = RwkvMixer(w.attention, rows_of("mixer", rows), layer, rescale)
        mlp = RwkvMlp(w.feed_forward, rows_of("mlp", rows), layer, rescale)
        block = Block(w, rows, Sub("mixer", mixer, ln1), Sub("mlp", mlp, ln2, ln="ln2"))
        if layer == 0:
            block.ln0 = RwkvNorm(w.pre_ln, rows_of("ln0", rows), eps, rescale)
        return block

    def make_final_norm(self, rows: tuple[Point, ...]) -> Norm:
        backbone = self.wrapped.rwkv
        return RwkvNorm(backbone.ln_out, rows, self.cfg.eps, Rescale(backbone, self.cfg.n_layers))

    @property
    def embedding(self) -> Any:
        return self.wrapped.rwkv.embeddings

    @property
    def unembedding(self) -> Any:
        return self.wrapped.head

    def stream(self, embedded: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return _stream_dtype(super().stream(embedded))

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Zeros: RWKV's projections have no biases."""
        return torch.zeros(self.cfg.d_model, device=self.W_U.device)


HOOKED = HookedRWKV

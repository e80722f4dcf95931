"""RWKV-7 "Goose" (Peng et al. 2025, arXiv 2503.14456): token shift, a generalised delta rule on matrix states, a bonus.

b batch, l pos, d d_model, h head, v value and k key (`state`) of a head, c channel = (head value), f d_mlp; n a norm's output, s
the one of the position before.

    time mix      x_m = n + (s - n) x_m  for m = r, w, k, v, a, g
                  r, k, v = receptance(x_r), key(x_k), value(x_v)
                  log_decay = -e^(-1/2) sigmoid(w0 + tanh(x_w w1) w2)          a = sigmoid(a0 + x_a a1 a2), the learning rate
                  kk = k k_k / |k k_k| in each head                            k <- k (1 + (a - 1) k_a)
                  v <- v + (v_first - v) sigmoid(v0 + x_v v1 v2)               v_first: the v of layer 0; not in layer 0
                  S_t = S_{t-1} diag(e^log_decay) - (S_{t-1} kk)(a kk)^T + v k^T          scan_t = S_t r, S [head, value, key]
                  bonus = sum over key of r k r_k
                  y = LayerNorm by head(scan) + bonus v          out = output(y g),  g = sigmoid(x_g g1) g2
    channel mix   x_k as above              out = value(relu(key(x_k))^2)

The values of layer 0 reach every layer beside the residual stream: a run that starts at a later one is given them (`earlier`).

**Implicit attention.** x is v as the scan reads it, v_first in it. The scan's matrix is the same for all values of a head, so it
passes their mean on by itself, and what the centred norm leaves is S (v - mean v): the layer is that operator, weighed by
g weight / scale, and beside it the bonus on v itself; r is g bias.

Wraps `Rwkv7Weights` of formats/rwkv7_fla.py, which holds RWKV-LM's .pth or a checkpoint in flash-linear-attention's names, and
fla's RWKV7ForCausalLM, whose parameters have these names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatedlens.address.point import Point, block_rows
from gatedlens.compat.names.rwkv7 import ALIASES
from gatedlens.errors import CheckpointError
from gatedlens.formats.rwkv7_fla import FIELDS, TINY, Rwkv7Layout
from gatedlens.formats.transformers_config import config_of
from gatedlens.model import fields
from gatedlens.model.base import Wrapped
from gatedlens.model.block import Block, Sub, SubRows, residual_rows
from gatedlens.model.config import HookedConfig
from gatedlens.model.hookpoint import rows_of
from gatedlens.model.mixer import TokenMixing
from gatedlens.model.norm import Norm, eps_of, norm_rows
from gatedlens.model.path import Content, PathMixer, Stage, Streams
from gatedlens.model.run import Run
from gatedlens.model.stages import Bonus, Gate, GroupNorm, Named, Scan
from gatedlens.model.state import Carried
from gatedlens.model.weights import linear
from gatedlens.parts.first_norm import NormedStream
from gatedlens.recurrence.scanning import at_least_float32
from gatedlens.recurrence.terms import Terms

PAPER = "RWKV-7, arXiv 2503.14456"
SHIFT = f"{PAPER}, eq. 3 (token shift)"
STATE = f"{PAPER}, eq. 17"
LAYER_NORM = "LayerNorm, arXiv 1607.06450"
FIRST_VALUES = "blocks.0.mixer.hook_x"  # what every later layer reads of layer 0
SLOWEST = math.exp(-0.5)  # no channel forgets faster than exp(-this) a step


def _mixed(norm: str, mix: str) -> str:
    return f"{norm}.out + (shift - {norm}.out) * {mix}"


def _layer_norm_rows(part: str, reads: str) -> tuple[Point, ...]:
    return norm_rows(part, f"({reads} - mean({reads}))", LAYER_NORM, "weight * normalized + bias")


_SHIFTED = (
    Point("hook_shift", "batch pos d_model", "ln1.out[pos - 1], 0 from another document", SHIFT),
    *(Point(f"hook_x{m}", "batch pos d_model", _mixed("ln1", f"x_{m}"), SHIFT) for m in "rwkvag"),
    Point("hook_r", "batch pos head state", "receptance(xr)", f"{PAPER}, eq. 4"),
    Point("hook_w_pre", "batch pos head state", "w0 + tanh(xw @ w1) @ w2", f"{PAPER}, eq. 10"),
    Point("hook_log_decay", "batch pos head state", "-exp(-1/2) * sigmoid(w_pre)", f"{PAPER}, eq. 12"),
    Point("hook_a", "batch pos head state", "sigmoid(a0 + xa @ a1 @ a2)", f"{PAPER}, eq. 4 (in-context learning rate)"),
    Point("hook_k_pre", "batch pos head state", "key(xk)", f"{PAPER}, eq. 5"),
    Point("hook_kk", "batch pos head state", "k_pre * k_k / max(|k_pre * k_k|, 1e-12), |.| by head", f"{PAPER}, eq. 6, 15"),
    Point("hook_k", "batch pos head state", "k_pre * (1 + (a - 1) * k_a)", f"{PAPER}, eq. 7"),
    Point("hook_v_own", "batch pos channel", "value(xv)", f"{PAPER}, eq. 8"),
)  # fmt: skip
_VALUES_OF_THE_FIRST = (Point("hook_x", "batch pos channel", "v_own", f"{PAPER}, eq. 9 (v)"),)
_VALUES = (
    Point(
        "hook_v_first",
        "batch pos channel",
        f"{FIRST_VALUES.replace('hook_', '')} (copied: edits reach this block only)",
        f"{PAPER}, eq. 9",
    ),
    Point("hook_v_mix", "batch pos channel", "sigmoid(v0 + xv @ v1 @ v2)", f"{PAPER}, eq. 9 (value residual)"),
    Point("hook_x", "batch pos channel", "v_own + (v_first - v_own) * v_mix", f"{PAPER}, eq. 9 (v)"),
)
_SCANNED = (
    Point("hook_gate_low", "batch pos low", "xg @ g1", f"{PAPER}, eq. 14"),
    Point("hook_gate_act", "batch pos low", "sigmoid(gate_low)", f"{PAPER}, eq. 14"),
    Point("hook_u", "batch pos channel", "x", STATE),
    Point("hook_bonus", "batch pos head", "sum over state of r * k * r_k", f"{PAPER}, eq. 20"),
    Point("hook_reset", "batch pos one", "1 where documents begin (position 0 of position_ids), else 0", STATE),
    Point("hook_state_start", "batch head value state", "state before the first position (zero without one)", STATE, True),
    Point("hook_decay", "batch pos head value state", "exp(log_decay) * (1 - reset), the same for all values", STATE, True),
    Point("hook_write", "batch pos head value state", "u * k", STATE, True),
    Point("hook_erase", "batch pos head value state", "a * kk, the same for all values", STATE, True),
    Point("hook_probe", "batch pos head state", "kk * (1 - reset)", STATE, True),
    Point(
        "hook_state",
        "batch pos head value state",
        "decay * state[pos - 1] - erase * (sum over state of probe * state[pos - 1]) + write",
        STATE,
        True,
    ),
    Point("hook_scan", "batch pos channel", "sum over state of r * state", f"{PAPER}, eq. 20"),
    Point("hook_scale", "batch pos head", "sqrt(mean over a head of (scan - mean(scan))^2 + eps)", LAYER_NORM),
    Point("hook_normed", "batch pos channel", "ln_x.weight * (scan - mean(scan)) / scale + ln_x.bias", f"{PAPER}, eq. 21"),
    Point("hook_y", "batch pos channel", "normed + bonus * u", f"{PAPER}, eq. 21"),
    Point("hook_gate", "batch pos channel", "gate_act @ g2", f"{PAPER}, eq. 14"),
    Point("hook_gated", "batch pos channel", "y * gate", f"{PAPER}, eq. 22"),
)  # fmt: skip
MLP_ROWS = (
    Point("hook_shift", "batch pos d_model", "ln2.out[pos - 1], 0 from another document", SHIFT),
    Point("hook_xk", "batch pos d_model", _mixed("ln2", "x_k"), f"{PAPER}, eq. 23"),
    Point("hook_k", "batch pos d_mlp", "key(xk)", f"{PAPER}, eq. 23"),
    Point("hook_k_act", "batch pos d_mlp", "relu(k)^2", f"{PAPER}, eq. 24"),
)


def _rows(values: tuple[Point, ...]) -> tuple[Point, ...]:
    mixer = block_rows("mixer", (*_SHIFTED, *values, *_SCANNED))
    return residual_rows(
        SubRows("mixer", mixer, "output(gated)", _layer_norm_rows("ln1", "mixer_in")),
        SubRows("mlp", block_rows("mlp", MLP_ROWS), "value(mlp.k_act)", _layer_norm_rows("ln2", "mlp_in")),
    )


BLOCK_ROWS = _rows(_VALUES)
_first, *_others = _rows(_VALUES_OF_THE_FIRST)
FIRST_BLOCK_ROWS = (*_layer_norm_rows("ln0", "embed"), replace(_first, equation="ln0.out"), *_others)


def low_rank(x: Tensor, lora: Any, act: Any = None) -> Tensor:
    """act(x W1) W2, without the bias: fla keeps W1 and W2, transposed, in the linear layers 0 and 2."""
    inner = F.linear(x, lora[0].weight)
    return F.linear(inner if act is None else act(inner), lora[2].weight)


class Rwkv7Mixer(PathMixer):
    """The time mix, every intermediate a point."""

    selection = ("log_decay", "kk", "a", "k", "r")

    def __init__(self, weights: Any, rows: tuple[Point, ...], layer: int, cfg: Rwkv7Config):
        super().__init__(weights, rows, layer)
        self.cfg = cfg

    @property
    def heads(self) -> int:
        return self.cfg.n_heads

    @property
    def path(self) -> tuple[Stage, ...]:  # type: ignore[override]
        norm = GroupNorm(self.heads, self.cfg.mixer_eps, name="g_norm", out="normed", centred=True)
        return Named("u"), Bonus((Scan(), norm)), Gate(torch.Tensor.clone)

    def by_head(self, x: Float[Tensor, "batch pos channel"]) -> Float[Tensor, "batch pos head state"]:
        return x.unflatten(-1, (self.heads, -1))

    def project(self, n: Float[Tensor, "batch pos d_model"], run: Run) -> Streams:
        w, pad = self.weights, run.padding
        n = n.to(w.k_proj.weight.dtype)
        shift = self.hook_shift(self.shifted(n, run, "shift"))
        xr, xw, xk, xv, xa, xg = (
            self.fire(f"x{m}", torch.lerp(n, shift, getattr(w, f"x_{m}"))) for m in ("r", "w", "k", "v", "a", "g")
        )
        r = self.hook_r(self.by_head(F.linear(xr, w.r_proj.weight)))
        lora = w.w_lora.lora
        w_pre = self.hook_w_pre(
            self.by_head(at_least_float32(lora[2].bias) + at_least_float32(low_rank(xw, lora, torch.tanh)))
        )
        # 0 at a masked position, also after a hook: the state passes unchanged; so for kk and k: nothing is taken or written.
        log_decay = pad.zero(self.hook_log_decay(pad.zero(-SLOWEST * torch.sigmoid(w_pre))))
        a = self.hook_a(self.by_head(pad.zero(torch.sigmoid(w.a_lora.lora[2].bias + low_rank(xa, w.a_lora.lora)))))
        k = self.hook_k_pre(self.by_head(F.linear(xk, w.k_proj.weight)))
        kk = pad.zero(self.hook_kk(pad.zero(F.normalize(k * w.k_k.reshape(self.heads, -1), dim=-1))))
        k = pad.zero(self.hook_k(pad.zero(k * (1 + (a - 1) * w.k_a.reshape(self.heads, -1)))))
        x = self.hook_x(pad.zero(self.values(xv, run)))
        if self.layer == 0:
            run.hand_on(FIRST_VALUES, x)
        low = self.hook_gate_low(F.linear(xg, w.g_lora.lora[0].weight))
        g = F.linear(self.hook_gate_act(torch.sigmoid(low)), w.g_lora.lora[2].weight)
        return {"r": r, "log_decay": log_decay, "a": a, "kk": kk, "k": k, "x": x, "gate_pre": g}

    def values(self, xv: Float[Tensor, "batch pos d_model"], run: Run) -> Content:
        """v, mixed with that of layer 0."""
        w = self.weights
        own = self.hook_v_own(F.linear(xv, w.v_proj.weight))
        if self.layer == 0:
            return own
        first = self.hook_v_first(run.handed_on(FIRST_VALUES, self.layer, own))
        mix = self.hook_v_mix(torch.sigmoid(w.v_lora.lora[2].bias + low_rank(xv, w.v_lora.lora)))
        return own + (first - own) * mix

    def select(self, u: Content, streams: Streams, run: Run) -> None:
        streams["bonus"] = self.hook_bonus((streams["r"] * streams["k"] * self.weights.r_k).sum(-1))

    def terms(  # type: ignore[override]
        self,
        log_decay: Float[Tensor, "batch pos head state"],
        kk: Float[Tensor, "batch pos head state"],
        a: Float[Tensor, "batch pos head state"],
        k: Float[Tensor, "batch pos head state"],
        r: Float[Tensor, "batch pos head state"],
    ) -> Terms:
        """S_t = S_{t-1} (diag(decay) - kk (a kk)^T) + v k^T: eq. 17; read as it is, not scaled."""
        return Terms(log_decay, key=k, read=r, erase=a * kk, probe=kk)

    def output_weights(self) -> tuple[Float[Tensor, "d_model channel"], Float[Tensor, " d_model"] | None]:
        return self.weights.o_proj.weight, None

    def named_weights(self) -> dict[str, Tensor]:
        w = self.weights
        read = {**linear("in", w.v_proj), **linear("K", w.k_proj), **linear("R", w.r_proj)}
        return {**read, **super().named_weights()}


class Rwkv7Mlp(TokenMixing):
    """The channel mix, every intermediate a point."""

    def forward(self, m: Float[Tensor, "batch pos d_model"], run: Run) -> Float[Tensor, "batch pos d_model"]:
        w = self.weights
        m = m.to(w.key.weight.dtype)
        shift = self.hook_shift(self.shifted(m, run, "mlp_shift"))
        xk = self.hook_xk(torch.lerp(m, shift, w.x_k))
        k = self.hook_k(F.linear(xk, w.key.weight))
        k_act = self.hook_k_act(torch.relu(k).square())
        return F.linear(k_act, w.value.weight)

    def named_weights(self) -> dict[str, Tensor]:
        return {**linear("in", self.weights.key), **linear("out", self.weights.value)}


# -- the model ------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Rwkv7Config(HookedConfig):
    """cfg of RWKV-7. `n_heads` heads of `d_head` values and as many keys; `mixer_eps`: of the norm behind the scan."""

    d_gate_low: int  # the rank of the gate
    mixer_eps: float = 64e-5
    tie_word_embeddings: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        heads = {
            "channel": self.n_heads * self.d_head,
            "head": self.n_heads,
            "value": self.d_head,
            "state": self.d_head,
        }
        return {**super().sizes, **heads, "low": self.d_gate_low, "d_mlp": self.d_mlp or 0}


class HookedRWKV7(NormedStream):
    """`gl.from_pretrained("RWKV-x070-World-0.4B-v2.9-20250107-ctx4096.pth")`: RWKV-7 with every intermediate a hook point.

    Every layer reads the values of layer 0 beside the residual stream (`hook_v_first`), so a run that starts at a later layer
    needs them: `model(resid, start_at_layer=3, earlier=cache)`, the cache of a run of these tokens. Documents packed in a row,
    told apart by `position_ids`, are as if each stood alone.
    """

    title = "RWKV-7"
    paper = 'Peng et al., RWKV-7 "Goose" with Expressive Dynamic State Evolution (arXiv 2503.14456)'
    reference = (
        "RWKV7-Goose-World3-1.5B",
        {"d_model": 2048, "channel": 2048, "head": 32, "value": 64, "state": 64, "low": 256, "d_mlp": 8192},
    )
    recurrence: ClassVar = {
        "decay": "exp(log_decay), [head, state]",
        "erase": "a * kk, [head, state]: of what the probe kk finds",
        "write": "u * k, [head, value, state]",
        "read": "r, [head, state]",
        "skip": "bonus * u, behind the norm",
        "conv": "none; token shift on the inputs of r, w, k, v, a and g",
        "activation before the scan": "none",
        "gate": "sigmoid(xg @ g1) @ g2, behind a LayerNorm by head and the bonus",
    }
    attention_words: ClassVar = {
        "x": "x (v in the paper, v_first in it); what enters S less its mean over the head",
        "o": "gated",
        "gate": "gate; of S gate * ln_x.weight / scale",
        "scan": "S[i, j] = r[i] . T[i] ... T[j + 1] k[j], T = diag(exp(log_decay)) - (a * kk) kk^T, j <= i, of each head; "
        "0 where a reset lies between, j < reset <= i",
        "skip": "bonus, a number a head and position",
        "act": "none",
        "conv": "none",
        "r": "gate * ln_x.bias; with a carried state also what it brings",
    }
    wraps = ("Rwkv7Weights", "RWKV7ForCausalLM")
    layout = Rwkv7Layout()
    small = TINY
    block_points = BLOCK_ROWS
    final_points = _layer_norm_rows("ln_final", "blocks.-1.hook_resid_post")
    aliases = ALIASES
    has_positions = True
    hands_on = (FIRST_VALUES,)
    carried: ClassVar = {
        "scan": Carried("scan", "batch head value state"),
        "shift": Carried("shift", "batch tail d_model"),
        "mlp_shift": Carried("mlp_shift", "batch tail d_model"),
    }
    cfg: Rwkv7Config

    @classmethod
    def describe(cls, wrapped: Wrapped, model_name: str) -> Rwkv7Config:
        """The cfg of a wrapped model, from the shapes of its parameters."""
        fields.check(config_of(wrapped), FIELDS, f"{model_name}'s config")
        backbone = wrapped.model
        if len(backbone.layers) == 0:
            raise CheckpointError(f"{model_name} has no layers.")
        first, weight = backbone.layers[0], backbone.embeddings.weight
        heads, size = first.attn.r_k.shape
        rows, width = first.attn.v_proj.weight.shape
        if rows != heads * size or weight.shape[1] != width:
            raise CheckpointError(
                f"{model_name}: its values are {rows} and its keys {heads} * {size} in {weight.shape[1]} numbers of the stream; "
                "gatedlens runs models whose heads have as many values as keys."
            )
        return Rwkv7Config(
            model_name=model_name,
            architecture="rwkv7",
            n_layers=len(backbone.layers),
            d_model=width,
            d_vocab=weight.shape[0],
            n_heads=heads,
            d_head=size,
            d_gate_low=first.attn.g_lora.lora[0].weight.shape[0],
            d_mlp=first.ffn.key.weight.shape[0],
            attn_only=False,
            act_fn="relu2",
            normalization_type="LN",
            eps=eps_of(first.attn_norm, 1e-5),
            mixer_eps=eps_of(first.attn.g_norm, 64e-5),
            dtype=first.attn.k_proj.weight.dtype,
            device=str(weight.device),
            original_architecture=type(wrapped).__name__,
            tie_word_embeddings=wrapped.lm_head.weight is weight,
        )

    @classmethod
    def kinds(cls) -> dict[str, tuple[Point, ...]]:
        return {"the first, with ln0": FIRST_BLOCK_ROWS, "all others": BLOCK_ROWS}

    def rows_for(self, layer: int) -> tuple[Point, ...]:
        return FIRST_BLOCK_ROWS if layer == 0 else BLOCK_ROWS

    def make_block(self, layer: int) -> Block:
        w, rows, eps = self.wrapped.model.layers[layer], self.rows_for(layer), self.cfg.eps
        ln1, ln2 = (
            Norm(norm, rows_of(ln, rows), eps, centred=True) for ln, norm in (("ln1", w.attn_norm), ("ln2", w.ffn_norm))
        )
        mixer = Rwkv7Mixer(w.attn, rows_of("mixer", rows), layer, self.cfg)
        mlp = Rwkv7Mlp(w.ffn, rows_of("mlp", rows), layer)
        block = Block(w, rows, Sub("mixer", mixer, ln1), Sub("mlp", mlp, ln2, ln="ln2"))
        if layer == 0:
            block.ln0 = Norm(w.pre_norm, rows_of("ln0", rows), eps, centred=True)
        return block

    def make_final_norm(self, rows: tuple[Point, ...]) -> Norm:
        return Norm(self.wrapped.model.norm, rows, self.cfg.eps, centred=True)

    @property
    def embedding(self) -> Any:
        return self.wrapped.model.embeddings

    @property
    def unembedding(self) -> Any:
        return self.wrapped.lm_head


HOOKED = HookedRWKV7

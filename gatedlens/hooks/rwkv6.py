"""RWKV-5 "Eagle" and RWKV-6 "Finch" (Peng et al. 2024, arXiv 2404.05892): token shift, matrix states, a bonus, a gate.

b batch, l pos, d d_model, h head, v value and k key (`state`) of a head, c channel = (head value), f d_mlp; n a norm's output, s
the one of the position before.

    time mix      r, k, v, g = receptance(x_r), key(x_k), value(x_v), SiLU(gate(x_g))
                  S_t    = S_{t-1} diag(e^log_decay) + v k^T                                            S [head, value, key]
                  scan_t = S_{t-1} r_t                         bonus = sum over key of r time_faaaa k
                  out = output(LayerNorm by head(scan + bonus v) g)
    RWKV-5        x_m = n m + s (1 - m),  m = time_mix_k, ...                                 log_decay = -exp(time_decay)
    RWKV-6        x_m = n + (s - n)(m + tanh(x_x W1)_m W2_m),  m = time_maa_w, ...;  x_x = n + (s - n) time_maa_x
                  log_decay = -exp(time_decay + tanh(x_w W1) W2)
    channel mix   x_m mixed as in RWKV-5              out = sigmoid(receptance(x_r)) value(relu(key(x_k))^2)

A position reads the state before its own step, which decays and writes behind the read; what it adds of itself is the bonus.

Wraps `Rwkv6Weights` of formats/rwkv6_lm.py, which holds RWKV-LM's .pth of either version.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatedlens.address.point import Point, block_rows
from gatedlens.compat.names.rwkv6 import ALIASES
from gatedlens.errors import CheckpointError
from gatedlens.formats.rwkv6_lm import FIELDS, MIXES, TINY, Rwkv6Layout
from gatedlens.model import fields
from gatedlens.model.base import Wrapped
from gatedlens.model.block import Block, Sub, SubRows, residual_rows
from gatedlens.model.config import HookedConfig
from gatedlens.model.hookpoint import rows_of
from gatedlens.model.mixer import TokenMixing
from gatedlens.model.norm import Norm, eps_of, norm_rows
from gatedlens.model.path import Content, PathMixer, Stage, Streams
from gatedlens.model.run import Run
from gatedlens.model.stages import Bonus, Gate, GroupNorm, Named, ScanBefore
from gatedlens.model.state import Carried
from gatedlens.model.weights import linear
from gatedlens.parts.first_norm import NormedStream
from gatedlens.recurrence.scanning import at_least_float32
from gatedlens.recurrence.terms import Terms

PAPER = "Eagle and Finch, arXiv 2404.05892"
SHIFT = f"{PAPER} (token shift)"
STATE = f"{PAPER} (WKV)"
LAYER_NORM = "LayerNorm, arXiv 1607.06450"


def _layer_norm_rows(part: str, reads: str) -> tuple[Point, ...]:
    return norm_rows(part, f"({reads} - mean({reads}))", LAYER_NORM, "weight * normalized + bias")


def _mixed(norm: str, mix: str, version: str) -> str:
    """n mixed with the position before, by a share that does not depend on the token."""
    if version == "rwkv5":
        return f"{norm}.out * time_mix_{mix} + shift * (1 - time_mix_{mix})"
    return f"{norm}.out + (shift - {norm}.out) * time_maa_{mix}"


_SHIFT = Point("hook_shift", "batch pos d_model", "ln1.out[pos - 1], 0 from another document", SHIFT)
_MIXED = {
    "rwkv5": (
        _SHIFT,
        *(Point(f"hook_x{m}", "batch pos d_model", _mixed("ln1", m, "rwkv5"), SHIFT) for m in MIXES["rwkv5"]),
    ),
    "rwkv6": (
        _SHIFT,
        Point("hook_xx", "batch pos d_model", _mixed("ln1", "x", "rwkv6"), f"{PAPER} (ddlerp)"),
        Point("hook_mix_low", "batch pos mix low", "tanh(xx @ time_maa_w1)", f"{PAPER} (ddlerp)"),
        *(
            Point(
                f"hook_x{m}",
                "batch pos d_model",
                f"ln1.out + (shift - ln1.out) * (time_maa_{m} + mix_low[{i}] @ time_maa_w2[{i}])",
                f"{PAPER} (ddlerp)",
            )
            for i, m in enumerate(MIXES["rwkv6"])
        ),
    ),
}
_DECAYED = {
    "rwkv5": (Point("hook_log_decay", "batch pos head state", "-exp(time_decay), the same at each position", STATE),),
    "rwkv6": (
        Point("hook_w_pre", "batch pos head state", "time_decay + tanh(xw @ time_decay_w1) @ time_decay_w2", STATE),
        Point("hook_log_decay", "batch pos head state", "-exp(w_pre)", STATE),
    ),
}
_SCANNED = (
    Point("hook_u", "batch pos channel", "x", STATE),
    Point("hook_bonus", "batch pos head", "sum over state of r * time_faaaa * k", STATE),
    Point("hook_reset", "batch pos one", "1 where a document begins (position 0 of position_ids), else 0", STATE),
    Point("hook_state_start", "batch head value state", "state before the first position (zero without one)", STATE, True),
    Point("hook_decay", "batch pos head value state", "exp(log_decay) * (1 - reset), the same for all values", STATE, True),
    Point("hook_write", "batch pos head value state", "u * k", STATE, True),
    Point("hook_state", "batch pos head value state", "decay * state[pos - 1] + write; the next position reads it", STATE, True),
    Point("hook_scan", "batch pos channel", "sum over state of r * (1 - reset) * state[pos - 1]", STATE),
    Point("hook_y", "batch pos channel", "scan + bonus * u", STATE),
    Point("hook_scale", "batch pos head", "sqrt(mean over a head of (y - mean(y))^2 + eps)", LAYER_NORM),
    Point("hook_normed", "batch pos channel", "ln_x.weight * (y - mean(y)) / scale + ln_x.bias", LAYER_NORM),
    Point("hook_gate", "batch pos channel", "SiLU(gate_pre)", PAPER),
    Point("hook_gated", "batch pos channel", "normed * gate", PAPER),
)  # fmt: skip


def _mixer_rows(version: str) -> tuple[Point, ...]:
    return (
        *_MIXED[version],
        Point("hook_r", "batch pos head state", "receptance(xr)", PAPER),
        Point("hook_k", "batch pos head state", "key(xk)", PAPER),
        Point("hook_x", "batch pos channel", "value(xv)", f"{PAPER} (v)"),
        Point("hook_gate_pre", "batch pos channel", "gate(xg)", PAPER),
        *_DECAYED[version],
        *_SCANNED,
    )


def _mlp_rows(version: str) -> tuple[Point, ...]:
    return (
        Point("hook_shift", "batch pos d_model", "ln2.out[pos - 1], 0 from another document", SHIFT),
        Point("hook_xk", "batch pos d_model", _mixed("ln2", "k", version), SHIFT),
        Point("hook_xr", "batch pos d_model", _mixed("ln2", "r", version), SHIFT),
        Point("hook_k", "batch pos d_mlp", "key(xk)", PAPER),
        Point("hook_k_act", "batch pos d_mlp", "relu(k)^2", PAPER),
        Point("hook_kv", "batch pos d_model", "value(k_act)", PAPER),
        Point("hook_gate_pre", "batch pos d_model", "receptance(xr)", PAPER),
        Point("hook_gate", "batch pos d_model", "sigmoid(gate_pre)", PAPER),
    )


def _rows(version: str) -> dict[bool, tuple[Point, ...]]:
    """The rows of the first block, and of the others."""
    rows = residual_rows(
        SubRows(
            "mixer", block_rows("mixer", _mixer_rows(version)), "output(gated)", _layer_norm_rows("ln1", "mixer_in")
        ),
        SubRows("mlp", block_rows("mlp", _mlp_rows(version)), "mlp.kv * mlp.gate", _layer_norm_rows("ln2", "mlp_in")),
    )
    return {True: (*_layer_norm_rows("ln0", "embed"), replace(rows[0], equation="ln0.out"), *rows[1:]), False: rows}


ROWS = {version: _rows(version) for version in MIXES}


# -- the time mix ---------------------------------------------------------------------------------------------------


class Rwkv6Mixer(PathMixer):
    """The time mix, every intermediate a point."""

    selection = ("log_decay", "k", "r")

    def __init__(self, weights: Any, rows: tuple[Point, ...], layer: int, cfg: Rwkv6Config):
        super().__init__(weights, rows, layer)
        self.cfg = cfg

    @property
    def heads(self) -> int:
        return self.cfg.n_heads

    @property
    def path(self) -> tuple[Stage, ...]:  # type: ignore[override]
        norm = GroupNorm(self.heads, self.cfg.mixer_eps, name="ln_x", out="normed", centred=True)
        return Named("u"), Bonus((ScanBefore(),)), norm, Gate(F.silu)

    def by_head(self, x: Float[Tensor, "*any channel"]) -> Float[Tensor, "*any head state"]:
        return x.unflatten(-1, (self.heads, -1))

    def mixed(
        self, n: Float[Tensor, "batch pos d_model"], shift: Float[Tensor, "batch pos d_model"]
    ) -> dict[str, Float[Tensor, "batch pos d_model"]]:
        """What each projection reads: n and the position before, by shares that a low-rank map of both moves."""
        w = self.weights
        xx = self.hook_xx(torch.lerp(n, shift, w.time_maa_x))
        low = self.hook_mix_low(torch.tanh(xx @ w.time_maa_w1).unflatten(-1, (len(MIXES["rwkv6"]), -1)))
        moved = (low.transpose(1, 2).transpose(0, 1).flatten(1, 2) @ w.time_maa_w2).unflatten(1, n.shape[:2])
        return {
            m: self.fire(f"x{m}", n + (shift - n) * (getattr(w, f"time_maa_{m}") + more))
            for m, more in zip(MIXES["rwkv6"], moved, strict=True)
        }

    def log_decay(self, mixed: dict[str, Float[Tensor, "batch pos d_model"]]) -> Float[Tensor, "batch pos head state"]:
        """-exp(w), w of the token."""
        w = self.weights
        more = torch.tanh(mixed["w"] @ w.time_decay_w1) @ w.time_decay_w2
        w_pre = self.hook_w_pre(self.by_head(at_least_float32(w.time_decay) + at_least_float32(more)))
        return -torch.exp(w_pre)

    def project(self, n: Float[Tensor, "batch pos d_model"], run: Run) -> Streams:
        w, zero = self.weights, run.padding.zero
        n = n.to(w.key.weight.dtype)
        mixed = self.mixed(n, self.hook_shift(self.shifted(n, run, "shift")))
        # 0 at a masked position, also after a hook: nothing is written, and the state passes unchanged
        r = self.hook_r(self.by_head(F.linear(mixed["r"], w.receptance.weight)))
        k = zero(self.hook_k(zero(self.by_head(F.linear(mixed["k"], w.key.weight)))))
        x = self.hook_x(zero(F.linear(mixed["v"], w.value.weight)))
        gate = self.hook_gate_pre(F.linear(mixed["g"], w.gate.weight))
        log_decay = zero(self.hook_log_decay(zero(self.log_decay(mixed))))
        return {"r": r, "k": k, "x": x, "gate_pre": gate, "log_decay": log_decay}

    def select(self, u: Content, streams: Streams, run: Run) -> None:
        streams["bonus"] = self.hook_bonus((streams["r"] * streams["k"] * self.weights.time_faaaa).sum(-1))

    def terms(  # type: ignore[override]
        self,
        log_decay: Float[Tensor, "batch pos head state"],
        k: Float[Tensor, "batch pos head state"],
        r: Float[Tensor, "batch pos head state"],
    ) -> Terms:
        return Terms(log_decay, key=k, read=r)

    def output_weights(self) -> tuple[Float[Tensor, "d_model channel"], Float[Tensor, " d_model"] | None]:
        return self.weights.output.weight, None

    def named_weights(self) -> dict[str, Tensor]:
        w = self.weights
        read = {**linear("in", w.value), **linear("K", w.key), **linear("R", w.receptance), **linear("gate", w.gate)}
        return {**read, **super().named_weights()}


class Rwkv5Mixer(Rwkv6Mixer):
    """The same with shares and decays that do not depend on the token."""

    def mixed(
        self, n: Float[Tensor, "batch pos d_model"], shift: Float[Tensor, "batch pos d_model"]
    ) -> dict[str, Float[Tensor, "batch pos d_model"]]:
        shares = {m: getattr(self.weights, f"time_mix_{m}") for m in MIXES["rwkv5"]}
        return {m: self.fire(f"x{m}", torch.lerp(shift, n, share)) for m, share in shares.items()}

    def log_decay(self, mixed: dict[str, Float[Tensor, "batch pos d_model"]]) -> Float[Tensor, "batch pos head state"]:
        """-exp(time_decay)"""
        decay = -torch.exp(at_least_float32(self.weights.time_decay))
        return decay.expand(*mixed["k"].shape[:2], -1, -1)


class Rwkv6Mlp(TokenMixing):
    """The channel mix, every intermediate a point."""

    def __init__(self, weights: Any, rows: tuple[Point, ...], layer: int, version: str):
        super().__init__(weights, rows, layer)
        self.version = version

    def mix(self, m: Tensor, shift: Tensor, name: str) -> Float[Tensor, "batch pos d_model"]:
        """m mixed with the position before: RWKV-5 keeps the share of m, RWKV-6 that of the position before."""
        if self.version == "rwkv5":
            return torch.lerp(shift, m, getattr(self.weights, f"time_mix_{name}"))
        return torch.lerp(m, shift, getattr(self.weights, f"time_maa_{name}"))

    def forward(self, m: Float[Tensor, "batch pos d_model"], run: Run) -> Float[Tensor, "batch pos d_model"]:
        w = self.weights
        m = m.to(w.key.weight.dtype)
        shift = self.hook_shift(self.shifted(m, run, "mlp_shift"))
        xk, xr = self.hook_xk(self.mix(m, shift, "k")), self.hook_xr(self.mix(m, shift, "r"))
        k_act = self.hook_k_act(torch.relu(self.hook_k(F.linear(xk, w.key.weight))).square())
        kv = self.hook_kv(F.linear(k_act, w.value.weight))
        gate = self.hook_gate(torch.sigmoid(self.hook_gate_pre(F.linear(xr, w.receptance.weight))))
        return kv * gate

    def named_weights(self) -> dict[str, Tensor]:
        w = self.weights
        return {**linear("in", w.key), **linear("gate", w.receptance), **linear("out", w.value)}


# -- the model ------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Rwkv6Config(HookedConfig):
    """cfg of RWKV-5 and RWKV-6 (`version`). `n_heads` heads of `d_head` values and as many keys; `mixer_eps`: of the norm behind
    the scan; `d_low`: the rank of what moves the shares, 0 in RWKV-5."""

    version: str = "rwkv6"
    d_low: int = 0
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
        mixes = {"mix": len(MIXES["rwkv6"]), "low": self.d_low}
        return {**super().sizes, **heads, **mixes, "d_mlp": self.d_mlp or 0}


class HookedRWKV6(NormedStream):
    """`gl.from_pretrained("RWKV-x060-World-1B6-v2.1-20240328-ctx4096.pth")`: RWKV-6 or RWKV-5, every intermediate a hook point.

    A position reads the state that the position before has left: an edit of hook_state is read one position later. Documents
    packed in a row, told apart by `position_ids`, are as if each stood alone. Of RWKV-5 the version 5.2 is meant, with a decay
    for each number of a key (files named RWKV-5-World...-v2).
    """

    title = "RWKV-6"
    paper = "Peng et al., Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence (arXiv 2404.05892)"
    reference = (
        "RWKV-x060-World-1B6",
        {"d_model": 2048, "channel": 2048, "head": 32, "value": 64, "state": 64, "mix": 5, "low": 32, "d_mlp": 7168},
    )
    recurrence: ClassVar = {
        "decay": "exp(log_decay), [head, state]; the same at each position in RWKV-5",
        "write": "u * k, [head, value, state]",
        "read": "r, [head, state], of the state before the position's own step",
        "skip": "bonus * u",
        "conv": "none; token shift on the inputs of all projections",
        "activation before the scan": "none",
        "gate": "a LayerNorm by head, then SiLU(gate_pre)",
    }
    attention_words: ClassVar = {
        "x": "x (v in the paper) less its mean over the head",
        "o": "gated",
        "gate": "gate * ln_x.weight / scale",
        "scan": "S[i, j] = sum over state of r[i] * exp(log_decay[j + 1] + ... + log_decay[i - 1]) * k[j], j < i, of each head; "
        "0 where a reset lies between, j < reset <= i",
        "skip": "bonus, a number a head and position",
        "act": "none",
        "conv": "none",
        "r": "gate * ln_x.bias; with a carried state also what it brings",
    }
    wraps = ("Rwkv6Weights",)
    layout = Rwkv6Layout()
    small = TINY
    block_points = ROWS["rwkv6"][False]
    final_points = _layer_norm_rows("ln_final", "blocks.-1.hook_resid_post")
    aliases = ALIASES
    has_positions = True
    carried: ClassVar = {
        "scan": Carried("scan", "batch head value state"),
        "shift": Carried("shift", "batch tail d_model"),
        "mlp_shift": Carried("mlp_shift", "batch tail d_model"),
    }
    cfg: Rwkv6Config

    @classmethod
    def describe(cls, wrapped: Wrapped, model_name: str) -> Rwkv6Config:
        """The cfg of a wrapped model, from the shapes of its parameters."""
        fields.check(wrapped.config, FIELDS, f"{model_name}'s config")
        if len(wrapped.blocks) == 0:
            raise CheckpointError(f"{model_name} has no layers.")
        first, weight, version = wrapped.blocks[0], wrapped.emb.weight, wrapped.config["model_type"]
        heads, size = first.att.time_faaaa.shape
        return Rwkv6Config(
            model_name=model_name,
            architecture="rwkv6",
            n_layers=len(wrapped.blocks),
            d_model=weight.shape[1],
            d_vocab=weight.shape[0],
            n_heads=heads,
            d_head=size,
            d_mlp=first.ffn.key.weight.shape[0],
            d_low=first.att.time_maa_w2.shape[1] if version == "rwkv6" else 0,
            attn_only=False,
            act_fn="relu2",
            normalization_type="LN",
            eps=eps_of(first.ln1, 1e-5),
            mixer_eps=eps_of(first.att.ln_x, 64e-5),
            dtype=first.att.key.weight.dtype,
            device=str(weight.device),
            original_architecture=type(wrapped).__name__,
            version=version,
            tie_word_embeddings=wrapped.head.weight is weight,
        )

    @classmethod
    def kinds(cls) -> dict[str, tuple[Point, ...]]:
        names = {"rwkv6": "RWKV-6", "rwkv5": "RWKV-5"}
        words = {True: "the first, with ln0", False: "all others"}
        return {f"{name}, {words[first]}": ROWS[version][first] for version, name in names.items() for first in words}

    def rows_for(self, layer: int) -> tuple[Point, ...]:
        return ROWS[self.cfg.version][layer == 0]

    def make_block(self, layer: int) -> Block:
        w, rows, cfg = self.wrapped.blocks[layer], self.rows_for(layer), self.cfg
        ln1, ln2 = (Norm(norm, rows_of(ln, rows), cfg.eps) for ln, norm in (("ln1", w.ln1), ("ln2", w.ln2)))
        kind = Rwkv5Mixer if cfg.version == "rwkv5" else Rwkv6Mixer
        mixer = kind(w.att, rows_of("mixer", rows), layer, cfg)
        mlp = Rwkv6Mlp(w.ffn, rows_of("mlp", rows), layer, cfg.version)
        block = Block(w, rows, Sub("mixer", mixer, ln1), Sub("mlp", mlp, ln2, ln="ln2"))
        if layer == 0:
            block.ln0 = Norm(w.ln0, rows_of("ln0", rows), cfg.eps)
        return block

    def make_final_norm(self, rows: tuple[Point, ...]) -> Norm:
        return Norm(self.wrapped.ln_out, rows, self.cfg.eps)

    @property
    def embedding(self) -> Any:
        return self.wrapped.emb

    @property
    def unembedding(self) -> Any:
        return self.wrapped.head


HOOKED = HookedRWKV6

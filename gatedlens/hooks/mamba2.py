"""Mamba-2 (Dao and Gu 2024, arXiv 2405.21060): state space duality; heads with matrix states, one decay a head.

b batch, l pos, d d_model, h head, v value (of a head), c channel = (head value), g group, n state, K taps of the conv.

    z, x, B, C, dt = in_proj(n)                   x, B, C through one causal conv, with SiLU: u, B, C
    dt      = clamp(softplus(dt + dt_bias))       A = -exp(A_log), a number a head
    state_t = exp(dt_t A) state_{t-1} + dt_t u_t B_t^T          scan_t = state_t C_t          B, C: a group of heads shares them
    y       = scan + D u                          out = out_proj(RMSNorm(y SiLU(z))), the norm by groups of channels

A checkpoint of mamba-ssm may have its norm before the gate, RMSNorm(y) SiLU(z), or none, and D by channel.

Wraps transformers' Mamba2ForCausalLM, mamba-ssm's MambaLMHeadModel (by its parameter names) and `Mamba2Weights` of
formats/mamba2_ssm.py, which holds a checkpoint in mamba-ssm's original layout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatedlens.address.point import Point, block_rows
from gatedlens.compat.names.mamba2 import ALIASES
from gatedlens.errors import CheckpointError
from gatedlens.formats.mamba2_ssm import TINY, Mamba2Ssm, told
from gatedlens.formats.mamba2_ssm import Mamba2Weights as Mamba2Weights  # where it was before
from gatedlens.formats.mamba_stack import MambaStack, StackConfig, has_matrix_states, is_hybrid
from gatedlens.formats.transformers_config import MAMBA2, config_of
from gatedlens.hooks.mamba import PAPER as MAMBA
from gatedlens.model.base import Wrapped
from gatedlens.model.block import Block, Sub, SubRows, residual_rows
from gatedlens.model.hookpoint import rows_of
from gatedlens.model.mixer import multiplied
from gatedlens.model.norm import NormOfNarrow, norm_rows
from gatedlens.model.path import PathMixer, Stage, Streams
from gatedlens.model.run import Run
from gatedlens.model.stages import Conv, Gate, GroupNorm, Scan, SiLU, Skip
from gatedlens.model.state import Carried
from gatedlens.model.weights import several
from gatedlens.recurrence.scanning import at_least_float32
from gatedlens.recurrence.terms import Terms

PAPER = "Mamba-2, arXiv 2405.21060"
BLOCK = f"{PAPER}, fig. 6 (parallel projections)"
SSD = f"{PAPER}, eq. 1, A a number a head"
RMSNORM = "RMSNorm, arXiv 1910.07467"
UIA = "UIA, arXiv 2405.16504"

NORMS = ("after the gate", "before the gate", "none")  # where a mixer's norm is

PARTS = ("[:channel]", "[channel:2 * channel]", ", the next group * state", ", the next group * state", "[-head:]")


def _projected(words: tuple[str, ...]) -> tuple[Point, ...]:
    """What in_proj gives: z, x, B, C and dt in words."""
    z, x, B, C, dt = words
    return (
        Point("hook_gate_pre", "batch pos channel", z, BLOCK),
        Point("hook_x", "batch pos channel", x, BLOCK),
        Point("hook_B_pre", "batch pos group state", B, BLOCK),
        Point("hook_C_pre", "batch pos group state", C, BLOCK),
        Point("hook_dt_pre", "batch pos head", f"{dt} + dt_bias", BLOCK),
    )


PLAIN = _projected(tuple(f"in_proj(ln1.out){part}" for part in PARTS))
MULTIPLIED = _projected(
    tuple(f"in_proj(ssm_in_multiplier * ln1.out){part} * ssm_multipliers[{i}]" for i, part in enumerate(PARTS))
)
_UP_TO_THE_SCAN = (
    Point(
        "hook_conv_taps",
        "batch pos channel tap",
        "conv1d.weight[tap] * x[pos - (tap.size - 1) + tap], 0 from another document",
        f"{UIA}, eq. 9",
        True,
    ),
    *(
        Point(
            f"hook_{name}_conv_taps",
            "batch pos group state tap",
            f"conv1d.weight[tap] * {name}_pre[pos - (tap.size - 1) + tap], 0 from another document",
            BLOCK,
            True,
        )
        for name in "BC"
    ),
    Point("hook_conv", "batch pos channel", "sum over tap of conv_taps + conv1d.bias", BLOCK),
    Point("hook_B_conv", "batch pos group state", "sum over tap of B_conv_taps + conv1d.bias", BLOCK),
    Point("hook_C_conv", "batch pos group state", "sum over tap of C_conv_taps + conv1d.bias", BLOCK),
    Point("hook_u", "batch pos channel", "SiLU(conv)", BLOCK),
    Point("hook_B", "batch pos group state", "SiLU(B_conv)", BLOCK),
    Point("hook_C", "batch pos group state", "SiLU(C_conv)", BLOCK),
    Point("hook_dt", "batch pos head", "clamp(softplus(dt_pre))", BLOCK),
    Point("hook_reset", "batch pos one", "1 where a document begins (position 0 of position_ids), else 0", SSD),
    Point(
        "hook_state_start",
        "batch head value state",
        "state before the first position (zero without a state)",
        SSD,
        True,
    ),
    Point(
        "hook_decay", "batch pos head value state", "exp(dt * A) * (1 - reset), the same for all of a head", SSD, True
    ),
    Point("hook_write", "batch pos head value state", "dt * u * B", SSD, True),
    Point("hook_state", "batch pos head value state", "decay * state[pos - 1] + write", SSD, True),
    Point("hook_scan", "batch pos channel", "sum over state of C * state", SSD),
    Point("hook_y", "batch pos channel", "scan + D * u", f"{MAMBA}, alg. 2"),
)
_GATE = Point("hook_gate", "batch pos channel", "SiLU(gate_pre)", BLOCK)
_AFTER_THE_SCAN = {
    "after the gate": (
        _GATE,
        Point("hook_product", "batch pos channel", "y * gate", BLOCK),
        Point("hook_scale", "batch pos group", "sqrt(mean over the group's channels of product^2 + eps)", RMSNORM),
        Point("hook_gated", "batch pos channel", "norm.weight * product / scale", BLOCK),
    ),
    "before the gate": (
        Point("hook_scale", "batch pos group", "sqrt(mean over the group's channels of y^2 + eps)", RMSNORM),
        Point("hook_normed", "batch pos channel", "norm.weight * y / scale", RMSNORM),
        _GATE,
        Point("hook_gated", "batch pos channel", "normed * gate", BLOCK),
    ),
    "none": (_GATE, Point("hook_gated", "batch pos channel", "y * gate", BLOCK)),
}


def mixer_rows(norm: str = "after the gate", projected: tuple[Point, ...] = PLAIN) -> tuple[Point, ...]:
    """The rows of a mixer, in firing order, for each place of the norm; `projected`: those of what in_proj gives."""
    return *projected, *_UP_TO_THE_SCAN, *_AFTER_THE_SCAN[norm]


def mamba2_rows(norm: str = "after the gate") -> tuple[Point, ...]:
    """The rows of a block, in firing order, for each place of the norm."""
    mixer = block_rows("mixer", mixer_rows(norm))
    return residual_rows(SubRows("mixer", mixer, "out_proj(gated)", norm_rows("ln1", "mixer_in", RMSNORM)))


BLOCK_ROWS = mamba2_rows()


@dataclass(frozen=True)
class Mamba2Shape:
    """`Mamba2Shape.of(mixer, config)`: what a mixer is beside its parameters.

    norm: where it is, one of NORMS. input, output: what the mixer multiplies its input and its output by. beside: how many
    channels stand in its projections before its own, which no state passes (mamba-ssm's d_ssm below expand * d_model).
    """

    n_heads: int
    d_inner: int
    d_state: int
    n_groups: int
    dt_limit: tuple[float, float] = (0.0, math.inf)
    norm: str = "after the gate"
    eps: float = 1e-5
    input: float = 1.0
    output: float = 1.0
    beside: int = 0

    @staticmethod
    def of(mixer: Any, given: Mapping[str, Any]) -> Mamba2Shape:
        """By the shapes of its parameters, and by what it or the config (`given`) says."""
        own, beside = told(mixer, given), beside_of(mixer)
        inner, groups = mixer.out_proj.weight.shape[1] - beside, int(own["n_groups"])
        d_state = (mixer.conv1d.weight.shape[0] - inner) // (2 * groups)
        limits = own["dt_limit"], own["norm"], own["eps"]
        return Mamba2Shape(len(mixer.A_log), inner, d_state, groups, *limits, beside=beside)

    @property
    def widths(self) -> tuple[int, ...]:
        """How in_proj is laid out: z, x, B, C, dt."""
        shared = self.n_groups * self.d_state
        return self.d_inner, self.d_inner, shared, shared, self.n_heads

    def check(self, mixer: Any, model_name: str) -> None:
        """CheckpointError for a mixer that is laid out otherwise."""
        rows, found = 2 * self.beside + sum(self.widths), mixer.in_proj.weight.shape[0]
        if found != rows or self.d_inner % self.n_heads or self.beside < 0:
            raise CheckpointError(
                f"{model_name}: in_proj gives {found} numbers a position; {rows} are expected of {self.d_inner} channels in "
                f"{self.n_heads} heads with {self.n_groups} groups of {self.d_state} states."
            )


def beside_of(mixer: Any) -> int:
    """How many channels stand beside those of the heads: in_proj gives 2 beside + inner + conv + heads, out_proj reads
    beside + inner."""
    rows, read = mixer.in_proj.weight.shape[0], mixer.out_proj.weight.shape[1]
    return int(rows - mixer.conv1d.weight.shape[0] - len(mixer.A_log) - read)


class Mamba2Mixer(PathMixer):
    """out = out_proj(gated), every intermediate a point."""

    selection = ("dt", "B", "C")

    def __init__(self, weights: Any, rows: tuple[Point, ...], layer: int, shape: Mamba2Shape):
        super().__init__(weights, rows, layer)
        self.shape = shape

    @property
    def heads(self) -> int:
        return self.shape.n_heads

    @property
    def sizes(self) -> Mapping[str, int]:  # type: ignore[override]
        """Of the streams that go through the convolution."""
        return dict(zip("xBC", self.shape.widths[1:4], strict=True))

    @property
    def path(self) -> tuple[Stage, ...]:  # type: ignore[override]
        before = (Conv("conv1d", ("x", "B", "C")), SiLU(("B", "C")), Skip(Scan()))
        groups, eps = self.shape.n_groups, self.shape.eps
        if self.shape.norm == "none":
            return *before, Gate(F.silu)
        if self.shape.norm == "before the gate":
            return *before, GroupNorm(groups, eps, out="normed"), Gate(F.silu)
        return *before, Gate(F.silu, out="product"), GroupNorm(groups, eps)

    @property
    def A(self) -> Float[Tensor, " head"]:  # type: ignore[override]
        """-exp(A_log), at least float32."""
        return -torch.exp(at_least_float32(self.weights.A_log))

    def projected(self, n: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos some"]:
        """What in_proj gives: z, x, B, C and dt side by side."""
        return F.linear(multiplied(n, self.shape.input), *self.in_proj())

    def in_proj(self) -> tuple[Float[Tensor, "some d_model"], Float[Tensor, " some"] | None]:
        """(W, b) of in_proj, but for the channels beside the heads, which stand in front."""
        w, first = self.weights.in_proj, 2 * self.shape.beside
        return (w.weight[first:], None if w.bias is None else w.bias[first:]) if first else (w.weight, w.bias)

    def project(self, n: Float[Tensor, "batch pos d_model"], run: Run) -> Streams:
        w, pad, groups = self.weights, run.padding, (self.shape.n_groups, self.shape.d_state)
        z, x, B, C, dt = self.projected(n).split(self.shape.widths, dim=-1)
        return {
            "gate_pre": self.hook_gate_pre(z),
            "x": self.hook_x(pad.zero(x)),
            "B": pad.zero(self.hook_B_pre(pad.zero(B).unflatten(-1, groups))),
            "C": pad.zero(self.hook_C_pre(pad.zero(C).unflatten(-1, groups))),
            "dt_pre": self.hook_dt_pre(dt + w.dt_bias),
        }

    def select(self, u: Float[Tensor, "batch pos channel"], streams: Streams, run: Run) -> None:
        pad = run.padding
        streams["B"] = self.hook_B(streams["B"])
        streams["C"] = self.hook_C(streams["C"])
        # 0 at a masked position: the state passes unchanged
        dt = pad.zero(F.softplus(streams["dt_pre"]).clamp(*self.shape.dt_limit))
        streams["dt"] = pad.zero(self.hook_dt(dt))

    def terms(  # type: ignore[override]
        self,
        dt: Float[Tensor, "batch pos head"],
        B: Float[Tensor, "batch pos group state"],
        C: Float[Tensor, "batch pos group state"],
    ) -> Terms:
        """decay = exp(dt A), value = dt u, key = B, read = C: Mamba-2, eq. 1."""
        return Terms((dt * self.A.to(dt)).unsqueeze(-1), key=B, read=C, amount=dt)

    def forward(self, n: Float[Tensor, "batch pos d_model"], run: Run) -> Float[Tensor, "batch pos d_model"]:
        out, first = self.weights.out_proj, self.shape.beside
        weight = out.weight[:, first:] if first else out.weight
        return multiplied(F.linear(self.walk(self.project(n, run), run), weight, out.bias), self.shape.output)

    def output_weights(self) -> tuple[Float[Tensor, "d_model channel"], Float[Tensor, " d_model"] | None]:
        out, by, first = self.weights.out_proj, self.shape.output, self.shape.beside
        weight = out.weight[:, first:] if first else out.weight
        return multiplied(weight, by), None if out.bias is None else multiplied(out.bias, by)

    def read_with(self) -> tuple[Float[Tensor, "some d_model"], Float[Tensor, " some"] | None]:
        """(W, b) of in_proj, with what its input is multiplied by."""
        weight, bias = self.in_proj()
        return multiplied(weight, self.shape.input), bias

    def named_weights(self) -> dict[str, Tensor]:
        words, w = ("gate", "in", "B", "C", "dt"), self.weights
        read = several(*self.read_with(), dict(zip(words, self.shape.widths, strict=True)))
        read["b_dt"] = w.dt_bias + read["b_dt"] if "b_dt" in read else w.dt_bias
        return {**read, "A": self.A, **super().named_weights()}


# -- the model ------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Mamba2Config(StackConfig):
    """cfg of Mamba-2. n_heads heads of d_head channels; `mixer_norm`: "after the gate", "before the gate" or "none"."""

    n_groups: int
    dt_limit: tuple[float, float] = (0.0, math.inf)
    mixer_norm: str = "after the gate"
    mixer_eps: float = 1e-5

    @property
    def sizes(self) -> dict[str, int]:
        heads = {"channel": self.d_inner, "head": self.n_heads, "value": self.d_head, "group": self.n_groups}
        return {**super().sizes, **heads, "state": self.d_state, "tap": self.d_conv}


class HookedMamba2(MambaStack):
    """`HookedMamba2(Mamba2ForCausalLM(...))`, or better `gl.wrap(...)`: Mamba-2 with every intermediate a hook point.

    Documents packed in a row, told apart by `position_ids`, are as if each stood alone: conv and state begin anew at position 0.
    The norm inside a mixer goes by groups, as in mamba-ssm. (Some versions of transformers, 5.12 among them, take all channels
    together where there are several groups, limit no time step while decoding, and let padding into the state.)
    """

    title = "Mamba-2"
    paper = (
        "Dao and Gu, Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space "
        "Duality (arXiv 2405.21060)"
    )
    reference = (
        "state-spaces/mamba2-130m",
        {"d_model": 768, "channel": 1536, "head": 24, "value": 64, "state": 128, "group": 1, "tap": 4},
    )
    recurrence: ClassVar = {
        "decay": "exp(dt * A), [head]",
        "write": "dt * u * B, [head, value, state]; the heads of a group share B",
        "read": "C, [group, state]",
        "skip": "D * u",
        "conv": "causal depthwise conv over x, B and C, with bias",
        "activation before the scan": "SiLU: u = sigmoid(c) * c",
        "gate": "SiLU(gate_pre), then an RMSNorm of the product by groups (or before it, or none)",
    }
    attention_words: ClassVar = {
        "x": "x",
        "o": "gated",
        "gate": "gate * norm.weight / scale",
        "scan": "S[i, j] = sum over state of C[i] * B[j] * exp(A * (dt[j + 1] + ... + dt[i])) * dt[j], j <= i, of each head; "
        "0 where a reset lies between, j < reset <= i",
        "skip": "D",
        "act": "sigmoid(conv): u = act * conv",
        "conv": "M[i, j] = conv1d.weight[K - 1 - (i - j)], 0 <= i - j < K taps, within a document",
        "r": "gate * (S + D) * act * conv1d.bias; with a carried state also what its conv tail and its scan state bring",
    }
    wraps = ("Mamba2ForCausalLM", "MambaLMHeadModel", "Mamba2Weights")
    hub_types = ("mamba2",)
    hub_fields = MAMBA2
    layout = Mamba2Ssm()
    small = TINY
    block_points = BLOCK_ROWS
    aliases = ALIASES
    has_positions = True
    carried: ClassVar = {
        "scan": Carried("scan", "batch head value state"),
        "conv": Carried("conv", "batch tail conv_channel"),
    }
    cfg: Mamba2Config

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return has_matrix_states(module) and not is_hybrid(module)

    @classmethod
    def describe(cls, wrapped: Wrapped, model_name: str) -> Mamba2Config:
        """The cfg of a wrapped model, from the shapes of its parameters and the few numbers that shapes do not tell."""
        given = cls.told(wrapped, model_name)
        for number, layer in enumerate(wrapped.backbone.layers):
            A_log = getattr(layer.mixer, "A_log", None)
            if not isinstance(A_log, Tensor) or A_log.ndim != 1:
                raise CheckpointError(f"Layer {number} of {model_name} is no Mamba-2 mixer: its A_log must be [head].")
        cls.check_activation(wrapped, given, model_name)
        mixer = wrapped.backbone.layers[0].mixer
        shape = Mamba2Shape.of(mixer, given)
        shape.check(mixer, model_name)
        return Mamba2Config(
            **cls.shared(wrapped, given, shape.d_inner),
            model_name=model_name,
            architecture="mamba2",
            n_heads=shape.n_heads,
            d_head=shape.d_inner // shape.n_heads,
            d_state=shape.d_state,
            n_groups=shape.n_groups,
            dt_limit=shape.dt_limit,
            mixer_norm=shape.norm,
            mixer_eps=shape.eps,
        )

    @classmethod
    def kinds(cls) -> dict[str, tuple[Point, ...]]:
        return {f"norm {where}" if where != "none" else "no norm": mamba2_rows(where) for where in NORMS}

    def rows_for(self, layer: int) -> tuple[Point, ...]:
        return mamba2_rows(self.cfg.mixer_norm)

    def make_block(self, layer: int) -> Block:
        w, cfg, rows = self.wrapped.backbone.layers[layer], self.cfg, self.rows_for(layer)
        ln1 = NormOfNarrow(w.norm, rows_of("ln1", rows), cfg.eps, centred=cfg.normalization_type == "LN")
        shape = Mamba2Shape.of(w.mixer, config_of(self.wrapped))
        return Block(w, rows, Sub("mixer", Mamba2Mixer(w.mixer, rows_of("mixer", rows), layer, shape), ln1))


HOOKED = HookedMamba2

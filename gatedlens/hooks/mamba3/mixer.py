"""Mamba-3's mixer: its points, its projections and what its recurrence is made of; the stages are in stages.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatedlens.address.point import Point
from gatedlens.errors import CheckpointError
from gatedlens.formats.mamba3_ssm import HEAVY_TAIL, told
from gatedlens.hooks.mamba3.stages import Mixed, RankGate, Spread, TwoTermScan
from gatedlens.model.hookpoint import rows_of
from gatedlens.model.norm import Norm, eps_of, norm_rows
from gatedlens.model.path import PathMixer, Stage, Streams
from gatedlens.model.run import Run
from gatedlens.model.stages import Gate, GroupNorm, Real
from gatedlens.model.weights import several
from gatedlens.parts.activation import wide_silu
from gatedlens.recurrence.scanning import at_least_float32, linear_scan
from gatedlens.recurrence.two_terms import TwoTerms, following

PAPER = "Mamba-3, arXiv 2603.15569"
CODE = "mamba-ssm, modules/mamba3.py"
RMSNORM = "RMSNorm, arXiv 1910.07467"
WORDS = ("gate", "in", "B", "C", "dt", "A", "lambda", "angle")  # what in_proj gives, side by side

F_OF_A = "f the softplus; or 1 + A_pre above 0, 1 / (1 - A_pre) below"

_KEYS, _TURNED, _WHOLE = "batch pos group state", "batch pos head state", "batch pos head value state"
_SCAN_ROWS = (
    Point("hook_reset", "batch pos one", "1 where a document begins (position 0 of position_ids), else 0", PAPER),
    Point("hook_state_start", "batch head value state", "state before the first position (zero without a state)", PAPER, True),
    Point("hook_decay", _WHOLE, "exp(log_decay) * (1 - reset), the same for all of a head", PAPER, True),
    Point("hook_write", _WHOLE, "gamma * u * rot_B + exp(log_decay) * (1 - reset) * beta * (u * rot_B)[pos - 1]", PAPER, True),
    Point("hook_state", _WHOLE, "decay * state[pos - 1] + write", PAPER, True),
    Point("hook_scan", "batch pos channel", "sum over state of rot_C * state", PAPER),
    Point("hook_y", "batch pos channel", "scan + D * u", CODE),
)  # fmt: skip
ROWS = (
    Point("hook_gate_pre", "batch pos channel", "in_proj(ln1.out), the first channels", CODE),
    Point("hook_x", "batch pos channel", "in_proj(ln1.out), the next channels", CODE),
    Point("hook_B_pre", _KEYS, "in_proj(ln1.out), the next group * state", CODE),
    Point("hook_C_pre", _KEYS, "in_proj(ln1.out), the next group * state", CODE),
    Point("hook_dt_pre", "batch pos head", "in_proj(ln1.out), the next heads + dt_bias", CODE),
    Point("hook_A_pre", "batch pos head", "in_proj(ln1.out), the next heads", CODE),
    Point("hook_lambda_pre", "batch pos head", "in_proj(ln1.out), the next heads", CODE),
    Point("hook_angle_pre", "batch pos angle", "in_proj(ln1.out), the last angles, the same for all heads", CODE),
    Point("hook_u", "batch pos channel", "x", PAPER),
    Point("hook_dt", "batch pos head", "softplus(dt_pre)", PAPER),
    Point("hook_A", "batch pos head", f"min(-f(A_pre), -A_floor), {F_OF_A}", CODE),
    Point("hook_log_decay", "batch pos head", "dt * A", PAPER),
    Point("hook_lambda", "batch pos head", "sigmoid(lambda_pre)", PAPER),
    Point("hook_gamma", "batch pos head", "lambda * dt", PAPER),
    Point("hook_beta", "batch pos head", "(1 - lambda) * dt", PAPER),
    Point("hook_turn", "batch pos head angle", "tanh(angle_pre) * pi * dt", CODE),
    Point("hook_angle", "batch pos head angle", "sum of turn up to pos, from the document's beginning, modulo 2 pi", PAPER),
    *norm_rows("B_norm", "B_pre", RMSNORM, axes=_KEYS),
    *norm_rows("C_norm", "C_pre", RMSNORM, axes=_KEYS),
    Point("hook_rot_B", _TURNED, "B_norm.out + B_bias, a pair of states turned by each angle", PAPER),
    Point("hook_rot_C", _TURNED, "C_norm.out + C_bias, turned likewise", PAPER),
    *_SCAN_ROWS,
)  # fmt: skip
_GATE = Point("hook_gate", "batch pos channel", "SiLU(gate_pre)", CODE)
AFTER = {
    "": (_GATE, Point("hook_gated", "batch pos channel", "y * gate", CODE)),
    "norm before the gate": (
        Point("hook_scale", "batch pos head", "sqrt(mean over the head's channels of y^2 + eps)", RMSNORM),
        Point("hook_normed", "batch pos channel", "norm.weight * y / scale", RMSNORM),
        _GATE,
        Point("hook_gated", "batch pos channel", "normed * gate", CODE),
    ),
    "MIMO": (
        replace(_GATE, equation="SiLU(mimo_z * gate_pre)"),
        Point("hook_product", "batch pos channel", "y * gate", CODE),
        Point("hook_gated", "batch pos channel", "sum over rank of mimo_o * product", CODE),
    ),
}
OF_RANKS = {  # in words that differ where a step writes and reads several times; and which rows are of each time
    "hook_u": "mimo_x * x",
    "hook_write": "sum over rank of gamma * u * rot_B + exp(log_decay) * (1 - reset) * beta * (u * rot_B)[pos - 1]",
}
RANKED = ("B_", "C_", "hook_B_", "hook_C_", "hook_rot", "hook_u", "hook_scan", "hook_y", "hook_gate", "hook_product")


def mixer_rows(kind: str = "") -> tuple[Point, ...]:
    """The rows of a mixer, in firing order, for each key of AFTER."""
    rows = (*ROWS, *AFTER[kind])
    if kind != "MIMO":
        return rows
    rows = tuple(replace(row, equation=OF_RANKS.get(row.name, row.equation)) for row in rows)
    plain = ("hook_gate_pre", "hook_gated")
    return tuple(
        replace(row, axes=row.axes.replace("batch pos", "batch pos rank"))
        if row.name.startswith(RANKED) and row.name not in plain
        else row
        for row in rows
    )


@dataclass(frozen=True)
class Mamba3Shape:
    """`Mamba3Shape.of(mixer, config, "mine")`: what a mixer is beside its parameters. kind: a key of AFTER."""

    n_heads: int
    d_inner: int
    d_state: int
    n_groups: int
    n_angles: int
    A_floor: float
    A_activation: str
    n_ranks: int = 1
    kind: str = ""

    @staticmethod
    def of(mixer: Any, given: Mapping[str, Any], model_name: str) -> Mamba3Shape:
        """By the shapes of its parameters, and by what it or the config (`given`) says. CheckpointError for what does not fit."""
        (heads, ranks, states), inner = mixer.B_bias.shape, mixer.out_proj.weight.shape[1]
        own, found = told(mixer, given, model_name), mixer.in_proj.weight.shape[0]
        angles = found - 2 * inner - 2 * ranks * own["n_groups"] * states - 3 * heads
        if inner % heads or heads % own["n_groups"] or angles not in (states // 4, states // 2) or angles < 1:
            raise CheckpointError(
                f"{model_name}: in_proj gives {found} numbers a position; of {inner} channels in {heads} heads with "
                f"{own['n_groups']} groups of {states} states, of rank {ranks}, they leave {angles} for angles; expected are "
                f"{states // 4} or {states // 2}, a half of the states' pairs or all."
            )
        mimo, normed = "mimo_x" in mixer._parameters, mixer._modules.get("norm") is not None
        if mimo and normed:
            raise CheckpointError(f"{model_name} is MIMO with is_outproj_norm: gatedlens opens MIMO without that norm.")
        kind = "MIMO" if mimo else "norm before the gate" if normed else ""
        return Mamba3Shape(heads, inner, states, n_angles=angles, n_ranks=ranks, kind=kind, **own)

    @property
    def widths(self) -> tuple[int, ...]:
        """How in_proj is laid out, as WORDS."""
        shared = self.n_ranks * self.n_groups * self.d_state
        return self.d_inner, self.d_inner, shared, shared, *(self.n_heads,) * 3, self.n_angles


class Mamba3Mixer(PathMixer):
    """out = out_proj(gated), every intermediate a point."""

    selection: ClassVar = ("log_decay", "gamma", "beta", "rot_B", "rot_C")

    def __init__(self, weights: Any, rows: tuple[Point, ...], layer: int, shape: Mamba3Shape):
        super().__init__(weights, rows, layer)
        self.shape = shape
        self.B_norm = Norm(weights.B_norm, rows_of("B_norm", rows), 1e-5)
        self.C_norm = Norm(weights.C_norm, rows_of("C_norm", rows), 1e-5)

    @property
    def heads(self) -> int:
        return self.shape.n_heads

    @property
    def path(self) -> tuple[Stage, ...]:  # type: ignore[override]
        if self.shape.kind == "MIMO":
            return Spread("mimo_x"), TwoTermScan(), RankGate("mimo_z"), Mixed("mimo_o", "mimo_x")
        if self.shape.kind == "":
            return Real("u"), TwoTermScan(), Gate(wide_silu)
        norm = GroupNorm(self.heads, eps_of(self.weights.norm, 1e-5), out="normed")
        return Real("u"), TwoTermScan(), norm, Gate(wide_silu)

    def project(self, n: Float[Tensor, "batch pos d_model"], run: Run) -> Streams:
        w, shape, zero = self.weights, self.shape, run.padding.zero
        z, x, B, C, dt, A, lam, angle = F.linear(n, w.in_proj.weight, w.in_proj.bias).split(shape.widths, dim=-1)
        ranks = (shape.n_ranks,) if shape.kind == "MIMO" else ()
        laid_out = (*ranks, shape.n_groups, shape.d_state)
        return {
            "gate_pre": self.hook_gate_pre(z),
            "x": self.hook_x(zero(x)),
            "B": zero(self.hook_B_pre(zero(B).unflatten(-1, laid_out))),
            "C": zero(self.hook_C_pre(zero(C).unflatten(-1, laid_out))),
            "dt_pre": self.hook_dt_pre(dt + w.dt_bias),
            "A_pre": self.hook_A_pre(A),
            "lambda_pre": self.hook_lambda_pre(lam),
            "angle_pre": self.hook_angle_pre(angle),
        }

    def select(self, u: Float[Tensor, "batch pos *rank channel"], streams: Streams, run: Run) -> None:
        zero, w = run.padding.zero, self.weights
        wide = {name: at_least_float32(streams[f"{name}_pre"]) for name in ("dt", "A", "lambda", "angle")}
        dt = zero(self.hook_dt(zero(F.softplus(wide["dt"]))))  # 0 at a masked position: the state passes unchanged
        A = self.hook_A((-self.rate(wide["A"])).clamp(max=-self.shape.A_floor))
        log_decay = zero(self.hook_log_decay(zero(dt * A)))
        share = self.hook_lambda(torch.sigmoid(wide["lambda"]))
        gamma = zero(self.hook_gamma(zero(share * dt)))
        beta = zero(self.hook_beta(zero((1 - share) * dt)))
        turn = zero(self.hook_turn(zero((torch.tanh(wide["angle"]) * math.pi).unsqueeze(-2) * dt.unsqueeze(-1))))
        angle = zero(self.hook_angle(self.summed(turn, run)))
        B, C = self.B_norm(streams["B"]), self.C_norm(streams["C"])
        rot_B = zero(self.hook_rot_B(self.turned(B, w.B_bias, angle)))
        rot_C = zero(self.hook_rot_C(self.turned(C, w.C_bias, angle)))
        streams |= {"log_decay": log_decay, "gamma": gamma, "beta": beta, "rot_B": rot_B, "rot_C": rot_C}

    def rate(self, A_pre: Float[Tensor, "batch pos head"]) -> Float[Tensor, "batch pos head"]:
        """-A, before its floor."""
        if self.shape.A_activation == HEAVY_TAIL:
            return A_pre.clamp(min=0) + (1 - A_pre.clamp(max=0)).reciprocal()
        return F.softplus(A_pre)

    def summed(self, turn: Float[Tensor, "batch pos head angle"], run: Run) -> Float[Tensor, "batch pos head angle"]:
        """The angles: the sum of the turns since the document's beginning, summed in float64, modulo 2 pi."""
        exact, begun = turn.double().flatten(2), run.resets(turn)
        start = run.start("angle", self.layer, (len(turn), *turn.shape[2:]), exact).flatten(1)
        if begun is None:
            total = (exact.cumsum(1) + start.unsqueeze(1)).view_as(turn)
        else:  # no difference of two sums: nothing of one document is in the next, nor in its gradient
            kept = (1 - begun.to(exact)).expand_as(exact)
            total = linear_scan(kept, exact, start).view_as(turn)
        angle = (total - 2 * math.pi * torch.floor(total / (2 * math.pi))).to(turn.dtype)
        run.leave("angle", self.layer, angle[:, -1])
        return angle

    def turned(
        self,
        x: Float[Tensor, "batch pos *rank group state"],
        bias: Float[Tensor, "head rank state"],
        angle: Float[Tensor, "batch pos head angle"],
    ) -> Float[Tensor, "batch pos *rank head state"]:
        """x + bias of each head, pairs of states turned: neighbours, or in MIMO those that are half the states apart."""
        wide = at_least_float32(x).repeat_interleave(self.heads // self.shape.n_groups, dim=-2)
        own = at_least_float32(bias).transpose(0, 1)
        wide = wide + (own if self.shape.kind == "MIMO" else own[0])
        angle = F.pad(angle, (0, self.shape.d_state // 2 - self.shape.n_angles))
        if self.shape.kind == "MIMO":
            cos, sin, (a, b) = torch.cos(angle).unsqueeze(2), torch.sin(angle).unsqueeze(2), wide.chunk(2, dim=-1)
            return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
        cos, sin, (a, b) = torch.cos(angle), torch.sin(angle), wide.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)

    def terms(  # type: ignore[override]
        self,
        log_decay: Float[Tensor, "batch pos head"],
        gamma: Float[Tensor, "batch pos head"],
        beta: Float[Tensor, "batch pos head"],
        rot_B: Float[Tensor, "batch pos *rank head state"],
        rot_C: Float[Tensor, "batch pos *rank head state"],
    ) -> TwoTerms:
        """What a step writes beside its own is the step before's, decayed with the state; positions packed."""
        key, read = (x if x.ndim == 5 else x.unsqueeze(2) for x in (rot_B, rot_C))
        return TwoTerms(log_decay, gamma, beta, following(beta), key, read)

    def output_weights(self) -> tuple[Float[Tensor, "d_model channel"], Float[Tensor, " d_model"] | None]:
        return self.weights.out_proj.weight, self.weights.out_proj.bias

    def named_weights(self) -> dict[str, Tensor]:
        w = self.weights
        read = several(w.in_proj.weight, w.in_proj.bias, dict(zip(WORDS, self.shape.widths, strict=True)))
        return {**read, "b_dt": w.dt_bias, "D": w.D, **super().named_weights()}

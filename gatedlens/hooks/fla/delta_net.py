"""DeltaNet (Yang et al. 2024, arXiv 2406.06484) and gated DeltaNet (arXiv 2412.06464), as flash-linear-attention lays them out.

    q, k unit vectors behind SiLU          beta = sigmoid(b_proj(n)) (twice that, if a state may turn over), a number a head
    state_t = (1 - beta_t k_t k_t^T) decay_t state_{t-1} + beta_t u_t k_t^T          scan_t = state_t q_t / sqrt(n)

DeltaNet's decay is 1; the gated one's exp(-exp(A_log) softplus(a_proj(n) + dt_bias)), a number a head.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatedlens.address.point import Point
from gatedlens.hooks.fla.mixer import KEYS, FlaKind, FlaMixer
from gatedlens.model.path import Content, Stage, Streams
from gatedlens.model.run import Run
from gatedlens.model.stages import SiLU
from gatedlens.model.weights import linear
from gatedlens.parts.delta_rule import UNIT_EPS, delta_terms, unit
from gatedlens.recurrence.scanning import at_least_float32
from gatedlens.recurrence.terms import Terms

DELTA_NET = "DeltaNet, arXiv 2406.06484"
GATED = "Gated DeltaNet, arXiv 2412.06464"
UNIT = f"{{0}} / sqrt(sum over state of ({{0}})^2 + {UNIT_EPS})"
BETA_PRE = "b_proj(ln1.out)"
BETA = "sigmoid(beta_pre), twice that if the config says allow_neg_eigval"


class DeltaNetMixer(FlaMixer):
    """The delta rule.

    hook_decay and hook_probe stand alone: an edit of one leaves the other as it is.
    """

    paper = DELTA_NET
    norm_name = ("o_norm",)
    selection: ClassVar[tuple[str, ...]] = ("q", "k", "beta")
    written = "u * beta * k"
    decay = "1 - reset"
    probe = "(1 - reset) * k"
    beside_rows: ClassVar[tuple[Point, ...]] = (Point("hook_beta_pre", "batch pos head", BETA_PRE, DELTA_NET),)
    select_rows: ClassVar[tuple[Point, ...]] = (
        Point("hook_q", KEYS, UNIT.format("{q}"), DELTA_NET),
        Point("hook_k", KEYS, UNIT.format("{k}"), DELTA_NET),
        Point("hook_beta", "batch pos head", BETA, DELTA_NET),
    )

    @classmethod
    def entered(cls, stream: str, kind: FlaKind) -> str:
        return f"SiLU({stream}_{'conv' if kind.conv else 'pre'})"

    @classmethod
    def state_rows(cls) -> tuple[Point, ...]:
        whole, left = "batch pos head value state", "erase * (sum over state of probe * state[pos - 1])"
        return (
            Point("hook_erase", whole, "beta * k, the same for each value", cls.paper, True),
            Point("hook_probe", "batch pos head state", cls.probe, cls.paper, True),
            Point("hook_state", whole, f"decay * state[pos - 1] - {left} + write", cls.paper, True),
        )

    @property
    def entering(self) -> Stage:
        return SiLU(("q", "k"), of="conv" if self.kind.conv else "x")

    def betas(self, n: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos *step head"]:
        """beta, in front of its sigmoid."""
        return F.linear(n, self.weights.b_proj.weight)

    def read_beside(self, n: Float[Tensor, "batch pos d_model"], run: Run) -> Streams:
        return {"beta_pre": self.hook_beta_pre(self.betas(n))}

    def named_weights(self) -> dict[str, Tensor]:
        return {**linear("beta", self.weights.b_proj), **super().named_weights()}

    def select(self, u: Content, streams: Streams, run: Run) -> None:
        zero = run.padding.zero  # k and beta 0 at padding: nothing is written or erased
        streams["q"] = self.hook_q(unit(streams["q"]))
        streams["k"] = zero(self.hook_k(unit(streams["k"])))
        beta = self.cfg.beta_max * torch.sigmoid(at_least_float32(streams["beta_pre"]))
        streams["beta"] = zero(self.hook_beta(zero(beta)))

    def terms(  # type: ignore[override]
        self,
        q: Float[Tensor, "batch pos group state"],
        k: Float[Tensor, "batch pos group state"],
        beta: Float[Tensor, "batch pos head"],
    ) -> Terms:
        return delta_terms(q, k, beta, torch.zeros_like(beta).unsqueeze(-1))


class GatedDeltaNetMixer(DeltaNetMixer):
    """The same with a decay; an edit of hook_log_decay moves the probe with it."""

    paper = GATED
    selection = ("q", "k", "beta", "log_decay")
    decay = "exp(log_decay) * (1 - reset)"
    probe = "exp(log_decay) * (1 - reset) * k"
    beside_rows = (
        Point("hook_beta_pre", "batch pos head", BETA_PRE, GATED),
        Point("hook_dt_pre", "batch pos head", "a_proj(ln1.out) + dt_bias", GATED),
    )
    select_rows = (
        *(Point(row.name, row.axes, row.equation, GATED) for row in DeltaNetMixer.select_rows),
        Point("hook_dt", "batch pos head", "softplus(dt_pre)", f"{GATED}, sec. 3.4"),
        Point("hook_log_decay", "batch pos head", "-exp(A_log) * dt", f"{GATED}, sec. 3.4"),
    )

    def read_beside(self, n: Float[Tensor, "batch pos d_model"], run: Run) -> Streams:
        beta = super().read_beside(n, run)
        dt = at_least_float32(F.linear(n, self.weights.a_proj.weight)) + self.weights.dt_bias
        return {**beta, "dt_pre": self.hook_dt_pre(dt)}

    def select(self, u: Content, streams: Streams, run: Run) -> None:
        super().select(u, streams, run)
        zero = run.padding.zero
        dt = self.hook_dt(zero(F.softplus(streams["dt_pre"])))
        streams["log_decay"] = zero(self.hook_log_decay(zero(-torch.exp(at_least_float32(self.weights.A_log)) * dt)))

    def terms(  # type: ignore[override]
        self,
        q: Float[Tensor, "batch pos group state"],
        k: Float[Tensor, "batch pos group state"],
        beta: Float[Tensor, "batch pos head"],
        log_decay: Float[Tensor, "batch pos head"],
    ) -> Terms:
        return delta_terms(q, k, beta, log_decay.unsqueeze(-1))

"""A gated delta net: a mixer whose every step erases what its key finds in the state, then writes under that key.

b batch, l pos, h head (of values), v value (of a head), c channel = (head value), g group (a key head, shared by heads in a row;
where each head has its own, the axis is `head`), n state (a key's numbers); unit(x) = x / sqrt(sum x^2 + 1e-6).

    q, k, x through one causal conv, with SiLU; q, k unit; u of x            beta = sigmoid(beta_pre), or twice it
    log decay = -exp(A_log) softplus(dt_pre), a number a head, or one for each of a key's; bounded: low sigmoid(exp(A_log) dt_pre)
    state_t = decay_t (state_{t-1} - beta_t (state_{t-1} k_t) k_t^T) + beta_t u_t k_t^T         (decay by head)
    state_t = state_{t-1} diag(decay_t) (1 - beta_t k_t k_t^T) + beta_t u_t k_t^T               (decay by key)
    scan_t  = state_t q_t / sqrt(n)           out = proj(RMSNorm(scan) act(gate_pre)), the norm head by head

What a step removes is erase (probe . state): erase = beta k, and probe = decay k, because it looks at the decayed state. Which of
these an architecture has is data, `DeltaKind`; how its projections are laid out it says itself. Yang et al. 2024 (Gated DeltaNet,
arXiv 2412.06464); Kimi Team 2025 (Kimi delta attention, arXiv 2510.26692).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatedlens.address.point import Point
from gatedlens.model.norm import eps_of
from gatedlens.model.path import PathMixer, Stage, Streams
from gatedlens.model.run import Run
from gatedlens.model.stages import Conv, Gate, GroupNorm, Named, Scan, SiLU
from gatedlens.model.state import Carried
from gatedlens.parts.activation import wide_sigmoid, wide_silu
from gatedlens.parts.delta_rule import UNIT_EPS, delta_terms, unit
from gatedlens.recurrence.scanning import at_least_float32
from gatedlens.recurrence.terms import Terms

RMSNORM = "RMSNorm, arXiv 1910.07467"
UIA = "UIA, arXiv 2405.16504"
TAPS = "conv1d.weight[tap] * {}[pos - (tap.size - 1) + tap], 0 from another document"
UNIT = f"SiLU({{0}}) / sqrt(sum over state of SiLU({{0}})^2 + {UNIT_EPS})"
CARRIED_DELTA = {  # what a delta net leaves for the next call
    "scan": Carried("scan", "batch head value state"),
    "conv": Carried("conv", "batch tail conv_channel"),
}


@dataclass(frozen=True)
class DeltaKind:
    """`DeltaKind(rule=RULE, block=BLOCK, forgets=RULE)`: what a delta net does, and which equations its points cite.

    keys: the axis of key heads, "group" or "head". by_key: each number of a key has a decay of its own. gate: its activation,
    "SiLU" or "sigmoid". doubled: beta is at most 2, so a step may turn round what it finds. bounded: no step's log decay is below
    a bound. norm, output: what the norm behind the scan and the output projection are called.
    """

    rule: str
    block: str
    forgets: str
    keys: str = "group"
    by_key: bool = False
    gate: str = "SiLU"
    doubled: bool = False
    bounded: bool = False
    norm: str = "norm"
    output: str = "out_proj"

    def rows(self, *projected: Point) -> tuple[Point, ...]:
        """`KIND.rows(Point("hook_q_pre", ...), ...)`: the points of such a mixer in firing order, behind those of its input
        projections."""
        keys, channel, state = f"batch pos {self.keys} state", "batch pos channel", "batch pos head value state"
        decay = "batch pos head state" if self.by_key else "batch pos head"
        spread = "the same for each value" if self.by_key else "one for all of a head"
        return (
            *projected,
            Point("hook_q_conv_taps", f"{keys} tap", TAPS.format("q_pre"), self.block, True),
            Point("hook_k_conv_taps", f"{keys} tap", TAPS.format("k_pre"), self.block, True),
            Point("hook_conv_taps", f"{channel} tap", TAPS.format("x"), f"{UIA}, eq. 9", True),
            Point("hook_q_conv", keys, "sum over tap of q_conv_taps", self.block),
            Point("hook_k_conv", keys, "sum over tap of k_conv_taps", self.block),
            Point("hook_conv", channel, "sum over tap of conv_taps", self.block),
            Point("hook_u", channel, "SiLU(conv)", self.block),
            Point("hook_q", keys, UNIT.format("q_conv"), self.block),
            Point("hook_k", keys, UNIT.format("k_conv"), self.block),
            Point("hook_beta", "batch pos head", "2 * sigmoid(beta_pre)" if self.doubled else "sigmoid(beta_pre)", self.rule),
            Point("hook_dt", decay, "sigmoid(exp(A_log) * dt_pre)" if self.bounded else "softplus(dt_pre)", self.forgets),
            Point("hook_log_decay", decay, "lower_bound * dt" if self.bounded else "-exp(A_log) * dt", self.forgets),
            Point("hook_reset", "batch pos one", "1 where a document begins (position 0 of position_ids), else 0", self.rule),
            Point(
                "hook_state_start", "batch head value state", "state before the first position (zero without one)", self.rule,
                True,
            ),
            Point("hook_decay", state, f"exp(log_decay) * (1 - reset), {spread}", self.rule, True),
            Point("hook_write", state, "u * beta * k", self.rule, True),
            Point("hook_erase", state, "beta * k, the same for each value", self.rule, True),
            Point("hook_probe", "batch pos head state", "exp(log_decay) * (1 - reset) * k", self.rule, True),
            Point(
                "hook_state", state,
                "decay * state[pos - 1] - erase * (sum over state of probe * state[pos - 1]) + write", self.rule, True,
            ),
            Point("hook_scan", channel, "sum over state of q * state / sqrt(state.size)", self.rule),
            Point("hook_y", channel, "scan (no skip)", self.block),
            Point("hook_scale", "batch pos head", "sqrt(mean over the head's channels of y^2 + eps)", RMSNORM),
            Point("hook_normed", channel, f"{self.norm}.weight * y / scale, one weight for all heads", RMSNORM),
            Point("hook_gate", channel, f"{self.gate}(gate_pre)", self.block),
            Point("hook_gated", channel, "normed * gate", self.block),
        )  # fmt: skip

    @property
    def recurrence(self) -> dict[str, str]:
        """How it fills the recurrence, for the catalogue."""
        shared = "; the heads of a group share k" if self.keys == "group" else ""
        return {
            "decay": f"exp(log_decay), [{'head, state' if self.by_key else 'head'}]",
            "write": f"u * beta * k, [head, value, state]{shared}",
            "erase": "beta * k of what the probe finds, [head, state]",
            "probe": "exp(log_decay) * k: it looks at the decayed state",
            "read": f"q / sqrt(state.size), [{self.keys}, state]",
            "skip": "none",
            "conv": "causal depthwise conv over q, k and x, no bias",
            "activation before the scan": "SiLU: u = sigmoid(c) * c",
            "gate": f"an RMSNorm of the scan head by head, then {self.gate}(gate_pre)",
        }

    @property
    def words(self) -> dict[str, str]:
        """Its implicit attention, for the catalogue."""
        step = (
            "(1 - beta[t] * k[t] k[t]^T) diag(exp(log_decay[t]))"
            if self.by_key
            else "exp(log_decay[t]) * (1 - beta[t] * k[t] k[t]^T)"
        )
        return {
            "x": "x",
            "o": "gated",
            "gate": f"gate * {self.norm}.weight / scale",
            "scan": "S[i, j] = q[i] / sqrt(state.size) . T[i] ... T[j + 1] beta[j] * k[j], j <= i, of each head, where "
            f"T[t] = {step}; 0 where a reset lies between, j < reset <= i",
            "skip": "none",
            "act": "sigmoid(conv): u = act * conv",
            "conv": "M[i, j] = conv1d.weight[K - 1 - (i - j)], 0 <= i - j < K taps, within a document",
            "r": "0; with a carried state what its conv tail and its scan state bring",
        }


# -- the mixer ------------------------------------------------------------------------------------------------------


GATES = {"SiLU": wide_silu, "sigmoid": wide_sigmoid}


class Projected(NamedTuple):
    """What a gated delta net with one decay a head reads off the stream."""

    q: Float[Tensor, "batch pos group state"]
    k: Float[Tensor, "batch pos group state"]
    x: Float[Tensor, "batch pos channel"]
    z: Float[Tensor, "batch pos channel"]
    b: Float[Tensor, "batch pos head"]
    a: Float[Tensor, "batch pos head"]


class DeltaMixer(PathMixer):
    """out = proj(gated), every intermediate a point. An architecture says `projected`, or `project` itself.

    sizes: those of the model's cfg. An edit of hook_log_decay moves the probe with the decay. hook_decay and hook_probe stand
    alone: an edit of one leaves the other as it is.
    """

    selection = ("q", "k", "beta", "log_decay")

    def __init__(
        self, weights: Any, rows: tuple[Point, ...], layer: int, kind: DeltaKind, sizes: Mapping[str, int], eps: float
    ):
        super().__init__(weights, rows, layer)
        self.kind = kind
        self.all_sizes = sizes
        self.norm_eps = eps_of(getattr(weights, kind.norm), eps)

    @property
    def heads(self) -> int:
        return self.all_sizes["head"]

    @property
    def key_shape(self) -> tuple[int, int]:
        """How many key heads there are, and numbers of each."""
        return self.all_sizes[self.kind.keys], self.all_sizes["state"]

    @property
    def sizes(self) -> Mapping[str, int]:  # type: ignore[override]
        """Of the streams that go through the convolution."""
        keys = self.key_shape[0] * self.key_shape[1]
        return {"q": keys, "k": keys, "x": self.all_sizes["channel"]}

    @property
    def path(self) -> tuple[Stage, ...]:  # type: ignore[override]
        norm = GroupNorm(self.heads, self.norm_eps, name=self.kind.norm, out="normed")
        return Conv("conv1d", ("q", "k", "x")), SiLU(("q", "k")), Scan(), Named("y"), norm, Gate(GATES[self.kind.gate])

    @property
    def forgetting(self) -> Any:
        """The module that holds A_log and dt_bias."""
        return self.weights

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
            "dt_pre": self.hook_dt_pre(at_least_float32(given.a) + self.forgetting.dt_bias),
        }

    def select(self, u: Float[Tensor, "batch pos channel"], streams: Streams, run: Run) -> None:
        zero = run.padding.zero
        streams["q"] = self.hook_q(unit(streams["q"]))
        # k, beta and log decay are 0 at a masked position: it writes and erases nothing, and the state passes unchanged
        streams["k"] = zero(self.hook_k(unit(streams["k"])))
        beta = torch.sigmoid(streams["beta_pre"])
        streams["beta"] = zero(self.hook_beta(zero(2 * beta if self.kind.doubled else beta)))
        rate = torch.exp(at_least_float32(self.forgetting.A_log)).flatten()
        rate = rate.unsqueeze(-1) if self.kind.by_key else rate
        if self.kind.bounded:
            dt = self.hook_dt(zero(torch.sigmoid(rate * streams["dt_pre"])))
            log_decay = self.forgetting.lower_bound * dt
        else:
            dt = self.hook_dt(zero(F.softplus(streams["dt_pre"])))
            log_decay = -rate * dt
        streams["log_decay"] = zero(self.hook_log_decay(zero(log_decay)))

    def terms(  # type: ignore[override]
        self,
        q: Float[Tensor, "batch pos group state"],
        k: Float[Tensor, "batch pos group state"],
        beta: Float[Tensor, "batch pos head"],
        log_decay: Float[Tensor, "batch pos head *state"],
    ) -> Terms:
        return delta_terms(q, k, beta, log_decay if self.kind.by_key else log_decay.unsqueeze(-1))

    def output_weights(self) -> tuple[Float[Tensor, "d_model channel"], Float[Tensor, " d_model"] | None]:
        projection = getattr(self.weights, self.kind.output)
        return projection.weight, projection.bias

    def read_with(self) -> dict[str, Tensor]:
        """The matrices of the streams, by their words."""
        raise NotImplementedError

    def named_weights(self) -> dict[str, Tensor]:
        rate = -torch.exp(at_least_float32(self.forgetting.A_log)).flatten()
        return {**self.read_with(), "b_dt": self.forgetting.dt_bias.flatten(), "A": rate, **super().named_weights()}

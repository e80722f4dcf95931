"""DeltaProduct (Siems et al. 2025, arXiv 2502.10297), gated or not: a delta net whose every token takes several steps.

    k, x, beta of each step s of a token; q, the decay and the gate of the token        q, k unit vectors behind SiLU
    S_0 = decay_t state_{t-1}      S_s = (1 - beta_{t,s} k_{t,s} k_{t,s}^T) S_{s-1} + beta_{t,s} u_{t,s} k_{t,s}^T
    state_t = S behind the last    scan_t = state_t q_t / sqrt(state.size)

A product of n such steps turns a state in ways that one cannot. Without a forget gate the decay is 1.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from gatedlens.address.point import Point
from gatedlens.hooks.fla.delta_net import BETA_PRE, DeltaNetMixer, GatedDeltaNetMixer
from gatedlens.hooks.fla.mixer import FlaKind
from gatedlens.model.stages import Scan, ScanSteps
from gatedlens.parts.delta_rule import delta_terms
from gatedlens.recurrence.micro_steps import at_step
from gatedlens.recurrence.terms import Terms

PRODUCT = "DeltaProduct, arXiv 2502.10297"
OF_A_STEP = ("k_pre", "x", "beta_pre", "k_conv_taps", "conv_taps", "k_conv", "conv", "u", "k", "beta", "erase", "probe")
WRITE = "sum over step of u * beta * k, each less what later steps erase of it: erase * (sum over state of probe * it)"
STATE = "decay * state[pos - 1], less erase * (sum over state of probe * it) at each step in turn, + write"


def of_a_token(rows: tuple[Point, ...]) -> tuple[Point, ...]:
    """`of_a_token(rows)`: the points of a delta net where a token takes several steps. What the steps write together is known
    behind what they erase of one another, so hook_write comes behind hook_erase and hook_probe."""
    equations = {"hook_write": WRITE, "hook_state": STATE}
    found = [replace(row, source=row.source.replace(DeltaNetMixer.paper, PRODUCT)) for row in rows]
    found = [replace(row, equation=equations.get(row.leaf, row.equation)) for row in found]
    stepped = {f"hook_{name}" for name in OF_A_STEP}
    found = [replace(row, axes=row.axes.replace("pos", "pos step")) if row.leaf in stepped else row for row in found]
    place = {row.leaf: number for number, row in enumerate(found)}
    write = found.pop(place["hook_write"])
    found.insert(place["hook_probe"], write)
    return tuple(found)


class DeltaProductMixer(DeltaNetMixer):
    """Several steps a token, without a decay.

    hook_decay and hook_state are a token's; hook_erase and hook_probe those of each of its steps. hook_write is what its steps
    write together, so that the state is what they leave of the one before, and that.
    """

    paper = PRODUCT
    scan: ClassVar[Scan] = ScanSteps()
    probe = "k; of step 0 (1 - reset) * k"
    beside_rows: ClassVar[tuple[Point, ...]] = (Point("hook_beta_pre", "batch pos head", BETA_PRE, PRODUCT),)

    @classmethod
    def rows(cls, kind: FlaKind) -> tuple[Point, ...]:
        return of_a_token(super().rows(kind))

    @property
    def steps(self) -> int:  # type: ignore[override]
        return self.cfg.n_steps

    def laid_out(self, stream: str, x: Float[Tensor, "batch pos *wide"]) -> Float[Tensor, "batch pos ..."]:
        return super().laid_out(stream, x if stream == "q" else x.unflatten(-1, (self.steps, -1)))

    def betas(self, n: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos *step head"]:
        return super().betas(n).unflatten(-1, (self.steps, -1))

    def terms(  # type: ignore[override]
        self,
        q: Float[Tensor, "batch pos group state"],
        k: Float[Tensor, "batch pos step group state"],
        beta: Float[Tensor, "batch pos step head"],
    ) -> Terms:
        return self.of_steps(q, k, beta, beta.new_zeros(*beta.shape[:2], beta.shape[3]))

    def of_steps(
        self,
        q: Float[Tensor, "batch pos group state"],
        k: Float[Tensor, "batch pos step group state"],
        beta: Float[Tensor, "batch pos step head"],
        log_decay: Float[Tensor, "batch pos head"],
    ) -> Terms:
        """The terms over (pos step): the first step decays, the last is read."""
        read, decay = at_step(q, -1, self.steps), at_step(log_decay.unsqueeze(-1), 0, self.steps)
        return delta_terms(read, k.flatten(1, 2), beta.flatten(1, 2), decay)


class GatedDeltaProductMixer(DeltaProductMixer, GatedDeltaNetMixer):
    """The same with a decay, at the first step of a token; an edit of hook_log_decay moves the probe of that step with it."""

    selection = GatedDeltaNetMixer.selection
    decay = GatedDeltaNetMixer.decay
    probe = "k; of step 0 exp(log_decay) * (1 - reset) * k"
    beside_rows = GatedDeltaNetMixer.beside_rows
    select_rows = GatedDeltaNetMixer.select_rows

    def terms(  # type: ignore[override]
        self,
        q: Float[Tensor, "batch pos group state"],
        k: Float[Tensor, "batch pos step group state"],
        beta: Float[Tensor, "batch pos step head"],
        log_decay: Float[Tensor, "batch pos head"],
    ) -> Terms:
        return self.of_steps(q, k, beta, log_decay)

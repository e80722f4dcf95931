"""Micro-steps: a recurrence whose every position takes several steps, and is read behind the last (gated DeltaProduct).

    S_{t,0} = decay_t * S_{t-1}       S_{t,s} = S_{t,s-1} - erase_{t,s} (probe_{t,s} . S_{t,s-1}) + value_{t,s} key_{t,s}^T
    S_t = S_{t,n}                     scan_t = S_t read_t

It is the one recurrence over (pos step): its terms are `long`, their decay is 1 but at the first step of a position, their
read 0 but at the last (`at_step`). Each step has a content of its own, and so a matrix: the scan is the sum of all
S_s u_s.

    StepScan(HeadScan.of(long, width), n, s).apply(u)       # S_s u

b batch, l pos, n step, h head, v value, k key.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gatedlens.recurrence.chunks import chunked
from gatedlens.recurrence.head_matrix import HeadScan
from gatedlens.recurrence.matrix import ScanMatrix
from gatedlens.recurrence.terms import Terms


def at_step(
    x: Float[Tensor, "batch pos *any"], step: int, steps: int, otherwise: float = 0.0
) -> Float[Tensor, "batch long *any"]:
    """`at_step(x, 0, n)`: over (pos step), x at one step of each position (negative: from the last), 0 at the others."""
    others = [torch.full_like(x, otherwise)] * steps
    others[step] = x
    return torch.stack(others, dim=2).flatten(1, 2)


def step_chunked(
    terms: Terms, u: Float[Tensor, "batch pos step head value"], initial: Float[Tensor, "batch head value key"]
) -> tuple[Float[Tensor, "batch pos head value"], Float[Tensor, "batch head value key"]]:
    """`step_chunked(long, u, initial)`: the readout behind the steps of each position, and the last state; by chunks."""
    scan, last = chunked(terms, u.flatten(1, 2), initial)
    return scan[:, u.shape[2] - 1 :: u.shape[2]], last


def net_write(
    write: Float[Tensor, "batch pos step head value key"],
    erase: Float[Tensor, "batch pos step head #value key"],
    probe: Float[Tensor, "batch pos step head key"],
) -> Float[Tensor, "batch pos head value key"]:
    """`net_write(write, erase, probe)`: what the steps of a position write, less what later ones erase of it."""
    net = write[:, :, 0]
    for s in range(1, write.shape[2]):
        found = (net * probe[:, :, s].unsqueeze(-2)).sum(-1, keepdim=True)
        net = net - found * erase[:, :, s] + write[:, :, s]
    return net


@dataclass(frozen=True)
class StepScan(ScanMatrix):
    """`StepScan(HeadScan.of(long, 64), n, 0)`: S_0, of the contents that the first of n steps writes."""

    long: HeadScan
    steps: int
    step: int

    @property
    def length(self) -> int:
        return self.long.length // self.steps

    def recurrence(self) -> Terms:
        """The terms over (pos step)."""
        return self.long.terms

    def rewritten(self, key: Float[Tensor, "group key"]) -> StepScan:
        """Of what is written behind all steps of a position."""
        return replace(self, long=self.long.rewritten(key), step=self.steps - 1)

    def select(self, channels: Tensor | slice | list[int]) -> StepScan:
        """The scan of some channels."""
        return replace(self, long=self.long.select(channels))

    def undecayed(self, own: Bool[Tensor, "batch pos"]) -> StepScan:
        """As of a delta rule: rows of `own` lack their decay and what their steps erase."""
        return replace(self, long=self.long.unstepped(own, self.steps))

    def unerased(self, src: Float[Tensor, "batch pos one"]) -> StepScan:
        """No step of `src` erases anything."""
        return replace(self, long=self.long.unerased(src.repeat_interleave(self.steps, dim=1)))

    def mean_log_decay(self, real: Float[Tensor, "batch pos one"]) -> Float[Tensor, "batch head #key"]:
        """A position decays the state once, at its first step."""
        each = self.long.mean_log_decay(real.repeat_interleave(self.steps, dim=1))
        assert each is not None
        return each * self.steps

    # -- as an operator ------------------------------------------------------------------------------------------

    def _written(self, u: Float[Tensor, "batch pos channel"]) -> Float[Tensor, "batch long channel"]:
        return at_step(u, self.step, self.steps)

    def _read(self, g: Float[Tensor, "batch pos channel"]) -> Float[Tensor, "batch long channel"]:
        return at_step(g, -1, self.steps)

    def apply(
        self, u: Float[Tensor, "batch pos channel"], start: Float[Tensor, "batch channel key"] | None = None
    ) -> Float[Tensor, "batch pos channel"]:
        """S_s u (+ what the start state contributes), by the recurrence."""
        return self.long.apply(self._written(u), start)[:, self.steps - 1 :: self.steps]

    def apply_transposed(self, g: Float[Tensor, "batch pos channel"]) -> Float[Tensor, "batch pos channel"]:
        """S_s^T g"""
        return self.long.apply_transposed(self._read(g))[:, self.step :: self.steps]

    def seen(self, i: Int[Tensor, " batch"]) -> Float[Tensor, "batch src channel"]:
        """S_s[i_b, :] for a row of its own in each batch element."""
        return self.long.seen((i + 1) * self.steps - 1)[:, self.step :: self.steps]

    # -- the matrix ----------------------------------------------------------------------------------------------

    def _of_positions(self, matrix: Float[Tensor, "*any long long"]) -> Float[Tensor, "*any dst src"]:
        return matrix[..., self.steps - 1 :: self.steps, self.step :: self.steps]

    def dense(self) -> Float[Tensor, "batch channel dst src"]:
        """S_s channel by channel."""
        return self._of_positions(self.long.dense())

    def contracted(
        self, left: Float[Tensor, "batch pos channel"], right: Float[Tensor, "batch pos channel"]
    ) -> Float[Tensor, "batch dst src"]:
        """sum_c left_i[c] * S_s[i, j] * right_j[c]"""
        ones = torch.ones_like(left[0, :1]).mT
        return self._of_positions(self.long.summed(self._read(left), self._written(right), ones))

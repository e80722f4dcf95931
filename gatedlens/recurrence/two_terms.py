"""Two terms: a recurrence whose every step writes beside its own term that of the step before (Mamba-3's trapezoidal rule).

    S_t      = decay_t (S_{t-1} + beta_t W_{t-1}) + gamma_t W_t          W_t = sum over rank of u_{t,r} key_{t,r}^T
    scan_t,r = S_t read_{t,r}                                            S, W [head, value, key]

b batch, l pos, r rank (1 but where a step writes several outer products and is read as often: MIMO), h head, v value, k key.

It is the one recurrence over (pos step): a position decays, writes by gamma, is read, and writes by the next position's beta,

    G_t = S_t + beta_{t+1} W_t          S_t = decay_t G_{t-1} + gamma_t W_t          behind the last step beta is 0: there G is S

rank by rank. Its matrix is that of the folded terms, which write both at once, but for its diagonal (folded_matrix.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatedlens.recurrence.chunks import chunked
from gatedlens.recurrence.micro_steps import at_step
from gatedlens.recurrence.terms import Terms


class Wrote(NamedTuple):
    """`Wrote(u, key)`: what steps write, W = sum over rank of u key^T; of every position, or of one alone."""

    u: Float[Tensor, "batch *pos rank head value"]
    key: Float[Tensor, "batch *pos rank head key"]

    def times(self, weight: Float[Tensor, "batch *pos head"]) -> Float[Tensor, "batch *pos head value key"]:
        """weight W"""
        return torch.einsum("...rhv,...rhk->...hvk", weight[..., None, :, None] * self.u, self.key)


class TwoTerms(NamedTuple):
    """`TwoTerms(dt * A, gamma, beta, following, key, read)`: what an architecture says of such a recurrence; see `Terms`."""

    log_decay: Float[Tensor, "batch pos head"]
    gamma: Float[Tensor, "batch pos head"]
    beta: Float[Tensor, "batch pos head"]
    following: Float[Tensor, "batch pos head"]  # the next step's beta, 0 behind the last
    key: Float[Tensor, "batch pos rank head key"]
    read: Float[Tensor, "batch pos rank head key"]
    fresh: Float[Tensor, "batch pos one"] | None = None  # 1 where a document begins: the state before it is forgotten

    @property
    def amount(self) -> Float[Tensor, "batch pos head"]:
        """Of what each step writes, once folded."""
        return self.gamma + self.following

    def terms(self, write: int = 0, read: int = 0) -> Terms:
        """The folded recurrence of the writes of a rank, as the reads of a rank find them."""
        key, seen = self.key[:, :, write], self.read[:, :, read]
        return Terms(self.log_decay.unsqueeze(-1), key, seen, amount=self.amount, fresh=self.fresh)

    def decays(self) -> Float[Tensor, "batch pos head one"]:
        """exp(log_decay) * (1 - fresh)"""
        return self.terms().decays()

    def too_early(self, write: int = 0, read: int = 0) -> Float[Tensor, "batch pos head"]:
        """What a read finds in G of its own position that is not in S: beta_{t+1} (key_t . read_t)."""
        return self.following * (self.key[:, :, write] * self.read[:, :, read]).sum(-1)

    def begun(
        self, start: Float[Tensor, "batch head value key"], before: Wrote
    ) -> Float[Tensor, "batch head value key"]:
        """G_0 = S_0 + beta_1 W_0, of what the step before the first wrote; positions packed, so that the first one is real."""
        return start + before.times(self.beta[:, 0])

    def scan(
        self, u: Float[Tensor, "batch pos rank head value"], start: Float[Tensor, "batch head value key"]
    ) -> tuple[Float[Tensor, "batch pos rank head value"], Float[Tensor, "batch head value key"]]:
        """What each position reads, and the last state, from G before the first; by chunks."""
        ranks = u.shape[2]
        steps, idle = 3 * ranks - 1, ranks - 1  # all ranks write, as many read, all write again

        def twice(x: Tensor) -> Tensor:
            return torch.cat([F.pad(x, (0, 0, 0, 0, 0, idle)), x], dim=2).flatten(1, 2)

        amounts = [self.gamma] * ranks + [torch.zeros_like(self.gamma)] * idle + [self.following] * ranks
        long = Terms(
            at_step(self.log_decay.unsqueeze(-1), 0, steps),
            twice(self.key),
            F.pad(self.read, (0, 0, 0, 0, idle, ranks)).flatten(1, 2),
            amount=torch.stack(amounts, dim=2).flatten(1, 2),
            fresh=None if self.fresh is None else at_step(self.fresh, 0, steps),
        )
        scan, last = chunked(long, twice(u), start)
        return scan.unflatten(1, (-1, steps))[:, :, idle : idle + ranks], last

    def write(self, own: Wrote, before: Wrote) -> Float[Tensor, "batch pos head value key"]:
        """gamma_t W_t + decay_t beta_t W_{t-1}, of what each step wrote, and the one before each."""
        return own.times(self.gamma) + self.decays().unsqueeze(-1) * before.times(self.beta)

    def readout(self, states: Float[Tensor, "batch pos head value key"]) -> Float[Tensor, "batch pos rank head value"]:
        """What each position reads off its state."""
        return torch.einsum("blhvk,blrhk->blrhv", states, self.read)


def following(
    beta: Float[Tensor, "batch pos head"], fresh: Float[Tensor, "batch pos one"] | None = None
) -> Float[Tensor, "batch pos head"]:
    """`following(beta, fresh)`: each step's next beta, 0 behind the last and before what forgets all; positions packed."""
    kept = beta if fresh is None else beta * (fresh < 1)
    return torch.cat([kept[:, 1:], torch.zeros_like(kept[:, :1])], dim=1)

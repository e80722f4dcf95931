"""Two terms: a recurrence whose every step writes beside its own term that of the step before (Mamba-3's trapezoidal rule).

    S_t      = decay_t (S_{t-1} + beta_t W_{t-1}) + gamma_t W_t          W_t = sum over rank of u_{t,r} key_{t,r}^T
    scan_t,r = S_t read_{t,r}                                            S, W [head, value, key]

b batch, l pos, r rank (1 but where a step writes several outer products and is read as often: MIMO), h head, v value, k key.

It is the one recurrence, folded: G_t = S_t + beta_{t+1} W_t has one term a step, and what it says too early is taken back.

    G_t    = decay_t G_{t-1} + (gamma_t + beta_{t+1}) W_t                G_0 = S_0 + beta_1 W_0
    scan_t = G_t read_t - beta_{t+1} W_t read_t                          behind the last step beta is 0: there G is S

So its matrix is that of `Terms`, and a number a position on the diagonal. Ranks are steps of the same recurrence over
(pos step): all write, the last and those behind it read.
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
        """What a read finds in G of its own position that is not in S: beta_{t+1} (key_t . read_t), of each rank."""
        return self.following * (self.key[:, :, write] * self.read[:, :, read]).sum(-1)

    def begun(
        self, start: Float[Tensor, "batch head value key"], before: Float[Tensor, "batch head value key"]
    ) -> Float[Tensor, "batch head value key"]:
        """G_0 = S_0 + beta_1 W_0, of what `before` wrote; positions packed, so that the first one is real."""
        return start + self.beta[:, 0, :, None, None] * before

    def scan(
        self, u: Float[Tensor, "batch pos rank head value"], start: Float[Tensor, "batch head value key"]
    ) -> tuple[Float[Tensor, "batch pos rank head value"], Float[Tensor, "batch head value key"]]:
        """What each position reads, and the last state; by chunks, from the folded state `start`."""
        ranks = u.shape[2]
        steps, behind = 2 * ranks - 1, (0, 0, 0, 0, 0, ranks - 1)
        long = Terms(
            at_step(self.log_decay.unsqueeze(-1), 0, steps),
            F.pad(self.key, behind).flatten(1, 2),
            F.pad(self.read, (0, 0, 0, 0, ranks - 1, 0)).flatten(1, 2),
            amount=self.amount.repeat_interleave(steps, dim=1),
            fresh=None if self.fresh is None else at_step(self.fresh, 0, steps),
        )
        scan, last = chunked(long, F.pad(u, behind).flatten(1, 2), start)
        met = torch.einsum("blwhk,blrhk->blrwh", self.key, self.read) * self.following[:, :, None, None]
        own = torch.einsum("blrwh,blwhv->blrhv", met, u)
        return scan.unflatten(1, (-1, steps))[:, :, ranks - 1 :] - own, last

    def write(
        self, own: Float[Tensor, "batch pos head value key"], before: Float[Tensor, "batch pos head value key"]
    ) -> Float[Tensor, "batch pos head value key"]:
        """gamma_t W_t + decay_t beta_t W_{t-1}, of `own` W_t and `before` W_{t-1}."""
        earlier = (self.decays().squeeze(-1) * self.beta)[..., None, None] * before
        return self.gamma[..., None, None] * own + earlier

    def readout(self, states: Float[Tensor, "batch pos head value key"]) -> Float[Tensor, "batch pos rank head value"]:
        """What each position reads off its state."""
        return torch.einsum("blhvk,blrhk->blrhv", states, self.read)


def following(
    beta: Float[Tensor, "batch pos head"], fresh: Float[Tensor, "batch pos one"] | None = None
) -> Float[Tensor, "batch pos head"]:
    """`following(beta, fresh)`: each step's next beta, 0 behind the last and before what forgets all; positions packed."""
    kept = beta if fresh is None else beta * (fresh < 1)
    return torch.cat([kept[:, 1:], torch.zeros_like(kept[:, :1])], dim=1)


def outer(
    u: Float[Tensor, "*batch rank head value"], key: Float[Tensor, "*batch rank head key"]
) -> Float[Tensor, "*batch head value key"]:
    """`outer(u, key)`: W = sum over rank of u key^T."""
    return torch.einsum("...rhv,...rhk->...hvk", u, key)

"""ChannelTerms: a recurrence whose heads are single channels, each with a state vector of its own, or with one number.

    state_t[c, n] = decay_t[c, n] state_{t-1}[c, n] + amount_t[c] key_t[n] u_t[c]        scan_t[c] = sum_n read_t[n] state_t[c, n]
    decay_t[c, n] = exp(log_decay_t[c] rate[c, n]) (1 - fresh_t)

It is `Terms` with heads of one value: `as_heads` writes it so. Key and read are shared by all channels, or by each of some groups
of them, one behind the other. Where both are None the state has no axis of its own: a channel's state is a number, and the scan
reads it as it is.

    Mamba, ViM      log_decay dt, rate A, amount dt, key B, read C
    Zamba           the same, B and C of each group of channels
    RG-LRU, HGRN    log_decay log a, amount the input gate; no key, no read

b batch, l pos, c channel, g group, n state.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gatedlens.recurrence import channel_block
from gatedlens.recurrence.scanning import ByHand, StepTerms
from gatedlens.recurrence.terms import Terms
from gatedlens.recurrence.transforms import overridden, transformed


class Steps(NamedTuple):
    """What `scan(steps.terms, steps.sequences, steps.constants, state)` takes."""

    terms: StepTerms
    sequences: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]


class ChannelTerms(NamedTuple):
    """`ChannelTerms(dt, amount=dt, key=B, read=C, rate=A)`: one recurrence, over any run of positions.

    log_decay * rate <= 0. A factor that is None is 1 (fresh: 0); key, read and rate are there together, or none of them is.
    """

    log_decay: Float[Tensor, "batch pos channel"]
    amount: Float[Tensor, "batch pos channel"] | None = None
    key: Float[Tensor, "batch pos *group state"] | None = None
    read: Float[Tensor, "batch pos *group state"] | None = None
    rate: Float[Tensor, "channel state"] | None = None
    fresh: Float[Tensor, "batch pos one"] | None = None  # 1 where a document begins: the state before it is forgotten

    def shape(self) -> tuple[int, ...]:
        """The shape of a state: [batch, channel, state], or [batch, channel]."""
        batch, _, channels = self.log_decay.shape
        return (batch, channels) if self.rate is None else (batch, channels, self.rate.shape[1])

    def steps(self, u: Float[Tensor, "batch pos channel"]) -> Steps:
        """The recurrence of the content `u`, as `scan` runs it."""
        amount = torch.ones_like(u) if self.amount is None else self.amount
        fresh = () if self.fresh is None else (self.fresh,)
        if self.key is None or self.read is None or self.rate is None:
            return Steps(numbers, (self.log_decay, amount, u, *fresh), ())
        # The rate lies in memory with channels innermost: `vectors` says why.
        rate = self.rate.mT.contiguous().mT
        given = vectors if self.key.ndim == 3 else vectors_of_groups
        return Steps(given, (self.log_decay, amount * u, self.key, self.read, *fresh), (rate,))

    def by_group(self) -> list[ChannelTerms]:
        """The same group by group, each with one key and one read; of terms without groups themselves."""
        if self.key is None or self.read is None or self.rate is None or self.key.ndim == 3:
            return [self]
        groups = self.key.shape[2]
        width = self.log_decay.shape[2] // groups
        found = []
        for g in range(groups):
            some = slice(g * width, (g + 1) * width)
            amount = None if self.amount is None else self.amount[:, :, some]
            key, read = self.key[:, :, g], self.read[:, :, g]
            found.append(ChannelTerms(self.log_decay[:, :, some], amount, key, read, self.rate[some], self.fresh))
        return found

    def as_heads(self) -> Terms:
        """The same with a head for each channel, of one value and one key a state: slow, and what tests compare with."""
        one = torch.ones_like(self.log_decay[..., :1])
        key, read = (one if x is None else x for x in (self.key, self.read))
        return Terms(
            self.log_decay.unsqueeze(-1),
            key.unsqueeze(2) if key.ndim == 3 else key,
            read.unsqueeze(2) if read.ndim == 3 else read,
            self.amount,
            None,
            None,
            self.rate,
            self.fresh,
        )


def _vectors(
    log: Float[Tensor, "... channel"],
    value: Float[Tensor, "... channel"],
    key: Float[Tensor, "... state"],
    read: Float[Tensor, "... state"],
    *fresh_and_rate: Float[Tensor, ...],
) -> tuple[Float[Tensor, "... channel state"], Float[Tensor, "... channel state"], Float[Tensor, "... state"]]:
    """decay = exp(log rate) (1 - fresh), write = value key, read, for any slice of positions.

    The tensors are [b, l, c, n] and lie in memory with channels innermost: states are few, and a processor likes long rows.
    """
    *fresh, rate = fresh_and_rate
    plain = transformed() or torch.compiler.is_compiling() or overridden(log, value, key, *fresh)
    raised = channel_block.raised if plain or not torch.is_grad_enabled() else channel_block.Raised.apply
    decay, write = raised(log, value, key, rate, *fresh)
    return decay.mT, write.mT, read


vectors = ByHand(_vectors, channel_block.gradients_of)


def vectors_of_groups(
    log: Float[Tensor, "... channel"],
    value: Float[Tensor, "... channel"],
    key: Float[Tensor, "... group state"],
    read: Float[Tensor, "... group state"],
    *fresh_and_rate: Float[Tensor, ...],
) -> tuple[Float[Tensor, "... channel state"], Float[Tensor, "... channel state"], Float[Tensor, "... channel state"]]:
    """The same where each group of channels has a key and a read."""
    width = value.shape[-1] // key.shape[-2]
    decay, _, _ = vectors(log, value, key[..., 0, :], read[..., 0, :], *fresh_and_rate)
    key, read = (x.repeat_interleave(width, dim=-2) for x in (key, read))
    return decay, (value.unsqueeze(-2) * key.mT).mT, read


def numbers(
    log: Float[Tensor, "... channel"],
    amount: Float[Tensor, "... channel"],
    u: Float[Tensor, "... channel"],
    *fresh: Float[Tensor, "... one"],
) -> tuple[Float[Tensor, "... channel"], Float[Tensor, "... channel"], None]:
    """decay = exp(log) (1 - fresh), write = amount u; the state itself is read."""
    # The product is taken here, not before: `scan` turns what is written into states, in its place.
    decay = torch.exp(log)
    return decay * (1 - fresh[0]) if fresh else decay, amount * u, None

"""FoldedScan: the matrix of a scan whose every step also writes the term of the step before, Mamba-3's.

    S[i, j] = read_i . E(i, j) key_j (gamma_j + beta_{j+1}),  j < i          S[i, i] = read_i . key_i gamma_i

E(i, j) the product of the decays of the steps j + 1 ... i. It is HeadScan's, of the folded terms, less what these say too early
on the diagonal: what HeadScan does, it does. b batch, l pos (i row, j source), r rank, h head, v value, k key; a channel is
(head value).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gatedlens.recurrence.head_matrix import HeadScan
from gatedlens.recurrence.matrix import ScanMatrix, Steps
from gatedlens.recurrence.micro_steps import at_step
from gatedlens.recurrence.terms import Terms
from gatedlens.recurrence.two_terms import TwoTerms, Wrote


@dataclass(frozen=True)
class FoldedScan(ScanMatrix):
    """`FoldedScan.of(two_terms, 64)`: S of each head; of what one rank writes, as another reads it."""

    whole: HeadScan
    early: Float[Tensor, "batch pos head"]
    terms: TwoTerms
    before: Wrote  # by the step before the first

    @classmethod
    def of(cls, terms: TwoTerms, before: Wrote, write: int = 0, read: int = 0) -> FoldedScan:
        """The scan of all channels, of heads that are as wide as what the step before the first wrote."""
        whole = HeadScan.of(terms.terms(write, read), before.u.shape[-1])
        return cls(whole, terms.too_early(write, read), terms, before)

    @property
    def length(self) -> int:
        return self.whole.length

    @property
    def diagonal(self) -> Float[Tensor, "batch pos channel"]:
        """What the folded terms say too early, channel by channel."""
        return self.early[..., self.whole.heads]

    def select(self, channels: Tensor | slice | list[int]) -> FoldedScan:
        """The scan of some channels."""
        return replace(self, whole=self.whole.select(channels))

    def recurrence(self) -> Terms:
        """The folded terms."""
        return self.whole.recurrence()

    def steps_of(self, terms: Terms, u: Float[Tensor, "batch long head value"], steps: int) -> Steps:
        """Twice as many steps as there are ranks: a position writes first what the one before wrote, then its own."""
        folded, ranks = self.terms, self.terms.key.shape[2]
        own, count = Wrote(u.unflatten(1, (-1, ranks)), folded.key), 2 * ranks
        lagged = (torch.cat([first.unsqueeze(1), x[:, :-1]], dim=1) for first, x in zip(self.before, own, strict=True))
        long_u, key = (torch.cat(both, dim=2).flatten(1, 2) for both in zip(lagged, own, strict=True))
        earlier = folded.decays().squeeze(-1) * folded.beta
        amount = torch.stack([*[earlier] * ranks, *[folded.gamma] * ranks], dim=2).flatten(1, 2)
        log, read = at_step(folded.log_decay.unsqueeze(-1), 0, count), at_step(folded.read[:, :, 0], -1, count)
        fresh = None if folded.fresh is None else at_step(folded.fresh, 0, count)
        return Steps(Terms(log, key, read, amount=amount, fresh=fresh), long_u, count)

    def rewritten(self, key: Float[Tensor, "group key"]) -> ScanMatrix:
        """Of what is written at a position alone: the next one takes none of it over."""
        return self.whole.rewritten(key)

    def undecayed(self, own: Bool[Tensor, "batch pos"]) -> FoldedScan:
        """As of the folded terms, whose diagonal has no decay."""
        return replace(self, whole=self.whole.undecayed(own))

    # -- as an operator ------------------------------------------------------------------------------------------

    def apply(
        self, u: Float[Tensor, "batch pos channel"], start: Float[Tensor, "batch channel key"] | None = None
    ) -> Float[Tensor, "batch pos channel"]:
        """S u (+ what the folded start state contributes), by the recurrence."""
        return self.whole.apply(u, start) - self.diagonal * u

    def apply_transposed(self, g: Float[Tensor, "batch pos channel"]) -> Float[Tensor, "batch pos channel"]:
        """S^T g"""
        return self.whole.apply_transposed(g) - self.diagonal * g

    def seen(self, i: Int[Tensor, " batch"]) -> Float[Tensor, "batch src channel"]:
        """S[i_b, :] for a row of its own in each batch element."""
        here = F.one_hot(i, self.length).to(self.early.dtype).unsqueeze(-1)
        return self.whole.seen(i) - here * self.diagonal

    # -- the matrix ----------------------------------------------------------------------------------------------

    def dense(self) -> Float[Tensor, "batch channel dst src"]:
        """S channel by channel."""
        return self.whole.dense() - torch.diag_embed(self.diagonal.mT)

    def summed(
        self,
        left: Float[Tensor, "batch pos channel"],
        right: Float[Tensor, "batch pos channel"],
        taps: Float[Tensor, "channel tap"],
    ) -> Float[Tensor, "batch dst src"]:
        """sum_c left_i[c] * sum_k S[i, j + k] * right_{j + k}[c] * taps[c, K - 1 - k]: channels summed, conv included."""
        total, on = self.whole.summed(left, right, taps), left * self.diagonal * right
        bands = ((on * taps[:, -1 - k]).sum(-1)[:, k:] for k in range(min(taps.shape[1], self.length)))
        return total - sum(torch.diag_embed(band, offset=-k) for k, band in enumerate(bands))

    def absolute(
        self,
        left: Float[Tensor, "batch pos channel"],
        right: Float[Tensor, "batch pos channel"],
        taps: Float[Tensor, "channel tap"],
        skip: Float[Tensor, "*position channel"],
    ) -> Float[Tensor, "batch dst src"] | None:
        """The sum over channels of |S + diag(skip)|, weighed by left and right; None, only channel by channel, with a conv."""
        if taps.shape[1] > 1:
            return None
        found = self.whole.absolute(left, right, taps, torch.zeros_like(taps[:, 0])).tril(-1)
        return found + torch.diag_embed((left * (self.own() + skip) * right * taps[:, 0]).abs().sum(-1))

    def own(self) -> Float[Tensor, "batch pos channel"]:
        """read_i . key_i gamma_i"""
        return self.whole.own() - self.diagonal

"""PriorScan: the matrix of a scan that reads the state as it was before its own step, RWKV-5's and RWKV-6's.

    scan_t = S_{t-1} read_t                    S[i, j] = read_i . E(i - 1, j) key_j amount_j,  j < i;  0 on the diagonal

E(i, j) the product of the transitions of the steps j + 1 ... i. It is the scan of `delayed` terms, which lag a position behind:
what HeadScan and `chunked` do for a scan that reads its own step, they do for this one. b batch, l pos (i row, j source), h head,
v value, k key.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from gatedlens.recurrence.chunks import chunked
from gatedlens.recurrence.head_matrix import HeadScan
from gatedlens.recurrence.matrix import ScanMatrix
from gatedlens.recurrence.terms import Terms


def delayed(terms: Terms) -> Terms:
    """`delayed(terms)`: the terms of one position more, whose state at t is S_{t-1}, and the last state at the end.

    A step stands a position later, behind a first one that does nothing; the reads stay, and the last reads nothing. Where a
    document begins, a read finds nothing of the state before.
    """
    read = terms.read if terms.fresh is None else terms.read * (1 - terms.fresh).unsqueeze(-1)
    return Terms(
        log_decay=_later(terms.log_decay),
        key=_later(terms.key),
        read=F.pad(read, (0, 0, 0, 0, 0, 1)),
        amount=None if terms.amount is None else _later(terms.amount),
        erase=None if terms.erase is None else _later(terms.erase),
        probe=None if terms.probe is None else _later(terms.probe),
        rate=terms.rate,
        fresh=None if terms.fresh is None else _later(terms.fresh),
    )


def prior_chunked(
    terms: Terms, u: Float[Tensor, "batch pos head value"], initial: Float[Tensor, "batch head value key"]
) -> tuple[Float[Tensor, "batch pos head value"], Float[Tensor, "batch head value key"]]:
    """`prior_chunked(terms, u, initial)`: scan_t = S_{t-1} read_t, and the last state; by chunks, as `chunked`."""
    scan, last = chunked(delayed(terms), F.pad(u, (0, 0, 0, 0, 1, 0)), initial)
    return scan[:, :-1], last


def _later(x: Float[Tensor, "batch pos *any"]) -> Float[Tensor, "batch late *any"]:
    """A step later: zeros come first."""
    return torch.cat([torch.zeros_like(x[:, :1]), x], dim=1)


@dataclass(frozen=True)
class PriorScan(ScanMatrix):
    """`PriorScan.of(terms, 64)`: S of each head, as `HeadScan`; `late` is that of the delayed terms, a row and source longer."""

    late: HeadScan

    @classmethod
    def of(cls, terms: Terms, width: int) -> PriorScan:
        """The scan of all channels of heads that are `width` wide."""
        return cls(HeadScan.of(delayed(terms.even()), width))

    def recurrence(self) -> Terms:
        """The terms of the steps, each at its own position; what reads them is a position behind."""
        return self.late.terms.at(slice(1, None))

    @property
    def length(self) -> int:
        return self.late.length - 1

    def rewritten(self, key: Float[Tensor, "group key"]) -> PriorScan:
        """Of the delayed terms."""
        return replace(self, late=self.late.rewritten(key))

    def select(self, channels: Tensor | slice | list[int]) -> PriorScan:
        """The scan of some channels."""
        return replace(self, late=self.late.select(channels))

    def apply(
        self, u: Float[Tensor, "batch pos channel"], start: Float[Tensor, "batch channel key"] | None = None
    ) -> Float[Tensor, "batch pos channel"]:
        """S u (+ what the start state contributes), by the recurrence."""
        return self.late.apply(_source(u), start)[:, :-1]

    def apply_transposed(self, g: Float[Tensor, "batch pos channel"]) -> Float[Tensor, "batch pos channel"]:
        """S^T g"""
        return self.late.apply_transposed(_row(g))[:, 1:]

    def seen(self, i: Int[Tensor, " batch"]) -> Float[Tensor, "batch src channel"]:
        """S[i_b, :] for a row of its own in each batch element."""
        return self.late.seen(i)[:, 1:]

    def dense(self) -> Float[Tensor, "batch channel dst src"]:
        """S channel by channel."""
        return self.late.dense()[..., :-1, 1:]

    def summed(
        self,
        left: Float[Tensor, "batch pos channel"],
        right: Float[Tensor, "batch pos channel"],
        taps: Float[Tensor, "channel tap"],
    ) -> Float[Tensor, "batch dst src"]:
        """sum_c left_i[c] * sum_k S[i, j + k] * right_{j + k}[c] * taps[c, K - 1 - k]: channels summed, conv included."""
        return self.late.summed(_row(left), _source(right), taps)[:, :-1, 1:]

    def absolute(
        self,
        left: Float[Tensor, "batch pos channel"],
        right: Float[Tensor, "batch pos channel"],
        taps: Float[Tensor, "channel tap"],
        skip: Float[Tensor, "*position channel"],
    ) -> Float[Tensor, "batch dst src"] | None:
        """The sum over channels of |S + diag(skip)|, weighed by left and right: S has no diagonal, and skip nothing else. With a
        convolution the two meet, and None says: only channel by channel."""
        if taps.shape[1] > 1:
            return None
        scanned = self.late.absolute(_row(left), _source(right), taps, torch.zeros_like(taps[:, 0]))[:, :-1, 1:]
        return scanned + torch.diag_embed((left * skip * right * taps[:, 0]).abs().sum(-1))


def _row(x: Float[Tensor, "batch pos channel"]) -> Float[Tensor, "batch late channel"]:
    """What weighs the rows: the late scan has one more, behind them."""
    return F.pad(x, (0, 0, 0, 1))


def _source(x: Float[Tensor, "batch pos channel"]) -> Float[Tensor, "batch late channel"]:
    """What the sources write: the late scan has one more, in front of them."""
    return F.pad(x, (0, 0, 1, 0))

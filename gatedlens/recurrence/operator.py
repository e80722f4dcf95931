"""One branch of an implicit attention: the operator A = diag(gate) (S + diag(skip)) diag(act) M of one `Factors`.

Most layers have one branch; Vision Mamba has one a direction. Positions are packed and in the order of the scan, so S and M
look back; `ImplicitAttention` does the rest. A part that is left out becomes the identity (scan and skip: zero).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from gatedlens.recurrence import convolution
from gatedlens.recurrence.factors import NAMES, Factors
from gatedlens.recurrence.matrix import ScanMatrix


@dataclass(frozen=True)
class Branch:
    """`Branch(factors).forward(x)` is A x; `parts` are the factors that are in A."""

    factors: Factors
    parts: tuple[str, ...] = NAMES

    def _given(self, part: str, value: Any) -> Any:
        return value if part in self.parts else None

    @property
    def gate(self) -> Float[Tensor, "batch pos channel"]:
        gate = self._given("gate", self.factors.gate)
        return torch.ones_like(self.factors.x) if gate is None else gate

    @property
    def act(self) -> Float[Tensor, "batch pos channel"]:
        act = self._given("act", self.factors.act)
        return torch.ones_like(self.factors.x) if act is None else act

    @property
    def taps(self) -> Float[Tensor, "channel tap"]:
        taps = self._given("conv", self.factors.taps)
        return self.factors.x.new_ones(self.factors.x.shape[2], 1) if taps is None else taps

    @property
    def skip(self) -> Float[Tensor, "*position channel"]:
        skip = self._given("skip", self.factors.skip)
        return self.factors.x.new_zeros(self.factors.x.shape[2]) if skip is None else skip

    @property
    def scan(self) -> ScanMatrix | None:
        """None: zero."""
        scan: ScanMatrix | None = self._given("scan", self.factors.scan)
        return scan

    # -- as an operator ------------------------------------------------------------------------------------------

    def convolved(self, x: Float[Tensor, "batch pos channel"]) -> Float[Tensor, "batch pos channel"]:
        """M x"""
        return _conv(x, self.taps, self.factors.document)

    def forward(self, x: Float[Tensor, "batch pos channel"]) -> Float[Tensor, "batch pos channel"]:
        """A x"""
        return self._after_conv(self.convolved(x))

    def output(self) -> Float[Tensor, "batch pos channel"]:
        """A x + r, for this branch's own x."""
        return self._with_rest(self._after_conv(self._own_conv(), self.factors.start))

    def entering(self) -> Float[Tensor, "batch pos channel"]:
        """act (M x + drift): what enters the scan."""
        return self.act * self._own_conv()

    def _own_conv(self) -> Tensor:
        """M x + drift"""
        drift = self.factors.drift
        c = self.convolved(self.factors.x)
        return c if drift is None else c + drift

    def _after_conv(self, c: Tensor, start: Tensor | None = None) -> Tensor:
        """gate (S + skip) act c, and what the start state adds."""
        u = self.act * c
        y = self.skip * u
        if self.scan is not None:
            y = y + self.scan.apply(u, start)
        return self.gate * y

    def _with_rest(self, o: Tensor) -> Tensor:
        rest = self._given("gate", self.factors.rest)  # of a norm, which is in the gate
        return o if rest is None else o + rest

    def passed_on(self, u: Float[Tensor, "batch pos channel"]) -> Float[Tensor, "batch pos channel"]:
        """gate S u"""
        return torch.zeros_like(u) if self.scan is None else self.gate * self.scan.apply(u)

    def backward(self, g: Float[Tensor, "batch pos channel"]) -> Float[Tensor, "batch pos channel"]:
        """A^T g"""
        y = self.gate * g
        u = self.skip * y
        if self.scan is not None:
            u = u + self.scan.apply_transposed(y)
        return _conv_transposed(self.act * u, self.taps, self.factors.document)

    def bias(self) -> Float[Tensor, "batch pos channel"]:
        """r"""
        drift = self.factors.drift
        drift = torch.zeros_like(self.factors.x) if drift is None else drift
        return self._with_rest(self._after_conv(drift, self.factors.start))

    # -- the matrix ----------------------------------------------------------------------------------------------

    def dense(self, chosen: list[int]) -> Float[Tensor, "batch some dst src"]:
        """The matrices of the chosen channels."""
        batch, length, _ = self.factors.x.shape
        left, right, taps = self.gate[:, :, chosen], self.act[:, :, chosen], self.taps[chosen]
        if self.scan is not None:
            whole = self.scan.select(chosen).folded(left, right, taps)
        else:
            whole = left.new_zeros(batch, len(chosen), length, length)
        direct = rearrange(left * self.skip[..., chosen] * right, "b i c -> b c i")
        for k in range(min(taps.shape[1], length)):
            whole.diagonal(-k, -2, -1).add_(direct[:, :, k:] * taps[:, -1 - k, None])
        return self._within(whole)

    def row(self, i: Int[Tensor, " batch"]) -> Float[Tensor, "batch src channel"]:
        """A[i_b, :] for a row of its own in each batch element."""
        batch = torch.arange(len(i), device=i.device)
        here = F.one_hot(i, self.factors.x.shape[1]).to(self.factors.x.dtype).unsqueeze(-1)
        row = here * self.skip
        if self.scan is not None:
            row = row + self.scan.seen(i)
        row = self.gate[batch, i].unsqueeze(1) * row * self.act
        return _conv_transposed(row, self.taps, self.factors.document)

    def weighted(self, weights: Float[Tensor, " channel"]) -> Float[Tensor, "batch dst src"]:
        """sum_c weights[c] A[c], no channel apart."""
        taps, length = self.taps, self.factors.x.shape[1]
        left = self.gate * weights
        nothing = left.new_zeros(left.shape[0], length, length)
        total = nothing if self.scan is None else self.scan.summed(left, self.act, taps)
        direct = (left * self.skip * self.act) @ taps  # b pos tap
        for k in range(min(taps.shape[1], length)):
            total = total + torch.diag_embed(direct[:, k:, taps.shape[1] - 1 - k], offset=-k)
        return self._within(total.unsqueeze(1)).squeeze(1)

    def absolute(self) -> Float[Tensor, "batch dst src"] | None:
        """The sum over channels of |A[c]|; None where it takes each channel's matrix."""
        if self.scan is None:
            return None
        total = self.scan.absolute(self.gate, self.act, self.taps, self.skip)
        return None if total is None else self._within(total.unsqueeze(1)).squeeze(1)

    @property
    def passes_by(self) -> bool:
        """Whether it brings each position to itself alone: A is diagonal."""
        return self.scan is None and self.taps.shape[1] == 1

    def own(self) -> Float[Tensor, "batch pos channel"] | None:
        """A[i, i] channel by channel; None where its scan cannot say."""
        met = torch.zeros_like(self.factors.x) if self.scan is None else self.scan.own()
        return None if met is None else self.gate * (met + self.skip) * self.act * self.taps[:, -1]

    def _within(self, matrix: Float[Tensor, "batch some dst src"]) -> Float[Tensor, "batch some dst src"]:
        """The matrix without its entries between documents."""
        document = self.factors.document
        return matrix if document is None else convolution.within(matrix, document)


class AheadBranch(Branch):
    """A branch whose conv looks ahead in the order of the scan: A = A_0 M', A_0 the branch without a conv, M' = P M P with P
    the reversal."""

    @property
    def _bare(self) -> Branch:
        return Branch(replace(self.factors, taps=None), self.parts)

    @property
    def _ahead(self) -> Int[Tensor, "batch pos"] | None:
        """The documents from the end."""
        document = self.factors.document
        return None if document is None else document.flip(1)

    def convolved(self, x: Float[Tensor, "batch pos channel"]) -> Float[Tensor, "batch pos channel"]:
        return _conv(x.flip(1), self.taps, self._ahead).flip(1)

    def backward(self, g: Float[Tensor, "batch pos channel"]) -> Float[Tensor, "batch pos channel"]:
        return _conv_transposed(self._bare.backward(g).flip(1), self.taps, self._ahead).flip(1)

    def row(self, i: Int[Tensor, " batch"]) -> Float[Tensor, "batch src channel"]:
        return _conv_transposed(self._bare.row(i).flip(1), self.taps, self._ahead).flip(1)

    def absolute(self) -> Float[Tensor, "batch dst src"] | None:
        return None

    def dense(self, chosen: list[int]) -> Float[Tensor, "batch some dst src"]:
        bare, taps = self._bare.dense(chosen), self.taps[chosen]
        return self._within(
            reduce(torch.add, (_later(bare, k) * taps[:, -1 - k, None, None] for k in range(taps.shape[1])))
        )

    def weighted(self, weights: Float[Tensor, " channel"]) -> Float[Tensor, "batch dst src"]:
        bare, taps = self._bare, self.taps
        moved = (_later(bare.weighted(weights * taps[:, -1 - k]), k) for k in range(taps.shape[1]))
        return self._within(reduce(torch.add, moved).unsqueeze(1)).squeeze(1)


def branch_of(factors: Factors, parts: tuple[str, ...] = NAMES) -> Branch:
    """The branch of some factors."""
    return AheadBranch(factors, parts) if factors.ahead else Branch(factors, parts)


def _later(matrix: Tensor, k: int) -> Tensor:
    """The columns moved k places on: what stood at source m stands at m + k."""
    return F.pad(matrix, (k, 0))[..., : matrix.shape[-1]]


def _conv(x: Tensor, taps: Tensor, document: Tensor | None) -> Tensor:
    """M x: the causal depthwise convolution without bias."""
    if document is not None:
        return convolution.conv(x, taps, document)
    width = taps.shape[1]
    return convolution.slide(F.pad(x, (0, 0, width - 1, 0)), taps)


def _conv_transposed(g: Tensor, taps: Tensor, document: Tensor | None) -> Tensor:
    """M^T g."""
    if document is not None:
        return convolution.conv_transposed(g, taps, document)
    width = taps.shape[1]
    return convolution.slide(F.pad(g, (0, 0, 0, width - 1)), taps.flip(1))

"""ScanMatrix: the matrix S of a layer's recurrence, in whatever form its architecture has it; what an implicit attention asks.

    scan.apply(u)                    # S u, a recurrence: no matrix is built
    scan.summed(left, right, taps)   # batch dst src: channels weighted and summed, the conv folded in
    scan.select([3, 5]).dense()      # batch channel dst src

A scan of your own gives `length, select, apply, apply_transposed, seen` and `dense`; the rest is made of these.

DecayScan (decay_matrix.py) is a decay with a state, WkvScan (wkv_matrix.py) a softmax over the past with a decay, PatternScan
(pattern_matrix.py) an attention pattern. b batch, l pos (i row, j source), c channel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import reduce
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gatedlens.errors import InputError
from gatedlens.recurrence.terms import Terms


class Steps(NamedTuple):
    """A recurrence as what it was: its terms and the content over (pos step), and how many steps a position takes."""

    terms: Terms
    u: Float[Tensor, "batch long head value"]
    steps: int


class ScanMatrix(ABC):
    """One layer's S; S[i, j] = 0 for j > i."""

    start_axis: ClassVar[int] = 1  # the axis of the channels in what `apply` starts from

    @property
    @abstractmethod
    def length(self) -> int:
        """How many positions it has."""

    @abstractmethod
    def select(self, channels: Tensor | slice | list[int]) -> ScanMatrix:
        """The scan of some channels."""

    @abstractmethod
    def apply(
        self, u: Float[Tensor, "batch pos channel"], start: Float[Tensor, "batch _ _"] | None = None
    ) -> Float[Tensor, "batch pos channel"]:
        """S u (+ what the start state contributes)."""

    @abstractmethod
    def apply_transposed(self, g: Float[Tensor, "batch pos channel"]) -> Float[Tensor, "batch pos channel"]:
        """S^T g"""

    def mass(self, kept: Float[Tensor, "batch pos channel"]) -> Float[Tensor, "batch pos channel"]:
        """How much of each row's sum is left when only the sources `kept` (1, else 0) and the carried state are.

        InputError unless the rows are a softmax.
        """
        raise InputError(
            "The rows of this layer's scan are no softmax, so there is nothing to renormalise: "
            "layers=gl.layers.where(kind='attention') names those whose rows are one."
        )

    def undecayed(self, own: Bool[Tensor, "batch pos"]) -> ScanMatrix:
        """The scan that rows `own` have without the decay of their own step (a delta rule: nor its erase); here itself: there is
        no such decay."""
        return self

    def recurrence(self) -> Terms | None:
        """The recurrence that it is the matrix of, a head for each channel where each has a state of its own; None where there
        is none, or where the state is no sum of decaying writes."""
        return None

    def steps_of(self, terms: Terms, u: Float[Tensor, "batch long head value"], steps: int) -> Steps:
        """Its `recurrence()` of the content `u`, of so many steps a position, in the form whose states are those that the run
        had."""
        return Steps(terms, u, steps)

    def rewritten(self, key: Float[Tensor, "group key"]) -> ScanMatrix:
        """`scan.rewritten(key).seen(i)`: the scan that finds of each source what it would find of a 1 written at this key, one
        for each group of heads. InputError where the state is no sum of decaying writes."""
        raise InputError(
            "The state of this layer is no sum of writes that decay, so what is found of one is not known without a run."
        )

    def mean_log_decay(self, real: Float[Tensor, "batch pos one"]) -> Float[Tensor, "batch head #key"] | None:
        """The logarithm of the decay, resets aside, averaged over the positions `real` (1, else 0), in float64; None: none."""
        terms = self.recurrence()
        if terms is None:
            return None
        mean = (terms.log_decay.double() * real.unsqueeze(-1)).sum(1) / real.double().sum(1).unsqueeze(-1)
        return mean if terms.rate is None else mean * terms.rate

    def unerased(self, src: Float[Tensor, "batch pos one"]) -> ScanMatrix:
        """The scan in which the positions `src` (1, else 0) erase nothing of a delta rule's state; here itself."""
        return self

    @abstractmethod
    def seen(self, i: Int[Tensor, " batch"]) -> Float[Tensor, "batch src channel"]:
        """S[i_b, :] for a row of its own in each batch element; zeros behind it."""

    @abstractmethod
    def dense(self) -> Float[Tensor, "batch channel dst src"]:
        """S channel by channel."""

    def contracted(
        self, left: Float[Tensor, "batch pos channel"], right: Float[Tensor, "batch pos channel"]
    ) -> Float[Tensor, "batch dst src"]:
        """sum_c left_i[c] * S[i, j][c] * right_j[c]; a scan that can do it without `dense` says how."""
        return torch.einsum("bic,bcij,bjc->bij", left, self.dense(), right)

    def summed(
        self,
        left: Float[Tensor, "batch pos channel"],
        right: Float[Tensor, "batch pos channel"],
        taps: Float[Tensor, "channel tap"],
    ) -> Float[Tensor, "batch dst src"]:
        """sum_c left_i[c] * sum_k S[i, j + k] * right_{j + k}[c] * taps[c, K - 1 - k]: channels summed, conv included."""
        reach = min(taps.shape[1], self.length)
        return reduce(torch.add, (earlier(self.contracted(left, right * taps[:, -1 - k]), k) for k in range(reach)))

    def absolute(
        self,
        left: Float[Tensor, "batch pos channel"],
        right: Float[Tensor, "batch pos channel"],
        taps: Float[Tensor, "channel tap"],
        skip: Float[Tensor, "*position channel"],
    ) -> Float[Tensor, "batch dst src"] | None:
        """The sum over channels of the absolutes of what `folded` gives of S + diag(skip); None: only channel by channel."""
        return None

    def own(self) -> Float[Tensor, "batch pos channel"] | None:
        """S[i, i] channel by channel: what a position reads of its own write; None where that takes the whole matrix."""
        return None

    def folded(
        self,
        left: Float[Tensor, "batch pos channel"],
        right: Float[Tensor, "batch pos channel"],
        taps: Float[Tensor, "channel tap"],
    ) -> Float[Tensor, "batch channel dst src"]:
        """What `summed` sums, channel by channel."""
        rows, reach = self.dense() * left.mT.unsqueeze(-1), min(taps.shape[1], self.length)
        weights = ((right * taps[:, -1 - k]).mT.unsqueeze(-2) for k in range(reach))
        return reduce(torch.add, (earlier(rows * weight, k) for k, weight in enumerate(weights)))


def earlier(matrix: Float[Tensor, "... dst src"], k: int) -> Float[Tensor, "... dst src"]:
    """The columns moved k places back: what stood at source m stands at m - k."""
    return F.pad(matrix[..., k:], (0, k)) if k else matrix

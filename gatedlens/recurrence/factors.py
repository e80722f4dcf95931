"""Factors: what an architecture says of its implicit attention, read off a cache.

    o = A x + r ,   A = diag(gate) (S + diag(skip)) diag(act) M ,   r = what does not come from x

x what enters the token mixing; M the causal conv (taps), act the activation as a factor (sigmoid(c) of SiLU(c)), S the
scan, skip its direct path, gate the gate after its activation. `drift` is what the conv adds besides M x (its bias, and
the tail of a carried state); `start` the state that the scan began from; `rest` what is added behind the scan whatever x is
(a norm's bias). UIA (arXiv 2405.16504), eq. 9-15.

A factor that an architecture lacks is None: the identity (no skip, no scan: zero). Where what passes by the scan is another
content than what enters it, it has factors of its own, `beside` the scan's: their outputs are summed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gatedlens.recurrence.convolution import slide
from gatedlens.recurrence.matrix import ScanMatrix

NAMES = ("gate", "scan", "skip", "act", "conv")


@dataclass(frozen=True)
class Factors:
    """One layer's factors, positions packed (see `Padding`) where a batch is padded."""

    x: Float[Tensor, "batch pos channel"]
    o: Float[Tensor, "batch pos channel"]
    scan: ScanMatrix | None
    gate: Float[Tensor, "batch pos channel"] | None = None
    skip: Float[Tensor, "*position channel"] | None = None  # a number a channel, or one a position, too
    act: Float[Tensor, "batch pos channel"] | None = None
    taps: Float[Tensor, "channel tap"] | None = None
    drift: Float[Tensor, "batch pos channel"] | None = None
    ahead: bool = False  # the conv looks ahead in the scan's order (Vision Mamba v1 shares one conv between directions)
    document: Int[Tensor, "batch pos"] | None = None  # numbers a row's documents; None: each row is one
    start: Float[Tensor, "batch _ _"] | None = None  # as the scan's `apply` takes it
    reverse: bool = False  # the scan runs from the last position to the first, and all tensors here are in its order
    scale: float = 1.0  # this branch's share of the layer's output
    rest: Float[Tensor, "batch pos channel"] | None = None
    beside: tuple[Factors, ...] = ()
    groups: int | None = None  # of channels, whose mean a norm behind takes from x, and from all that is read

    def select(self, channels: list[int]) -> Factors:
        """The factors of some channels."""
        along = {**dict.fromkeys(("x", "o", "gate", "act", "drift", "rest"), 2), "skip": -1, "taps": 0}
        picked = {name: _pick(getattr(self, name), axis, channels) for name, axis in along.items()}
        if self.scan is not None:
            picked["start"] = _pick(self.start, self.scan.start_axis, channels)
            picked["scan"] = self.scan.select(channels)
        return replace(self, **picked)


def reach(
    tail: Float[Tensor, "batch tail channel"],
    x: Float[Tensor, "batch pos channel"],
    taps: Float[Tensor, "channel tap"],
) -> Float[Tensor, "batch pos channel"]:
    """What the conv still brings of a carried tail, the K - 1 inputs before `x`: M of the tail and zeros behind it."""
    long = torch.cat([tail.to(x), torch.zeros_like(x)], dim=1)
    return slide(long, taps)


def _pick(x: Tensor | None, axis: int, channels: list[int]) -> Any:
    return None if x is None else x.index_select(axis, torch.tensor(channels, device=x.device))

"""The secant of Mamba's scan by hand, a block of positions: the rule that `scans.py` finds operation by operation, in a third of
the time.

    z = log rate,  decay = e^z,  write = value key,  h_t = decay_t h_{t-1} + write_t,  y_t[c] = sum_n read_t[n] h_t[n, c]

    gh_t    = mean(read_t) gy_t + mean(decay_{t+1}) gh_{t+1}               d read  = sum_c mean(h_t) gy_t
    d z     = gh_t mean(h_{t-1}) (decay - decay') / (z - z')               d log   = sum_n d z rate
    d value = sum_n gh_t mean(key)                                         d key   = sum_c gh_t mean(value)

Where z and z' nearly meet, the mean of both decays stands for the quotient (`elementwise.py` says why that is as exact).

b batch, l pos, c channel, n state; large tensors are [b, l, n, c], channels innermost, as the scan's own are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gatedlens.recurrence.channel_block import of_log, raised
from gatedlens.recurrence.matrix_vector import times
from gatedlens.recurrence.scanning import scan_back_in_place, scan_in_place


def of_block(
    now: Sequence[Tensor],
    then: Sequence[Tensor],
    rate: Tensor,
    starts: tuple[Tensor, Tensor],
    of_scan: Tensor,
    of_state: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """What the start and each of log, value, key and read get, of `vectors` over some positions; both runs' sequences are
    given."""
    decay, h, start = _states(now, rate, starts[0])
    decay0, h0, start0 = _states(then, rate, starts[1])
    (log, value, key, read), (log0, value0, key0, read0) = now[:4], then[:4]

    slope = _slope(decay, decay0, (log - log0).to(h.dtype), rate)
    middle = decay.add_(decay0).div_(2)
    h.add_(h0).div_(2)
    of_scan = of_scan.to(h.dtype)
    of_read = times(h, of_scan)

    g = of_scan.unsqueeze(-2) * ((read + read0) / 2).to(h.dtype).unsqueeze(-1)
    g[:, -1] += of_state.mT
    scan_back_in_place(middle, g)

    slope[:, 1:].mul_(g[:, 1:]).mul_(h[:, :-1])
    slope[:, 0].mul_(g[:, 0]).mul_((start + start0).mT / 2)
    of_value = times(g.mT, ((key + key0) / 2).to(h.dtype))
    of_key = times(g, ((value + value0) / 2).to(h.dtype))
    return (middle[:, 0] * g[:, 0]).mT, [of_log(slope, rate), of_value, of_key, of_read]


def _states(given: Sequence[Tensor], rate: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(decay, every state, start) of a run."""
    log, value, key, _, *fresh = given
    decay, write = raised(log, value, key, rate, *fresh)
    return decay, scan_in_place(decay, write, start.mT), start


def _slope(decay: Tensor, decay0: Tensor, apart_in_log: Tensor, rate: Tensor) -> Any:
    """(decay - decay') / (z - z'), in memory of its own."""
    # Both logarithms may be infinite; their decays are 0 then, and so is what stands between them.
    apart = apart_in_log.nan_to_num_(0.0).unsqueeze(-2) * rate.mT
    near = apart.abs() <= torch.finfo(apart.dtype).eps ** (1 / 3)
    slope = (decay - decay0).div_(apart)
    return torch.where(near, (decay + decay0) / 2, slope)

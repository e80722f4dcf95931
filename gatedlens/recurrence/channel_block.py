"""Mamba's recurrence over a block of positions: its decays and writes, and the gradient of the whole block by hand.

    z = log rate        decay = e^z (1 - fresh)        write = value key
    h_t = decay_t h_{t-1} + write_t                    y_t[c] = sum_n read_t[n] h_t[n, c]

    gh_t    = read_t gy_t + decay_{t+1} gh_{t+1}       d read = sum_c h_t gy_t
    d z     = gh_t h_{t-1} decay_t                     d log  = sum_n d z rate        d rate = sum_t d z log
    d value = sum_n gh_t key                           d key  = sum_c gh_t value      d fresh = - sum of gh_t h_{t-1} e^z

Everything large is [b, l, n, c], channels innermost, and stays in the cache: a block is made, read by a dozen operators, and
forgotten. `secant/channel_scan.py` is the same for the difference of two runs.

b batch, l pos, c channel, n state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from gatedlens.recurrence.autocast import is_on
from gatedlens.recurrence.matrix_vector import times
from gatedlens.recurrence.scanning import scan_back_in_place, scan_in_place
from gatedlens.recurrence.transforms import forward_mode, gradients, has_old_axis, transformed

LOG2_E = 1 / math.log(2)


def _powers(log: Tensor, rate: Tensor) -> Tensor:
    """e^(log rate)."""
    # 2^(x log2 e) is e^x: on processors the power of 2 takes a third of the time.
    exp2 = torch.exp2 if forward_mode() else torch.exp2_  # a second tensor of this size costs more than the power
    return exp2(log.unsqueeze(-2) * (rate * LOG2_E).mT)


def raised(log: Tensor, value: Tensor, key: Tensor, rate: Tensor, *fresh: Tensor) -> tuple[Tensor, Tensor]:
    """`decay, write = raised(log, value, key, rate)`: [b, l, n, c], in torch's own operations."""
    decay = _powers(log, rate)
    if fresh:
        decay = decay * (1 - fresh[0]).unsqueeze(-1)
    return decay, value.unsqueeze(-2) * key.unsqueeze(-1)


class Raised(Function):
    """decay, write = Raised.apply(log, value, key, rate, *fresh), differentiable any number of times.

    Its backward is by products of matrices and running sums, so that each large tensor is read once.
    """

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> tuple[Tensor, Tensor]:
        decay, write = raised(*given)
        ctx.save_for_backward(*given, decay)
        return decay, write

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        *given, decay = ctx.saved_tensors
        if (
            any(ctx.needs_input_grad[4:])
            or torch.is_grad_enabled()
            or transformed()
            or has_old_axis(*grads)
            or is_on(decay)
        ):
            return gradients(raised, tuple(given), grads)
        log, value, key, rate, *fresh = given
        of_z, write = grads[0] * decay, grads[1]
        of_value = times(write.mT, key.to(write.dtype))
        of_key = times(write, value.to(write.dtype))
        rates = of_rate(of_z, log) if ctx.needs_input_grad[3] else None
        # autograd gives each the dtype of its input.
        return of_log(of_z, rate), of_value, of_key, rates, *(None for _ in fresh)


def of_log(of_z: Tensor, rate: Tensor) -> Tensor:
    """d log = sum_n d z rate, from d z [..., n, c]."""
    found = torch.zeros_like(of_z.select(-2, 0))
    for one, of_state in zip(of_z.unbind(-2), rate.unbind(-1), strict=True):
        found.addcmul_(one, of_state)
    return found


def of_rate(of_z: Tensor, log: Tensor) -> Tensor:
    """d rate = sum_t d z log, [c, n]."""
    found = torch.zeros_like(of_z[0, 0])
    for one, of_step in zip(of_z.flatten(0, 1), log.flatten(0, 1), strict=True):
        found.addcmul_(one, of_step)
    return found.mT


def gradients_of(
    given: Sequence[Tensor], needed: Sequence[bool], start: Tensor, of_scan: Tensor, of_state: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """`of_start, found = gradients_of((log, value, key, read, *fresh, rate), needed, start, of_scan, of_state)`: the gradients of
    a block's start, and of what is `needed` of the rest, from those of its scan and of its last state."""
    log, value, key, read, *fresh, rate = given
    decay, write = raised(log, value, key, rate, *fresh)
    h = scan_in_place(decay, write, start.mT)
    of_scan = of_scan.to(h.dtype)
    of_read = times(h, of_scan) if needed[3] else None

    g = of_scan.unsqueeze(-2) * read.to(h.dtype).unsqueeze(-1)
    g[:, -1] += of_state.mT
    scan_back_in_place(decay, g)
    of_start = decay[:, 0] * g[:, 0]
    of_value = times(g.mT, key.to(h.dtype)) if needed[1] else None
    of_key = times(g, value.to(h.dtype)) if needed[2] else None

    g[:, 1:].mul_(h[:, :-1])  # now the gradient of decay
    g[:, 0].mul_(start.mT)
    of_fresh = [-(g * _powers(log, rate)).sum((-2, -1)).unsqueeze(-1) if needed[4] else None for _ in fresh]
    of_z = g.mul_(decay)
    logs = of_log(of_z, rate) if needed[0] else None
    rates = of_rate(of_z, log) if needed[-1] else None
    return of_start.mT, [logs, of_value, of_key, of_read, *of_fresh, rates]

"""The secant of RWKV-4's scan, in linear time and memory: the weighted mean as a running mean, whose weights are shares of two.

    L_t = log(e^{L_{t-1} + w} + e^{k_t})      share_t = sigmoid(k_t - L_{t-1} - w)      m_t = m_{t-1} + share_t (v_t - m_{t-1})
    own_t = sigmoid(u + k_t - L_{t-1})        scan_t = m_{t-1} + own_t (v_t - m_{t-1})

which is the same scan (L the logarithm of its denominator, m its state as a mean). Each line has the rule of its kind: a share of
two is a softmax, the lines for m and for the scan are products:

    DL_t    = (1 - S_t) DL_{t-1} + S_t Dk_t           S_t the slope of softplus between both runs' k_t - L_{t-1} - w
    D share = slope (Dk_t - DL_{t-1})                 Dm_t = (1 - mean share_t) Dm_{t-1} + mean share_t Dv_t
                                                              + (mean v_t - mean m_{t-1}) D share_t

b batch, l pos, c channel. A masked position has share 0 and hands L and m on; where a document begins the past is gone: share 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gatedlens.errors import InputError
from gatedlens.recurrence.scanning import linear_scan
from gatedlens.recurrence.wkv_scan import NOTHING, Carry, _before_each, _segment, log_kept
from gatedlens.secant.contrast import Call, Contrast, Valued

GONE = NOTHING / 2  # a logarithm of what is left of the past below which nothing is


class Run(NamedTuple):
    """What a run's scan gives, [b, l, c]: `apart` = k - L - w and `own_apart` = u + k - L, before the shares are taken."""

    scan: Tensor
    last: tuple[Tensor, Tensor, Tensor]
    apart: Tensor
    own_apart: Tensor
    share: Tensor
    own: Tensor
    mean: Tensor  # m_{t-1}


def _of(k: Tensor, v: Tensor, w: Tensor, u: Tensor, mask: Any, kept: Any, carry: tuple[Tensor, ...]) -> Run:
    found = _segment(mask, kept, k, v, w, u, *carry)
    num, den = found.past_state.unbind(2)
    top = _before_each(carry[2], _tops(k, w, mask, kept, carry[2]))
    empty = (den <= 0) | (top <= GONE)
    mean = torch.where(empty, 0.0, num / torch.where(empty, 1.0, den))
    past = torch.where(empty, -torch.inf, top + torch.where(empty, 1.0, den).log())
    if kept is not None:
        past = torch.where(kept <= GONE, -torch.inf, past + kept)
    apart, own_apart = k - past - w, u + k - past
    share, own = torch.sigmoid(apart), torch.sigmoid(own_apart)
    if mask is not None:
        share = share * mask.unsqueeze(-1)
    return Run(found.scan, found.carry, apart, own_apart, share, own, mean)


def _tops(k: Tensor, w: Tensor, mask: Any, kept: Any, top: Tensor) -> Tensor:
    from gatedlens.recurrence.wkv_scan import _running_max

    writes, log_decay = k, w.expand_as(k)
    if mask is not None:
        writes, log_decay = k.masked_fill(~mask.unsqueeze(-1), -torch.inf), w * mask.unsqueeze(-1)
    if kept is not None:
        log_decay = log_decay + kept
    return _running_max(log_decay, writes, top)


def _slope(g: Tensor, g0: Tensor, z: Tensor, z0: Tensor, middle: Any) -> Tensor:
    """(g - g') / (z - z'), and `middle` of what stands halfway where that is rounding; 0 where the past of either is empty."""
    apart = z - z0
    near = apart.abs() <= torch.finfo(z.dtype).eps ** (1 / 3) * (1 + z.abs())
    finite = z.isfinite() & z0.isfinite()
    slope = torch.where(near, middle((z + z0) / 2), (g - g0) / torch.where(near, 1.0, apart))
    return torch.where(finite, slope, 0.0)


def _of_sigmoid(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 - s)


def _flow(k: Tensor, v: Tensor, mask: Any, now: Run, then: Run, v0: Tensor) -> Tensor:
    """What has the gradient of the rule, linear in k and v; all else is held."""
    with torch.no_grad():
        S = _slope(F.softplus(now.apart), F.softplus(then.apart), now.apart, then.apart, torch.sigmoid)
        S = torch.where(now.apart.isfinite() & then.apart.isfinite(), S, 1.0)  # nothing before: L is k
        of_share = _slope(now.share, then.share, now.apart, then.apart, _of_sigmoid)
        of_own = _slope(now.own, then.own, now.own_apart, then.own_apart, _of_sigmoid)
        if mask is not None:
            S, of_share = S * mask.unsqueeze(-1), of_share * mask.unsqueeze(-1)
        gap = (v.detach() + v0 - now.mean - then.mean) / 2
        share, own = (now.share + then.share) / 2, (now.own + then.own) / 2
    L = linear_scan(1 - S, S * k)
    apart = k - _before_each(torch.zeros_like(L[:, 0]), L)
    m = linear_scan(1 - share, share * v + gap * of_share * apart)
    before = _before_each(torch.zeros_like(m[:, 0]), m)
    return (1 - own) * before + own * v + gap * of_own * apart


def running_mean(call: Call) -> tuple[Contrast, Carry]:
    """wkv(k, v, w, u, mask, carry, fresh)"""
    args, kwargs = torch.utils._pytree.tree_unflatten(call.leaves, call.form)
    k, v, w, u, mask, carry, fresh = (*args, *kwargs.values(), None)[:7]
    if any(isinstance(x, Contrast) for x in (w, u, *carry, fresh)):
        raise InputError(
            "Secant relevance goes through RWKV's scan by its keys and values alone: its carry and rates are held."
        )
    kept = None if fresh is None else log_kept(fresh)
    w, u, carry = w.detach(), u.detach(), tuple(x.detach() for x in carry)

    def run(x: Any, number: int) -> Tensor:
        found: Tensor = x.runs[number] if isinstance(x, Contrast) else x.detach()
        return found

    with torch.no_grad():
        runs = [_of(run(k, i).detach(), run(v, i).detach(), w, u, mask, kept, carry) for i in range(call.number)]
    outs = [runs[0].scan]
    for i in range(1, call.number):
        flow = _flow(run(k, i), run(v, i), mask, runs[i], runs[i - 1], run(v, i - 1).detach())
        outs.append(Valued.apply(flow, runs[i].scan))
    return call.together(outs), Carry(*(call.together(each) for each in zip(*(r.last for r in runs), strict=True)))

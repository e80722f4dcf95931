"""The secant of RWKV-4's scan: its running mean is the scan, its rule is that of the lines it is written in, and linear in
length."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gatedlens.recurrence.wkv_scan import NOTHING, Carry, wkv
from gatedlens.secant import RULES, Contrast

BATCH, LENGTH, WIDTH = 2, 11, 4


def drawn(seed, scale=1.0, length=LENGTH):
    g = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(BATCH, length, WIDTH, generator=g, dtype=torch.float64) for _ in range(2))
    return scale * k, v


def constants():
    g = torch.Generator().manual_seed(7)
    return -torch.rand(WIDTH, generator=g, dtype=torch.float64), torch.randn(WIDTH, generator=g, dtype=torch.float64)


def start(carried):
    g = torch.Generator().manual_seed(8)
    zero = torch.zeros(BATCH, WIDTH, dtype=torch.float64)
    if not carried:
        return Carry(zero, zero, zero + NOTHING)
    num, den, top = torch.randn(3, BATCH, WIDTH, generator=g, dtype=torch.float64)
    return Carry(num, den.abs() + 0.1, top)


def word_for_word(k, v, w, u, mask, carry, fresh):
    """L, shares, mean and scan, a position at a time, in operations with rules of their own: the equations of wkv.py."""
    num, den, top = carry
    empty = den == 0
    m, L = torch.where(empty, 0, num / torch.where(empty, 1, den)), top + torch.where(empty, 1, den).log()
    nothing, outs = empty, []
    for t in range(k.shape[1]):
        gone = nothing if fresh is None else nothing | (fresh[:, t] >= 1)
        apart = k[:, t] - L - w
        share = torch.where(gone, 1.0, torch.sigmoid(apart))
        own = torch.where(gone, 1.0, torch.sigmoid(u + k[:, t] - L))
        outs.append(m + own * (v[:, t] - m))
        new_L = torch.where(gone, k[:, t], L + w + F.softplus(apart))
        new_m = m + share * (v[:, t] - m)
        real = torch.ones_like(nothing) if mask is None else mask[:, t].unsqueeze(-1).expand_as(nothing)
        L, m, nothing = torch.where(real, new_L, L), torch.where(real, new_m, m), nothing & ~real
    return torch.stack(outs, 1)


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("documents", [False, True])
def test_wkv_is_the_rule_word_for_word(carried, masked, documents):
    now, then, (w, u), carry = drawn(1), drawn(2), constants(), start(carried)
    then[0][:, 4], then[1][:, 4] = now[0][:, 4], now[1][:, 4]
    mask = None
    if masked:
        mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
        mask[0, :3], mask[1, 8:] = False, False
    fresh = None
    if documents:
        fresh = torch.zeros(BATCH, LENGTH, 1, dtype=torch.float64)
        fresh[0, 5], fresh[1, 3] = 1, 1
    weight = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    weight = weight if mask is None else weight * mask.unsqueeze(-1)
    found = []
    for function in (word_for_word, lambda *given: wkv(*given)[0]):
        live = [x.clone().requires_grad_() for x in now]
        given = [Contrast.of(x, (before,), RULES) for x, before in zip(live, then, strict=True)]
        out = function(*given, w, u, mask, carry, fresh)
        grads = torch.autograd.grad(out, live, weight)
        plain = [wkv(*some, w, u, mask, carry, fresh)[0] for some in (then, now)]
        real = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask.unsqueeze(-1).expand_as(weight)
        assert all(torch.allclose(a[real], b[real], atol=1e-12) for a, b in zip(out.plain, plain, strict=True))
        total = sum(((a - b) * g).sum() for a, b, g in zip(now, then, grads, strict=True))
        assert abs(float(total - ((plain[1] - plain[0]) * weight).sum())) < 1e-11
        found.append(grads)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*found, strict=True))


def test_saturated_keys_stay_complete():
    """Keys that leave one token all the weight, or none, or that exp does not hold."""
    now, then, (w, u) = drawn(1, 200.0), drawn(2, 200.0), constants()
    live = [x.clone().requires_grad_() for x in now]
    out, _ = wkv(*(Contrast.of(x, (y,), RULES) for x, y in zip(live, then, strict=True)), w, u, None, start(False))
    grads = torch.autograd.grad(out.sum(), live)
    total = sum(((a - b) * g).sum() for a, b, g in zip(now, then, grads, strict=True))
    gap = wkv(*now, w, u, None, start(False))[0].sum() - wkv(*then, w, u, None, start(False))[0].sum()
    assert all(g.isfinite().all() for g in grads) and abs(float(total - gap)) < 1e-10

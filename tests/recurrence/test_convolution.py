"""The causal depthwise convolution against torch's own, and its gradients, also twice, forward-mode and batched."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gatedlens.recurrence.convolution import FEW, slide


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def theirs(long, taps, bias):
    return F.conv1d(long.mT, taps.unsqueeze(1), bias, groups=len(taps)).mT


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4, FEW, FEW + 1])
def test_it_is_torchs_convolution(width, biased):
    long, taps, bias = draw(2, 11, 5), draw(5, width), draw(5) if biased else None
    kept = long.clone()
    assert torch.allclose(slide(long, taps, bias), theirs(long, taps, bias), rtol=1e-13, atol=1e-14)
    assert torch.equal(long, kept)
    live = [t.requires_grad_() for t in (long, taps, bias) if t is not None]
    weight = draw(2, 12 - width, 5)

    def loss(function):
        return (function(*live, *[None] * (3 - len(live))) ** 2 * weight).sum()

    once = [torch.autograd.grad(loss(f), live, create_graph=True) for f in (slide, theirs)]
    twice = [torch.autograd.grad(sum(g.pow(2).sum() for g in grads), live) for grads in once]
    for ours, want in (once, twice):
        for a, b in zip(ours, want, strict=True):
            assert torch.allclose(a, b, rtol=1e-11, atol=1e-11)


def test_transforms_pass():
    long, taps, bias = draw(2, 9, 3), draw(3, 4), draw(3)
    many = torch.stack([taps, 2 * taps])
    each = torch.func.vmap(lambda t: slide(long, t, bias))(many)
    assert torch.allclose(each[1], theirs(long, 2 * taps, bias), rtol=1e-13, atol=1e-14)
    _, moved = torch.func.jvp(lambda t: slide(long, t, bias), (taps,), (taps,))
    assert torch.allclose(moved, theirs(long, taps, None), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_are_torchs(dtype):
    long, taps, bias = draw(2, 9, 3, dtype=dtype), draw(3, 4, dtype=dtype), draw(3, dtype=dtype)
    assert torch.equal(slide(long, taps, bias), theirs(long, taps, bias))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert slide(long.float(), taps.float()).dtype == torch.bfloat16

"""The recurrence: against a literal loop, its gradients (also twice, and forward-mode), segments, memory."""

from __future__ import annotations

import pytest
import torch

from gatedlens import recurrence
from gatedlens.hooks.mamba import mamba_terms
from gatedlens.recurrence import linear_scan, readout, scan


def inputs(length=9, channels=3, state=2, batch=2, grad=True):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64).requires_grad_(grad)

    dt, u = random(batch, length, channels), random(batch, length, channels)
    B, C = random(batch, length, state), random(batch, length, state)
    return (dt, B, C, u), (-random(channels, state).detach()).requires_grad_(grad), random(batch, channels, state)


def literal(sequences, A, initial):
    dt, B, C, u = sequences
    state, ys = initial, []
    for t in range(dt.shape[1]):
        state = torch.exp(dt[:, t, :, None] * A) * state + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        ys.append((state * C[:, t, None]).sum(-1))
    return torch.stack(ys, 1), state


@pytest.fixture(params=[1, 4, 1000], ids=lambda n: f"segments of about {n}")
def segments(request, monkeypatch):
    """Small segments, so that short inputs cross several."""
    monkeypatch.setattr(recurrence, "SEGMENT_ELEMENTS", request.param * 12)
    monkeypatch.setattr(recurrence, "SEGMENT_ELEMENTS_GRAD", request.param * 12)


@pytest.mark.parametrize("length", [1, 4, 5, 17])
def test_values_and_gradients_are_those_of_the_literal_loop(segments, length):
    sequences, A, initial = inputs(length)
    want, last = literal(sequences, A, initial)
    got, end = scan(mamba_terms, sequences, (A,), initial)
    with torch.no_grad():
        free, free_end = scan(mamba_terms, sequences, (A,), initial)
    for a, b in ((got, want), (end, last), (free, want), (free_end, last)):
        assert torch.allclose(a, b, rtol=1e-13, atol=1e-14)
    leaves = (*sequences, A, initial)
    weights = torch.randn_like(want), torch.randn_like(last)
    a = torch.autograd.grad((want * weights[0]).sum() + (last * weights[1]).sum(), leaves)
    b = torch.autograd.grad((got * weights[0]).sum() + (end * weights[1]).sum(), leaves)
    for x, y in zip(a, b, strict=True):
        assert torch.allclose(x, y, rtol=1e-12, atol=1e-13)


def test_gradients_twice(segments):
    sequences, A, initial = inputs(6)
    leaves = (*sequences, A, initial)

    def second(function):
        (first,) = torch.autograd.grad(function().pow(2).sum(), sequences[0], create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), leaves)

    want = second(lambda: literal(sequences, A, initial)[0])
    got = second(lambda: scan(mamba_terms, sequences, (A,), initial)[0])
    for x, y in zip(want, got, strict=True):
        assert torch.allclose(x, y, rtol=1e-10, atol=1e-12)


def test_the_linear_scan_passes_torchs_own_gradient_checks():
    decay, write, start = (torch.rand(2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    start = start[:, 0]
    assert torch.autograd.gradcheck(linear_scan, (decay, write, start), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(linear_scan, (decay, write, start))


def test_without_a_state_axis_the_state_itself_is_read():
    states = linear_scan(torch.full((1, 4, 2), 0.5), torch.ones(1, 4, 2))
    assert torch.equal(readout(states, None), states)
    assert states[0, :, 0].tolist() == [1.0, 1.5, 1.75, 1.875]


def test_partial_gradients():
    """Only some inputs need gradients: the others get none and nothing breaks."""
    (dt, B, C, u), A, initial = inputs(7, grad=False)
    u.requires_grad_()
    got, _ = scan(mamba_terms, (dt, B, C, u), (A,), initial)
    (grad,) = torch.autograd.grad(got.sum(), u)
    want = torch.autograd.grad(literal((dt, B, C, u), A, initial)[0].sum(), u)[0]
    assert torch.allclose(grad, want)


def test_only_one_segment_is_alive_at_a_time(monkeypatch):
    """Without gradients no tensor of [pos, channel, state] is ever made."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    monkeypatch.setattr(recurrence, "SEGMENT_ELEMENTS", 8 * 12)
    sequences, A, initial = inputs(64, grad=False)
    with torch.no_grad(), Watch():
        scan(mamba_terms, sequences, (A,), initial)
    assert max(sizes) <= 64 * 2 * 3  # the output itself


def test_torch_func_and_forward_mode_see_through_the_scan():
    (dt, B, C, u), A, initial = inputs(6, grad=False)
    initial = initial.detach()

    def total(u):
        return scan(mamba_terms, (dt, B, C, u), (A,), initial)[0].pow(2).sum()

    grad = torch.func.grad(total)(u)
    direction = torch.ones_like(u)
    assert torch.allclose(torch.func.jvp(total, (u,), (direction,))[1], (grad * direction).sum())

"""The recurrence: against a literal loop, its gradients (also twice, and forward-mode), segments, memory."""

from __future__ import annotations

import pytest
import torch

from gatedlens.recurrence import scanning
from gatedlens.recurrence.channels import vectors
from gatedlens.recurrence.scanning import linear_scan, readout, scan
from gatedlens.recurrence.wkv_scan import Carry, wkv


def mamba_terms(dt, B, C, u, A):
    """Mamba's: decay exp(dt A), write dt u B, read C."""
    return vectors(dt, dt * u, B, C, A)


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
    monkeypatch.setattr(scanning, "SEGMENT_ELEMENTS", request.param * 12)
    monkeypatch.setattr(scanning, "SEGMENT_ELEMENTS_GRAD", request.param * 12)


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


@pytest.mark.parametrize("fresh", [False, True], ids=["", "with a reset"])
@pytest.mark.parametrize("asked", ["all", "log", "value", "key", "read", "rate", "start", "fresh"])
def test_the_gradient_by_hand_is_that_of_the_literal_loop(segments, asked, fresh):
    """`vectors` knows its own; an input that asks for none gets none."""
    (dt, B, C, u), A, initial = inputs(17, batch=3, grad=False)
    reset = torch.zeros(3, 17, 1, dtype=torch.float64)
    if fresh:
        reset[:, 6], reset[0, 9] = 1.0, 0.25
    named = {"log": dt, "value": u, "key": B, "read": C, "rate": A, "start": initial}
    named |= {"fresh": reset} if fresh else {}
    leaves = [x.requires_grad_() for name, x in named.items() if asked in ("all", name)]
    if not leaves:
        pytest.skip("no reset to ask for")
    state, ys = initial, []
    for t in range(17):
        decay = torch.exp(dt[:, t, :, None] * A) * (1 - reset[:, t, :, None])
        state = decay * state + u[:, t, :, None] * B[:, t, None]
        ys.append((state * C[:, t, None]).sum(-1))
    want = torch.stack(ys, 1), state
    got = scan(vectors, (dt, u, B, C, *((reset,) if fresh else ())), (A,), initial)
    weights = [torch.randn_like(x) for x in want]
    a, b = (
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(out, weights, strict=True)), leaves)
        for out in (got, want)
    )
    for x, y in zip((*got, *a), (*want, *b), strict=True):
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
    check_everything(linear_scan, (decay, write, start))


def check_everything(function, inputs):
    """torch's own checks: backward and forward, batched, and of second order."""
    batched = {"check_batched_grad": True}
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_forward_grad=True, **batched)
    assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True, **batched)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_the_scans_pass_torchs_own_gradient_checks(segments):
    sequences, A, initial = inputs(5, channels=1, batch=1)
    check_everything(lambda *given: scan(mamba_terms, given[:4], given[4:5], given[5]), (*sequences, A, initial))

    def mean(k, v, w, u, num, den, top):
        out, carry = wkv(k, v, -w, u, mask, Carry(num, den, top))
        return out, carry.num / carry.den  # which no gauge moves

    mask = torch.tensor([[True, False, True, True, True]])
    k, v = (torch.rand(1, 5, 1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w, u = (torch.rand(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    carry = [torch.rand(1, 1, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    check_everything(mean, (k, v, w, u, *carry))


def test_inputs_that_depend_on_one_another_count_once(segments):
    """As in the models, where dt, B and C are made of u: with create_graph no gradient flows twice."""
    (dt, B, C, u), A, initial = inputs(9)

    def selective():
        own = dt * u.tanh()
        return scan(
            mamba_terms, (own, B + own.sum(-1, keepdim=True), C * B, u * own), (A * 2,), initial + own[:, 0, :, None]
        )

    def averaged():
        k = dt * u
        return wkv(k, k.sin(), A[:, 0], A[:, 1] + A[:, 0], None, Carry(k[:, 0], k[:, 1].exp(), k[:, 0]))[:1]

    for run in (selective, averaged):
        for among in ((dt, u, A), (u,), (A,)):
            want = torch.autograd.grad(sum(out.square().sum() for out in run()), among)
            got = torch.autograd.grad(sum(out.square().sum() for out in run()), among, create_graph=True)
            for a, b in zip(got, want, strict=True):
                assert torch.allclose(a, b, rtol=1e-11, atol=1e-12)


def test_a_second_derivative_where_the_last_state_needs_none():
    (dt, B, C, u), A, initial = inputs(7, grad=False)
    C.requires_grad_()
    (first,) = torch.autograd.grad(
        scan(mamba_terms, (dt, B, C, u), (A,), initial)[0].square().sum(), C, create_graph=True
    )
    (second,) = torch.autograd.grad(first.square().sum(), C)
    twice = literal((dt, B, C, u), A, initial)[0].square().sum()
    (want,) = torch.autograd.grad(twice, C, create_graph=True)
    assert torch.allclose(second, torch.autograd.grad(want.square().sum(), C)[0])


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

    monkeypatch.setattr(scanning, "SEGMENT_ELEMENTS", 8 * 12)
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


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr")
def test_a_scan_is_linearised():
    (dt, B, C, u), A, initial = inputs(6, grad=False)
    A = torch.nn.Parameter(A)

    def run(u):
        return scan(mamba_terms, (dt, B, C, u), (A,), initial)[0]

    assert torch.allclose(torch.func.linearize(run, u)[1](u), torch.func.jvp(run, (u,), (u,))[1])

"""Positions side by side, as on accelerators, forced here: the values and gradients of the loops, in few operators."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from gatedlens.recurrence import delta_states, doubling
from gatedlens.recurrence.chunks import chunked
from gatedlens.recurrence.delta_states import states_of_delta_rule
from gatedlens.recurrence.doubling import doubled, running_max
from gatedlens.recurrence.literal import literal_states, march
from gatedlens.recurrence.scanning import linear_scan, scan
from gatedlens.recurrence.wkv_scan import Carry, wkv
from tests.recurrence.test_chunks import KINDS, close, draw
from tests.recurrence.test_scanning import check_everything, inputs, literal, mamba_terms

# Dispatcher operators that only look at memory another way, or take some: no device runs anything for them.
VIEWS = """
    alias as_strided chunk detach diagonal empty empty_like empty_strided expand expand_as flatten movedim mT narrow new_empty
    permute reshape resize_ result_type select slice split split_with_sizes squeeze t transpose unbind unflatten unsqueeze view
"""


@pytest.fixture
def side_by_side(monkeypatch):
    """As on an accelerator."""
    monkeypatch.setattr(doubling, "pays", lambda x: True)


@pytest.fixture(params=[40, 1 << 26], ids=["short segments", "one segment"])
def segments(request, monkeypatch, side_by_side):
    monkeypatch.setattr(doubling, "ELEMENTS", request.param)


def operators(run):
    """How many dispatcher operators a call is, views left out; what an operator calls inside is its own."""
    run()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        run()
    outer = [e for e in found.events() if e.cpu_parent is None or not e.cpu_parent.name.startswith("aten::")]
    names = [e.name.removeprefix("aten::") for e in outer if e.name.startswith("aten::")]
    return sum(name not in VIEWS.split() for name in names)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 31, 32, 33])
def test_doubling_gives_the_states_of_the_loop(length):
    decay, write = torch.randn(2, length, 3, dtype=torch.float64), torch.randn(2, length, 3, dtype=torch.float64)
    decay[:, ::5] = 0
    start = torch.randn(2, 3, dtype=torch.float64)
    close(doubled(decay, write, start), linear_scan(decay, write, start), 1e-13)
    tops, top = [], start
    for t in range(length):
        top = torch.maximum(top + decay[:, t], write[:, t])
        tops.append(top)
    close(running_max(decay, write, start), torch.stack(tops, 1), 1e-13)


@pytest.mark.parametrize("length", [1, 4, 17])
def test_a_scan_of_channels(segments, length):
    sequences, A, initial = inputs(length)
    leaves = (*sequences, A, initial)
    want, got = literal(sequences, A, initial), scan(mamba_terms, sequences, (A,), initial)
    with torch.no_grad():
        free = scan(mamba_terms, sequences, (A,), initial)
    for a, b in zip((*got, *free), (*want, *want), strict=True):
        close(a, b, 1e-13)
    ours, theirs = (torch.autograd.grad(y.sin().sum() + s.cos().sum(), leaves) for y, s in (got, want))
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, 1e-12)


def test_a_linear_scan_passes_torchs_own_gradient_checks(side_by_side):
    decay, write, start = (torch.rand(2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    check_everything(linear_scan, (decay, write, start[:, 0]))


@pytest.mark.parametrize("masked", [False, True])
def test_a_normalised_scan(masked, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 13, 3, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    w, u = (torch.rand(3, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    carry = [torch.rand(2, 3, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]
    mask = torch.rand(2, 13, generator=generator) > 0.3 if masked else None

    def run():
        out, left = wkv(k, v, -w, u, mask, Carry(*carry))
        found = torch.autograd.grad(out.sin().sum() + (left.num / left.den).sum(), (k, v, w, u, *carry))
        return out, left.num / left.den, *found

    want = run()
    monkeypatch.setattr(doubling, "pays", lambda x: True)
    for a, b in zip(run(), want, strict=True):
        close(a, b, 1e-12)


@pytest.mark.parametrize("size", [1, 4, 64])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "delta" in kind])
def test_the_states_of_a_delta_rule(kind, size, monkeypatch, side_by_side):
    monkeypatch.setattr(delta_states, "CHUNK", size)
    terms, u, state = draw(kind, fresh=True)
    write = terms.value(u).unsqueeze(-1) * terms.key.unsqueeze(-2)
    decay, erase, probes = terms.decays().unsqueeze(-2), terms.erase.unsqueeze(-2), terms.probes()
    close(states_of_delta_rule(decay, write, erase, probes, state), literal_states(terms, u, state))
    # What a hook may make of them: a decay of each value its own, of any sign; an erase of each value its own.
    edited, each = decay.expand_as(write).clone(), erase.expand_as(write).clone()
    edited[:, 7], edited[:, 9, :, 2], write[:, 4], each[:, 8, :, 1] = -0.5, 0.0, 3.0, 0.0
    for decays, erases in ((edited, erase), (decay, each), (edited, each)):
        leaves = [x.detach().clone().requires_grad_() for x in (decays, write, erases, probes, state)]
        got, want = states_of_delta_rule(*leaves), march(*leaves)
        close(got, want)
        ours, theirs = (torch.autograd.grad(x.sin().sum(), leaves) for x in (got, want))
        for a, b in zip(ours, theirs, strict=True):
            close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_with_matrix_states_are_few_operators(kind, side_by_side):
    terms, u, state = draw(kind, length=1024, batch=1)
    decay, write = terms.decays().unsqueeze(-2), terms.value(u).unsqueeze(-1) * terms.of_heads(terms.key).unsqueeze(-2)
    with torch.no_grad():
        assert operators(lambda: chunked(terms, u, state, at_once=16)) <= 300
        if terms.has_delta_rule:
            assert (
                operators(lambda: states_of_delta_rule(decay, write, terms.erase.unsqueeze(-2), terms.probe, state))
                <= 300
            )
        else:
            assert operators(lambda: linear_scan(decay, write, state)) <= 300


def test_scans_of_channels_are_few_operators(side_by_side):
    sequences, A, initial = inputs(1024, grad=False)
    assert operators(lambda: scan(mamba_terms, sequences, (A,), initial)) <= 300
    k, v, rest = sequences[0], sequences[3], sequences[0][0, 0]
    carry = Carry(k[:, 0], k[:, 1], v[:, 0])
    assert operators(lambda: wkv(k, v, -rest, rest, None, carry)) <= 300

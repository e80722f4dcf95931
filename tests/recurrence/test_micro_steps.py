"""Positions of several steps: the scan, what the steps write together, and every view of each step's matrix, literally."""

from __future__ import annotations

import pytest
import torch

from gatedlens.recurrence import chunks, head_blocks
from gatedlens.recurrence.head_matrix import HeadScan
from gatedlens.recurrence.literal import literal_states
from gatedlens.recurrence.micro_steps import StepScan, at_step, net_write, step_chunked
from gatedlens.recurrence.terms import Terms
from tests.recurrence.test_chunks import close

B, L, N, H, V, K = 2, 7, 3, 2, 2, 4


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small blocks and patches, so that short inputs cross several."""
    monkeypatch.setattr(chunks, "CHUNK", 4)
    monkeypatch.setattr(head_blocks, "PATCH", 5)


def draw(begins=()):
    """(terms over (pos step), u, a state); a document begins at these positions."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    fresh = torch.zeros(B, L, 1, dtype=torch.float64)
    fresh[:, list(begins)] = 1
    log = -normal(B, L, H, 1).abs()
    terms = Terms(
        at_step(log, 0, N),
        key=normal(B, L * N, H, K),
        read=at_step(normal(B, L, H, K), -1, N),
        erase=0.3 * normal(B, L * N, H, K),
        probe=normal(B, L * N, H, K),
        fresh=at_step(fresh, 0, N),
    )
    return terms, normal(B, L, N, H, V), normal(B, H, V, K)


def literal(terms, u, state):
    """(the readout behind the steps of each position, the last state), one step behind the other."""
    scans = []
    for t in range(L):
        for s in range(N):
            at = terms.at(slice(t * N + s, t * N + s + 1))
            state = literal_states(at, u[:, t, s].unsqueeze(1), state)[:, 0]
        scans.append((state * terms.read[:, t * N + N - 1].unsqueeze(-2)).sum(-1))
    return torch.stack(scans, 1), state


@pytest.mark.parametrize("begins", [(), (0, 3)])
def test_the_scan_and_its_last_state(begins):
    terms, u, state = draw(begins)
    for got, want in zip(step_chunked(terms, u, state), literal(terms, u, state), strict=True):
        close(got, want)


def test_what_the_steps_of_a_position_write_together():
    terms, u, _ = draw()
    write = terms.write(u.flatten(1, 2)).unflatten(1, (L, N))
    erase, probe = (x.unflatten(1, (L, N)) for x in (terms.erase, terms.probe))
    alone = net_write(write, erase.unsqueeze(-2), probe)
    for t in range(L):
        states = literal_states(
            terms.at(slice(t * N, (t + 1) * N)), u[:, t], torch.zeros(B, H, V, K, dtype=torch.float64)
        )
        close(alone[:, t], states[:, -1])


@pytest.mark.parametrize("begins", [(), (0, 3)])
@pytest.mark.parametrize("step", range(N))
def test_every_view_is_the_matrix(step, begins):
    terms, _, state = draw(begins)
    scan, none = StepScan(HeadScan.of(terms, V), N, step), torch.zeros(B, H, V, K, dtype=torch.float64)
    columns = []
    for j in range(L):
        u = torch.zeros(B, L, N, H, V, dtype=torch.float64)
        u[:, j, step] = 1
        columns.append(literal(terms, u, none)[0].flatten(2))
    matrix = torch.stack(columns, -1).transpose(1, 2)  # batch channel dst src
    generator = torch.Generator().manual_seed(1)
    x, g, left, right = torch.randn(4, B, L, H * V, generator=generator, dtype=torch.float64)
    start = literal(terms, torch.zeros(B, L, N, H, V, dtype=torch.float64), state)[0].flatten(2)
    taps = torch.randn(H * V, 2, generator=generator, dtype=torch.float64)
    assert scan.length == L
    close(scan.dense(), matrix)
    close(scan.select([3, 1]).dense(), matrix[:, [3, 1]])
    close(scan.apply(x, state.flatten(1, 2)), torch.einsum("bcij,bjc->bic", matrix, x) + start)
    close(scan.apply_transposed(g), torch.einsum("bcij,bic->bjc", matrix, g))
    places = torch.tensor([L - 1, 2])
    close(scan.seen(places), torch.stack([matrix[b, :, i].mT for b, i in enumerate(places.tolist())]))
    weighted = torch.einsum("bic,bcij,bjc->bij", left, matrix, right)
    close(scan.contracted(left, right), weighted)
    close(scan.summed(left, right, taps), scan.folded(left, right, taps).sum(1))
    assert (scan.mean_log_decay(torch.ones(B, L, 1)) - terms.log_decay[:, ::N].mean(1)).abs().max() < 1e-14


def test_where_some_erase_nothing():
    terms, _, _ = draw()
    src = torch.zeros(B, L, 1, dtype=torch.float64)
    src[:, 2] = 1
    erase = terms.erase.clone()
    erase[:, 2 * N : 3 * N] = 0
    want = StepScan(HeadScan.of(terms._replace(erase=erase), V), N, 1).dense()
    close(StepScan(HeadScan.of(terms, V), N, 1).unerased(src).dense(), want)

"""A scan that reads the state before its own step: forward and every view of its matrix against the literal recurrence."""

from __future__ import annotations

import pytest
import torch

from gatedlens.recurrence import chunks, head_blocks
from gatedlens.recurrence.literal import literal_states
from gatedlens.recurrence.prior_matrix import PriorScan, prior_chunked
from tests.recurrence.test_chunks import KINDS, H, L, V, close, draw


@pytest.fixture(params=[False, True], ids=["one document", "several documents"])
def fresh(request):
    return request.param


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small blocks and patches, so that short inputs cross several."""
    monkeypatch.setattr(chunks, "CHUNK", 4)
    monkeypatch.setattr(head_blocks, "PATCH", 3)


def literal(terms, u, state):
    """(scan_t = S_{t-1} read_t, the last state), as it is written; a document finds nothing of the one before."""
    states = literal_states(terms, u, state)
    before = torch.cat([state.unsqueeze(1), states[:, :-1]], 1)
    if terms.fresh is not None:
        before = before * (1 - terms.fresh)[..., None, None]
    return (before * terms.of_heads(terms.read).unsqueeze(-2)).sum(-1), states[:, -1]


def matrix(terms):
    """S[i, j] of each head: what the read of i finds of a one that j wrote."""
    columns = []
    for j in range(L):
        only = torch.zeros(*terms.log_decay.shape[:3], 1, dtype=torch.float64)
        only[:, j] = 1
        columns.append(literal(terms, only, torch.zeros(len(only), H, 1, terms.key.shape[3], dtype=torch.float64))[0])
    return torch.cat(columns, dim=-1).permute(0, 2, 1, 3)


def weights(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_the_scan_and_its_last_state(kind, fresh):
    terms, u, state = draw(kind, fresh=fresh)
    for got, want in zip(prior_chunked(terms, u, state), literal(terms, u, state), strict=True):
        close(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_is_the_matrix(kind, fresh):
    terms, u, state = draw(kind, fresh=fresh)
    scan, want = PriorScan.of(terms, V), matrix(terms).repeat_interleave(V, dim=1)
    x, g = u.flatten(2), weights(*u.flatten(2).shape)
    assert scan.length == L and not want.diagonal(dim1=-2, dim2=-1).any()
    close(scan.dense(), want)
    close(scan.select([1, H * V - 1]).dense(), want[:, [1, H * V - 1]])
    close(scan.apply(x), torch.einsum("bcij,bjc->bic", want, x))
    close(scan.apply(x, state.flatten(1, 2)), literal(terms, u, state)[0].flatten(2))
    close(scan.apply_transposed(g), torch.einsum("bcij,bic->bjc", want, g))
    i = torch.tensor([L - 1, 4])
    close(scan.seen(i), torch.stack([want[0, :, L - 1], want[1, :, 4]]).mT)


@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_over_channels_the_conv_and_the_skip(kind, taps, fresh):
    terms, _, _ = draw(kind, fresh=fresh)
    scan, want = PriorScan.of(terms, V), matrix(terms).repeat_interleave(V, dim=1)
    left, right, conv = weights(2, L, H * V), weights(2, L, H * V, seed=4), weights(H * V, taps, seed=5)
    taken = torch.einsum("bic,bcij,bjc->bcij", left, want, right)
    folded = sum(
        torch.nn.functional.pad(
            torch.einsum("bic,bcij,bjc,c->bcij", left, want, right, conv[:, taps - 1 - k])[..., k:], (0, k)
        )
        for k in range(taps)
    )
    close(scan.summed(left, right, conv), folded.sum(1))
    for skip in (weights(H * V), weights(2, L, H * V)):
        found = scan.absolute(left, right, conv, skip)
        if taps > 1:
            assert found is None
            continue
        direct = torch.diag_embed((left * skip * right).mT)
        close(found, ((taken + direct) * conv[:, 0, None, None]).abs().sum(1))

"""The delta rule as terms, against the rule as papers write it: decay, then take out what the key finds, then write."""

from __future__ import annotations

import pytest
import torch

from gatedlens.parts.delta_rule import UNIT_EPS, delta_terms, unit
from gatedlens.recurrence.chunks import chunked
from tests.helpers import relative

B, L, H, G, N, V = 2, 70, 4, 2, 3, 5


def noise(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("by_key", [False, True], ids=["a decay a head", "a decay of each number of a key"])
def test_the_terms_are_the_rule(by_key):
    q, k, u = noise(B, L, G, N, seed=0), unit(noise(B, L, G, N, seed=1)), noise(B, L, H, V, seed=2)
    beta = 2 * torch.sigmoid(noise(B, L, H, seed=3))
    log_decay = -noise(B, L, H, N if by_key else 1, seed=4).exp()
    scan, last = chunked(delta_terms(q, k, beta, log_decay), u, torch.zeros(B, H, V, N, dtype=torch.float64))
    want = torch.zeros_like(u)
    for b in range(B):
        for h in range(H):
            state, g = torch.zeros(V, N, dtype=torch.float64), h // (H // G)
            for t in range(L):
                key = k[b, t, g]
                state = state * torch.exp(log_decay[b, t, h])
                state = state + beta[b, t, h] * torch.outer(u[b, t, h] - state @ key, key)
                want[b, t, h] = state @ q[b, t, g] / N**0.5
            assert relative(last[b, h], state) < 1e-10
    assert relative(scan, want) < 1e-10


def test_a_unit_is_one_long_but_for_nothing():
    x = noise(4, N, seed=5)
    assert relative(unit(x).norm(dim=-1), torch.ones(4, dtype=torch.float64)) < 1e-5
    assert torch.equal(unit(torch.zeros(N)), torch.zeros(N)) and unit(x.bfloat16()).dtype == torch.float32
    assert relative(unit(x), x / (x.pow(2).sum(-1, keepdim=True) + UNIT_EPS).sqrt()) < 1e-14

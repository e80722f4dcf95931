"""Steps that write the term before them too: the scan against the equation, and the matrix of each rank."""

from __future__ import annotations

import pytest
import torch

from gatedlens.recurrence import chunks
from gatedlens.recurrence.literal import literal_matrix
from gatedlens.recurrence.two_terms import TwoTerms, Wrote, following
from tests.recurrence.test_chunks import close

B, L, H, V, K = 2, 7, 2, 3, 4


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("begins", [(), (0, 3)])
def test_the_scan_its_last_state_and_its_matrices(monkeypatch, ranks, begins):
    monkeypatch.setattr(chunks, "CHUNK", 4)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    fresh = torch.zeros(B, L, 1, dtype=torch.float64)
    fresh[:, list(begins)] = 1
    log, gamma, beta = -normal(B, L, H).abs(), normal(B, L, H), normal(B, L, H)
    key, read, u = normal(B, L, ranks, H, K), normal(B, L, ranks, H, K), normal(B, L, ranks, H, V)
    terms = TwoTerms(log, gamma, beta, following(beta, fresh), key, read, fresh)
    start, first = normal(B, H, V, K), Wrote(normal(B, ranks, H, V), normal(B, ranks, H, K))
    before = first.times(torch.ones(B, H, dtype=torch.float64))

    def literal(start, before):
        state, scan, states = start, torch.zeros(B, L, ranks, H, V, dtype=torch.float64), []
        for t in range(L):
            own = sum(u[:, t, r].unsqueeze(-1) * key[:, t, r].unsqueeze(-2) for r in range(ranks))
            decay = (torch.exp(log[:, t]) * (1 - fresh[:, t]))[..., None, None]
            state = decay * (state + beta[:, t, :, None, None] * before) + gamma[:, t, :, None, None] * own
            before = own
            states.append(state)
            for r in range(ranks):
                scan[:, t, r] = (state * read[:, t, r].unsqueeze(-2)).sum(-1)
        return scan, torch.stack(states, 1)

    want, states = literal(start, before)
    got, last = terms.scan(u, terms.begun(start, first))
    close(got, want)
    close(last, states[:, -1])
    close(terms.readout(states), want)
    lagged = (torch.cat([x.unsqueeze(1), y[:, :-1]], dim=1) for x, y in zip(first, (u, key), strict=True))
    kept = terms.decays().unsqueeze(-1) * torch.cat([start.unsqueeze(1), states[:, :-1]], dim=1)
    close(kept + terms.write(Wrote(u, key), Wrote(*lagged)), states)
    want, _ = literal(torch.zeros_like(start), torch.zeros_like(before))
    for r in range(ranks):
        found = 0
        for w in range(ranks):
            S = literal_matrix(terms.terms(w, r))
            found = (
                found + torch.einsum("bhij,bjhv->bihv", S, u[:, :, w]) - terms.too_early(w, r)[..., None] * u[:, :, w]
            )
        close(found, want[:, :, r])

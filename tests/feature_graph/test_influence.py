"""Influence: sums over paths, what pruning keeps, and the two scores, on graphs that can be told by hand."""

from __future__ import annotations

import torch

from gatedlens.feature_graph import influence


def some_edges(n=9, seed=0):
    """Edges of a graph whose nodes are in an order: from each to later ones."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, n, generator=draw, dtype=torch.float64).tril(-1)


def test_influence_is_the_sum_over_paths():
    A, w = some_edges(), torch.zeros(9, dtype=torch.float64)
    w[7], w[8] = 0.3, 0.6
    a = influence.shares(A)
    assert torch.allclose(a.sum(1)[1:], torch.ones(8, dtype=torch.float64)) and bool((a[0] == 0).all())
    whole = torch.linalg.inv(torch.eye(9, dtype=torch.float64) - a) - torch.eye(9, dtype=torch.float64)
    assert torch.allclose(influence.of_nodes(a, w), w @ whole, atol=1e-12)
    assert torch.allclose(influence.of_edges(a, w), a * (w @ whole + w).unsqueeze(1), atol=1e-12)


def test_the_least_score_that_makes_up_a_share():
    scores = torch.tensor([0.1, 0.5, 0.2, 0.2])
    assert influence.least(scores, 0.5) == 0.5 and abs(influence.least(scores, 0.8) - 0.2) < 1e-6
    assert abs(influence.least(scores, 1.0) - 0.1) < 1e-6 and influence.least(torch.zeros(3), 0.8) == 0.0
    assert torch.allclose(influence.cumulative(scores), torch.tensor([1.0, 0.5, 0.7, 0.9]))


def test_pruning_keeps_what_leads_to_a_logit():
    """token 0 -> feature 1 -> logit 3 is strong; feature 2 is weak, and what it alone feeds goes with it."""
    A = torch.zeros(4, 4, dtype=torch.float64)
    A[1, 0], A[3, 1], A[3, 2], A[2, 0] = 1.0, 5.0, -0.01, 1.0
    w = torch.tensor([0.0, 0, 0, 1], dtype=torch.float64)
    stay, fed = torch.tensor([True, False, False, True]), torch.tensor([False, True, True, False])
    kept, joined = influence.pruned(A, w, 0.8, 0.98, stay, fed)
    assert kept.tolist() == [True, True, False, True] and joined.nonzero().tolist() == [[1, 0], [3, 1]]
    kept, joined = influence.pruned(A, w, 1.0, 1.0, stay, fed)
    assert bool(kept.all()) and int(joined.sum()) == 4
    A[1, 0] = 0.0  # nothing makes feature 1 any more
    kept, joined = influence.pruned(A, w, 1.0, 1.0, stay, fed)
    assert kept.tolist() == [True, False, True, True]


def test_the_scores_by_hand():
    """A logit made of 3 of a token and 1 of an error, by a feature that is made of 1 of each."""
    A = torch.zeros(4, 4, dtype=torch.float64)  # token, error, feature, logit
    A[3, 2], A[2, 0], A[2, 1] = 2.0, 1.0, -1.0
    w = torch.tensor([0.0, 0, 0, 1], dtype=torch.float64)
    tokens, errors = torch.tensor([True, False, False, False]), torch.tensor([False, True, False, False])
    a = influence.shares(A)
    found = influence.of_nodes(a, w)
    assert found.tolist() == [0.5, 0.5, 1.0, 0.0]
    assert influence.replacement(found, tokens, errors) == 0.5
    # of 3 in all: the logit 1 (none of it an error), the feature 1 (half), the ends 1 in two halves
    assert abs(influence.completeness(a, found, w, errors) - 2.5 / 3) < 1e-12

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
    a, at = influence.shares(A), torch.arange(9)
    assert torch.allclose(a.sum(1)[1:], torch.ones(8, dtype=torch.float64)) and bool((a[0] == 0).all())
    whole = torch.linalg.inv(torch.eye(9, dtype=torch.float64) - a) - torch.eye(9, dtype=torch.float64)
    assert torch.allclose(influence.of_nodes(a, at, w), w @ whole, atol=1e-12)
    assert torch.allclose(influence.of_edges(a, at, w), a * (w @ whole + w).unsqueeze(1), atol=1e-12)
    some = torch.arange(1, 9)  # node 0 is no target
    assert torch.allclose(influence.of_nodes(a[1:], some, w), w @ whole, atol=1e-12)
    assert torch.equal(influence.of_edges(a[1:], some, w), influence.of_edges(a, at, w)[1:])


def test_the_least_score_that_makes_up_a_share():
    scores = torch.tensor([0.1, 0.5, 0.2, 0.2])
    assert influence.least(scores, 0.5) == 0.5 and abs(influence.least(scores, 0.8) - 0.2) < 1e-6
    assert abs(influence.least(scores, 1.0) - 0.1) < 1e-6 and influence.least(torch.zeros(3), 0.8) == 0.0
    assert torch.allclose(influence.cumulative(scores), torch.tensor([1.0, 0.5, 0.7, 0.9]))


def test_pruning_keeps_what_leads_to_a_logit():
    """token 0 -> feature 1 -> logit 3 is strong; feature 2 is weak, and what it alone feeds goes with it."""
    A, at = torch.zeros(3, 4, dtype=torch.float64), torch.tensor([1, 2, 3])
    A[0, 0], A[2, 1], A[2, 2], A[1, 0] = 1.0, 5.0, -0.01, 1.0
    w = torch.tensor([0.0, 0, 0, 1], dtype=torch.float64)
    stay = torch.tensor([True, False, False, True])
    kept, joined = influence.pruned(A, at, w, 0.8, 0.98, stay)
    assert kept.tolist() == [True, True, False, True] and joined.nonzero().tolist() == [[0, 0], [2, 1]]
    kept, joined = influence.pruned(A, at, w, 1.0, 1.0, stay)
    assert bool(kept.all()) and int(joined.sum()) == 4
    A[0, 0] = 0.0  # nothing makes feature 1 any more
    kept, joined = influence.pruned(A, at, w, 1.0, 1.0, stay)
    assert kept.tolist() == [True, False, True, True]


def test_the_scores_by_hand():
    """A logit made of a feature, which is made of a token and an error, 1 and -1."""
    A, at = torch.zeros(2, 4, dtype=torch.float64), torch.tensor([2, 3])  # token, error, feature, logit
    A[1, 2], A[0, 0], A[0, 1] = 2.0, 1.0, -1.0
    w = torch.tensor([0.0, 0, 0, 1], dtype=torch.float64)
    tokens, errors = torch.tensor([True, False, False, False]), torch.tensor([False, True, False, False])
    a = influence.shares(A)
    found = influence.of_nodes(a, at, w)
    assert found.tolist() == [0.5, 0.5, 1.0, 0.0]
    assert influence.replacement(found, tokens, errors) == 0.5
    # of 3 in all: the logit 1 (none of it an error), the feature 1 (half), the ends 1 in two halves
    assert abs(influence.completeness(a, at, found, w, errors) - 2.5 / 3) < 1e-12

"""Rank, mass and hit of a known answer."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens import attribution
from gatedlens.evaluation import located


def test_rank_mass_and_hit_by_hand():
    scores = torch.tensor([[0.5, 3.0, -1.0, 1.0], [2.0, 2.0, 9.0, -4.0], [-1.0, -2.0, -3.0, 0.0]])
    truth = torch.tensor([[False, False, False, True], [False, True, False, False], [True, True, False, False]])
    found = located(scores, truth)
    assert found.rank.tolist() == [1, 2, 1] and found.hit.tolist() == [0, 0, 0]
    assert found.mass.tolist() == pytest.approx([1 / 4.5, 2 / 13, 0])
    free = torch.tensor([[True, False, True, True], [True, True, False, True], [True, True, True, False]])
    found = located(scores, truth, free)
    assert found.rank.tolist() == [0, 1, 0] and found.mass.tolist() == pytest.approx([1 / 1.5, 0.5, 0])


def test_the_answer_of_recall_is_found_and_chance_is_in_the_middle(recall_model):
    batch = gl.tasks.recall(32, seed=3)
    truth = torch.zeros(batch.tokens.shape, dtype=torch.bool)
    truth[torch.arange(32), batch.answer_pos] = True
    free = torch.ones_like(truth)
    free[:, -1] = False  # what is asked for, which every prompt needs as well
    best = located(attribution.lrp(recall_model, batch.tokens, batch.answers), truth, free)
    chance = located(attribution.random(recall_model, batch.tokens), truth, free)
    assert best.rank.mean() < 0.5 and best.hit.mean() > 0.8 and best.mass.mean() > 0.3
    assert 7 < chance.rank.mean() < 12 and chance.mass.mean() == pytest.approx(1 / 20, abs=0.02)


def test_mistakes_are_explained():
    truth = torch.tensor([[True, False]])
    with pytest.raises(gl.InputError, match="shape"):
        located(torch.zeros(1, 3), truth)
    with pytest.raises(gl.InputError, match="no place where the answer stands"):
        located(torch.zeros(1, 2), truth, torch.tensor([[False, True]]))

"""Positions: every way of saying them, and what is said of those that do not exist."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens.positions import mask_of, one_a_row


def said(mask):
    return [row.nonzero().flatten().tolist() for row in mask]


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (3, [[3], [3]]),
        (-1, [[4], [4]]),
        (torch.tensor(2), [[2], [2]]),
        ([1, -1], [[1, 4], [1, 4]]),
        (range(1, 3), [[1, 2], [1, 2]]),
        (slice(3, None), [[3, 4], [3, 4]]),
        (torch.tensor([0, 2]), [[0], [2]]),
        (torch.tensor([[0, 1], [2, -1]]), [[0, 1], [2, 4]]),
        (torch.tensor([[0, 3]]), [[0, 3], [0, 3]]),
        ([[0, 1], [4]], [[0, 1], [4]]),
        ([[], [4]], [[], [4]]),
        (torch.tensor([True, False, False, True, False]), [[0, 3], [0, 3]]),
        (torch.eye(5, dtype=torch.bool)[:2], [[0], [1]]),
    ],
)
def test_every_way_of_saying_them(given, want):
    assert said(mask_of(given, "src", 2, 5)) == want


def test_one_a_row():
    assert one_a_row(-2, "pos", 2, 5).tolist() == [3, 3]
    assert one_a_row(torch.tensor([0, 4]), "pos", 2, 5).tolist() == [0, 4]
    with pytest.raises(gl.InputError, match="one position is meant in each row"):
        one_a_row([1, 2], "pos", 2, 5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (5, "src=5 is out of range: row 0 has 5 positions"),
        (torch.tensor([0, -6]), "src=-6 is out of range: row 1"),
        (torch.tensor([0, 1, 2]), "has 3 rows; the batch has 2. A plain list of positions goes for every row"),
        ([[1], [2], [3]], "has 3 rows; the batch has 2"),
        ([], "names no position"),
        (slice(9, 12), "names no position"),
        (1.5, "no position"),
        ("last", "no position"),
        (torch.tensor([0.5, 1.0]), "whole numbers"),
        (torch.zeros(2, 1, 1, dtype=torch.long), "give \\[batch\\]"),
        (torch.ones(3, 5, dtype=torch.bool), r"mask \[3, 5\]; the input is \[2, 5\]"),
    ],
)
def test_mistakes_are_explained(given, message):
    with pytest.raises(gl.InputError, match=message):
        mask_of(given, "src", 2, 5)

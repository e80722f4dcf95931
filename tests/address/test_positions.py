"""Positions: every way of saying them, and what is said of those that do not exist."""

from __future__ import annotations

import numpy
import pytest
import torch

import gatedlens as gl
from gatedlens.address.positions import columns, listed, mask_of, one_a_row

WHOLE = torch.ones(2, 5, dtype=torch.bool)


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
        (None, [[0, 1, 2, 3, 4]] * 2),
        ("*", [[0, 1, 2, 3, 4]] * 2),
        ("[13]", [[1, 3]] * 2),
        (numpy.array([0, 2]), [[0], [2]]),
        (numpy.int64(2), [[2], [2]]),
        ([torch.tensor(1), numpy.int64(3)], [[1, 3]] * 2),
        (torch.tensor([True, False, False, True, False]), [[0, 3], [0, 3]]),
        ([True, False, False, True, False], [[0, 3], [0, 3]]),
        (torch.eye(5, dtype=torch.bool)[:2], [[0], [1]]),
    ],
)
def test_every_way_of_saying_them(given, want):
    assert said(mask_of(given, "src", WHOLE)) == want


def test_one_a_row():
    assert one_a_row(-2, "pos", WHOLE).tolist() == [3, 3]
    assert one_a_row(torch.tensor([0, 4]), "pos", WHOLE).tolist() == [0, 4]
    assert one_a_row([1, -1], "pos", WHOLE).tolist() == [1, 4], "where one a row is meant, a list can be nothing else"
    with pytest.raises(gl.InputError, match="one position is meant in each row"):
        one_a_row([1, 2, 3], "pos", WHOLE)
    with pytest.raises(gl.InputError, match="one position is meant in each row"):
        one_a_row(slice(1, 3), "pos", WHOLE)


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
        (True, "no position"),
        ([0, "last"], "no position"),
        (torch.tensor([0.5, 1.0]), "whole numbers"),
        (torch.zeros(2, 1, 1, dtype=torch.long), "give \\[batch\\]"),
        (torch.ones(3, 5, dtype=torch.bool), r"mask \[3, 5\]; the input is \[2, 5\]"),
    ],
)
def test_mistakes_are_explained(given, message):
    with pytest.raises(gl.InputError, match=message):
        mask_of(given, "src", WHOLE)


# Rows of 3 and 2 real positions, padded on the left, on the right, and in between.
PADDED = {
    "left": torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]).bool(),
    "right": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]).bool(),
    "holes": torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 1, 0]]).bool(),
}


@pytest.mark.parametrize("real", PADDED.values(), ids=list(PADDED))
@pytest.mark.parametrize(
    ("given", "want"),
    [
        (1, [[1], [1]]),
        (-1, [[2], [1]]),
        ([0, -2], [[0, 1], [0]]),
        (slice(-2, None), [[1, 2], [0, 1]]),
        (slice(2, None), [[2], []]),
        (None, [[0, 1, 2], [0, 1]]),
        ("*", [[0, 1, 2], [0, 1]]),
        ("[12]", [[1, 2], [1]]),
        (torch.tensor([2, -2]), [[2], [0]]),
        ([[0, 2], [-1]], [[0, 2], [1]]),
    ],
)
def test_they_count_real_positions(real, given, want):
    mask = mask_of(given, "pos", real)
    assert listed(mask, real) == want and not (mask & ~real).any()


@pytest.mark.parametrize("real", PADDED.values(), ids=list(PADDED))
def test_one_a_row_and_columns_count_them_too(real):
    places = [row.nonzero().flatten() for row in real]
    for given, want in ((-1, (2, 1)), (1, (1, 1)), ([2, -2], (2, 0)), (torch.tensor([0, 1]), (0, 1))):
        found = one_a_row(given, "pos", real)
        assert found.tolist() == [int(places[row][k]) for row, k in enumerate(want)]
    found = {name: listed(mask, real) for name, mask in columns(None, "pos", real).items()}
    assert found == {0: [[0], [0]], 1: [[1], [1]], 2: [[2], []]}, "a row that is too short takes no part"
    found = {name: listed(mask, real) for name, mask in columns([-1, -3], "pos", real).items()}
    assert found == {-1: [[2], [1]], -3: [[0], []]}
    found = {name: listed(mask, real) for name, mask in columns({"ends": [0, -1]}, "pos", real).items()}
    assert found == {"ends": [[0, 2], [0, 1]]}
    assert mask_of(real, "pos", real).equal(real), "a mask speaks of places in the input"
    with pytest.raises(gl.InputError, match="pos: the mask marks nothing but padding in row 1"):
        mask_of(real & torch.tensor([[True], [False]]) | ~real & torch.tensor([[False], [True]]), "pos", real)
    with pytest.raises(gl.InputError, match="pos=2 is out of range: row 1 has 2 positions"):
        mask_of(2, "pos", real)
    with pytest.raises(gl.InputError, match="pos 3 is out of range: the longest row has 3 positions"):
        columns([3], "pos", real)

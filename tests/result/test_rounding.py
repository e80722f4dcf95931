"""What is noise and what is not, in every precision; orders that noise does not move."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gatedlens.result.rounding import STEP, figures, levels, moved, order, total

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_that_is_rounding_is_zero(dtype):
    terms = draw(50, 64)
    cancelled = (terms - terms.mean(-1, keepdim=True)).to(dtype)  # sums to 0, each term rounded
    assert not total(cancelled.double(), dtype).any() and not total(cancelled.double() * 1e-6, dtype).any()
    assert total(cancelled).dtype == dtype
    real = terms.to(dtype)
    kept = total(real)
    assert torch.equal(kept[kept != 0], real.sum(-1)[kept != 0]) and (kept != 0).double().mean() > 0.9
    assert not total(torch.zeros(3, 4, dtype=dtype)).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_that_differ_by_rounding_have_not_moved(dtype):
    a = draw(20, 64).to(dtype)
    near = (a.double() * (1 + torch.finfo(dtype).eps * draw(20, 64, seed=1))).to(dtype)
    assert not moved(a, near).any() and not moved(a, a).any() and moved(a, draw(20, 64, seed=2).to(dtype)).all()
    assert not moved(torch.zeros(1, 3), torch.zeros(1, 3)).any() and moved(torch.zeros(1, 3), torch.ones(1, 3)).all()


def test_levels_are_steps_of_the_largest():
    top = 1 / STEP
    scores = torch.tensor([[4.0, -2.0, 0.0, 4 * STEP, 1.9 * STEP], [1e-300, 1e-300, 0, 0, 0]], dtype=torch.float64)
    assert levels(scores).tolist() == [[top, -top / 2, 0, 1, 0], [top, top, 0, 0, 0]]
    among = torch.tensor([[False, True, True, True, True]] * 2)
    assert levels(scores, among)[0].tolist() == [2 * top, -top, 0, 2, 1]
    odd = torch.tensor([torch.nan, torch.inf, 1.0, -torch.inf])
    assert levels(odd)[1:].tolist() == [torch.inf, top, -torch.inf] and levels(odd)[0].isnan()
    assert levels(torch.zeros(2, 0)).shape == (2, 0)


def test_orders():
    assert order([0.5, 2.0, 0.5, 2.0 + 1e-7, -1.0]).tolist() == [1, 3, 0, 2, 4]
    assert order([1.0, torch.nan, 3.0, -torch.inf, torch.inf]).tolist() == [4, 2, 0, 3, 1]
    among = torch.tensor([True, False, True, True])
    assert order(torch.tensor([1.0, 1e9, 3.0, 2.0]), among).tolist() == [2, 3, 0, 1]
    assert order([]).tolist() == []


def test_simple_fractions_are_not_between_two_steps():
    """Ratios of small numbers, which scores often are (bilinear weights, counts): noise never moves their level."""
    ratios = torch.tensor([p / q for q in range(1, 129) for p in range(q + 1)], dtype=torch.float64)
    for seed in range(5):
        noisy = 0.3 * ratios * (1 + 1e-14 * draw(len(ratios), seed=seed))
        assert torch.equal(levels(noisy), levels(ratios))


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=12), st.integers(0, 10**6))
def test_noise_moves_no_order(values, seed):
    """Whole numbers with many ties: by Python's sort, however their last digits fall."""
    exact = torch.tensor(values, dtype=torch.float64)
    noisy = exact * 0.37 + 1e-9 * draw(len(values), seed=seed)
    assert order(noisy).tolist() == sorted(range(len(values)), key=lambda i: -values[i]) or not exact.any()


def test_figures():
    values = torch.tensor([1.0, 1 - 1e-7, 1 + 1e-7, -1e-200, 3e200, 0, torch.inf, torch.nan], dtype=torch.float64)
    found = figures(values)
    assert found[:3].tolist() == [1, 1, 1] and found[5] == 0 and found[6] == torch.inf and found[7].isnan()
    assert torch.allclose(found[:5], values[:5], rtol=1e-5, atol=0)
    assert torch.equal(figures(found[:6]), found[:6])
    rising = draw(1000).sort().values
    assert (figures(rising).diff() >= 0).all()

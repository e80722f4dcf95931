"""The decay scan's matrix, bottom-up: with and without gradients, decays that vanish, weights of any size, rows apart."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from gatedlens.recurrence.decay_blocks import powers_of_two, scaled_by_power
from gatedlens.recurrence.decay_matrix import DecayScan
from tests.helpers import relative

LENGTHS = [1, 2, 4, 5, 7, 8, 13, 16, 21, 36]


def scan_of(length: int, dtype: torch.dtype = torch.float64, pace: float = 1.0, seed: int = 0) -> DecayScan:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    time, rate = (pace * random(2, length, 5)).cumsum(1), -3 * random(5, 3)
    rest = random(2, length, 3) - 0.5, random(2, length, 5), random(2, length, 3) - 0.5
    return DecayScan(time, *(x.to(dtype) for x in (rate, *rest)))


def literal(scan: DecayScan, left: torch.Tensor, right: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """[b, c, i, j] in float64, one pair of positions at a time."""
    rate, read, amount, key = (x.double() for x in (scan.rate, scan.read, scan.amount, scan.key))
    batch, length, channels = scan.time.shape
    S = torch.zeros(batch, channels, length, length, dtype=torch.float64)
    for i in range(length):
        for m in range(i + 1):
            decay = torch.exp((scan.time[:, i] - scan.time[:, m]).unsqueeze(-1) * rate)
            S[:, :, i, m] = (
                (decay * (read[:, i] * key[:, m]).unsqueeze(1)).sum(-1) * amount[:, m] * right[:, m].double()
            )
    A = torch.zeros_like(S)
    for k in range(min(taps.shape[1], length)):
        A[..., : length - k] += S[..., k:] * taps.double()[:, -1 - k, None, None]
    return A * left.double().mT.unsqueeze(-1)


def factors_of(scan: DecayScan, width: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(scan.time.shape, generator=generator, dtype=scan.rate.dtype) for _ in range(2))
    return left, right, torch.randn(5, width, generator=generator, dtype=scan.rate.dtype)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("length", LENGTHS)
def test_every_length_and_width_is_the_literal_sum(length, width):
    scan = scan_of(length)
    factors = factors_of(scan, width)
    wanted = literal(scan, *factors)
    assert relative(scan.folded(*factors), wanted) < 1e-12
    assert relative(scan.summed(*factors), wanted.sum(1)) < 1e-12


@pytest.mark.parametrize("length", [5, 16, 21])
def test_with_gradients_it_is_the_same_and_they_are_exact(length):
    scan = scan_of(length)
    factors = factors_of(scan)
    names = ("time", "rate", "read", "amount", "key")

    def both(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        again = DecayScan(*tensors[:5])
        return again.summed(*tensors[5:]), again.folded(*tensors[5:])

    live = [x.clone().requires_grad_() for x in (*(getattr(scan, name) for name in names), *factors)]
    for got, quiet in zip(both(*live), (scan.summed(*factors), scan.folded(*factors)), strict=True):
        assert relative(got.detach(), quiet) < 1e-13
    assert torch.autograd.gradcheck(both, live, fast_mode=True)
    _, forward = torch.func.jvp(both, tuple(x.detach() for x in live), tuple(torch.ones_like(x) for x in live))
    backward = torch.autograd.grad(both(*live)[0].sum(), live)
    assert torch.allclose(forward[0].sum(), sum(x.sum() for x in backward), rtol=1e-10)


@pytest.mark.parametrize("pace", [0.01, 10.0, 1000.0])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_in_float32_whatever_the_decays_and_the_size_of_the_weights(pace, size):
    scan = scan_of(36, torch.float32, pace)
    left, right, taps = factors_of(scan)
    wanted = literal(scan, left * size, right, taps)
    assert relative(scan.folded(left * size, right, taps).double(), wanted) < 1e-5
    assert relative(scan.summed(left * size, right, taps).double(), wanted.sum(1)) < 1e-5


def test_a_weight_of_zero_or_a_broken_one_stays_what_it_is():
    scan = scan_of(9)
    left, right, taps = factors_of(scan)
    assert scan.summed(left * 0, right, taps).abs().max() == 0
    assert scan.summed(left * torch.nan, right, taps).isnan().any()


def test_a_row_of_its_own_in_each_batch_element():
    scan = scan_of(13)
    dense, places = scan.dense(), torch.tensor([3, 11])
    rows = scan.seen(places)
    for b, i in enumerate(places.tolist()):
        assert torch.allclose(rows[b], dense[b, :, i].mT, atol=1e-13)


# -- factors of any size ----------------------------------------------------------------------------------------------


def sized(scan: DecayScan, dtype: torch.dtype, **powers: float) -> DecayScan:
    """The scan with some factors times powers of ten."""
    return replace(scan, **{name: getattr(scan, name).to(dtype) * 10.0**power for name, power in powers.items()})


SIZES = [
    {"left": -26},
    {"left": -36},
    {"amount": -31},
    {"left": -20, "right": -15},
    {"key": -25, "read": 20},
    {"left": 30, "amount": -30},
    {"left": 15, "right": 15},
    {"left": 37},
    {"taps": -30, "right": 28},
    {"left": 30, "right": 30, "key": -30, "read": -30},
]


@pytest.mark.parametrize("followed", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_very_small_and_very_large_factors_in_float32(sizes, followed):
    scan = scan_of(21, torch.float32)
    factors = dict(zip(("left", "right", "taps"), factors_of(scan), strict=True))
    scan = sized(scan, torch.float32, **{name: power for name, power in sizes.items() if name not in factors})
    factors = {name: x * 10.0 ** sizes.get(name, 0) for name, x in factors.items()}
    size = 10.0 ** -sum(sizes.values())
    wanted = literal(scan, *(x.double() for x in factors.values())) * size
    left, right, taps = (x.requires_grad_(followed) for x in factors.values())
    for got, want in ((scan.folded(left, right, taps), wanted), (scan.summed(left, right, taps), wanted.sum(1))):
        assert got.isfinite().all() and relative(got.detach().double() * size, want) < 1e-5
        if followed:
            (slope,) = torch.autograd.grad(got.sum() * size, right)
            assert slope.isfinite().all()


@pytest.mark.parametrize(
    "sizes", [{"left": -250}, {"left": 250, "amount": -250}, {"amount": -300}, {"left": 150, "key": 140}]
)
def test_very_small_and_very_large_factors_in_float64(sizes):
    scan = scan_of(21)
    left, right, taps = factors_of(scan)
    scan = sized(scan, torch.float64, **{name: power for name, power in sizes.items() if name != "left"})
    left, size = left * 10.0 ** sizes.get("left", 0), 10.0 ** -sum(sizes.values())
    wanted = literal(scan_of(21), *factors_of(scan))
    assert relative(scan.folded(left, right, taps) * size, wanted) < 1e-12
    assert relative(scan.summed(left, right, taps) * size, wanted.sum(1)) < 1e-12


def test_powers_beyond_what_a_number_holds_go_in_steps():
    for power, dtype in ((0, torch.float32), (-200, torch.float32), (149, torch.float32), (1100, torch.float64)):
        parts = powers_of_two(power, dtype)
        assert sum(math.log2(part) for part in parts) == power
        assert all(0 < torch.tensor(part, dtype=dtype) < math.inf for part in parts)
    assert scaled_by_power(torch.tensor([2.0**-149]), 149) == 1

"""The decay scan's matrix, bottom-up: with and without gradients, decays that vanish, weights of any size, rows apart."""

from __future__ import annotations

import pytest
import torch

from gatedlens.scanmatrix import DecayScan
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

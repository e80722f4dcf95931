"""Estimate: a number over samples with its confidence interval, by the bootstrap.

    value, low, high = estimate(rows)                          # the mean over samples, 95 %
    estimate(counts, lambda mean: mean[..., 0] / mean[..., 1])     # a ratio of sums: pixels right over pixels

Samples are drawn anew with replacement `RESAMPLES` times from a seed, and the percentiles of what comes out are the
interval (Efron 1979). It says how much the number would move with other samples, not with another model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gatedlens.errors import InputError

RESAMPLES = 2000
AT_ONCE = 1 << 22  # drawn samples that are held at a time


class Estimate(NamedTuple):
    """A number and the ends of its interval; they are NaN for a single sample."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def estimate(
    rows: Float[Tensor, "sample ..."],
    statistic: Callable[[Tensor], Tensor] = lambda mean: mean,
    *,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """`gl.evaluation.estimate(rows)`: `statistic` of the mean over samples: of [*columns] -> one number, and of [resample,
    *columns] -> one each.
    """
    if len(rows) == 0:
        raise InputError("There is no sample to estimate from.")
    rows = rows.double().cpu()
    value = float(statistic(rows.mean(0)))
    if len(rows) == 1:
        return Estimate(value, torch.nan, torch.nan)
    drawn = torch.cat([statistic(mean) for mean in _means(rows, seed)])
    edges = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=drawn.dtype)
    low, high = drawn[~drawn.isnan()].quantile(edges).tolist() if bool((~drawn.isnan()).any()) else (torch.nan,) * 2
    return Estimate(value, low, high)


def _means(rows: Tensor, seed: int) -> list[Tensor]:
    """Means [some resamples, *columns] of samples drawn with replacement."""
    n, generator = len(rows), torch.Generator().manual_seed(seed)
    width = max(1, min(RESAMPLES, AT_ONCE // n))
    sizes = [min(width, RESAMPLES - start) for start in range(0, RESAMPLES, width)]
    return [rows[torch.randint(n, (size, n), generator=generator)].mean(1) for size in sizes]

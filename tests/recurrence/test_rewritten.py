"""A scan of writes at another key: what a position finds of a 1 written there, against the recurrence run word for word."""

from __future__ import annotations

import pytest
import torch

from gatedlens.errors import InputError
from gatedlens.recurrence.head_matrix import HeadScan
from gatedlens.recurrence.literal import literal_scan
from gatedlens.recurrence.matrix import ScanMatrix
from gatedlens.recurrence.micro_steps import StepScan, at_step
from gatedlens.recurrence.prior_matrix import PriorScan
from gatedlens.recurrence.terms import Terms

B, L, H, K, V = 2, 5, 2, 3, 2


def terms_of(delta, length=L, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def r(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    vectors = {"erase": r(B, length, H, K) / 3, "probe": r(B, length, H, K) / 3} if delta else {}
    return Terms(
        -r(B, length, H, 1).abs(), r(B, length, 1, K), r(B, length, 1, K), r(B, length, H).abs(), **vectors
    ), r(1, K)


def found(terms, key, src, dst, before=False):
    """What `dst` reads, head by head, of a 1 that `src` writes at this key; `before`: of the state before its own step."""
    alone = terms._replace(key=key.expand(*terms.key.shape[:2], -1, -1), amount=None)
    u = torch.zeros(B, alone.key.shape[1], H, 1, dtype=torch.float64)
    u[:, src] = 1
    if before:  # a position later reads what this one left: its read looks a step back
        read = torch.cat([alone.read[:, 1:], torch.zeros_like(alone.read[:, :1])], 1)
        return literal_scan(alone._replace(read=read), u, torch.zeros(B, H, 1, K, dtype=torch.float64))[0][
            :, dst - 1, :, 0
        ]
    return literal_scan(alone, u, torch.zeros(B, H, 1, K, dtype=torch.float64))[0][:, dst, :, 0]


@pytest.mark.parametrize("delta", [False, True])
def test_what_is_found_at_another_key(delta):
    terms, key = terms_of(delta)
    place = torch.full((B,), 4)
    seen = HeadScan.of(terms, V).rewritten(key).seen(place)[..., ::V]  # every channel of a head has the same
    prior = PriorScan.of(terms, V).rewritten(key).seen(place)[..., ::V]
    for src in range(L):
        torch.testing.assert_close(seen[:, src], found(terms, key, src, 4), atol=1e-12, rtol=0)
        if src < 4:
            torch.testing.assert_close(prior[:, src], found(terms, key, src, 4, before=True), atol=1e-12, rtol=0)


def test_behind_all_steps_of_a_position():
    terms, key = terms_of(True, 2 * L)
    read = at_step(terms.read[:, 1::2], -1, 2)
    long = terms._replace(read=read)
    seen = StepScan(HeadScan.of(long, V), 2, 0).rewritten(key).seen(torch.full((B,), 3))[..., ::V]
    for src in range(4):
        torch.testing.assert_close(seen[:, src], found(long, key, 2 * src + 1, 7), atol=1e-12, rtol=0)


def test_a_quotient_is_no_sum():
    with pytest.raises(InputError, match="no sum of writes"):
        ScanMatrix.rewritten(None, torch.ones(1, 3))

"""The matrix of heads with matrix states: every view of it against the literal recurrence, whatever the decays."""

from __future__ import annotations

import pytest
import torch

from gatedlens.errors import InputError
from gatedlens.recurrence import chunks, head_blocks, tiles
from gatedlens.recurrence.chunks import chunked
from gatedlens.recurrence.head_matrix import HeadScan
from gatedlens.recurrence.literal import literal_matrix
from gatedlens.recurrence.terms import Terms
from tests.recurrence.test_chunks import KINDS, H, L, V, close, draw


@pytest.fixture(params=[(64, 256), (4, 3), (2, 5)], ids=["one block", "small blocks", "smaller blocks"])
def sizes(request, monkeypatch):
    """Small blocks and patches, so that short inputs cross several."""
    chunk, patch = request.param
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    monkeypatch.setattr(head_blocks, "PATCH", patch)


@pytest.fixture(params=[False, True], ids=["one document", "several documents"])
def fresh(request):
    return request.param


def weights(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_the_matrix_of_each_head_is_the_literal_one(kind, sizes, fresh):
    terms, _, _ = draw(kind, fresh=fresh)
    scan, want = HeadScan.of(terms, V), literal_matrix(terms)
    close(scan.by_head(list(range(H))), want)
    close(scan.by_head([2]), want[:, [2]])
    close(scan.dense(), want.repeat_interleave(V, dim=1))
    assert torch.equal(scan.dense(), scan.dense().tril())


@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_is_the_matrix(kind, fresh):
    terms, u, state = draw(kind, fresh=fresh)
    scan, want = HeadScan.of(terms, V), literal_matrix(terms).repeat_interleave(V, dim=1)
    x, g = u.flatten(2), weights(*u.flatten(2).shape)
    close(scan.apply(x), torch.einsum("bcij,bjc->bic", want, x))
    close(scan.apply(x, state.flatten(1, 2)), chunked(terms, u, state)[0].flatten(2))
    close(scan.apply_transposed(g), torch.einsum("bcij,bic->bjc", want, g))
    i = torch.tensor([L - 1, 4])
    close(scan.seen(i), torch.stack([want[0, :, L - 1], want[1, :, 4]]).mT)


@pytest.mark.parametrize("taps", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_over_channels_and_the_conv(kind, taps, sizes, fresh):
    terms, _, _ = draw(kind, fresh=fresh)
    scan, want = HeadScan.of(terms, V), literal_matrix(terms).repeat_interleave(V, dim=1)
    left, right, conv = weights(2, L, H * V), 2 * weights(2, L, H * V), weights(H * V, taps)
    folded = torch.zeros_like(want)
    for k in range(taps):
        shifted = want * left.mT.unsqueeze(-1) * (right * conv[:, taps - 1 - k]).mT.unsqueeze(-2)
        folded[..., : L - k] += shifted[..., k:]
    close(scan.folded(left, right, conv), folded)
    close(scan.summed(left, right, conv), folded.sum(1))
    if taps == 1:
        close(scan.contracted(left, right * conv[:, 0]), folded.sum(1))


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_absolutes_tile_by_tile(kind, taps, fresh, monkeypatch):
    monkeypatch.setattr(tiles, "ROWS", 4)
    monkeypatch.setattr(tiles, "ELEMENTS", 100)
    terms, _, _ = draw(kind, fresh=fresh)
    scan = HeadScan.of(terms, V)
    left, right, conv, skip = weights(2, L, H * V), 2 * weights(2, L, H * V), weights(H * V, taps), weights(H * V)
    want = scan.folded(left, right, conv)
    for k in range(taps):
        want.diagonal(-k, -2, -1).add_(((left * skip * right)[:, k:] * conv[:, taps - 1 - k]).mT)
    close(scan.absolute(left, right, conv, skip), want.abs().sum(1))
    some = [3, 0, 19, 4, 7]
    few = scan.select(some).absolute(left[..., some], right[..., some], conv[some], skip[some])
    close(few, want[:, some].abs().sum(1))


def test_absolutes_can_be_differentiated():
    terms, _, _ = draw("head", length=9)
    left, right, conv = weights(2, 9, H * V), weights(2, 9, H * V), weights(H * V, 3)
    x = right.clone().requires_grad_()
    none = torch.zeros(H * V, dtype=torch.float64)
    ways = HeadScan.of(terms, V).absolute(left, x, conv, none), HeadScan.of(terms, V).folded(left, x, conv).abs().sum(1)
    ours, theirs = (torch.autograd.grad(way.sin().sum(), x)[0] for way in ways)
    close(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_some_channels(kind, sizes):
    terms, u, _ = draw(kind)
    some = [3, 0, 19, 4, 7]
    scan, few = HeadScan.of(terms, V), HeadScan.of(terms, V).select(some)
    want = scan.dense()[:, some]
    close(few.dense(), want)
    x = u.flatten(2)[..., some]
    close(few.apply(x), torch.einsum("bcij,bjc->bic", want, x))
    close(few.apply_transposed(x), torch.einsum("bcij,bic->bjc", want, x))
    close(few.seen(torch.tensor([5, 5])), want[:, :, 5].mT)
    close(few.summed(x, 2 * x, weights(5, 4)), few.folded(x, 2 * x, weights(5, 4)).sum(1))


@pytest.mark.parametrize("kind", KINDS)
def test_sums_can_be_differentiated_and_batched_by_a_transform(kind, sizes):
    terms, u, _ = draw(kind, length=9)
    x, conv = u.flatten(2), weights(H * V, 3)

    def mean(scale, log):
        scaled = terms._replace(log_decay=log)
        return HeadScan.of(scaled, V).summed(scale * x, x, conv).square().sum()

    def literally(scale, log):
        scan = HeadScan.of(terms._replace(log_decay=log), V)
        matrix = literal_matrix(scan.terms).repeat_interleave(V, 1)
        total = torch.zeros_like(matrix[:, 0])
        for k in range(3):
            piece = torch.einsum("bcij,bic,bjc->bij", matrix, scale * x, x * conv[:, 2 - k])
            total = total + torch.nn.functional.pad(piece[..., k:], (0, k))
        return total.square().sum()

    scale, log = torch.ones((), dtype=torch.float64, requires_grad=True), terms.log_decay.clone().requires_grad_()
    ours, theirs = (torch.autograd.grad(f(scale, log), (scale, log)) for f in (mean, literally))
    for a, b in zip(ours, theirs, strict=True):
        close(a, b)
    both = torch.func.vmap(lambda s: mean(s, terms.log_decay))(torch.tensor([1.0, 2.0], dtype=torch.float64))
    close(both[1], mean(2.0, terms.log_decay))


def test_long_and_steep_decays_in_float32():
    terms, _, _ = draw("key, delta", length=300)
    narrow = Terms(*(None if x is None else x.float() for x in terms))
    narrow = narrow._replace(erase=narrow.key)
    close(HeadScan.of(narrow, V).by_head([1]).double(), HeadScan.of(terms, V).by_head([1]), 1e-5)
    terms, _, _ = draw("head", length=300, steep=30.0)
    narrow = Terms(*(None if x is None else x.float() for x in terms))
    close(HeadScan.of(narrow, V).by_head([1]).double(), HeadScan.of(terms, V).by_head([1]), 1e-5)


@pytest.mark.parametrize("kind", ["head", "key", "head, delta", "key, delta"])
def test_rows_without_their_own_step(kind, fresh):
    terms, _, _ = draw(kind, fresh=fresh)
    own = torch.zeros(2, L, dtype=torch.bool)
    own[0, 5], own[1, 8] = True, True
    want, got = literal_matrix(terms), HeadScan.of(terms, V).undecayed(own).by_head(list(range(H)))
    for row, i in ((0, 5), (1, 8)):
        # The row of i from the state before it: the read of i on a recurrence whose step i keeps everything.
        log = terms.log_decays().clone()
        log[row, i] = 0
        erase = None if terms.erase is None else terms.erase.clone()
        if erase is not None:
            erase[row, i] = 0
        free = literal_matrix(terms._replace(log_decay=log, fresh=None, erase=erase, probe=terms.probes()))
        close(got[row, :, i], free[row, :, i])
        assert not torch.allclose(want[row, :, i, :i], free[row, :, i, :i])


def test_details_of_mambas_code_are_refused():
    terms, _, _ = draw("head, delta")
    with pytest.raises(InputError, match="there are several"):
        HeadScan.of(terms, V).undecayed(torch.ones(2, L, dtype=torch.bool))
    with pytest.raises(InputError, match="no softmax"):
        HeadScan.of(terms, V).mass(torch.ones(2, L, H * V))

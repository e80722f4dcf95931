"""Profiles: closed forms, the literal definition, padding, both directions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import gatedlens as gl
from gatedlens import profiles
from gatedlens.hooks.griffin import HookedGriffin
from gatedlens.hooks.mamba import HookedMamba
from gatedlens.hooks.vim import HookedViM
from gatedlens.recurrence.factors import Factors
from gatedlens.recurrence.pattern_matrix import PatternScan
from tests.attention.test_layer import cached
from tests.helpers import example, padded


def literal(weights, places, seen):
    """One channel of one row of the batch, number by number: (profile, mean distance, effective context, sharpness)."""
    n, distance, contexts, sharp = len(weights), torch.zeros(len(weights), dtype=torch.float64), [], []
    for i in range(n):
        row = weights[i].abs()
        if row.sum() == 0:
            continue
        p = row / row.sum()
        entropy = -sum(x * math.log(x) for x in p.tolist() if x > 0)
        contexts.append(math.exp(entropy))
        if seen[i] > 1:
            sharp.append(1 - entropy / math.log(seen[i]))
        for j in range(n):
            if p[j] > 0:
                distance[abs(places[i] - places[j])] += p[j]
    distance /= len(contexts)
    return (
        distance,
        sum(d * x for d, x in enumerate(distance.tolist())),
        sum(contexts) / len(contexts),
        sum(sharp) / len(sharp),
    )


@torch.no_grad()
@pytest.mark.parametrize("case", ["plain", "left", "holes+state"])
def test_profiles_are_their_definition(model, case):
    for A in gl.implicit_attention(cached(model, case)):
        dense, found, whole = A.dense(), profiles.of_channels(A), profiles.of_layer(A)
        mask = A.padding.mask if A.padding.mask is not None else torch.ones(A.shape[:2], dtype=torch.bool)
        for b in range(A.shape[0]):
            places = (mask[b].cumsum(0) - 1).tolist()
            both = len({branch.reverse for branch in A.branches}) > 1
            seen = [int(mask[b].sum()) if both else place + 1 for place in places]
            for c, got in ((0, found), (5, found), (None, whole)):
                weights = A.abs_mean()[b] if c is None else dense[b, c]
                at = (b,) if c is None else (b, c)
                distance, mean, context, sharp = literal(weights, places, seen)
                assert torch.allclose(got.distance[at], distance, atol=1e-12)
                assert got.mean_distance[at].item() == pytest.approx(mean, abs=1e-10)
                assert got.effective_context[at].item() == pytest.approx(context, abs=1e-10)
                assert got.sharpness[at].item() == pytest.approx(sharp, abs=1e-10)
        assert torch.allclose(found.distance.sum(-1), torch.ones(A.shape[0], A.shape[2], dtype=torch.float64))
        some = profiles.of_channels(A, channels=[5, 0])
        assert torch.allclose(some.half_life, found.half_life[:, [5, 0]])


@torch.no_grad()
def test_padding_changes_nothing(lm):
    rows = [example(lm, 1, 9)[0], example(lm, 1, 5, seed=1)[0]]
    for side in ("left", "right"):
        tokens, mask = padded(rows, side)
        together = gl.implicit_attention(lm, tokens, attention_mask=mask)
        for b, row in enumerate(rows):
            alone = gl.implicit_attention(lm, row.unsqueeze(0))
            for name in ("half_life", "mean_distance", "effective_context", "sharpness"):
                got = getattr(together.profiles(progress=False), name)[:, b]
                assert torch.allclose(got, getattr(alone.profiles(progress=False), name)[:, 0], atol=1e-10), name
            got = together.induction(progress=False)[:, b]
            assert torch.allclose(got, alone.induction(progress=False)[:, 0], atol=1e-10)


def made_of(pattern, model=None):
    """The implicit attention whose matrix is `pattern` [batch, channel, dst, src]."""
    batch, channels, length, _ = pattern.shape
    zeros = pattern.new_zeros(batch, length, channels)
    scan = PatternScan(pattern, pattern.new_zeros(batch, channels, length, 0), torch.arange(channels))
    A = gl.implicit_attention(model or HookedMamba.tiny(), torch.zeros(batch, length, dtype=torch.long), layer=0)
    return replace(A, branches=(Factors(x=zeros, o=zeros, scan=scan),))


def test_of_decaying_attention_the_half_life_is_the_decays():
    rates, length = torch.tensor([0.5, 2**-0.25, 2**-0.1]).double(), 400
    pattern = torch.zeros(1, 3, length, length).double()
    pattern[0, :, -1] = -(rates[:, None] ** torch.arange(length).double().flip(0))  # the sign plays no part
    found = profiles.of_channels(made_of(pattern))
    assert torch.allclose(found.half_life[0], torch.tensor([1.0, 4.0, 10.0]).double(), atol=1e-6)
    assert torch.allclose(found.mean_distance[0], rates / (1 - rates), atol=1e-6)
    assert (found.sharpness[0].diff() < 0).all() and (found.effective_context[0].diff() > 0).all()


def test_one_position_is_sharp_and_an_even_spread_is_not():
    eye, even = torch.eye(8).double(), torch.ones(8, 8).double().tril()
    found = profiles.of_channels(made_of(torch.stack([eye, even, -even, 0 * eye]).unsqueeze(0)))
    assert torch.allclose(found.sharpness[0, :3], torch.tensor([1.0, 0.0, 0.0]).double(), atol=1e-12)
    assert torch.allclose(found.effective_context[0, :3], torch.tensor([1.0, 4.5, 4.5]).double())
    assert found.half_life[0, 0] == 0.5 and found.mean_distance[0, 0] == 0
    assert all(field[0, 3].abs().max() == 0 for field in found), "a channel that reads nothing"


def test_induction_by_hand():
    tokens = torch.tensor([[1, 2, 3, 1, 2, 2]])
    targets = {3: [1], 4: [2], 5: [2]}  # of position 5, the target behind position 4 is itself: left out
    pattern = torch.zeros(2, 6, 6).double()
    pattern[0] = torch.ones(6, 6).tril()
    for i, js in targets.items():
        pattern[1, i, js] = -2.0
    A = made_of(pattern.unsqueeze(0))
    found = profiles.induction_of_channels(A, tokens=tokens)
    even = (1 / 4 + 1 / 5 + 1 / 6) / 3
    assert torch.allclose(found.score, torch.tensor([[even, 1.0]]).double())
    assert torch.allclose(found.chance[0], torch.full((2,), even).double())
    swapped = torch.tensor([[0, 1, 2, 3, 4, 5]])
    assert profiles.induction(A, swapped).score.item() == 0, "nothing repeats"


def test_in_both_directions_the_same_words_mean_the_same():
    model = HookedViM.tiny(dtype=torch.float64)
    with torch.no_grad():
        A = gl.implicit_attention(model, example(model), layer=0)
    labels = torch.arange(A.shape[1]).expand(2, -1) % 3
    found = profiles.induction(A, labels)
    assert ((found.score > 0) & (found.score < 1)).all() and torch.allclose(found.chance[0], found.chance[1])
    with pytest.raises(gl.InputError, match="induction needs tokens"):
        profiles.induction(A)
    with pytest.raises(gl.InputError, match=r"tokens of shape \[2, 10\]; these have shape \[1, 4\]"):
        profiles.induction(A, torch.zeros(1, 4, dtype=torch.long))


def test_a_window_shows_in_the_profile():
    model = HookedGriffin.tiny(dtype=torch.float64)
    with torch.no_grad():
        A = gl.implicit_attention(model, example(model, 1, 20), layer=2)
    assert profiles.of_layer(A).distance[0, model.cfg.window_size :].abs().max() == 0


@torch.no_grad()
def test_the_recall_model_looks_behind_the_key_far_more_than_chance(recall_model):
    batch = gl.tasks.recall(50, seed=2)
    A = gl.implicit_attention(recall_model, batch.tokens, layer=-1)
    is_key = torch.isin(batch.tokens, gl.tasks.ids(gl.tasks.KEYS))
    apart = torch.where(is_key, batch.tokens, 1000 + torch.arange(A.shape[1]))  # only the queried key comes twice
    found = profiles.induction(A, apart)
    assert found.score.mean() > 2 * found.chance.mean()

"""Occlusion against one changed input at a time; baselines; chance."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens import attribution
from tests.helpers import example, padded


@torch.no_grad()
def test_occlusion_is_the_loss_when_a_token_is_another(lm):
    tokens = example(lm)
    found = attribution.occlusion(lm, tokens, target=(3, 5), baseline=9, progress=False, batch_size=5)
    clean = lm(tokens)[:, -1]
    for j in range(tokens.shape[1]):
        other = tokens.clone()
        other[:, j] = 9
        logits = lm(other)[:, -1]
        want = (clean[:, 3] - clean[:, 5]) - (logits[:, 3] - logits[:, 5])
        assert torch.allclose(found.scores[:, j], want, atol=1e-12)
    assert found.facts["baseline"] == "token 9"


@torch.no_grad()
def test_occlusion_of_an_image_puts_black_pixels_in_a_patch():
    model = gl.HookedViM.tiny(dtype=torch.float64)
    images = example(model)
    mean, std = (
        torch.tensor(t, dtype=torch.float64)[:, None, None] for t in (model.cfg.image_mean, model.cfg.image_std)
    )
    colours = {None: -mean / std, "mean": 0.0 * mean, 0.25: 0.25 + 0 * mean}
    for baseline, colour in colours.items():
        found = attribution.occlusion(model, images, target=2, baseline=baseline, progress=False)
        for p, pos in enumerate(model.grid.patches):
            left, top, right, bottom = model.grid.box(pos)
            other = images.clone()
            other[:, :, top:bottom, left:right] = colour
            want = model(images)[:, 2] - model(other)[:, 2]
            assert torch.allclose(found.scores.flatten(1)[:, p], want, atol=1e-12)
    image = torch.rand(model.image_shape, dtype=torch.float64)
    assert attribution.occlusion(model, images, baseline=image, progress=False).facts["baseline"] == "an image"


def test_what_stands_for_nothing_by_default(lm, recall_model):
    assert attribution.occlusion(lm, example(lm), progress=False).facts["baseline"] == "the mean embedding"
    mean = lm(torch.arange(lm.cfg.d_vocab).unsqueeze(0), stop_at_layer=0)[0].detach().mean(0)
    given = attribution.occlusion(lm, example(lm), baseline=mean, progress=False)
    assert torch.allclose(given, attribution.occlusion(lm, example(lm), progress=False), atol=1e-13)
    batch = gl.tasks.recall(2)
    named = attribution.occlusion(recall_model, batch.tokens, baseline="and", progress=False)
    assert named.facts["baseline"] == f"token {recall_model.to_single_token('and')}"


def test_progress_can_be_switched_off(capsys):
    model = gl.HookedMamba.tiny()
    attribution.occlusion(model, example(model), progress=False)
    assert capsys.readouterr().err == ""
    attribution.occlusion(model, example(model))
    assert "occlusion" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        (400, "is no token"),
        (True, "is no token"),
        (torch.zeros(3), r"shape \[3\]; an embedding of this model is \[16\]"),
    ],
)
def test_a_wrong_baseline_of_text(lm, baseline, message):
    with pytest.raises(gl.InputError, match=message):
        attribution.occlusion(lm, example(lm), baseline=baseline)


@pytest.mark.parametrize(
    ("baseline", "message"),
    [("blak", "Did you mean 'black'"), (torch.zeros(3, 4, 4), "images are"), ([1], "a number for every pixel")],
)
def test_a_wrong_baseline_of_an_image(baseline, message):
    model = gl.HookedViM.tiny()
    with pytest.raises(gl.InputError, match=message):
        attribution.occlusion(model, example(model), baseline=baseline)
    with pytest.raises(gl.InputError, match="batch_size=0"):
        attribution.occlusion(model, example(model), batch_size=0)


def test_random_scores_are_the_rows_own(lm):
    tokens, mask = padded([example(lm, 1, n, seed=n)[0] for n in (6, 3)], "left")
    found = attribution.random(lm, tokens, attention_mask=mask)
    alone = attribution.random(lm, tokens[1:, 3:])
    assert torch.equal(found.scores[1, 3:], alone.scores[0]) and (found.scores[1, :3] == 0).all()
    assert not torch.equal(found, attribution.random(lm, tokens, attention_mask=mask, seed=1))
    assert ((found.scores[0] >= 0) & (found.scores[0] < 1)).all() and len(set(found.scores[0].tolist())) == 6

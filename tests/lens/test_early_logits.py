"""The logit lens: its layers are the model's own if it stopped there, on every architecture; rows, padding, pictures."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens import lens
from tests.helpers import example, padded


@torch.no_grad()
def test_each_layer_is_the_model_that_stops_there(model):
    x, n = example(model), model.cfg.n_layers
    found = lens.logit_lens(model, x)
    assert found.layers == ["embed", *range(n)]
    for layer in found.layers:
        stop = 0 if layer == "embed" else layer + 1
        resid = model(x, stop_at_layer=stop)
        logits, want = found.logits(layer), model(resid, start_at_layer=n)
        if model.pooling() is not None:  # the features are one position's, so the head is linear in the mean of them
            logits = torch.einsum("p,bpc->bc", model.pooling(), logits)
        assert torch.allclose(logits, want, rtol=1e-10, atol=1e-11), layer
    assert torch.equal(found.logits(-1), found.logits(n - 1))


@torch.no_grad()
def test_results_are_read_off_the_logits(model):
    x = example(model)
    _, cache = model.run_with_cache(x)
    found = lens.logit_lens(model, cache)
    probabilities = torch.stack([found.logits(layer)[1].softmax(-1) for layer in found.layers])
    assert torch.allclose(found.top(row=1).values, probabilities.amax(-1))
    assert torch.allclose(found.probability(3, row=1).values, probabilities[..., 3])
    rank = probabilities.argsort(-1, descending=True).argsort(-1)[..., 3]
    assert torch.equal(found.rank(3, row=1).values.long(), rank)
    words = [[str(int(t)) for t in layer] for layer in probabilities.argmax(-1)]
    assert found.words(row=1) == words
    top = found.top()
    assert top.axes == ("layer", "pos") and top["layer"] == found.layers and top.size("pos") == probabilities.shape[1]


@torch.no_grad()
def test_padding_has_no_prediction(lm):
    rows = [example(lm, 1, n, seed=n)[0] for n in (7, 4)]
    for side in ("left", "right"):
        found, alone = lens.logit_lens(lm, padded(rows, side)), lens.logit_lens(lm, rows[1].unsqueeze(0))
        assert found.top(1)["pos"] == alone.top()["pos"] and found.words(1) == alone.words()
        assert torch.allclose(found.top(1).values, alone.top().values, atol=1e-12)


def test_the_soft_cap_is_heeded():
    model = gl.HookedGriffin.tiny(dtype=torch.float64, logits_soft_cap=0.5)
    assert model.cfg.logits_soft_cap == 0.5
    found = lens.logit_lens(model, example(model))
    assert all(0.01 < found.logits(layer).abs().max() <= 0.5 for layer in found.layers)
    assert torch.allclose(found.logits(-1), model(example(model)))


def test_the_answer_appears_in_the_last_layer(recall_model):
    pytest.importorskip("matplotlib").use("agg")
    batch = gl.tasks.recall(1, seed=3)
    found, answer = lens.logit_lens(recall_model, batch.tokens), int(batch.answers[0])
    late = found.probability(answer).at(pos=-1).values
    assert late[-1] > 0.9 and late[0] < 0.5
    assert found.words()[-1][-1] == recall_model.to_string([answer])
    assert found.rank(recall_model.to_string([answer])).values[-1, -1] == 0
    figure = found.plot()
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert len(texts) == found.top().values.numel() and texts[-1] == found.words()[-1][-1]


def test_mistakes_about_the_lens_are_explained(model):
    x = example(model)
    found = lens.logit_lens(model, x)
    n = model.cfg.n_layers
    for ask, message in (
        (lambda: found.logits(n), f"layer={n}: .* has layers 0 to {n - 1}, and 'embed'"),
        (lambda: found.logits("emb"), "layer='emb'"),
        (lambda: found.top(row=2), "row=2: this run has 2 rows"),
        (lambda: found.rank(999), "token=999 is out of range"),
    ):
        with pytest.raises(gl.InputError, match=message):
            ask()
    _, part = model.run_with_cache(x, pos_slice=[1])
    with pytest.raises(gl.InputError, match="cache of all positions"):
        lens.logit_lens(model, part)
    with pytest.raises(gl.InputError, match="This cache is one of"):
        lens.logit_lens(type(model).tiny(), model.run_with_cache(x)[1])
    with pytest.raises(gl.PointError, match="not in this cache"):
        lens.logit_lens(model, model.run_with_cache(x, names_filter="blocks.0.hook_resid_pre")[1])


def test_it_says_what_it_is(recall_model):
    said = repr(gl.lens.logit_lens(recall_model, gl.tasks.recall(2).tokens))
    assert said == "LogitLens(gatedlens/mamba-recall, 2 rows, 3 depths x 21 positions)"

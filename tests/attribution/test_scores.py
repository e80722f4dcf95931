"""Every method alike: rows stand alone, padding counts for nothing, targets, plots, files, mistakes."""

from __future__ import annotations

import dataclasses
import json

import matplotlib
import numpy
import pytest
import torch

import gatedlens as gl
from gatedlens import attribution
from gatedlens.attribution import METHODS, Attribution
from tests.helpers import example, padded

matplotlib.use("agg")
FEW = {  # options that keep a method small
    "occlusion": {"progress": False, "batch_size": 8},
    "integrated_gradients": {"n_steps": 5, "batch_size": 4},
    "smoothgrad": {"n_samples": 3},
}
EACH = pytest.mark.parametrize("name", METHODS)


def explain(name, model, input, target=None, **options):
    return METHODS[name](model, input, target, **FEW.get(name, {}), **options)


@EACH
def test_rows_of_a_batch_stand_alone(model, name):
    input = example(model)
    whole = explain(name, model, input)
    alone = [explain(name, model, row.unsqueeze(0)) for row in input]
    assert torch.allclose(whole.scores, torch.cat([one.scores for one in alone]), atol=1e-12)
    assert whole.scores.shape == ((2, 7) if model.grid is None else (2, 3, 3)) and whole.scores.dtype == torch.float64
    assert [whole.target] == [[one.target[0] for one in alone]] and not whole.scores.requires_grad
    assert [whole.order(b).tolist() for b in range(2)] == [one.order(0).tolist() for one in alone]
    empty = name == "gradient_attention" and model.cfg.normalization_type == "LN"  # see there
    assert torch.isfinite(whole.scores).all() and bool(whole.scores.any()) != empty
    assert not model.list_hooks()


@EACH
def test_padding_counts_for_nothing(lm, name):
    rows = [example(lm, 1, n, seed=n)[0] for n in (6, 3)]
    alone = [explain(name, lm, row.unsqueeze(0)) for row in rows]
    for side in ("left", "right"):
        tokens, mask = padded(rows, side)
        found = explain(name, lm, tokens, attention_mask=mask)
        assert (found.scores[~mask] == 0).all()
        for b, one in enumerate(alone):
            assert torch.allclose(found.scores[b][mask[b]], one.scores[0], atol=1e-12)
            assert found.target[b] == one.target[0]
            assert found.order(b).tolist() == mask[b].nonzero()[:, 0][one.order(0)].tolist()
        assert (found.ranks[~mask] == -1).all() and sorted(found.ranks[1][mask[1]].tolist()) == [0, 1, 2]


@pytest.mark.parametrize("name", ["gradient_attention", "lrp", "integrated_gradients"])
def test_under_no_grad_and_with_frozen_parameters(model, name):
    input = example(model)
    want = explain(name, model, input)
    needed = {n: p.requires_grad for n, p in model.wrapped.named_parameters()}
    model.wrapped.requires_grad_(False)
    with torch.no_grad():
        assert torch.allclose(explain(name, model, input), want, atol=1e-13)
    for n, p in model.wrapped.named_parameters():
        p.requires_grad_(needed[n])


@EACH
def test_inference_mode_forbids_gradients(name):
    model = gl.HookedMamba.tiny()
    with torch.inference_mode(), pytest.raises(gl.InputError, match="inference_mode"):
        explain(name, model, example(model))


@pytest.mark.parametrize("name", ["gradient_attention", "lrp", "occlusion"])
def test_targets_of_attributions(model, name):
    input = example(model)
    right, wrong = (explain(name, model, input, one) for one in (3, 1))
    both = explain(name, model, input, torch.tensor([3, 1]))
    assert torch.allclose(both.scores, torch.stack([right.scores[0], wrong.scores[1]]), atol=1e-12)
    assert name == "gradient_attention" or not torch.allclose(right, wrong)
    pair, mixed = explain(name, model, input, (3, 1)), explain(name, model, input, ([3, 3], 1))
    assert torch.equal(pair, mixed) and pair.target == {"right": [3, 3], "wrong": [1, 1]}
    assert torch.allclose(pair.explained, right.explained - wrong.explained)
    mine = explain(name, model, input, gl.metrics.logit_difference(3, 1))
    assert torch.allclose(pair, mine, atol=1e-12)
    if name == "occlusion":  # it is linear in the target
        assert torch.allclose(pair, right.scores - wrong.scores, atol=1e-10)
    logits = model(input).reshape(2, -1, model.cfg.d_vocab)[:, -1]
    assert explain(name, model, input).target == logits.argmax(-1).tolist()


def test_text_is_read_and_a_target_may_be_text(recall_model):
    texts = ["B 4 F 1 gnu ? F", "B 4 ? B"]
    found = attribution.lrp(recall_model, texts, target=("1", "4"))
    assert found.target["right"] == [recall_model.to_single_token("1")] * 2
    real = torch.tensor(found.facts["real"][1])
    read = [token for token, kept in zip(found.facts["tokens"][1], real, strict=True) if kept]
    one = attribution.lrp(recall_model, texts[1], target=("1", "4"))
    assert read == one.facts["tokens"][0] == recall_model.to_str_tokens("B 4 ? B")
    assert torch.allclose(one.scores[0], found.scores[1][real], atol=1e-5)
    assert one.top(1)[0]["pos_label"] in one.facts["tokens"][0]
    assert "B" in one.plot().body and "4" in found.plot(row=1).body
    assert found.plot(row=1).body.count("<span") == 5


def test_a_target_may_be_text_for_each_row_or_numpy(recall_model):
    texts, one = ["B 4 F 1 ? F", "B 4 F 1 ? B"], recall_model.to_single_token("1")
    four = recall_model.to_single_token("4")
    found = attribution.lrp(recall_model, texts, ["1", "4"])
    assert found.target == [one, four]
    for same in (numpy.array([one, four]), [numpy.int64(one), numpy.int64(four)]):
        assert torch.equal(attribution.lrp(recall_model, texts, same).scores, found.scores)
    assert attribution.lrp(recall_model, texts, (["1", "4"], numpy.int64(four))).target["wrong"] == [four, four]
    with pytest.raises(gl.InputError, match="one a row"):
        attribution.lrp(recall_model, texts, ["1", "4", "4"])


def test_orders_do_not_hang_on_rounding(lm):
    """Scores that differ in their last digits, as in another batch or on another processor."""
    tokens = example(lm, 1, 40)
    found = attribution.random(lm, tokens)
    scores = found.scores.clone()
    scores[0, 5:30:5] = scores[0, 3]  # ties
    scores[0, ::7] = 0
    noisy = scores * (1 + 1e-12 * torch.randn(scores.shape, generator=torch.Generator().manual_seed(0)))
    noisy += 1e-12 * torch.randn(scores.shape, generator=torch.Generator().manual_seed(1))
    one, other = (dataclasses.replace(found, values=values) for values in (scores, noisy))
    assert not torch.equal(scores.argsort(stable=True), noisy.argsort(stable=True))
    assert torch.equal(one.order(), other.order()) and torch.equal(one.ranks, other.ranks)
    tied = [5, 10, 15, 20, 25]
    assert one.order().tolist().index(3) < one.order().tolist().index(5)
    assert [p for p in other.order().tolist() if p in tied] == tied, "ties stand in the order of positions"


def test_what_is_there_already_costs_nothing(model):
    """A place that holds the baseline scores exactly 0, in whatever batch the other inputs are run."""
    if model.grid is None:
        input, baseline = torch.tensor([[3, 9, 9, 5, 9, 1, 9]]), 9
        there = (input == 9).flatten()
    else:
        input, baseline = example(model, 1), 0.25
        input[:, :, :4] = 0.25  # the upper row of patches
        there = torch.zeros(9, dtype=torch.bool)
        there[:3] = True
    for name in ("occlusion", "integrated_gradients"):
        scores = explain(name, model, input, 3, baseline=baseline).scores.flatten()
        assert (scores[there] == 0).all() and (scores[~there] != 0).all(), name


def test_a_long_list_is_short_in_the_repr():
    model = gl.HookedViM.tiny()
    found = attribution.random(model, example(model, 20).float(), (3, [0, 1, 2, 3, 4] * 4))
    assert repr(found).startswith("Attribution(random, target right [3, 3, 3, 3, 3, 3, ...: 20], wrong [0, 1, 2,")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gatedlens/mamba-recall", "gatedlens/griffin-recall", "gatedlens/rwkv-recall"])
def test_good_methods_find_the_answer(name):
    """Where the answer stands is known; chance puts it in the middle of 21 positions."""
    model, batch = gl.from_pretrained(name, device="cpu"), gl.tasks.recall(16, seed=7)
    at = batch.answer_pos.unsqueeze(1)

    def rank(method, **options):
        found = explain(method, model, batch.tokens, batch.answers, **options)
        return float(found.ranks.gather(1, at).double().mean())

    assert 6 < rank("random") < 14
    for method, options in {
        "lrp": {},
        "occlusion": {},
        "rollout": {"sign": "abs"},
        "raw_attention": {"sign": "abs"},
    }.items():
        assert rank(method, **options) < 2.5, method
    official = rank("gradient_attention", mode="official", start_layer=0)
    assert official < 4 and rank("smoothgrad") < 6


def test_it_is_a_result_with_a_plot_and_a_file(model, tmp_path):
    found = attribution.lrp(model, example(model), target=2)
    path = found.save(tmp_path / "found.json")
    loaded = Attribution.load(path)
    assert torch.equal(loaded.scores, found.scores) and loaded.method == "lrp" and loaded.layers == found.layers
    assert loaded.target == [2, 2] and torch.equal(loaded.explained, found.explained)
    assert torch.equal(loaded.ranks, found.ranks)
    assert json.loads(path.read_text())["facts"]["remainder"] == found.facts["remainder"]
    assert found.plot(row=1) is not None
    assert found.at(batch=0).plot() is not None
    assert found.top(1)[0]["value"] == pytest.approx(float(found.scores.flatten()[found.scores.abs().argmax()]))
    with pytest.raises(gl.InputError, match="row=2: this attribution has 2 rows"):
        found.plot(row=2)
    if model.grid is not None:
        with pytest.raises(gl.InputError, match="without its image"):
            loaded.plot()
    assert "lrp" in repr(found) and "batch 2" in repr(found)


def test_a_name_finds_its_method():
    assert attribution.method("rollout") is attribution.rollout and next(iter(METHODS)) == "raw_attention"
    assert all(name == method.__name__ and method.__doc__ for name, method in METHODS.items())
    with pytest.raises(gl.InputError, match="'rolout' is no attribution method.*Did you mean 'rollout'"):
        attribution.method("rolout")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (400, "target=400 is out of range: tiny-.* has the logits 0 to"),
        (-1, "target=-1 is out of range"),
        (torch.tensor([0, 1, 2]), r"target has shape \[3\] and the input 2 rows"),
        ((1, 2, 3), "a pair"),
        ((1, 900), r"target=\(1, 900\) is out of range"),
        (1.5, "give an id"),
        (True, "give an id"),
        ([0.5, 1.0], "whole numbers"),
        ([[1], [2, 3]], "no list of ids"),
        (lambda logits: logits.sum(), "each row needs its own"),
        (lambda logits: logits.sum(-1).sum(-1) * torch.nan if logits.ndim == 3 else logits.sum(-1) * torch.nan, "NaN"),
    ],
)
def test_wrong_targets_are_explained(target, message):
    for model in (gl.HookedMamba.tiny(), gl.HookedViM.tiny(dtype=torch.float64)):
        with pytest.raises(gl.InputError, match=message):
            attribution.raw_attention(model, example(model), target)


def test_a_metric_without_a_gradient_is_explained(model):
    def counted(logits):
        return (logits.detach() > 0).double().flatten(1).sum(1)

    for name in ("gradient_attention", "lrp"):
        with pytest.raises(gl.InputError, match="does not depend on the input"):
            explain(name, model, example(model), counted)
    assert not model.list_hooks()


def test_wrong_inputs_of_attributions_are_explained(hooked):
    model = hooked.tiny()
    with pytest.raises(gl.InputError, match=r"lrp\(model=a Linear\): expected a gatedlens model"):
        attribution.lrp(torch.nn.Linear(1, 1), [[1]])
    if model.grid is None:
        with pytest.raises(gl.InputError, match="out of range"):
            attribution.lrp(model, [[900]])
        with pytest.raises(gl.InputError, match="attention_mask has shape"):
            attribution.lrp(model, [[1, 2]], attention_mask=torch.ones(1, 5))
        return
    from PIL import Image

    with pytest.raises(gl.InputError, match="reads float images"):
        attribution.lrp(model, torch.zeros(1, 3, 5, 5))
    with pytest.raises(gl.InputError, match="mode 'RGBA'"):
        attribution.lrp(model, Image.new("RGBA", (12, 12)))
    with pytest.raises(gl.InputError, match="attention_mask was given"):
        attribution.lrp(model, example(model).float(), attention_mask=torch.ones(1, 5))


@pytest.mark.slow
def test_attributions_in_half_precision(hooked):
    model = hooked.tiny().to(torch.bfloat16)
    input = example(model) if model.grid is None else example(model).float()
    for name in METHODS:
        found = explain(name, model, input, 2)
        assert found.scores.dtype == torch.float32 and torch.isfinite(found.scores).all(), name

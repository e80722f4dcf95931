"""Fitted lenses: Jacobians against autograd's and TransformerLens's, relevance against lrp, tuned lenses, files, mistakes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.autograd.functional import jacobian

import gatedlens as gl
from gatedlens import lens
from gatedlens.runs.relevance_rules import Rules
from gatedlens.runs.stopping import Interrupted
from tests.helpers import earlier, example, padded, relative

QUIET = {"progress": False}


def of_last(model, tokens, some, layer=0):
    """resid after a layer -> the last layer's stream of one row, summed over the positions that read."""
    name = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    beside = earlier(model, tokens)

    def last(stream):
        out: list[torch.Tensor] = []
        hooks = [(name, lambda x, hook: out.append(x))]
        model.run_with_hooks(stream, start_at_layer=layer + 1, return_type="logits", fwd_hooks=hooks, **beside)
        return out[0][0, some].sum(0)

    return last


def literal(model, tokens, some):
    """The mean Jacobian of one row after layer 0, by autograd, an output at a time."""
    stream = model(tokens, stop_at_layer=1).detach()
    return jacobian(of_last(model, tokens, some), stream)[:, 0][:, some].mean(1)


def test_the_jacobian_lens_is_the_mean_jacobian(model):
    x = example(model)
    n = model.run_with_cache(x, names_filter="blocks.0.hook_resid_pre")[1]["resid_pre", 0].shape[1]
    some = slice(1, n - 1)
    found = lens.jacobian_lens(model, [x[:1], x[1:]], layers=[0], skip_first=1, dim_batch=5, **QUIET)
    want = (literal(model, x[:1], some) + literal(model, x[1:], some)) / 2
    assert found.layers == [0] and found.facts["prompts"] == 2
    assert relative(found.weights[0], want) < 1e-10


def test_a_relevance_lens_is_the_mean_jacobian_under_the_rules(model):
    """... and its matrix at the embedding, of one prompt of one position, gives the scores of lrp."""
    x = example(model)[:1]
    found = lens.relevance_lens(model, x, layers=["embed", 0], skip_first=0, skip_last=0, **QUIET)
    with Rules.of(model).on(model):
        want = literal(model, x, slice(None))
    assert relative(found.weights[0], want) < 1e-10
    if not isinstance(model, gl.HookedLanguageModel) or model.cfg.logits_soft_cap is not None:
        return  # images have several positions; a capped logit is not what the direction is of
    token = x[:, :1]
    found = lens.relevance_lens(model, token, layers="embed", skip_first=0, skip_last=0, **QUIET)
    cache = model.run_with_cache(token)[1]
    u = lens.logit_shares.Reading.of(model, cache, 3, 5, None, ()).direction[0, 0]
    got = u @ found.weights["embed"] @ cache["resid_pre", 0][0, 0]
    score = gl.attribution.lrp(model, token, target=(3, 5)).scores[0, 0]
    assert torch.allclose(got, score, rtol=1e-10, atol=1e-12)


def test_padded_rows_count_as_they_do_alone(lm):
    rows = [example(lm, 1, n, seed=n)[0] for n in (7, 5)]
    options = {"layers": [0], "skip_first": 1, **QUIET}
    alone = lens.jacobian_lens(lm, [row.unsqueeze(0) for row in rows], **options)
    for side in ("left", "right"):
        assert relative(lens.jacobian_lens(lm, [padded(rows, side)], **options).weights[0], alone.weights[0]) < 1e-10


# -- reading ---------------------------------------------------------------------------------------------------------


def test_an_identity_is_the_logit_lens(model):
    x, d = example(model), model.cfg.d_model
    fitted = lens.tuned_lens(model, x, steps=1, lr=1e-30, **QUIET)
    assert all(torch.allclose(one, torch.eye(d, dtype=one.dtype)) for one in fitted.weights.values())
    found, plain = fitted.read(model, x), lens.logit_lens(model, x)
    assert found.layers == plain.layers and torch.equal(found.logits(-1), plain.logits(-1))
    for layer in found.layers:
        assert torch.allclose(found.logits(layer), plain.logits(layer), rtol=1e-10, atol=1e-10)
    off = found.divergence(row=1)
    assert off.values[-1].abs().max() < 1e-12 and bool((off.values > -1e-12).all())
    want = torch.nn.functional.kl_div(
        found.logits(0)[1].log_softmax(-1), found.logits(-1)[1].log_softmax(-1), log_target=True, reduction="none"
    )
    assert torch.allclose(off.values[1], want.sum(-1))


@pytest.fixture(scope="module")
def of_recall(recall_model):
    return lens.tuned_lens(
        recall_model, [gl.tasks.recall(8, seed=s).tokens for s in range(4)], steps=24, lr=3e-3, **QUIET
    )


def test_a_tuned_lens_is_nearer_to_the_prediction(recall_model, of_recall):
    fresh = gl.tasks.recall(4, seed=99).tokens
    found, plain = of_recall.read(recall_model, fresh), lens.logit_lens(recall_model, fresh)
    for layer in of_recall.layers:
        assert found.divergence().at(layer=layer).values.mean() < 0.8 * plain.divergence().at(layer=layer).values.mean()
    course = lens.losses(of_recall)
    assert course.axes == ("step", "layer") and course["layer"] == of_recall.layers and course.size("step") == 24


def test_a_fit_goes_on_where_it_stopped_and_gives_the_same_numbers(recall_model, of_recall, tmp_path):
    batches = [gl.tasks.recall(8, seed=s).tokens for s in range(4)]
    path = str(tmp_path / "under-way.safetensors")
    options = {"lr": 3e-3, "checkpoint": path, **QUIET}
    lens.tuned_lens(recall_model, batches, steps=10, **options)
    again = lens.tuned_lens(recall_model, batches, steps=24, **options)
    for layer in of_recall.layers:
        assert torch.equal(again.weights[layer], of_recall.weights[layer])
        assert torch.equal(again.biases[layer], of_recall.biases[layer])
    with pytest.raises(gl.InputError, match="is of another fit: its seed is 0 and here it is 1"):
        lens.tuned_lens(recall_model, batches, steps=24, seed=1, **options)
    with pytest.raises(gl.InputError, match="has done 24 steps"):
        lens.tuned_lens(recall_model, batches, steps=5, **options)


def test_a_jacobian_s_fit_goes_on_too(tmp_path):
    model = gl.HookedMamba.tiny(dtype=torch.float64)
    batches = [example(model, seed=seed) for seed in range(3)]
    options = {"skip_first": 1, **QUIET}
    whole = lens.jacobian_lens(model, batches, **options)
    path = tmp_path / "under-way.safetensors"

    def stopped():
        yield from batches[:2]
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="goes on from there"):
        lens.jacobian_lens(model, stopped(), checkpoint=path, **options)
    again = lens.jacobian_lens(model, batches, checkpoint=path, **options)
    assert all(torch.equal(again.weights[layer], whole.weights[layer]) for layer in whole.layers)
    with pytest.raises(gl.InputError, match="its batch 0 is another input"):
        lens.jacobian_lens(model, batches[::-1], checkpoint=path, **options)
    assert not model.list_hooks()


def test_a_lens_is_saved_and_is_of_one_model(of_recall, recall_model, tmp_path):
    again = lens.FittedLens.load(of_recall.save(tmp_path / "lens.safetensors"))
    assert repr(again) == repr(of_recall) == "FittedLens(tuned lens of gatedlens/mamba-recall, depths embed to 0 (2))"
    assert again.layers == of_recall.layers and again.facts == of_recall.facts
    assert all(torch.equal(again.weights[layer], of_recall.weights[layer]) for layer in of_recall.layers)
    assert "tuned lens" in again._repr_html_()
    other, tokens = gl.from_pretrained("gatedlens/griffin-recall", device="cpu"), gl.tasks.recall(1).tokens
    with pytest.raises(gl.InputError, match="fitted to gatedlens/mamba-recall, and this is gatedlens/griffin-recall"):
        again.read(other, tokens)
    moved = gl.HookedMamba.tiny(seed=1)
    with pytest.raises(gl.InputError, match="of a model with"):
        again.carried_over(moved)
    one, two = gl.HookedMamba.tiny(seed=0), gl.HookedMamba.tiny(seed=1)
    fitted = lens.jacobian_lens(one, example(one), skip_first=1, **QUIET)
    with pytest.raises(gl.InputError, match=r"its parameters \(checksum\) is"):
        fitted.read(two, example(two))
    carried = fitted.carried_over(two)
    assert carried.facts["fitted to"] == one.cfg.model_name
    carried.read(two, example(two))


def test_mistakes_are_explained(tmp_path):
    model = gl.HookedMamba.tiny(dtype=torch.float64)
    x = example(model)
    fitted = lens.jacobian_lens(model, x, skip_first=1, **QUIET)
    (tmp_path / "damaged.safetensors").write_bytes(b"x" * 40)
    gl.steering.SteeringVector("hook_embed", torch.ones(3)).save(tmp_path / "vector.safetensors")
    for ask, error, message in (
        (lambda: lens.jacobian_lens(model, x, **QUIET), gl.InputError, "has 7 positions; skip_first=16"),
        (lambda: lens.jacobian_lens(model, x, layers=-1, **QUIET), gl.InputError, "whose lens is the identity"),
        (lambda: lens.jacobian_lens(model, x, layers=7, **QUIET), gl.InputError, "layers=7 does not exist"),
        (lambda: lens.jacobian_lens(model, x, layers=[], **QUIET), gl.InputError, "names no layer"),
        (lambda: lens.jacobian_lens(model, [], **QUIET), gl.InputError, "given no batch"),
        (lambda: lens.jacobian_lens(model, x, skip_first=-1, **QUIET), gl.InputError, "skip_first=-1"),
        (lambda: lens.jacobian_lens(model, x, dim_batch=0, **QUIET), gl.InputError, "dim_batch=0"),
        (lambda: lens.jacobian_lens(model, x, checkpoint="no/x", **QUIET), gl.InputError, "name a file in a folder"),
        (lambda: lens.relevance_lens(model, x, gates="all", **QUIET), gl.InputError, "gates='all'"),
        (lambda: lens.tuned_lens(model, [], **QUIET), gl.InputError, "given no batch"),
        (lambda: lens.tuned_lens(model, x, steps=0, **QUIET), gl.InputError, "steps=0"),
        (lambda: lens.tuned_lens(model, x, lr=0, **QUIET), gl.InputError, "lr=0"),
        (lambda: lens.losses(fitted), gl.InputError, "A J-lens is not trained"),
        (lambda: fitted.read(model, x).logits("emb"), gl.InputError, "this J-lens reads embed, 0, 1"),
        (lambda: fitted.direction(model, 3, 1), gl.InputError, "layer=1: this J-lens was fitted at embed, 0"),
        (lambda: fitted.direction(model, 999, 0), gl.InputError, "token=999 is out of range"),
        (lambda: lens.FittedLens.load(tmp_path / "damaged.safetensors"), gl.CheckpointError, "not a readable"),
        (
            lambda: lens.FittedLens.load(tmp_path / "vector.safetensors"),
            gl.CheckpointError,
            "is a steering of gatedlens",
        ),
    ):
        with pytest.raises(error, match=message):
            ask()
    with torch.inference_mode(), pytest.raises(gl.InputError, match="inference_mode"):
        lens.jacobian_lens(model, x, **QUIET)
    bad = replace(fitted, kind="lens of my own")
    with pytest.raises(gl.CheckpointError, match="its field 'kind'"):
        lens.FittedLens.load(bad.save(tmp_path / "bad.safetensors"))

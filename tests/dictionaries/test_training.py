"""Training: known directions are found again; twice the same numbers; an interrupted one goes on; what is measured afterwards."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens.dictionaries import BatchTopK, JumpReLU, ReLU, TopK, examples, measure, splice, train
from gatedlens.errors import InputError, PointError
from tests.dictionaries.making import draw, made

AT, OUT = "blocks.0.hook_resid_pre", "blocks.0.hook_mixer_out"
FAST = {"steps": 300, "batch_size": 256, "lr": 5e-3, "progress": False}


@pytest.fixture(scope="module")
def planted():
    """Sums of two of twelve directions in eight dimensions: what a dictionary should find."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(12, 8, generator=generator), dim=1)
    which = torch.rand(4096, 12, generator=generator).topk(2).indices
    sizes = 1 + torch.rand(4096, 2, generator=generator)
    return directions, (directions[which] * sizes.unsqueeze(-1)).sum(1)


@pytest.mark.parametrize("activation", [TopK(2), BatchTopK(2)])
def test_planted_directions_are_found(planted, activation):
    directions, x = planted
    d = train(x, AT, 16, activation, **FAST)
    cosines = torch.nn.functional.normalize(d.W_dec, dim=1) @ directions.T
    assert int((cosines.max(0).values > 0.75).sum()) >= 11
    told = d.facts["training"]
    assert told["explained"] > 0.85 and abs(told["l0"] - 2) < 0.2
    own = 1 - float((d(x) - x).square().sum() / (x - x.mean(0)).square().sum())
    assert abs(own - told["explained"]) < 0.05  # the scales are folded in, the threshold is that of training


def test_a_relu_is_sparser_with_a_larger_l1(planted):
    few, many = (
        train(planted[1], AT, 16, ReLU(), l1=l1, **{**FAST, "steps": 150}).facts["training"]["l0"] for l1 in (1.0, 0.01)
    )
    assert few < many


def test_twice_the_same_and_gone_on_with(planted, tmp_path, monkeypatch):
    x, options = planted[1], {**FAST, "steps": 60, "activation": BatchTopK(2), "dead_after": 5}
    whole, again = (train(x, AT, 16, **options) for _ in range(2))
    path, calls = tmp_path / "checkpoint.safetensors", []
    once = gl.dictionaries.training.Run.once

    def stopped(self):
        calls.append(1)
        if len(calls) == 25:
            raise KeyboardInterrupt
        once(self)

    monkeypatch.setattr(gl.dictionaries.training.Run, "once", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(x, AT, 16, checkpoint=path, **options)
    gone_on = train(x, AT, 16, checkpoint=path, **options)
    assert len(calls) == 25 + 36
    for one in (again, gone_on):
        for name, tensor in whole.state_dict().items():
            assert torch.equal(one.state_dict()[name], tensor), name
        assert one.facts == whole.facts
    with pytest.raises(InputError, match="of another fit"):
        train(x, AT, 16, checkpoint=path, **{**options, "seed": 1})
    with pytest.raises(InputError, match="of another fit"):
        train(x + 1, AT, 16, checkpoint=path, **options)


def test_a_transcoder_finds_a_linear_map_by_its_skip(planted):
    x = planted[1]
    y = x @ draw()(8, 5).float()
    d = train({AT: x, OUT: y}, AT, 8, TopK(1), out_point=OUT, skip=True, **FAST)
    assert d.kind == "transcoder" and d.facts["training"]["explained"] > 0.95


def test_a_crosscoder_reads_and_writes_its_points_side_by_side(planted):
    x, points = planted[1], ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    d = train({points[0]: x, points[1]: -2 * x}, points, 16, TopK(2), **FAST)
    assert (d.kind, d.points, d.d_ins, d.d_outs) == ("crosscoder", tuple(points), (8, 8), (8, 8))
    first, second = d.W_dec.split(8, 1)
    alike = torch.nn.functional.cosine_similarity(first, -second, dim=1)[d.encode(torch.cat([x, -2 * x], 1)).any(0)]
    assert float(alike.min()) > 0.9 and d.facts["training"]["explained"] > 0.8


def test_what_cannot_be_trained_is_named(planted):
    x = planted[1]
    for error, said, call in (
        (InputError, "is not trained here", lambda: train(x, AT, 16, JumpReLU(0.1), **FAST)),
        (InputError, "give l1", lambda: train(x, AT, 16, ReLU(), **FAST)),
        (InputError, "One tensor was given", lambda: train(x, AT, 16, out_point=OUT, **FAST)),
        (PointError, "is not among the tensors", lambda: train({AT: x}, OUT, 16, **FAST)),
        (InputError, "As many entries", lambda: train({AT: x, OUT: x[:5]}, AT, 16, out_point=OUT, **FAST)),
        (InputError, "all zero", lambda: train(0 * x, AT, 16, **FAST)),
        (InputError, "all the same", lambda: train(0 * x + 1, AT, 16, **FAST)),
        (InputError, "n_features=0", lambda: train(x, AT, 0, **FAST)),
    ):
        with pytest.raises(error, match=said):
            call()


@pytest.fixture(scope="module")
def stored(recall_model, tmp_path_factory):
    pytest.importorskip("datasets")
    tokens = gl.tasks.recall(64, seed=3).tokens
    point = "blocks.1.hook_resid_pre"
    store = gl.store.harvest(
        recall_model, tokens, point, tmp_path_factory.mktemp("s") / "store", batch_size=32, progress=False
    )
    return store, tokens, point


def test_from_a_store(recall_model, stored):
    store, tokens, point = stored
    options = {**FAST, "steps": 20}
    _, cache = recall_model.run_with_cache(tokens, names_filter=point)
    sae, other = train(store, point, 32, TopK(4), **options), train(cache[point], point, 32, TopK(4), **options)
    torch.testing.assert_close(sae.W_dec, other.W_dec, atol=1e-5, rtol=1e-4)
    assert sae.facts["model"] == recall_model.cfg.model_name
    held, run = (examples(recall_model, sae, source, n=3) for source in (store, tokens))
    assert repr(held[held._strongest(1)[0]]) == repr(run[run._strongest(1)[0]])
    torch.testing.assert_close(held.rates, run.rates)


def test_what_is_measured_is_what_it_says(recall_model):
    """By hand: the error, the moments, and the model with the reconstruction, zeros and the mean in place."""
    batch = gl.tasks.recall(40, seed=5)
    point = "blocks.1.hook_resid_pre"
    d = made(recall_model, point, n=16, activation=TopK(3)).float()
    metric = gl.metrics.cross_entropy(batch.answers)
    found = measure(recall_model, d, batch.tokens, metric, batch_size=17)
    with torch.no_grad():
        y = recall_model.run_with_cache(batch.tokens, names_filter=point)[1][point]
        mean = y.flatten(0, 1).mean(0)
        assert abs(found.explained - (1 - float((y - d(y)).square().sum() / (y - mean).square().sum()))) < 1e-5
        f = d.encode(y) > 0
        assert abs(found.l0 - float(f.sum(-1).float().mean())) < 1e-6
        assert abs(found.dead - float((~f.flatten(0, 1).any(0)).float().mean())) < 1e-6
        torch.testing.assert_close(found.rates.values, f.flatten(0, 1).double().mean(0))
        for name, value in (("model", y), ("reconstructed", d(y)), ("zero", 0 * y), ("mean", mean.expand_as(y))):
            put = recall_model.run_with_hooks(batch.tokens, fwd_hooks=[(point, lambda x, hook, v=value: v)])
            assert abs(getattr(found, name) - float(metric(put).mean())) < 1e-5 * (1 + abs(getattr(found, name))), name
    assert found.recovered == (found.zero - found.reconstructed) / (found.zero - found.model)
    assert "recovered" in repr(found) and "Quality" in found._repr_html_() and not recall_model.list_hooks()


def test_padding_counts_nowhere(recall_model):
    tokens = gl.tasks.recall(6, seed=5).tokens
    pad = torch.cat([torch.ones(6, 3, dtype=torch.long), tokens], 1)
    mask = torch.cat([torch.zeros(6, 3, dtype=torch.long), torch.ones_like(tokens)], 1)
    d = made(recall_model, "blocks.1.hook_resid_pre", n=16, activation=TopK(3)).float()
    plain, padded = measure(recall_model, d, tokens).to_dict(), measure(recall_model, d, (pad, mask)).to_dict()
    assert plain.keys() == padded.keys()
    for name, value in plain.items():
        assert abs(padded[name] - value) < 1e-4 * (1 + abs(value)), name
    a, b = examples(recall_model, d, tokens, [3]), examples(recall_model, d, (pad, mask), [3])
    assert repr(a[3][:1]) == repr(b[3][:1])
    with pytest.raises(InputError, match="batch_size=0"):
        measure(recall_model, d, tokens, batch_size=0)


def test_examples_are_where_a_feature_fires_most(recall_model):
    tokens = gl.tasks.recall(30, seed=6).tokens
    point = "blocks.1.hook_resid_pre"
    d = made(recall_model, point, n=8).float()
    found = examples(recall_model, d, tokens, [2, 5], n=4, around=3)
    with splice(recall_model, d) as (one,), torch.no_grad():
        f = recall_model.run_with_cache(tokens, names_filter=one.features)[1][one.features][..., 5]
    best = f.max(1).values.topk(4)
    assert [one.sample for one in found[5]] == best.indices.tolist()
    first = found[5][0]
    assert abs(first.value - float(best.values[0])) < 1e-5 and first.pos == int(f[first.sample].argmax())
    assert first.words[first.at] == recall_model.to_string(tokens[first.sample, first.pos])
    torch.testing.assert_close(torch.tensor(first.activations), f[first.sample, max(0, first.pos - 3) : first.pos + 4])
    assert (
        int(found.bars[5].sum()) == int((f > 0).sum())
        and abs(float(found.rates[5]) - float((f > 0).float().mean())) < 1e-6
    )
    logits = (d.W_dec[5] * recall_model.ln_final.gain) @ recall_model.W_U
    assert found.writes[5][0][0] == recall_model.to_string(logits.argmax())
    page = found.page().page()
    assert page.startswith("<!doctype html>") and "feature 5" in page and "http" not in page
    assert "feature 5" in found._repr_html_() and repr(found).startswith("Examples(2 features")
    for said, call in (
        ("no examples of feature 3", lambda: found[3]),
        ("feature 8: the dictionary has 8", lambda: examples(recall_model, d, tokens, [8])),
        ("n=0", lambda: examples(recall_model, d, tokens, n=0)),
        ("reads no tokens", lambda: examples(gl.HookedViM.tiny(), d, tokens)),
    ):
        with pytest.raises(InputError, match=said):
            call()

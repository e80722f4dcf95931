"""Probes: scikit-learn's own numbers, held-out rows, controls, and what an ablation of a probe does."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import gatedlens as gl
from gatedlens import probes
from gatedlens.probes import Probe
from gatedlens.probes.fitting import KINDS
from tests.helpers import example, padded
from tests.test_notebook_reprs import held

RESID, CLOSE = "blocks.0.hook_resid_post", {"rtol": 1e-10, "atol": 1e-11}


@pytest.fixture(scope="module")
def batch():
    return gl.tasks.recall(80, seed=2)


@pytest.fixture(scope="module")
def cache(recall_model, batch):
    with torch.no_grad():
        return recall_model.run_with_cache(batch.tokens, names_filter=["blocks.*.hook_resid_post", "blocks.1.mixer.*"])[
            1
        ]


def test_it_is_what_scikit_learn_says(cache, batch):
    """The scaling is in the weights: the same scores as of a pipeline on the activations themselves."""
    probe = probes.fit(cache, batch.answers, RESID, batch.answer_pos, penalty=2.0)
    held = held_rows(cache, batch.answers, batch.answer_pos)
    x = cache[RESID][torch.arange(80), batch.answer_pos].double()
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=0.5, max_iter=1000))
    theirs.fit(x[~held], batch.answers[~held])
    assert torch.allclose(probe.linear(x), torch.as_tensor(theirs.decision_function(x)), atol=1e-8)
    assert probe.predict(x) == theirs.predict(x).tolist()
    right = torch.as_tensor(theirs.predict(x[held])) == batch.answers[held]
    assert probe.facts["accuracy"] == pytest.approx(right.double().mean().item()) and len(right) == probe.facts["test"]
    assert probe.facts["low"] <= probe.facts["accuracy"] <= probe.facts["high"]
    numbers = x[:, 0] * 2 + x[:, 1] - 1
    regression = probes.fit(cache, numbers, RESID, batch.answer_pos, "ridge", penalty=0.5)
    theirs = make_pipeline(StandardScaler(), Ridge(alpha=0.5))
    held = held_rows(cache, numbers, batch.answer_pos)
    theirs.fit(x[~held], numbers[~held])
    assert torch.allclose(regression.linear(x)[:, 0], torch.as_tensor(theirs.predict(x)), atol=1e-8)
    assert regression.facts["R2"] == pytest.approx(theirs.score(x[held], numbers[held]), abs=1e-8)


def held_rows(cache, labels, pos, held_out=0.25, seed=0):
    from gatedlens.probes.fitting import Recipe, as_numbers
    from gatedlens.probes.samples import Samples, labelled

    samples = Samples.of(cache, RESID, pos, None, {})
    return Recipe("linear", 1.0, held_out, seed).split(samples, as_numbers(labelled(labels, samples))[0])


def test_rows_are_held_out_whole_and_of_each_class_its_share(cache, batch):
    held = held_rows(cache, batch.answers, None).reshape(80, -1)
    assert torch.equal(held.all(1), held.any(1)) and 16 <= held[:, 0].sum() <= 24
    classes = batch.answers[held[:, 0]].bincount(minlength=30)[batch.answers.unique()]
    assert (classes >= 1).all()
    assert torch.equal(held, held_rows(cache, batch.answers, None).reshape(80, -1))
    assert not torch.equal(held, held_rows(cache, batch.answers, None, seed=1).reshape(80, -1))


def test_the_sweep_holds_each_probe_and_its_controls(recall_model, cache, batch):
    nothing = probes.untrained(recall_model)
    assert [p.flatten().sort().values.tolist() for p in nothing.wrapped.parameters()] == [
        p.flatten().sort().values.tolist() for p in recall_model.wrapped.parameters()
    ]
    with torch.no_grad():
        _, other = nothing.run_with_cache(batch.tokens, names_filter="blocks.*.hook_resid_post")
    columns = {"value": batch.answer_pos, "last": -1}
    found = probes.sweep(cache, batch.answers, "blocks.*.hook_resid_post", columns, untrained=other, progress=False)
    assert found.axes == ("measure", "layer", "pos") and found["pos"] == ["value", "last"]
    for layer, (label, pos) in ((0, ("value", batch.answer_pos)), (1, ("last", -1))):
        probe = probes.fit(cache, batch.answers, ("resid_post", layer), pos)
        cell = found.at(layer=layer, pos=label).values.tolist()
        assert cell[:4] == [probe.facts[name] for name in ("accuracy", "low", "high", "shuffled labels")]
        assert cell[4] == cell[0] - cell[3]
    last = found.at(layer=1, pos="last")
    assert last.at(measure="accuracy").values > 0.9 > 0.5 > last.at(measure="random weights").values
    several = probes.sweep(
        cache,
        batch.answers,
        ["blocks.*.hook_resid_post", "blocks.1.mixer.hook_gated"],
        [-1],
        kind="ridge",
        progress=False,
    )
    assert several.axes == ("measure", "point", "layer", "pos") and several.values[0].isnan().tolist() == [
        [[False], [False]], [[True], [False]],
    ]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_and_entries(cache, batch, kind):
    some = probes.fit(cache, batch.answers == batch.answers[0], ("gated", 1), -1, kind, channel=slice(0, 40))
    assert some.weights.shape == (1, 40) and some.classes == [False, True] and some.frame.index["channel"][-1] == 39
    numbers = probes.fit(cache, batch.answer_pos.double(), RESID, -1, kind, penalty=0.1)
    assert (
        numbers.classes is None
        and numbers.facts["R2"] <= 1
        and isinstance(numbers.predict(cache[RESID][:2, -1])[0], float)
    )
    if kind == "sparse":
        few = probes.fit(cache, batch.answers, RESID, -1, "sparse", penalty=20.0)
        assert few.facts["sparse"] > 0.5


def test_heads_of_states_by_themselves_and_of_hidden_axes():
    model = gl.HookedMamba2.tiny(seed=0, dtype=torch.float64)
    tokens, labels = example(model, 24), torch.arange(24) % 3
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=["blocks.*.mixer.hook_state", "blocks.*.mixer.hook_gated"])
    found = probes.sweep(cache, labels, "blocks.*.mixer.hook_state", [-1], by="head", kind="ridge", progress=False)
    assert found.axes == ("measure", "layer", "head", "pos")
    one = probes.fit(cache, labels, ("state", 1), -1, "ridge", head=2)
    assert found.at(layer=1, head=2, pos=-1).values[0].item() == one.facts["accuracy"]
    assert torch.equal(one.frame.places(model)[0], torch.arange(model.cfg.sizes["head"] * 32).reshape(4, -1)[2])
    part = probes.fit(cache, labels, ("gated", 1), -1, "ridge", head=2)
    assert part.weights.shape[1] == model.cfg.sizes["value"]
    with pytest.raises(gl.InputError, match="a position holds 16 vectors"):
        probes.fit(cache, labels, ("state", 1), axes="value")


def made(model, labels=(0, 1, 1, 0), pos=3):
    with torch.no_grad():
        _, cache = model.run_with_cache(example(model, 12), names_filter="*.hook_resid_post")
    return probes.fit(cache, torch.tensor(labels).repeat(3), RESID, pos, "ridge")


def test_ablations_are_what_they_say(model):
    probe, x = made(model), example(model, 4, seed=5)
    labels = ["sink", "no", "sink", "no"]
    P = probe.directions.mT @ probe.directions
    with torch.no_grad():
        was = model.run_with_cache(x, names_filter=RESID)[1][RESID]

        def after(change):
            with change.on(model):
                return model.run_with_cache(x, names_filter=RESID)[1][RESID]

        want = was.clone()
        want[:, 3] = was[:, 3] - (was[:, 3] - probe.mean) @ P
        assert torch.allclose(after(probe.ablate()), want, **CLOSE)
        mean = probe.means.mean(0)
        M = (probe.means - mean)[:1].mT / (probe.means - mean)[0].norm()
        other = was.clone()
        other[:, 3] = was[:, 3] - (was[:, 3] - probe.mean) @ (M @ M.mT)
        assert torch.allclose(after(probe.ablate(3, along="means")), other, **CLOSE)
        only = torch.where(torch.tensor([True, False, True, False])[:, None, None], want, was)
        assert torch.allclose(after(probe.ablate(3, labels=labels, of="sink")), only, **CLOSE)
        tokens = torch.zeros(was.shape[:2], dtype=torch.long)
        tokens[[0, 2], 3] = 7
        assert torch.allclose(after(probe.ablate(labels=tokens, of=7)), only, **CLOSE)
        shifted = was.clone()
        shifted[:, 3] -= probe.means[1] - probe.mean
        assert torch.allclose(after(probe.remove_mean(1, 3)), shifted, **CLOSE)
        for same in (want, shifted):
            other = probe.placebo(seed=1)
            moved = after(other.ablate(3) if same is want else other.remove_mean(1, 3))
            far, near = (moved - was).norm(dim=-1), (same - was).norm(dim=-1)
            assert torch.allclose(far, near, **CLOSE) and not torch.allclose(moved, same, atol=1e-3)
        everywhere = was - (was - probe.mean) @ P
        assert torch.allclose(after(probe.ablate("*")), everywhere, **CLOSE)
        drawn = probes.matched_rows(labels, "sink", seed=0)
        assert drawn.tolist() == [False, True, False, True]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_passed_over(lm, side):
    rows = [example(lm, 1, n, seed=n)[0] for n in (7, 5, 6, 4) * 2]
    tokens, mask = padded(rows, side)
    _, cache = lm.run_with_cache(tokens, attention_mask=mask, names_filter=RESID)
    labels = torch.arange(8) % 2
    probe = probes.fit(cache, labels, RESID, -2, "ridge")
    alone = torch.stack([lm.run_with_cache(row[None], names_filter=RESID)[1][RESID][0, -2] for row in rows])
    assert probe.predict(alone) == probe.predict(cache[RESID][torch.arange(8), [int(m.nonzero()[-2]) for m in mask]])
    every = probes.fit(cache, labels, RESID, None, "ridge")
    assert every.facts["train"] + every.facts["test"] == int(mask.sum())
    by_token = probes.fit(cache, tokens % 2, RESID, None, "ridge")
    assert by_token.classes == [0, 1]
    with probe.ablate(-2, labels=labels, of=1).on(lm):
        changed = lm.run_with_cache(tokens, attention_mask=mask, names_filter=RESID)[1][RESID]
    where = ((changed - cache[RESID]).abs().amax(-1) > 0) & mask
    assert torch.equal(where.sum(1), labels)


def test_a_store_goes_where_a_cache_does(recall_model, cache, batch, tmp_path):
    store = gl.store.harvest(
        recall_model, batch.tokens, ["blocks.0.hook_resid_post", "blocks.1.mixer.hook_gated"], tmp_path / "s", batch_size=40,
        context=batch.tokens.shape[1], progress=False,
    )  # fmt: skip
    for pos in (-1, 5, [2, 3], None):
        ours, theirs = (probes.fit(one, batch.answers, RESID, pos, "ridge") for one in (cache, store))
        assert ours.facts == theirs.facts and torch.allclose(ours.weights, theirs.weights, atol=1e-5)
        assert ours.frame == theirs.frame
    found = probes.sweep(store, batch.answers, "blocks.*", [-1], kind="ridge", progress=False)
    assert found["point"] == ["hook_resid_post", "mixer.hook_gated"]
    part = probes.fit(store, batch.answers, ("gated", 1), -1, "ridge", channel=[3, 5])
    again = part.test(cache, batch.answers)
    assert again["measure"] == ["accuracy", "low", "high"] and part.frame.index == {"channel": [3, 5]}
    with pytest.raises(gl.InputError, match="axes='channel'"):
        probes.fit(store, batch.answers, ("gated", 1), axes="channel")


def test_it_saves_and_loads(cache, batch, tmp_path):
    probe = probes.fit(cache, [str(int(one)) for one in batch.answers], RESID, -1)
    again = Probe.load(probe.placebo(3).save(tmp_path / "probe.safetensors"))
    assert repr(again) == repr(probe.placebo(3)) and again.facts == probe.facts and again.classes == probe.classes
    x = cache[RESID][:4, -1]
    assert again.predict(x) == probe.predict(x) and torch.equal(again.mean, probe.mean)
    assert torch.equal(again.other, probe.placebo(3).other) and "Probe" in held(again)
    with pytest.raises(gl.CheckpointError, match="no saved subspace"):
        gl.subspaces.Subspace.load(tmp_path / "probe.safetensors")


def test_errors_name_what_is_wrong(recall_model, moby_model, cache, batch):
    probe = probes.fit(cache, batch.answers, RESID, -1, "ridge")
    other = gl.from_pretrained("gatedlens/rwkv-recall", device="cpu")
    _, theirs = other.run_with_cache(batch.tokens, names_filter=RESID)
    for call, error, why in (
        (lambda: probes.fit(cache, batch.answers[:-1], RESID), gl.InputError, "79 labels, 80 rows"),
        (lambda: probes.fit(cache, [1] * 80, RESID), gl.InputError, "All labels are 1"),
        (lambda: probes.fit(cache, [0.5] * 80, RESID), gl.InputError, "All labels are 0.5"),
        (lambda: probes.fit(cache, batch.answers, RESID, kind="liner"), gl.InputError, "Did you mean 'linear'"),
        (lambda: probes.fit(cache, batch.answers, "blocks.0.mixer.hook_dt"), gl.PointError, "is not in this cache"),
        (lambda: probes.fit(recall_model, batch.answers, RESID), gl.InputError, "this is HookedMamba"),
        (lambda: probe.test(theirs, batch.answers), gl.InputError, r"of gatedlens/mamba-recall, 64 numbers; these are of gatedl"),
        (lambda: probe.predict(torch.zeros(2, 3)), gl.InputError, r"reads \[entry, 64\]"),
        (lambda: probe.ablate(labels=batch.answers, of=0), gl.InputError, "no label is that"),
        (lambda: probe.ablate(along="mean"), gl.InputError, "Did you mean 'means'"),
        (lambda: probe.ablate(of=1), gl.InputError, "give labels, too"),
        (lambda: probe.remove_mean(99), gl.InputError, "99 is no class of this probe"),
        (lambda: probes.matched_rows([1, 1, 0], 1), gl.InputError, "too few to draw"),
    ):  # fmt: skip
        with pytest.raises(error, match=why):
            call()
    with pytest.raises(gl.InputError, match="from another model"), probe.ablate().on(moby_model):
        pass
    some = probe.ablate(-1, labels=batch.answers, of=int(batch.answers[0]))
    with pytest.raises(gl.InputError, match="rows says of 80 rows"), some.on(recall_model):
        recall_model(batch.tokens[:2])
    assert probe.moved_to(other).test(theirs, batch.answers).values.shape == (3,)

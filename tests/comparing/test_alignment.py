"""Models side by side: by layer, by depth, by label; differences; mistakes."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens import comparing
from tests.helpers import example


@pytest.fixture(scope="module")
def models():
    return {
        "one": gl.HookedMamba.tiny(seed=0),
        "two": gl.HookedMamba.tiny(seed=1),
        "deep": gl.HookedMamba.tiny(n_layer=4),
    }


def top(model):
    return gl.lens.logit_lens(model, example(model)).top()


def test_two_checkpoints_layer_by_layer(models):
    two = {name: models[name] for name in ("one", "two")}
    found = comparing.side_by_side(top, two)
    assert found.axes == ("model", "layer", "pos") and found["model"] == ["one", "two"]
    for name, model in two.items():
        assert torch.equal(found.at(model=name).values, top(model).values)
    off = comparing.difference(found, "two", "one")
    assert torch.equal(off.values, top(models["two"]).values - top(models["one"]).values)
    assert off.axes == ("layer", "pos") and "two - one" in off.title and off["layer"] == ["embed", 0, 1]


def test_what_a_model_lacks_is_not_a_number(models):
    found = comparing.side_by_side(top, {name: models[name] for name in ("one", "deep")})
    assert found["layer"] == ["embed", 0, 1, 2, 3]
    assert found.at(model="one").values[3:].isnan().all() and not found.at(model="deep").values.isnan().any()
    assert torch.equal(found.at(model="one").values[:3], top(models["one"]).values)


def test_unequal_depths_stand_at_the_same_share_of_the_depth(models):
    found = comparing.side_by_side(top, {name: models[name] for name in ("one", "deep")}, align="depth")
    assert found["layer"] == ["embed", 0.0, 0.333, 0.667, 1.0]
    one = top(models["one"]).values
    assert torch.equal(found.at(model="one").values, one[[0, 1, 1, 2, 2]])
    assert torch.equal(found.at(model="deep").values, top(models["deep"]).values)


def test_profiles_of_two_models(models):
    """A labelled number of a profile is as good as a Result."""
    two = {name: models[name] for name in ("one", "two")}

    def half_life(model):
        return gl.implicit_attention(model, example(model)).profiles(progress=False).half_life

    found = comparing.side_by_side(half_life, two)
    assert found.axes == ("model", "layer", "batch") and found.value == "half life"
    for name, model in two.items():
        assert torch.equal(found.at(model=name).values, half_life(model).as_subclass(torch.Tensor))


def test_circuits_of_two_architectures():
    """Senders and receivers by their names; an edge that one lacks is not a number."""
    models = {"mamba": gl.HookedMamba.tiny(), "griffin": gl.HookedGriffin.tiny()}
    clean, other = (example(models["mamba"], pos=4, seed=seed) for seed in (0, 1))
    metric = gl.metrics.logit_difference(3, 5)

    def scores(model):
        return gl.circuits.eap(model, clean, other, metric).scores

    found = comparing.side_by_side(scores, models)
    for name, model in models.items():
        own = scores(model)
        for sender in own["sender"]:
            for receiver in own["receiver"]:
                got, want = (
                    found.at(model=name, sender=sender, receiver=receiver),
                    own.at(sender=sender, receiver=receiver),
                )
                assert torch.equal(got.values.nan_to_num(7), want.values.nan_to_num(7))
    off = comparing.difference(found, "mamba", "griffin")
    assert off.at(sender="embed", receiver="0.mixer").values.isfinite()


def test_it_draws_and_is_saved(models, tmp_path):
    pytest.importorskip("matplotlib").use("agg")
    found = comparing.side_by_side(top, models)
    found.plot()
    comparing.difference(found, "two", "one").plot()
    again = gl.Result.load(found.save(tmp_path / "found.json"))
    assert again.axes == found.axes and again["model"] == ["one", "two", "deep"]


def test_mistakes_are_explained(models):
    two = {name: models[name] for name in ("one", "two")}
    long = gl.lens.logit_lens(models["deep"], example(models["deep"], pos=9)).top()
    twice = {"pos": ["a"] * 9}
    for ask, message in (
        (
            lambda: comparing.side_by_side(top, {"one": models["one"]}),
            "compares two models or more by name; there are 1",
        ),
        (lambda: comparing.side_by_side(top, two, align="dept"), "align='dept'.*Did you mean 'depth'"),
        (lambda: comparing.side_by_side(lambda m: 3.0, two), "gives a float of 'one'; it must be a Result"),
        (
            lambda: comparing.side_by_side(lambda m: top(m) if m is two["one"] else top(m).at(pos=0), two),
            "gives the axes",
        ),
        (
            lambda: comparing.side_by_side(
                lambda m: top(m) if m is two["one"] else gl.Result(long.values, long.axes, twice), two
            ),
            "cannot be put side by side",
        ),
        (lambda: comparing.difference(top(models["one"]), "two", "one"), "has no axis 'model'"),
        (lambda: comparing.difference(comparing.side_by_side(top, two), "tow", "one"), "model='tow' is not there"),
    ):
        with pytest.raises(gl.InputError, match=message):
            ask()

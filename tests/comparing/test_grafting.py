"""Grafted weights: everything exchanged is the other model, a share is on the way, the model is left as it was found."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens import comparing
from gatedlens.comparing.grafting import ends_of, parts_of
from tests.helpers import example, relative


@pytest.fixture(scope="module")
def another(hooked):
    return hooked.tiny(seed=1, dtype=torch.float64)


@torch.no_grad()
def test_with_every_weight_exchanged_it_is_the_other_model(model, another):
    x, before = example(model), {name: one.data_ptr() for name, one in model.wrapped.named_parameters()}
    own, theirs = model(x), another(x)
    layers, ends = comparing.graft(another), comparing.graft(another, parts=list(ends_of(another)))
    with layers.on(model), ends.on(model):
        assert not [name for name, one in model.wrapped.named_parameters() if one.data_ptr() == before[name]]
        assert torch.equal(model(x), theirs)
    assert torch.equal(model(x), own)
    with pytest.raises(RuntimeError), layers.on(model):
        raise RuntimeError
    assert {name: one.data_ptr() for name, one in model.wrapped.named_parameters()} == before


@torch.no_grad()
def test_parts_are_a_layer_s_weights_each_once(model, another):
    for layer in range(model.cfg.n_layers):
        parts = parts_of(model, layer)
        found = [id(one) for part in parts.values() for one in part]
        assert len(found) == len(set(found)) and set(found) == {
            id(one) for one in model.blocks[layer].weights.parameters()
        }
    x = example(model)
    with comparing.graft(another, 0).on(model):
        whole = model(x)
    with comparing.graft(another, 0, list(parts_of(model, 0))).on(model):
        assert torch.equal(model(x), whole)


@torch.no_grad()
def test_a_share_is_on_the_way():
    one, two = gl.HookedMamba.tiny(dtype=torch.float64), gl.HookedMamba.tiny(seed=1, dtype=torch.float64)
    mixed = gl.HookedMamba.tiny(dtype=torch.float64)
    theirs = dict(two.wrapped.named_parameters())
    for name, weight in mixed.wrapped.named_parameters():
        if ".layers.0." in f".{name}":
            weight.copy_(0.75 * weight + 0.25 * theirs[name])
    x = example(one)
    with comparing.graft(two, 0, share=0.25).on(one):
        assert relative(one(x), mixed(x)) < 1e-12
    with comparing.graft(two, 0, share=0).on(one):
        assert relative(one(x), gl.HookedMamba.tiny(dtype=torch.float64)(x)) < 1e-12


def test_a_sweep_finds_the_layer_that_was_tuned():
    """A fine-tune of one part: the base's weights there undo it, and nowhere else do they change anything."""
    base, tuned = gl.HookedMamba2.tiny(dtype=torch.float64), gl.HookedMamba2.tiny(dtype=torch.float64)
    x, metric = example(base), gl.metrics.log_probability(3)
    with torch.no_grad():
        tuned.blocks[1].mixer.output_weights()[0].mul_(1.5)
    found = comparing.graft_sweep(tuned, base, x, metric, by_part=True, progress=False)
    assert found.axes == ("layer", "part") and found["part"] == ["mixer", "ln1"]
    with torch.no_grad():
        own, theirs = (metric(one(x)).mean().item() for one in (tuned, base))
    assert found.baseline == own and found.facts["all"] == theirs != own
    assert found.at(layer=1, part="mixer").values.item() == pytest.approx(theirs, abs=1e-12)
    assert (found.values - own).abs().flatten()[[0, 1, 3]].max() == 0
    assert found.top(1)[0]["layer"] == 1
    by_layer = comparing.graft_sweep(tuned, base, x, metric, progress=False)
    assert by_layer.axes == ("layer",) and by_layer.values[1].item() == pytest.approx(theirs, abs=1e-12)


def test_mistakes_are_explained():
    model, other = gl.HookedMamba.tiny(), gl.HookedMamba.tiny(seed=1)
    deep, griffin = gl.HookedMamba.tiny(n_layer=3), gl.HookedGriffin.tiny()
    for make, message in (
        (lambda: comparing.graft(deep), "are not built alike"),
        (lambda: comparing.graft(griffin), "are not built alike"),
        (lambda: comparing.graft(other, layers=7), "layers=7 does not exist"),
        (lambda: comparing.graft(other, parts="mixr"), "parts='mixr' is no part.*Did you mean 'mixer'"),
        (lambda: comparing.graft(other, parts=[]), "names no part"),
        (lambda: comparing.graft(other, parts=["embed", "mixer"]), "embed is no part of a layer"),
        (lambda: comparing.graft(other, layers=0, parts="embed"), "belongs to no layer"),
    ):
        with pytest.raises(gl.InputError, match=message), make().on(model):
            pass
    assert repr(comparing.graft(other, layers=0)) == "Graft(tiny-mamba, layers 0, parts all, share 1.0)"

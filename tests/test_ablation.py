"""Ablations: what stands where instead, on every architecture; composition, undoing, mistakes."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens import ablation
from tests.helpers import example

NAME = "blocks.0.hook_mixer_out"


def fired(model, intervention, name=NAME, **options):
    """What a point holds under an intervention."""
    with torch.no_grad(), intervention.on(model):
        return model.run_with_cache(example(model), names_filter=name, **options)[1][name]


def same(a, b):
    """Equal to rounding: what is listened to decides how the scan is computed."""
    return torch.allclose(a, b, rtol=1e-12, atol=1e-13)


@pytest.fixture
def clean(model):
    with torch.no_grad():
        return model.run_with_cache(example(model), names_filter=lambda name: True)[1]


def test_values_at_entries_by_axis(model, clean):
    x = clean[NAME]
    want = x.clone()
    want[:, 2, 3:7] = 0
    assert same(fired(model, ablation.zero(NAME, pos=2, d_model=slice(3, 7))), want)
    want = x.clone()
    want[:, [0, -1]] *= 3
    assert same(fired(model, ablation.scale(NAME, 3, pos=[0, -1])), want)
    want = x.clone()
    want[1] = 0.5
    assert same(fired(model, ablation.constant(NAME, 0.5, batch=1)), want)


def test_values_from_other_runs_and_rows(model, clean):
    x = clean[NAME]
    with torch.no_grad():
        _, other = model.run_with_cache(example(model, 2, seed=5), names_filter=NAME)
    assert same(fired(model, ablation.freeze(NAME, other)), other[NAME])
    assert same(fired(model, ablation.resample(NAME)), x.flip(0))
    assert torch.allclose(fired(model, ablation.mean(NAME, other)), other[NAME].mean(0).expand_as(x))
    everywhere = ablation.mean(NAME, other, over=("batch", "pos"))
    assert torch.allclose(fired(model, everywhere), other[NAME].mean((0, 1)).expand_as(x))
    drawn = fired(model, ablation.resample(NAME, other, seed=1))
    assert all(any(same(row, given) for given in other[NAME]) for row in drawn)


def test_noise_has_its_size_and_its_seed(model, clean):
    a, b, c = (fired(model, ablation.noise(NAME, 0.1, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert 0.07 < (a - clean[NAME]).std() < 0.13


def test_they_compose_in_order_and_are_undone(model, clean):
    both = ablation.constant(NAME, 2.0) + ablation.scale(NAME, 5, pos=0)
    x = fired(model, both)
    assert (x[:, 0] == 10).all() and (x[:, 1:] == 2).all()
    with torch.no_grad():
        assert same(model.run_with_cache(example(model), names_filter=NAME)[1][NAME], clean[NAME])
    with pytest.raises(RuntimeError), both.on(model):
        raise RuntimeError
    assert not model.list_hooks()
    with torch.no_grad():
        out = model.run_with_hooks(example(model), fwd_hooks=both.hooks(model))
    assert not torch.allclose(out, clean["hook_logits"])


def test_components(model, clean):
    kinds = {model.blocks[layer].mixer.place: layer for layer in range(model.cfg.n_layers)}
    assert "mixer" in kinds
    gates = [name for name in clean if name.endswith(".hook_gate") and ".mixer." in name]
    with torch.no_grad(), ablation.open_gate().on(model):
        _, cache = model.run_with_cache(example(model), names_filter=lambda name: True)
    assert all((cache[name] == 1).all() for name in gates)
    with torch.no_grad(), ablation.no_scan().on(model):
        _, cache = model.run_with_cache(example(model), names_filter=lambda name: True)
    assert all((cache[name] == 0).all() for name in cache if name.endswith("hook_scan"))
    with torch.no_grad(), ablation.remove_layer(1).on(model):
        _, cache = model.run_with_cache(example(model))
    assert torch.equal(cache["resid_post", 1], cache["resid_pre", 1])
    if any(name.endswith("hook_conv_taps") for name in model.names):
        with torch.no_grad(), ablation.only_tap(-1).on(model):
            _, cache = model.run_with_cache(example(model), names_filter=lambda name: True)
        taps = [name for name in cache if name.endswith("hook_conv_taps")]
        assert taps and all(cache[name][..., :-1].abs().max() == 0 and cache[name].abs().max() > 0 for name in taps)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ablation.zero(NAME, head=0), gl.PointError, "has no axis 'head'; its axes are: batch pos d_model"),
        (lambda: ablation.zero(NAME, d_model=9999), gl.InputError, "d_model=9999 is out of range"),
        (lambda: ablation.zero(NAME, pos=500), gl.InputError, "pos=500 is out of range"),
        (lambda: ablation.zero("blocks.0.hook_mixer_ot"), gl.PointError, "Did you mean 'blocks.0.hook_mixer_out'"),
        (lambda: ablation.freeze(NAME, {}), gl.PointError, "The source holds no blocks.0.hook_mixer_out"),
        (lambda: ablation.freeze(NAME, {NAME: torch.zeros(3, 3)}), gl.InputError, r"has shape \[3, 3\]"),
        (lambda: ablation.resample(NAME), gl.InputError, "at least two"),
    ],
)
def test_mistakes_are_explained_and_leave_nothing_behind(model, make, error, message):
    with pytest.raises(error, match=message), make().on(model):
        model(example(model, 1))
    assert not model.list_hooks()


def test_gradients_flow_around_what_is_ablated(lm):
    resid = lm(example(lm), stop_at_layer=0).detach().requires_grad_()
    with ablation.zero("blocks.*.hook_m*_out").on(lm):  # nothing mixes tokens, RWKV's channel mix neither
        (grad,) = torch.autograd.grad(lm(resid, start_at_layer=0)[:, -1].sum(), resid)
    assert grad[:, :-1].abs().max() == 0 and grad[:, -1].abs().max() > 0

"""The HookPoint: backward hooks beside forward edits, copies, Part."""

from __future__ import annotations

import io
import pickle

import pytest
import torch

import gatedlens as gl
from gatedlens.hooks.mamba import HookedMamba
from tests.helpers import earlier, example, in_parts, relative


def gradient(model, input, name, forward=None, backward=None):
    """d output / d (residual stream before block 1) with hooks at one point."""
    resid = model(input, stop_at_layer=1).detach().requires_grad_()
    fwd = [(name, forward)] if forward else []
    bwd = [(name, backward)] if backward else []
    beside = earlier(model, input)
    with model.hooks(fwd, bwd):
        out = model(resid, start_at_layer=1, **beside)
        (grad,) = torch.autograd.grad(out.pow(2).sum(), resid)
    return grad


def later_points(model):
    """Those of block 1 that a gradient reaches: a start state of zeros has none."""
    return [name for name in model.names if name.startswith("blocks.1.") and not name.endswith("state_start")]


@pytest.mark.parametrize(
    "edit", [None, lambda x, hook: x * 2, lambda x, hook: x.mul_(2)], ids=["no edit", "returned", "in place"]
)
def test_a_backward_hook_that_only_looks_changes_nothing_beside_any_forward_edit(model, edit):
    input, called = example(model), 0
    for name in later_points(model):
        seen = []
        want = gradient(model, input, name, edit)
        for look in (lambda g, hook, seen=seen: seen.append(g.shape), lambda g, hook: g):
            assert relative(gradient(model, input, name, edit, look), want) < 1e-12, name
        assert len(seen) <= 1, name
        called += len(seen)
    assert called > 2 / 3 * len(later_points(model)), "(a constant decay or a document's start has no gradient)"


@in_parts
def test_gradient_edits_returned_and_in_place_are_the_same(model, part):
    input = example(model)

    def double(g, hook):
        g.mul_(2)

    for name in later_points(model)[part]:
        returned = gradient(model, input, name, None, lambda g, hook: g * 2)
        in_place = gradient(model, input, name, None, double)
        halved = gradient(
            model, input, name, lambda x, hook: torch.where(x.isinf(), x, x.detach() + 2 * (x - x.detach()))
        )
        assert torch.equal(returned, in_place), name
        assert relative(returned, halved) < 1e-12, name


def test_backward_caching_hooks_and_in_place_edits_live_together(lm):
    tokens = example(lm)
    store = lm.add_caching_hooks("blocks.0.hook_mixer_out", incl_bwd=True)
    lm.add_hook("blocks.0.hook_mixer_out", lambda x, hook: x.mul_(0.5))
    resid = lm(tokens, stop_at_layer=0).detach().requires_grad_()
    torch.autograd.grad(lm(resid, start_at_layer=0).sum(), resid)
    lm.reset_hooks()
    assert set(store) == {"blocks.0.hook_mixer_out", "blocks.0.hook_mixer_out_grad"}


def test_models_and_caches_can_be_pickled(model):
    logits, cache = model.run_with_cache(example(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False).run_with_cache(example(model))[0], logits)
    again = pickle.loads(pickle.dumps(cache))
    assert torch.equal(again["mixer_out", 1], cache["mixer_out", 1])


def test_a_hook_that_did_not_fire_backward_is_named(model):
    with pytest.raises(gl.PointError, match="never ran"):
        model.run_with_hooks(
            example(model), bwd_hooks=[("blocks.1.hook_resid_post", lambda g, hook: None)], stop_at_layer=1
        )


@pytest.mark.parametrize(
    "hooks", [{"a": 1}, ("blocks.0.hook_resid_pre", print), [("blocks.0.hook_resid_pre", 3)]], ids=str
)
def test_malformed_hooks_are_explained(model, hooks):
    with pytest.raises(gl.InputError, match="hook"):
        model.run_with_hooks(example(model), fwd_hooks=hooks)
    assert not model.list_hooks()


def test_wrapping_keeps_every_mode():
    wrapped = HookedMamba.tiny().wrapped.train()
    wrapped.backbone.norm_f.eval()
    model = gl.wrap(wrapped)
    assert model.training and wrapped.training and not wrapped.backbone.norm_f.training
    model.eval()
    assert not wrapped.training

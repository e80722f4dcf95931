"""nnsight 0.8 on our models as they are: read, set, skip, gradients, iterate; lazy points are built only when wanted."""

from __future__ import annotations

import pytest
import torch

nnsight = pytest.importorskip("nnsight", reason="the nnsight extra is not installed")

from tests.helpers import earlier, example, relative  # noqa: E402


@pytest.fixture
def wrapped(hooked):
    """A model of its own: nnsight instruments modules for good."""
    model = hooked.tiny(seed=0, dtype=torch.float64)
    return model, nnsight.NNsight(model)


def lazy_visits(model):
    return {name: model.hook_dict[name].visits for name, point in model.names.points.items() if point.lazy}


def get(envoy, name):
    for part in name.split("."):
        envoy = envoy[int(part)] if part.isdigit() else getattr(envoy, part)
    return envoy


@torch.no_grad()
def test_every_point_is_readable_and_equals_the_cache(wrapped):
    model, traced = wrapped
    input = example(model)
    _, cache = model.run_with_cache(input, names_filter=lambda name: True)
    for name in model.names:
        with traced.trace(input):
            value = get(traced, name).output.save()
        assert relative(value, cache[name]) < 1e-12, name


@torch.no_grad()
def test_a_trace_builds_only_the_lazy_points_it_reads(wrapped):
    model, traced = wrapped
    input = example(model)
    lazy = list(lazy_visits(model))
    with traced.trace(input):
        get(traced, "blocks.0.hook_mixer_out").output.save()
    assert set(lazy_visits(model).values()) == {0}
    for name in lazy:
        before = lazy_visits(model)
        with traced.trace(input):
            get(traced, name).output.save()
        assert lazy_visits(model) == before | {name: before[name] + 1}
    before = lazy_visits(model)
    model(input)
    assert lazy_visits(model) == before, "outside a trace an instrumented model is as lazy as before"


@torch.no_grad()
def test_setting_a_point_acts_as_a_hook_does(wrapped):
    model, traced = wrapped
    input = example(model)
    names = [n for n in model.names if n.startswith("blocks.0.")]
    for name in names:
        want = model.run_with_hooks(input, fwd_hooks=[(name, lambda x, hook: x * 0.5)])
        with traced.trace(input):
            get(traced, name).output = get(traced, name).output * 0.5
            out = traced.output.save()
        assert relative(out, want) < 1e-12, name


@torch.no_grad()
def test_in_place_setting(wrapped):
    model, traced = wrapped
    input, name = example(model), "blocks.1.hook_mixer_out"
    want = model.run_with_hooks(input, fwd_hooks=[(name, lambda x, hook: x.zero_())])
    with traced.trace(input):
        get(traced, name).output[:] = 0
        out = traced.output.save()
    assert relative(out, want) < 1e-12


def test_gradients_inside_a_trace(wrapped):
    model, traced = wrapped
    input, name = example(model), "blocks.1.hook_resid_pre"
    resid = model(input, stop_at_layer=1).detach().requires_grad_()
    beside = earlier(model, input)
    (want,) = torch.autograd.grad(model(resid, start_at_layer=1, **beside).pow(2).sum(), resid)
    with traced.trace(input):
        value = get(traced, name).output
        out = traced.output
        with out.pow(2).sum().backward():
            grad = value.grad.save()
    assert relative(grad, want) < 1e-10
    for p in model.parameters():
        p.grad = None


@torch.no_grad()
def test_iterating_over_calls_stays_in_step(lm):
    """`tracer.iter` counts a lazy point's visits although the unwanted ones build nothing."""
    model = type(lm).tiny(seed=0, dtype=torch.float64)
    lazy = [n for n in model.names if model.names.points[n].lazy and n.startswith("blocks.0.")][-1]
    tokens = example(model, 1, 5)
    states = []
    with model.hooks([(lazy, lambda x, hook: states.append(x.clone()))]):
        model.generate(tokens, max_new_tokens=4, do_sample=False, verbose=False)
    traced = nnsight.NNsight(model)
    before = lazy_visits(model)[lazy]
    with traced.trace(tokens):
        get(traced, "hook_logits").output.save()
    assert lazy_visits(model)[lazy] == before
    with traced.trace(tokens, fn="generate", max_new_tokens=4, do_sample=False, verbose=False) as tracer:
        kept = nnsight.save([])
        with tracer.iter[2:3]:
            kept.append(get(traced, lazy).output)
    assert len(kept) == 1 and relative(kept[0], states[2]) < 1e-12
    assert lazy_visits(model)[lazy] == before + 1

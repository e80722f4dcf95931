"""model.nnsight(): inputs of every kind, several invokes, points by name, caches by name, skips, gradients, generation."""

from __future__ import annotations

import sys

import pytest
import torch

import gatedlens as gl
from tests.helpers import earlier, example, relative

nnsight = pytest.importorskip("nnsight", reason="the nnsight extra is not installed")


@pytest.fixture
def traced(hooked):
    """A model of its own: nnsight instruments modules for good."""
    return hooked.tiny(seed=0, dtype=torch.float64).nnsight()


def visits(model):
    return {name: model.hook_dict[name].visits for name in model.names}


@torch.no_grad()
def test_every_point_is_cached_under_its_name(traced):
    model = traced._module
    input = example(model)
    _, want = model.run_with_cache(input, names_filter=lambda name: True)
    before = visits(model)
    with traced.trace(input) as tracer:
        cache = tracer.activations(lambda name: True)
    assert list(cache[0].cache_dict) == list(model.names)
    assert all(relative(cache[name], want[name]) < 1e-12 for name in model.names)
    assert visits(model) == {name: n + 1 for name, n in before.items()}, "each point was built once"
    attention, by_hooks = (gl.implicit_attention(c, layer=1) for c in (cache[0], want))
    assert attention.check().relative < 1e-10 and relative(attention.mean(), by_hooks.mean()) < 1e-12


@torch.no_grad()
def test_the_default_cache_leaves_lazy_points_out(traced):
    model = traced._module
    lazy = {name for name, point in model.names.points.items() if point.lazy}
    before = visits(model)
    with traced.trace(example(model)) as tracer:
        cache = tracer.activations()
    assert set(cache[0].cache_dict) == set(model.names) - lazy
    assert all(visits(model)[name] == before[name] for name in lazy)
    with pytest.raises(gl.PointError, match="is lazy"):
        cache[next(iter(lazy))]


@torch.no_grad()
def test_points_are_found_by_every_name(traced):
    model = traced._module
    input = example(model)
    _, want = model.run_with_cache(input, names_filter=lambda name: True)
    for name, target in list(model.names.aliases.items())[::3]:
        with traced.trace(input):
            value = traced.hook(name).output.save()
        assert relative(value, want[target]) < 1e-12, name
    with pytest.raises(gl.PointError, match="Did you mean 'blocks.0.hook_mixer_out'"):
        traced.hook("blocks.0.hook_mixer_outt")


@torch.no_grad()
def test_every_point_can_be_skipped(traced):
    """`.skip(value)` stands in for the activation, as a hook that returns it does."""
    model = traced._module
    input = example(model)
    _, cache = model.run_with_cache(input, names_filter=lambda name: True)
    for name in model.names:
        if name.startswith("blocks.1."):
            continue
        value = cache[name] * 0.5
        want = model.run_with_hooks(input, fwd_hooks=[(name, lambda x, hook, value=value: value)])
        with traced.trace(input):
            traced.hook(name).skip(value)
            out = traced.output.save()
        assert relative(out, want) < 1e-12, name


@torch.no_grad()
def test_a_block_can_be_skipped(traced):
    model = traced._module
    input, layer = example(model), skippable(model)
    outs = written(model, layer)
    want = model.run_with_hooks(input, fwd_hooks=[(name, zero) for name in outs])
    with traced.trace(input):
        traced.blocks[layer].skip(traced.blocks[layer].input)
        out = traced.output.save()
    assert relative(out, want) < 1e-12


def skippable(model):
    """A block that nothing else reads beside the stream."""
    return 1 if model.hands_on else 0


def zero(x, hook):
    return torch.zeros_like(x)


def written(model, layer):
    """What a block adds to the stream."""
    return [f"blocks.{layer}.hook_{name}_out" for group in model.names.branches(layer) for name in group]


def test_gradients_at_every_point(traced):
    model = traced._module
    input = example(model, 1)
    weight = torch.randn(model(input).shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for name in model.names:
        if not name.startswith("blocks.1.mixer.") and name not in ("hook_embed", "blocks.0.hook_mixer_out"):
            continue
        found = {}

        def keep(x, hook, found=found):
            x = found["x"] = x if x.requires_grad else x.detach().requires_grad_()
            return x.clone()

        out = model.run_with_hooks(input, fwd_hooks=[(name, keep)])
        (want,) = torch.autograd.grad((out * weight).sum(), found["x"], allow_unused=True)
        if want is None or want.abs().max() == 0 or not traced_requires_grad(model, name, input):
            continue
        with traced.trace(input):
            value = traced.hook(name).output
            loss = (traced.output * weight).sum()
            with loss.backward():
                grad = value.grad.save()
        assert relative(grad, want) < 1e-10, name
    model.zero_grad()


def traced_requires_grad(model, name, input):
    """Whether the activation hangs on a parameter: an initial state does not."""
    seen = []
    model.run_with_hooks(input, fwd_hooks=[(name, lambda x, hook: seen.append(x.requires_grad))])
    return seen[0]


@torch.no_grad()
def test_invokes_share_one_forward_and_see_their_own_rows(traced):
    """Three invokes, the second of two rows and edited: each is what it is alone."""
    model = traced._module
    inputs = [example(model, rows, 6, seed=seed) for seed, rows in enumerate((1, 2, 1))]
    name = "blocks.0.hook_mixer_out"
    alone = [model.run_with_cache(input, names_filter=lambda name: True) for input in inputs]
    edited = model.run_with_hooks(inputs[1], fwd_hooks=[(name, lambda x, hook: x * 0.5)])
    before = visits(model)["blocks.1.hook_resid_pre"]
    with traced.trace() as tracer:
        with tracer.invoke(inputs[0]):
            first = tracer.activations("blocks.1.mixer.*")
            out0 = traced.output.save()
        with tracer.invoke(inputs[1]):
            traced.hook(name).output = traced.hook(name).output * 0.5
            out1 = traced.output.save()
        with tracer.invoke(inputs[2]):
            out2 = traced.output.save()
    assert visits(model)["blocks.1.hook_resid_pre"] == before + 1
    assert relative(out0, alone[0][0]) < 1e-12 and relative(out2, alone[2][0]) < 1e-12
    assert relative(out1, edited) < 1e-12
    for key in first[0]:
        assert relative(first[key], alone[0][1][key]) < 1e-12, key
    if first[0].tokens is not None and isinstance(model, gl.HookedLanguageModel):
        assert torch.equal(first[0].tokens, inputs[0])


def test_gradients_of_one_invoke_among_several(traced):
    model = traced._module
    inputs = [example(model, 1, 6, seed=seed) for seed in (0, 1)]
    name = "blocks.1.hook_resid_pre"
    resid = model(inputs[1], stop_at_layer=1).detach().requires_grad_()
    beside = earlier(model, inputs[1])
    (want,) = torch.autograd.grad(model(resid, start_at_layer=1, **beside).pow(2).sum(), resid)
    with traced.trace() as tracer:
        with tracer.invoke(inputs[0]):
            traced.output.save()
        with tracer.invoke(inputs[1]):
            value = traced.hook(name).output
            loss = traced.output.pow(2).sum()
            with loss.backward():
                grad = value.grad.save()
    assert relative(grad, want) < 1e-10
    model.zero_grad()


@torch.no_grad()
def test_a_trace_may_start_at_a_layer(traced):
    model = traced._module
    resid, beside = model(example(model), stop_at_layer=1), earlier(model, example(model))
    with traced.trace(resid, start_at_layer=1, **beside) as tracer:
        cache = tracer.activations("blocks.1.hook_resid_pre")
        out = traced.output.save()
    assert relative(out, model(resid, start_at_layer=1, **beside)) < 1e-12 and torch.equal(cache["resid_pre", 1], resid)
    assert cache[0].tokens is None
    with pytest.raises(gl.InputError, match=r"visits\[-2\]: the model ran 1 times"):
        cache[-2]


@torch.no_grad()
def test_shorter_invokes_are_padded_on_the_left_and_exact(lm):
    model = type(lm).tiny(seed=0, dtype=torch.float64)
    traced = model.nnsight()
    short, long = example(model, 1, 4, seed=1), example(model, 2, 7, seed=2)
    with traced.trace() as tracer:
        with tracer.invoke(short):
            cache = tracer.activations("blocks.1.*")
            a = traced.output.save()
        with tracer.invoke(long):
            b = traced.output.save()
    assert relative(a[:, 3:], model(short)) < 1e-12 and relative(b, model(long)) < 1e-12
    assert cache[0].mask.tolist() == [[False] * 3 + [True] * 4]
    assert gl.implicit_attention(cache[0], layer=1).check().relative < 1e-10


@torch.no_grad()
def test_generation_runs_step_by_step(lm):
    """`tracer.iter` and the cache's visits are the hooks of a plain generation, step by step."""
    model = type(lm).tiny(seed=0, dtype=torch.float64)
    tokens, name = example(model, 1, 5), "blocks.1.hook_resid_post"
    steps = []
    with model.hooks([(name, lambda x, hook: steps.append(x.clone()))]):
        want = model.generate(tokens, max_new_tokens=4, do_sample=False, verbose=False)
    traced = model.nnsight()
    with traced.generate(tokens, max_new_tokens=4, do_sample=False, verbose=False) as tracer:
        cache = tracer.activations(name)
        kept = nnsight.save([])
        for _ in tracer.iter[:4]:
            kept.append(traced.hook(name).output)
        ids = tracer.result.save()
    assert torch.equal(ids, want) and len(steps) == len(cache) == len(kept) == 4
    for got, visit, step in zip(kept, cache, steps, strict=True):
        assert relative(got, step) < 1e-12 and relative(visit[name], step) < 1e-12
    assert torch.equal(traced.generate(tokens, max_new_tokens=4, do_sample=False, verbose=False), want)
    with pytest.raises(gl.InputError, match=r"ran 4 times in this trace: say which, as in visits\[0\]"):
        cache[name]
    with pytest.raises(gl.InputError, match="ran 4 times"):
        cache[4]
    with pytest.raises(gl.InputError, match="keeps only some positions"):
        gl.implicit_attention(cache[2], layer=1)


@torch.no_grad()
def test_an_edit_while_generating_is_the_hooks_edit(lm):
    model = type(lm).tiny(seed=0, dtype=torch.float64)
    tokens, name = example(model, 1, 5), "blocks.0.hook_mixer_out"
    with model.hooks([(name, lambda x, hook: x * -3)]):
        want = model.generate(tokens, max_new_tokens=4, do_sample=False, verbose=False)
    traced = model.nnsight()
    with traced.generate(tokens, max_new_tokens=4, do_sample=False, verbose=False) as tracer:
        for _ in tracer.iter[:4]:
            traced.hook(name).output[:] *= -3
        ids = tracer.result.save()
    assert torch.equal(ids, want)


@torch.no_grad()
def test_outside_a_trace_an_instrumented_model_is_as_before(traced):
    """No copies, no counts; hooks and caches work, and a point whose nnsight is unknown to us serves whoever may listen."""
    model = traced._module
    input, point = example(model), model.hook_dict["blocks.1.hook_mixer_out"]
    before, x = visits(model), torch.ones(2, 3)
    model(input)
    assert visits(model) == before and point(x) is x
    want, truth = type(model).tiny(seed=0, dtype=torch.float64).run_with_cache(input)
    out, cache = model.run_with_cache(input)
    assert torch.equal(out, want) and all(torch.equal(cache[name], truth[name]) for name in truth)
    lazy = next(model.hook_dict[name] for name, point in model.names.points.items() if point.lazy)
    state = lazy.__dict__["__nnsight__"]
    lazy.__dict__["__nnsight__"] = object()
    try:
        assert lazy.heard() and lazy._traced()
    finally:
        lazy.__dict__["__nnsight__"] = state


@torch.no_grad()
def test_text_in_every_form(moby_model):
    model = gl.from_pretrained("gatedlens/mamba-moby", device="cpu")
    traced = model.nnsight()
    texts = ["Call me Ishmael", "Whale"]
    for input in ("Call me Ishmael", texts, moby_model.to_tokens(texts[0]), moby_model.to_tokens(texts[0]).tolist()):
        with traced.trace(input) as tracer:
            cache = tracer.activations("blocks.2.*")
            out = traced.output.save()
        logits, want = moby_model.run_with_cache(input, names_filter="blocks.2.*")
        assert torch.allclose(out, logits, atol=1e-5) and torch.equal(cache[0].tokens, want.tokens)
        assert (cache[0].mask is None) == (want.mask is None)
    with traced.trace() as tracer:
        with tracer.invoke(texts[0]):
            first = traced.output[:, -1].save()
        with tracer.invoke(texts[1:]):
            second = traced.output[:, -1].save()
    for got, text in ((first, texts[0]), (second, texts[1])):
        assert torch.allclose(got, moby_model(text)[:, -1], atol=1e-4)
    with traced.generate("Call me", max_new_tokens=5, do_sample=False, verbose=False) as tracer:
        text = tracer.result.save()
    assert text == moby_model.generate("Call me", max_new_tokens=5, do_sample=False, verbose=False)


def test_what_cannot_be_traced_says_so(traced):
    model = traced._module
    input = example(model)
    with pytest.raises(gl.InputError, match="options of the whole run go to trace"), traced.trace() as tracer:
        with tracer.invoke(input, return_type="logits"):
            a = traced.output.save()
        with tracer.invoke(input):
            a = traced.output.save()  # noqa: F841
    mamba = gl.HookedMamba.tiny().nnsight()
    with pytest.raises(gl.PointError, match=r"computed from blocks.0.mixer.hook_state"):
        mamba.hook("blocks.0.hook_h.3")


def test_images_of_two_sizes_do_not_join():
    from gatedlens.compat.nnsight import join
    from gatedlens.model.batch import Batch

    with pytest.raises(gl.InputError, match=r"\[1, 3, 8, 8\], \[1, 3, 9, 9\]: only tokens can be padded"):
        join([Batch(torch.zeros(1, 3, 8, 8)), Batch(torch.zeros(1, 3, 9, 9))])


def test_without_nnsight_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "nnsight", None)
    monkeypatch.delitem(sys.modules, "gatedlens.compat.nnsight", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'gatedlens\[nnsight\]'"):
        gl.HookedMamba.tiny().nnsight()


@torch.no_grad()
def test_a_list_of_texts_is_padded_on_the_left():
    model = gl.from_pretrained("gatedlens/mamba-moby", device="cpu")
    texts = ["Call me", "Call me Ishmael. Some years ago"]
    want = [model(text)[0, -1] for text in texts]
    traced = model.nnsight()
    with traced.trace(texts):
        out = traced.output.save()
    assert all(relative(out[i, -1], want[i]) < 1e-5 for i in range(2))
    with traced.trace() as tracer:
        with tracer.invoke(texts[0]):
            first = traced.output.save()
        with tracer.invoke(texts[1]):
            second = traced.output.save()
    assert relative(first[0, -1], want[0]) < 1e-5 and relative(second[0, -1], want[1]) < 1e-5


@torch.no_grad()
def test_a_block_skipped_in_every_step_of_a_generation_needs_no_memory(lm):
    model = type(lm).tiny(seed=0, dtype=torch.float64)
    input, layer = example(model, 1), skippable(model)
    outs = written(model, layer)
    with model.hooks([(name, zero) for name in outs]):
        want = model.generate(input, max_new_tokens=3, do_sample=False, verbose=False)
    traced = model.nnsight()
    with traced.generate(input, max_new_tokens=3, do_sample=False, verbose=False) as tracer:
        found = nnsight.save([])
        with tracer.iter[0:3]:
            traced.blocks[layer].skip(traced.blocks[layer].input)
            found.append(traced.hook_logits.output[:, -1].argmax(-1))
    assert torch.equal(torch.stack(found, 1), want[:, -3:])
    with (
        pytest.raises(
            gl.InputError, match=rf"holds no blocks\.{layer}\.\w+: block {layer}, or that part of it, did not run"
        ),
        traced.generate(input, max_new_tokens=3, do_sample=False, verbose=False),
    ):
        traced.blocks[layer].skip(traced.blocks[layer].input)

"""captum on our models as they are: layer and neuron attribution at any point, lazy ones too, against gradients by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers import example, relative

captum = pytest.importorskip("captum", reason="captum is not installed")
from captum.attr import (  # noqa: E402
    LayerActivation,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    NeuronGradient,
)


def score(model):
    """One number a row: what captum differentiates."""
    return lambda input, *rest: model(input, *rest).flatten(1)[:, -7:].pow(2).sum(1)


def gradient(model, name, input):
    """(activation, its gradient) at a point, by a hook."""
    found = {}

    def keep(x, hook):
        found["x"] = x = x if x.requires_grad else x.detach().requires_grad_()
        return x.clone()

    total = score(lambda i: model.run_with_hooks(i, fwd_hooks=[(name, keep)]))(input).sum()
    (grad,) = torch.autograd.grad(total, found["x"], allow_unused=True)
    return found["x"], torch.zeros_like(found["x"]) if grad is None else grad


def names(model):
    return [name for name in model.names if name.startswith("blocks.1.") or "." not in name]


def test_layer_activation_is_the_cache(model):
    input = example(model)
    with torch.no_grad():
        _, cache = model.run_with_cache(input, names_filter=lambda name: True)
    for name in names(model):
        got = LayerActivation(score(model), model.hook_dict[name]).attribute(input)
        assert relative(got, cache[name]) < 1e-12, name


def test_gradient_times_activation(model):
    input = example(model)
    for name in [name for name in names(model) if not model.names.points[name].chooses][::3]:
        x, grad = gradient(model, name, input)
        got = LayerGradientXActivation(score(model), model.hook_dict[name]).attribute(input)
        got, want = (
            torch.where(x.isinf(), 0, product) for product in (got, x * grad)
        )  # scores of keys that are not seen
        assert (got - want).abs().max() <= 1e-10 * want.abs().max(), name


def test_integrated_gradients(model):
    """(x - x0) * sum over Gauss-Legendre nodes a of w grad(x0 + a (x - x0)), x0 the activation of a baseline."""
    input, baseline, steps = example(model, 1, 4, seed=0), example(model, 1, 4, seed=1), 6
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(steps))
    weights = weights.float().double()  # as captum keeps them
    decays = [name for name in model.names if name.endswith("hook_decay")]
    lazy = next((name for name in decays if name.startswith("blocks.1.")), decays[0])
    for name in ("blocks.1.hook_resid_pre", lazy):
        with torch.no_grad():
            x, x0 = (model.run_with_cache(i, names_filter=name)[1][name] for i in (input, baseline))
        total = torch.zeros_like(x)
        for node, weight in zip(nodes, weights, strict=True):
            at = (x0 + (node + 1) / 2 * (x - x0)).requires_grad_()
            out = score(lambda i, at=at: model.run_with_hooks(i, fwd_hooks=[(name, lambda v, hook: at.clone())]))(input)  # noqa: B023
            total += weight / 2 * torch.autograd.grad(out.sum(), at)[0]
        layer = LayerIntegratedGradients(score(model), model.hook_dict[name])
        got = layer.attribute(input, baselines=baseline, n_steps=steps)
        assert relative(got, (x - x0) * total) < 1e-10, name
    # Behind a block that hands on something beside the stream, the stream is no cut.
    first, fine = (0, 256) if model.hands_on else (1, 64)
    cut = LayerIntegratedGradients(score(model), model.hook_dict[f"blocks.{first}.hook_resid_pre"])
    whole = cut.attribute(input, baselines=baseline, n_steps=fine).sum()
    assert relative(whole, (score(model)(input) - score(model)(baseline))[0]) < 1e-3, "the residual stream is a cut"


def test_neuron_gradients(model):
    """How one channel at one place hangs on the residual stream."""
    with torch.no_grad():
        stream = model(example(model), stop_at_layer=0)
    ends = [name for name in model.names if name.endswith(("hook_gated", "hook_state"))]
    later = [name for name in ends if name.startswith("blocks.1.")]
    ends = later if any(name.endswith("hook_state") for name in later) else ends
    assert len(ends) >= 2
    for name in ends:
        where = (3,) + (1,) * (len(model.names[name].dims) - 2)
        forward = lambda resid: model(resid, start_at_layer=0)  # noqa: E731
        got = NeuronGradient(forward, model.hook_dict[name]).attribute(stream, where)
        resid, found = stream.clone().requires_grad_(), {}
        model.run_with_hooks(resid, start_at_layer=0, fwd_hooks=[(name, lambda x, hook: found.update(x=x.clone()))])  # noqa: B023
        (want,) = torch.autograd.grad(found["x"][(slice(None), *where)].sum(), resid)
        assert relative(got, want) < 1e-10, name


def test_whole_blocks_and_mixers_are_layers_too(model):
    input = example(model)
    with torch.no_grad():
        _, cache = model.run_with_cache(input)
    block, mixer = model.blocks[1], model.blocks[1].mixer
    whole = cache["mixer_out", 1]
    if block.behind(mixer.place) is not None:  # a norm, or what writes it into copies of the stream
        whole = torch.nn.functional.linear(cache[mixer.output_name].flatten(2), *mixer.output_weights())
    for module, want in ((block, cache["resid_post", 1]), (mixer, whole)):
        assert relative(LayerActivation(score(model), module).attribute(input), want) < 1e-12

"""Gradient methods against their definitions: pixels and embeddings, completeness, noise; captum is an extra."""

from __future__ import annotations

import sys

import numpy
import pytest
import torch

import gatedlens as gl
from gatedlens import attribution
from gatedlens.hooks.vim import HookedViM
from tests.helpers import example, padded


def chosen(model, logits, target):
    return logits.reshape(len(logits), -1, model.cfg.d_vocab)[:, -1, target]


def by_position(model, x, gradient):
    """x . gradient by token; of an image by patch."""
    if model.grid is None:
        return (x * gradient).sum(-1)
    product, size = (x * gradient).sum(1), model.cfg.patch_size
    return product.unfold(1, size[0], size[0]).unfold(2, size[1], size[1]).sum((-2, -1))


def entering(model, input):
    """(what enters, number -> logits): pixels, or embedded tokens."""
    if model.grid is not None:
        return input, model
    return model(input, stop_at_layer=0), lambda x: model(x, start_at_layer=0)


def test_grad_x_input_is_the_first_order_share(model):
    input = example(model)
    x, run = entering(model, input)
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(chosen(model, run(x), 3).sum(), x)
    found = attribution.grad_x_input(model, input, target=3)
    assert torch.allclose(found.scores, by_position(model, x.detach(), gradient), atol=1e-12)


def test_integrated_gradients_are_the_integral_and_complete(model):
    input, steps = example(model), 16
    x, run = entering(model, input)
    x = x.detach()
    if model.grid is None:
        token = 7
        baseline = model(torch.tensor([[token]]), stop_at_layer=0).detach().expand_as(x)
    else:
        token = "mean"
        baseline = torch.zeros_like(x)
    total = torch.zeros_like(x)
    for node, weight in zip(*numpy.polynomial.legendre.leggauss(steps), strict=True):
        at = (baseline + (node + 1) / 2 * (x - baseline)).requires_grad_()
        (gradient,) = torch.autograd.grad(chosen(model, run(at), 3).sum(), at)
        total += weight / 2 * gradient
    found = attribution.integrated_gradients(model, input, target=3, baseline=token, n_steps=steps)
    want = by_position(model, x - baseline, total)
    assert torch.allclose(found.scores, want, atol=1e-6 * float(want.abs().max()))  # captum's weights are float32
    with torch.no_grad():
        gap = chosen(model, run(x), 3) - chosen(model, run(baseline), 3)
    fine = attribution.integrated_gradients(model, input, target=3, baseline=token, n_steps=128, batch_size=256)
    assert torch.allclose(fine.scores.flatten(1).sum(1), gap, atol=5e-3)
    errors = [max(map(abs, one.facts["error"])) for one in (found, fine)]
    assert errors[1] < 5e-3 and errors[1] < errors[0] / 50 and fine.facts["n_steps"] == 128


def test_patches_that_overlap_share_no_pixel_twice():
    """The scores sum to pixels . gradient whatever the stride."""
    model = HookedViM.tiny(patch_size=4, stride=2, dtype=torch.float64)
    x = example(model).requires_grad_()
    (gradient,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
    found = attribution.grad_x_input(model, x, target=1)
    assert found.shape == (2, 5, 5)
    assert torch.allclose(found.scores.sum((1, 2)), (x * gradient).sum((1, 2, 3)), atol=1e-12)


def test_smoothgrad(model):
    input = example(model)
    plain = attribution.grad_x_input(model, input, target=3).scores
    still = attribution.smoothgrad(model, input, target=3, noise=1e-9, n_samples=3)
    assert torch.allclose(still.scores, plain, atol=1e-5 * float(plain.abs().max()))
    one, again, other = (attribution.smoothgrad(model, input, target=3, noise=0.2, seed=s) for s in (0, 0, 1))
    assert torch.equal(one, again) and not torch.allclose(one, other)
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    attribution.smoothgrad(model, input, n_samples=2)
    assert torch.equal(torch.rand(1), before), "the generator of the user was touched"


def test_smoothgrad_is_the_mean_gradient_at_noisy_inputs(lm):
    """The same noise, drawn as captum draws it: sample by sample, in float32."""
    tokens = example(lm, 1)
    x, run = entering(lm, tokens)
    x = x.detach()
    std, total = float(0.3 * (x.max() - x.min())), torch.zeros_like(x)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        for _ in range(6):
            at = (x + torch.normal(0, torch.full(x.shape, std))).requires_grad_()
            total += torch.autograd.grad(chosen(lm, run(at), 3).sum(), at)[0] / 6
    found = attribution.smoothgrad(lm, tokens, target=3, n_samples=6, noise=0.3, seed=4, batch_size=1)
    assert torch.allclose(found.scores, (x * total).sum(-1), atol=1e-12)


def test_a_metric_of_your_own_and_padding(lm):
    """Rows that are run alone still get their own part of a metric that knows the whole batch."""
    tokens, mask = padded([example(lm, 1, n, seed=n)[0] for n in (6, 3)], "left")
    ids = torch.tensor([4, 9])

    def mine(logits):
        assert logits.shape == (2, 6, lm.cfg.d_vocab)
        return logits[torch.arange(2), -1, ids]

    for method in (attribution.smoothgrad, attribution.grad_x_input):
        found = method(lm, tokens, mine, attention_mask=mask)
        want = method(lm, tokens, ids, attention_mask=mask)
        assert torch.allclose(found.scores, want.scores, atol=1e-13) and found.target == "mine"


@pytest.mark.parametrize("name", ["grad_x_input", "integrated_gradients", "smoothgrad"])
def test_without_captum_the_extra_is_named(name, monkeypatch):
    model = gl.HookedMamba.tiny()
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(ImportError, match=r"gatedlens\[attribution\]"):
        attribution.method(name)(model, example(model))


def test_wrong_numbers_of_steps_are_explained(model):
    input = example(model)
    for choice in ({"n_steps": 0}, {"batch_size": 0}):
        with pytest.raises(gl.InputError, match="give at least 1"):
            attribution.integrated_gradients(model, input, **choice)
    with pytest.raises(gl.InputError, match="noise=0"):
        attribution.smoothgrad(model, input, noise=0)

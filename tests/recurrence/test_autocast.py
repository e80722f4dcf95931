"""Inside torch.autocast: what is derived from activations is what it is outside, and every entry runs."""

from __future__ import annotations

import copy

import pytest
import torch

import gatedlens as gl
from gatedlens.recurrence.autocast import exact, is_on
from gatedlens.recurrence.scanning import readout
from tests.helpers import example

VIEWS = {
    "mean": lambda A: A.mean(),
    "abs_mean": lambda A: A.abs_mean(),
    "dense": lambda A: A.dense(),
    "row": lambda A: A.row(-1),
    "column": lambda A: A.column(1),
    "@": lambda A: A @ torch.ones(A.shape),
    "T": lambda A: A.T @ torch.ones(A.shape),
    "bias": lambda A: A.bias,
    "output": lambda A: A.output(),
    "check": lambda A: torch.tensor(A.check()),
    "norms": lambda A: A.contributions().norms(),
    "along": lambda A: A.contributions().along(torch.ones(A.contributions().writing.width)),
    "written": lambda A: A.contributions().output(),
    "remainder": lambda A: A.contributions().remainder(),
}


@pytest.fixture
def single(model):
    """The model in float32, which autocast takes down to half."""
    return copy.deepcopy(model).to(torch.float32)


def given(single):
    """Tokens, or images in float32."""
    x = example(single)
    return x.float() if x.is_floating_point() else x


def inside(dtype, function):
    with torch.autocast("cpu", dtype=dtype):
        return function()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_what_is_derived_from_a_cache_is_the_same_inside(single, dtype):
    cache = single.run_with_cache(given(single))[1]
    for layer in range(single.cfg.n_layers):
        for name, view in VIEWS.items():
            wanted = view(gl.implicit_attention(cache, layer=layer))
            with torch.autocast("cpu", dtype=dtype):
                got = view(gl.implicit_attention(cache, layer=layer))
            assert got.dtype == wanted.dtype and torch.equal(got, wanted), name
    stack = gl.implicit_attention(cache)
    assert torch.equal(inside(dtype, lambda: stack.rollout(progress=False)), stack.rollout(progress=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_entry_runs_inside_and_is_near_what_it_is_outside(single, dtype):
    """The forward follows autocast, so the activations are rounded; what is derived from them is not."""
    x = given(single)

    def cut():
        with gl.knockout.cut(0, 2).on(single):
            return single(x)

    entries = {
        "lazy points": lambda: single.run_with_cache(x, names_filter="blocks.*.hook_scan")[1]["scan", 0],
        "states": lambda: single.run_with_cache(x, names_filter=["blocks.0.*hook_state", "blocks.0.*hook_scan"])[0],
        "implicit attention": lambda: gl.implicit_attention(single, x, layer=0).mean(),
        "check": lambda: 1 + torch.tensor(gl.implicit_attention(single, x).check().relative),
        "lrp": lambda: gl.attribution.lrp(single, x, target=3).scores,
        "rollout": lambda: gl.attribution.rollout(single, x).scores,
        "cut": cut,
    }  # fmt: skip
    near = 32 * torch.finfo(dtype).eps  # a quarter in bfloat16, three in a hundred in float16
    for name, entry in entries.items():
        try:
            wanted = entry()
        except gl.PointError:
            continue  # a layer without that point
        got = inside(dtype, entry)
        assert got.isfinite().all(), name
        assert (got - wanted).abs().max() < near * wanted.abs().max().clamp(min=0.1), name


def test_a_readout_is_exact_forward_and_backward_inside():
    states, read = torch.randn(2, 5, 3, 4, requires_grad=True), torch.randn(2, 5, 4)
    wanted = readout(states, read)
    (slope,) = torch.autograd.grad(wanted.square().sum(), states)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = readout(states, read)
        (found,) = torch.autograd.grad(got.square().sum(), states)
    assert torch.allclose(got, wanted, rtol=1e-6, atol=1e-6) and torch.allclose(found, slope, rtol=1e-5, atol=1e-5)


def test_exact_is_off_inside_and_as_it_was_behind():
    x = torch.ones(2)
    assert not is_on(x) and not is_on(torch.ones(2, device="meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with exact(x):
            assert not is_on(x) and (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert is_on(x)

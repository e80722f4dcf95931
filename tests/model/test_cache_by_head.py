"""A cache by head: entries of an activation, and the residual stream by heads as TransformerLens's methods give it."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from tests.helpers import example


@pytest.fixture(scope="module")
def model():
    return gl.HookedMamba2.tiny(dtype=torch.float64)


@pytest.fixture(scope="module")
def cache(model):
    with torch.no_grad():
        return model.run_with_cache(example(model), names_filter=lambda name: True)[1]


def close(got, want):
    return got.shape == want.shape and torch.allclose(got, want, rtol=0, atol=1e-10)


def test_entries_of_an_activation(model, cache):
    heads, states = cache["scan", 0].unflatten(2, (4, 8)), cache["state", 0]
    for index, scan, state in (
        ({"head": 2}, heads[:, :, 2], states[:, :, 2]),
        ({"head": [-1, 0]}, heads[:, :, [3, 0]], states[:, :, [3, 0]]),
        ({"head": slice(1, 3), "value": 5}, heads[:, :, 1:3, 5], states[:, :, 1:3, 5]),
        ({"channel": [17, 3]}, cache["scan", 0][..., [17, 3]], states.flatten(2, 3)[:, :, [17, 3]]),
        ({"head": torch.tensor([True, False, True, False])}, heads[:, :, [0, 2]], states[:, :, [0, 2]]),
    ):
        assert torch.equal(cache.select(("scan", 0), **index), scan)
        assert torch.equal(cache.select("blocks.0.mixer.hook_state", **index), state)
    assert torch.equal(cache.select(("state", 0), head=1, state=3), states[:, :, 1, :, 3])
    assert torch.equal(cache.select(("dt", 1), head=1), cache["dt", 1][:, :, 1])
    assert torch.equal(cache.select(("B", 1), group=1), cache["B", 1][:, :, 1])


def test_entries_of_a_gradient_and_without_a_batch(model):
    tokens = example(model, 1)
    _, both = model.run_with_cache(tokens, incl_bwd=True, return_type="loss")
    name = "blocks.0.mixer.hook_scan"
    assert torch.equal(both.select(f"{name}_grad", head=1), both[f"{name}_grad"][..., 8:16])
    with torch.no_grad():
        _, single = model.run_with_cache(tokens, remove_batch_dim=True)
        _, sliced = model.run_with_cache(tokens, pos_slice=-1)
    assert torch.equal(single.select(("scan", 0), head=1), single["scan", 0][:, 8:16])
    assert torch.equal(sliced.select(("scan", 0), head=1), sliced["scan", 0][..., 8:16])
    for axis in ("batch", "pos"):
        with pytest.raises(gl.InputError, match=f"{axis}=0: rows are chosen by apply_slice_to_batch_dim"):
            single.select(("scan", 0), **{axis: 0})


@pytest.mark.parametrize(("make", "first"), [(gl.HookedMamba2, 0), (gl.HookedGriffin, 2)])
@torch.no_grad()
def test_the_stream_by_heads(make, first):
    model = make.tiny(dtype=torch.float64)
    _, cache = model.run_with_cache(example(model))
    n, blocks = model.cfg.n_heads, range(first, model.cfg.n_layers)
    parts, labels = cache.stack_head_results(return_labels=True)
    assert labels == [f"L{layer}H{head}" for layer in blocks for head in range(n)]
    by = dict(zip(labels, parts, strict=True))
    for layer in blocks:
        mixer = model.blocks[layer].mixer
        weight, bias = mixer.output_weights()
        o = cache[f"blocks.{layer}.{mixer.place}.{mixer.output_point}"].flatten(2)
        width = o.shape[2] // n
        for head in range(n):  # literally: the projection of one head's channels
            own = slice(head * width, (head + 1) * width)
            assert close(by[f"L{layer}H{head}"], o[..., own] @ weight[:, own].T)
        assert close(cache["result", layer].sum(2) + (0 if bias is None else bias), cache["mixer_out", layer])
        assert torch.equal(cache["result", layer, "attn"], cache.head_results(layer))
    rest, said = cache.stack_head_results(return_labels=True, incl_remainder=True)
    assert said[-1] == "remainder" and close(rest.sum(0), cache["resid_post", -1])
    some = cache.stack_head_results(first + 1, pos_slice=(0, 2))
    assert some.shape[0] == n and close(some, parts[:n, :, 0:2])
    whole, named = cache.get_full_resid_decomposition(expand_neurons=False, return_labels=True)
    assert close(whole.sum(0), cache["resid_post", -1]) and named[: len(labels)] == labels and named[-1] == "bias"
    direction = torch.linspace(-1, 1, model.cfg.d_model, dtype=torch.float64)
    onto = cache.get_full_resid_decomposition(expand_neurons=False, project_output_onto=direction)
    assert close(onto, whole @ direction)
    early = cache.get_full_resid_decomposition(1, expand_neurons=False)
    assert close(early.sum(0), cache["resid_pre", 1])
    normed = cache.stack_head_results(apply_ln=True)
    assert close(normed, cache.apply_ln_to_stack(parts, -1))
    shares = cache.logit_attrs(parts, tokens=3)[:, :, -1].T
    lens = gl.lens.head_attribution(model, cache, 3)
    assert close(shares, lens.values[..., :n].flatten(1))
    cache.compute_head_results()
    name = f"blocks.{first}.{model.blocks[first].mixer.place}.hook_result"
    assert torch.equal(cache[name], cache["result", first])


@torch.no_grad()
def test_a_layer_without_heads_says_so():
    model = gl.HookedGriffin.tiny(dtype=torch.float64)
    _, cache = model.run_with_cache(example(model))
    for ask in (lambda: cache["result", 0], lambda: cache.head_results(0)):
        with pytest.raises(gl.PointError, match="blocks.0.mixer.hook_gated has no axis 'head'.*blocks.2.attn.hook_q"):
            ask()
    with pytest.raises(gl.PointError, match="gated channel mixers"):
        cache.get_full_resid_decomposition()
    with pytest.raises(gl.InputError, match="layer=9"):
        cache.stack_head_results(9)

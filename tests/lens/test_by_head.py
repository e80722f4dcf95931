"""Direct logit attribution by head: each head's own output, written out, and the sum of a layer's."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from tests.helpers import example, padded


@torch.no_grad()
@pytest.mark.parametrize(("make", "layers"), [(gl.HookedMamba2, [0, 1]), (gl.HookedGriffin, [2])])
@pytest.mark.parametrize("pos", [None, 3])
def test_heads_sum_to_the_mixers_share(make, layers, pos):
    model = make.tiny(dtype=torch.float64)
    tokens, mask = padded([example(model, 1, 8)[0], example(model, 1, 5, seed=1)[0]], "left")
    _, cache = model.run_with_cache(tokens, attention_mask=mask)
    by = gl.lens.head_attribution(model, cache, 3, 1, pos)
    whole = gl.lens.logit_attribution(model, cache, 3, 1, pos)
    n = model.cfg.n_heads
    assert by.axes == ("batch", "layer", "head") and by["layer"] == layers and by["head"][:n] == list(range(n))
    assert by.facts["error"] < 1e-10
    for layer in layers:
        total = whole.at(component=f"{layer}_mixer_out").values
        assert torch.allclose(by.at(layer=layer).values.sum(1), total, rtol=0, atol=1e-10)
        # One head, literally: what is left of the mixer's output if the others give nothing.
        mixer = model.blocks[layer].mixer
        name = f"blocks.{layer}.{mixer.place}.{mixer.output_point}"
        for head in range(n):
            o = cache[name].flatten(2).unflatten(2, (n, -1)).clone()
            o[:, :, [h for h in range(n) if h != head]] = 0
            cache.cache_dict[f"blocks.{layer}.hook_mixer_out"], old = (
                o.flatten(2) @ mixer.output_weights()[0].T,
                cache[f"blocks.{layer}.hook_mixer_out"],
            )
            alone = gl.lens.logit_attribution(model, cache, 3, 1, pos).at(component=f"{layer}_mixer_out").values
            cache.cache_dict[f"blocks.{layer}.hook_mixer_out"] = old
            assert torch.allclose(by.at(layer=layer, head=head).values, alone, rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_bias_stands_beside_the_heads():
    ssm = {"layer": "Mamba2", "d_state": 4, "d_conv": 4, "headdim": 8, "bias": True}
    model = gl.HookedMamba2.tiny(dtype=torch.float64, ssm_cfg=ssm)
    tokens = example(model)
    by, whole = (how(model, tokens, 3) for how in (gl.lens.head_attribution, gl.lens.logit_attribution))
    assert by["head"] == [0, 1, 2, 3, "bias"] and bool(by.at(head="bias").values.any())
    for layer in range(2):
        total = whole.at(component=f"{layer}_mixer_out").values
        assert torch.allclose(by.at(layer=layer).values.sum(1), total, rtol=0, atol=1e-10)


def test_a_model_without_heads_says_so():
    model = gl.HookedMamba.tiny()
    with pytest.raises(gl.PointError, match="hook_gated has no axis 'head'.* No point of tiny-mamba has it"):
        gl.lens.head_attribution(model, example(model), 3)
    with pytest.raises(gl.PointError, match="hook_gated has no axis 'head'"):
        gl.lens.head_token_attribution(model, example(model), 3)


@torch.no_grad()
@pytest.mark.parametrize("make", [gl.HookedMamba2, gl.HookedGriffin, gl.HookedQwen3Next, gl.HookedRWKV7])
@pytest.mark.parametrize("side", ["left", "right"])
def test_by_source_too(make, side):
    """Summed over sources the heads' shares, over heads the mixers'; and a head literally, by its own contributions."""
    model = make.tiny(dtype=torch.float64)
    tokens, mask = padded([example(model, 1, 8)[0], example(model, 1, 5, seed=1)[0]], side)
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: True, attention_mask=mask)
    by = gl.lens.head_token_attribution(model, cache, 3, 1)
    assert by.axes == ("batch", "layer", "head", "src") and by["src"][-1] == "remainder" and by.shape[-1] == 9
    assert by.facts["error"] < 1e-10
    heads = gl.lens.head_attribution(model, cache, 3, 1)
    assert by["layer"] == heads["layer"] and by["head"] == heads["head"]
    assert torch.allclose(by.values.sum(3), heads.values, rtol=0, atol=1e-10)
    tokens_alone = gl.lens.token_attribution(model, cache, 3, 1)
    direction = gl.lens.logit_shares.Reading.of(model, cache, 3, 1, None, ()).direction
    last = mask.int().cumsum(1).argmax(1)
    for layer in by["layer"]:
        want = tokens_alone.at(component=f"{layer}_mixer_out").values
        assert torch.allclose(by.at(layer=layer).values.sum(1), want, rtol=0, atol=1e-10)
        given = gl.implicit_attention(cache, layer=layer).contributions(heads=1).at(last)
        alone = torch.einsum("bjd,bd->bj", given, direction[torch.arange(2), last])
        for row, real in enumerate(mask.sum(1).tolist()):
            own = alone[row][mask[row]]
            assert torch.allclose(by.at(layer=layer, head=1).values[row, :real], own, rtol=0, atol=1e-10)

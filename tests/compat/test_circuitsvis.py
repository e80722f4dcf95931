"""What circuitsvis is handed: [head, dst, src], a string a token, names, a scale; without circuitsvis."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gatedlens as gl
from gatedlens.compat.circuitsvis import for_circuitsvis
from tests.helpers import example

KEYS = ["attention", "tokens", "attention_head_names", "max_value", "min_value", "mask_upper_tri"]


@torch.no_grad()
def test_a_stack_has_a_head_a_layer(model):
    stack = gl.implicit_attention(model, example(model))
    shown = for_circuitsvis(stack, row=1)
    assert list(shown) == KEYS
    want = stack.mean(progress=False)[:, 1]
    assert shown["attention"].shape == tuple(want.shape) and np.allclose(shown["attention"], want, atol=1e-6)
    assert shown["attention_head_names"] == [f"layer {layer}" for layer in stack.layers]
    assert len(shown["tokens"]) == want.shape[-1] and all(isinstance(token, str) for token in shown["tokens"])
    assert shown["mask_upper_tri"] == (not want.triu(1).any())
    assert shown["max_value"] == -shown["min_value"] == pytest.approx(want.abs().max().item())
    absolute = for_circuitsvis(stack, absolute=True)["attention"]
    assert np.allclose(absolute, stack.abs_mean(progress=False)[:, 0], atol=1e-6) and (absolute >= 0).all()


@torch.no_grad()
def test_a_layer_has_a_head_a_group_of_channels(model):
    attention = gl.implicit_attention(model, example(model), layer=1)
    assert np.allclose(for_circuitsvis(attention)["attention"], attention.mean()[:1], atol=1e-6)
    groups = [3, slice(0, 4)]
    shown = for_circuitsvis(attention, groups=groups)
    dense = attention.dense()[0]
    want = torch.stack([dense[3], dense[:4].mean(0)])
    assert np.allclose(shown["attention"], want, atol=1e-6) and len(shown["attention_head_names"]) == 2
    want = torch.stack([dense[3].abs(), dense[:4].abs().mean(0)])
    assert np.allclose(for_circuitsvis(attention, groups=groups, absolute=True)["attention"], want, atol=1e-6)


@torch.no_grad()
def test_a_layer_has_its_heads():
    model = gl.HookedMamba2.tiny(dtype=torch.float64)
    stack = gl.implicit_attention(model, example(model))
    for absolute in (False, True):
        shown = for_circuitsvis(stack[1], row=1, heads=[3, 0], absolute=absolute)
        view = stack[1].abs_mean if absolute else stack[1].mean
        assert np.allclose(shown["attention"], view(heads=[3, 0])[1], atol=1e-6)
        assert shown["attention_head_names"] == ["layer 1, head 3", "layer 1, head 0"]
    for wrong in (lambda: for_circuitsvis(stack, heads=0), lambda: for_circuitsvis(stack[1], groups=[3], heads=0)):
        with pytest.raises(gl.InputError, match="heads are those of one layer, and no groups"):
            wrong()


@torch.no_grad()
def test_tokens(moby_model):
    stack = gl.implicit_attention(moby_model, "Call me")
    assert for_circuitsvis(stack)["tokens"] == moby_model.to_str_tokens("Call me")
    assert for_circuitsvis(stack[0], tokens=list("abcdefgh"))["tokens"][0] == "a"
    for message, options in {
        "2 tokens for an attention of": {"tokens": ["a", "b"]},
        "row=3: the batch has rows 0 to 0": {"row": 3},
        "groups are channels of one layer": {"groups": [[0]]},
    }.items():
        with pytest.raises(gl.InputError, match=message):
            for_circuitsvis(stack, **options)

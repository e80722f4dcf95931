"""Layers by what stands in them: the same as by their numbers, in every tool that takes `layers=`."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens.address.layers import layers_of
from tests.helpers import example

ROLES = ("recurrent", "attention", "mlp", "experts")


def test_every_layer_is_of_the_kinds_of_its_points(model):
    for layer, block in enumerate(model.blocks):
        names = [name for name in model.names.points if name.startswith(f"blocks.{layer}.")]
        told = {role: layer in layers_of(model, gl.layers.where(role)) for role in sorted(block.kinds)}
        assert all(told.values())
        assert ("attention" in block.kinds) == any(name.endswith("attn.hook_pattern") for name in names)
        assert ("recurrent" in block.kinds) == any(name.endswith(("hook_state", "hook_wkv_state")) for name in names)
        assert ("experts" in block.kinds) == any(name.endswith("mlp.hook_router") for name in names)
        assert ({"mlp", "experts"} & block.kinds != set()) == any(
            name.endswith(("hook_mlp_out", "mlp.hook_post")) for name in names
        )


def test_what_a_model_lacks_is_refused_with_what_it_has(model):
    every = set().union(*(block.kinds for block in model.blocks))
    for role in ROLES:
        if role not in every:
            with pytest.raises(gl.InputError, match=f"no layer of {model.cfg.model_name} is of this kind"):
                layers_of(model, gl.layers.where(kind=role))
    with pytest.raises(gl.InputError, match="Did you mean 'recurrent'"):
        layers_of(model, gl.layers.where("recurent"))
    for wrong in ([], [3], 3):
        with pytest.raises(gl.InputError, match="kind"):
            gl.layers.where(wrong)


@torch.no_grad()
@pytest.mark.parametrize("make", [gl.HookedGriffin, gl.HookedQwen3Next, gl.HookedMamba2Hybrid])
@pytest.mark.parametrize("kind", ["recurrent", "attention", ["attention", "recurrent"]], ids=str)
def test_it_stands_for_their_numbers(make, kind):
    model = make.tiny(dtype=torch.float64)
    tokens, where = example(model), gl.layers.where(kind)
    numbers = [
        layer
        for layer, block in enumerate(model.blocks)
        if block.kinds & {kind if isinstance(kind, str) else kind[0], *kind}
    ]
    assert where.of(model) == numbers
    cuts = [gl.knockout.cut(1, -1, layers=layers) for layers in (where, numbers)]
    a, b = (model.run_with_hooks(tokens, fwd_hooks=cut.hooks(model)) for cut in cuts)
    assert torch.equal(a, b) and not torch.equal(a, model(tokens))
    cache = model.run_with_cache(tokens)[1]
    assert gl.implicit_attention(cache, layers=where).layers == tuple(numbers)
    assert layers_of(model, [where, 0]) == tuple(sorted({0, *numbers}))

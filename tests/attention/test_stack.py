"""Several layers at once: one forward, indexing, stacked means, rollout, groups of channels."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens.attention.layer import points_of
from gatedlens.attention.stack import AttentionStack
from gatedlens.hooks.mamba import HookedMamba
from tests.attention.test_layer import cached
from tests.helpers import example, relative


@pytest.fixture(params=["plain", "state", "right", "holes+state"])
def stack(model, request):
    with torch.no_grad():
        return gl.implicit_attention(cached(model, request.param))


@torch.no_grad()
def test_the_means_are_those_of_each_layer(stack):
    assert isinstance(stack, AttentionStack) and len(stack) == stack.cache.model.cfg.n_layers
    each = [gl.implicit_attention(stack.cache, layer=i) for i in stack.layers]
    assert torch.equal(stack.mean(progress=False), torch.stack([A.mean() for A in each]))
    assert torch.equal(stack.abs_mean(progress=False), torch.stack([A.abs_mean() for A in each]))
    bare = stack.without("skip", "gate")
    assert torch.equal(bare.mean(progress=False)[-1], each[-1].without("skip", "gate").mean())
    assert stack.paper("unified").parts == each[0].paper("unified").parts and stack.only("scan").parts == ("scan",)
    want = torch.stack([A.mean() for A in each]).mean(0)
    assert torch.allclose(stack.layer_mean(progress=False), want, atol=1e-14)
    assert torch.allclose(stack.layer_mean(absolute=True, progress=False), stack.abs_mean(progress=False).mean(0))


@torch.no_grad()
def test_rollout_chains_the_layers_through_the_residual_stream(stack):
    """Row by row: what reaches i is what is there, and what the layer brings from every j."""
    mask, means = stack.cache.mask, stack.mean(progress=False)
    for start in (0, 1, -1):
        want = torch.eye(means.shape[-1], dtype=torch.float64).repeat(means.shape[1], 1, 1)
        if mask is not None:
            want = want * mask.unsqueeze(1)
        first = want.clone()
        for A in means[start % len(means) :]:
            want = torch.stack(
                [first[:, i] * 0 + want[:, i] + (A[:, i, :, None] * want).sum(1) for i in range(len(A[0]))], 1
            )
        assert torch.allclose(stack.rollout(start_layer=start, progress=False), want, atol=1e-12)
    if mask is not None:
        rolled = stack.rollout(progress=False)
        assert rolled[~mask].abs().max() == 0 and rolled.mT[~mask].abs().max() == 0


@torch.no_grad()
def test_from_a_model_one_forward_and_only_what_is_needed(model):
    input = example(model)
    whole = model.run_with_cache(input)[1]
    runs, seen = [], []
    hooks = [("hook_embed", lambda x, hook: runs.append(1)), (lambda n: True, lambda x, hook: seen.append(hook.name))]
    with model.hooks(hooks):
        stack = gl.implicit_attention(model, input, layers=[0])
        every = gl.implicit_attention(model, input)
    assert len(runs) == 2 and stack.layers == (0,) and len(every) == model.cfg.n_layers
    needed = {name for block in model.blocks for name in points_of(block, block.mixer)}
    assert set(every.cache.cache_dict) == needed
    assert not any(name.startswith("blocks.1") for name in seen[: seen.index("hook_embed", 1)])
    want = gl.implicit_attention(whole).mean(progress=False)  # lazy points that are heard change the rounding
    assert relative(every.mean(progress=False), want) < 1e-12
    assert gl.implicit_attention(model, input, layers=slice(-1, None)).layers == (model.cfg.n_layers - 1,)


@torch.no_grad()
def test_groups_are_means_over_their_channels(model):
    for A in gl.implicit_attention(cached(model, "plain")):
        dense = A.dense()
        groups = [[0, 3], slice(4, 9), 5, torch.tensor([-1, 2])]
        want = torch.stack([dense[:, c].mean(1) for c in ([0, 3], slice(4, 9), [5], [-1, 2])], 1)
        assert torch.allclose(A.grouped(groups), want, atol=1e-12)
        assert torch.allclose(A.T.grouped(groups), want.mT, atol=1e-12)
        some = A.select([3, 1])
        assert torch.allclose(some.dense(), dense[:, [3, 1]], atol=1e-12) and some.check().relative < 1e-10
        assert torch.allclose(some.bias, A.bias[:, :, [3, 1]], atol=1e-12)


def test_select_keeps_a_carried_state(lm):
    with torch.no_grad():
        for A in gl.implicit_attention(cached(lm, "holes+state")):
            assert torch.allclose(A.select([4, 0]).bias, A.bias[:, :, [4, 0]], atol=1e-12)


def test_the_progress_bar_can_be_switched_off(capsys):
    model = HookedMamba.tiny()
    stack = gl.implicit_attention(model, example(model))
    stack.mean(progress=False), stack.rollout(progress=False), stack.profiles(progress=False)
    assert capsys.readouterr().err == ""
    stack.mean()
    assert "2/2" in capsys.readouterr().err


def test_indexing_and_its_mistakes():
    model = HookedMamba.tiny(n_layer=4)
    tokens = example(model)
    stack = gl.implicit_attention(model, tokens, layers=[3, 1])
    assert stack.layers == (1, 3) and stack[1].layer == 1 and stack[-1].layer == 3 and "[1, 3]" in repr(stack)
    assert [A.layer for A in stack] == [1, 3]
    assert stack[2:].layers == (3,) and stack[[1]].layers == (1,)
    with pytest.raises(gl.InputError, match=r"stack\[0\]: .* holds the layers 1, 3"):
        stack[0]
    with pytest.raises(gl.InputError, match="holds no layer"):
        stack[:1]
    with pytest.raises(gl.InputError, match="start_layer=9: .* layers 0 to 3"):
        stack.rollout(start_layer=9)
    with pytest.raises(gl.InputError, match="give one layer, or several"):
        gl.implicit_attention(model, tokens, layer=1, layers=[1])
    with pytest.raises(gl.InputError, match="names no layer"):
        gl.implicit_attention(model, tokens, layers=[])
    with pytest.raises(gl.InputError, match="layers=7 does not exist; .* has layers 0 to 3"):
        gl.implicit_attention(model, tokens, layers=[7])
    with pytest.raises(gl.PointError, match="layer 1 needs points that this cache lacks"):
        gl.implicit_attention(gl.implicit_attention(model, tokens, layers=[0]).cache)[1]
    with pytest.raises(gl.InputError, match="group 1 is empty"):
        stack[1].grouped([[0], []])
    with pytest.raises(gl.InputError, match="at least one group"):
        stack[1].grouped([])

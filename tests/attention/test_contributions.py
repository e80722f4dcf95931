"""Token-to-token contributions: sums to the block's output, the dense definition, directions, taps, every architecture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import gatedlens as gl
from gatedlens.attention import contributions
from gatedlens.hooks.griffin import HookedGriffin
from gatedlens.hooks.mamba import HookedMamba
from gatedlens.hooks.rwkv import HookedRWKV
from gatedlens.hooks.vim import HookedViM
from tests.attention.test_layer import CASES, VARIANTS, cached
from tests.helpers import at_real, example, relative


def by_channel_and_source(A):
    """[batch, dst, src, channel]: A[i, j] x[j], each branch with its own x."""
    total = 0
    for branch in A.branches:
        x = A.padding.spread(branch.x.flip(1) if branch.reverse else branch.x)
        total = total + torch.einsum("bcij,bjc->bijc", replace(A, branches=(branch,)).dense(), x)
    return total


def of(cache, variant="all"):
    """(contributions, F as the definition has it, the layer's output) of every layer."""
    for A in gl.implicit_attention(cache):
        out = cache[f"blocks.{A.layer}.hook_mixer_out"]
        A = VARIANTS[variant](A)
        F = A.contributions()
        vectors, by = torch.einsum("bijc,dc->bijd", by_channel_and_source(A), F.weight), A.by
        if by is not None:  # numbers of each destination, for each copy of the stream
            vectors = torch.cat([by[:, :, k, None, None] * vectors for k in range(by.shape[2])], dim=-1)
        yield F, vectors, out


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_they_sum_to_the_layers_output(model, case):
    for F, vectors, out in of(cached(model, case)):
        real = slice(None) if F.attention.padding.mask is None else F.attention.padding.mask
        for total in (vectors.sum(2) + F.remainder(), F.output()):
            assert relative(total[real], out[real]) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("case", ["plain", "left", "holes+state"])
@pytest.mark.parametrize("variant", ["all", "no act", "scan", "no scan"])
def test_every_view_is_the_definition(model, case, variant, monkeypatch):
    monkeypatch.setattr(contributions, "BLOCK_ELEMENTS", 3 * 2 * 11 * 24)  # several blocks of rows and of channels
    for F, vectors, _ in of(cached(model, case), variant):
        scale = vectors.abs().max()
        direction = torch.randn(F.writing.width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        pairs = {
            "along": (F.along(direction), vectors @ direction),
            "norms": (F.norms(), vectors.norm(dim=-1)),
            "blocks": (torch.cat(list(F.blocks()), 1), vectors),
            **{f"row {i}": (F.row(i), at_real(vectors, F.attention.padding.mask, i, 1)) for i in (0, 4, -1)},
            **{f"column {j}": (F.column(j), at_real(vectors, F.attention.padding.mask, j, 2)) for j in (0, 4, -1)},
        }
        for name, (got, want) in pairs.items():
            assert torch.allclose(got, want, rtol=0, atol=1e-11 * max(scale, 1)), name


@torch.no_grad()
@pytest.mark.parametrize("case", ["plain", "left", "holes+state"])
def test_taps_sum_to_the_whole(model, case):
    for F, vectors, _ in of(cached(model, case)):
        taps = [F.tap(k) for k in range(F.n_taps)]
        direction = torch.ones(F.writing.width, dtype=torch.float64)
        assert relative(sum(tap.along(direction) for tap in taps), vectors @ direction) < 1e-10
        assert relative(sum(tap.row(-1) for tap in taps), at_real(vectors, F.attention.padding.mask, -1, 1)) < 1e-10
        assert relative(sum(tap.output() for tap in taps) + F.remainder(), F.output()) < 1e-10
        assert all(tap.remainder().abs().max() == 0 for tap in taps)
        for tap in taps:
            last = at_real(tap.along(direction), F.attention.padding.mask, -1, 1)
            assert torch.allclose(last, tap.row(-1) @ direction, atol=1e-11)


@torch.no_grad()
def test_a_tap_is_the_token_that_it_brings_times_where_the_scan_sends_it():
    """Number by number, Mamba: G (S + D) Z at place j + k, times tap K - 1 - k, times x at j."""
    model = HookedMamba.tiny(dtype=torch.float64)
    cache = cached(model, "plain")
    F = gl.implicit_attention(cache, layer=1).contributions()
    places = F.attention.without("conv").dense()  # from the place in front of the activation to the output
    w, x = model.wrapped.backbone.layers[1].mixer, cache["x", 1]
    for k in range(4):
        column = torch.zeros(2, 11, 16, dtype=torch.float64)
        for c in range(32):
            sent = places[:, c, :, 5 + k] * w.conv1d.weight[c, 0, 3 - k] * x[:, 5, c, None]
            column += sent.unsqueeze(-1) * w.out_proj.weight[:, c]
        assert relative(F.tap(k).column(5), column) < 1e-10


@torch.no_grad()
def test_a_logit_difference():
    model = HookedMamba.tiny(dtype=torch.float64)
    cache = cached(model, "plain")
    F = gl.implicit_attention(cache, layer=0).contributions()
    first, second = model.tokens_to_residual_directions(torch.tensor([3, 7]))
    shares = F.along(first - second)
    whole = cache["mixer_out", 0] @ (first - second)
    assert relative(shares.sum(-1) + F.remainder() @ (first - second), whole) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize(
    "model",
    [
        lambda: HookedViM.tiny(dtype=torch.float64, init_layer_scale=0.3),
        lambda: HookedViM.tiny(dtype=torch.float64, bimamba_type="none", if_divide_out=False),
        lambda: HookedRWKV.tiny(dtype=torch.float64),
        lambda: HookedGriffin.tiny(dtype=torch.float64, num_key_value_heads=2),
    ],
    ids=["layer scale", "one direction", "rescaled", "all heads"],
)
def test_output_projections_of_every_kind(model):
    model = model()
    if isinstance(model, HookedRWKV):
        model.wrapped.eval()
        model.wrapped.config.rescale_every = 1
        model.wrapped.rwkv.config.rescale_every = 1
        model.wrapped(torch.zeros(1, 2, dtype=torch.long))  # transformers rescales its weights, in place
        assert model.wrapped.rwkv.layers_are_rescaled
    _, cache = model.run_with_cache(example(model))
    for F, vectors, out in of(cache):
        assert relative(vectors.sum(2) + F.remainder(), out) < 1e-10


@torch.no_grad()
def test_an_edit_of_one_direction_alone_is_followed():
    model = HookedViM.tiny(dtype=torch.float64)
    hooks = [("blocks.0.mixer.bwd.hook_x", lambda x, hook: x * 1.5)]
    with model.hooks(hooks):
        _, cache = model.run_with_cache(example(model))
    F = gl.implicit_attention(cache, layer=0).contributions()
    direction = torch.randn(16, dtype=torch.float64)
    assert relative(F.output(), cache["mixer_out", 0]) < 1e-10
    assert relative(F.along(direction).sum(-1) + F.remainder() @ direction, cache["mixer_out", 0] @ direction) < 1e-10
    assert relative(F.row(3).sum(1) + F.remainder()[:, 3], cache["mixer_out", 0][:, 3]) < 1e-10


@torch.no_grad()
def test_along_builds_no_channel_by_pos_by_pos():
    from torch.utils._python_dispatch import TorchDispatchMode

    model, largest = HookedMamba.tiny(d_model=32), 0
    F = gl.implicit_attention(model, example(model, 1, 128), layer=0).contributions()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        F.along(torch.ones(32))
    assert largest < 64 * 128 * 128 / 4


def test_bad_questions_are_explained():
    model = HookedMamba.tiny()
    F = gl.implicit_attention(model, example(model), layer=0).contributions()
    assert "d_model 16" in repr(F)
    with pytest.raises(gl.InputError, match=r"\[d_model\] = \[16\]; this is \[40\]"):
        F.along(torch.ones(40))
    with pytest.raises(gl.InputError, match=r"tap\(4\): this layer's taps reach 0 to 3"):
        F.tap(4)
    with pytest.raises(gl.InputError, match="tap 1 alone"):
        F.tap(1).tap(0)
    with pytest.raises(gl.InputError, match="not of A.T"):
        F.attention.T.contributions()

"""run_with_cache and ActivationCache: filters, keys, slices, gradients, limits, TransformerLens's residual tools."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example as example_of
from hypothesis import given
from hypothesis import strategies as st

import gatedlens as gl
from gatedlens.hooks.mamba import HookedMamba
from tests.helpers import example, relative


@torch.no_grad()
def test_the_default_caches_every_point_that_is_not_lazy(model):
    _, cache = model.run_with_cache(example(model))
    assert list(cache) == [name for name, point in model.names.points.items() if not point.lazy]


@torch.no_grad()
@pytest.mark.parametrize(
    "names_filter",
    [
        "blocks.*.hook_resid_pre",
        ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"],
        lambda n: n.endswith("resid_pre"),
    ],
    ids=["glob", "list", "predicate"],
)
def test_filters(model, names_filter):
    _, cache = model.run_with_cache(example(model), names_filter=names_filter)
    assert list(cache) == [f"blocks.{i}.hook_resid_pre" for i in range(model.cfg.n_layers)][: len(cache)]
    assert len(cache) >= 2


@torch.no_grad()
def test_keys(model):
    _, cache = model.run_with_cache(example(model), names_filter=lambda name: True)
    want = cache.cache_dict["blocks.1.hook_resid_post"]
    for key in (
        "blocks.1.hook_resid_post",
        ("resid_post", 1),
        ("hook_resid_post", 1),
        ("resid_post", 1 - model.cfg.n_layers),
    ):
        assert cache[key] is want
    assert cache["scale", 0, "ln1"] is cache["blocks.0.ln1.hook_scale"]
    assert cache["embed"] is cache["hook_embed"]
    assert ("resid_post", 1) in cache and ("resid_post", 99) not in cache and "nonsense" not in cache


@torch.no_grad()
def test_cached_tensors_are_not_touched_by_later_hooks(model):
    """An in-place hook behind the cache's, and in-place edits further on, leave what was cached as it was."""
    input = example(model)
    _, clean = model.run_with_cache(input, names_filter="blocks.*")
    store, forward, _ = model.get_caching_hooks("blocks.*")

    def spoil(x, hook):
        x.add_(1.0)

    rows = [row.name for row in model.rows_for(0)]
    rows = rows[rows.index("hook_resid_pre") :]  # what fires before (RWKV's ln0) makes the stream
    with model.hooks([*forward, *((f"blocks.0.{name}", spoil) for name in rows)]):
        model(input)
    assert torch.equal(store["blocks.0.hook_resid_pre"], clean["resid_pre", 0])
    assert torch.equal(store["blocks.0.hook_mixer_in"], clean["resid_pre", 0] + 1)


@torch.no_grad()
@pytest.mark.parametrize("pos_slice", [-1, (1, 4), [0, 3], slice(2, None)], ids=str)
def test_pos_slice_takes_the_position_axis_of_each_point(model, pos_slice):
    _, whole = model.run_with_cache(example(model), names_filter=lambda name: True)
    _, part = model.run_with_cache(example(model), names_filter=lambda name: True, pos_slice=pos_slice)
    # As in TransformerLens, an int keeps the axis, with one position on it.
    index = (
        slice(*pos_slice) if isinstance(pos_slice, tuple) else [pos_slice] if isinstance(pos_slice, int) else pos_slice
    )
    for name, point in model.names.points.items():
        want = whole[name]
        if "pos" in point.dims:
            want = want[(slice(None),) * point.dims.index("pos") + (index,)]
        assert torch.equal(part[name], want), name


def test_gradients_are_those_of_autograd_and_parameters_keep_theirs(lm):
    tokens = example(lm)
    mixer = lm.blocks[1].mixer
    names = ["blocks.0.hook_resid_pre", f"blocks.1.{mixer.place}.{mixer.output_point}", "hook_logits"]
    loss, cache = lm.run_with_cache(tokens, names_filter=names, incl_bwd=True, return_type="loss")
    assert loss.ndim == 0
    for name in names:
        if name not in lm.names:
            continue
        step = 1e-6
        direction = torch.randn(cache[name].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

        def moved(sign, name=name, direction=direction, step=step):
            with torch.no_grad():
                hooks = [(name, lambda x, hook: x + sign * step * direction)]
                return lm.run_with_hooks(tokens, fwd_hooks=hooks, return_type="loss")

        numeric = (moved(1) - moved(-1)) / (2 * step)
        assert torch.allclose((cache[f"{name}_grad"] * direction).sum(), numeric, rtol=1e-4, atol=1e-8), name
    assert all(p.grad is None for p in lm.parameters())
    with pytest.raises(gl.InputError, match="scalar"):
        lm.run_with_cache(tokens, incl_bwd=True)
    with torch.no_grad(), pytest.raises(gl.InputError, match="switched off"):
        lm.run_with_cache(tokens, incl_bwd=True, return_type="loss")


@torch.no_grad()
def test_the_dict_the_batch_and_the_device(model):
    one = example(model, batch=1)
    _, plain = model.run_with_cache(one, return_cache_object=False)
    assert type(plain) is dict
    _, cache = model.run_with_cache(one, remove_batch_dim=True, device="cpu")
    assert torch.equal(cache["resid_post", 1], plain["blocks.1.hook_resid_post"][0])
    with pytest.raises(gl.InputError, match="2 rows"):
        model.run_with_cache(example(model), remove_batch_dim=True)


@torch.no_grad()
def test_what_did_not_fire_raises_and_patterns_keep_what_did(model):
    input = example(model)
    with pytest.raises(gl.PointError, match="blocks.1.hook_resid_post did not fire"):
        model.run_with_cache(input, names_filter="blocks.1.hook_resid_post", stop_at_layer=1)
    _, cache = model.run_with_cache(input, names_filter="blocks.*.hook_resid_post", stop_at_layer=1)
    assert list(cache) == ["blocks.0.hook_resid_post"]
    for nothing in (
        "blocks.9.hook_resid_pre",
        "blocks.*.hook_rasid",
        [],
        lambda name: False,
        ["hook_embed", "hook_x9"],
    ):
        with pytest.raises(gl.PointError):
            model.run_with_cache(input, names_filter=nothing)


def test_a_missing_key_says_why():
    model = HookedMamba.tiny()
    _, cache = model.run_with_cache(example(model))
    with pytest.raises(gl.PointError, match="is lazy, so the default leaves it out"):
        cache["decay", 0]
    with pytest.raises(gl.PointError, match=r"Did you mean 'blocks.0.mixer.hook_dt'"):
        cache["blocks.0.mixer.hook_dtt"]
    with pytest.raises(gl.PointError, match="layer 7 does not exist"):
        cache["dt", 7]
    with pytest.raises(KeyError):
        cache["blocks.0.hook_attn_pattern"]


def test_a_cache_over_the_limit_is_refused_before_anything_runs():
    model = HookedMamba.tiny()
    ran = []
    with model.hooks([("hook_embed", lambda x, hook: ran.append(1))]), pytest.raises(gl.TooLargeError) as error:
        model.run_with_cache(example(model), names_filter="blocks.*.mixer.hook_state", max_bytes=1000)
    assert "14.0 KiB" in str(error.value) and "hook_state" in str(error.value) and not ran
    model.run_with_cache(example(model), names_filter="blocks.0.mixer.hook_state", pos_slice=-1, max_bytes=1024)


@torch.no_grad()
def test_residual_tools_of_transformer_lens(lm):
    """The stream before each layer is the sum of what the blocks before it wrote."""
    _, cache = lm.run_with_cache(example(lm))
    for layer in range(lm.cfg.n_layers):
        parts, labels = cache.decompose_resid(layer, return_labels=True)
        assert len(labels) == len(parts) and labels[0] == "embed"
        assert relative(parts.sum(0), cache["resid_pre", layer]) < 1e-10
    accumulated, names = cache.accumulated_resid(apply_ln=True, return_labels=True)
    assert names[-1] == "final_post"
    assert relative(accumulated[-1], cache["ln_final.hook_out"]) < 1e-10
    assert cache.stack_activation("resid_pre").shape[0] == lm.cfg.n_layers


@torch.no_grad()
def test_logit_attributions_sum_to_the_logit():
    model = HookedMamba.tiny(dtype=torch.float64)
    tokens = example(model)
    logits, cache = model.run_with_cache(tokens)
    parts = cache.decompose_resid(apply_ln=True)
    weight = model.wrapped.backbone.norm_f.weight
    direct = torch.einsum("lbpd,dv->lbpv", parts * weight, model.W_U).sum(0)
    assert relative(direct, logits) < 1e-10


MODEL = HookedMamba.tiny()


@given(st.text("blocks.0123*?[]hook_mixerdtuABC-", max_size=30))
@example_of("A0")
@example_of("dt0mixer")
@example_of("y99")
def test_any_string_as_filter_selects_or_raises_a_point_error(text):
    try:
        groups = MODEL.names.select(text)
    except gl.PointError as error:
        assert repr(text) in str(error) or text in str(error)
    else:
        assert groups and all(name in MODEL.names for name in groups[0])


@given(st.integers(1, 3), st.integers(1, 9), st.integers(0, 99))
@torch.no_grad()
def test_any_shape_runs_and_caches_its_shape(batch, pos, seed):
    tokens = example(MODEL, batch, pos, seed)
    logits, cache = MODEL.run_with_cache(tokens, names_filter=["blocks.1.mixer.hook_state", "hook_embed"])
    assert logits.shape == (batch, pos, 40)
    assert cache["state", 1].shape == (batch, pos, 32, 4)
    assert torch.equal(cache.tokens, tokens)


def test_transformer_lens_s_shorthand_is_one_word():
    """`get_act_name("scale1ln1")` is a name there, and so in a cache, a filter and a hook here."""
    from transformer_lens.utilities import get_act_name

    model = gl.from_pretrained("gatedlens/griffin-moby", device="cpu")
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        for word in ("scale1ln1", "pre2", "resid_pre1", "normalized0ln2"):
            wanted = {"resid_pre1": "blocks.1.hook_resid_pre"}.get(word) or get_act_name(word)
            assert torch.equal(cache[word], cache[wanted]), word
            assert list(model.run_with_cache(tokens, names_filter=word)[1]) == [wanted]
    with pytest.raises(gl.PointError, match="layer 9 does not exist"):
        cache["scale9ln1"]
    mamba = gl.from_pretrained("gatedlens/mamba-recall", device="cpu")
    with pytest.raises(gl.PointError, match=r"gl.implicit_attention\(cache, layer\)"):
        mamba.run_with_cache(tokens)[1]["pattern", 1]

"""Other tools' names: MambaLens's 25 with exact shapes, TransformerLens's words, edits through them."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens.hooks.mamba import HookedMamba
from tests.helpers import example

MODEL = HookedMamba.tiny(seed=0, dtype=torch.float64)
B, L, D, E, N, R, V, K = 2, 7, 16, 32, 4, 1, 40, 4

MAMBA_LENS = {
    "hook_embed": (B, L, D),
    "blocks.1.hook_resid_pre": (B, L, D),
    "blocks.1.hook_layer_input": (B, L, D),
    "blocks.1.hook_normalized_input": (B, L, D),
    "blocks.1.hook_skip": (B, L, E),
    "blocks.1.hook_in_proj": (B, L, E),
    "blocks.1.hook_conv": (B, L, E),
    "blocks.1.hook_ssm_input": (B, L, E),
    "blocks.1.hook_A": (E, N),
    "blocks.1.hook_delta_1": (B, L, R),
    "blocks.1.hook_delta_2": (B, L, E),
    "blocks.1.hook_B": (B, L, N),
    "blocks.1.hook_C": (B, L, N),
    "blocks.1.hook_delta": (B, L, E),
    "blocks.1.hook_A_bar": (B, L, E, N),
    "blocks.1.hook_B_bar": (B, L, E, N),
    "blocks.1.hook_h_start": (B, E, N),
    "blocks.1.hook_h.5": (B, E, N),
    "blocks.1.hook_y": (B, L, E),
    "blocks.1.hook_ssm_output": (B, L, E),
    "blocks.1.hook_after_skip": (B, L, E),
    "blocks.1.hook_out_proj": (B, L, D),
    "blocks.1.hook_resid_post": (B, L, D),
    "hook_norm": (B, L, D),
    "hook_logits": (B, L, V),
}
TRANSFORMER_LENS = {
    "blocks.0.hook_in": "blocks.0.hook_resid_pre",
    "blocks.0.hook_out": "blocks.0.hook_resid_post",
    "blocks.0.hook_attn_out": "blocks.0.hook_mixer_out",
    "blocks.0.norm.hook_out": "blocks.0.ln1.hook_out",
    "blocks.0.mixer.hook_in": "blocks.0.ln1.hook_out",
    "blocks.0.mixer.hook_ssm_out": "blocks.0.hook_mixer_out",
    "blocks.0.mixer.x_proj.hook_in": "blocks.0.mixer.hook_u",
    "blocks.0.mixer.hook_dt_proj": "blocks.0.mixer.hook_dt_pre",
    "blocks.0.mixer.hook_ssm_dt": "blocks.0.mixer.hook_dt",
    "blocks.0.mixer.hook_ssm_write": "blocks.0.mixer.hook_write",
    "blocks.0.mixer.hook_ssm_state": "blocks.0.mixer.hook_state",
    "blocks.0.mixer.out_proj.hook_in": "blocks.0.mixer.hook_gated",
}
TOKENS = example(MODEL, B, L)


@torch.no_grad()
@pytest.mark.parametrize("name", MAMBA_LENS)
def test_mamba_lens_names_filter_and_read(name):
    assert len(MAMBA_LENS) == 25
    _, cache = MODEL.run_with_cache(TOKENS, names_filter=[name, "hook_embed"])
    assert tuple(cache[name].shape) == MAMBA_LENS[name]


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n in MAMBA_LENS if n != "blocks.1.hook_A"])
def test_mamba_lens_names_hook(name):
    seen = []

    def edit(x, hook):
        seen.append((hook.name, tuple(x.shape)))
        return x * 0.5 + 0.1

    out = MODEL.run_with_hooks(TOKENS, fwd_hooks=[(name, edit)])
    assert seen == [(name, MAMBA_LENS[name])]
    assert not torch.allclose(out, MODEL(TOKENS))
    assert not MODEL.list_hooks()


@torch.no_grad()
def test_views_are_what_they_say():
    w = MODEL.wrapped.backbone.layers[1].mixer
    _, cache = MODEL.run_with_cache(TOKENS, names_filter=lambda name: True)
    assert torch.equal(cache["blocks.1.hook_A"], -torch.exp(w.A_log))
    assert torch.allclose(cache["blocks.1.hook_B_bar"], cache["dt", 1][..., None] * cache["B", 1][:, :, None])
    assert torch.equal(cache["blocks.1.hook_h.3"], cache["state", 1][:, 3])
    fused = cache["blocks.1.mixer.hook_in_proj"]
    assert torch.equal(fused, torch.cat([cache["x", 1], cache["gate_pre", 1]], -1))
    assert cache["blocks.1.mixer.hook_x_proj"].shape == (B, L, R + 2 * N)


@torch.no_grad()
@pytest.mark.parametrize("theirs", TRANSFORMER_LENS)
def test_transformer_lens_words(theirs):
    _, cache = MODEL.run_with_cache(TOKENS, names_filter=theirs)
    assert list(cache.cache_dict) == [TRANSFORMER_LENS[theirs]]
    assert cache[theirs] is cache[TRANSFORMER_LENS[theirs]]


def slow_run(layer_edits: dict[int, torch.Tensor]):
    """Block 1's states from its decay and write, one step at a time, with some steps' states replaced."""
    _, cache = MODEL.run_with_cache(TOKENS, names_filter=["blocks.1.mixer.hook_decay", "blocks.1.mixer.hook_write"])
    state, states = torch.zeros(B, E, N, dtype=torch.float64), []
    for t in range(L):
        state = layer_edits.get(t, cache["decay", 1][:, t] * state + cache["write", 1][:, t])
        states.append(state)
    return torch.stack(states, 1)


@torch.no_grad()
@pytest.mark.parametrize("order", [(2, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("how", ["hooks", "add_hook"])
def test_hook_h_edits_propagate_as_in_mamba_lens_whatever_the_order(order, how):
    generator = torch.Generator().manual_seed(0)
    new = {t: torch.randn(B, E, N, generator=generator, dtype=torch.float64) for t in order}
    hooks = [(f"blocks.1.hook_h.{t}", lambda x, hook, t=t: new[t]) for t in order]
    if how == "hooks":
        with MODEL.hooks(hooks):
            logits, cache = MODEL.run_with_cache(TOKENS, names_filter="blocks.1.mixer.hook_state")
    else:
        for name, hook in hooks:
            MODEL.add_hook(name, hook)
        logits, cache = MODEL.run_with_cache(TOKENS, names_filter="blocks.1.mixer.hook_state")
        MODEL.reset_hooks()
    assert torch.allclose(cache["state", 1], slow_run(new), atol=1e-12)
    assert not torch.allclose(logits, MODEL(TOKENS))
    assert not MODEL.list_hooks()


@torch.no_grad()
def test_each_hook_h_sees_the_edits_before_it():
    seen = {}

    def zero(x, hook):
        x.zero_()

    def look(x, hook):
        seen[hook.name] = x.clone()

    MODEL.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.hook_h.3", look), ("blocks.1.hook_h.2", zero)])
    want = slow_run({2: torch.zeros(B, E, N, dtype=torch.float64)})
    assert torch.allclose(seen["blocks.1.hook_h.3"], want[:, 3])


@torch.no_grad()
def test_hook_h_from_a_carried_state():
    _, state = MODEL(TOKENS, return_state=True)
    seen = {}
    hooks = [("blocks.1.hook_h.1", lambda x, hook: seen.update(x=x.clone()))]
    with MODEL.hooks(hooks):
        _, cache = MODEL.run_with_cache(TOKENS, state=state, names_filter="blocks.1.mixer.hook_state")
    assert torch.allclose(seen["x"], cache["state", 1][:, 1])


def test_gradients_through_a_hook_h_patch():
    """Nothing before the patched step reaches what follows through that state."""
    value = torch.zeros(B, E, N, dtype=torch.float64, requires_grad=True)
    out = MODEL.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.hook_h.6", lambda x, hook: value)])
    (grad,) = torch.autograd.grad(out[:, -1].sum(), value)
    assert grad.abs().max() > 0


@torch.no_grad()
def test_a_glob_over_views_hooks_the_views():
    seen = []
    MODEL.run_with_hooks(TOKENS, fwd_hooks=[("blocks.*.hook_B_bar", lambda x, hook: seen.append((hook.name, x.ndim)))])
    assert seen == [("blocks.0.hook_B_bar", 4), ("blocks.1.hook_B_bar", 4)]
    with pytest.raises(gl.PointError, match=r"leaves the position open: name it, as in 'blocks.1.hook_h.0'"):
        MODEL.add_hook("blocks.1.hook_h.*", lambda x, hook: x)
    _, cache = MODEL.run_with_cache(TOKENS, names_filter="blocks.1.hook_h.*")
    assert list(cache.cache_dict) == ["blocks.1.mixer.hook_state"]


@torch.no_grad()
def test_a_glob_means_our_points_where_there_are_any():
    _, cache = MODEL.run_with_cache(TOKENS, names_filter="blocks.1.hook_*")
    assert list(cache.cache_dict) == [
        f"blocks.1.hook_{w}" for w in ("resid_pre", "mixer_in", "mixer_out", "resid_post")
    ]


@torch.no_grad()
def test_a_view_that_is_only_read_changes_nothing_and_spares_other_edits():
    hooks = [("blocks.1.mixer.hook_write", lambda w, hook: w * 0.5)]
    alone = MODEL.run_with_hooks(TOKENS, fwd_hooks=hooks)
    for name in ("blocks.1.hook_B_bar", "blocks.1.hook_h.3"):
        both = MODEL.run_with_hooks(TOKENS, fwd_hooks=[*hooks, (name, lambda x, hook: None)])
        assert torch.allclose(alone, both, rtol=0, atol=1e-14), name


@torch.no_grad()
@pytest.mark.parametrize("later", ["hook_decay", "hook_state_start", "hook_write"])
def test_a_view_sees_what_later_hooks_make_of_its_points(later):
    hooks = [
        ("blocks.1.hook_h.3", lambda x, hook: x * 0),
        (f"blocks.1.mixer.{later}", lambda x, hook: x * 0.1 + 0.2),
    ]
    for order in (hooks, hooks[::-1]) if later != "hook_write" else (hooks[::-1],):
        with MODEL.hooks(order):
            _, cache = MODEL.run_with_cache(TOKENS, names_filter="blocks.1.mixer.hook_state")
        assert cache["state", 1][:, 3].abs().max() < 1e-12


@torch.no_grad()
def test_reading_steps_from_trimmed_caches():
    name = "blocks.1.hook_h.3"
    _, whole = MODEL.run_with_cache(TOKENS[:1], names_filter=name)
    _, cache = MODEL.run_with_cache(TOKENS[:1], names_filter=name, remove_batch_dim=True)
    assert torch.equal(cache[name], whole[name][0])
    with pytest.raises(gl.PointError, match="there are 7 positions"):
        whole["blocks.1.hook_h.99"]
    with pytest.raises(gl.PointError, match="only some positions"):
        MODEL.run_with_cache(TOKENS, names_filter=name, pos_slice=3)[1][name]


def test_what_cannot_be_hooked_says_what_can():
    with pytest.raises(gl.PointError, match="hook mixer.hook_decay"):
        MODEL.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.hook_A", lambda x, hook: x)])
    with pytest.raises(gl.PointError, match="hook its halves"):
        MODEL.add_hook("blocks.0.mixer.hook_in_proj", lambda x, hook: x)
    with pytest.raises(gl.PointError, match="no gradient of its own"):
        MODEL.add_hook("blocks.0.hook_h.2", lambda x, hook: x, dir="bwd")
    with pytest.raises(gl.PointError, match=r"hook_h.30 at 7 positions"):
        MODEL.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.hook_h.30", lambda x, hook: x)])
    with pytest.raises(gl.HookError, match=r"blocks.0.hook_h.2 returned \[1\]"):
        MODEL.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.hook_h.2", lambda x, hook: torch.zeros(1).double())])
    with pytest.raises(gl.PointError, match="has layers 0 to 1"):
        MODEL.names.find("blocks.5.hook_h.2")
    assert not MODEL.list_hooks()

"""MambaLens's README over gatedlens: its examples run as they are written there, and mean what they say."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from jaxtyping import Float
from transformer_lens.hook_points import HookPoint

import gatedlens as gl
from gatedlens.compat import mamba_lens
from gatedlens.compat.mamba_lens import HookedMamba, MambaCfg, MambaInitCfg
from gatedlens.hooks.mamba import Weights
from tests.helpers import relative

CONFIG = {
    "d_model": 16,
    "n_layer": 3,
    "vocab_size": 38,
    "ssm_cfg": {"d_state": 4, "d_conv": 2, "expand": 2},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
}
TOKENS = torch.tensor([[1, 5, 7, 2, 9], [3, 3, 0, 4, 1]])


@pytest.fixture(scope="module")
def moby():
    return HookedMamba.from_pretrained("gatedlens/mamba-moby", device="cpu")


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return HookedMamba(cfg=MambaCfg(d_model=16, n_layers=3, vocab_size=40, d_state=4), initialize_params=True).double()


@torch.no_grad()
def test_activation_patching_on_the_hidden_state(moby):
    """The README's example, line for line but for the model, the prompts and the plot."""
    model = moby
    prompt_uncorrupted, prompt_corrupted = "the whale of the", "the chase of the"
    uncorrupted_answer, corrupted_answer = "w", "c"
    prompt_uncorrupted_tokens = model.to_tokens(prompt_uncorrupted)
    prompt_corrupted_tokens = model.to_tokens(prompt_corrupted)
    L = len(prompt_uncorrupted_tokens[0])
    assert len(prompt_corrupted_tokens[0]) == len(prompt_uncorrupted_tokens[0])

    def logit_diff(logits):
        uncorrupted_index = model.to_single_token(uncorrupted_answer)
        corrupted_index = model.to_single_token(corrupted_answer)
        return logits[0, -1, uncorrupted_index] - logits[0, -1, corrupted_index]

    corrupted_logits, corrupted_activations = model.run_with_cache(prompt_corrupted_tokens)
    uncorrupted_logits = model(prompt_uncorrupted_tokens)

    def h_patching_hook(
        h: Float[torch.Tensor, "B E N"],
        hook: HookPoint,
        layer: int,
        position: int,
    ) -> Float[torch.Tensor, "B E N"]:
        return corrupted_activations[hook.name]

    result = torch.zeros((model.cfg.n_layers, L), device=model.cfg.device)
    for layer in range(model.cfg.n_layers):
        for position in (3, L - 1):
            patched_logits = model.run_with_hooks(
                prompt_uncorrupted_tokens,
                fwd_hooks=[
                    (f"blocks.{layer}.hook_h.{position}", partial(h_patching_hook, layer=layer, position=position))
                ],
                fast_ssm=True,
                fast_conv=True,
            )
            result[layer, position] = logit_diff(patched_logits)
    assert len(model.to_str_tokens(prompt_corrupted_tokens)) == L
    low, high = logit_diff(corrupted_logits), logit_diff(uncorrupted_logits)
    assert ((1 - (result[:, L - 1] - low) / (high - low)).abs() > 1e-4).any(), "the state matters somewhere"


@torch.no_grad()
def test_patching_the_layer_inputs(moby):
    """The README's second example; patching every position of a layer's input is the corrupted run from there."""
    model = moby
    clean, corrupted = model.to_tokens("the whale of the"), model.to_tokens("the chase of the")
    corrupted_logits, corrupted_activations = model.run_with_cache(corrupted)

    def resid_pre_patching_hook(resid_pre, hook, position, layer):
        resid_pre[:, position, :] = corrupted_activations[hook.name][:, position, :]
        return resid_pre

    hooks = [
        ("blocks.1.hook_resid_pre", partial(resid_pre_patching_hook, layer=1, position=position))
        for position in range(len(clean[0]))
    ]
    assert relative(model.run_with_hooks(clean, fwd_hooks=hooks), corrupted_logits) < 1e-5


@torch.no_grad()
def test_hello_world_keeps_everything(moby):
    logits, activations = moby.run_with_cache("Hello World")
    length = logits.shape[1]
    assert relative(moby.lm_head(moby.norm(activations["blocks.2.hook_resid_post"])), logits) < 1e-5
    for name in moby.mamba_lens_names(length):
        assert name in activations and activations[name] is not None, name
    assert torch.equal(activations["blocks.1.hook_h.3"], activations["blocks.1.mixer.hook_state"][:, 3])
    assert len(moby.mamba_lens_names(length)) == 3 + moby.cfg.n_layers * (21 + length)


@torch.no_grad()
def test_a_patched_state_propagates(tiny):
    """Against the recurrence, one step after another."""
    new = torch.randn(2, 32, 4, dtype=torch.float64)
    with tiny.hooks([("blocks.1.hook_h.2", lambda h, hook: new)]):
        _, cache = tiny.run_with_cache(TOKENS)
    state = new
    for t in (3, 4):
        state = cache["blocks.1.hook_A_bar"][:, t] * state + cache["blocks.1.mixer.hook_write"][:, t]
        if t == 3:
            assert relative(cache["blocks.1.hook_h.3"], state) < 1e-10
    assert relative(cache["blocks.1.hook_h.4"], state) < 1e-10


@torch.no_grad()
def test_only_use_these_layers(tiny):
    plain = tiny(TOKENS)
    assert relative(tiny(TOKENS, only_use_these_layers=[0, 1, 2]), plain) < 1e-12
    order = [2, 0, 0]
    resid = tiny(TOKENS, stop_at_layer=0)
    for layer in order:
        resid = tiny(resid, start_at_layer=layer, stop_at_layer=layer + 1)
    want = tiny.unembed(tiny.ln_final(resid))
    assert relative(tiny(TOKENS, only_use_these_layers=order), want) < 1e-12
    _, cache = tiny.run_with_cache(TOKENS, only_use_these_layers=[1], names_filter="blocks.1.hook_resid_pre")
    assert relative(cache["blocks.1.hook_resid_pre"], tiny(TOKENS, stop_at_layer=0)) < 1e-12
    assert (
        relative(tiny(TOKENS, only_use_these_layers=[]), tiny.unembed(tiny.ln_final(tiny(TOKENS, stop_at_layer=0))))
        < 1e-12
    )
    with pytest.raises(gl.PointError, match="never ran"):
        tiny.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.hook_skip", lambda x, hook: x)], only_use_these_layers=[1])
    with pytest.raises(gl.InputError, match="names layer 7; there are 0 to 2"):
        tiny(TOKENS, only_use_these_layers=[7])
    with pytest.raises(gl.InputError, match="start_at_layer does not go with it"):
        tiny(resid, start_at_layer=1, only_use_these_layers=[1])
    assert tiny.layer_order is None and relative(tiny(TOKENS), plain) < 1e-12, "a refused run leaves nothing behind"


@torch.no_grad()
def test_names_filters_and_predicates(tiny):
    _, cache = tiny.run_with_cache(TOKENS, names_filter=lambda name: name.endswith("hook_h.2"))
    assert all(cache[f"blocks.{layer}.hook_h.2"].shape == (2, 32, 4) for layer in range(3))
    _, cache = tiny.run_with_cache(TOKENS, names_filter=["blocks.0.hook_delta", "hook_norm"])
    assert list(cache) == ["blocks.0.mixer.hook_dt", "ln_final.hook_out"]
    seen = []
    tiny.run_with_hooks(TOKENS, fwd_hooks=[(lambda name: ".1.hook_h." in name, lambda h, hook: seen.append(hook.name))])
    assert seen == [f"blocks.1.hook_h.{t}" for t in range(5)]
    with pytest.raises(gl.InputError, match="false for every name of MambaLens"):
        tiny.run_with_cache(TOKENS, names_filter=lambda name: "hook_dt" in name)
    with tiny.input_dependent_hooks_context(input=TOKENS, fwd_hooks=[("blocks.0.hook_h.1", lambda h, hook: h * 0)]):
        inside = tiny(TOKENS)
    assert relative(inside, tiny(TOKENS)) > 1e-6 and not tiny.list_hooks()


@torch.no_grad()
def test_from_a_config_and_a_state_dict():
    """The README's conversions: there, and back."""
    torch.manual_seed(1)
    old_model = Weights(CONFIG)
    state_dict = old_model.state_dict()
    cfg = mamba_lens.convert_original_config_to_hooked_mamba_config(CONFIG, device="cpu")
    assert (cfg.n_layers, cfg.d_state, cfg.d_conv, cfg.vocab_size) == (3, 4, 2, 38)
    hooked = mamba_lens.convert_original_state_dict_to_hooked_state_dict(state_dict)
    model = HookedMamba(cfg=cfg, device="cpu", tokenizer=None)
    model.load_state_dict(hooked)
    assert torch.equal(model(TOKENS), gl.wrap(old_model)(TOKENS))
    w = state_dict["backbone.layers.1.mixer.x_proj.weight"]
    assert torch.equal(hooked["blocks.1.W_delta_1.weight"], w[:1]) and torch.equal(hooked["blocks.1.W_C.weight"], w[5:])
    assert torch.equal(hooked["blocks.2.skip_proj.weight"], state_dict["backbone.layers.2.mixer.in_proj.weight"][32:])
    assert {"embedding.weight", "norm.weight", "lm_head.weight", "blocks.0.W_D", "blocks.0.W_delta_2.bias"} <= set(
        hooked
    )
    assert {k: id(v) for k, v in model.state_dict().items()}.keys() == hooked.keys()

    cfg_dict = mamba_lens.convert_hooked_mamba_config_to_original_config(hooked_mamba_cfg=model.cfg)
    back = mamba_lens.convert_hooked_state_dict_to_original_state_dict(cfg=model.cfg, state_dict=model.state_dict())
    assert back.keys() == state_dict.keys() and all(torch.equal(back[key], state_dict[key]) for key in back)
    again = Weights(cfg_dict)
    again.load_state_dict(back)
    assert torch.equal(gl.wrap(again)(TOKENS), model(TOKENS))
    again = Weights(mamba_lens.convert_hooked_mamba_config_to_original_config(cfg))
    again.load_state_dict(back)
    model.load_state_dict(back)


def test_from_scratch():
    """The README's words, which are not all the code's."""
    torch.manual_seed(0)
    init = MambaInitCfg(initializer_range=0.02, dt_init="random", dt_min=0.001, dt_max=0.1)
    cfg = MambaCfg(d_model=32, n_layer=2, vocab_size=50, d_state=4, d_conv=4, expand=2, initializer_config=init)
    model = HookedMamba(cfg=cfg, device="cpu", initialize_params=True)
    assert abs(model.W_E.std().item() - 0.02) < 0.002
    dt = torch.nn.functional.softplus(model.wrapped.backbone.layers[0].mixer.dt_proj.bias)
    assert dt.min() >= 0.0009 and dt.max() <= 0.11 and model.cfg.n_layers == 2
    with pytest.raises(gl.InputError, match="needs n_layers and vocab_size"):
        MambaCfg(d_model=32)
    with pytest.raises(gl.InputError, match="one of the two"):
        HookedMamba()


@torch.no_grad()
def test_loading_from_a_folder_of_transformers_and_saving(tmp_path, moby):
    plain = gl.from_pretrained("gatedlens/mamba-moby", device="cpu")
    assert torch.equal(moby("Call me"), plain("Call me")) and moby.tokenizer is not None
    torch.save(moby.state_dict(), tmp_path / "state.pt")
    again = HookedMamba.from_pretrained("gatedlens/mamba-moby", device="cpu")
    for p in again.parameters():
        p.zero_()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(again("Call me"), plain("Call me"))
    with pytest.raises(gl.InputError, match="is a RWKV, and MambaLens knows Mamba"):
        HookedMamba.from_pretrained("gatedlens/rwkv-moby")


def test_other_architectures_are_told_apart_once():
    with pytest.raises(gl.PointError, match=r"tiny-griffin\. Jamba, .*Mamba.* and .* have such a point"):
        gl.HookedGriffin.tiny().names.find("blocks.0.mixer.hook_dt_rank")


@torch.no_grad()
def test_a_cache_is_taken_under_hooks(tiny):
    tokens = torch.tensor([[1, 2, 3, 4]])
    zero = [(lambda name: name == "blocks.0.hook_h.2", lambda h, hook: h * 0)]
    logits, cache = tiny.run_with_cache(tokens, fwd_hooks=zero)
    assert torch.allclose(logits, tiny.run_with_hooks(tokens, fwd_hooks=zero), atol=1e-5)
    assert not torch.allclose(logits, tiny(tokens), atol=1e-5)
    assert cache["blocks.0.hook_h.2"].abs().max() < 1e-6 and cache["blocks.0.hook_h.1"].any()
    assert not tiny.list_hooks()


def test_what_cannot_be_converted_is_refused():
    from gatedlens.compat import mamba_lens

    with pytest.raises(gl.InputError, match="This configuration has no d_model; it has: n_layer."):
        mamba_lens.convert_original_config_to_hooked_mamba_config({"n_layer": 2})
    for convert in (
        mamba_lens.convert_original_state_dict_to_hooked_state_dict,
        mamba_lens.convert_hooked_state_dict_to_original_state_dict,
    ):
        with pytest.raises(gl.InputError, match="Give the tensors by name, .* this is a NoneType"):
            convert()
        with pytest.raises(gl.InputError, match="Give the tensors by name, .* this is a MambaCfg"):
            convert(mamba_lens.MambaCfg(d_model=16, n_layers=2, vocab_size=8))

"""Kimi Linear: every row against its literal equation, transformers' model, a state set for good, what is not opened."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens.hooks.kimi_linear import ROWS, HookedKimiLinear
from tests.conftest import EVERY
from tests.helpers import relative
from tests.hooks import battery
from tests.hooks.literal import convolved, delta_rule, experts_by_groups, linear, mlp, norm_rows, normed_and_gated

pytestmark = pytest.mark.skipif("kimi_linear" not in EVERY, reason="this transformers has no Kimi Linear")

torch.set_num_threads(1)
TOKENS = torch.randint(40, (2, 11), generator=torch.Generator().manual_seed(0))
VARIANTS = {
    "tiny": {"num_experts": 4, "rms_norm_eps": 1e-5},
    "the other way round": {
        "num_experts": 3, "mlp_layer_types": ["sparse", "dense"], "moe_renormalize": False, "attention_bias": True,
    },
    "narrow queries, groups of experts": {
        "num_experts": 4, "q_lora_rank": 5, "mlp_layer_types": ["sparse", "sparse"], "num_expert_group": 2, "topk_group": 1,
        "num_shared_experts": 2,
    },
    "narrow queries, no experts": {"q_lora_rank": 5, "mlp_layer_types": ["dense", "dense"], "linear_conv_kernel_dim": 2},
}  # fmt: skip


def tiny(variant: str = "tiny", dtype: torch.dtype = torch.float64, seed: int = 1) -> HookedKimiLinear:
    model = HookedKimiLinear.tiny(seed=seed, dtype=dtype, **VARIANTS[variant])
    generator = torch.Generator().manual_seed(seed)
    for name, bias in model.wrapped.named_buffers():
        if name.endswith("e_score_correction_bias"):  # 0 at the start, and then nothing would show that it counts
            bias.copy_(torch.randn(bias.shape, generator=generator) / 3)
    model.wrapped.config._experts_implementation = "eager"
    return model


@pytest.fixture(params=VARIANTS)
def model(request):
    return tiny(request.param)


def literal(cache, model, layer: int) -> dict[str, torch.Tensor]:
    """Every row of one block from its equation, with loops, reading the rows it names from the cache."""
    w, kind, out, eps = model.wrapped.model.layers[layer], model.cfg.kinds[layer], {}, model.cfg.eps

    def c(name):
        return cache[f"blocks.{layer}.{name}"]

    if layer > 0:
        out["hook_resid_pre"] = cache["resid_post", layer - 1]
    out["hook_mixer_in"] = c("hook_resid_pre")
    norm_rows(out, c, "ln1", c("hook_mixer_in"), w.input_layernorm.weight, eps)
    (delta_net if kind.mixing == "delta net" else attention)(out, c, w.self_attn, model.cfg)
    out["hook_resid_mid"] = c("hook_resid_pre") + c("hook_mixer_out")
    out["hook_mlp_in"] = c("hook_resid_mid")
    norm_rows(out, c, "ln2", c("hook_mlp_in"), w.post_attention_layernorm.weight, eps)
    if kind.channels == "MLP":
        mlp(out, c, w.mlp, c("ln2.hook_out"))
    else:
        experts_by_groups(out, c, w.mlp, model.cfg)
    out["hook_resid_post"] = c("hook_resid_mid") + c("hook_mlp_out")
    return out


def delta_net(out, c, m, cfg) -> None:
    n, (batch, length) = c("ln1.hook_out"), TOKENS.shape
    H, N = cfg.n_linear_heads, cfg.d_state
    out["mixer.hook_q_pre"] = (n @ m.q_proj.weight.T).view(batch, length, H, N)
    out["mixer.hook_k_pre"] = (n @ m.k_proj.weight.T).view(batch, length, H, N)
    out["mixer.hook_x"] = n @ m.v_proj.weight.T
    out["mixer.hook_gate_low"] = n @ m.g_a_proj.weight.T
    out["mixer.hook_gate_pre"] = c("mixer.hook_gate_low") @ m.g_b_proj.weight.T
    out["mixer.hook_beta_pre"] = n @ m.b_proj.weight.T
    out["mixer.hook_dt_low"] = n @ m.forget_gate.f_a_proj.weight.T
    dt = c("mixer.hook_dt_low") @ m.forget_gate.f_b_proj.weight.T + m.forget_gate.dt_bias
    out["mixer.hook_dt_pre"] = dt.view(batch, length, H, N)
    keys = (H, N)
    convolved(out, c, m.conv1d.weight, [("q_", "q_pre", keys), ("k_", "k_pre", keys), ("", "x", (cfg.d_inner,))])
    delta_rule(out, c, cfg, H, m.forget_gate.A_log, by_key=True)
    normed_and_gated(out, c, cfg, m.o_norm.weight, cfg.eps, torch.sigmoid, m.o_proj)


def attention(out, c, m, cfg) -> None:
    n, (batch, length), R = c("ln1.hook_out"), TOKENS.shape, cfg.kv_latent
    H, V, E = cfg.n_heads, cfg.d_head, cfg.d_qk - cfg.d_shared_key
    if cfg.q_latent:
        out["attn.hook_q_latent"] = linear(n, m.q_a_proj)
        norm_rows(out, c, "attn.q_norm", c("attn.hook_q_latent"), m.q_a_layernorm.weight, 1e-6)
        q = linear(c("attn.q_norm.hook_out"), m.q_b_proj)
    else:
        q = linear(n, m.q_proj)
    out["attn.hook_q"] = q.view(batch, length, H, -1)
    both = linear(n, m.kv_a_proj_with_mqa)
    out["attn.hook_kv_latent"], out["attn.hook_k_shared"] = both[..., :R], both[..., R:]
    norm_rows(out, c, "attn.kv_norm", c("attn.hook_kv_latent"), m.kv_a_layernorm.weight, 1e-6)
    kv = linear(c("attn.kv_norm.hook_out"), m.kv_b_proj).view(batch, length, H, E + V)
    shared = c("attn.hook_k_shared")
    out["attn.hook_k"] = torch.stack([torch.cat([kv[:, :, h, :E], shared], -1) for h in range(H)], 2)
    out["attn.hook_v"] = kv[..., E:]
    scores = torch.full((batch, H, length, length), -torch.inf, dtype=torch.float64)
    for i in range(length):
        for j in range(i + 1):
            scores[:, :, i, j] = (c("attn.hook_q")[:, i] * c("attn.hook_k")[:, j]).sum(-1) / cfg.d_qk**0.5
    out["attn.hook_attn_scores"] = scores
    out["attn.hook_pattern"] = c("attn.hook_attn_scores").softmax(-1)
    out["attn.hook_z"] = torch.einsum("bhij,bjhv->bihv", c("attn.hook_pattern"), c("attn.hook_v"))
    out["hook_mixer_out"] = linear(c("attn.hook_z").flatten(2), m.o_proj)


def test_every_row_is_its_equation(model):
    battery.rows_are_their_equations(model, literal, TOKENS)


@pytest.mark.parametrize("layer", [0, 1], ids=["delta net", "attention"])
def test_after_an_edit_every_row_downstream_is_its_equation(layer):
    battery.edits_reach_every_row(tiny(), literal, layer, TOKENS)


@torch.no_grad()
def test_logits_are_transformers_which_scans_in_float32(model):
    tokens = torch.randint(40, (2, 90), generator=torch.Generator().manual_seed(4))  # more than a chunk
    assert relative(model(tokens), model.wrapped(tokens, use_cache=False).logits) < 2e-5


def test_gradients_are_transformers():
    battery.gradients_are_transformers(tiny(dtype=torch.float32), TOKENS)


@torch.no_grad()
def test_bfloat16_is_as_close_to_float32_as_transformers_is():
    model = tiny(dtype=torch.bfloat16)
    theirs = model.wrapped(TOKENS, use_cache=False).logits
    battery.half_precision_is_as_close_as_transformers_is(tiny(dtype=torch.float32), model, theirs, TOKENS)


def test_the_implicit_attention_reconstructs_every_layer(model):
    battery.attention_reconstructs_every_layer(model, TOKENS)


def test_a_patched_state_is_a_fresh_start_from_it():
    battery.a_patched_state_is_a_fresh_start_from_it(tiny(), TOKENS, 3)


def test_kinds_are_all_that_stand_in_a_model():
    seen = {kind for variant in VARIANTS for kind in tiny(variant).cfg.kinds}
    assert {str(kind) for kind in ROWS} == set(HookedKimiLinear.kinds())
    assert seen == set(ROWS)


def test_what_it_cannot_run_is_told_by_name():
    wrapped = tiny().wrapped
    wrapped.config.hidden_act = "gelu"
    with pytest.raises(gl.CheckpointError, match="hidden_act='gelu'"):
        gl.wrap(wrapped)


@torch.no_grad()
def test_a_saved_folder_is_opened(tmp_path):
    model = tiny(dtype=torch.float32)
    model.wrapped.save_pretrained(tmp_path)
    assert relative(gl.from_pretrained(str(tmp_path), device="cpu")(TOKENS), model(TOKENS)) < 1e-6

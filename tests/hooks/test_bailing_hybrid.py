"""Bailing hybrid: what differs from Kimi Linear by its literal equations, transformers' model, a state set for good."""

from __future__ import annotations

import math

import pytest
import torch

import gatedlens as gl
from gatedlens.hooks.bailing_hybrid import ROWS, HookedBailingHybrid
from tests.conftest import EVERY
from tests.helpers import relative
from tests.hooks import battery
from tests.hooks.literal import convolved, delta_rule, experts_by_groups, linear, mlp, norm_rows, normed_and_gated

pytestmark = pytest.mark.skipif("bailing_hybrid" not in EVERY, reason="this transformers has no Bailing hybrid")

TOKENS = torch.randint(40, (2, 11), generator=torch.Generator().manual_seed(0))
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale_all_dim": 1.0,
}
VARIANTS = {
    "tiny": {"num_experts": 4, "rms_norm_eps": 1e-6},
    "unbounded, narrow queries, groups of experts": {
        "num_experts": 4, "n_group": 2, "q_lora_rank": 5, "kda_safe_gate": False, "mlp_layer_types": ["sparse", "dense"],
    },
    "a longer context, experts everywhere": {"rope_parameters": YARN, "mlp_layer_types": ["sparse", "sparse"]},
    "another bound, narrow queries": {
        "kda_lower_bound": -2.0, "q_lora_rank": 5, "mlp_layer_types": ["sparse", "sparse"], "short_conv_kernel_size": 2,
    },
    "no experts, unbounded": {"kda_safe_gate": False, "mlp_layer_types": ["dense", "dense"]},
    "narrow queries, no experts": {"q_lora_rank": 5, "mlp_layer_types": ["dense", "dense"]},
}  # fmt: skip


def tiny(variant: str = "tiny", dtype: torch.dtype = torch.float64, seed: int = 1) -> HookedBailingHybrid:
    model = HookedBailingHybrid.tiny(seed=seed, dtype=dtype, **VARIANTS[variant])
    generator = torch.Generator().manual_seed(seed)
    for name, bias in model.wrapped.named_buffers():
        if name.endswith("e_score_correction_bias"):
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
    (delta_net if "delta" in kind.mixing else attention)(out, c, w.self_attn, model)
    out["hook_resid_mid"] = c("hook_resid_pre") + c("hook_mixer_out")
    out["hook_mlp_in"] = c("hook_resid_mid")
    norm_rows(out, c, "ln2", c("hook_mlp_in"), w.post_attention_layernorm.weight, eps)
    if kind.channels == "MLP":
        mlp(out, c, w.mlp, c("ln2.hook_out"))
    else:
        experts_by_groups(out, c, w.mlp, model.cfg)
    out["hook_resid_post"] = c("hook_resid_mid") + c("hook_mlp_out")
    return out


def delta_net(out, c, m, model) -> None:
    n, (batch, length), cfg = c("ln1.hook_out"), TOKENS.shape, model.cfg
    keys = (cfg.n_linear_heads, cfg.d_state)
    out["mixer.hook_q_pre"] = (n @ m.q_proj.weight.T).view(batch, length, *keys)
    out["mixer.hook_k_pre"] = (n @ m.k_proj.weight.T).view(batch, length, *keys)
    out["mixer.hook_x"] = n @ m.v_proj.weight.T
    out["mixer.hook_gate_pre"] = n @ m.g_proj.weight.T
    out["mixer.hook_beta_pre"] = n @ m.b_proj.weight.T
    dt = n @ m.forget_gate.f_proj.weight.T + m.forget_gate.dt_bias
    out["mixer.hook_dt_pre"] = dt.view(batch, length, *keys)
    convolved(out, c, m.conv1d.weight, [("q_", "q_pre", keys), ("k_", "k_pre", keys), ("", "x", (cfg.d_inner,))])
    delta_rule(out, c, cfg, keys[0], m.forget_gate.A_log, by_key=True)
    config = model.wrapped.config
    if config.kda_safe_gate:
        rates = torch.exp(m.forget_gate.A_log)[:, None]
        out["mixer.hook_dt"] = 1 / (1 + torch.exp(-rates * c("mixer.hook_dt_pre")))
        out["mixer.hook_log_decay"] = config.kda_lower_bound * c("mixer.hook_dt")
    normed_and_gated(out, c, cfg, m.o_norm.weight, cfg.eps, torch.sigmoid, m.o_proj)


def turned(x, inv_freq, scaling):
    """Neighbours turned by position; the first of each pair then stand before the second."""
    half = x.shape[-1] // 2
    firsts, seconds = [], []
    for j in range(half):
        angle = torch.arange(x.shape[1], dtype=torch.float64).view(1, -1, 1) * inv_freq[j].double()
        cos, sin = angle.cos() * scaling, angle.sin() * scaling
        a, b = x[..., 2 * j], x[..., 2 * j + 1]
        firsts.append(a * cos - b * sin)
        seconds.append(b * cos + a * sin)
    return torch.stack([*firsts, *seconds], -1)


def attention(out, c, m, model) -> None:
    n, (batch, length), cfg = c("ln1.hook_out"), TOKENS.shape, model.cfg
    H, R, E = cfg.n_heads, cfg.kv_latent, cfg.d_qk - cfg.d_shared_key
    rope = model.wrapped.model.rotary_emb
    out["attn.hook_gate_pre"] = n @ m.g_proj.weight.T
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
    given = (rope.inv_freq, rope.attention_scaling)
    still, turning = c("attn.hook_q")[..., :E], c("attn.hook_q")[..., E:]
    out["attn.hook_rot_q"] = torch.cat([still, turned(turning, *given)], -1)
    out["attn.hook_rot_k_shared"] = turned(c("attn.hook_k_shared").unsqueeze(2), *given)[:, :, 0]
    kv = linear(c("attn.kv_norm.hook_out"), m.kv_b_proj).view(batch, length, H, E + cfg.d_head)
    shared = c("attn.hook_rot_k_shared")
    out["attn.hook_k"] = torch.stack([torch.cat([kv[:, :, h, :E], shared], -1) for h in range(H)], 2)
    out["attn.hook_v"] = kv[..., E:]
    scale = cfg.d_qk**-0.5
    if model.wrapped.config.rope_parameters["rope_type"] == "yarn":
        scale *= (0.1 * math.log(4) + 1) ** 2
    scores = torch.full((batch, H, length, length), -torch.inf, dtype=torch.float64)
    for i in range(length):
        for j in range(i + 1):
            scores[:, :, i, j] = (c("attn.hook_rot_q")[:, i] * c("attn.hook_k")[:, j]).sum(-1) * scale
    out["attn.hook_attn_scores"] = scores
    out["attn.hook_pattern"] = c("attn.hook_attn_scores").softmax(-1)
    out["attn.hook_z"] = torch.einsum("bhij,bjhv->bihv", c("attn.hook_pattern"), c("attn.hook_v"))
    out["attn.hook_gate"] = 1 / (1 + torch.exp(-c("attn.hook_gate_pre")))
    out["attn.hook_gated"] = c("attn.hook_z") * c("attn.hook_gate")[..., None]
    out["hook_mixer_out"] = linear(c("attn.hook_gated").flatten(2), m.o_proj)


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


def test_every_split_continues():
    battery.every_split_continues(tiny(), TOKENS)


@pytest.mark.parametrize("listening", [False, True])
def test_padding_holes_and_documents(listening):
    battery.padding_and_holes_count_for_nothing(tiny(), TOKENS, listening)
    battery.packed_documents_stand_alone(tiny(), TOKENS, listening)


def test_kinds_are_all_that_stand_in_a_model():
    seen = {kind for variant in VARIANTS for kind in tiny(variant).cfg.kinds}
    assert {str(kind) for kind in ROWS} == set(HookedBailingHybrid.kinds()) and seen == set(ROWS)


@torch.no_grad()
def test_a_saved_folder_is_opened(tmp_path):
    model = tiny(dtype=torch.float32)
    model.wrapped.save_pretrained(tmp_path)
    opened = gl.from_pretrained(str(tmp_path), device="cpu")
    assert isinstance(opened, HookedBailingHybrid) and relative(opened(TOKENS), model(TOKENS)) < 1e-6
    assert gl.inspect(str(tmp_path)).parameters == sum(p.numel() for p in model.wrapped.parameters())


def test_what_it_cannot_run_is_told_by_name():
    wrapped = tiny().wrapped
    wrapped.config.hidden_act = "gelu"
    with pytest.raises(gl.CheckpointError, match="hidden_act='gelu'"):
        gl.wrap(wrapped)
    wrapped = tiny().wrapped
    wrapped.model.rotary_emb.rope_type = "dynamic"
    with pytest.raises(gl.CheckpointError, match="rope_type='dynamic'"):
        gl.wrap(wrapped)

"""Kimi Linear: every row against its literal equation, transformers' model, a state set for good, what is not opened."""

from __future__ import annotations

import copy

import pytest
import torch

import gatedlens as gl
from gatedlens.hooks.kimi_linear import ROWS, HookedKimiLinear
from tests.helpers import relative
from tests.hooks.literal import block_rows_hold, block_rows_hold_after_edits, rms

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


def silu(x):
    return x * torch.sigmoid(x)


def norm_rows(out, c, part, x, weight, eps):
    out[f"{part}.hook_scale"] = rms(x, eps)
    out[f"{part}.hook_normalized"] = x / c(f"{part}.hook_scale")
    out[f"{part}.hook_out"] = weight * c(f"{part}.hook_normalized")


def literal(cache, model, layer: int) -> dict[str, torch.Tensor]:
    """Every row of one block from its equation, with loops, reading the rows it names from the cache."""
    w, kind, out, eps = model.wrapped.model.layers[layer], model.cfg.kinds[layer], {}, model.cfg.eps

    def c(name):
        return cache[f"blocks.{layer}.{name}"]

    out["hook_resid_pre"] = cache["hook_embed"] if layer == 0 else cache["resid_post", layer - 1]
    out["hook_mixer_in"] = c("hook_resid_pre")
    norm_rows(out, c, "ln1", c("hook_mixer_in"), w.input_layernorm.weight, eps)
    (delta_net if kind.mixing == "delta net" else attention)(out, c, w.self_attn, model.cfg)
    out["hook_resid_mid"] = c("hook_resid_pre") + c("hook_mixer_out")
    out["hook_mlp_in"] = c("hook_resid_mid")
    norm_rows(out, c, "ln2", c("hook_mlp_in"), w.post_attention_layernorm.weight, eps)
    (mlp if kind.channels == "MLP" else experts)(out, c, w.mlp, model.cfg)
    out["hook_resid_post"] = c("hook_resid_mid") + c("hook_mlp_out")
    return out


def delta_net(out, c, m, cfg) -> None:
    n, (batch, length) = c("ln1.hook_out"), TOKENS.shape
    H, N, V, K = cfg.n_linear_heads, cfg.d_state, cfg.sizes["value"], cfg.d_conv
    out["mixer.hook_q_pre"] = (n @ m.q_proj.weight.T).view(batch, length, H, N)
    out["mixer.hook_k_pre"] = (n @ m.k_proj.weight.T).view(batch, length, H, N)
    out["mixer.hook_x"] = n @ m.v_proj.weight.T
    out["mixer.hook_gate_low"] = n @ m.g_a_proj.weight.T
    out["mixer.hook_gate_pre"] = c("mixer.hook_gate_low") @ m.g_b_proj.weight.T
    out["mixer.hook_beta_pre"] = n @ m.b_proj.weight.T
    out["mixer.hook_dt_low"] = n @ m.forget_gate.f_a_proj.weight.T
    dt = c("mixer.hook_dt_low") @ m.forget_gate.f_b_proj.weight.T + m.forget_gate.dt_bias
    out["mixer.hook_dt_pre"] = dt.view(batch, length, H, N)
    streams = {"q_": ("q_pre", (H, N), 0), "k_": ("k_pre", (H, N), H * N), "": ("x", (H * V,), 2 * H * N)}
    for name, (before, shape, first) in streams.items():
        x = c(f"mixer.hook_{before}").flatten(2)
        taps = torch.zeros(batch, length, x.shape[-1], K, dtype=torch.float64)
        for t in range(length):
            for k in range(max(0, K - 1 - t), K):
                taps[:, t, :, k] = m.conv1d.weight[first : first + x.shape[-1], 0, k] * x[:, t - (K - 1) + k]
        out[f"mixer.hook_{name}conv_taps"] = taps.unflatten(2, shape)
        out[f"mixer.hook_{name}conv"] = c(f"mixer.hook_{name}conv_taps").sum(-1)
    out["mixer.hook_u"] = silu(c("mixer.hook_conv"))
    for name in "qk":
        act = silu(c(f"mixer.hook_{name}_conv"))
        out[f"mixer.hook_{name}"] = act / (act.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt()
    out["mixer.hook_beta"] = 1 / (1 + torch.exp(-c("mixer.hook_beta_pre")))
    out["mixer.hook_dt"] = torch.log1p(torch.exp(c("mixer.hook_dt_pre")))
    out["mixer.hook_log_decay"] = torch.stack(
        [-torch.exp(m.forget_gate.A_log[0, 0, h, 0]) * c("mixer.hook_dt")[:, :, h] for h in range(H)], 2
    )
    out["mixer.hook_reset"] = torch.zeros(batch, length, 1, dtype=torch.float64)
    out["mixer.hook_state_start"] = torch.zeros(batch, H, V, N, dtype=torch.float64)
    decay, write, erase, states = (torch.zeros(batch, length, H, V, N, dtype=torch.float64) for _ in range(4))
    probe, scan = (
        torch.zeros(batch, length, H, N, dtype=torch.float64),
        torch.zeros(batch, length, H, V, dtype=torch.float64),
    )
    u = c("mixer.hook_u").view(batch, length, H, V)
    for b in range(batch):
        for t in range(length):
            for h in range(H):
                beta, k = c("mixer.hook_beta")[b, t, h], c("mixer.hook_k")[b, t, h]
                kept = torch.exp(c("mixer.hook_log_decay")[b, t, h]) * (1 - c("mixer.hook_reset")[b, t])
                decay[b, t, h] = kept.expand(V, N)
                probe[b, t, h] = kept * k
                erase[b, t, h] = (beta * k).expand(V, N)
                for v in range(V):
                    write[b, t, h, v] = u[b, t, h, v] * beta * k
                    before = c("mixer.hook_state")[b, t - 1, h, v] if t else c("mixer.hook_state_start")[b, h, v]
                    found = (c("mixer.hook_probe")[b, t, h] * before).sum()
                    states[b, t, h, v] = (
                        c("mixer.hook_decay")[b, t, h, v] * before
                        - c("mixer.hook_erase")[b, t, h, v] * found
                        + c("mixer.hook_write")[b, t, h, v]
                    )
                    scan[b, t, h, v] = c("mixer.hook_state")[b, t, h, v] @ c("mixer.hook_q")[b, t, h] / N**0.5
    rows = {"decay": decay, "write": write, "erase": erase, "probe": probe, "state": states, "scan": scan.flatten(2)}
    out |= {f"mixer.hook_{name}": value for name, value in rows.items()}
    out["mixer.hook_y"] = c("mixer.hook_scan")
    scan = c("mixer.hook_y").view(batch, length, H, V)
    out["mixer.hook_scale"] = rms(scan, cfg.eps).squeeze(-1)
    out["mixer.hook_normed"] = (m.o_norm.weight * scan / c("mixer.hook_scale")[..., None]).flatten(2)
    out["mixer.hook_gate"] = torch.sigmoid(c("mixer.hook_gate_pre"))
    out["mixer.hook_gated"] = c("mixer.hook_normed") * c("mixer.hook_gate")
    out["hook_mixer_out"] = c("mixer.hook_gated") @ m.o_proj.weight.T


def attention(out, c, m, cfg) -> None:
    n, (batch, length), R = c("ln1.hook_out"), TOKENS.shape, cfg.kv_latent
    H, V, E = cfg.n_heads, cfg.d_head, cfg.d_qk - cfg.d_shared_key
    if cfg.q_latent:
        out["attn.hook_q_latent"] = F(n, m.q_a_proj)
        norm_rows(out, c, "attn.q_norm", c("attn.hook_q_latent"), m.q_a_layernorm.weight, 1e-6)
        q = F(c("attn.q_norm.hook_out"), m.q_b_proj)
    else:
        q = F(n, m.q_proj)
    out["attn.hook_q"] = q.view(batch, length, H, -1)
    both = F(n, m.kv_a_proj_with_mqa)
    out["attn.hook_kv_latent"], out["attn.hook_k_shared"] = both[..., :R], both[..., R:]
    norm_rows(out, c, "attn.kv_norm", c("attn.hook_kv_latent"), m.kv_a_layernorm.weight, 1e-6)
    kv = F(c("attn.kv_norm.hook_out"), m.kv_b_proj).view(batch, length, H, E + V)
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
    out["hook_mixer_out"] = F(c("attn.hook_z").flatten(2), m.o_proj)


def F(x, linear):
    return x @ linear.weight.T + (0 if linear.bias is None else linear.bias)


def mlp(out, c, m, cfg) -> None:
    read = c("ln2.hook_out")
    out["mlp.hook_pre"], out["mlp.hook_pre_linear"] = read @ m.gate_proj.weight.T, read @ m.up_proj.weight.T
    out["mlp.hook_post"] = silu(c("mlp.hook_pre")) * c("mlp.hook_pre_linear")
    out["hook_mlp_out"] = c("mlp.hook_post") @ m.down_proj.weight.T


def experts(out, c, m, cfg) -> None:
    read, width, total = c("ln2.hook_out"), cfg.d_expert, cfg.n_experts
    out["mlp.hook_router"] = read @ m.gate.weight.T
    shares = torch.sigmoid(c("mlp.hook_router"))
    weights, size = torch.zeros_like(shares), total // cfg.n_expert_groups
    for b in range(shares.shape[0]):
        for t in range(shares.shape[1]):
            choice = (shares[b, t] + m.gate.e_score_correction_bias).tolist()
            best = {g: sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(cfg.n_expert_groups)}
            kept = sorted(best, key=lambda g: -best[g])[: cfg.n_groups_per_token]
            some = [e for e in range(total) if e // size in kept]
            chosen = sorted(some, key=lambda e: -choice[e])[: cfg.n_experts_per_token]
            whole = sum(shares[b, t, e] for e in chosen) if cfg.normalised_weights else 1
            for e in chosen:
                weights[b, t, e] = cfg.weights_scale * shares[b, t, e] / whole
    out["mlp.hook_expert_weights"] = weights
    up, down = m.experts.gate_up_proj, m.experts.down_proj
    out["mlp.experts.hook_pre"] = torch.stack([read @ up[e, :width].T for e in range(total)], 2)
    out["mlp.experts.hook_pre_linear"] = torch.stack([read @ up[e, width:].T for e in range(total)], 2)
    out["mlp.experts.hook_post"] = silu(c("mlp.experts.hook_pre")) * c("mlp.experts.hook_pre_linear")
    out["mlp.hook_experts"] = torch.stack([c("mlp.experts.hook_post")[:, :, e] @ down[e].T for e in range(total)], 2)
    shared = m.shared_experts
    out["mlp.shared.hook_pre"] = read @ shared.gate_proj.weight.T
    out["mlp.shared.hook_pre_linear"] = read @ shared.up_proj.weight.T
    out["mlp.shared.hook_post"] = silu(c("mlp.shared.hook_pre")) * c("mlp.shared.hook_pre_linear")
    of_all = (c("mlp.hook_expert_weights")[..., None] * c("mlp.hook_experts")).sum(2)
    out["hook_mlp_out"] = of_all + c("mlp.shared.hook_post") @ shared.down_proj.weight.T


def test_every_row_is_its_equation(model):
    block_rows_hold(model, literal, TOKENS)


@pytest.mark.parametrize("layer", [0, 1], ids=["delta net", "attention"])
def test_after_an_edit_every_row_downstream_is_its_equation(layer):
    block_rows_hold_after_edits(tiny(), literal, TOKENS, layer)


@torch.no_grad()
def test_logits_are_transformers_which_scans_in_float32(model):
    tokens = torch.randint(40, (2, 90), generator=torch.Generator().manual_seed(4))  # more than a chunk
    assert relative(model(tokens), model.wrapped(tokens, use_cache=False).logits) < 2e-5


def test_gradients_are_transformers():
    ours = tiny(dtype=torch.float32)
    other = copy.deepcopy(ours.wrapped)
    weight = torch.randn(*TOKENS.shape, 40, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((ours(TOKENS) * weight).sum(), list(ours.wrapped.parameters()))
    wanted = torch.autograd.grad((other(TOKENS, use_cache=False).logits * weight).sum(), list(other.parameters()))
    for (name, _), a, b in zip(other.named_parameters(), found, wanted, strict=True):
        assert relative(a, b) < 1e-4, name


@torch.no_grad()
def test_bfloat16_is_as_close_to_float32_as_transformers_is():
    exact = tiny(dtype=torch.float32)(TOKENS)
    model = tiny(dtype=torch.bfloat16)
    got, want = model(TOKENS), model.wrapped(TOKENS, use_cache=False).logits
    assert relative(got, exact) < 1.5 * max(relative(want.float(), exact), 1e-2)


@torch.no_grad()
def test_the_implicit_attention_reconstructs_every_layer(model):
    _, cache = model.run_with_cache(TOKENS)
    _, state = model(TOKENS[:, :4], return_state=True)
    _, later = model.run_with_cache(TOKENS[:, 4:], state=state)
    for layer in range(2):
        for given in (cache, later):
            assert gl.implicit_attention(given, layer=layer).check().relative < 1e-12


@torch.no_grad()
def test_a_patched_state_is_a_fresh_start_from_it():
    model = tiny()
    new = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    _, before = model(TOKENS[:, :4], return_state=True)
    with gl.states.patch(new, pos=3, layers=0).on(model):
        scan = model.run_with_cache(TOKENS, names_filter="*.hook_scan")[1]["scan", 0]
    before["scan", 0] = new
    fresh = model.run_with_cache(TOKENS[:, 4:], state=before, names_filter="*.hook_scan")[1]["scan", 0]
    assert relative(scan[:, 4:], fresh) < 1e-12


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

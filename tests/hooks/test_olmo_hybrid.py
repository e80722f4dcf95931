"""OLMo-hybrid: every row against its literal equation, transformers' model, padding, documents, states, edits, folders."""

from __future__ import annotations

import json

import pytest
import torch

import gatedlens as gl
from gatedlens.hooks.olmo_hybrid import OLMO_HYBRID, HookedOlmoHybrid
from tests.conftest import EVERY
from tests.helpers import relative
from tests.hooks import battery
from tests.hooks.literal import convolved, delta_rule, mlp, norm_rows, normed_and_gated, rms, silu

pytestmark = pytest.mark.skipif("olmo_hybrid" not in EVERY, reason="this transformers has no OLMo-hybrid")

TOKENS = torch.randint(40, (2, 11), generator=torch.Generator().manual_seed(0))
VARIANTS = {
    "tiny": {},
    "beta below 1, no positions": {
        "linear_allow_neg_eigval": False, "rope_parameters": {"rope_type": "default", "rope_theta": None}, "rms_norm_eps": 1e-6,
    },
    "biases": {"attention_bias": True},
    "shared keys, the other way round": {
        "linear_num_key_heads": 2, "layer_types": ["full_attention", "linear_attention"], "num_key_value_heads": 2,
        "linear_conv_kernel_dim": 2,
    },
}  # fmt: skip


def tiny(variant: str = "tiny", dtype: torch.dtype = torch.float64) -> HookedOlmoHybrid:
    model = HookedOlmoHybrid.tiny(seed=1, dtype=dtype, **VARIANTS[variant])
    if variant == "biases":  # transformers makes them 0
        for name, bias in model.wrapped.named_parameters():
            if name.endswith("proj.bias"):
                torch.nn.init.normal_(bias, generator=torch.Generator().manual_seed(len(name)))
    return model


@pytest.fixture(params=VARIANTS)
def model(request):
    return tiny(request.param)


def literal(cache, model, layer: int) -> dict[str, torch.Tensor]:
    """Every row of one block from its equation, with loops, reading the rows it names from the cache."""
    w, eps, out = model.wrapped.model.layers[layer], model.wrapped.config.rms_norm_eps, {}

    def c(name):
        return cache[f"blocks.{layer}.{name}"]

    if layer > 0:
        out["hook_resid_pre"] = cache["resid_post", layer - 1]
    out["hook_mixer_in"], out["hook_mlp_in"] = c("hook_resid_pre"), c("hook_resid_mid")
    if "delta net" in model.cfg.kinds[layer]:
        norm_rows(out, c, "ln1", c("hook_mixer_in"), w.input_layernorm.weight, eps)
        delta_net(out, c, w.linear_attn, model)
        norm_rows(out, c, "ln2", c("hook_mlp_in"), w.post_attention_layernorm.weight, eps)
        mlp(out, c, w.mlp, c("ln2.hook_out"))
    else:
        attention(out, c, w, model)
        mlp(out, c, w.mlp, c("hook_mlp_in"), "put out")
        norm_rows(out, c, "ln2_post", out.pop("put out"), w.post_feedforward_layernorm.weight, eps)
        out["hook_mlp_out"] = c("ln2_post.hook_out")
    out["hook_resid_mid"] = c("hook_resid_pre") + c("hook_mixer_out")
    out["hook_resid_post"] = c("hook_resid_mid") + c("hook_mlp_out")
    return out


def delta_net(out, c, m, model) -> None:
    n, config, cfg = c("ln1.hook_out"), model.wrapped.config, model.cfg
    keys = (config.linear_num_key_heads, config.linear_key_head_dim)
    out["mixer.hook_q_pre"] = (n @ m.q_proj.weight.T).unflatten(-1, keys)
    out["mixer.hook_k_pre"] = (n @ m.k_proj.weight.T).unflatten(-1, keys)
    out["mixer.hook_x"], out["mixer.hook_gate_pre"] = n @ m.v_proj.weight.T, n @ m.g_proj.weight.T
    out["mixer.hook_beta_pre"], out["mixer.hook_dt_pre"] = n @ m.b_proj.weight.T, n @ m.a_proj.weight.T + m.dt_bias
    channels = (cfg.sizes["channel"],)
    convolved(out, c, m.conv1d.weight, [("q_", "q_pre", keys), ("k_", "k_pre", keys), ("", "x", channels)])
    delta_rule(out, c, cfg, keys[0], m.A_log, beta=2.0 if config.linear_allow_neg_eigval else 1.0)
    normed_and_gated(out, c, cfg, m.o_norm.weight, m.o_norm.variance_epsilon, silu, m.o_proj)


def attention(out, c, w, model) -> None:
    m, n, config = w.self_attn, c("hook_mixer_in"), model.wrapped.config
    H, G, D = config.num_attention_heads, config.num_key_value_heads, m.head_dim
    for name, heads, projection in (("q", H, m.q_proj), ("k", G, m.k_proj), ("v", G, m.v_proj)):
        out[f"attn.hook_{name}"] = torch.nn.functional.linear(n, projection.weight, projection.bias).unflatten(
            -1, (heads, D)
        )
    names = {}
    for name, norm in (("q", m.q_norm), ("k", m.k_norm)):
        x = c(f"attn.hook_{name}")
        out[f"attn.{name}_norm.hook_scale"] = rms(x.flatten(2), config.rms_norm_eps)
        out[f"attn.{name}_norm.hook_normalized"] = x / c(f"attn.{name}_norm.hook_scale").unsqueeze(-1)
        out[f"attn.{name}_norm.hook_out"] = c(f"attn.{name}_norm.hook_normalized") * norm.weight.view(x.shape[2:])
        names[name] = c(f"attn.{name}_norm.hook_out")
        if config.rope_parameters["rope_theta"] is not None:
            out[f"attn.hook_rot_{name}"] = turned(names[name], config.rope_parameters["rope_theta"])
            names[name] = c(f"attn.hook_rot_{name}")
    batch, length = TOKENS.shape
    scores = torch.full((batch, H, length, length), -torch.inf, dtype=torch.float64)
    z = torch.zeros(batch, length, H, D, dtype=torch.float64)
    for h in range(H):
        g = h // (H // G)
        for i in range(length):
            for j in range(i + 1):
                scores[:, h, i, j] = (names["q"][:, i, h] * names["k"][:, j, g]).sum(-1) / D**0.5
            for j in range(length):
                z[:, i, h] += c("attn.hook_pattern")[:, h, i, j, None] * c("attn.hook_v")[:, j, g]
    out["attn.hook_attn_scores"], out["attn.hook_z"] = scores, z
    out["attn.hook_pattern"] = c("attn.hook_attn_scores").softmax(-1)
    put_out = torch.nn.functional.linear(c("attn.hook_z").flatten(2), m.o_proj.weight, m.o_proj.bias)
    norm_rows(out, c, "ln1_post", put_out, w.post_attention_layernorm.weight, config.rms_norm_eps)
    out["hook_mixer_out"] = c("ln1_post.hook_out")


def turned(x, theta):
    """Each pair (j, j + D / 2) of a head turned by position * theta^(-2j / D)."""
    half, out = x.shape[-1] // 2, x.clone()
    for t in range(x.shape[1]):
        for j in range(half):
            angle = t * torch.tensor(theta ** (-j / half), dtype=torch.float32).double()  # transformers keeps float32
            a, b = x[:, t, :, j], x[:, t, :, j + half]
            out[:, t, :, j], out[:, t, :, j + half] = (
                a * angle.cos() - b * angle.sin(),
                b * angle.cos() + a * angle.sin(),
            )
    return out


def theirs(model, tokens):
    return model.wrapped(tokens, use_cache=False).logits


# -- rows, transformers ---------------------------------------------------------------------------------------------


def test_every_row_is_its_equation(model):
    battery.rows_are_their_equations(model, literal, TOKENS)


@pytest.mark.parametrize("layer", [0, 1], ids=["delta net", "attention"])
def test_after_an_edit_every_row_downstream_is_its_equation(layer):
    battery.edits_reach_every_row(tiny(), literal, layer, TOKENS)


@pytest.mark.parametrize("point", ["erase", "probe", "decay", "write", "state_start"])
def test_a_lazy_point_heard_alone_is_the_same_edit(point):
    battery.a_lazy_point_alone_is_the_same_edit(tiny(), point, TOKENS)


@torch.no_grad()
def test_logits_are_transformers_which_scans_in_float32(model):
    tokens = torch.randint(40, (2, 90), generator=torch.Generator().manual_seed(4))  # more than a chunk
    assert relative(model(tokens), theirs(model, tokens)) < 2e-5


def test_beta_turns_round_what_a_step_finds():
    model = tiny()
    with torch.no_grad():
        beta = model.run_with_cache(TOKENS)[1]["beta", 0]
    assert 1 < beta.max() < 2 and beta.min() > 0


def test_gradients_are_transformers():
    battery.gradients_are_transformers(tiny(dtype=torch.float32), TOKENS)


def test_gradcheck_of_what_a_scan_is_made_of():
    battery.gradients_are_those_of_the_function(tiny(), TOKENS)


@torch.no_grad()
def test_bfloat16_is_as_close_to_float32_as_transformers_is():
    model = tiny(dtype=torch.bfloat16)
    battery.half_precision_is_as_close_as_transformers_is(
        tiny(dtype=torch.float32), model, theirs(model, TOKENS), TOKENS
    )


# -- the operator, padding, documents, states -----------------------------------------------------------------------


def test_the_implicit_attention_reconstructs_every_layer(model):
    battery.attention_reconstructs_every_layer(model, TOKENS)


@torch.no_grad()
def test_contributions_are_what_a_layer_normed_behind_writes():
    """What each token writes, and the bias, stands behind the norm, with its scale held; so do knockouts of an edge."""
    model = tiny("biases")
    cache = model.run_with_cache(TOKENS)[1]
    F = gl.implicit_attention(cache, layer=1).contributions()
    out, scale = cache["mixer_out", 1], cache["blocks.1.ln1_post.hook_scale"]
    assert relative(F.output(), out) < 1e-12
    assert relative(F.row(-1).sum(1) + F.remainder()[:, -1], out[:, -1]) < 1e-12
    assert relative(F.remainder().std(1).max(), F.remainder().abs().max()) < 1, "the bias's part goes by the position"
    assert relative(torch.cat(list(F.blocks(max_bytes=None)), dim=1)[:, 7], F.row(7)) < 1e-12
    direction = torch.linspace(-1, 1, 16, dtype=torch.float64)
    assert relative(F.along(direction)[:, 7], F.row(7) @ direction) < 1e-12
    through = F.through(torch.tensor([7, 7]), direction.expand(2, -1)).sum(1)
    assert relative(through, F.row(7) @ direction) < 1e-12
    w, v = model.wrapped.model.layers[1], cache["blocks.1.attn.hook_v"]
    z = cache["blocks.1.attn.hook_pattern"][:, :, 7, 3, None] * v[:, 3]
    written = w.post_attention_layernorm.weight * (z.flatten(1) @ w.self_attn.o_proj.weight.T) / scale[:, 7]
    assert relative(F.row(7)[:, 3], written) < 1e-12
    held = ("blocks.1.ln1_post.hook_scale", lambda x, hook: scale)
    with gl.knockout.cut(3, 7, layers=1).on(model), model.hooks([held]):
        cut = model.run_with_cache(TOKENS)[1]["mixer_out", 1]
    assert relative(out[:, 7] - cut[:, 7], written) < 1e-10


@torch.no_grad()
def test_with_biases_the_stream_is_the_sum_of_its_parts():
    model = tiny("biases")
    cache = model.run_with_cache(TOKENS)[1]
    parts, labels = cache.get_full_resid_decomposition(expand_neurons=False, return_labels=True)
    assert labels[-1] == "bias" and relative(parts.sum(0), cache["resid_post", -1]) < 1e-12
    by = gl.lens.token_attribution(model, cache, 3)
    assert by.facts["error"] < 1e-10 and by.values[:, :, -1].abs().max() > 0.01, "the bias is in what no token brings"
    assert gl.verify(model, TOKENS).passed


@pytest.mark.parametrize("listening", [False, True], ids=["", "inside"])
def test_padding_and_holes_count_for_nothing(model, listening):
    battery.padding_and_holes_count_for_nothing(model, TOKENS, listening)


def test_what_a_hook_does_at_padding_reaches_nobody():
    points = ("q_pre", "k_pre", "k", "beta", "dt", "log_decay", "decay", "write", "erase", "probe")
    battery.what_a_hook_does_at_padding_reaches_nobody(tiny(), TOKENS, points)


@pytest.mark.parametrize("listening", [False, True], ids=["", "inside"])
def test_packed_documents_are_as_if_each_stood_alone(model, listening):
    battery.packed_documents_stand_alone(model, TOKENS, listening)


def test_every_split_continues(model):
    battery.every_split_continues(model, TOKENS)


def test_generation_is_that_of_the_whole_prompt():
    battery.generation_is_that_of_the_whole_prompt(tiny(), TOKENS)


@pytest.mark.parametrize("pos", [0, 3, 9])
def test_a_patched_state_is_a_fresh_start_from_it(pos):
    battery.a_patched_state_is_a_fresh_start_from_it(tiny(), TOKENS, pos)


# -- folders, refusals ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_folder_is_read(tmp_path):
    given = tiny("shared keys, the other way round", torch.float32)
    for layer in given.wrapped.model.layers[1:]:  # what a config cannot say
        layer.linear_attn.o_norm.variance_epsilon = 1e-5
    given = gl.wrap(given.wrapped)
    given.wrapped.save_pretrained(tmp_path)
    model = gl.from_pretrained(tmp_path, device="cpu")
    assert isinstance(model, HookedOlmoHybrid) and relative(model(TOKENS), given(TOKENS)) < 1e-6
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**6}))
    with pytest.raises(gl.CheckpointError, match="num_hidden_layers"):
        gl.from_pretrained(tmp_path, device="cpu")


def test_kinds_are_all_that_stand_in_a_model():
    seen = {kind for variant in VARIANTS for kind in tiny(variant).cfg.kinds}
    assert seen == set(OLMO_HYBRID.rows) == set(HookedOlmoHybrid.kinds())


def test_what_it_cannot_run_is_told_by_name():
    with pytest.raises(gl.InputError, match="behind the bias of layer 1 stands ln1_post.hook_scale"):
        tiny("biases").accumulated_bias(2)
    with pytest.raises(gl.CheckpointError, match="hidden_act='gelu'|'gelu'"):
        HookedOlmoHybrid.tiny(hidden_act="gelu")

"""Jamba: every row against its literal equation, transformers in true float64 and where it is wrong, padding, documents."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import gatedlens as gl
from gatedlens.hooks.jamba import HookedJamba
from tests.helpers import padded, relative
from tests.hooks import battery
from tests.hooks import literal as literally

TOKENS = torch.randint(40, (2, 11), generator=torch.Generator().manual_seed(0))
VARIANTS = {
    "tiny": {"num_experts": 4},
    "the other way round": {"attn_layer_offset": 0, "expert_layer_offset": 0, "mamba_proj_bias": True, "num_experts": 3},
    "no experts, no bias": {"num_experts": 1, "mamba_conv_bias": False, "mamba_d_conv": 2},
    "experts everywhere": {"expert_layer_period": 1, "expert_layer_offset": 0},
}  # fmt: skip


def tiny(variant: str = "tiny", dtype: torch.dtype = torch.float64, **sizes) -> HookedJamba:
    model = HookedJamba.tiny(seed=1, dtype=dtype, **VARIANTS[variant], **sizes)
    model.wrapped.config._experts_implementation = "eager"
    return model


@pytest.fixture(params=VARIANTS)
def model(request):
    return tiny(request.param)


def literal(cache, model, layer: int) -> dict[str, torch.Tensor]:
    """Every row of one block from its equation, with loops, reading the rows it names from the cache."""
    out, w, cfg = {}, model.wrapped.model.layers[layer], model.cfg

    def c(name):
        return cache[f"blocks.{layer}.{name}"]

    literally.around(out, c, cache, layer, (("mixer",), ("mlp",)))
    literally.norm_rows(out, c, "ln1", c("hook_mixer_in"), w.input_layernorm.weight, cfg.eps)
    if "mamba" in w._modules:
        mamba(out, c, w.mamba, cfg.eps)
    else:
        literally.attention(out, c, w.self_attn, c("ln1.hook_out"), cfg.d_head)
        out["hook_mixer_out"] = literally.linear(c("attn.hook_z").flatten(2), w.self_attn.o_proj)
    literally.norm_rows(out, c, "ln2", c("hook_mlp_in"), w.pre_ff_layernorm.weight, cfg.eps)
    m, read = w.feed_forward, c("ln2.hook_out")
    if "experts" in m._modules:
        out["mlp.hook_router"] = read @ m.router.weight.T
        shares = torch.softmax(c("mlp.hook_router"), -1)
        out["mlp.hook_expert_weights"] = literally.chosen(shares, shares, cfg.n_experts_per_token, normalised=False)
        literally.experts(out, c, m.experts, read)
        out["hook_mlp_out"] = literally.of_experts(c)
    else:
        literally.mlp(out, c, m, read)
    return out


def mamba(out, c, m, eps: float) -> None:
    """Mamba's mixer with a norm of dt, B and C, a position at a time."""
    batch, length = TOKENS.shape
    given = literally.linear(c("ln1.hook_out"), m.in_proj)
    channels, (R, N) = given.shape[-1] // 2, (m.dt_proj.weight.shape[1], m.A_log.shape[1])
    out["mixer.hook_x"], out["mixer.hook_gate_pre"] = given[..., :channels], given[..., channels:]
    out["mixer.hook_conv_taps"] = literally.conv_taps(c("mixer.hook_x"), m.conv1d.weight)
    out["mixer.hook_conv"] = c("mixer.hook_conv_taps").sum(-1) + (0 if m.conv1d.bias is None else m.conv1d.bias)
    out["mixer.hook_u"] = literally.silu(c("mixer.hook_conv"))
    selected = c("mixer.hook_u") @ m.x_proj.weight.T
    out["mixer.hook_dt_rank"] = selected[..., :R]
    out["mixer.hook_B_pre"], out["mixer.hook_C_pre"] = selected[..., R : R + N], selected[..., R + N :]
    for part, reads, norm in (
        ("dt_norm", "dt_rank", m.dt_layernorm), ("B_norm", "B_pre", m.b_layernorm), ("C_norm", "C_pre", m.c_layernorm),
    ):  # fmt: skip
        literally.norm_rows(out, c, f"mixer.{part}", c(f"mixer.hook_{reads}"), norm.weight, eps)
    out["mixer.hook_B"], out["mixer.hook_C"] = c("mixer.B_norm.hook_out"), c("mixer.C_norm.hook_out")
    out["mixer.hook_dt_pre"] = literally.linear(c("mixer.dt_norm.hook_out"), m.dt_proj)
    out["mixer.hook_dt"] = torch.log1p(torch.exp(c("mixer.hook_dt_pre")))
    out["mixer.hook_reset"] = torch.zeros(batch, length, 1, dtype=torch.float64)
    out["mixer.hook_state_start"] = torch.zeros(batch, channels, N, dtype=torch.float64)
    dt, kept = c("mixer.hook_dt")[..., None], 1 - c("mixer.hook_reset")[..., None]
    out["mixer.hook_decay"] = torch.exp(dt * -torch.exp(m.A_log)) * kept
    out["mixer.hook_write"] = dt * c("mixer.hook_B")[:, :, None] * c("mixer.hook_u")[..., None]
    states = []
    for t in range(length):
        before = c("mixer.hook_state")[:, t - 1] if t else c("mixer.hook_state_start")
        states.append(c("mixer.hook_decay")[:, t] * before + c("mixer.hook_write")[:, t])
    out["mixer.hook_state"] = torch.stack(states, 1)
    out["mixer.hook_scan"] = (c("mixer.hook_state") * c("mixer.hook_C")[:, :, None]).sum(-1)
    out["mixer.hook_y"] = c("mixer.hook_scan") + m.D * c("mixer.hook_u")
    out["mixer.hook_gate"] = literally.silu(c("mixer.hook_gate_pre"))
    out["mixer.hook_gated"] = c("mixer.hook_y") * c("mixer.hook_gate")
    out["hook_mixer_out"] = literally.linear(c("mixer.hook_gated"), m.out_proj)


def test_every_row_is_its_equation(model):
    battery.rows_are_their_equations(model, literal, TOKENS)


@pytest.mark.parametrize("layer", [0, 1], ids=["Mamba", "attention"])
def test_after_an_edit_every_row_downstream_is_its_equation(layer):
    battery.edits_reach_every_row(tiny(), literal, layer, TOKENS)


def test_kinds_are_all_that_stand_in_a_model():
    assert {kind for variant in VARIANTS for kind in tiny(variant).cfg.kinds} == set(HookedJamba.kinds())


@torch.no_grad()
def test_logits_are_transformers_in_true_float64(model):
    with battery.true_float64():
        want = model.wrapped(TOKENS, use_cache=False).logits
    assert relative(model(TOKENS), want) < 1e-12


def test_gradients_are_transformers():
    battery.gradients_are_transformers(tiny(dtype=torch.float32), TOKENS)


@torch.no_grad()
def test_half_precision_is_as_close_as_transformers_is():
    every = {"num_experts_per_tok": 4}  # which experts are chosen hangs on rounding
    model = tiny(dtype=torch.bfloat16, **every)
    theirs = model.wrapped(TOKENS, use_cache=False).logits
    battery.half_precision_is_as_close_as_transformers_is(tiny(dtype=torch.float32, **every), model, theirs, TOKENS)


@torch.no_grad()
def test_what_transformers_gets_wrong_is_right_here():
    """A cache that goes on with several tokens, left padding with a bias of in_proj, a step after padding on the right."""
    ours = tiny("the other way round")
    theirs, rows = ours.wrapped, [TOKENS[0], TOKENS[1, :5]]
    with battery.true_float64():
        alone = [theirs(row[None], use_cache=False).logits[0] for row in rows]
        tokens, mask = padded(rows, "left")
        wrong = theirs(tokens, attention_mask=mask.long(), use_cache=False).logits
        begun = theirs(rows[0][None, :6], use_cache=True)
        later = theirs(rows[0][None, 6:], past_key_values=begun.past_key_values).logits
    assert relative(wrong[1][mask[1]], alone[1]) > 1e-2 and relative(later[0], alone[0][6:]) > 1e-2
    found = ours(tokens, attention_mask=mask)
    for row in range(2):
        assert relative(found[row][mask[row]], alone[row]) < 1e-12
    right, mask = padded([rows[0][:6], rows[1][:3]], "right")
    _, state = ours(right, attention_mask=mask, return_state=True)
    for row, cut in enumerate((6, 3)):
        logits = ours(rows[row][None, cut:], state=state.rows([row]))
        assert relative(logits[0], alone[row][cut:]) < 1e-12


@torch.no_grad()
def test_a_saved_folder_is_opened(tmp_path):
    given = tiny(dtype=torch.float32)
    given.wrapped.save_pretrained(tmp_path)
    model = gl.from_pretrained(tmp_path, device="cpu")
    assert isinstance(model, HookedJamba) and relative(model(TOKENS), given(TOKENS)) < 1e-6
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in weights if "dt_layernorm" in name)
    save_file({k: v for k, v in weights.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(gl.CheckpointError, match="is missing"):
        gl.from_pretrained(tmp_path, device="cpu")


def test_what_is_not_supported_is_named():
    with pytest.raises(gl.CheckpointError, match="hidden_act is 'gelu'; expected is 'silu' or 'swish'"):
        tiny(hidden_act="gelu")


def test_the_implicit_attention_reconstructs_every_layer(model):
    battery.attention_reconstructs_every_layer(model, TOKENS)


@pytest.mark.parametrize("listening", [False, True], ids=["", "inside"])
def test_padding_and_holes_count_for_nothing(model, listening):
    battery.padding_and_holes_count_for_nothing(model, TOKENS, listening)


@pytest.mark.parametrize("listening", [False, True], ids=["", "inside"])
def test_packed_documents_are_as_if_each_stood_alone(model, listening):
    battery.packed_documents_stand_alone(model, TOKENS, listening)


def test_every_split_continues(model):
    battery.every_split_continues(model, TOKENS)


def test_generation_is_that_of_the_whole_prompt():
    battery.generation_is_that_of_the_whole_prompt(tiny(), TOKENS)

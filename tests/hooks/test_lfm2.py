"""LFM2, whose mixer is a short convolution: every row against its literal equation, transformers, the band that tokens are
mixed by, and what is said where a state is asked for. It is in no general test of recurrences: these stand for them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Lfm2MoeConfig, Lfm2MoeForCausalLM

import gatedlens as gl
from gatedlens.formats.qwen3_next import by_last_axis
from gatedlens.hooks.lfm2 import HookedLFM2
from gatedlens.model.tiny import Tiny, fresh
from gatedlens.recurrence.band_matrix import BandScan
from tests.helpers import padded, relative
from tests.hooks import battery
from tests.hooks import literal as literally

TOKENS = torch.randint(40, (2, 11), generator=torch.Generator().manual_seed(0))
MOE = {
    "hidden_size": 16, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "vocab_size": 40,
    "intermediate_size": 6, "moe_intermediate_size": 4, "num_dense_layers": 1, "num_experts": 4, "num_experts_per_tok": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "conv_L_cache": 3, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None, "routed_scaling_factor": 1.3,
}  # fmt: skip
VARIANTS = {
    "tiny": {},
    "bias, four taps": {"conv_bias": True, "conv_L_cache": 4, "layer_types": ["full_attention", "conv"]},
    "convs alone": {"layer_types": ["conv", "conv"], "conv_L_cache": 2},
    "experts": MOE,
    "experts, no bias": {**MOE, "use_expert_bias": False, "norm_topk_prob": False},
}


def tiny(variant: str = "tiny", dtype: torch.dtype = torch.float64, **sizes) -> HookedLFM2:
    given = VARIANTS[variant] | sizes
    if not variant.startswith("experts"):
        return HookedLFM2.tiny(seed=1, dtype=dtype, **given)
    draws = {"embed_tokens": fresh(0.3), r"experts\.(gate_up|down)_proj": by_last_axis, "gate.weight": fresh(0.3)}
    make = Tiny("tiny", lambda config: Lfm2MoeForCausalLM(Lfm2MoeConfig(**config)), given, draws)
    model = make.module(1, {})
    model.config._experts_implementation = "eager"
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=torch.Generator().manual_seed(2)))
    return gl.wrap(model.to(dtype))


@pytest.fixture(params=VARIANTS)
def model(request):
    return tiny(request.param)


def literal(cache, model, layer: int) -> dict[str, torch.Tensor]:
    """Every row of one block from its equation, with loops, reading the rows it names from the cache."""
    out, w, cfg, config = {}, model.wrapped.model.layers[layer], model.cfg, model.wrapped.config

    def c(name):
        return cache[f"blocks.{layer}.{name}"]

    literally.around(out, c, cache, layer, (("mixer",), ("mlp",)))
    literally.norm_rows(out, c, "ln1", c("hook_mixer_in"), w.operator_norm.weight, cfg.eps)
    if "conv" in w._modules:
        m = w.conv
        given = literally.linear(c("ln1.hook_out"), m.in_proj)
        names = ("in_gate", "gate_pre", "x")
        for number, name in enumerate(names):
            out[f"mixer.hook_{name}"] = given[..., number * 16 : (number + 1) * 16]
        out["mixer.hook_u"] = c("mixer.hook_in_gate") * c("mixer.hook_x")
        out["mixer.hook_conv_taps"] = literally.conv_taps(c("mixer.hook_u"), m.conv.weight)
        out["mixer.hook_conv"] = c("mixer.hook_conv_taps").sum(-1) + (0 if m.conv.bias is None else m.conv.bias)
        out["mixer.hook_gate"] = c("mixer.hook_gate_pre")
        out["mixer.hook_gated"] = c("mixer.hook_conv") * c("mixer.hook_gate")
        out["hook_mixer_out"] = literally.linear(c("mixer.hook_gated"), m.out_proj)
    else:
        m = w.self_attn
        theta = config.rope_parameters["rope_theta"]
        literally.attention(out, c, m, c("ln1.hook_out"), cfg.d_head, cfg.d_head, theta=theta)
        for name, norm in (("q", m.q_layernorm), ("k", m.k_layernorm)):
            literally.norm_rows(out, c, f"attn.{name}_norm", c(f"attn.hook_{name}"), norm.weight, cfg.eps)
            out[f"attn.hook_rot_{name}"] = literally.turned(c(f"attn.{name}_norm.hook_out"), cfg.d_head, theta)
        out["hook_mixer_out"] = literally.linear(c("attn.hook_z").flatten(2), m.out_proj)
    literally.norm_rows(out, c, "ln2", c("hook_mlp_in"), w.ffn_norm.weight, cfg.eps)
    m, read = w.feed_forward, c("ln2.hook_out")
    if "experts" in m._modules:
        out["mlp.hook_router"] = read @ m.gate.weight.T
        shares = torch.sigmoid(c("mlp.hook_router"))
        choice = shares + m.expert_bias if config.use_expert_bias else shares
        chosen = literally.chosen(shares, choice, cfg.n_experts_per_token, normalised=False)
        if config.norm_topk_prob:
            chosen = chosen / (chosen.sum(-1, keepdim=True) + 1e-6)
        out["mlp.hook_expert_weights"] = config.routed_scaling_factor * chosen
        literally.experts(out, c, m.experts, read)
        out["hook_mlp_out"] = literally.of_experts(c)
    else:
        out["mlp.hook_pre"], out["mlp.hook_pre_linear"] = literally.linear(read, m.w1), literally.linear(read, m.w3)
        out["mlp.hook_post"] = literally.silu(c("mlp.hook_pre")) * c("mlp.hook_pre_linear")
        out["hook_mlp_out"] = literally.linear(c("mlp.hook_post"), m.w2)
    return out


def test_every_row_is_its_equation(model):
    battery.rows_are_their_equations(model, literal, TOKENS)


@pytest.mark.parametrize("layer", [0, 1], ids=["conv", "attention"])
def test_after_an_edit_every_row_downstream_is_its_equation(layer):
    battery.edits_reach_every_row(tiny(), literal, layer, TOKENS)


def test_kinds_are_all_that_stand_in_a_model():
    seen = {f"{model.cfg.family}: {kind}" for model in map(tiny, VARIANTS) for kind in model.cfg.kinds}
    assert seen | {"LFM2-MoE: attention, MLP"} == set(HookedLFM2.kinds())


@torch.no_grad()
def test_logits_are_transformers_in_true_float64(model):
    with battery.true_float64():
        want = model.wrapped(TOKENS, use_cache=False).logits
    assert relative(model(TOKENS), want) < 1e-12


def test_gradients_are_transformers():
    battery.gradients_are_transformers(tiny(dtype=torch.float32), TOKENS)


@torch.no_grad()
def test_half_precision_is_as_close_as_transformers_is():
    model = tiny(dtype=torch.bfloat16)
    theirs = model.wrapped(TOKENS, use_cache=False).logits
    battery.half_precision_is_as_close_as_transformers_is(tiny(dtype=torch.float32), model, theirs, TOKENS)


@torch.no_grad()
def test_a_saved_folder_is_opened(tmp_path):
    given = tiny(dtype=torch.float32)
    given.wrapped.save_pretrained(tmp_path)
    model = gl.from_pretrained(tmp_path, device="cpu")
    assert isinstance(model, HookedLFM2) and relative(model(TOKENS), given(TOKENS)) < 1e-6
    assert gl.inspect(tmp_path).layers == ("conv, mlp", "attention, mlp")
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in weights if "conv.conv" in name)
    save_file({k: v for k, v in weights.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(gl.CheckpointError, match="is missing"):
        gl.from_pretrained(tmp_path, device="cpu")


def test_the_implicit_attention_reconstructs_every_layer(model):
    battery.attention_reconstructs_every_layer(model, TOKENS)


@torch.no_grad()
def test_the_implicit_attention_is_the_band_between_the_gates():
    model = tiny("bias, four taps")
    _, cache = model.run_with_cache(TOKENS)
    A, m = gl.implicit_attention(cache, layer=1), model.wrapped.model.layers[1].conv.conv
    assert isinstance(A.factors.scan, BandScan)
    want = torch.zeros(2, 16, 11, 11, dtype=torch.float64)
    for i in range(11):
        for k in range(4):
            if i >= k:
                gates = cache["blocks.1.mixer.hook_gate"][:, i] * cache["blocks.1.mixer.hook_in_gate"][:, i - k]
                want[:, :, i, i - k] = gates * m.weight[:, 0, 3 - k]
    assert relative(A.dense(), want) < 1e-13 and A.check().relative < 1e-12
    assert relative(A.mean(), want.mean(1)) < 1e-12 and relative(A.abs_mean(), want.abs().mean(1)) < 1e-12
    assert relative(A.bias, cache["blocks.1.mixer.hook_gate"] * m.bias) < 1e-12
    assert relative(A.select([3, 1]).dense(), want[:, [3, 1]]) < 1e-13
    assert relative(A.row(-1), want[:, :, -1]) < 1e-13 and relative(A.column(2), want[:, :, :, 2]) < 1e-13
    with gl.knockout.cut_scan(8, -1, layers=gl.layers.where("conv")).on(model):
        cut = model.run_with_cache(TOKENS)[1]["blocks.1.mixer.hook_gated"]
    lost = want[:, :, -1, 8] * cache["blocks.1.mixer.hook_x"][:, 8]
    assert relative(cut[:, -1], cache["blocks.1.mixer.hook_gated"][:, -1] - lost) < 1e-12


def test_relevance_is_conserved_but_for_biases():
    """Without biases the relevance of the tokens is the logit: half of each product goes to its gate."""
    for gates in ("content", "half", "none"):
        found = gl.attribution.lrp(tiny("convs alone"), TOKENS, target=3, gates=gates)
        if gates == "none":
            assert max(map(abs, found.facts["remainder"])) < 1e-10
        assert found.scores.abs().sum() > 0


@torch.no_grad()
def test_where_a_state_is_asked_for_it_says_that_there_is_none():
    model = tiny()
    with pytest.raises(gl.PointError, match="has no recurrence"), gl.states.patch(torch.zeros(1), pos=3).on(model):
        model(TOKENS)
    with pytest.raises(
        gl.InputError, match="no layer of .* is of this kind; its layers have 'attention', 'conv', 'mlp'"
    ):
        gl.layers.where("recurrent").of(model)
    _, cache = model.run_with_cache(TOKENS)
    with pytest.raises(gl.InputError, match="is a short convolution: it keeps a few tokens and has no state"):
        gl.profiles.rewrite(cache, layer=0)
    with pytest.raises(gl.InputError, match="no delta rule"), gl.knockout.cut_erase(1, -1, layers=0).on(model):
        model(TOKENS)


@torch.no_grad()
def test_what_transformers_gets_wrong_is_right_here():
    """Left padding with a bias of in_proj, and a step after padding on the right."""
    ours = tiny("bias, four taps")
    theirs, rows = ours.wrapped, [TOKENS[0], TOKENS[1, :5]]
    with battery.true_float64():
        alone = [theirs(row[None], use_cache=False).logits[0] for row in rows]
        tokens, mask = padded(rows, "left")
        wrong = theirs(tokens, attention_mask=mask.long(), use_cache=False).logits
    assert relative(wrong[1][mask[1]], alone[1]) > 1e-3, "transformers has put it right: say so"
    found = ours(tokens, attention_mask=mask)
    for row in range(2):
        assert relative(found[row][mask[row]], alone[row]) < 1e-12
    right, mask = padded([rows[0][:6], rows[1][:3]], "right")
    _, state = ours(right, attention_mask=mask, return_state=True)
    for row, cut in enumerate((6, 3)):
        logits = ours(rows[row][None, cut:], state=state.rows([row]))
        assert relative(logits[0], alone[row][cut:]) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("listening", [False, True], ids=["", "inside"])
def test_padding_and_holes_count_for_nothing(model, listening):
    battery.padding_and_holes_count_for_nothing(model, TOKENS, listening)


@torch.no_grad()
@pytest.mark.parametrize("listening", [False, True], ids=["", "inside"])
def test_packed_documents_are_as_if_each_stood_alone(model, listening):
    battery.packed_documents_stand_alone(model, TOKENS, listening)


def test_every_split_continues(model):
    battery.every_split_continues(model, TOKENS)


def test_generation_is_that_of_the_whole_prompt():
    battery.generation_is_that_of_the_whole_prompt(tiny(), TOKENS)

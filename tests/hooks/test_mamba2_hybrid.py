"""Bamba, Granite-4-H, Falcon-H1, Nemotron-H and Zamba2: every row against its literal equation, transformers in true float64 and
where it is wrong, padding, documents, states, edits, folders."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    Zamba2Config,
    Zamba2ForCausalLM,
)

import gatedlens as gl
from gatedlens.formats.mamba2_hybrid import TINY
from gatedlens.hooks.mamba2_hybrid import FAMILIES, HookedMamba2Hybrid
from gatedlens.model.tiny import Tiny
from tests.helpers import padded, relative
from tests.hooks import battery
from tests.hooks import literal as literally

TOKENS = torch.randint(40, (2, 11), generator=torch.Generator().manual_seed(0))
COMMON = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
COMMON |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 3, "mamba_n_groups": 2, "mamba_chunk_size": 4}
BAMBA = {**COMMON, **MAMBA, "num_hidden_layers": 2, "attn_layer_indices": [1], "intermediate_size": 6}
GRANITE = {
    **COMMON, **MAMBA, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "intermediate_size": 4,
    "shared_intermediate_size": 5, "num_local_experts": 4, "num_experts_per_tok": 2, "residual_multiplier": 0.3,
    "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "logits_scaling": 2.5, "position_embedding_type": "rope",
}  # fmt: skip
FALCON = {
    **COMMON, **MAMBA, "num_hidden_layers": 2, "intermediate_size": 6, "mamba_d_ssm": 24, "mamba_d_head": 6,
    "mamba_rms_norm": True, "mamba_norm_before_gate": False, "ssm_multipliers": [0.7, 1.2, 0.8, 1.1, 0.9],
    "mlp_multipliers": [1.3, 0.6], "key_multiplier": 0.8, "attention_in_multiplier": 1.1, "attention_out_multiplier": 0.7,
    "ssm_in_multiplier": 1.2, "ssm_out_multiplier": 0.6, "embedding_multiplier": 2.5, "lm_head_multiplier": 0.4,
}  # fmt: skip
NEMOTRON = {
    **COMMON, "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "head_dim": 6, "mamba_num_heads": 4,
    "mamba_head_dim": 5, "ssm_state_size": 3, "n_groups": 2, "chunk_size": 4, "intermediate_size": 6, "n_routed_experts": 6,
    "num_experts_per_tok": 2, "moe_intermediate_size": 4, "moe_shared_expert_intermediate_size": 5, "n_group": 2,
    "topk_group": 1, "routed_scaling_factor": 1.7,
}  # fmt: skip
ZAMBA2 = {
    **COMMON, "num_key_value_heads": 4, "num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
    "mamba_d_state": 3, "mamba_ngroups": 2, "n_mamba_heads": 4, "chunk_size": 4, "intermediate_size": 6, "num_mem_blocks": 1,
    "use_shared_attention_adapter": True, "adapter_rank": 2, "use_mem_rope": True,
}  # fmt: skip
CLASSES = {
    "Bamba": (BambaForCausalLM, BambaConfig, BAMBA),
    "Granite": (GraniteMoeHybridForCausalLM, GraniteMoeHybridConfig, GRANITE),
    "Falcon-H1": (FalconH1ForCausalLM, FalconH1Config, FALCON),
    "Nemotron-H": (NemotronHForCausalLM, NemotronHConfig, NEMOTRON),
    "Zamba2": (Zamba2ForCausalLM, Zamba2Config, ZAMBA2),
}
BIASES = {"attention_bias": True, "mamba_proj_bias": True}
VARIANTS = {
    "Bamba": {},
    "Bamba, biases": {**BIASES, "mlp_bias": True, "mamba_conv_bias": False, "time_step_limit": (0.05, 0.4)},
    "Granite": {},
    "Granite, no experts": {"num_local_experts": 0, **BIASES},
    "Granite, no positions": {"position_embedding_type": None},
    "Granite, no experts, no positions": {"num_local_experts": 0, "position_embedding_type": None},
    "Falcon-H1": {"time_step_limit": (0.05, 0.4)},
    "Falcon-H1, norm before the gate": {"mamba_norm_before_gate": True, **BIASES, "projectors_bias": True, "mlp_bias": True},
    "Falcon-H1, no norm": {"mamba_rms_norm": False, "mamba_d_ssm": None, "mamba_d_head": 8},
    "Nemotron-H": {"time_step_min": 0.3},
    "Zamba2": {"time_step_min": 0.2},
    "Zamba2, no positions": {
        "use_mem_rope": False, "use_shared_attention_adapter": False, "add_bias_linear": True, "num_mem_blocks": 2,
        "layers_block_type": ["hybrid", "linear_attention", "hybrid"], "num_key_value_heads": 2,
    },
    "Nemotron-H, latent experts": {"moe_latent_size": 3, "use_bias": True, "mlp_bias": True, "norm_topk_prob": False},
}  # fmt: skip
FAMILY = [*CLASSES]


def wrapped(variant: str = "Granite", dtype: torch.dtype = torch.float64, **sizes) -> torch.nn.Module:
    """A small model of transformers, its parameters drawn."""
    make, told, config = CLASSES[variant.partition(",")[0]]
    model = Tiny("", lambda config: make(told(**config)), config, TINY.draws).module(1, VARIANTS[variant] | sizes)
    model.config._experts_implementation = "eager"
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=torch.Generator().manual_seed(2)))
    return model.to(dtype)


def tiny(variant: str = "Granite", dtype: torch.dtype = torch.float64, **sizes) -> HookedMamba2Hybrid:
    return gl.wrap(wrapped(variant, dtype, **sizes))


@pytest.fixture(params=VARIANTS)
def model(request):
    return tiny(request.param)


# -- every row ------------------------------------------------------------------------------------------------------


def literal(cache, model, layer: int) -> dict[str, torch.Tensor]:
    """Every row of one block from its equation, with loops, reading the rows it names from the cache."""
    out, w = {}, model.wrapped.model.layers[layer]

    def c(name):
        return cache[f"blocks.{layer}.{name}"]

    families = {
        "Bamba": bamba,
        "Granite-4-H": granite,
        "Falcon-H1": falcon_h1,
        "Nemotron-H": nemotron_h,
        "Zamba2": zamba2,
    }
    besides = {"layer": layer, "embed": cache["resid_pre", 0]} if model.cfg.family == "Zamba2" else {}
    groups = families[model.cfg.family](out, c, w, model.wrapped.config, model.cfg, **besides)
    literally.around(out, c, cache, layer, groups)
    return out


def mamba(out, c, m, cfg, read, limit, norm="after the gate", scale=1.0, by=1.0) -> None:
    """A mixer and what it puts out; by: what is multiplied into in_proj's output, number by number."""
    given = literally.linear(read, m.in_proj) * by
    literally.mamba2(out, c, m, given, cfg.sizes, limit, cfg.eps, norm)
    out["hook_mixer_out"] = scale * literally.linear(c("mixer.hook_gated"), m.out_proj)


def bamba(out, c, w, config, cfg):
    literally.norm_rows(out, c, "ln1", c("hook_mixer_in"), w.input_layernorm.weight, cfg.eps)
    if "mamba" in w._modules:
        mamba(out, c, w.mamba, cfg, c("ln1.hook_out"), config.time_step_limit)
    else:
        literally.attention(out, c, w.self_attn, c("ln1.hook_out"), cfg.d_head, cfg.d_head // 2)
        out["hook_mixer_out"] = literally.linear(c("attn.hook_z").flatten(2), w.self_attn.o_proj)
    literally.norm_rows(out, c, "ln2", c("hook_mlp_in"), w.pre_ff_layernorm.weight, cfg.eps)
    literally.gated_mlp(out, c, w.feed_forward, c("ln2.hook_out"))
    out["hook_mlp_out"] = literally.linear(c("mlp.hook_post"), w.feed_forward.down_proj)
    return ("mixer",), ("mlp",)


def granite(out, c, w, config, cfg):
    r = config.residual_multiplier
    literally.norm_rows(out, c, "ln1", c("hook_mixer_in"), w.input_layernorm.weight, cfg.eps)
    if w.mamba is not None:
        mamba(out, c, w.mamba, cfg, c("ln1.hook_out"), config.time_step_limit, scale=r)
    else:
        turned = cfg.d_head if config.position_embedding_type == "rope" else 0
        scores = config.attention_multiplier
        literally.attention(out, c, w.self_attn, c("ln1.hook_out"), cfg.d_head, turned, scores=scores)
        out["hook_mixer_out"] = r * literally.linear(c("attn.hook_z").flatten(2), w.self_attn.o_proj)
    literally.norm_rows(out, c, "ln2", c("hook_mlp_in"), w.post_attention_layernorm.weight, cfg.eps)
    read = c("ln2.hook_out")
    if not config.num_local_experts:
        literally.fused_mlp(out, c, w.shared_mlp, read)
        out["hook_mlp_out"] = r * literally.linear(c("mlp.hook_post"), w.shared_mlp.output_linear)
        return ("mixer",), ("mlp",)
    moe = w.block_sparse_moe
    out["mlp.hook_router"] = read @ moe.router.weight.T
    logits, k = c("mlp.hook_router"), config.num_experts_per_tok
    out["mlp.hook_expert_weights"] = literally.chosen(logits.exp(), logits, k, normalised=True)
    literally.experts(out, c, moe.experts, read)
    literally.fused_mlp(out, c, w.shared_mlp, read, "mlp.shared")
    shared = literally.linear(c("mlp.shared.hook_post"), w.shared_mlp.output_linear)
    out["hook_mlp_out"] = r * (literally.of_experts(c) + shared)
    return ("mixer",), ("mlp",)


def falcon_h1(out, c, w, config, cfg):
    inner, heads, width = w.mamba.intermediate_size, config.mamba_n_heads, config.mamba_n_groups * config.mamba_d_state
    by = [m for m, n in zip(config.ssm_multipliers, (inner, inner, width, width, heads), strict=True) for _ in range(n)]
    where = "before the gate" if config.mamba_norm_before_gate else "after the gate"
    literally.norm_rows(out, c, "ln1", c("hook_mixer_in"), w.input_layernorm.weight, cfg.eps)
    literally.norm_rows(out, c, "ln1_attn", c("hook_attn_in"), w.input_layernorm.weight, cfg.eps)
    mamba(
        out, c, w.mamba, cfg, config.ssm_in_multiplier * c("ln1.hook_out"), config.time_step_limit,
        where if config.mamba_rms_norm else "none", config.ssm_out_multiplier, torch.tensor(by).double(),
    )  # fmt: skip
    read, keys = config.attention_in_multiplier * c("ln1_attn.hook_out"), config.key_multiplier
    literally.attention(out, c, w.self_attn, read, cfg.d_head, cfg.d_head, keys)
    attended = literally.linear(c("attn.hook_z").flatten(2), w.self_attn.o_proj)
    out["hook_attn_out"] = config.attention_out_multiplier * attended
    literally.norm_rows(out, c, "ln2", c("hook_mlp_in"), w.pre_ff_layernorm.weight, cfg.eps)
    gate, down = config.mlp_multipliers
    literally.gated_mlp(out, c, w.feed_forward, c("ln2.hook_out"), gate=gate)
    out["hook_mlp_out"] = down * literally.linear(c("mlp.hook_post"), w.feed_forward.down_proj)
    return ("mixer", "attn"), ("mlp",)


def nemotron_h(out, c, w, config, cfg):
    m, kind = w.mixer, w.block_type
    name, ln = ("mixer", "ln1") if "attention" in kind else ("mlp", "ln2")
    literally.norm_rows(out, c, ln, c(f"hook_{name}_in"), w.norm.weight, cfg.eps)
    read = c(f"{ln}.hook_out")
    if kind == "linear_attention":
        mamba(out, c, m, cfg, read, (config.time_step_min, float("inf")))
    elif kind == "full_attention":
        literally.attention(out, c, m, read, cfg.d_head)
        out["hook_mixer_out"] = literally.linear(c("attn.hook_z").flatten(2), m.o_proj)
    elif kind == "mlp":
        literally.relu_squared_mlp(out, c, m, read)
        out["hook_mlp_out"] = literally.linear(c("mlp.hook_post"), m.down_proj)
    else:
        out["mlp.hook_router"] = read @ m.gate.weight.T
        out["mlp.hook_expert_weights"] = routed(torch.sigmoid(c("mlp.hook_router")), m.gate, config)
        literally.relu_squared_mlp(out, c, m.shared_experts, read, "mlp.shared")
        shared = literally.linear(c("mlp.shared.hook_post"), m.shared_experts.down_proj)
        if config.moe_latent_size is None:
            literally.experts(out, c, m.experts, read)
            out["hook_mlp_out"] = literally.of_experts(c) + shared
        else:
            out["mlp.hook_latent"] = literally.linear(read, m.fc1_latent_proj)
            literally.experts(out, c, m.experts, c("mlp.hook_latent"))
            out["hook_mlp_out"] = literally.linear(literally.of_experts(c), m.fc2_latent_proj) + shared
    return ((name,),)


def zamba2(out, c, w, config, cfg, layer, embed):
    if "mamba_decoder" not in w._modules:
        literally.norm_rows(out, c, "ln1", c("hook_mixer_in"), w.input_layernorm.weight, cfg.eps)
        mamba(out, c, w.mamba, cfg, c("ln1.hook_out"), (config.time_step_min, float("inf")))
        return (("mixer",),)
    j, shared, inner = config.hybrid_layer_ids.index(layer), w.shared_transformer, {}

    def within(name):
        return c(f"shared.{name}")

    inner["hook_read"] = c("hook_resid_pre")
    inner["hook_embed"] = embed
    inner["hook_in"] = torch.cat([within("hook_read"), within("hook_embed")], -1)
    literally.norm_rows(inner, within, "ln1", within("hook_in"), shared.input_layernorm.weight, cfg.eps)
    m, d_head = shared.self_attn, config.attention_head_dim
    adapted = {}
    for name in "qkv":
        weight = getattr(m, f"{name}_proj").weight
        if config.use_shared_attention_adapter:
            narrow, wide = getattr(m, f"linear_{name}_adapter_list")[j]
            weight = weight + wide.weight @ narrow.weight
        adapted[f"{name}_proj"] = SimpleNamespace(weight=weight, bias=None)
    turned = d_head if config.use_mem_rope else 0
    projections = SimpleNamespace(**adapted)
    literally.attention(inner, within, projections, within("ln1.hook_out"), d_head, turned, scores=(d_head / 2) ** -0.5)
    inner["hook_attn_out"] = literally.linear(within("attn.hook_z").flatten(2), m.o_proj)
    literally.norm_rows(inner, within, "ln2", within("hook_attn_out"), shared.pre_ff_layernorm.weight, cfg.eps)
    mlp, read = shared.feed_forward, within("ln2.hook_out")
    narrow, wide = mlp.gate_up_proj_adapter_list[j]
    both = literally.linear(read, mlp.gate_up_proj) + read @ (wide.weight @ narrow.weight).T
    inner["mlp.hook_pre"], inner["mlp.hook_pre_linear"] = both.chunk(2, -1)
    pre = within("mlp.hook_pre")
    inner["mlp.hook_post"] = pre * (1 + torch.erf(pre / 2**0.5)) / 2 * within("mlp.hook_pre_linear")
    inner["hook_out"] = literally.linear(literally.linear(within("mlp.hook_post"), mlp.down_proj), w.linear)
    out |= {f"shared.{name}": value for name, value in inner.items()}
    literally.norm_rows(out, c, "ln1", c("hook_mixer_in"), w.mamba_decoder.input_layernorm.weight, cfg.eps)
    mamba(out, c, w.mamba_decoder.mamba, cfg, c("ln1.hook_out"), (config.time_step_min, float("inf")))
    return (("mixer",),)


def routed(shares, gate, config) -> torch.Tensor:
    """The k largest of share + bias within the best groups, a position at a time."""
    choice, size = shares + gate.e_score_correction_bias, config.n_routed_experts // config.n_group
    kept = torch.full_like(choice, -torch.inf)
    for b in range(shares.shape[0]):
        for t in range(shares.shape[1]):
            each = choice[b, t].tolist()
            best = {g: sum(sorted(each[g * size : (g + 1) * size])[-2:]) for g in range(config.n_group)}
            for g in sorted(best, key=lambda g: -best[g])[: config.topk_group]:
                kept[b, t, g * size : (g + 1) * size] = choice[b, t, g * size : (g + 1) * size]
    weights = literally.chosen(shares, kept, config.num_experts_per_tok, config.norm_topk_prob)
    return config.routed_scaling_factor * weights


@torch.no_grad()
def test_every_row_is_its_equation(model):
    battery.rows_are_their_equations(model, literal, TOKENS)


@torch.no_grad()
@pytest.mark.parametrize(
    ("variant", "layer"),
    [
        ("Granite", 0), ("Granite", 1), ("Granite, no experts", 1), ("Falcon-H1, norm before the gate", 0), ("Nemotron-H", 1),
        ("Nemotron-H", 3), ("Nemotron-H, latent experts", 1), ("Zamba2", 1),
    ],
)  # fmt: skip
def test_after_an_edit_every_row_downstream_is_its_equation(variant, layer):
    battery.edits_reach_every_row(tiny(variant), literal, layer, TOKENS)


def test_kinds_are_all_that_stand_in_a_model():
    seen = {f"{model.cfg.family}: {kind}" for model in map(tiny, VARIANTS) for kind in model.cfg.kinds}
    assert seen == set(HookedMamba2Hybrid.kinds())
    assert set(HookedMamba2Hybrid.hub_types) == set(FAMILIES)


# -- transformers ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_are_transformers_in_true_float64(model):
    with battery.true_float64():
        want = model.wrapped(TOKENS, use_cache=False).logits
    assert relative(model(TOKENS), want) < 1e-12


@pytest.mark.parametrize("variant", FAMILY)
def test_gradients_are_transformers(variant):
    ours = tiny(variant, torch.float32)
    other = copy.deepcopy(ours.wrapped)
    weight = torch.randn(*TOKENS.shape, 40, generator=torch.Generator().manual_seed(1))
    logits, wanted = ours(TOKENS), other(TOKENS, use_cache=False).logits
    assert relative(logits, wanted) < 1e-5
    found = torch.autograd.grad((logits * weight).sum(), list(ours.wrapped.parameters()))
    wanted = torch.autograd.grad((wanted * weight).sum(), list(other.parameters()))
    for (name, _), a, b in zip(other.named_parameters(), found, wanted, strict=True):
        assert relative(a, b) < 1e-4, name


@torch.no_grad()
@pytest.mark.parametrize("variant", FAMILY)
def test_bfloat16_is_as_close_to_float32_as_transformers_is(variant):
    every = {"num_experts_per_tok": 4} if variant == "Granite" else {}  # which experts are chosen hangs on rounding
    every = {"num_experts_per_tok": 6, "topk_group": 2} if variant == "Nemotron-H" else every
    tokens = torch.randint(40, (4, 30), generator=torch.Generator().manual_seed(5))
    exact, model = tiny(variant, torch.float32, **every)(tokens), tiny(variant, torch.bfloat16, **every)
    got, want = model(tokens), model.wrapped(tokens, use_cache=False).logits.float()
    ours, theirs = (
        (logits - exact).pow(2).mean().sqrt() for logits in (got, want)
    )  # the largest hangs on a few numbers
    assert got.dtype == torch.float32 and ours < 1.2 * theirs


@torch.no_grad()
@pytest.mark.parametrize("variant", FAMILY)
def test_what_transformers_gets_wrong_is_right_here(variant):
    """Left padding with a bias of in_proj, a step after padding on the right, a continuation without position_ids, a limit of the
    time step while decoding, packed documents: in each, transformers' own answer for the row alone."""
    bias = {"Nemotron-H": "use_bias", "Zamba2": "add_bias_linear"}.get(variant, "mamba_proj_bias")
    limits = {"time_step_limit": (0.3, 0.9)} if bias == "mamba_proj_bias" else {"time_step_min": 0.3}
    theirs = wrapped(variant, **{bias: True}, **limits)
    ours, rows = gl.wrap(theirs), [TOKENS[0], TOKENS[1, :5]]
    with battery.true_float64():
        alone = [theirs(row[None], use_cache=False).logits[0] for row in rows]
        tokens, mask = padded(rows, "left")
        wrong = theirs(tokens, attention_mask=mask.long(), use_cache=False).logits
    assert relative(wrong[1][mask[1]], alone[1]) > 1e-2, "transformers has put it right: say so"
    found = ours(tokens, attention_mask=mask)
    for row in range(2):
        assert relative(found[row][mask[row]], alone[row]) < 1e-12
    right, mask = padded([rows[0][:6], rows[1][:4]], "right")
    _, state = ours(right, attention_mask=mask, return_state=True)
    for row, cut in enumerate((6, 4)):
        left = state.rows([row])
        for t in range(cut, len(rows[row])):  # token by token: the time step keeps its limits, positions go on
            logits, left = ours(rows[row][None, t : t + 1], state=left, return_state=True)
            assert relative(logits[0, 0], alone[row][t]) < 1e-12
    packed, places = torch.cat(rows)[None], torch.cat([torch.arange(11), torch.arange(5)])[None]
    assert relative(ours(packed, position_ids=places)[0], torch.cat(alone)) < 1e-12


# -- folders --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("variant", ["Bamba, biases", *FAMILY[1:], "Granite, no experts", "Nemotron-H, latent experts"])
def test_a_saved_folder_is_opened(variant, tmp_path):
    given = tiny(variant, torch.float32)
    given.wrapped.save_pretrained(tmp_path)
    model = gl.from_pretrained(tmp_path, device="cpu")
    assert isinstance(model, HookedMamba2Hybrid) and model.cfg.kinds == given.cfg.kinds
    assert relative(model(TOKENS), given(TOKENS)) < 1e-6
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in weights if "conv1d" in name)
    save_file({k: v for k, v in weights.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(gl.CheckpointError, match="is missing"):
        gl.from_pretrained(tmp_path, device="cpu")


def test_an_older_config_of_nemotron_h_is_read(tmp_path):
    """Whose layers are letters, and names older ones."""
    given = tiny("Nemotron-H", torch.float32)
    given.wrapped.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("layers_block_type", "layer_types"):
        config.pop(name, None)
    config["hybrid_override_pattern"] = "ME*-"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert relative(gl.from_pretrained(tmp_path, device="cpu")(TOKENS), given(TOKENS)) < 1e-6


def test_tied_or_not_is_told_by_the_tensors():
    """Nemotron-H never ties, whatever its config says; Bamba does."""
    assert not tiny("Nemotron-H", tie_word_embeddings=True).cfg.tie_word_embeddings
    assert tiny("Bamba", tie_word_embeddings=True).cfg.tie_word_embeddings


@pytest.mark.parametrize(
    ("variant", "sizes", "said"),
    [
        ("Bamba", {"hidden_act": "relu"}, "hidden_act is 'relu'; expected is 'silu' or 'swish', or 'gelu'"),
        ("Bamba", {"hidden_act": "gelu"}, "hidden_act='gelu'; supported is 'silu'"),
        ("Zamba2", {"hidden_act": "silu"}, "hidden_act='silu'; supported is 'gelu'"),
        ("Nemotron-H", {"mlp_hidden_act": "silu"}, "mlp_hidden_act is 'silu'; expected is 'relu2'"),
        (
            "Falcon-H1",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
            "rope_type='dynamic'",
        ),
    ],
)
def test_what_is_not_supported_is_named(variant, sizes, said):
    with pytest.raises(gl.CheckpointError, match=said):
        tiny(variant, **sizes)


# -- padding, documents, states -------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_attention_reconstructs_every_layer_every_layer(model):
    battery.attention_reconstructs_every_layer(model, TOKENS)


@torch.no_grad()
@pytest.mark.parametrize("listening", [False, True], ids=["", "inside"])
def test_padding_and_holes_count_for_nothing(model, listening):
    battery.padding_and_holes_count_for_nothing(model, TOKENS, listening)


@torch.no_grad()
@pytest.mark.parametrize("listening", [False, True], ids=["", "inside"])
def test_packed_documents_are_as_if_each_stood_alone(model, listening):
    battery.packed_documents_stand_alone(model, TOKENS, listening)


@torch.no_grad()
def test_every_split_continues(model):
    battery.every_split_continues(model, TOKENS)


@torch.no_grad()
@pytest.mark.parametrize("variant", FAMILY)
def test_generation_is_that_of_the_whole_prompt(variant):
    battery.generation_is_that_of_the_whole_prompt(tiny(variant), TOKENS)


# -- layers of two mixers, and of none ------------------------------------------------------------------------------


@torch.no_grad()
def test_what_two_mixers_side_by_side_give():
    """Falcon-H1: each has an operator of its own, and its own part of a logit."""
    model = tiny("Falcon-H1")
    _, cache = model.run_with_cache(TOKENS)
    attn = gl.implicit_attention(cache, layer=1, place="attn")
    assert relative(attn.contributions().output(), cache["blocks.1.hook_attn_out"]) < 1e-12
    assert gl.implicit_attention(cache, layer=1).shape[2] == 24 and attn.shape[2] == 16
    with pytest.raises(gl.InputError, match="place='mlp': layer 1 mixes tokens at 'mixer', 'attn'"):
        gl.implicit_attention(cache, layer=1, place="mlp")
    with pytest.raises(gl.InputError, match="place='attn' says which mixer of one layer is meant"):
        gl.implicit_attention(cache, place="attn")
    found, whole = gl.lens.token_attribution(model, TOKENS, [3, 4]), gl.lens.logit_attribution(model, TOKENS, [3, 4])
    assert found["component"] == whole["component"] and "0_attn_out" in found["component"]
    torch.testing.assert_close(found.values.sum(2), whole.values, atol=1e-10, rtol=0)
    by_attention = found.at(component="0_attn_out").values
    assert (by_attention[:, :-2].abs() > 1e-8).any(), "an attention brings from other positions"
    torch.testing.assert_close(whole.values.sum(1), model(TOKENS)[range(2), -1, [3, 4]], atol=1e-10, rtol=0)


@torch.no_grad()
def test_a_cut_is_of_both():
    """What a token gives to the last position is taken from each of the two, as its operator says."""
    model = tiny("Falcon-H1", num_hidden_layers=1)
    points = ["blocks.0.mixer.hook_gated", "blocks.0.attn.hook_z"]
    with gl.knockout.cut(4, -1, layers=0).on(model):
        cache = model.run_with_cache(TOKENS, names_filter=points)[1]
    plain = model.run_with_cache(TOKENS, names_filter=points)[1]
    for name, place in zip(points, ("mixer", "attn"), strict=True):
        A = gl.implicit_attention(model, TOKENS, layer=0, place=place)
        lost = A.dense()[:, :, -1, 4] * A.branches[0].x[:, 4]
        want = plain[name].flatten(2)[:, -1] - lost
        assert relative(cache[name].flatten(2)[:, -1], want) < 1e-12 and lost.abs().sum() > 0
    with gl.knockout.cut(4, -1, layers=0, head=1).on(model):  # an axis of Mamba-2's alone
        some = model.run_with_cache(TOKENS, names_filter=points)[1]
    assert torch.equal(some[points[1]], plain[points[1]]) and relative(some[points[0]], plain[points[0]]) > 1e-6


def test_relevance_goes_through_both():
    """The rules hold each operator, so relevance is the gradient of a model in which both are."""
    model = tiny("Falcon-H1")
    flows = gl.attribution.Rules.of(model).flows
    assert [(flow.layer, flow.place) for flow in flows] == [(n, place) for n in range(2) for place in ("mixer", "attn")]
    found = gl.attribution.lrp(model, TOKENS, target=3)
    assert found.scores.abs().sum() > 0


@torch.no_grad()
def test_an_edit_of_what_one_branch_reads_leaves_the_other_alone():
    model = tiny("Falcon-H1")
    names = ["blocks.0.hook_mixer_out", "blocks.0.hook_attn_out"]
    _, plain = model.run_with_cache(TOKENS, names_filter=names)
    with model.hooks([("blocks.0.hook_attn_in", lambda x, hook: x * 2 + 1)]):
        _, cache = model.run_with_cache(TOKENS, names_filter=names)
    assert torch.equal(cache[names[0]], plain[names[0]])
    assert relative(cache[names[1]], plain[names[1]]) > 1e-2


def test_layers_that_mix_no_tokens():
    """Nemotron-H: what goes through all layers leaves them out; who names one is told."""
    model = tiny("Nemotron-H")
    assert list(model.mixers) == [0, 2]
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS)
        assert len(gl.implicit_attention(cache)) == 2
        with pytest.raises(gl.InputError, match="blocks.1 mixes no tokens"):
            gl.implicit_attention(cache, layer=1)
        with gl.knockout.cut(0, -1).on(model):
            assert relative(model(TOKENS)[:, -1], cache["hook_logits"][:, -1]) > 1e-3
        with pytest.raises(gl.InputError, match="blocks.3 mixes no tokens"), gl.knockout.cut(0, -1, layers=3).on(model):
            model(TOKENS)
        found = gl.lens.token_attribution(model, TOKENS, [3, 4])
        torch.testing.assert_close(
            found.values.sum((1, 2)), cache["hook_logits"][range(2), -1, [3, 4]], atol=1e-10, rtol=0
        )
    for method in (gl.attribution.lrp, gl.attribution.grad_x_input):
        assert method(model, TOKENS, target=3).scores.abs().sum() > 0


# -- shared blocks --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_shared_blocks_have_points_and_caches_a_layer_and_weights_a_block():
    model = tiny("Zamba2")
    first, second = (model.wrapped.model.layers[layer].shared_transformer.self_attn.q_proj.weight for layer in (1, 2))
    assert first is second or torch.equal(first, second)
    _, cache = model.run_with_cache(TOKENS)
    for layer in (1, 2):
        A = gl.implicit_attention(cache, layer=layer, place="shared.attn")
        assert A.check().relative < 1e-12 and A.shape[2] == 32
    assert relative(cache["blocks.1.shared.attn.hook_v"], cache["blocks.2.shared.attn.hook_v"]) > 1e-2
    with model.hooks([("blocks.1.shared.attn.hook_z", lambda z, hook: 0 * z)]):
        _, cut = model.run_with_cache(TOKENS)
    assert relative(cut["blocks.1.hook_mixer_in"], cache["blocks.1.hook_mixer_in"]) > 1e-2
    assert (
        relative(cut["blocks.1.hook_resid_post"] - cut["blocks.1.hook_resid_pre"], cut["blocks.1.hook_mixer_out"])
        < 1e-12
    )


@torch.no_grad()
def test_a_run_from_a_later_layer_is_given_the_embedding():
    model = tiny("Zamba2")
    logits, cache = model.run_with_cache(TOKENS)
    assert model.hands_on == ("blocks.0.hook_resid_pre",) and tiny("Bamba").hands_on == ()
    assert torch.equal(model(cache["resid_pre", 1], start_at_layer=1, earlier=cache), logits)
    with pytest.raises(gl.InputError, match="blocks.0.hook_resid_pre"):
        model(cache["resid_pre", 1], start_at_layer=1)


def test_relevance_goes_through_shared_blocks_too():
    model = tiny("Zamba2")
    flows = [(flow.layer, flow.place) for flow in gl.attribution.Rules.of(model).flows]
    assert flows == [(0, "mixer"), (1, "shared.attn"), (1, "mixer"), (2, "shared.attn"), (2, "mixer")]
    assert gl.attribution.lrp(model, TOKENS, target=3).scores.abs().sum() > 0

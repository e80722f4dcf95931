"""mamba-ssm's hybrids: golden vectors of its own code, every row against its literal equation, padding, documents, states."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import gatedlens as gl
from gatedlens.formats.mamba_ssm_hybrid import Mamba2HybridWeights
from gatedlens.hooks.mamba_ssm_hybrid import HookedMambaSsmHybrid
from tests.helpers import GOLDEN, golden, relative
from tests.hooks import battery
from tests.hooks import literal as literally

TOKENS = torch.randint(40, (2, 11), generator=torch.Generator().manual_seed(0))
ATTENDS = {"causal": True, "num_heads": 4, "num_heads_kv": 2, "head_dim": 4}
SSM = {"layer": "Mamba2", "d_state": 4, "headdim": 6, "ngroups": 2, "d_ssm": 24}
VARIANTS = {
    "tiny": {},
    "channels beside": {
        "ssm_cfg": {**SSM, "D_has_hdim": True}, "attn_cfg": {**ATTENDS, "d_conv": 3, "rotary_emb_dim": 2},
    },
    "norm before the gate, dt limited, no MLP": {
        "d_intermediate": 0, "attn_cfg": {**ATTENDS, "d_conv": 2, "qkv_proj_bias": False},
        "ssm_cfg": {**SSM, "norm_before_gate": True, "dt_limit": [0.05, 0.8], "D_has_hdim": True},
    },
    "LayerNorm, attention as it comes": {
        "rms_norm": False, "attn_cfg": {**ATTENDS, "num_heads_kv": None, "softmax_scale": 0.3},
        "ssm_cfg": {**SSM, "bias": True, "conv_bias": False},
    },
    "no attention": {"attn_layer_idx": [], "ssm_cfg": {**SSM, "rmsnorm": False}},
    "no channels beside": {"ssm_cfg": {**SSM, "d_ssm": None, "headdim": 8}, "attn_layer_idx": [0]},
}  # fmt: skip


def tiny(variant: str = "tiny", dtype: torch.dtype = torch.float64) -> HookedMambaSsmHybrid:
    return HookedMambaSsmHybrid.tiny(seed=1, dtype=dtype, **VARIANTS[variant])


@pytest.fixture(params=VARIANTS)
def model(request):
    return tiny(request.param)


def test_golden_vectors_of_mamba_ssm():
    config, weights, io = golden("mamba2_hybrid_lm")
    wrapped = Mamba2HybridWeights(config)
    wrapped.load_state_dict(weights)
    model = gl.wrap(wrapped.eval())
    logits, cache = model.run_with_cache(io["input_ids"])
    assert (logits - io["logits"]).abs().max() < 1e-5
    assert (cache["ln_final.hook_out"] - io["norm_f_out"]).abs().max() < 1e-5
    for layer in range(3):
        mixed = cache[f"blocks.{layer}.hook_mixer_out"]
        if layer != 1:
            mixed = mixed + cache[f"blocks.{layer}.hook_beside_out"]
        assert (mixed - io[f"layers.{layer}.mixer_out"]).abs().max() < 1e-5
        assert (cache[f"blocks.{layer}.hook_mlp_out"] - io[f"layers.{layer}.mlp_out"]).abs().max() < 1e-5
        assert (cache[f"blocks.{layer}.hook_resid_mid"] - io[f"layers.{layer}.residual_mid"]).abs().max() < 1e-5
    model(io["input_ids"])[:, -1].pow(2).sum().backward()
    params = dict(model.wrapped.named_parameters())
    checked = [key for key in io if key.startswith("grad.")]
    assert len(checked) > 8
    for key in checked:
        assert relative(params[key.removeprefix("grad.")].grad, io[key]) < 1e-4, key


def literal(cache, model, layer: int) -> dict[str, torch.Tensor]:
    """Every row of one block from its equation, with loops, reading the rows it names from the cache."""
    out, w, cfg = {}, model.wrapped.backbone.layers[layer], model.cfg

    def c(name):
        return cache[f"blocks.{layer}.{name}"]

    def normed(ln, read, norm):
        if cfg.normalization_type == "RMS":
            literally.norm_rows(out, c, ln, read, norm.weight, cfg.eps)
            return
        centred = read - read.mean(-1, keepdim=True)
        out[f"{ln}.hook_scale"] = (centred.pow(2).mean(-1, keepdim=True) + cfg.eps).sqrt()
        out[f"{ln}.hook_normalized"] = centred / c(f"{ln}.hook_scale")
        out[f"{ln}.hook_out"] = norm.weight * c(f"{ln}.hook_normalized") + norm.bias

    m, M = w.mixer, cfg.d_beside
    normed("ln1", c("hook_mixer_in"), w.norm)
    first = ("mixer",)
    if "A_log" in m._parameters:
        given = literally.linear(c("ln1.hook_out"), m.in_proj)[..., 2 * M :]
        ssm = model.wrapped.config["ssm_cfg"]
        limit = ssm.get("dt_limit", (0.0, float("inf")))
        where = "before the gate" if ssm.get("norm_before_gate") else "after the gate"
        literally.mamba2(
            out, c, m, given, cfg.sizes, limit, 1e-5, where if ssm.get("rmsnorm", True) else "none"
        )  # fmt: skip
        bias = 0 if m.out_proj.bias is None else m.out_proj.bias
        out["hook_mixer_out"] = c("mixer.hook_gated") @ m.out_proj.weight[:, M:].T + bias
        if M:
            first = ("beside", "mixer")
            normed("ln1_beside", c("hook_beside_in"), w.norm)
            both = literally.linear(c("ln1_beside.hook_out"), m.in_proj)
            out["beside.hook_pre"], out["beside.hook_pre_linear"] = both[..., :M], both[..., M : 2 * M]
            out["beside.hook_post"] = literally.silu(c("beside.hook_pre")) * c("beside.hook_pre_linear")
            out["hook_beside_out"] = c("beside.hook_post") @ m.out_proj.weight[:, :M].T
    else:
        attention(out, c, m, model)
        out["hook_mixer_out"] = literally.linear(c("attn.hook_z").flatten(2), m.out_proj)
    literally.around(out, c, cache, layer, (first, ("mlp",)) if "mlp" in w._modules else (first,))
    if "mlp" in w._modules:
        normed("ln2", c("hook_mlp_in"), w.norm2)
        both = literally.linear(c("ln2.hook_out"), w.mlp.fc1)
        width = both.shape[-1] // 2
        out["mlp.hook_pre_linear"], out["mlp.hook_pre"] = both[..., :width], both[..., width:]
        out["mlp.hook_post"] = literally.silu(c("mlp.hook_pre")) * c("mlp.hook_pre_linear")
        out["hook_mlp_out"] = c("mlp.hook_post") @ w.mlp.fc2.weight.T
    return out


def attention(out, c, m, model) -> None:
    cfg, said = model.cfg, model.wrapped.config["attn_cfg"]
    given = literally.linear(c("ln1.hook_out"), m.in_proj)
    widths = [n * cfg.d_head for n in (cfg.n_heads, cfg.n_key_value_heads, cfg.n_key_value_heads)]
    parts = dict(zip("qkv", given.split(widths, -1), strict=True))
    parts = {name: x.unflatten(-1, (-1, cfg.d_head)) for name, x in parts.items()}
    if cfg.qkv_conv:
        first = 0
        for name, x in parts.items():
            some = slice(first, first := first + x[0, 0].numel())
            out[f"attn.hook_{name}_pre"] = x
            taps = literally.conv_taps(c(f"attn.hook_{name}_pre"), m.conv1d.weight[some])
            out[f"attn.hook_{name}_conv_taps"] = taps
            bias = m.conv1d.bias[some].unflatten(0, (-1, cfg.d_head))
            parts[name] = c(f"attn.hook_{name}_conv_taps").sum(-1) + bias

    class Given:
        """What was projected already, where a projection is asked for."""

        def __init__(self, x):
            self.x = x.flatten(2)

    plain, literally.linear = literally.linear, lambda n, given: given.x
    try:
        q, k, v = (Given(parts[name]) for name in "qkv")
        projections = type("Projections", (), {"q_proj": q, "k_proj": k, "v_proj": v})
        turned, scale = said.get("rotary_emb_dim", 0), said.get("softmax_scale")
        literally.attention(out, c, projections, c("ln1.hook_out"), cfg.d_head, turned, scores=scale)
    finally:
        literally.linear = plain


def test_every_row_is_its_equation(model):
    battery.rows_are_their_equations(model, literal, TOKENS)


@pytest.mark.parametrize("layer", [0, 1], ids=["Mamba-2", "attention"])
def test_after_an_edit_every_row_downstream_is_its_equation(layer):
    battery.edits_reach_every_row(tiny("channels beside"), literal, layer, TOKENS)


def test_the_implicit_attention_reconstructs_every_layer(model):
    battery.attention_reconstructs_every_layer(model, TOKENS)


@torch.no_grad()
def test_what_channels_without_a_state_write_is_a_part_of_its_own(model):
    found, whole = gl.lens.token_attribution(model, TOKENS, [3, 4]), gl.lens.logit_attribution(model, TOKENS, [3, 4])
    torch.testing.assert_close(found.values.sum(2), whole.values, atol=1e-10, rtol=0)
    torch.testing.assert_close(whole.values.sum(1), model(TOKENS)[range(2), -1, [3, 4]], atol=1e-10, rtol=0)
    assert any("beside" in name for name in whole["component"]) == bool(model.cfg.d_beside)


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


def test_a_folder_is_opened(tmp_path):
    config, weights, io = golden("mamba2_hybrid_lm")
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({k: v for k, v in weights.items() if k != "lm_head.weight"}, tmp_path / "model.safetensors")
    model = gl.from_pretrained(tmp_path, device="cpu")
    assert isinstance(model, HookedMambaSsmHybrid) and (model(io["input_ids"]) - io["logits"]).abs().max() < 1e-5
    assert gl.inspect(tmp_path).layers == ("recurrent, mlp", "attention, mlp", "recurrent, mlp")
    lost = {k: v for k, v in load_file(GOLDEN / "mamba2_hybrid_lm" / "model.safetensors").items() if "fc2" not in k}
    save_file(lost, tmp_path / "model.safetensors")
    with pytest.raises(gl.CheckpointError, match="is missing|are missing"):
        gl.from_pretrained(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"attn_cfg": {**ATTENDS, "causal": False}}, "attn_cfg.causal=False: an attention that looks ahead"),
        ({"attn_cfg": {"num_heads": 4}}, "attn_cfg.causal=False"),
        ({"attn_cfg": {**ATTENDS, "mlp_dim": 8}}, "attn_cfg.mlp_dim=8: an MLP inside an attention"),
        ({"attn_cfg": {**ATTENDS, "rotary_emb_dim": 2, "rotary_emb_interleaved": True}}, "neighbours turned in pairs"),
        ({"attn_cfg": {"causal": True}}, "says no num_heads"),
        ({"attn_cfg": {**ATTENDS, "num_heads_kv": 3}}, "4 heads cannot share 3"),
        ({"attn_layer_idx": [7]}, "attn_layer_idx names layer 7; there are 2"),
        ({"ssm_cfg": {"d_state": 4}}, "those around Mamba-2 are supported"),
        ({"ssm_cfg": {**SSM, "d_ssm": 400}}, "d_ssm is 400, more than the 32 channels"),
    ],
)
def test_what_is_not_supported_is_named(sizes, said):
    with pytest.raises(gl.CheckpointError, match=said):
        HookedMambaSsmHybrid.tiny(**sizes)


class MambaLMHeadModel(Mamba2HybridWeights):
    """A class of mamba-ssm's name: what is inside decides which architecture it is."""


def test_mamba_ssms_class_is_told_by_its_layers():
    from gatedlens.formats.mamba_ssm_hybrid import TINY

    for changed in ({}, {"attn_layer_idx": []}, {"d_intermediate": 0}):
        assert isinstance(gl.wrap(MambaLMHeadModel(TINY.config | changed)), HookedMambaSsmHybrid)
    plain = {"attn_layer_idx": [], "d_intermediate": 0}
    assert isinstance(gl.wrap(MambaLMHeadModel(TINY.config | plain | {"ssm_cfg": SSM})), HookedMambaSsmHybrid)
    assert isinstance(gl.wrap(MambaLMHeadModel(TINY.config | plain)), gl.HookedMamba2)

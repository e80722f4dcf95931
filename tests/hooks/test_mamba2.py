"""Mamba-2: each row against its literal equation, golden vectors, and transformers' class."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import Mamba2Config, Mamba2ForCausalLM

import gatedlens as gl
from gatedlens.hooks.mamba2 import NORMS, HookedMamba2, Mamba2Weights, mamba2_rows
from tests.helpers import golden, relative
from tests.hooks import battery
from tests.hooks import literal as literally

TOKENS = torch.randint(40, (2, 11), generator=torch.Generator().manual_seed(0))
VARIANTS = {
    "norm after the gate": {},
    "norm before the gate": {"norm_before_gate": True},
    "no norm": {"rmsnorm": False},
    "D by channel": {"D_has_hdim": True},
    "dt limited": {"dt_limit": [0.05, 0.4]},
    "biases": {"bias": True, "conv_bias": False},
    "one group": {"ngroups": 1},
    "a group a head": {"ngroups": 4},
}


def tiny(variant: str, seed: int = 1) -> HookedMamba2:
    ssm = {"layer": "Mamba2", "d_state": 4, "headdim": 8, "ngroups": 2} | VARIANTS[variant]
    return HookedMamba2.tiny(seed=seed, dtype=torch.float64, ssm_cfg=ssm)


@pytest.fixture(params=VARIANTS)
def model(request):
    return tiny(request.param)


def groups_of_transformers() -> int:
    """2, unless this transformers normalises over all channels where there are several groups (5.12 does)."""
    probe = Mamba2ForCausalLM(
        Mamba2Config(hidden_size=8, num_hidden_layers=1, num_heads=4, head_dim=4, n_groups=2, vocab_size=8)
    )
    return 2 if "group_size" in vars(probe.backbone.layers[0].mixer.norm) else 1


GROUPS = groups_of_transformers()


def hf(dtype: torch.dtype = torch.float32, **sizes):
    """A random transformers model whose every parameter has been perturbed."""
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "vocab_size": 50,
        "state_size": 8,
        "num_heads": 8,
        "head_dim": 8,
    }
    torch.manual_seed(0)
    model = Mamba2ForCausalLM(Mamba2Config(**(small | {"n_groups": GROUPS, "chunk_size": 4} | sizes)))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.to(dtype).eval()


def literal(cache, model, layer: int) -> dict[str, torch.Tensor]:
    """Every row of one block from its equation, with loops, reading the rows it names from the cache."""
    w, cfg, out = model.wrapped.backbone.layers[layer], model.cfg, {}

    def c(name):
        return cache[f"blocks.{layer}.{name}"]

    literally.around(out, c, cache, layer, (("mixer",),))
    literally.norm_rows(out, c, "ln1", c("hook_mixer_in"), w.norm.weight, 1e-5)
    given = literally.linear(c("ln1.hook_out"), w.mixer.in_proj)
    literally.mamba2(out, c, w.mixer, given, cfg.sizes, cfg.dt_limit, 1e-5, cfg.mixer_norm)
    out["hook_mixer_out"] = literally.linear(c("mixer.hook_gated"), w.mixer.out_proj)
    return out


def test_every_row_is_its_equation(model):
    battery.rows_are_their_equations(model, literal, TOKENS, 1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_after_an_edit_every_row_downstream_is_its_equation(norm):
    model = tiny("no norm" if norm == "none" else f"norm {norm}")
    assert model.rows_for(0) == mamba2_rows(norm)
    battery.edits_reach_every_row(model, literal, 0, TOKENS, least=1e-4, rtol=1e-12)


def test_the_implicit_attention_reconstructs_every_variant(model):
    battery.attention_reconstructs_every_layer(model, TOKENS)


def test_padding_counts_for_nothing_in_every_variant(model):
    battery.padding_and_holes_count_for_nothing(model, TOKENS, listening=False)


@pytest.mark.parametrize("listening", [False, True], ids=["", "inside"])
def test_packed_documents_are_as_if_each_stood_alone(model, listening):
    battery.packed_documents_stand_alone(model, TOKENS, listening)


@torch.no_grad()
def test_documents_and_padding_together():
    model = tiny("norm after the gate")
    mask = torch.tensor([[False, False] + [True] * 7, [True] * 9])
    places = torch.tensor([[0, 0, 0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 0, 1, 2]])
    out = model(TOKENS[:, :9], attention_mask=mask, position_ids=places)
    assert relative(out[0, 2:5], model(TOKENS[:1, 2:5])[0]) < 1e-12
    assert relative(out[0, 5:], model(TOKENS[:1, 5:9])[0]) < 1e-12
    assert relative(out[1, 6:], model(TOKENS[1:, 6:9])[0]) < 1e-12


def test_a_gradient_does_not_pass_from_one_document_into_the_next():
    model = tiny("norm after the gate")
    embedded = model.embed(TOKENS).detach().requires_grad_()
    out = model(embedded, start_at_layer=0, position_ids=battery.PACKED)
    (grad,) = torch.autograd.grad(out[0, 3:8].sum(), embedded)
    assert (grad[0, 3:8] != 0).any() and (grad[0, :3] == 0).all() and (grad[0, 8:] == 0).all() and (grad[1] == 0).all()


@pytest.mark.parametrize(
    "sizes", [{}, {"n_groups": 1}, {"use_bias": True}, {"use_conv_bias": False}, {"time_step_limit": (0.3, 0.9)}]
)
def test_logits_and_gradients_are_transformers(sizes):
    theirs = hf(**sizes)
    ours = gl.wrap(copy.deepcopy(theirs))
    assert isinstance(ours, HookedMamba2)
    tokens = torch.randint(50, (2, 21))
    a, b = theirs(tokens).logits, ours(tokens)
    assert relative(b, a) < 1e-5
    direction = torch.randn_like(a)
    (a * direction).sum().backward()
    (b * direction).sum().backward()
    for (name, p), q in zip(theirs.named_parameters(), ours.wrapped.parameters(), strict=True):
        assert relative(q.grad, p.grad) < 1e-4, name


@torch.no_grad()
def test_bfloat16_is_transformers():
    theirs = hf(torch.bfloat16)
    ours = gl.wrap(theirs)
    tokens = torch.randint(50, (2, 21))
    a, b = theirs(tokens).logits, ours(tokens)
    assert b.dtype == torch.float32 and relative(b, a.float()) < 2e-2
    exact = gl.wrap(hf())(tokens)
    assert relative(b, exact) < 1.5 * max(relative(a.float(), exact), 1e-2), (
        "no further from float32 than transformers is"
    )


@torch.no_grad()
def test_what_transformers_gets_wrong_is_right_here():
    """Left padding with a bias in in_proj; a right-padded prefill that goes on; a limit of dt while decoding."""
    theirs = hf(use_bias=True, time_step_limit=(0.3, 0.9))
    ours = gl.wrap(theirs)
    row = torch.randint(50, (1, 8), generator=torch.Generator().manual_seed(2))
    alone = theirs(row).logits
    tokens = torch.cat([torch.ones(1, 3, dtype=torch.long), row], 1)
    mask = torch.tensor([[False] * 3 + [True] * 8])
    assert relative(ours(tokens, attention_mask=mask)[:, 3:], alone) < 1e-5
    right = torch.cat([row[:, :7], torch.ones(1, 3, dtype=torch.long)], 1)
    _, state = ours(right, attention_mask=torch.tensor([[True] * 7 + [False] * 3]), return_state=True)
    assert relative(ours(row[:, 7:], state=state), alone[:, -1:]) < 1e-5


@pytest.mark.parametrize("name", ["mamba2_lm", "mamba2_normoff_lm"])
def test_golden_vectors_of_mamba_ssm(name):
    config, weights, io = golden(name)
    wrapped = Mamba2Weights(config)
    wrapped.load_state_dict(weights)
    model = gl.wrap(wrapped.eval())
    logits, cache = model.run_with_cache(io["input_ids"])
    assert (logits - io["logits"]).abs().max() < 1e-5
    assert (cache["ln_final.hook_out"] - io["norm_f_out"]).abs().max() < 1e-5
    for layer in range(2):
        assert (cache[f"blocks.{layer}.hook_mixer_out"] - io[f"layers.{layer}.mixer_out"]).abs().max() < 1e-5
        assert (cache[f"blocks.{layer}.hook_resid_pre"] - io[f"layers.{layer}.residual_in"]).abs().max() < 1e-5
    logits = model(io["input_ids"])
    logits[:, -1].pow(2).sum().backward()
    params = dict(model.wrapped.named_parameters())
    checked = [key for key in io if key.startswith("grad.")]
    assert len(checked) > 8
    for key in checked:
        assert relative(params[key.removeprefix("grad.")].grad, io[key]) < 1e-4, key


def test_both_layouts_load_from_a_folder(tmp_path):
    config, weights, io = golden("mamba2_lm")
    original = tmp_path / "original"
    original.mkdir()
    (original / "config.json").write_text(json.dumps(config))
    save_file({k: v for k, v in weights.items() if k != "lm_head.weight"}, original / "model.safetensors")
    model = gl.from_pretrained(original, device="cpu")
    assert isinstance(model, HookedMamba2) and model.cfg.n_heads == 8 and model.cfg.n_groups == 2
    assert (model(io["input_ids"]) - io["logits"]).abs().max() < 1e-5
    theirs = hf(time_step_limit=(0.001, float("inf")))
    theirs.save_pretrained(tmp_path / "hub")
    model = gl.from_pretrained(tmp_path / "hub", device="cpu")
    assert isinstance(model, HookedMamba2) and model.cfg.dt_limit == (0.001, float("inf"))
    tokens = torch.randint(50, (1, 7))
    assert relative(model(tokens), theirs(tokens).logits) < 1e-5


def test_what_is_not_supported_is_named():
    ssm = {"layer": "Mamba2", "headdim": 8}
    base = {"d_model": 16, "n_layer": 1, "vocab_size": 40}
    with pytest.raises(gl.CheckpointError, match="d_ssm is 40, more than the 32 channels"):
        Mamba2Weights(base | {"ssm_cfg": ssm | {"d_ssm": 40}})
    with pytest.raises(gl.CheckpointError, match="32 channels cannot be cut into heads of 12"):
        Mamba2Weights(base | {"ssm_cfg": ssm | {"headdim": 12}})
    with pytest.raises(gl.CheckpointError, match="dt_limit is"):
        Mamba2Weights(base | {"ssm_cfg": ssm | {"dt_limit": [1.0, 0.5]}})
    with pytest.raises(gl.CheckpointError, match="mixes Mamba-2 with attention"):
        gl.wrap(Mamba2Weights(base | {"ssm_cfg": ssm, "attn_layer_idx": [0]}))
    with pytest.raises(gl.CheckpointError, match="hidden_act='gelu'"):
        gl.wrap(hf(hidden_act="gelu"))


class MambaLMHeadModel(Mamba2Weights):
    """A class of mamba-ssm's name: what is inside decides which architecture it is."""


def test_mamba_ssms_class_is_told_by_its_mixers():
    ssm = {"layer": "Mamba2", "d_state": 4, "headdim": 8, "ngroups": 2}
    model = MambaLMHeadModel({"d_model": 16, "n_layer": 1, "vocab_size": 40, "ssm_cfg": ssm})
    assert isinstance(gl.wrap(model), HookedMamba2)

"""Mamba: each row against its literal equation, golden vectors, and transformers' classes."""

from __future__ import annotations

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from transformers import FalconMambaConfig, FalconMambaForCausalLM, MambaConfig, MambaForCausalLM

import gatedlens as gl
from gatedlens.hooks.mamba import HookedMamba, Weights
from gatedlens.model.run import Run
from tests.helpers import golden, relative

KINDS = {"Mamba": (MambaConfig, MambaForCausalLM), "FalconMamba": (FalconMambaConfig, FalconMambaForCausalLM)}


def hf(kind: str, dtype: torch.dtype = torch.float32, **sizes):
    """A random transformers model whose every parameter has been perturbed."""
    config, cls = KINDS[kind]
    torch.manual_seed(0)
    model = cls(config(**{"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 50, "state_size": 8} | sizes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.to(dtype).eval()


def literal(cache, model, layer: int) -> dict[str, torch.Tensor]:
    """Every row of one block from its equation, with loops, reading the rows it names from the cache."""
    w = model.wrapped.backbone.layers[layer]
    m = w.mixer

    def c(name):
        return cache[f"blocks.{layer}.{name}"]

    batch, length, channels = c("mixer.hook_x").shape
    ranks, n, width = m.dt_proj.weight.shape[1], m.A_log.shape[1], m.conv1d.weight.shape[-1]
    out = {}
    if layer > 0:
        out["hook_resid_pre"] = cache["resid_post", layer - 1]
    out["hook_mixer_in"] = c("hook_resid_pre")
    out["ln1.hook_scale"] = (c("hook_mixer_in").pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    out["ln1.hook_normalized"] = c("hook_mixer_in") / c("ln1.hook_scale")
    out["ln1.hook_out"] = w.norm.weight * c("ln1.hook_normalized")
    xz = c("ln1.hook_out") @ m.in_proj.weight.T
    out["mixer.hook_x"], out["mixer.hook_gate_pre"] = xz[..., :channels], xz[..., channels:]
    taps = torch.zeros(batch, length, channels, width, dtype=torch.float64)
    for t in range(length):
        for k in range(width):
            if t - (width - 1) + k >= 0:
                taps[:, t, :, k] = m.conv1d.weight[:, 0, k] * c("mixer.hook_x")[:, t - (width - 1) + k]
    out["mixer.hook_conv_taps"] = taps
    out["mixer.hook_conv"] = c("mixer.hook_conv_taps").sum(-1) + m.conv1d.bias
    out["mixer.hook_u"] = c("mixer.hook_conv") * torch.sigmoid(c("mixer.hook_conv"))
    projected = c("mixer.hook_u") @ m.x_proj.weight.T
    out["mixer.hook_dt_rank"] = projected[..., :ranks]
    out["mixer.hook_B"] = projected[..., ranks : ranks + n]
    out["mixer.hook_C"] = projected[..., ranks + n :]
    out["mixer.hook_dt_pre"] = c("mixer.hook_dt_rank") @ m.dt_proj.weight.T + m.dt_proj.bias
    out["mixer.hook_dt"] = torch.log1p(torch.exp(c("mixer.hook_dt_pre")))
    A = -torch.exp(m.A_log)
    out["mixer.hook_reset"] = torch.zeros(batch, length, 1, dtype=torch.float64)
    out["mixer.hook_state_start"] = torch.zeros(batch, channels, n, dtype=torch.float64)
    kept = (1 - c("mixer.hook_reset"))[..., None]
    out["mixer.hook_decay"] = torch.exp(c("mixer.hook_dt")[..., None] * A) * kept
    out["mixer.hook_write"] = (
        c("mixer.hook_dt")[..., None] * c("mixer.hook_B")[:, :, None] * c("mixer.hook_u")[..., None]
    )
    state, states = c("mixer.hook_state_start"), []
    for t in range(length):
        state = c("mixer.hook_decay")[:, t] * state + c("mixer.hook_write")[:, t]
        states.append(state)
    out["mixer.hook_state"] = torch.stack(states, dim=1)
    out["mixer.hook_scan"] = (c("mixer.hook_C")[:, :, None] * c("mixer.hook_state")).sum(-1)
    out["mixer.hook_y"] = c("mixer.hook_scan") + m.D * c("mixer.hook_u")
    out["mixer.hook_gate"] = c("mixer.hook_gate_pre") * torch.sigmoid(c("mixer.hook_gate_pre"))
    out["mixer.hook_gated"] = c("mixer.hook_y") * c("mixer.hook_gate")
    out["hook_mixer_out"] = c("mixer.hook_gated") @ m.out_proj.weight.T
    out["hook_resid_post"] = c("hook_resid_pre") + c("hook_mixer_out")
    return out


@pytest.fixture(scope="module")
def mamba():
    return HookedMamba.tiny(seed=1, dtype=torch.float64)


TOKENS = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_every_row_is_its_equation(mamba):
    _, cache = mamba.run_with_cache(TOKENS, names_filter=lambda name: True)
    for layer in range(2):
        rows = literal(cache, mamba, layer)
        names = {row.name for row in mamba.rows_for(layer)}
        assert set(rows) >= names - {"hook_resid_pre"}, "a row has no literal equation here"
        for name, value in rows.items():
            assert relative(cache[f"blocks.{layer}.{name}"], value) < 1e-12, name


@torch.no_grad()
@pytest.mark.parametrize("row", [row.name for row in HookedMamba.block_points])
def test_after_an_edit_every_row_downstream_is_its_equation(mamba, row):
    """An edit anywhere: each later row equals its equation of the (edited) rows that it names, and so do the logits."""
    noise = torch.Generator().manual_seed(3)

    def edit(x, hook):
        return x * 1.3 + 0.1 * torch.rand(x.shape, generator=noise, dtype=x.dtype)

    with mamba.hooks([(f"blocks.0.{row}", edit)]):
        logits, cache = mamba.run_with_cache(TOKENS, names_filter=lambda name: True)
    for layer in range(2):
        for name, value in literal(cache, mamba, layer).items():
            if (layer, name) != (0, row):
                assert relative(cache[f"blocks.{layer}.{name}"], value) < 1e-12, name
    assert relative(cache["hook_logits"], cache["ln_final.hook_out"] @ mamba.W_U) < 1e-12
    assert relative(logits, mamba(TOKENS)) > 1e-4, "the edit had no effect"


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_transformers(kind):
    theirs = hf(kind)
    ours = gl.wrap(copy.deepcopy(theirs))
    tokens = torch.randint(50, (2, 21))
    a, b = theirs(tokens).logits, ours(tokens)
    assert relative(b, a) < 1e-5
    direction = torch.randn_like(a)
    (a * direction).sum().backward()
    (b * direction).sum().backward()
    for (name, p), q in zip(theirs.named_parameters(), ours.wrapped.parameters(), strict=True):
        assert relative(q.grad, p.grad) < 1e-4, name


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_embeddings_are_transformers(kind):
    theirs = hf(kind)
    ours = gl.wrap(theirs)
    embedded = torch.randn(2, 12, 32, requires_grad=True)
    (a,) = torch.autograd.grad(theirs(inputs_embeds=embedded).logits[:, -1].pow(2).sum(), embedded)
    (b,) = torch.autograd.grad(ours(embedded, start_at_layer=0)[:, -1].pow(2).sum(), embedded)
    assert relative(b, a) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_transformers(kind, dtype):
    """As close to float32 as transformers' own half precision (within a factor), and as close to that as to float32."""
    full = hf(kind)
    half = hf(kind).to(dtype)
    tokens = torch.randint(50, (4, 21), generator=torch.Generator().manual_seed(1))
    truth, theirs, ours = full(tokens).logits, half(tokens).logits.float(), gl.wrap(half)(tokens)
    assert ours.dtype == torch.float32
    noise = (theirs - truth).pow(2).mean().sqrt()
    assert (ours - truth).pow(2).mean().sqrt() < 1.5 * noise
    assert (ours - theirs).pow(2).mean().sqrt() < 1.5 * noise


@torch.no_grad()
@pytest.mark.parametrize(
    "option",
    [{"use_bias": True}, {"use_conv_bias": False}, {"expand": 1}, {"conv_kernel": 2}, {"time_step_rank": 5},
     {"residual_in_fp32": False}, {"tie_word_embeddings": False}, {"layer_norm_epsilon": 1e-3}, {"state_size": 1}],
    ids=str,
)  # fmt: skip
def test_every_option_of_the_config(option):
    theirs = hf("Mamba", **option)
    tokens = torch.randint(50, (2, 11))
    assert relative(gl.wrap(theirs)(tokens), theirs(tokens).logits) < 1e-5


@torch.no_grad()
def test_left_padding_is_transformers():
    theirs = hf("Mamba")
    tokens, mask = torch.randint(50, (2, 11)), torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0
    a, b = theirs(tokens, attention_mask=mask).logits, gl.wrap(theirs)(tokens, attention_mask=mask)
    assert relative(b[mask.bool()], a[mask.bool()]) < 1e-5


def test_golden_language_model():
    config, weights, io = golden("mamba1_lm")
    wrapped = Weights(config)
    wrapped.load_state_dict(weights)
    model = gl.wrap(wrapped)
    logits, cache = model.run_with_cache(io["input_ids"], names_filter=lambda name: True)
    assert relative(logits, io["logits"]) < 1e-5
    assert relative(cache["hook_norm"], io["norm_f_out"]) < 1e-5
    for layer in range(3):
        assert relative(cache["mixer_out", layer], io[f"layers.{layer}.mixer_out"]) < 1e-5
        assert relative(cache["resid_pre", layer], io[f"layers.{layer}.residual_in"]) < 1e-5
    ours = {"u": "u", "B": "B", "C": "C", "y_before_gate": "y", "y": "gated"}
    for theirs, word in ours.items():
        assert relative(cache[word, 0], io[f"layer0.scan.{theirs}"].mT) < 1e-5, theirs
    assert relative(cache["state", 0][:, -1], io["layer0.scan.last_state"]) < 1e-5
    model(io["input_ids"])[:, -1].pow(2).sum().backward()
    for name, p in wrapped.named_parameters():
        assert relative(p.grad, io[f"grad.{name}"]) < 1e-5, name


def golden_mixer():
    config, weights, io = golden("mamba1_mixer")
    whole = Weights(
        {"d_model": config["d_model"], "n_layer": 1, "vocab_size": 8, "ssm_cfg": {"d_state": config["d_state"]}}
    )
    mixer = whole.backbone.layers[0].mixer
    mixer.load_state_dict(weights)
    return gl.wrap(whole), mixer, io


def test_golden_mixer():
    model, weights, io = golden_mixer()
    x = io["x"].clone().requires_grad_()
    run = Run(positions=torch.arange(x.shape[1]).expand(x.shape[:2]), left={})
    kept = {}
    with model.hooks(_keepers(kept)):
        y = model.blocks[0].mixer(x, run)
    assert relative(y, io["y"]) < 1e-5
    y.backward(io["grad_out"])
    assert relative(x.grad, io["grad_x"]) < 1e-5
    for name, p in weights.named_parameters():
        assert relative(p.grad, io[f"grad.{name}"]) < 1e-5, name
    ours = {"u": "hook_u", "B": "hook_B", "C": "hook_C", "y_before_gate": "hook_y", "y": "hook_gated"}
    for theirs, name in ours.items():
        assert relative(kept[name], io[f"scan.{theirs}"].mT.reshape(kept[name].shape)) < 1e-5, theirs
    assert relative(kept["hook_dt_pre"], io["scan.delta_raw"].mT + weights.dt_proj.bias) < 1e-5
    assert relative(run.left["blocks.0.scan"], io["scan.last_state"]) < 1e-5


def _keepers(kept):
    def keep(x, hook):
        kept[hook.name.rpartition(".")[2]] = x.detach().clone()

    return [
        (f"blocks.0.mixer.{name}", keep)
        for name in ("hook_u", "hook_B", "hook_C", "hook_y", "hook_gated", "hook_dt_pre")
    ]


@torch.no_grad()
def test_golden_mixer_step_by_step():
    model, _, io = golden_mixer()
    state, ys = None, []
    for t in range(io["x"].shape[1]):
        run = Run(torch.full((*io["x"].shape[:1], 1), t), before=state, left={})
        ys.append(model.blocks[0].mixer(io["x"][:, t : t + 1], run))
        state = gl.RecurrentState(run.left, torch.full(io["x"].shape[:1], t + 1))
    assert relative(torch.cat(ys, dim=1), io["step_y"]) < 1e-5
    assert relative(state["scan", 0], io["step_ssm_state"]) < 1e-5
    assert relative(state["conv", 0].mT, io["step_conv_state"][..., 1:]) < 1e-5


@torch.no_grad()
def test_layernorm_stack_with_bias():
    """rms_norm=False: nn.LayerNorm, which no transformers class has; the norm alone is torch's."""
    model = HookedMamba.tiny(seed=2, rms_norm=False)
    assert model.cfg.normalization_type == "LN"
    for p in (model.wrapped.backbone.norm_f, *(layer.norm for layer in model.wrapped.backbone.layers)):
        p.bias.add_(torch.randn_like(p.bias))
    _, cache = model.run_with_cache(TOKENS)
    for layer in range(2):
        norm = model.wrapped.backbone.layers[layer].norm
        want = F.layer_norm(cache["mixer_in", layer], (16,), norm.weight, norm.bias, 1e-5)
        assert relative(cache["out", layer, "ln1"], want) < 1e-5


def test_a_constructed_mamba_ssm_model_is_wrapped_by_its_names():
    """mamba-ssm itself needs CUDA; an object with its class name, config dataclass and parameter names stands in."""
    weights = HookedMamba.tiny(seed=4).wrapped

    class MambaLMHeadModel(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.lm_head = weights.backbone, weights.lm_head
            self.config = types.SimpleNamespace(d_model=16, n_layer=2, vocab_size=40, ssm_cfg={}, rms_norm=True)

    theirs = MambaLMHeadModel()
    model = gl.wrap(theirs)
    assert model.W_E is theirs.backbone.embedding.weight
    assert torch.equal(model(TOKENS), gl.wrap(weights)(TOKENS))


@torch.no_grad()
def test_parameters_are_shared_and_read_at_call_time():
    theirs = hf("Mamba")
    ours = gl.wrap(theirs)
    tokens = torch.randint(50, (1, 8))
    assert {p.data_ptr() for p in ours.parameters()} == {p.data_ptr() for p in theirs.parameters()}
    other = hf("Mamba")
    for p in other.parameters():
        p.mul_(0.9)
    theirs.load_state_dict(other.state_dict(), assign=True)
    assert relative(ours(tokens), other(tokens).logits) < 1e-5


def test_wrapping_leaves_the_wrapped_model_as_it_was():
    theirs = hf("Mamba")
    before = {name: set(vars(module)) for name, module in theirs.named_modules()}
    ours = gl.wrap(theirs)
    ours.run_with_cache(torch.randint(50, (1, 8)))
    assert {name: set(vars(module)) for name, module in theirs.named_modules()} == before
    assert not theirs.training

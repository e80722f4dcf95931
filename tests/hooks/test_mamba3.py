"""Mamba-3: golden vectors of mamba-ssm's own code, the mixer as a loop, every row against its literal equation, padding,
documents, states, and which release means what by A."""

from __future__ import annotations

import json
import math
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import gatedlens as gl
from gatedlens.formats.mamba3_ssm import TINY, Mamba3Weights, layer_parameters
from gatedlens.hooks.mamba3 import HookedMamba3
from tests.helpers import GOLDEN, relative
from tests.hooks import battery
from tests.hooks import literal as literally

TOKENS = torch.randint(40, (2, 11), generator=torch.Generator().manual_seed(0))
SSM = TINY.config["ssm_cfg"]
VARIANTS = {
    "tiny": {},
    "all states turned, softplus, MLP, LayerNorm": {
        "d_intermediate": 6, "rms_norm": False, "ssm_cfg": {**SSM, "rope_fraction": 1.0, "A_activation": "softplus"},
    },
    "norm before the gate, one group": {"ssm_cfg": {**SSM, "is_outproj_norm": True, "ngroups": 1, "d_state": 6}},
    "MIMO, MLP": {"d_intermediate": 6, "ssm_cfg": {**SSM, "is_mimo": True, "mimo_rank": 2}},
}  # fmt: skip


def tiny(variant: str = "tiny", dtype: torch.dtype = torch.float64) -> HookedMamba3:
    return HookedMamba3.tiny(seed=1, dtype=dtype, **VARIANTS[variant])


@pytest.fixture(params=VARIANTS, scope="module")
def model(request):
    return tiny(request.param)


@pytest.mark.parametrize("name", ["siso", "mimo", "norm"])
def test_golden_vectors_of_mamba_ssm(name):
    """Made by mamba-ssm's own model and mixer, the kernels replaced by the plain references of its tests, in float64."""
    folder = GOLDEN / f"mamba3_{name}_lm"
    model, io = gl.from_pretrained(folder, device="cpu"), load_file(folder / "io.safetensors")
    assert isinstance(model, HookedMamba3)
    logits, cache = model.run_with_cache(io["input_ids"])
    assert (logits - io["logits"]).abs().max() < 1e-5
    assert (cache["ln_final.hook_out"] - io["norm_f_out"]).abs().max() < 1e-5
    for layer in range(2):
        assert (cache[f"blocks.{layer}.hook_mixer_out"] - io[f"layers.{layer}.mixer_out"]).abs().max() < 1e-5
    model(io["input_ids"])[:, -1].pow(2).sum().backward()
    params = dict(model.wrapped.named_parameters())
    checked = [key for key in io if key.startswith("grad.")]
    assert len(checked) > 15
    for key in checked:
        assert relative(params[key.removeprefix("grad.")].grad, io[key]) < 1e-4, key


def heavy_tail(x):
    return torch.where(x > 0, 1 + x, 1 / (1 - x.clamp(max=0)))


def softplus(x):
    return torch.log1p(torch.exp(x))


def turned(x, angle, apart: bool):
    """Pairs of states turned, one at a time: (2 a, 2 a + 1), or half the states apart."""
    out, n = x.clone(), x.shape[-1]
    for a in range(angle.shape[-1]):
        i, j = (a, a + n // 2) if apart else (2 * a, 2 * a + 1)
        cos, sin = torch.cos(angle[..., a]), torch.sin(angle[..., a])
        out[..., i], out[..., j] = x[..., i] * cos - x[..., j] * sin, x[..., i] * sin + x[..., j] * cos
    return out


@torch.no_grad()
def test_a_mixer_is_the_papers_loop(model):
    """The whole mixer a position at a time, with a state and what the step before wrote, as in the paper."""
    cfg, m = model.cfg, model.wrapped.backbone.layers[0].mixer
    H, V, N, G, R, a = (cfg.sizes[name] for name in ("head", "value", "state", "group", "rank", "angle"))
    _, cache = model.run_with_cache(TOKENS, names_filter=["blocks.0.ln1.hook_out", "blocks.0.hook_mixer_out"])
    n = cache["blocks.0.ln1.hook_out"]
    mimo, out, angle = "mimo_x" in m._parameters, [], torch.zeros(2, H, a, dtype=torch.float64)
    f = softplus if cfg.A_activation == "softplus" else heavy_tail
    state, before = (torch.zeros(2, H, V, N, dtype=torch.float64) for _ in range(2))
    for t in range(n.shape[1]):
        given = n[:, t] @ m.in_proj.weight.T
        z, x, B, C, dt, A, lam, turn = given.split([H * V, H * V, R * G * N, R * G * N, H, H, H, a], dim=-1)
        dt, lam = softplus(dt + m.dt_bias), torch.sigmoid(lam)
        decay = torch.exp(-dt * f(A).clamp(min=1e-4))
        angle = angle + torch.tanh(turn)[:, None] * math.pi * dt[..., None]
        own, reads = torch.zeros_like(state), []
        for r in range(R):
            keys = []
            for flat, norm, bias in ((B, m.B_norm, m.B_bias), (C, m.C_norm, m.C_bias)):
                each = flat.reshape(2, R, G, N)[:, r]
                each = norm.weight * each / (each.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
                each = torch.stack([each[:, h // (H // G)] + bias[h, r] for h in range(H)], 1)
                keys.append(turned(each, angle, mimo))
            u = x.reshape(2, H, V) * (m.mimo_x[:, r] if mimo else 1)
            own = own + u[..., None] * keys[0][:, :, None]
            reads.append((u, keys[1]))
        weight = [x[..., None, None] for x in (decay, decay * (1 - lam) * dt, lam * dt)]
        state = weight[0] * state + weight[1] * before + weight[2] * own
        before, mixed = own, torch.zeros(2, H, V, dtype=torch.float64)
        for r, (u, read) in enumerate(reads):
            y = (state * read[:, :, None]).sum(-1) + m.D[:, None] * u
            if m._modules.get("norm") is not None:
                y = m.norm.weight.reshape(H, V) * y / (y.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
            gate = literally.silu(z.reshape(2, H, V) * (m.mimo_z[:, r] if mimo else 1))
            mixed = mixed + y * gate * (m.mimo_o[:, r] if mimo else 1)
        out.append(mixed.flatten(1) @ m.out_proj.weight.T)
    assert relative(cache["blocks.0.hook_mixer_out"], torch.stack(out, 1)) < 1e-12


def literal(cache, model, layer: int) -> dict[str, torch.Tensor]:
    """Every row of one block from its equation, with loops, reading the rows it names from the cache."""
    out, w, cfg = {}, model.wrapped.backbone.layers[layer], model.cfg
    m, (H, V, N, G, R, a) = w.mixer, (cfg.sizes[name] for name in ("head", "value", "state", "group", "rank", "angle"))
    mimo, (batch, length) = "mimo_x" in m._parameters, TOKENS.shape

    def c(name):
        return cache[f"blocks.{layer}.{name}"]

    def put(name, value):
        out[f"mixer.hook_{name}"] = value

    literally.norm(out, c, "ln1", w.norm, c("hook_mixer_in"), cfg.eps)
    given = literally.linear(c("ln1.hook_out"), m.in_proj)
    ranks = (R,) if mimo else ()
    parts = given.split([H * V, H * V, R * G * N, R * G * N, H, H, H, a], dim=-1)
    for name, x in zip(
        ("gate_pre", "x", "B_pre", "C_pre", "dt_pre", "A_pre", "lambda_pre", "angle_pre"), parts, strict=True
    ):
        shape = (batch, length, *ranks, G, N) if name in ("B_pre", "C_pre") else x.shape
        put(name, x.reshape(shape) + (m.dt_bias if name == "dt_pre" else 0))

    def of_ranks(parameter):
        return parameter.transpose(0, 1).flatten(1)

    put("u", of_ranks(m.mimo_x) * c("mixer.hook_x").unsqueeze(2) if mimo else c("mixer.hook_x"))
    put("dt", softplus(c("mixer.hook_dt_pre")))
    f = softplus if cfg.A_activation == "softplus" else heavy_tail
    put("A", (-f(c("mixer.hook_A_pre"))).clamp(max=-cfg.A_floor))
    put("log_decay", c("mixer.hook_dt") * c("mixer.hook_A"))
    put("lambda", torch.sigmoid(c("mixer.hook_lambda_pre")))
    put("gamma", c("mixer.hook_lambda") * c("mixer.hook_dt"))
    put("beta", (1 - c("mixer.hook_lambda")) * c("mixer.hook_dt"))
    put("turn", torch.tanh(c("mixer.hook_angle_pre"))[:, :, None] * math.pi * c("mixer.hook_dt")[..., None])
    put("angle", torch.stack([c("mixer.hook_turn")[:, : t + 1].sum(1) for t in range(length)], 1) % (2 * math.pi))
    for name, norm, bias in (("B", m.B_norm, m.B_bias), ("C", m.C_norm, m.C_bias)):
        literally.norm_rows(out, c, f"mixer.{name}_norm", c(f"mixer.hook_{name}_pre"), norm.weight, 1e-5)
        each = c(f"mixer.{name}_norm.hook_out").reshape(batch, length, R, G, N)
        rot = torch.zeros(batch, length, R, H, N, dtype=torch.float64)
        for h in range(H):
            for r in range(R):
                wide = each[:, :, r, h // (H // G)] + bias[h, r]
                rot[:, :, r, h] = turned(wide, c("mixer.hook_angle")[:, :, h], mimo)
        put(f"rot_{name}", rot if mimo else rot[:, :, 0])
    u = c("mixer.hook_u").reshape(batch, length, R, H, V)
    B, C = (c(f"mixer.hook_rot_{name}").reshape(batch, length, R, H, N) for name in "BC")
    wrote = torch.einsum("blrhv,blrhn->blhvn", u, B)
    zeros = torch.zeros_like(wrote[:, :1])
    kept = (torch.exp(c("mixer.hook_log_decay")) * (1 - c("mixer.hook_reset")))[..., None, None]
    put("reset", torch.zeros(batch, length, 1, dtype=torch.float64))
    put("state_start", zeros[:, 0])
    put("decay", kept.expand_as(wrote))
    gamma, beta = (c(f"mixer.hook_{name}")[..., None, None] for name in ("gamma", "beta"))
    put("write", gamma * wrote + kept * beta * torch.cat([zeros, wrote[:, :-1]], 1))
    state, states = c("mixer.hook_state_start"), []
    for t in range(length):
        state = c("mixer.hook_decay")[:, t] * state + c("mixer.hook_write")[:, t]
        states.append(state)
    put("state", torch.stack(states, 1))
    scan = torch.einsum("blhvn,blrhn->blrhv", c("mixer.hook_state"), C).flatten(3)
    put("scan", scan if mimo else scan[:, :, 0])
    put("y", c("mixer.hook_scan") + m.D.repeat_interleave(V) * c("mixer.hook_u"))
    pre = c("mixer.hook_gate_pre")
    put("gate", literally.silu(of_ranks(m.mimo_z) * pre.unsqueeze(2) if mimo else pre))
    if mimo:
        put("product", c("mixer.hook_y") * c("mixer.hook_gate"))
        put("gated", (of_ranks(m.mimo_o) * c("mixer.hook_product")).sum(2))
    elif cfg.kind:
        heads = c("mixer.hook_y").unflatten(2, (H, V))
        put("scale", literally.rms(heads, 1e-5).squeeze(-1))
        put("normed", m.norm.weight * (heads / c("mixer.hook_scale")[..., None]).flatten(2))
        put("gated", c("mixer.hook_normed") * c("mixer.hook_gate"))
    else:
        put("gated", c("mixer.hook_y") * c("mixer.hook_gate"))
    out["hook_mixer_out"] = c("mixer.hook_gated") @ m.out_proj.weight.T
    literally.around(out, c, cache, layer, (("mixer",), ("mlp",)) if cfg.d_mlp else (("mixer",),))
    if cfg.d_mlp:
        literally.norm(out, c, "ln2", w.norm2, c("hook_mlp_in"), cfg.eps)
        both = literally.linear(c("ln2.hook_out"), w.mlp.fc1)
        out["mlp.hook_pre_linear"], out["mlp.hook_pre"] = both.chunk(2, dim=-1)
        out["mlp.hook_post"] = literally.silu(c("mlp.hook_pre")) * c("mlp.hook_pre_linear")
        out["hook_mlp_out"] = c("mlp.hook_post") @ w.mlp.fc2.weight.T
    return out


def test_every_row_is_its_equation(model):
    battery.rows_are_their_equations(model, literal, TOKENS)


@pytest.mark.parametrize("variant", ["norm before the gate, one group", "MIMO, MLP"])
def test_after_an_edit_every_row_downstream_is_its_equation(variant):
    battery.edits_reach_every_row(tiny(variant), literal, 0, TOKENS)


@pytest.mark.parametrize("point", ["decay", "write", "state", "state_start"])
def test_a_lazy_point_alone_is_the_same_edit(point):
    battery.a_lazy_point_alone_is_the_same_edit(tiny("MIMO, MLP"), point, TOKENS)


def test_gradients_are_those_of_the_function(model):
    battery.gradients_are_those_of_the_function(model, TOKENS[:, :6])


def test_the_implicit_attention_reconstructs_every_layer(model):
    battery.attention_reconstructs_every_layer(model, TOKENS)


@pytest.mark.parametrize("listening", [False, True], ids=["", "inside"])
def test_padding_and_holes_count_for_nothing(model, listening):
    battery.padding_and_holes_count_for_nothing(model, TOKENS, listening)


def test_what_a_hook_does_at_padding_reaches_nobody():
    points = (
        "B_pre",
        "C_pre",
        "dt_pre",
        "A_pre",
        "dt",
        "log_decay",
        "gamma",
        "beta",
        "turn",
        "angle",
        "rot_B",
        "decay",
        "write",
    )
    battery.what_a_hook_does_at_padding_reaches_nobody(tiny(), TOKENS, points)


@pytest.mark.parametrize("listening", [False, True], ids=["", "inside"])
def test_packed_documents_are_as_if_each_stood_alone(model, listening):
    battery.packed_documents_stand_alone(model, TOKENS, listening)


@pytest.mark.parametrize("heard", [False, True], ids=["", "inside"])
def test_padding_and_documents_leave_states_of_their_own(model, heard):
    battery.padding_and_holes_leave_states_of_their_own(model, TOKENS[:, :9], heard)
    battery.documents_leave_states_of_their_own(model, TOKENS[:, :9], heard)


def test_every_split_continues(model):
    battery.every_split_continues(model, TOKENS)


def test_generation_is_that_of_the_whole_prompt():
    battery.generation_is_that_of_the_whole_prompt(tiny("MIMO, MLP"), TOKENS)


@pytest.mark.parametrize("pos", [0, 4])
def test_a_patched_state_is_a_fresh_start_from_it(model, pos):
    battery.a_patched_state_is_a_fresh_start_from_it(model, TOKENS, pos)


@torch.no_grad()
def test_a_reset_forgets_the_write_of_the_step_before_with_the_state():
    """What is taken over from the step before is decayed with the state: a hook that resets forgets both."""
    model, pos = tiny(), 5

    def reset(x, hook):
        x[:, pos] = 1
        return x

    with model.hooks([("blocks.*.mixer.hook_reset", reset)]):
        cut, cache = model.run_with_cache(TOKENS)
    ids = torch.cat([torch.arange(pos), torch.arange(11 - pos)]).expand(2, -1)
    assert relative(cut, model(TOKENS, position_ids=ids)) < 1e-12
    assert gl.implicit_attention(cache, layer=1).check().relative < 1e-12


@torch.no_grad()
def test_ranks_are_ways_of_one_matrix_a_channel():
    """MIMO: the views of the sum of all ways, profiles of the state, a cut of a token, and relevance by secants."""
    model = tiny("MIMO, MLP")
    assert gl.verify(model).passed
    _, state = model(TOKENS[:, :4], return_state=True)
    for given, tokens in ((None, TOKENS), (state, TOKENS[:, 4:])):
        _, cache = model.run_with_cache(tokens, state=given, names_filter=lambda name: True)
        A, S = gl.implicit_attention(cache, layer=1), cache["state", 1]
        dense = A.dense()
        assert len(A.branches) == 4 and relative(A.abs_mean(), dense.abs().mean(1)) < 1e-12

        def size(x):
            return x.flatten(-2).norm(dim=-1)

        found = gl.profiles.rewrite(cache, 1)
        assert relative(found.relative[:, 1:], size(S[:, 1:] - S[:, :-1]) / size(S[:, :-1])) < 1e-11
        assert relative(found.written[:, 1:], size(cache["write", 1][:, 1:]) / size(S[:, :-1])) < 1e-11
        values = torch.linalg.svdvals(S)
        effective = torch.special.entr(values / values.sum(-1, keepdim=True)).sum(-1).exp()
        assert relative(gl.profiles.state_rank(cache, 1).effective, effective) < 1e-11
    clean = model.run_with_cache(TOKENS)[1]
    with gl.knockout.cut(2, 6, layers=1).on(model):
        cut = model.run_with_cache(TOKENS)[1]
    lost = gl.implicit_attention(clean, layer=1).dense()[:, :, 6, 2] * clean["blocks.1.mixer.hook_x"][:, 2]
    name = "blocks.1.mixer.hook_gated"
    assert relative(cut[name][:, 6], clean[name][:, 6] - lost) < 1e-12
    with torch.enable_grad():
        scores = gl.attribution.secant(model, TOKENS, target=3)
    assert scores.isfinite().all() and scores.abs().max() > 0


def test_a_long_text_keeps_its_angles_in_float32():
    """Angles are summed in float64, and turned by what is left modulo 2 pi."""
    model = tiny(dtype=torch.float32)
    tokens = torch.randint(40, (1, 3000), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=["*.hook_turn", "*.hook_angle"])
    want = cache["blocks.1.mixer.hook_turn"].double().cumsum(1)
    off = cache["blocks.1.mixer.hook_angle"].double() - want
    assert want.abs().max() > 300
    assert (off / (2 * math.pi) - (off / (2 * math.pi)).round()).abs().max() < 1e-6


def test_a_folder_is_opened_and_inspected(tmp_path):
    folder = GOLDEN / "mamba3_mimo_lm"
    assert gl.inspect(folder).layers == ("recurrent, mlp",) * 2
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    lost = {k: v for k, v in load_file(folder / "model.safetensors").items() if "mimo_z" not in k}
    save_file(lost, tmp_path / "model.safetensors")
    with pytest.raises(gl.CheckpointError, match="is missing|are missing"):
        gl.from_pretrained(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"attn_layer_idx": [1]}, "without layers of attention between"),
        ({"ssm_cfg": {**SSM, "headdim": 5}}, "cannot be cut into heads of 5"),
        ({"ssm_cfg": {**SSM, "ngroups": 3}}, "in 3 groups evenly"),
        ({"ssm_cfg": {**SSM, "d_state": 2}}, "makes no whole pairs"),
        ({"ssm_cfg": {**SSM, "rope_fraction": 0.3}}, "rope_fraction"),
        ({"ssm_cfg": {**SSM, "is_mimo": True, "is_outproj_norm": True}}, "opens MIMO without that norm"),
        ({"ssm_cfg": {**SSM, "A_activation": "relu"}}, "A_activation"),
    ],
)
def test_what_is_not_supported_is_named(sizes, said):
    with pytest.raises(gl.CheckpointError, match=said):
        HookedMamba3.tiny(**sizes)


class MambaLMHeadModel(Mamba3Weights):
    """A class of mamba-ssm's name: what is inside decides which architecture it is."""


class Mamba3ForCausalLM(Mamba3Weights):
    """A class of fla's name, with its names."""

    def __init__(self, config):
        super().__init__(config)
        self.config = FLA
        self.backbone.embeddings = self.backbone.embedding
        del self.backbone.embedding


def of_code(module: str, **code):
    """mamba-ssm's model, its mixers of a class `Mamba3` of this module, which has `code`."""
    sys.modules[module] = types.ModuleType(module)
    vars(sys.modules[module]).update(code)
    methods = {"_compute_a": None} if module == "fla.layers.mamba3" and code else {}
    cls = type("Mamba3", (nn.Module,), {"__module__": module, **methods})
    model = Mamba3ForCausalLM(dict(TINY.config)) if module.startswith("fla.") else MambaLMHeadModel(dict(TINY.config))
    for layer in model.backbone.layers:
        layer.mixer.__class__ = cls
    return model


@pytest.mark.parametrize(
    ("module", "code", "means"),
    [
        ("mamba_ssm.modules.mamba3", {"heavy_tail_activation": 1}, "heavy_tail"),
        ("mamba_ssm.modules.mamba3", {}, "softplus"),
        ("fla.layers.mamba3", {"F": 1}, "softplus"),
    ],
)
def test_the_code_of_a_mixers_class_says_how_A_is_made(monkeypatch, module, code, means):
    monkeypatch.setitem(sys.modules, module, None)
    assert gl.wrap(of_code(module, **code)).cfg.A_activation == means


@pytest.mark.parametrize("module", ["a_fork.mamba3", "fla.layers.mamba3"])
def test_a_strangers_mixer_has_to_be_told(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    model = of_code(module)
    with pytest.raises(
        gl.CheckpointError, match=r"softplus, as in mamba-ssm 2.3.2, or by the heavy tail.*A_activation"
    ):
        gl.wrap(model)
    told = {"A_activation": "softplus"}
    model.config = {**model.config, **(told if module.startswith("fla.") else {"ssm_cfg": {**SSM, **told}})}
    assert gl.wrap(model).cfg.A_activation == "softplus"


FLA = {
    "model_type": "mamba3", "hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 40, "state_size": 4, "head_dim": 8,
    "n_groups": 2, "norm_eps": 1e-3,
}  # fmt: skip


def test_a_folder_of_fla_has_to_say_which_release_it_means(tmp_path):
    ours = HookedMamba3.tiny(
        dtype=torch.float32, norm_epsilon=1e-3, tie_embeddings=False, ssm_cfg={**SSM, "A_activation": "softplus"}
    )
    for layer in ours.wrapped.backbone.layers:
        layer.mixer.B_norm.eps = layer.mixer.C_norm.eps = 1e-3
    ours = gl.wrap(ours.wrapped)
    (tmp_path / "config.json").write_text(json.dumps(FLA))
    state = {name.replace("embedding.", "embeddings."): x for name, x in ours.wrapped.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(
        gl.CheckpointError, match=r"in 0.5.2 and later A is made by softplus.*fla 0.5.1 made A a constant"
    ):
        gl.from_pretrained(tmp_path, device="cpu")
    (tmp_path / "config.json").write_text(json.dumps({**FLA, "A_activation": "softplus"}))
    model = gl.from_pretrained(tmp_path, device="cpu")
    assert relative(model(TOKENS), ours(TOKENS)) < 1e-6 and model.cfg.A_activation == "softplus"
    (tmp_path / "config.json").write_text(json.dumps({**FLA, "A_activation": "softplus", "use_bias": True}))
    with pytest.raises(gl.CheckpointError, match="use_bias"):
        gl.from_pretrained(tmp_path, device="cpu")


def test_mamba_ssms_class_is_told_by_its_mixers():
    assert isinstance(gl.wrap(MambaLMHeadModel(dict(TINY.config))), HookedMamba3)
    model = MambaLMHeadModel({**TINY.config, "ssm_cfg": {**SSM, "ngroups": 1}})
    del model.backbone.layers[1].mixer.B_bias
    with pytest.raises(gl.CheckpointError, match="Layer 1 of .* is no Mamba-3 mixer"):
        gl.wrap(model)
    model = MambaLMHeadModel({**TINY.config, "ssm_cfg": {**SSM, "ngroups": 1}})
    model.config = {**model.config, "ssm_cfg": SSM}
    with pytest.raises(gl.CheckpointError, match="leave -7 for angles"):
        gl.wrap(model)


def test_the_sizes_of_a_published_checkpoint():
    """state-spaces/mamba3-mimo-187m: its MLP is as wide as the next multiple of 128."""
    layer = layer_parameters(768, nn.RMSNorm, is_mimo=True, d_mlp=1264)
    assert layer.mixer.in_proj.weight.shape == (4200, 768) and layer.mlp.fc1.weight.shape == (2560, 768)
    assert layer_parameters(768, nn.RMSNorm).mixer.in_proj.weight.shape == (3432, 768)
    assert json.loads((GOLDEN / "mamba3_mimo_lm" / "config.json").read_text())["ssm_cfg"]["layer"] == "Mamba3"

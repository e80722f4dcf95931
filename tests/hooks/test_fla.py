"""fla's models: every row against its literal equation, each mixer against a loop, what a checkpoint may say, what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import gatedlens as gl
from gatedlens.formats.fla import KINDS, FlaWeights, is_gated, sizes_of
from gatedlens.hooks.fla import ATTENTION, MODEL_TYPES, ROWS, USUAL, HookedFLA, kind_of
from tests.helpers import GOLDEN, golden, padded, relative
from tests.hooks import battery
from tests.hooks.literal import conv_taps, norm, recurrence, rms

TOKENS = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(0))
GATES = {"use_output_gate": False, "use_gate": False}
VARIANTS = {  # model_type and what its config says
    "gla": ("gla", {}),
    "gla, short conv, no gate": ("gla", {"use_short_conv": True, **GATES}),
    "gla, clamped, its norm alone": ("gla", {"clamp_min": -0.3, "fuse_norm": False}),
    "retnet": ("retnet", {"expand_v": 2.0}),
    "retnet, short conv": ("retnet", {"use_short_conv": True}),
    "hgrn2": ("hgrn2", {}),
    "hgrn2, heads said": ("hgrn2", {"expand_ratio": None, "num_heads": 2, "use_short_conv": True}),
    "hgrn2, no lower bound": ("hgrn2", {"use_lower_bound": False}),
    "delta_net": ("delta_net", {}),
    "delta_net, gated, no conv, turning over": (
        "delta_net",
        {"use_gate": True, "use_short_conv": False, "allow_neg_eigval": True},
    ),
    "gated_deltanet": ("gated_deltanet", {"head_dim": 3, "expand_v": 2.0}),
    "gated_deltaproduct of one step": (
        "gated_deltaproduct",
        {"head_dim": 3, "expand_v": 2.0, "allow_neg_eigval": True},
    ),
    "gated_deltaproduct of one step, with a forget gate, no output gate": (
        "gated_deltaproduct",
        {"use_forget_gate": True, **GATES},
    ),
    "gated_deltaproduct of two steps": (
        "gated_deltaproduct",
        {"head_dim": 3, "expand_v": 2.0, "use_forget_gate": True, "allow_neg_eigval": True, "num_householder": 2},
    ),
    "gated_deltaproduct of three steps, heads in groups, no decay, conv or gate": (
        "gated_deltaproduct",
        {"num_heads": 2, "num_v_heads": 4, "num_householder": 3, "use_short_conv": False, **GATES},
    ),
    "gated_deltanet and attention": (
        "gated_deltanet",
        {"attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "rope_theta": 100.0}},
    ),
    "gla and windowed attention": (
        "gla",
        {"attn": {"layers": [0], "num_heads": 2, "window_size": 3, "qkv_bias": True}},
    ),
    "gated_deltanet, heads in groups, no gate": ("gated_deltanet", {"num_heads": 2, "num_v_heads": 4, **GATES}),
}


def tiny(variant: str, **more) -> HookedFLA:
    kind, words = VARIANTS[variant]
    config = {"model_type": kind, "num_hidden_layers": 2, "norm_eps": 1e-3, **words, **more}
    own = ("attn", "num_householder", "use_forget_gate")  # of the tiny model alone
    small = {name: word for name, word in HookedFLA.small.config.items() if name not in own}
    return gl.wrap(replace(HookedFLA.small, config=small).module(1, config).double())


@pytest.fixture(params=VARIANTS)
def model(request):
    return tiny(request.param)


# -- the equations --------------------------------------------------------------------------------------------------


def silu(x):
    return x * torch.sigmoid(x)


def unit(x):
    return x / (x.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt()


def literal(cache, model, layer: int) -> dict[str, torch.Tensor]:
    """Every row of one block from its equation, with loops, reading the rows it names from the cache."""
    w, cfg = model.wrapped.model.layers[layer], model.cfg
    m, kind, out = w.attn, cfg.kinds[layer], {}
    H, G, N, steps = cfg.n_heads, cfg.n_groups, cfg.d_state, cfg.n_steps

    def c(name):
        return cache[f"blocks.{layer}.{name}"]

    def heads(x, count=H):
        return x.unflatten(-1, (count, -1))

    out["hook_resid_pre"] = cache["hook_embed"] if layer == 0 else cache["resid_post", layer - 1]
    out["hook_mixer_in"] = c("hook_resid_pre")
    norm(out, c, "ln1", w.attn_norm, c("hook_mixer_in"), cfg.eps)
    if "attention" in kind.mixing:
        attention(out, c, m, model.wrapped.config["attn"])
        return mlp(out, c, w, cfg)
    n, f = c("ln1.hook_out"), "f" if kind.mixing == "HGRN2" else "k"
    v, acts = ("i" if f == "f" else "v"), kind.mixing != "HGRN2" and (kind.conv or "Delta" in kind.mixing)
    for stream in ("q", f):
        out[f"mixer.hook_{stream}_pre"] = heads(n @ getattr(m, f"{stream}_proj").weight.T, G)
    out["mixer.hook_x"] = n @ getattr(m, f"{v}_proj").weight.T
    if steps > 1:
        out["mixer.hook_k_pre"] = (n @ m.k_proj.weight.T).unflatten(-1, (steps, G, N))
        out["mixer.hook_x"] = out["mixer.hook_x"].unflatten(-1, (steps, -1))
    entered = {"q": "q_pre", f: f"{f}_pre", v: "x"}
    if kind.conv:
        for stream, pre in entered.items():
            name = "" if stream == v else f"{stream}_"
            out[f"mixer.hook_{name}conv_taps"] = conv_taps(
                c(f"mixer.hook_{pre}"), getattr(m, f"{stream}_conv1d").weight
            )
            out[f"mixer.hook_{name}conv"] = c(f"mixer.hook_{name}conv_taps").sum(-1)
            entered[stream] = f"{name}conv"
    q, k, u = (silu(c(f"mixer.hook_{e}")) if acts else c(f"mixer.hook_{e}") for e in entered.values())
    out["mixer.hook_u"] = u
    u = heads(c("mixer.hook_u"))
    mixers = {"GLA": gla, "RetNet": retnet, "HGRN2": hgrn2}
    (product if steps > 1 else mixers.get(kind.mixing, delta))(out, c, model, layer, q, k, u)

    out["mixer.hook_y"] = c("mixer.hook_scan")
    y = c("mixer.hook_y") if kind.mixing == "HGRN2" else heads(c("mixer.hook_y"))
    normed = next(getattr(m, name) for name in ("o_norm", "g_norm_swish_gate", "g_norm") if name in m._modules)
    out["mixer.hook_scale"] = rms(y, cfg.eps) if kind.mixing == "HGRN2" else rms(y, cfg.eps).squeeze(-1)
    scale = c("mixer.hook_scale") if kind.mixing == "HGRN2" else c("mixer.hook_scale").unsqueeze(-1)
    y = normed.weight * y / scale
    y = y if kind.mixing == "HGRN2" else y.flatten(2)
    if kind.gated:
        out["mixer.hook_gate_pre"] = n @ m.g_proj.weight.T
        out["mixer.hook_normed"] = y
        out["mixer.hook_gate"] = silu(c("mixer.hook_gate_pre"))
        y = c("mixer.hook_normed") * c("mixer.hook_gate")
    out["mixer.hook_gated"] = y
    out["hook_mixer_out"] = c("mixer.hook_gated") @ m.o_proj.weight.T
    assert out["mixer.hook_q_pre"].shape[-1] == N
    return mlp(out, c, w, cfg)


def mlp(out, c, w, cfg) -> dict[str, torch.Tensor]:
    out["hook_resid_mid"] = c("hook_resid_pre") + c("hook_mixer_out")
    out["hook_mlp_in"] = c("hook_resid_mid")
    norm(out, c, "ln2", w.mlp_norm, c("hook_mlp_in"), cfg.eps)
    read = c("ln2.hook_out")
    out["mlp.hook_pre"], out["mlp.hook_pre_linear"] = read @ w.mlp.gate_proj.weight.T, read @ w.mlp.up_proj.weight.T
    out["mlp.hook_post"] = silu(c("mlp.hook_pre")) * c("mlp.hook_pre_linear")
    out["hook_mlp_out"] = c("mlp.hook_post") @ w.mlp.down_proj.weight.T
    out["hook_resid_post"] = c("hook_resid_mid") + c("hook_mlp_out")
    return out


def attention(out, c, m, told) -> None:
    n, H, KV = c("ln1.hook_out"), told["num_heads"], told.get("num_kv_heads") or told["num_heads"]
    (batch, length), share, window = TOKENS.shape, H // KV, told.get("window_size", 99)
    for name, heads in (("q", H), ("k", KV), ("v", KV)):
        projection = getattr(m, f"{name}_proj")
        bias = 0 if projection.bias is None else projection.bias
        out[f"attn.hook_{name}"] = (n @ projection.weight.T + bias).unflatten(-1, (heads, -1))
    for name in "qk":
        out[f"attn.hook_rot_{name}"] = turned(c(f"attn.hook_{name}"), told.get("rope_theta", 10000))
    q, k, v = c("attn.hook_rot_q"), c("attn.hook_rot_k"), c("attn.hook_v")
    scores = torch.full((batch, H, length, length), -torch.inf, dtype=torch.float64)
    for i in range(length):
        for j in range(max(0, i - window + 1), i + 1):
            for h in range(H):
                scores[:, h, i, j] = (q[:, i, h] * k[:, j, h // share]).sum(-1) / math.sqrt(q.shape[-1])
    out["attn.hook_attn_scores"] = scores
    shares = torch.exp(c("attn.hook_attn_scores"))
    out["attn.hook_pattern"] = shares / shares.sum(-1, keepdim=True)
    z = [torch.einsum("bij,bjd->bid", c("attn.hook_pattern")[:, h], v[:, :, h // share]) for h in range(H)]
    out["attn.hook_z"] = torch.stack(z, 2)
    out["hook_mixer_out"] = c("attn.hook_z").flatten(2) @ m.o_proj.weight.T


def turned(x, base):
    """Pairs (j, j + n / 2) of each head turned by t base^(-2j / n)."""
    N, out = x.shape[-1], torch.zeros_like(x)
    for t in range(x.shape[1]):
        for j in range(N // 2):
            angle = t * base ** (-2 * j / N)
            a, b = x[:, t, :, j], x[:, t, :, j + N // 2]
            out[:, t, :, j] = a * math.cos(angle) - b * math.sin(angle)
            out[:, t, :, j + N // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


def read(out, c, q) -> None:
    scan = torch.einsum("blhvk,blhk->blhv", c("mixer.hook_state"), q) / math.sqrt(q.shape[-1])
    out["mixer.hook_scan"] = scan.flatten(2)


def gla(out, c, model, layer, q, k, u) -> None:
    m, cfg = model.wrapped.model.layers[layer].attn, model.cfg
    out["mixer.hook_decay_low"] = c("ln1.hook_out") @ m.gk_proj[0].weight.T
    pre = c("mixer.hook_decay_low") @ m.gk_proj[1].weight.T + m.gk_proj[1].bias
    out["mixer.hook_decay_pre"] = pre.unflatten(-1, (cfg.n_heads, -1))
    out["mixer.hook_q"], out["mixer.hook_k"] = q, k
    log_decay = -torch.log(1 + torch.exp(-c("mixer.hook_decay_pre"))) / 16
    if cfg.least_log_decay is not None:
        log_decay = torch.where(log_decay < cfg.least_log_decay, cfg.least_log_decay, log_decay)
    out["mixer.hook_log_decay"] = log_decay
    recurrence(out, c, torch.exp(c("mixer.hook_log_decay")), u, c("mixer.hook_k"))
    read(out, c, c("mixer.hook_q"))


def retnet(out, c, model, layer, q, k, u) -> None:
    out["mixer.hook_q"], out["mixer.hook_k"] = q, k
    for name in "qk":
        out[f"mixer.hook_rot_{name}"] = turned(c(f"mixer.hook_{name}"), 10000)
    rates = torch.tensor([math.log(1 - 2 ** (-5 - h)) for h in range(model.cfg.n_heads)], dtype=torch.float64)
    out["mixer.hook_log_decay"] = rates.expand(*TOKENS.shape, -1)
    recurrence(out, c, torch.exp(c("mixer.hook_log_decay")).unsqueeze(-1), u, c("mixer.hook_rot_k"))
    read(out, c, c("mixer.hook_rot_q"))


def hgrn2(out, c, model, layer, q, f, u) -> None:
    out["mixer.hook_q"] = silu(q)
    bounds, lower = model.wrapped.model._parameters.get("lower_bounds"), 0
    if bounds is not None and layer > 0:
        shares = torch.exp(bounds) / torch.exp(bounds).sum(0)
        lower = sum(shares[i] for i in range(1, layer + 1)).unflatten(0, (model.cfg.n_heads, -1))
    out["mixer.hook_log_decay"] = torch.log(lower + (1 - lower) * torch.sigmoid(f))
    out["mixer.hook_k"] = 1 - torch.exp(c("mixer.hook_log_decay"))
    recurrence(out, c, torch.exp(c("mixer.hook_log_decay")), u, c("mixer.hook_k"))
    read(out, c, c("mixer.hook_q"))


def delta(out, c, model, layer, q, k, u) -> None:
    m, cfg = model.wrapped.model.layers[layer].attn, model.cfg
    n, share = c("ln1.hook_out"), cfg.n_heads // cfg.n_groups
    out["mixer.hook_beta_pre"] = n @ m.b_proj.weight.T
    out["mixer.hook_q"], out["mixer.hook_k"] = unit(q), unit(k)
    out["mixer.hook_beta"] = cfg.beta_max * torch.sigmoid(c("mixer.hook_beta_pre"))
    decay = torch.ones_like(c("mixer.hook_beta"))
    if cfg.kinds[layer].mixing == "gated DeltaNet":
        out["mixer.hook_dt_pre"] = n @ m.a_proj.weight.T + m.dt_bias
        out["mixer.hook_dt"] = torch.log(1 + torch.exp(c("mixer.hook_dt_pre")))
        out["mixer.hook_log_decay"] = -torch.exp(m.A_log) * c("mixer.hook_dt")
        decay = torch.exp(c("mixer.hook_log_decay"))
    q, k = (c(f"mixer.hook_{name}").repeat_interleave(share, dim=2) for name in "qk")
    written, decay = c("mixer.hook_beta")[..., None] * k, decay[..., None]
    recurrence(out, c, decay, u, written, erase=written, probe=decay * k)
    read(out, c, q)


def product(out, c, model, layer, q, k, u) -> None:
    """A delta net whose tokens take several steps."""
    m, cfg = model.wrapped.model.layers[layer].attn, model.cfg
    n, (batch, length), share, steps = c("ln1.hook_out"), TOKENS.shape, cfg.n_heads // cfg.n_groups, cfg.n_steps
    out["mixer.hook_beta_pre"] = (n @ m.b_proj.weight.T).unflatten(-1, (steps, -1))
    out["mixer.hook_q"], out["mixer.hook_k"] = unit(q), unit(k)
    out["mixer.hook_beta"] = cfg.beta_max * torch.sigmoid(c("mixer.hook_beta_pre"))
    out["mixer.hook_reset"] = torch.zeros(batch, length, 1, dtype=torch.float64)
    decay = torch.ones(batch, length, cfg.n_heads, dtype=torch.float64)
    if cfg.kinds[layer].mixing == "gated DeltaProduct":
        out["mixer.hook_dt_pre"] = n @ m.a_proj.weight.T + m.dt_bias
        out["mixer.hook_dt"] = torch.log(1 + torch.exp(c("mixer.hook_dt_pre")))
        out["mixer.hook_log_decay"] = -torch.exp(m.A_log) * c("mixer.hook_dt")
        decay = torch.exp(c("mixer.hook_log_decay"))
    key = c("mixer.hook_k").repeat_interleave(share, dim=3)  # batch pos step head state
    shape = (batch, length, cfg.n_heads, cfg.d_head, cfg.d_state)
    out["mixer.hook_state_start"] = torch.zeros(batch, *shape[2:], dtype=torch.float64)
    out["mixer.hook_decay"] = (decay * (1 - c("mixer.hook_reset")))[..., None, None].expand(shape)
    written = c("mixer.hook_beta")[..., None] * key
    out["mixer.hook_erase"] = written.unsqueeze(-2).expand(*written.shape[:-1], cfg.d_head, cfg.d_state)
    out["mixer.hook_probe"] = key.clone()
    out["mixer.hook_probe"][:, :, 0] *= (decay * (1 - c("mixer.hook_reset")))[..., None]
    net, state, states = [], c("mixer.hook_state_start"), []
    for t in range(length):
        alone, state = 0 * state, state

        def erased(it, s, t=t):
            found = (it * c("mixer.hook_probe")[:, t, s].unsqueeze(-2)).sum(-1, keepdim=True)
            return found * c("mixer.hook_erase")[:, t, s]

        state = c("mixer.hook_decay")[:, t] * state - erased(state, 0)
        for s in range(steps):
            alone = alone - erased(alone, s) if s else alone
            state = state - erased(state, s) if s else state
            alone = alone + u[:, t, s].unsqueeze(-1) * written[:, t, s].unsqueeze(-2)
        net.append(alone)
        state = state + c("mixer.hook_write")[:, t]
        states.append(state)
    out["mixer.hook_write"], out["mixer.hook_state"] = torch.stack(net, 1), torch.stack(states, 1)
    read(out, c, c("mixer.hook_q").repeat_interleave(share, dim=2))


def test_every_row_is_its_equation(model):
    battery.rows_are_their_equations(model, literal, TOKENS, 1e-10)


@pytest.mark.parametrize(
    "variant",
    [
        "gla",
        "retnet",
        "hgrn2",
        "delta_net",
        "gated_deltanet",
        "gated_deltaproduct of two steps",
        "gated_deltanet and attention",
    ],
)
def test_after_an_edit_every_row_downstream_is_its_equation(variant):
    battery.edits_reach_every_row(tiny(variant), literal, 1, TOKENS, rtol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_golden_mixers(kind):
    """What each mixer puts out is what fla's own layer does, of the same input."""
    config, _, io = golden(f"fla_{kind}")
    tokens, stems = io["input_ids"].long(), [f"blocks.{layer}." for layer in range(config["num_hidden_layers"])]
    for dtype, bound in ((torch.float64, 2e-6), (torch.float32, 4e-6)):
        model = gl.from_pretrained(str(GOLDEN / f"fla_{kind}"), device="cpu", dtype=dtype)
        put = [(f"{stem}ln1.hook_out", lambda x, hook, i=i: io[f"in.{i}"].to(x.dtype)) for i, stem in enumerate(stems)]
        with model.hooks(put):
            _, cache = model.run_with_cache(tokens, names_filter="*.hook_mixer_out")
        for i, stem in enumerate(stems):
            assert relative(cache[f"{stem}hook_mixer_out"], io[f"out.{i}"]) < bound, i


def test_gradients_are_the_same_with_somebody_inside(model):
    """By chunks, and state by state."""
    parameters = dict(model.wrapped.named_parameters())
    weight = torch.randn(2, 9, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = torch.autograd.grad((model(TOKENS) * weight).sum(), list(parameters.values()))
    with model.hooks([("*.hook_state", lambda x, hook: None)]):
        found = torch.autograd.grad((model(TOKENS) * weight).sum(), list(parameters.values()))
    for name, got, own in zip(parameters, found, wanted, strict=True):
        assert relative(got, own) < 1e-10 and (name == "model.lower_bounds" or own.abs().max() > 0), name


# -- each mixer, as a whole -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_implicit_attention_reconstructs_every_layer_also_behind_a_state(model):
    _, cache = model.run_with_cache(TOKENS)
    _, state = model(TOKENS[:, :4], return_state=True)
    _, later = model.run_with_cache(TOKENS[:, 4:], state=state)
    for layer in range(2):
        for given in (cache, later):
            assert gl.implicit_attention(given, layer=layer).check().relative < 1e-11


@torch.no_grad()
def test_every_split_goes_on(model):
    whole = model(TOKENS)
    for at in (1, 3, 8):
        _, state = model(TOKENS[:, :at], return_state=True)
        assert relative(model(TOKENS[:, at:], state=state), whole[:, at:]) < 1e-11


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_the_rows_alone_and_leave_their_states(model, side):
    rows = [TOKENS[0], TOKENS[1, :5]]
    tokens, mask = padded(rows, side)
    logits, state = model(tokens, attention_mask=mask, return_state=True)
    later = model(TOKENS[:, :2], state=state)
    for i, row in enumerate(rows):
        alone, own = model(row[None], return_state=True)
        assert relative(logits[i, mask[i]], alone[0]) < 1e-11
        assert relative(later[i], model(TOKENS[i : i + 1, :2], state=own)[0]) < 1e-11


@torch.no_grad()
def test_documents_in_a_row_are_the_documents_alone(model):
    positions = torch.tensor([[*range(4), *range(5)]])
    logits, cache = model.run_with_cache(TOKENS[:1], position_ids=positions)
    assert relative(logits[:, :4], model(TOKENS[:1, :4])) < 1e-11
    assert relative(logits[:, 4:], model(TOKENS[:1, 4:])) < 1e-11
    assert gl.implicit_attention(cache, layer=1).check().relative < 1e-11


@torch.no_grad()
@pytest.mark.parametrize("variant", ["retnet", "gated_deltanet"])
def test_generation_is_the_argmax_of_a_run_on_all(variant):
    model = tiny(variant)
    out = model.generate(TOKENS, max_new_tokens=3, do_sample=False, verbose=False)
    tokens = TOKENS
    for _ in range(3):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, tokens)


def test_the_lower_bounds_are_those_of_the_call_and_have_a_gradient():
    model = tiny("hgrn2")
    other = torch.randn(2, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    swapped = torch.func.functional_call(model, {"wrapped.model.lower_bounds": other}, (TOKENS,))
    (gradient,) = torch.autograd.grad(model(TOKENS).pow(2).sum(), model.wrapped.model.lower_bounds)
    assert gradient.abs().min() > 0
    with torch.no_grad():
        model.wrapped.model.lower_bounds.copy_(other)
        assert relative(swapped, model(TOKENS)) < 1e-14


# -- modules and checkpoints ----------------------------------------------------------------------------------------


class Config:
    """As transformers' configs are: attributes, and `to_dict`."""

    def __init__(self, **words):
        vars(self).update(words)


@torch.no_grad()
@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ("gla", "GLAForCausalLM"),
        ("retnet", "RetNetForCausalLM"),
        ("hgrn2", "HGRN2ForCausalLM"),
        ("delta_net", "DeltaNetForCausalLM"),
        ("gated_deltanet", "GatedDeltaNetForCausalLM"),
        ("gated_deltaproduct of one step", "GatedDeltaProductForCausalLM"),
        ("gated_deltaproduct of two steps", "GatedDeltaProductForCausalLM"),
        ("gated_deltanet and attention", "GatedDeltaNetForCausalLM"),
    ],
)
def test_a_module_of_flas_is_opened_by_the_names_of_its_parameters(variant, name):
    known = tiny(variant)
    module = type(name, (nn.Module,), {})()
    module.model, module.lm_head = known.wrapped.model, known.wrapped.lm_head
    module.config = Config(**known.wrapped.config)
    opened = gl.wrap(module)
    assert isinstance(opened, HookedFLA) and opened.cfg.kinds == known.cfg.kinds
    assert relative(opened(TOKENS), known(TOKENS)) < 1e-14


def test_the_divisor_of_glas_decay_is_the_modules():
    model = tiny("gla")
    for layer in model.wrapped.model.layers:
        layer.attn.gate_logit_normalizer = 4
    with torch.no_grad():
        _, cache = gl.wrap(model.wrapped).run_with_cache(TOKENS)
    assert relative(cache["log_decay", 0], torch.nn.functional.logsigmoid(cache["decay_pre", 0]) / 4) < 1e-14


@torch.no_grad()
@pytest.mark.parametrize(
    "variant", ["gla", "hgrn2", "gated_deltanet", "gated_deltaproduct of two steps", "gla and windowed attention"]
)
def test_a_saved_folder_is_opened(variant, tmp_path):
    model = tiny(variant)
    model.wrapped.save_pretrained(tmp_path)
    opened = gl.from_pretrained(str(tmp_path), device="cpu")
    assert opened.cfg.kinds == model.cfg.kinds and relative(opened(TOKENS), model(TOKENS)) < 1e-14
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "attn": {"layers": [1], "num_heads": 2}}))
    with pytest.raises(gl.CheckpointError, match=r"has unknown .* weights: .*model.layers.1.attn"):
        gl.from_pretrained(str(tmp_path), device="cpu")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"feature_map": "relu"}, "feature_map is 'relu'; expected is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; expected is 'swish' or 'silu'"),
        ({"num_kv_heads": 2}, "num_kv_heads is 2 and num_heads 4"),
        ({"num_heads": 3}, "16 numbers of keys in 3 heads"),
        ({"attnres_block_size": 2}, "attnres_block_size is 2; expected is null"),
        ({"layer_types": ["gla"]}, "1 layer_types for 2 layers"),
        ({"qk_norm": "sum"}, "qk_norm is 'sum'; expected is 'l2'"),
        ({"use_beta": False}, "use_beta is false"),
        ({"num_householder": 0}, "num_householder is 0; expected is a whole number from 1"),
        ({"attn": {"layers": [0]}}, "attn is .*; it needs layers and num_heads"),
        ({"attn": {"layers": [0], "num_heads": 3}}, "attn has 3 heads, 3 of keys, of 16 numbers"),
        ({"attn": {"layers": [0, 2], "num_heads": 4}}, "attn has layer 2; there are 2 layers, from 0"),
        ({"attn": [{"layers": [0], "num_heads": 4}]}, r"attn is \[.*; expected is an object {...}, or null"),
        ({"model_type": "gsa"}, "model_type is 'gsa'; expected is 'gla' or 'retnet'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_it_cannot_run_is_told_by_name(words, message):
    with pytest.raises(gl.CheckpointError, match=message):
        FlaWeights({**HookedFLA.small.config, "model_type": "gla", "attn": None, **words})


def test_a_config_that_does_not_fit_the_weights_is_told():
    with pytest.raises(gl.CheckpointError, match="has layers of attention alone: no recurrence to open"):
        tiny("gla", attn={"layers": [0, 1], "num_heads": 4})
    hybrid = tiny("gla and windowed attention").wrapped
    hybrid.config = {**hybrid.config, "attn": None}
    with pytest.raises(gl.CheckpointError, match="has layers of attention, of which its config says nothing"):
        gl.wrap(hybrid)
    wrapped = tiny("gla").wrapped
    wrapped.config = {**wrapped.config, "expand_v": 2.0}
    with pytest.raises(gl.CheckpointError, match="Layer 0 of FlaWeights has 16 numbers of queries and 16 of values"):
        gl.wrap(wrapped)


@pytest.mark.parametrize("kind", KINDS)
def test_a_published_config_is_silent_about_most(kind):
    """What fla takes by itself: the sizes of a model whose config.json says its kind alone."""
    heads, groups, key, value = sizes_of(kind, {})
    assert (heads, groups, key, value) == {
        "gla": (4, 4, 256, 512),
        "retnet": (8, 8, 256, 512),
        "hgrn2": (16, 16, 128, 128),
        "delta_net": (16, 16, 128, 128),
        "gated_deltanet": (6, 6, 256, 512),
        "gated_deltaproduct": (6, 6, 256, 512),
    }[kind]
    with torch.device("meta"):
        weights = FlaWeights({"model_type": kind, "vocab_size": 8, "num_hidden_layers": 1})
    layer = weights.model.layers[0]
    assert kind_of(layer.attn, sizes_of(kind, {})) in ROWS and ("g_proj" in layer.attn._modules) == is_gated(kind, {})
    assert layer.mlp.up_proj.weight.shape[0] == (2816 if kind == "retnet" else 5632)


def test_kinds_are_all_that_stand_in_a_model():
    seen = {kind for variant in VARIANTS for kind in tiny(variant).cfg.kinds}
    assert {kind.mixing for kind in seen} == {*MODEL_TYPES, *ATTENTION} == {kind.mixing for kind in ROWS}
    assert seen < set(ROWS) and set(USUAL) < set(ROWS)
    assert list(HookedFLA.kinds()) == [str(kind) for kind in USUAL]

"""MiniMax: every row against its literal equation, transformers' model, a literal loop of the whole model, the norm of the stream
as a branch, padding, documents, states, edits, folders."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import gatedlens as gl
from gatedlens.formats.minimax import new_model
from gatedlens.formats.qwen3_next import by_last_axis
from gatedlens.hooks.minimax import MINIMAX, HookedMiniMax
from gatedlens.model.tiny import Tiny, fresh
from tests.conftest import EVERY
from tests.helpers import padded, relative
from tests.hooks import battery
from tests.hooks import literal as literally

pytestmark = pytest.mark.skipif("minimax" not in EVERY, reason="this transformers has no MiniMax")

BOTH = ("norm1", "mixer")
TOKENS = torch.randint(40, (2, 11), generator=torch.Generator().manual_seed(0))
VARIANTS = {
    "tiny": {},
    # As transformers makes it: factors of 1, attention first, no head_dim, its own eps; more experts than a token takes.
    "plain": {
        "layer_types": None, "num_hidden_layers": 3, "head_dim": None, "num_local_experts": 3, "rms_norm_eps": 1e-5,
        **{f"{one}_factor": 1 for one in (
            "linear_attn_alpha", "linear_attn_beta", "full_attn_alpha", "full_attn_beta", "mlp_alpha", "mlp_beta",
        )},
    },
    "window, nothing kept": {
        "sliding_window": 4, "layer_types": ["full_attention", "linear_attention"], "linear_attn_alpha_factor": 0,
        "full_attn_alpha_factor": -0.5, "num_key_value_heads": 4,
    },
}  # fmt: skip


def tiny(variant: str = "tiny", dtype: torch.dtype = torch.float64) -> HookedMiniMax:
    model = HookedMiniMax.tiny(seed=1, dtype=dtype, **VARIANTS[variant])
    model.wrapped.config._experts_implementation = "eager"
    return model


@pytest.fixture(params=VARIANTS)
def model(request):
    return tiny(request.param)


# -- the literal equations ------------------------------------------------------------------------------------------


def factors(config, lightning: bool) -> tuple[float, float]:
    kind = "linear" if lightning else "full"
    return getattr(config, f"{kind}_attn_alpha_factor"), getattr(config, f"{kind}_attn_beta_factor")


def slopes(config, layer: int) -> list[float]:
    """2^(-8 (h + 1) / H), times what the layer's depth leaves of it."""
    H, n = config.num_attention_heads, config.num_hidden_layers
    return [2 ** (-8 * (h + 1) / H) * (1 - layer / (n - 1 + 1e-5) + 1e-5) for h in range(H)]


def literal(cache, model, layer: int) -> dict[str, torch.Tensor]:
    """Every row of one block from its equation, with loops, reading the rows it names from the cache."""
    out, w, config = {}, model.wrapped.model.layers[layer], model.wrapped.config
    eps, cfg = config.rms_norm_eps, model.cfg

    def c(name):
        return cache[f"blocks.{layer}.{name}"]

    literally.around(out, c, cache, layer, (("norm1", "mixer"), ("norm2", "mlp")))
    lightning = cfg.kinds[layer] == "lightning"
    alpha, beta = factors(config, lightning)
    for name, norm, kept in (
        ("norm1", w.input_layernorm, alpha),
        ("norm2", w.post_attention_layernorm, config.mlp_alpha_factor),
    ):
        literally.norm_rows(out, c, name, c(f"hook_{name}_in"), norm.weight, eps)
        out[f"hook_{name}_out"] = kept * c(f"{name}.hook_out") - c(f"hook_{name}_in")
    literally.norm_rows(out, c, "ln1", c("hook_mixer_in"), w.input_layernorm.weight, eps)
    n, m = c("ln1.hook_out"), w.self_attn
    if lightning:
        lightning_rows(out, c, m, n, cfg, slopes(config, layer))
        out["hook_mixer_out"] = beta * (c("mixer.hook_gated") @ m.out_proj.weight.T)
    else:
        theta = config.rope_parameters["rope_theta"]
        literally.attention(out, c, m, n, cfg.d_head, cfg.d_head, theta=theta)
        if config.sliding_window is not None:
            scores = out["attn.hook_attn_scores"]
            for i in range(scores.shape[2]):
                scores[:, :, i, : max(0, i - config.sliding_window + 1)] = -torch.inf
        out["hook_mixer_out"] = beta * literally.linear(c("attn.hook_z").flatten(2), m.o_proj)
    literally.norm_rows(out, c, "ln2", c("hook_mlp_in"), w.post_attention_layernorm.weight, eps)
    read = c("ln2.hook_out")
    out["mlp.hook_router"] = read @ w.mlp.gate.weight.T
    shares = c("mlp.hook_router").softmax(-1)
    out["mlp.hook_expert_weights"] = literally.chosen(shares, shares, cfg.n_experts_per_token, normalised=True)
    literally.experts(out, c, w.mlp.experts, read)
    out["hook_mlp_out"] = config.mlp_beta_factor * literally.of_experts(c)
    return out


def lightning_rows(out, c, m, n: torch.Tensor, cfg, slope: list[float]) -> None:
    """A lightning attention up to what out_proj reads."""
    H, D = cfg.n_heads, cfg.d_head
    qkv = n @ m.qkv_proj.weight.T
    for number, name in enumerate(("q_pre", "k_pre", "x")):
        heads = [qkv[..., 3 * D * h + number * D : 3 * D * h + (number + 1) * D] for h in range(H)]
        out[f"mixer.hook_{name}"] = torch.cat(heads, -1) if name == "x" else torch.stack(heads, 2)
    out["mixer.hook_gate_pre"] = n @ m.output_gate.weight.T
    for name, before in (("q", "q_pre"), ("k", "k_pre"), ("u", "x")):
        out[f"mixer.hook_{name}"] = literally.silu(c(f"mixer.hook_{before}"))
    # transformers holds slopes in float32
    out["mixer.hook_log_decay"] = -m.slope_rate.flatten().expand(*n.shape[:2], H)
    assert relative(m.slope_rate.flatten(), torch.tensor(slope, dtype=torch.float64)) < 1e-6
    u, k = c("mixer.hook_u").unflatten(-1, (H, D)), c("mixer.hook_k")
    literally.recurrence(out, c, torch.exp(c("mixer.hook_log_decay")).unsqueeze(-1), u, k)
    scan = [(c("mixer.hook_state")[:, :, h] * c("mixer.hook_q")[:, :, h, None]).sum(-1) for h in range(H)]
    out["mixer.hook_scan"], out["mixer.hook_y"] = torch.cat(scan, -1), c("mixer.hook_scan")
    out["mixer.hook_scale"] = literally.rms(c("mixer.hook_y"), m.norm.variance_epsilon)
    out["mixer.hook_normed"] = m.norm.weight * c("mixer.hook_y") / c("mixer.hook_scale")
    out["mixer.hook_gate"] = torch.sigmoid(c("mixer.hook_gate_pre"))
    out["mixer.hook_gated"] = c("mixer.hook_normed") * c("mixer.hook_gate")


def loop(model, tokens: torch.Tensor) -> torch.Tensor:
    """The logits of the whole model as its paper writes it, h = alpha n + beta f(n) of the normed stream: a token and a head at a
    time, nothing of gatedlens in it."""
    config, inner = model.wrapped.config, model.wrapped.model
    H, G, eps = config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps
    D = config.head_dim or config.hidden_size // H
    window, batch, length = config.sliding_window or tokens.shape[1], *tokens.shape

    def normed(x, norm, eps=eps):
        return norm.weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()

    h = inner.embed_tokens.weight[tokens]
    for w in inner.layers:
        n, m, lightning = normed(h, w.input_layernorm), w.self_attn, hasattr(w.self_attn, "qkv_proj")
        out = torch.zeros(batch, length, H, D, dtype=h.dtype)
        if lightning:
            qkv = literally.silu(n @ m.qkv_proj.weight.T).reshape(batch, length, H, 3, D)
            for head in range(H):
                state = torch.zeros(batch, D, D, dtype=h.dtype)
                for t in range(length):
                    q, k, v = qkv[:, t, head].unbind(1)
                    state = torch.exp(-m.slope_rate[head]) * state + k[:, :, None] * v[:, None, :]
                    out[:, t, head] = (q[:, :, None] * state).sum(1)
            gate = torch.sigmoid(n @ m.output_gate.weight.T)
            mixed = (gate * normed(out.flatten(2), m.norm, m.norm.variance_epsilon)) @ m.out_proj.weight.T
        else:
            theta = config.rope_parameters["rope_theta"]
            q, k, v = ((n @ p.weight.T).reshape(batch, length, -1, D) for p in (m.q_proj, m.k_proj, m.v_proj))
            q, k = literally.turned(q, D, theta), literally.turned(k, D, theta)
            for head in range(H):
                for i in range(length):
                    seen = slice(max(0, i - window + 1), i + 1)
                    scores = (q[:, i, head, None] * k[:, seen, head // (H // G)]).sum(-1) / D**0.5
                    out[:, i, head] = (scores.softmax(-1)[..., None] * v[:, seen, head // (H // G)]).sum(1)
            mixed = out.flatten(2) @ m.o_proj.weight.T
        alpha, beta = factors(config, lightning)
        n = normed(alpha * n + beta * mixed, w.post_attention_layernorm)
        shares = (n @ w.mlp.gate.weight.T).softmax(-1)
        weights = literally.chosen(shares, shares, config.num_experts_per_tok, normalised=True)
        experts = torch.zeros_like(n)
        for e in range(config.num_local_experts):
            gate, up = (n @ w.mlp.experts.gate_up_proj[e].T).chunk(2, -1)
            experts += weights[..., e, None] * ((literally.silu(gate) * up) @ w.mlp.experts.down_proj[e].T)
        h = config.mlp_alpha_factor * n + config.mlp_beta_factor * experts
    return normed(h, inner.norm) @ model.wrapped.lm_head.weight.T


def theirs(model, tokens, **options):
    return model.wrapped(tokens, use_cache=False, **options).logits


# -- rows, transformers ---------------------------------------------------------------------------------------------


def test_every_row_is_its_equation(model):
    battery.rows_are_their_equations(model, literal, TOKENS)


@torch.no_grad()
def test_logits_are_those_of_a_literal_loop(model):
    assert relative(model(TOKENS), loop(model, TOKENS)) < 1e-10


@pytest.mark.parametrize("layer", [0, 1], ids=["lightning", "attention"])
def test_after_an_edit_every_row_downstream_is_its_equation(layer):
    battery.edits_reach_every_row(tiny(), literal, layer, TOKENS)


@pytest.mark.parametrize("point", ["decay", "write", "state_start"])
def test_a_lazy_point_heard_alone_is_the_same_edit(point):
    battery.a_lazy_point_alone_is_the_same_edit(tiny(), point, TOKENS)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_transformers(variant):
    model = tiny(variant, torch.float32)
    tokens = torch.randint(40, (2, 90), generator=torch.Generator().manual_seed(4))  # more than a chunk
    assert relative(model(tokens), theirs(model, tokens)) < 1e-5


@torch.no_grad()
def test_a_stream_far_from_its_norm_is_transformers_too():
    """What the norm takes away is some hundred times what it puts there: float32 keeps 1e-5 of that all the same."""
    model = tiny(dtype=torch.float32)
    model.wrapped.model.embed_tokens.weight.mul_(100)
    assert relative(model(TOKENS), theirs(model, TOKENS)) < 1e-5


def test_gradients_are_transformers():
    battery.gradients_are_transformers(tiny(dtype=torch.float32), TOKENS)


def test_gradients_are_those_of_the_function():
    battery.gradients_are_those_of_the_function(tiny(), TOKENS)


@torch.no_grad()
def test_bfloat16_is_as_close_to_float32_as_transformers_is():
    model = tiny(dtype=torch.bfloat16)
    battery.half_precision_is_as_close_as_transformers_is(
        tiny(dtype=torch.float32), model, theirs(model, TOKENS), TOKENS
    )


# -- the norm of the stream -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_stream_is_what_is_written_into_it_and_what_transformers_holds(model):
    held = model.wrapped(TOKENS, use_cache=False, output_hidden_states=True).hidden_states
    _, cache = model.run_with_cache(TOKENS)
    parts, labels = cache.decompose_resid(return_labels=True)
    assert labels[:5] == ["embed", "0_norm1_out", "0_mixer_out", "0_norm2_out", "0_mlp_out"]
    assert relative(parts.sum(0), cache["resid_post", -1]) < 1e-14
    for layer in range(1, model.cfg.n_layers):
        assert relative(cache["resid_pre", layer], held[layer]) < 1e-6  # which takes steps in float32
    config, w = model.wrapped.config, model.wrapped.model.layers[0]
    alpha, _ = factors(config, model.cfg.kinds[0] == "lightning")
    x = cache["resid_pre", 0]
    n = w.input_layernorm.weight * x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
    assert relative(cache["resid_mid", 0], alpha * n + cache["mixer_out", 0]) < 1e-13
    assert (x + cache["blocks.0.hook_norm1_out"] - alpha * n).abs().max() < 1e-13


@torch.no_grad()
def test_an_edit_reaches_the_mixer_the_stream_or_both():
    model, seen = tiny(), {}

    def edit(x, hook):
        return 2 * x

    for point in ("ln1.hook_out", "norm1.hook_out", "hook_resid_pre"):
        with model.hooks([(f"blocks.0.{point}", edit)]):
            seen[point] = model.run_with_cache(TOKENS)[1]
    clean = model.run_with_cache(TOKENS)[1]
    moved = {
        point: [not torch.equal(cache[f"blocks.0.hook_{one}_out"], clean[f"blocks.0.hook_{one}_out"]) for one in BOTH]
        for point, cache in seen.items()
    }
    assert moved == {"ln1.hook_out": [False, True], "norm1.hook_out": [True, False], "hook_resid_pre": [True, True]}
    kinds = model.blocks[0].kinds, model.blocks[1].kinds
    assert kinds == ({"recurrent", "experts"}, {"attention", "experts"})


@torch.no_grad()
def test_shares_of_a_logit_are_carried_through_the_norms_of_the_stream():
    """Each component's share is the slope of the logit along it, every norm's scale held; the norms have none of their own."""
    model = tiny()
    logits, cache = model.run_with_cache(TOKENS)
    found = gl.lens.logit_attribution(model, cache, 3, 1)
    written = [f"{layer}_{name}_out" for layer in (0, 1) for name in ("mixer", "mlp")]
    assert found["component"] == ["embed", *written]
    assert relative(found.values.sum(1), logits[:, -1, 3] - logits[:, -1, 1]) < 1e-12
    points = ["blocks.0.hook_resid_pre", *(f"blocks.{name[0]}.hook_{name[2:]}" for name in written)]
    ends = (".hook_scale", "hook_mixer_out", "hook_mlp_out")
    held = {name: cache[name] for name in model.names.points if name.endswith(ends)}
    for number, point in enumerate(points):

        def stand(x, hook, point=point):
            return (
                2 * x if hook.name == point == points[0] else held.get(hook.name, x) * (2 if hook.name == point else 1)
            )

        with model.hooks([(name, stand) for name in {*held, point}]):
            doubled = model(TOKENS)[:, -1]
        change = (doubled[:, 3] - doubled[:, 1]) - (logits[:, -1, 3] - logits[:, -1, 1])
        assert relative(found.values[:, number], change) < 1e-10, point


def test_a_feature_graph_goes_through_the_norms_of_the_stream():
    graph = gl.feature_graph.attribute(tiny(), TOKENS[0], logits=[3, 5], progress=False)
    assert {node.point.rpartition("hook_")[2] for node in graph.of("mixer")} == {"mixer_out"}
    assert {node.point.rpartition("hook_")[2] for node in graph.of("error")} == {"mlp_out"}
    assert graph.check().absolute < 1e-10


# -- the operator, padding, documents, states -----------------------------------------------------------------------


def test_the_implicit_attention_reconstructs_every_layer(model):
    battery.attention_reconstructs_every_layer(model, TOKENS)


@torch.no_grad()
def test_the_implicit_attention_is_the_decayed_product_of_queries_and_keys():
    model = tiny()
    _, cache = model.run_with_cache(TOKENS)
    A, m, H, D = gl.implicit_attention(cache, layer=0), model.wrapped.model.layers[0].self_attn, 4, 6
    q, k, x = cache["q", 0], cache["k", 0], cache["x", 0]
    want = torch.zeros(2, H * D, 11, 11, dtype=torch.float64)
    for c in range(H * D):
        gate = cache["blocks.0.mixer.hook_gate"][..., c] * m.norm.weight[c] / cache["blocks.0.mixer.hook_scale"][..., 0]
        for i in range(11):
            for j in range(i + 1):
                score = (q[:, i, c // D] * k[:, j, c // D]).sum(-1) * torch.exp(-m.slope_rate[c // D, 0, 0] * (i - j))
                want[:, c, i, j] = gate[:, i] * score * torch.sigmoid(x[:, j, c])
    assert relative(A.dense(), want) < 1e-12
    assert relative(torch.einsum("bcij,bjc->bic", want, x), cache["gated", 0]) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("listening", [False, True], ids=["", "inside"])
def test_padding_and_holes_count_for_nothing(model, listening):
    battery.padding_and_holes_count_for_nothing(model, TOKENS, listening)


def test_what_a_hook_does_at_padding_reaches_nobody():
    points = ("q_pre", "k_pre", "x", "k", "log_decay", "decay", "write")
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


@torch.no_grad()
def test_what_transformers_gets_wrong_is_right_here():
    """A step after padding on the right, whose tokens it lets decay the state."""
    ours = tiny()
    right, mask = padded([TOKENS[0, :6], TOKENS[1, :3]], "right")
    first = ours.wrapped(right, attention_mask=mask.long(), use_cache=True)
    held = first.cache if "cache" in first else first.past_key_values  # the former as of transformers 5.24
    more = torch.tensor([[7], [8]])
    wider = torch.cat([mask, torch.ones(2, 1, dtype=torch.bool)], 1).long()
    places = mask.sum(1, keepdim=True)
    word = "cache" if "cache" in first else "past_key_values"
    wrong = ours.wrapped(more, attention_mask=wider, position_ids=places, **{word: held}).logits
    alone = ours(torch.cat([TOKENS[1, :3], more[1]])[None])[0, -1]
    assert relative(wrong[1, -1], alone) > 1e-3, "transformers has put it right: say so"
    _, state = ours(right, attention_mask=mask, return_state=True)
    assert relative(ours(more, state=state)[1, -1], alone) < 1e-12


# -- folders, refusals ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_folder_is_read(tmp_path):
    given = wide_apart()
    given.wrapped.save_pretrained(tmp_path)
    model = gl.from_pretrained(tmp_path, device="cpu")
    assert isinstance(model, HookedMiniMax) and relative(model(TOKENS), given(TOKENS)) < 1e-6
    assert gl.inspect(tmp_path).layers == ("recurrent, experts", "attention, experts")
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in weights if "qkv_proj" in name)
    save_file({k: v for k, v in weights.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(gl.CheckpointError, match=rf"is missing 1 weights: {lost}. It does not fit"):
        gl.from_pretrained(tmp_path, device="cpu")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    for wrong, match in (
        ({"num_hidden_layers": 10**6, "layer_types": None}, "num_hidden_layers"),
        ({"layer_types": ["linear_attention", "sliding_attention"]}, "layer_types"),
        ({"mlp_alpha_factor": "1"}, "mlp_alpha_factor is '1'; expected is a number"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok=5 of 2 experts"),
        ({"sliding_window": 0}, "sliding_window"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **wrong}))
        with pytest.raises(gl.CheckpointError, match=match):
            gl.from_pretrained(tmp_path, device="cpu")


def wide_apart() -> HookedMiniMax:
    """One whose config says all of it, in float32, with a norm behind the scan that is transformers' own."""
    sizes = dict(HookedMiniMax.small.config)
    draws = {"embed_tokens": fresh(1.0), r"experts\.(gate_up|down)_proj": by_last_axis}
    return gl.wrap(Tiny("tiny", lambda config: new_model(**config), sizes, draws).module(1, {}))


@torch.no_grad()
def test_slopes_are_those_of_the_checkpoint():
    model = tiny()
    before = model(TOKENS)
    model.wrapped.model.layers[0].self_attn.slope_rate[1] = 0.7
    assert relative(model(TOKENS), before) > 1e-4 and relative(model(TOKENS), loop(model, TOKENS)) < 1e-10
    model.wrapped.model.layers[0].self_attn.slope_rate = torch.ones(3, 1, 1)
    with pytest.raises(gl.CheckpointError, match="and 3 slopes; its config says 72 and 4"):
        gl.wrap(model.wrapped)


def test_kinds_are_all_that_stand_in_a_model():
    seen = {kind for variant in VARIANTS for kind in tiny(variant).cfg.kinds}
    assert seen == set(MINIMAX.rows) == set(HookedMiniMax.kinds())

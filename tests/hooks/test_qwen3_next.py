"""Qwen3-Next and Qwen3.5: every row against its literal equation, transformers' models, padding, documents, states, edits."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
)

import gatedlens as gl
from gatedlens.formats.qwen3_next import TINY
from gatedlens.hooks.qwen3_next import ROWS, HookedQwen3Next
from gatedlens.model.tiny import Tiny
from tests.helpers import padded, relative
from tests.hooks import battery
from tests.hooks.literal import convolved, delta_rule, linear, mlp, norm_rows, normed_and_gated, silu

torch.set_num_threads(1)
TOKENS = torch.randint(40, (2, 11), generator=torch.Generator().manual_seed(0))
SWAPPED = {
    "num_experts": 3,
    "mlp_only_layers": [1],
    "norm_topk_prob": False,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
}
VARIANTS = {
    "next": {"num_experts": 4, "rms_norm_eps": 1e-6},
    "next, the other way round": SWAPPED,
    "next, one key head, biases": {
        "linear_num_key_heads": 1,
        "attention_bias": True,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "next, delta nets alone": {"layer_types": ["linear_attention"] * 2, "linear_conv_kernel_dim": 2},
}


# Qwen3.5: the config of the language model, the model, and where it stands inside one of images and text.
LATER = {
    "3.5": (Qwen3_5TextConfig, Qwen3_5ForCausalLM, None),
    "3.5, experts": (Qwen3_5MoeTextConfig, Qwen3_5MoeForCausalLM, None),
    "3.5, with images": (Qwen3_5TextConfig, Qwen3_5ForConditionalGeneration, Qwen3_5Config),
    "3.5, experts, with images": (Qwen3_5MoeTextConfig, Qwen3_5MoeForConditionalGeneration, Qwen3_5MoeConfig),
}
EYES = {"depth": 1, "hidden_size": 8, "num_heads": 2, "intermediate_size": 8, "out_hidden_size": 16, "patch_size": 4}


def later(variant: str, **sizes) -> torch.nn.Module:
    """A small Qwen3.5, its parameters drawn as those of the small Qwen3-Next are."""
    told, model, around = LATER[variant]
    special = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}

    def make(config):
        own = {key: value for key, value in config.items() if key != "mlp_only_layers"}
        text = told(**own, **special)
        if around is None:
            return model(text)
        return model(around(text_config=text.to_dict(), vision_config={**EYES, "num_position_embeddings": 16}))

    return Tiny(TINY.name, make, TINY.config, TINY.draws).module(1, {"num_experts": 3, "rms_norm_eps": 1e-6, **sizes})


def tiny(variant: str = "next", dtype: torch.dtype = torch.float64, seed: int = 1) -> HookedQwen3Next:
    if variant in VARIANTS:
        return HookedQwen3Next.tiny(seed=seed, dtype=dtype, **VARIANTS[variant])
    return gl.wrap(later(variant).to(dtype))


@pytest.fixture(params=[*VARIANTS, "3.5", "3.5, experts, with images"])
def model(request):
    return tiny(request.param)


def theirs(model: HookedQwen3Next, tokens: torch.Tensor, **options) -> torch.Tensor:
    """transformers' logits. Without a cache: a model of delta nets alone cannot use its own."""
    model.wrapped.config.get_text_config()._experts_implementation = "eager"
    return model.wrapped(tokens, use_cache=False, **options).logits


# -- every row ------------------------------------------------------------------------------------------------------


def literal(cache, model, layer: int) -> dict[str, torch.Tensor]:
    """Every row of one block from its equation, with loops, reading the rows it names from the cache."""
    decoder = model.wrapped.model._modules.get("language_model", model.wrapped.model)
    w, kind, out = decoder.layers[layer], model.cfg.kinds[layer], {}

    def c(name):
        return cache[f"blocks.{layer}.{name}"]

    if layer > 0:
        out["hook_resid_pre"] = cache["resid_post", layer - 1]
    out["hook_mixer_in"] = c("hook_resid_pre")
    norm_rows(out, c, "ln1", c("hook_mixer_in"), 1 + w.input_layernorm.weight, model.cfg.eps)
    mixing = delta_net if kind.mixing == "delta net" else attention
    mixing(out, c, w, model.cfg)
    out["hook_resid_mid"] = c("hook_resid_pre") + c("hook_mixer_out")
    out["hook_mlp_in"] = c("hook_resid_mid")
    norm_rows(out, c, "ln2", c("hook_mlp_in"), 1 + w.post_attention_layernorm.weight, model.cfg.eps)
    if kind.channels == "MLP":
        mlp(out, c, w.mlp, c("ln2.hook_out"))
    else:
        experts(out, c, w.mlp, model.cfg)
    out["hook_resid_post"] = c("hook_resid_mid") + c("hook_mlp_out")
    return out


def projected(m, n, cfg) -> dict[str, torch.Tensor]:
    """What the input projections give, number by number: each row of a projection belongs to one head."""
    H, G, N, V = cfg.n_value_heads, cfg.n_key_heads, cfg.d_state, cfg.sizes["value"]
    share = H // G
    shapes = {"q": (G, N), "k": (G, N), "x": (H, V), "z": (H, V), "b": (H,), "a": (H,)}
    out = {name: torch.zeros(*n.shape[:2], *shape, dtype=n.dtype) for name, shape in shapes.items()}
    if "in_proj_qkvz" in m._modules:
        each, gates = (n @ p.weight.T for p in (m.in_proj_qkvz, m.in_proj_ba))
        wide = 2 * N + 2 * share * V  # rows of a key head: its q, its k, the values of its heads, their gates
        for g in range(G):
            of_q, of_v = g * wide, g * wide + 2 * N
            out["q"][:, :, g] = each[..., of_q : of_q + N]
            out["k"][:, :, g] = each[..., of_q + N : of_v]
            for r in range(share):
                h, of_z = g * share + r, of_v + share * V
                out["x"][:, :, h] = each[..., of_v + r * V : of_v + (r + 1) * V]
                out["z"][:, :, h] = each[..., of_z + r * V : of_z + (r + 1) * V]
                out["b"][:, :, h] = gates[..., g * 2 * share + r]
                out["a"][:, :, h] = gates[..., g * 2 * share + share + r]
        return out
    each, z = n @ m.in_proj_qkv.weight.T, n @ m.in_proj_z.weight.T
    for g in range(G):
        out["q"][:, :, g] = each[..., g * N : (g + 1) * N]
        out["k"][:, :, g] = each[..., G * N + g * N : G * N + (g + 1) * N]
    for h in range(H):
        out["x"][:, :, h] = each[..., 2 * G * N + h * V : 2 * G * N + (h + 1) * V]
        out["z"][:, :, h] = z[..., h * V : (h + 1) * V]
    out["b"], out["a"] = n @ m.in_proj_b.weight.T, n @ m.in_proj_a.weight.T
    return out


def delta_net(out, c, w, cfg) -> None:
    m = w.linear_attn
    given = projected(m, c("ln1.hook_out"), cfg)
    out["mixer.hook_q_pre"], out["mixer.hook_k_pre"] = given["q"], given["k"]
    out["mixer.hook_x"], out["mixer.hook_gate_pre"] = given["x"].flatten(2), given["z"].flatten(2)
    out["mixer.hook_beta_pre"], out["mixer.hook_dt_pre"] = given["b"], given["a"] + m.dt_bias
    keys = (cfg.n_key_heads, cfg.d_state)
    convolved(out, c, m.conv1d.weight, [("q_", "q_pre", keys), ("k_", "k_pre", keys), ("", "x", (cfg.d_inner,))])
    delta_rule(out, c, cfg, cfg.n_key_heads, m.A_log)
    gate = torch.sigmoid if vars(m.norm).get("activation") == "sigmoid" else silu
    normed_and_gated(out, c, cfg, m.norm.weight, cfg.eps, gate, m.out_proj)


def attention(out, c, w, cfg, share=4, attended=None) -> None:
    """The first 1 / share of each head is turned; attended [b, i, j]: which keys a query attends to (None: all before it)."""
    m, n = w.self_attn, c("ln1.hook_out")
    batch, length = TOKENS.shape
    frequencies = frequencies_of(cfg.d_head // share)
    H, G, D = cfg.n_heads, cfg.n_key_value_heads, cfg.d_head

    q, k, v = (linear(n, p) for p in (m.q_proj, m.k_proj, m.v_proj))
    heads = [q[..., 2 * D * h : 2 * D * (h + 1)] for h in range(H)]  # each: the query, then the gate
    out["attn.hook_q"] = torch.stack([head[..., :D] for head in heads], 2)
    out["attn.hook_gate_pre"] = torch.stack([head[..., D:] for head in heads], 2)
    out["attn.hook_k"], out["attn.hook_v"] = (x.reshape(batch, length, G, D) for x in (k, v))
    for name, norm in (("q", m.q_norm), ("k", m.k_norm)):
        norm_rows(out, c, f"attn.{name}_norm", c(f"attn.hook_{name}"), 1 + norm.weight, cfg.eps)
        out[f"attn.hook_rot_{name}"] = turned(c(f"attn.{name}_norm.hook_out"), range(length), frequencies)
    scores = torch.full((batch, H, length, length), -torch.inf, dtype=torch.float64)
    z = torch.zeros(batch, length, H, D, dtype=torch.float64)
    for h in range(H):
        g = h // (H // G)
        for i in range(length):
            for j in range(i + 1):
                dot = (c("attn.hook_rot_q")[:, i, h] * c("attn.hook_rot_k")[:, j, g]).sum(-1)
                scores[:, h, i, j] = dot / D**0.5
                if attended is not None:
                    scores[:, h, i, j].masked_fill_(~attended[:, i, j], -torch.inf)
            for j in range(length):
                z[:, i, h] += c("attn.hook_pattern")[:, h, i, j, None] * c("attn.hook_v")[:, j, g]
    out["attn.hook_attn_scores"], out["attn.hook_z"] = scores, z
    out["attn.hook_pattern"] = torch.softmax(c("attn.hook_attn_scores"), -1)
    out["attn.hook_gate"] = torch.sigmoid(c("attn.hook_gate_pre"))
    out["attn.hook_gated"] = c("attn.hook_z") * c("attn.hook_gate")
    out["hook_mixer_out"] = linear(c("attn.hook_gated").flatten(2), m.o_proj)


def frequencies_of(turning: int) -> list[float]:
    """Of so many numbers that are turned, as transformers keeps them, in float32."""
    return [float(torch.tensor(1 / 10000.0 ** (2 * j / turning), dtype=torch.float32)) for j in range(turning // 2)]


def turned(x, positions, frequencies):
    """Pairs (j, j + so many) of the numbers of x [b, l, ..., d], turned by position * frequency."""
    out = x.clone()
    for t, position in enumerate(positions):
        for j, frequency in enumerate(frequencies):
            a, b = x[:, t, ..., j], x[:, t, ..., j + len(frequencies)]
            angle = torch.tensor(position * frequency, dtype=torch.float64)
            out[:, t, ..., j] = a * angle.cos() - b * angle.sin()
            out[:, t, ..., j + len(frequencies)] = b * angle.cos() + a * angle.sin()
    return out


def experts(out, c, m, cfg) -> None:
    read, width = c("ln2.hook_out"), cfg.d_expert
    out["mlp.hook_router"] = read @ m.gate.weight.T
    shares = torch.softmax(c("mlp.hook_router"), -1)
    weights = torch.zeros_like(shares)
    for b in range(shares.shape[0]):
        for t in range(shares.shape[1]):
            chosen = sorted(range(cfg.n_experts), key=lambda e: -shares[b, t, e])[: cfg.n_experts_per_token]
            total = sum(shares[b, t, e] for e in chosen) if cfg.normalised_weights else 1
            for e in chosen:
                weights[b, t, e] = shares[b, t, e] / total
    out["mlp.hook_expert_weights"] = weights
    up, down = m.experts.gate_up_proj, m.experts.down_proj
    out["mlp.experts.hook_pre"] = torch.stack([read @ up[e, :width].T for e in range(cfg.n_experts)], 2)
    out["mlp.experts.hook_pre_linear"] = torch.stack([read @ up[e, width:].T for e in range(cfg.n_experts)], 2)
    out["mlp.experts.hook_post"] = silu(c("mlp.experts.hook_pre")) * c("mlp.experts.hook_pre_linear")
    post = c("mlp.experts.hook_post")
    out["mlp.hook_experts"] = torch.stack([post[:, :, e] @ down[e].T for e in range(cfg.n_experts)], 2)
    shared = m.shared_expert
    out["mlp.shared.hook_pre"] = read @ shared.gate_proj.weight.T
    out["mlp.shared.hook_pre_linear"] = read @ shared.up_proj.weight.T
    out["mlp.shared.hook_post"] = silu(c("mlp.shared.hook_pre")) * c("mlp.shared.hook_pre_linear")
    out["mlp.shared.hook_gate_pre"] = read @ m.shared_expert_gate.weight.T
    out["mlp.shared.hook_gate"] = torch.sigmoid(c("mlp.shared.hook_gate_pre"))
    of_all = (c("mlp.hook_expert_weights")[..., None] * c("mlp.hook_experts")).sum(2)
    out["hook_mlp_out"] = of_all + c("mlp.shared.hook_gate") * (c("mlp.shared.hook_post") @ shared.down_proj.weight.T)


def test_every_row_is_its_equation(model):
    battery.rows_are_their_equations(model, literal, TOKENS)


@pytest.mark.parametrize("layer", [0, 1], ids=["delta net", "attention"])
def test_after_an_edit_every_row_downstream_is_its_equation(layer):
    """An edit of what heads share (q, k, and all that makes them) reaches each of these heads so."""
    battery.edits_reach_every_row(tiny(), literal, layer, TOKENS, least=1e-5)


@pytest.mark.parametrize("point", ["erase", "probe", "decay", "write", "state_start"])
def test_a_lazy_point_heard_alone_is_the_same_edit(point):
    battery.a_lazy_point_alone_is_the_same_edit(tiny(), point, TOKENS)


@torch.no_grad()
def test_an_edit_of_log_decay_moves_the_probe_and_one_of_the_probe_stands_alone():
    model = tiny()
    names = ["blocks.0.mixer.hook_decay", "blocks.0.mixer.hook_probe"]
    decay, probe = (model.run_with_cache(TOKENS, names_filter=names)[1][name] for name in names)
    with model.hooks([("blocks.0.mixer.hook_log_decay", lambda x, hook: 2 * x)]):
        cache = model.run_with_cache(TOKENS, names_filter=names)[1]
    assert relative(cache[names[0]], decay.square()) < 1e-12
    assert relative(cache[names[1]], probe * decay[..., 0, :]) < 1e-12
    with model.hooks([(names[1], lambda x, hook: 2 * x)]):
        cache = model.run_with_cache(TOKENS, names_filter=names)[1]
    assert torch.equal(cache[names[0]], decay) and torch.equal(cache[names[1]], 2 * probe)


# -- transformers ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("variant", [*VARIANTS, *LATER])
def test_logits_are_transformers_which_scans_in_float32(variant):
    model = tiny(variant)
    tokens = torch.randint(40, (2, 90), generator=torch.Generator().manual_seed(4))  # more than a chunk
    assert relative(model(tokens), theirs(model, tokens)) < 2e-5


def test_gradients_are_transformers():
    battery.gradients_are_transformers(tiny(dtype=torch.float32), TOKENS)


@torch.no_grad()
def test_bfloat16_is_as_close_to_float32_as_transformers_is():
    model = tiny(dtype=torch.bfloat16)
    battery.half_precision_is_as_close_as_transformers_is(
        tiny(dtype=torch.float32), model, theirs(model, TOKENS), TOKENS
    )
    cache = model.run_with_cache(TOKENS, names_filter="blocks.0.mixer.*")[1]
    wide = {"q", "k", "dt_pre", "dt", "log_decay", "scan", "scale", "normed", "gate"}
    assert {name for name in wide if cache[f"blocks.0.mixer.hook_{name}"].dtype == torch.float32} == wide


def test_gradcheck_of_what_a_scan_is_made_of():
    battery.gradients_are_those_of_the_function(tiny(), TOKENS)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["next", *LATER])
def test_a_folder_is_read(variant, tmp_path, caplog):
    """Of a model of images and text, the language model; what predicts several tokens is left, as in transformers."""
    given = tiny(variant, torch.float32)
    given.wrapped.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    spare = {"mtp.fc.weight": torch.zeros(3, 3), "mtp.layers.0.mlp.gate.weight": torch.zeros(2)}
    save_file({**weights, **spare}, tmp_path / "model.safetensors", {"format": "pt"})
    model = gl.from_pretrained(tmp_path, device="cpu")
    said = [record.getMessage() for record in caplog.records if "not opened" in record.getMessage()]
    assert len(said) == 1 and "not opened: " in said[0] and "mtp (2 tensors)" in said[0]
    assert ("model.visual (" in said[0]) == ("images" in variant)
    assert isinstance(model, HookedQwen3Next) and type(model.wrapped).__name__.endswith("ForCausalLM")
    assert relative(model(TOKENS), given(TOKENS)) < 1e-6
    lost = next(name for name in weights if "conv1d" in name)
    save_file({k: v for k, v in weights.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(gl.CheckpointError, match=r"is missing 1 weights: .*conv1d"):
        gl.from_pretrained(tmp_path, device="cpu")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config.get("text_config", config)["num_hidden_layers"] = 10**6
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(gl.CheckpointError, match="num_hidden_layers asks for 1000000 layers"):
        gl.from_pretrained(tmp_path, device="cpu")


def test_the_language_model_of_a_model_of_images_is_shared_not_copied():
    wrapped = later("3.5, with images")
    model = gl.wrap(wrapped)
    assert model.wrapped is wrapped and model.embedding is wrapped.model.language_model.embed_tokens
    model(TOKENS).sum().backward()
    assert wrapped.model.language_model.layers[0].linear_attn.in_proj_qkv.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in wrapped.model.visual.parameters())


# -- positions of images ----------------------------------------------------------------------------------------------

ROPE = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 1.0, "mrope_section": [2, 1, 1]}
WHERE = torch.tensor(  # a token of text, a picture of 2 x 2, more text; and another
    [
        [[0, 1, 1, 1, 1, 3, 4, 5], [0, 1, 1, 2, 2, 3, 4, 5], [0, 1, 2, 1, 2, 3, 4, 5]],
        [[0, 1, 2, 2, 2, 2, 4, 5], [0, 1, 2, 2, 3, 3, 4, 5], [0, 1, 2, 3, 2, 3, 4, 5]],
    ]
).transpose(0, 1)


def of_images(variant: str = "3.5, with images") -> HookedQwen3Next:
    """All eight numbers of a head are turned: two pairs by time, one by height and one by width."""
    return gl.wrap(later(variant, head_dim=8, rope_parameters=ROPE).double())


@torch.no_grad()
@pytest.mark.parametrize("variant", ["3.5", "3.5, with images"])
def test_positions_of_three_axes_are_transformers(variant):
    model, tokens = of_images(variant), TOKENS[:, :8]
    places = torch.arange(8).expand(2, -1)
    want = theirs(model, tokens, position_ids=WHERE)
    assert relative(model(tokens, position_ids=WHERE), want) < 2e-6
    assert relative(model(tokens, position_ids=torch.cat([places[None], WHERE])), want) < 2e-6
    assert relative(model(tokens), want) > 1e-4
    # of text all axes are one
    assert relative(model(tokens, position_ids=places.expand(3, -1, -1)), model(tokens)) < 1e-14
    _, cache = model.run_with_cache(tokens, position_ids=WHERE)
    assert all(gl.implicit_attention(cache, layer=layer).check().relative < 1e-12 for layer in range(2))


@torch.no_grad()
def test_a_text_goes_on_behind_a_picture():
    """At the position behind the largest, as transformers counts; and every split of the whole is the whole."""
    model, tokens = of_images(), TOKENS[:, :8]
    whole = model(tokens, position_ids=WHERE)
    for at in (1, 3, 5, 7):
        first, state = model(tokens[:, :at], position_ids=WHERE[:, :, :at], return_state=True)
        rest = model(tokens[:, at:], position_ids=WHERE[:, :, at:], state=state)
        assert relative(torch.cat([first, rest], 1), whole) < 1e-12
    _, state = model(tokens[:, :5], position_ids=WHERE[:, :, :5], return_state=True)
    assert state["next_position", 0].tolist() == [3, 4]
    first_row = model(tokens[:1, 5:], state=state.rows([0]))  # where the text stands at 3, 4, 5
    assert relative(first_row, whole[:1, 5:]) < 1e-12


@torch.no_grad()
def test_of_a_padded_batch_each_row_is_the_row_alone():
    model = of_images()
    tokens, mask = padded([TOKENS[0, :8], TOKENS[1, :5]], "left")
    where = torch.zeros(3, 2, 8, dtype=torch.long)
    where[:, 0], where[:, 1, 3:] = WHERE[:, 0], WHERE[:, 1, :5]
    logits, state = model(tokens, attention_mask=mask, position_ids=where, return_state=True)
    alone, own = model(TOKENS[1:, :5], position_ids=WHERE[:, 1:, :5], return_state=True)
    assert relative(logits[1, 3:], alone[0]) < 1e-12
    assert state["next_position", 0][1] == own["next_position", 0][0]


@torch.no_grad()
def test_what_transformers_makes_of_a_picture_is_read():
    """Its embeddings and positions, given to the language model, have its logits; the vision tower is left alone."""
    config = {"image_token_id": 39, "vision_start_token_id": 37, "vision_end_token_id": 38}
    model = of_images()
    wrapped = model.wrapped
    for name, number in config.items():
        setattr(wrapped.config, name, number)
    given = {}
    decoder = wrapped.model.language_model
    handle = decoder.register_forward_pre_hook(lambda module, args, options: given.update(options), with_kwargs=True)
    tokens = torch.tensor([[3, 37, 39, 39, 38, 5, 6, 7]])  # two patches of the tower become one token each
    pixels = torch.randn(8, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grid = torch.tensor([[1, 2, 4]])
    kinds = (tokens == 39).long()
    wrapped.config._experts_implementation = "eager"
    want = wrapped(tokens, pixel_values=pixels, image_grid_thw=grid, mm_token_type_ids=kinds, use_cache=False).logits
    handle.remove()
    positions = given["position_ids"]
    assert positions.shape[1:] == (1, 8) and not torch.equal(positions[-1], positions[-2])
    got = model(given["inputs_embeds"], start_at_layer=0, position_ids=positions)
    assert relative(got, want) < 2e-6


def test_positions_of_another_shape_are_told():
    with pytest.raises(
        gl.InputError, match=r"position_ids have shape \[2, 2, 8\]; the input is \[2, 8\], so they are that, or"
    ):
        of_images()(TOKENS[:, :8], position_ids=WHERE[:2])
    with pytest.raises(gl.InputError, match=r"position_ids have shape \[3, 2, 8\]; the input is \[2, 8\]"):
        tiny()(TOKENS[:, :8], position_ids=WHERE)


class Glm5NextForCausalLM(torch.nn.Module):
    """A class of this name: it is refused by it."""


def test_what_is_not_supported_is_named(tmp_path):
    with pytest.raises(gl.CheckpointError, match="does not know Glm5NextForCausalLM. GLM-5-next keeps several copies"):
        gl.wrap(Glm5NextForCausalLM())
    (tmp_path / "config.json").write_text('{"model_type": "glm5_next"}')
    with pytest.raises(gl.CheckpointError, match="'glm5_next', which gatedlens does not support. GLM-5-next keeps"):
        gl.from_pretrained(tmp_path)
    with pytest.raises(gl.CheckpointError, match="hidden_act='gelu'"):
        HookedQwen3Next.tiny(hidden_act="gelu")
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0, "partial_rotary_factor": 0.25}
    with pytest.raises(gl.CheckpointError, match="rope_type='dynamic'"):
        HookedQwen3Next.tiny(rope_parameters=dynamic, head_dim=32)
    with pytest.raises(gl.CheckpointError, match="Wrap the model with its head"):
        gl.wrap(tiny().wrapped.model)


# -- padding, documents, states -------------------------------------------------------------------------------------


def test_the_implicit_attention_reconstructs_every_layer(model):
    battery.attention_reconstructs_every_layer(model, TOKENS)


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


# -- a state set for good -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pos", [0, 3, 9])
def test_a_patched_state_is_a_fresh_start_from_it(pos):
    battery.a_patched_state_is_a_fresh_start_from_it(tiny(), TOKENS, pos)


@torch.no_grad()
def test_a_part_of_a_state_is_set_and_the_rest_goes_on():
    model = tiny()
    new = torch.randn(2, 4, 5, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    old = model.run_with_cache(TOKENS, names_filter="*.hook_state")[1]["state", 0]
    for index, some in (
        ({"head": [1, 2]}, (slice(None), [1, 2])),
        ({"head": 3, "value": 2}, (slice(None), 3, 2)),
        ({"channel": [7]}, (slice(None), 1, 2)),
        ({"state": 1}, (..., 1)),
    ):
        with gl.states.patch(new, pos=4, layers=0, **index).on(model):
            state = model.run_with_cache(TOKENS, names_filter="*.hook_state")[1]["state", 0]
        want = old[:, 4].clone()
        want[some] = new[some]
        assert relative(state[:, 4], want) < 1e-12, index
        assert torch.equal(state[:, :4], old[:, :4])


def test_kinds_are_all_that_stand_in_a_model():
    assert set(HookedQwen3Next.kinds()) == {
        "delta net, MLP", "delta net, experts", "attention, MLP", "attention, experts",
    }  # fmt: skip
    seen = {kind for variant in VARIANTS for kind in tiny(variant).cfg.kinds}
    assert seen == set(ROWS)
    assert isinstance(TINY, Tiny)

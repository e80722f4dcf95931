"""RWKV-7: each row against its literal equation, golden vectors, both layouts, and what layer 0 hands on."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file

import gatedlens as gl
from gatedlens import ablation, states
from gatedlens.formats.rwkv7_fla import Rwkv7Weights, renamed_key
from gatedlens.hooks.rwkv7 import FIRST_VALUES, HookedRWKV7
from tests.helpers import GOLDEN, golden, padded, relative
from tests.hooks import battery
from tests.hooks import literal as shared

TOKENS = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(0))
FILE = GOLDEN / "rwkv7_lm" / "model.safetensors"


def tiny(layers: int = 3, **sizes) -> HookedRWKV7:
    return HookedRWKV7.tiny(seed=1, dtype=torch.float64, num_hidden_layers=layers, **sizes)


@pytest.fixture
def model():
    return tiny()


# -- the equations --------------------------------------------------------------------------------------------------


def literal(cache, model, layer: int) -> dict[str, torch.Tensor]:
    """Every row of one block from its equation, with loops, reading the rows it names from the cache."""
    w, cfg = model.wrapped.model.layers[layer], model.cfg
    m, ffn = w.attn, w.ffn

    def c(name):
        return cache[f"blocks.{layer}.{name}"]

    H, V = cfg.n_heads, cfg.d_head
    batch, length, _ = c("mixer.hook_x").shape
    out = {}

    def norm(part, weights, x):
        shared.norm(out, c, part, weights, x, 1e-5)

    def low(name, x, act=lambda x: x):
        lora = getattr(m, f"{name}_lora").lora
        return act(x @ lora[0].weight.T) @ lora[2].weight.T + (0 if lora[2].bias is None else lora[2].bias)

    def heads(x):
        return x.reshape(batch, length, H, V)

    if layer == 0:
        norm("ln0", w.pre_norm, cache["hook_embed"])
        out["hook_resid_pre"] = c("ln0.hook_out")
    else:
        out["hook_resid_pre"] = cache["resid_post", layer - 1]
    out["hook_mixer_in"] = c("hook_resid_pre")
    norm("ln1", w.attn_norm, c("hook_mixer_in"))
    n, s = c("ln1.hook_out"), c("mixer.hook_shift")
    out["mixer.hook_shift"] = shared.before(n)
    for x in "rwkvag":
        out[f"mixer.hook_x{x}"] = n + (s - n) * getattr(m, f"x_{x}")
    out["mixer.hook_r"] = heads(c("mixer.hook_xr") @ m.r_proj.weight.T)
    out["mixer.hook_w_pre"] = heads(low("w", c("mixer.hook_xw"), torch.tanh))
    out["mixer.hook_log_decay"] = -math.exp(-0.5) / (1 + torch.exp(-c("mixer.hook_w_pre")))
    out["mixer.hook_a"] = heads(1 / (1 + torch.exp(-low("a", c("mixer.hook_xa")))))
    out["mixer.hook_k_pre"] = heads(c("mixer.hook_xk") @ m.k_proj.weight.T)
    k_pre, a = c("mixer.hook_k_pre"), c("mixer.hook_a")
    lengthened = k_pre * m.k_k.reshape(H, V)
    out["mixer.hook_kk"] = lengthened / lengthened.pow(2).sum(-1, keepdim=True).sqrt().clamp(min=1e-12)
    out["mixer.hook_k"] = k_pre * (1 + (a - 1) * m.k_a.reshape(H, V))
    own = out["mixer.hook_v_own"] = c("mixer.hook_xv") @ m.v_proj.weight.T
    if layer == 0:
        out["mixer.hook_x"] = c("mixer.hook_v_own")
    else:
        own, first, mix = (c(f"mixer.hook_v_{name}") for name in ("own", "first", "mix"))
        out["mixer.hook_v_first"] = cache[FIRST_VALUES]
        out["mixer.hook_v_mix"] = 1 / (1 + torch.exp(-low("v", c("mixer.hook_xv"))))
        out["mixer.hook_x"] = own + (first - own) * mix
    out["mixer.hook_u"] = c("mixer.hook_x")
    r, k, kk, u = c("mixer.hook_r"), c("mixer.hook_k"), c("mixer.hook_kk"), heads(c("mixer.hook_u"))
    out["mixer.hook_bonus"] = (r * k * m.r_k).sum(-1)
    out["mixer.hook_reset"] = torch.zeros(batch, length, 1, dtype=torch.float64)
    kept = 1 - c("mixer.hook_reset")[..., None]
    out["mixer.hook_state_start"] = torch.zeros(batch, H, V, V, dtype=torch.float64)
    out["mixer.hook_decay"] = (torch.exp(c("mixer.hook_log_decay")) * kept).unsqueeze(-2).expand(-1, -1, -1, V, -1)
    out["mixer.hook_write"] = torch.einsum("blhv,blhk->blhvk", u, k)
    out["mixer.hook_erase"] = (a * kk).unsqueeze(-2).expand(-1, -1, -1, V, -1)
    out["mixer.hook_probe"] = kk * kept
    state, found = c("mixer.hook_state_start"), []
    decay, write, erase, probe = (c(f"mixer.hook_{name}") for name in ("decay", "write", "erase", "probe"))
    for t in range(length):
        removed = torch.einsum("bhvk,bhk->bhv", state, probe[:, t])[..., None] * erase[:, t]
        state = decay[:, t] * state - removed + write[:, t]
        found.append(state)
    out["mixer.hook_state"] = torch.stack(found, 1)
    out["mixer.hook_scan"] = torch.einsum("blhvk,blhk->blhv", c("mixer.hook_state"), r).flatten(2)
    scan = heads(c("mixer.hook_scan"))
    centred = scan - scan.mean(-1, keepdim=True)
    out["mixer.hook_scale"] = (centred.pow(2).mean(-1) + cfg.mixer_eps).sqrt()
    normed = (centred / c("mixer.hook_scale")[..., None]).flatten(2)
    out["mixer.hook_normed"] = m.g_norm.weight * normed + m.g_norm.bias
    out["mixer.hook_y"] = c("mixer.hook_normed") + (c("mixer.hook_bonus")[..., None] * u).flatten(2)
    out["mixer.hook_gate_low"] = c("mixer.hook_xg") @ m.g_lora.lora[0].weight.T
    out["mixer.hook_gate_act"] = 1 / (1 + torch.exp(-c("mixer.hook_gate_low")))
    out["mixer.hook_gate"] = c("mixer.hook_gate_act") @ m.g_lora.lora[2].weight.T
    out["mixer.hook_gated"] = c("mixer.hook_y") * c("mixer.hook_gate")
    out["hook_mixer_out"] = c("mixer.hook_gated") @ m.o_proj.weight.T
    out["hook_resid_mid"] = c("hook_resid_pre") + c("hook_mixer_out")
    out["hook_mlp_in"] = c("hook_resid_mid")
    norm("ln2", w.ffn_norm, c("hook_mlp_in"))
    n, s = c("ln2.hook_out"), c("mlp.hook_shift")
    out["mlp.hook_shift"] = shared.before(n)
    out["mlp.hook_xk"] = n + (s - n) * ffn.x_k
    out["mlp.hook_k"] = c("mlp.hook_xk") @ ffn.key.weight.T
    out["mlp.hook_k_act"] = c("mlp.hook_k").clamp(min=0).pow(2)
    out["hook_mlp_out"] = c("mlp.hook_k_act") @ ffn.value.weight.T
    out["hook_resid_post"] = c("hook_resid_mid") + c("hook_mlp_out")
    return out


def test_every_row_is_its_equation(model):
    battery.rows_are_their_equations(model, literal, TOKENS)


@pytest.mark.parametrize("layer", [0, 1])
def test_after_an_edit_every_row_downstream_is_its_equation(layer):
    battery.edits_reach_every_row(tiny(layers=2), literal, layer, TOKENS)


@torch.no_grad()
def test_attention_is_the_product_of_the_transitions():
    """o = A x + r, number by number: S of the values less their mean, the bonus of the values, the norm's bias."""
    model = tiny()
    _, cache = model.run_with_cache(TOKENS, names_filter=battery.everything)
    for layer in range(3):
        get = {name: cache[name, layer] for name in ("kk", "a", "r", "k", "x", "scale", "bonus", "gate")}
        decay = torch.exp(cache["log_decay", layer])
        norm = model.wrapped.model.layers[layer].attn.g_norm
        A = gl.implicit_attention(cache, layer=layer)
        assert A.check().relative < 1e-12
        scanned, beside = A.branches
        x = get["x"].unflatten(2, (4, 4))
        assert relative(scanned.x, (x - x.mean(-1, keepdim=True)).flatten(2)) < 1e-13 and torch.equal(
            beside.x, get["x"]
        )
        assert relative(A.bias, get["gate"] * norm.bias) < 1e-13
        dense = A.dense()
        for h, v in ((0, 1), (3, 2)):
            c = 4 * h + v
            for i in range(9):
                for j in range(i + 1):
                    key = get["k"][:, j, h]
                    for t in range(j + 1, i + 1):
                        probed = (get["kk"][:, t, h] * key).sum(-1, keepdim=True)
                        key = decay[:, t, h] * key - get["a"][:, t, h] * get["kk"][:, t, h] * probed
                    s = norm.weight[c] * (get["r"][:, i, h] * key).sum(-1) / get["scale"][:, i, h]
                    want = get["gate"][:, i, c] * (s + (i == j) * get["bonus"][:, i, h])
                    assert torch.allclose(dense[:, c, i, j], want, atol=1e-13), (layer, c, i, j)


@torch.no_grad()
def test_a_cut_is_the_scan_without_the_source_under_the_same_scale(model):
    """Each token's contribution is what the norm leaves of it, so nothing of a cut token stays in the norm's mean."""
    _, clean = model.run_with_cache(TOKENS, names_filter=battery.everything)
    layer, src, dst = 1, 2, 6
    stem = f"blocks.{layer}.mixer.hook_"
    lost = clean[stem + "write"][:, src]
    for t in range(src + 1, dst + 1):
        found = (clean[stem + "probe"][:, t].unsqueeze(-2) * lost).sum(-1, keepdim=True)
        lost = clean[stem + "decay"][:, t] * lost - clean[stem + "erase"][:, t] * found

    def without(state, point):
        state = state.clone()
        state[:, dst] -= lost
        return state

    edit = ablation.edit(stem + "state", without) + ablation.edit(
        stem + "scale", lambda scale, point: clean[stem + "scale"]
    )
    with edit.on(model):
        want = model(TOKENS)
    with gl.knockout.cut(src, dst, layers=layer).on(model):
        assert relative(model(TOKENS), want) < 1e-12
    assert relative(model(TOKENS), want) > 1e-4


# -- what layer 0 hands on ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_run_that_starts_at_a_layer_is_given_the_values_of_layer_0(model):
    want, cache = model.run_with_cache(TOKENS)
    for layer in (0, 1, 2, 3):
        resid = cache["resid_pre", layer] if layer < 3 else cache["resid_post", 2]
        assert torch.equal(model(resid, start_at_layer=layer, earlier=cache), want)
    resid, values = cache["resid_pre", 1], cache[FIRST_VALUES]
    assert torch.equal(model(resid, start_at_layer=1, earlier={FIRST_VALUES: values}), want)
    got, inner = model.run_with_cache(resid, start_at_layer=1, earlier=cache, names_filter="*.hook_v_first")
    assert torch.equal(got, want) and len(inner) == 2
    assert torch.equal(model(cache["resid_pre", 0], start_at_layer=0), want), "layer 0 runs, and hands its own on"
    assert torch.equal(model(cache["resid_post", 2], start_at_layer=3), want), "no block runs, and none reads"
    zeros = {FIRST_VALUES: torch.zeros_like(values)}
    assert torch.equal(model(cache["resid_pre", 0], start_at_layer=0, earlier=zeros), want), "its own, if it runs"
    assert relative(model(resid, start_at_layer=1, earlier=zeros), want) > 1e-3
    for given in ({}, {"earlier": {}}, {"earlier": {"blocks.0.hook_mixer_out": values}}):
        with pytest.raises(gl.InputError, match=r"Block 1 reads blocks.0.mixer.hook_x .* give earlier=cache"):
            model(resid, start_at_layer=1, **given)
    with pytest.raises(gl.InputError, match="goes with start_at_layer"):
        model(TOKENS, earlier=cache)
    with pytest.raises(gl.InputError, match=r"has shape \[2, 4, 16\]; this call has"):
        model(resid, start_at_layer=1, earlier={FIRST_VALUES: values[:, :4]})
    with pytest.raises(gl.InputError, match="earlier is int; it must be the cache of a run"):
        model(resid, start_at_layer=1, earlier=3)
    with pytest.raises(gl.InputError, match="Block 2 reads"):
        model.blocks[2](cache["resid_pre", 2], model.begin(model.prepare(TOKENS)[0], None, False))


@torch.no_grad()
def test_an_edit_of_the_values_of_layer_0_reaches_every_layer_and_one_of_the_copy_its_own(model):
    zero = lambda x, hook: x * 0  # noqa: E731
    _, cache = model.run_with_cache(TOKENS)
    with model.hooks([(FIRST_VALUES, zero)]):
        _, edited = model.run_with_cache(TOKENS)
    assert all(edited["v_first", layer].abs().max() == 0 for layer in (1, 2))
    with model.hooks([("blocks.1.mixer.hook_v_first", zero)]):
        _, edited = model.run_with_cache(TOKENS)
    assert torch.equal(edited["v_first", 2], cache["v_first", 1]) and torch.equal(edited["x", 0], cache["x", 0])
    assert relative(edited["x", 1], cache["v_own", 1] * (1 - cache["v_mix", 1])) < 1e-14


@torch.no_grad()
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_sweeps_that_start_at_a_cached_layer_are_exact(model, side):
    """Every cell, in whatever layer it enters, is the literal run; those of layer 0 change what later layers read."""
    rows = [TOKENS[0], TOKENS[1] if side is None else TOKENS[1, :6]]
    tokens, mask = padded(rows, side or "left")
    options = {} if side is None else {"attention_mask": mask}
    clean_tokens = (tokens + 7) % 40
    _, clean = model.run_with_cache(clean_tokens, **options)

    def metric(logits):
        return logits[mask].pow(2).sum()

    for point in ("hook_mixer_out", "mixer.hook_x", "hook_resid_pre", "mixer.hook_v_own", "mixer.hook_xv"):
        found = gl.patching.sweep(model, tokens, clean, metric, f"blocks.*.{point}", progress=False, **options)
        for layer in range(3):
            for pos in (0, 2, 5):
                full = f"blocks.{layer}.{point}"

                def put(x, hook, full=full, pos=pos):
                    x = x.clone()
                    for row in range(2):
                        place = mask[row].nonzero().flatten()[pos]
                        x[row, place] = clean[full][row, place]
                    return x

                want = metric(model.run_with_hooks(tokens, fwd_hooks=[(full, put)], **options))
                got = found.values[layer, pos]
                assert abs(got - want) < 1e-10 * abs(want), (point, layer, pos)


@torch.no_grad()
def test_a_sweep_of_states_leaves_the_clean_state(model):
    """decay 0, erase 0, write the clean state: what is behind goes on from it."""
    _, clean = model.run_with_cache((TOKENS + 7) % 40, names_filter=battery.everything)

    def metric(logits):
        return logits[:, -1].pow(2).sum()

    found = gl.patching.sweep(
        model, TOKENS, clean, metric, "blocks.*.mixer.hook_state", edits=gl.patching.carried, progress=False
    )
    for layer, pos in ((0, 3), (1, 0), (2, 7)):
        with states.patch(clean["state", layer][:, pos], pos, layers=layer).on(model):
            want = metric(model(TOKENS))
        assert abs(found.values[layer, pos] - want) < 1e-10 * abs(want)


# -- state, padding, documents --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("heard", [False, True], ids=["", "inside"])
def test_prefix_and_suffix_are_the_whole_at_every_split(model, heard):
    whole, end = model(TOKENS, return_state=True)
    listen = [("*.hook_state", lambda x, hook: None)] if heard else []
    for split in range(1, 9):
        with model.hooks(listen):
            first, state = model(TOKENS[:, :split], return_state=True)
            second, left = model(TOKENS[:, split:], state=state, return_state=True)
        assert relative(torch.cat([first, second], 1), whole) < 1e-12
        for key in end:
            assert relative(left[key], end[key]) < 1e-12, key
    assert end["scan", 1].shape == (2, 4, 4, 4) and end["shift", 2].shape == end["mlp_shift", 2].shape == (2, 1, 16)


@torch.no_grad()
def test_the_state_can_be_saved_and_set(model, tmp_path):
    _, state = model(TOKENS[:, :5], return_state=True)
    state.save(tmp_path / "state.safetensors")
    again = gl.RecurrentState.load(tmp_path / "state.safetensors")
    want = model(TOKENS[:, 5:], state=state)
    assert torch.equal(model(TOKENS[:, 5:], state=again), want)
    _, cache = model.run_with_cache(TOKENS, names_filter="*.hook_state")
    new = cache["state", 1][:, 3]
    with states.patch(new, 6, layers=1).on(model):
        _, patched = model.run_with_cache(TOKENS, names_filter=battery.everything)
    assert torch.equal(patched["state", 1][:, 6], new)
    rows = literal(patched, model, 1)
    assert relative(rows["mixer.hook_state"][:, 7:], patched["state", 1][:, 7:]) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("heard", [False, True], ids=["", "inside"])
def test_padding_counts_for_nothing_nor_do_holes(model, heard):
    battery.padding_and_holes_leave_states_of_their_own(model, TOKENS, heard)


@torch.no_grad()
@pytest.mark.parametrize("heard", [False, True], ids=["", "inside"])
def test_packed_documents_are_as_if_each_stood_alone(model, heard):
    battery.documents_leave_states_of_their_own(model, TOKENS, heard)


@torch.no_grad()
def test_generation_is_greedy_decoding_from_scratch(model):
    tokens, mask = padded([TOKENS[0], TOKENS[1, :5]], "left")
    found = model.generate(tokens, max_new_tokens=5, temperature=0, attention_mask=mask, return_type="tokens")
    for i, row in enumerate((TOKENS[0], TOKENS[1, :5])):
        for _ in range(5):
            row = torch.cat([row, model(row[None])[0, -1:].argmax(-1)])
        assert torch.equal(found[i, -5:], row[-5:])


def test_gradients_are_the_literal_loops_and_the_same_with_somebody_inside(model):
    parameters = dict(model.wrapped.named_parameters())
    weight = torch.randn(2, 9, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = by_hand(model.wrapped, TOKENS)
    assert relative(model(TOKENS), want) < 1e-12
    wanted = torch.autograd.grad((want * weight).sum(), list(parameters.values()), retain_graph=True)
    for listen in ([], [("*.hook_state", lambda x, hook: None)]):
        with model.hooks(listen):
            found = torch.autograd.grad((model(TOKENS) * weight).sum(), list(parameters.values()))
        for name, got, own in zip(parameters, found, wanted, strict=True):
            assert relative(got, own) < 1e-10, name


def by_hand(w, tokens):
    """Logits by the equations of the paper, one step after another, with none of the package's functions."""
    F = torch.nn.functional
    resid, first = w.model.layers[0].pre_norm(w.model.embeddings(tokens)), None
    for layer in w.model.layers:
        m, n = layer.attn, layer.attn_norm(resid)
        shift = F.pad(n, (0, 0, 1, -1))
        xr, xw, xk, xv, xa, xg = (n + (shift - n) * getattr(m, f"x_{x}") for x in "rwkvag")

        def low(name, x, act=lambda x: x, m=m):
            lora = getattr(m, f"{name}_lora").lora
            return lora[2](act(lora[0](x)))

        heads = lambda x, m=m: x.unflatten(-1, m.r_k.shape)  # noqa: E731
        r, k, v = m.r_proj(xr), m.k_proj(xk), m.v_proj(xv)
        a, decay = torch.sigmoid(low("a", xa)), torch.exp(-math.exp(-0.5) * torch.sigmoid(low("w", xw, torch.tanh)))
        v = v if first is None else v + (first - v) * torch.sigmoid(low("v", xv))
        first = v if first is None else first
        kk, k = F.normalize(heads(k * m.k_k), dim=-1), k * (1 + (a - 1) * m.k_a)
        r, k, v, a, decay = map(heads, (r, k, v, a, decay))
        state, scan = torch.zeros(*v[:, 0].shape, k.shape[-1], dtype=v.dtype), []
        for t in range(tokens.shape[1]):
            removed = torch.einsum("bhvk,bhk,bhj->bhvj", state, kk[:, t], kk[:, t] * a[:, t])
            state = state * decay[:, t, :, None] - removed + v[:, t, :, :, None] * k[:, t, :, None]
            scan.append(torch.einsum("bhvk,bhk->bhv", state, r[:, t]))
        normed = torch.stack([m.g_norm(one.flatten(1)) for one in scan], 1)
        bonus = (r * k * m.r_k).sum(-1, keepdim=True) * v
        resid = resid + m.o_proj((normed + bonus.flatten(2)) * low("g", xg, torch.sigmoid))
        n = layer.ffn_norm(resid)
        mixed = n + (F.pad(n, (0, 0, 1, -1)) - n) * layer.ffn.x_k
        resid = resid + layer.ffn.value(torch.relu(layer.ffn.key(mixed)) ** 2)
    return w.lm_head(w.model.norm(resid))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    model = HookedRWKV7.tiny()
    want = model(TOKENS)
    _, cache = model.to(dtype).run_with_cache(TOKENS, names_filter=battery.everything)
    assert relative(cache["logits"], want) < 0.1 and cache["gated", 0].dtype == dtype
    assert cache["log_decay", 0].dtype == cache["state", 0].dtype == torch.float32
    assert gl.implicit_attention(cache, layer=1).check().relative < 0.02


# -- checkpoints ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_golden_logits_intermediates_and_states():
    """In float64 the golden vectors' own float32 rounding is left; in float32 that of both."""
    _, _, io = golden("rwkv7_lm")
    tokens = io["input_ids"].long()
    for dtype, bound in ((torch.float64, 2e-6), (torch.float32, 6e-6)):
        model = gl.from_pretrained(FILE, device="cpu", dtype=dtype)
        assert isinstance(model, HookedRWKV7) and model.cfg.mixer_eps == 64e-5 and model.cfg.d_head == 8
        logits, cache = model.run_with_cache(tokens)
        assert relative(logits, io["logits"]) < bound
        _, state = model(tokens, return_state=True)
        for i in range(3):
            block, att = f"blocks.{i}.", f"blocks.{i}.att."
            pairs = {
                "w": (cache["log_decay", i].exp().flatten(2), io[f"{att}w"]),
                "a": (cache["a", i].flatten(2), io[f"{att}a"]),
                "k": (cache["k", i].flatten(2), io[f"{att}k"]),
                "kk": (cache["kk", i].flatten(2), io[f"{att}kk"]),
                "v": (cache["x", i], io[f"{att}v"]),
                "scan": (cache["scan", i], io[f"{att}scan"]),
                "out": (cache["mixer_out", i], io[f"{att}out"]),
                "ffn": (cache["mlp_out", i], io[f"{block}ffn.out"]),
                "block": (cache["resid_post", i], io[f"{block}out"]),
                "shift": (state["shift", i][:, 0], io[f"state.{3 * i}"]),
                "state": (state["scan", i], io[f"state.{3 * i + 1}"]),
                "mlp shift": (state["mlp_shift", i][:, 0], io[f"state.{3 * i + 2}"]),
            }
            for name, (got, want) in pairs.items():
                assert relative(got, want) < 2 * bound, (i, name)


FLA = {
    "model_type": "rwkv7",
    "architectures": ["RWKV7ForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "head_dim": 8,
    "num_heads": None,
    "intermediate_size": 96,
    "decay_low_rank_dim": 6,
    "a_low_rank_dim": 5,
    "v_low_rank_dim": 4,
    "gate_low_rank_dim": 10,
    "hidden_act": "sqrelu",
    "norm_first": True,
    "norm_bias": True,
    "norm_eps": 1e-5,
    "attn": None,
    "vocab_size": 45,
    "tie_word_embeddings": False,
}


@torch.no_grad()
def test_both_layouts_hold_the_same_model(tmp_path):
    """RWKV-LM's .pth, as torch saves it, and fla's folder; in fla the norm's eps is 1e-5 a value of a head."""
    _, weights, io = golden("rwkv7_lm")
    tokens = io["input_ids"].long()
    extra = {f"blocks.0.att.v{i}": weights[f"blocks.1.att.v{i}"] for i in range(3)}  # official files have them; unread
    torch.save({**weights, **extra}, tmp_path / "RWKV-x070.pth")
    official = gl.from_pretrained(tmp_path / "RWKV-x070.pth", device="cpu")
    assert relative(official(tokens), io["logits"]) < 6e-6 and official.cfg.original_architecture == "Rwkv7Weights"

    folder = tmp_path / "fla"
    folder.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in official.wrapped.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(FLA))
    fla = gl.from_pretrained(folder, device="cpu")
    assert isinstance(fla, HookedRWKV7) and fla.cfg.mixer_eps == pytest.approx(8e-5)
    assert relative(fla(tokens), official(tokens)) > 1e-3, "heads of 8 have another eps in fla"
    (folder / "config.json").write_text(json.dumps({**FLA, "group_norm_eps": 64e-5}))
    assert torch.equal(gl.from_pretrained(folder, device="cpu")(tokens), official(tokens))

    class RWKV7ForCausalLM(Rwkv7Weights):
        """fla's class by its name and its parameters' names."""

    theirs = RWKV7ForCausalLM({**FLA, "group_norm_eps": 64e-5})
    theirs.load_state_dict(official.wrapped.state_dict())
    wrapped = gl.wrap(theirs)
    assert torch.equal(wrapped(tokens), official(tokens)) and wrapped.W_E is theirs.model.embeddings.weight
    names = {renamed_key(name): name for name in weights}
    assert set(names) == set(theirs.state_dict()), "each of RWKV-LM's tensors is one of fla's"


def test_what_does_not_fit_is_named(tmp_path):
    _, weights, _ = golden("rwkv7_lm")
    torch.save({k: v for k, v in weights.items() if k != "blocks.1.att.a2"}, tmp_path / "less.pth")
    with pytest.raises(gl.CheckpointError, match=r"missing 1 weights: model.layers.1.attn.a_lora.lora.2.weight"):
        gl.from_pretrained(tmp_path / "less.pth", device="cpu")
    torch.save({**weights, "blocks.1.att.g2": weights["blocks.1.att.g1"]}, tmp_path / "shape.pth")
    with pytest.raises(gl.CheckpointError, match=r"misshapen 1 weights: model.layers.1.attn.g_lora.lora.2.weight"):
        gl.from_pretrained(tmp_path / "shape.pth", device="cpu")
    for wrong, message in (
        ({"head_dim": 7}, "32 channels cannot be cut into heads of 7"),
        ({"norm_first": False}, "norm_first is false"),
        ({"attn": {"layers": [1], "num_heads": 4}}, "attn is"),
        ({"hidden_act": "silu"}, "hidden_act is 'silu'"),
    ):
        with pytest.raises(gl.CheckpointError, match=message):
            Rwkv7Weights({**FLA, **wrong})
    other = Rwkv7Weights(FLA)
    other.model.layers[0].attn.v_proj = torch.nn.Linear(32, 64, bias=False)
    with pytest.raises(gl.CheckpointError, match="as many values as keys"):
        gl.wrap(other)
    older = {name.replace("att.x_", "att.time_maa_"): t for name, t in weights.items() if "r_k" not in name}
    torch.save(older, tmp_path / "v6.pth")
    with pytest.raises(gl.CheckpointError, match="This is RWKV-6"):
        gl.from_pretrained(tmp_path / "v6.pth", device="cpu")


@torch.no_grad()
def test_a_saved_folder_is_opened(tmp_path):
    for tied in (False, True):
        model = HookedRWKV7.tiny(seed=2, tie_word_embeddings=tied)
        model.wrapped.save_pretrained(tmp_path / str(tied))
        again = gl.from_pretrained(str(tmp_path / str(tied)), device="cpu")
        tokens = torch.arange(7)[None]
        assert torch.equal(again(tokens), model(tokens))
        assert (again.embedding.weight is again.unembedding.weight) == tied

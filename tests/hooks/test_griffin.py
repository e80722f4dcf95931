"""Griffin: the official implementation's numbers, transformers' model, every row recomputed, state, documents."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import gatedlens as gl
from gatedlens.errors import CheckpointError, InputError, PointError
from gatedlens.formats.recurrentgemma import renamed
from gatedlens.hooks.griffin import GriffinMixer, HookedGriffin, bounded_sqrt
from gatedlens.model.hookpoint import rows_of
from gatedlens.model.padding import Padding
from gatedlens.model.run import DocumentRun
from gatedlens.model.state import RecurrentState
from tests.attention.test_layer import check_views

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent.parent / "golden"
KINDS = {
    "griffin": {},
    "hawk": {"block_types": ["recurrent"]},
    "two attentions": {"block_types": ["attention", "recurrent", "attention"], "attention_window_size": 4},
    "many key heads": {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_window_size": 5},
    "attention bias": {"num_key_value_heads": 2, "attention_bias": True, "conv1d_width": 2, "lru_width": 8},
}


def relative(a, b):
    """max |a - b| / max |b|."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


def some_tokens(batch=2, pos=11, seed=0):
    return torch.randint(40, (batch, pos), generator=torch.Generator().manual_seed(seed))


def padded(rows, side):
    """(tokens, mask) of rows of unequal length; padding holds token 1, which must not matter."""
    longest = max(len(row) for row in rows)
    tokens, mask = torch.ones(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(len(row))
        tokens[i, place], mask[i, place] = row, True
    return tokens, mask


@pytest.fixture(scope="module")
def _model():
    return HookedGriffin.tiny(seed=0, dtype=torch.float64)


@pytest.fixture
def model(_model):
    """R R A in float64, window 8; the test fails if it leaves something behind on it."""
    before = copy.deepcopy(_model.wrapped.state_dict())
    yield _model
    assert not _model.list_hooks()
    assert all(p.grad is None for p in _model.wrapped.parameters())
    assert all(torch.equal(before[name], value) for name, value in _model.wrapped.state_dict().items())
    for layer in _model.wrapped.model.layers[:2]:
        assert layer.temporal_block.rg_lru.recurrent_states is None
        assert layer.temporal_block.conv1d_state is None


# -- the official implementation ------------------------------------------------------------------------------------


def golden(name):
    """(weights, io) of a golden folder."""
    return load_file(GOLDEN / name / "model.safetensors"), load_file(GOLDEN / name / "io.safetensors")


def official_mixer(weights, rg_lru_only=False):
    """A GriffinMixer with the golden folders' 24 channels in 4 heads; rg_lru_only: nothing but an RG-LRU up to scan."""
    tiny = HookedGriffin.tiny(hidden_size=24, lru_width=24, num_attention_heads=4, num_hidden_layers=1)
    block = tiny.wrapped.model.layers[0].temporal_block
    if rg_lru_only:
        weights = {f"rg_lru.{name}": value for name, value in weights.items()}
        with torch.no_grad():
            block.linear_x.weight.copy_(torch.eye(24))
            block.linear_x.bias.zero_()
            block.conv_1d.weight.copy_(F.one_hot(torch.tensor([[3]]), 4).expand(24, 1, 4))
            block.conv_1d.bias.zero_()
    missing, unexpected = block.load_state_dict(renamed(weights), strict=False)
    assert not unexpected and (rg_lru_only or not missing)
    return GriffinMixer(block, rows_of("mixer", tiny.rows_for(0)), 0)


def test_the_official_rg_lru():
    weights, io = golden("griffin_rg_lru")
    mixer, seen, run = official_mixer(weights, rg_lru_only=True), {}, DocumentRun(io["segment_pos"], left={})
    for name, point in mixer.named_children():
        point.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
    x = io["x"].clone().requires_grad_()
    mixer(x, run)
    ours = {"a_gate": "recurrence_gate", "input_gate": "input_gate", "log_a": "log_decay", "multiplier": "multiplier"}
    for theirs, point in {**ours, "y": "scan"}.items():
        torch.testing.assert_close(seen[f"hook_{point}"], io[theirs], atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.exp(seen["hook_log_decay"]), io["a"], atol=1e-5, rtol=0)
    torch.testing.assert_close(run.left["blocks.0.scan"], io["last_h"], atol=1e-5, rtol=0)

    lru = mixer.weights.rg_lru
    wanted = renamed({f"rg_lru.{k[5:]}": v for k, v in io.items() if k.startswith("grad.")})
    parameters = {name: getattr(lru, name.removeprefix("rg_lru.")) for name in wanted}
    grads = torch.autograd.grad(seen["hook_scan"], [x, *parameters.values()], io["grad_out"])
    for got, want in zip(grads, [io["grad_x"], *wanted.values()], strict=True):
        assert relative(got, want) < 1e-5


@torch.no_grad()
def test_the_official_recurrent_block_whole_packed_and_step_by_step():
    weights, io = golden("griffin_recurrent_block")
    mixer = official_mixer(weights)
    run = DocumentRun(io["segment_pos"], left={})
    torch.testing.assert_close(mixer(io["x"], run), io["y"], atol=1e-5, rtol=0)
    torch.testing.assert_close(run.left["blocks.0.conv"], io["conv1d_state"], atol=1e-5, rtol=0)
    torch.testing.assert_close(run.left["blocks.0.scan"], io["rg_lru_state"], atol=1e-5, rtol=0)

    packed = DocumentRun(io["segment_pos_packed"]).apart()
    torch.testing.assert_close(mixer(io["x"], packed), io["y_packed"], atol=1e-5, rtol=0)

    state = None
    for t in range(io["x"].shape[1]):
        run = DocumentRun(io["segment_pos"][:, t : t + 1], before=state, left={})
        y = mixer(io["x"][:, t : t + 1], run)
        torch.testing.assert_close(y[:, 0], io["step_y"][:, t], atol=1e-5, rtol=0)
        state = RecurrentState(run.left, torch.full((2,), t + 1))


def test_the_official_model_from_its_own_checkpoint_layout():
    _, io = golden("griffin_lm")
    model = gl.from_pretrained(GOLDEN / "griffin_lm", device="cpu")
    assert isinstance(model, HookedGriffin) and model.cfg.layer_types == ("recurrent", "recurrent", "attention")
    assert model.cfg.window_size == 65  # the official 64 does not count the own token
    logits, cache = model.run_with_cache(io["tokens"], names_filter="blocks.*.hook_resid_post")
    torch.testing.assert_close(logits, io["logits"], atol=1e-5, rtol=0)
    for layer in range(3):
        torch.testing.assert_close(cache["resid_post", layer], io[f"blocks.{layer}.out"], atol=1e-5, rtol=0)
    torch.testing.assert_close(model(io["tokens"], position_ids=io["segment_pos"]), io["logits"], atol=1e-5, rtol=0)
    packed = model(io["tokens"], position_ids=io["segment_pos_packed"])
    torch.testing.assert_close(packed, io["logits_packed"], atol=1e-5, rtol=0)

    wanted = renamed({name[5:]: value for name, value in io.items() if name.startswith("grad.")})
    parameters = dict(model.wrapped.named_parameters())
    grads = torch.autograd.grad(logits[:, -1].pow(2).sum(), [parameters[name] for name in wanted])
    assert len(wanted) == len(parameters)
    for got, want in zip(grads, wanted.values(), strict=True):
        assert relative(got, want) < 1e-5


# -- transformers ---------------------------------------------------------------------------------------------------


def theirs(model, tokens, **options):
    """transformers' logits, on a copy: its forward leaves states on the modules."""
    wrapped = copy.deepcopy(model.wrapped)
    wrapped.set_attn_implementation("eager")
    return wrapped, wrapped(tokens, use_cache=False, **options).logits


@pytest.mark.parametrize("kind", KINDS)
def test_parity_with_transformers(kind):
    model, tokens = HookedGriffin.tiny(**KINDS[kind]), some_tokens(pos=19)
    wrapped, want = theirs(model, tokens)
    got = model(tokens)
    assert relative(got, want) < 1e-5
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((got * weight).sum(), list(model.wrapped.parameters()))
    expected = torch.autograd.grad((want * weight).sum(), list(wrapped.parameters()))
    for (name, _), a, b in zip(wrapped.named_parameters(), ours, expected, strict=True):
        assert relative(a, b) < 1e-4, name


@torch.no_grad()
def test_half_precision_is_close_to_transformers_and_to_float32():
    tokens = some_tokens(pos=19)
    exact = HookedGriffin.tiny()(tokens)
    for dtype in (torch.bfloat16, torch.float16):
        model = HookedGriffin.tiny(dtype=dtype)
        _, want = theirs(model, tokens)
        got, cache = model.run_with_cache(tokens)
        assert got.dtype == torch.float32 and cache["resid_post", 0].dtype == dtype
        assert relative(got, want.float()) < 0.05
        assert relative(got, exact) < 1.5 * relative(want.float(), exact)
        wide = {"input_gate", "recurrence_gate", "log_decay", "multiplier"}
        assert all(cache[word, 0].dtype == torch.float32 for word in wide)


@torch.no_grad()
def test_packed_documents_are_transformers_but_for_its_conv_which_leaks():
    """Without a cache transformers keeps recurrence and attention in their documents; with one tap the conv is too."""
    tokens, places = some_tokens(1, 11), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3]])
    leaky = HookedGriffin.tiny()
    _, want = theirs(leaky, tokens, position_ids=places)
    assert relative(leaky(tokens, position_ids=places), want) > 1e-2
    one_tap = HookedGriffin.tiny(conv1d_width=1)
    _, want = theirs(one_tap, tokens, position_ids=places)
    assert relative(one_tap(tokens, position_ids=places), want) < 1e-5


# -- every row, literally -------------------------------------------------------------------------------------------


def literal(model, layer, c, places):
    """Every point of a block from its row's equation, with loops, of the other points' cached values."""
    w = model.wrapped.model.layers[layer]
    t, mlp = w.temporal_block, w.mlp_block
    p = f"blocks.{layer}."
    batch, length = places.shape
    before = c["hook_embed"] if layer == 0 else c[f"blocks.{layer - 1}.hook_resid_post"]
    x, resid_mid = c[p + "hook_mixer_in"], c[p + "hook_resid_mid"]
    rows = {
        "hook_resid_pre": before,
        "hook_mixer_in": before,
        "ln1.hook_scale": (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt(),
        "ln1.hook_normalized": x / c[p + "ln1.hook_scale"],
        "ln1.hook_out": (1 + w.temporal_pre_norm.weight) * c[p + "ln1.hook_normalized"],
        "hook_resid_mid": c[p + "hook_resid_pre"] + c[p + "hook_mixer_out"],
        "hook_mlp_in": resid_mid,
        "ln2.hook_scale": (resid_mid.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt(),
        "ln2.hook_normalized": resid_mid / c[p + "ln2.hook_scale"],
        "ln2.hook_out": (1 + w.channel_pre_norm.weight) * c[p + "ln2.hook_normalized"],
        "mlp.hook_pre": c[p + "ln2.hook_out"] @ mlp.gate_proj.weight.T + mlp.gate_proj.bias,
        "mlp.hook_pre_linear": c[p + "ln2.hook_out"] @ mlp.up_proj.weight.T + mlp.up_proj.bias,
        "mlp.hook_post": gelu_tanh(c[p + "mlp.hook_pre"]) * c[p + "mlp.hook_pre_linear"],
        "hook_mlp_out": c[p + "mlp.hook_post"] @ mlp.down_proj.weight.T + mlp.down_proj.bias,
        "hook_resid_post": c[p + "hook_resid_mid"] + c[p + "hook_mlp_out"],
    }
    documents = (places == 0).cumsum(1)
    n = c[p + "ln1.hook_out"]
    if model.cfg.layer_types[layer] == "recurrent":
        m, lru = p + "mixer.", t.rg_lru
        taps = torch.zeros(batch, length, model.cfg.lru_width, 4, dtype=torch.float64)
        decay, state = c[m + "hook_log_decay"].exp(), torch.zeros_like(c[m + "hook_x"])
        gates, reset = {}, torch.zeros(batch, length, 1, dtype=torch.float64)
        for name, weight, bias in (
            ("hook_input_gate", lru.input_gate_weight, lru.input_gate_bias),
            ("hook_recurrence_gate", lru.recurrent_gate_weight, lru.recurrent_gate_bias),
        ):
            heads, width, _ = weight.shape
            gates[name] = torch.zeros_like(state)
            for h in range(heads):
                part = slice(h * width, (h + 1) * width)
                gates[name][..., part] = 1 / (1 + torch.exp(-(c[m + "hook_u"][..., part] @ weight[h] + bias[h])))
        multiplier = (1 - (2 * c[m + "hook_log_decay"]).exp()).sqrt()
        for b in range(batch):
            for i in range(length):
                for tap in range(4):
                    j = i - 3 + tap
                    if j >= 0 and documents[b, j] == documents[b, i]:
                        taps[b, i, :, tap] = t.conv_1d.weight[:, 0, tap] * c[m + "hook_x"][b, j]
                if places[b, i] == 0:
                    reset[b, i], multiplier[b, i], decay[b, i] = 1, 1, 0
                last = state[b, i - 1] if i else c[m + "hook_state_start"][b]
                state[b, i] = c[m + "hook_decay"][b, i] * last + c[m + "hook_write"][b, i]
        rows |= {
            "mixer.hook_x": n @ t.linear_x.weight.T + t.linear_x.bias,
            "mixer.hook_gate_pre": n @ t.linear_y.weight.T + t.linear_y.bias,
            "mixer.hook_conv_taps": taps,
            "mixer.hook_conv": c[m + "hook_conv_taps"].sum(-1) + t.conv_1d.bias,
            "mixer.hook_u": c[m + "hook_conv"],
            **{f"mixer.{name}": gate for name, gate in gates.items()},
            "mixer.hook_log_decay": -8 * c[m + "hook_recurrence_gate"] * torch.log(1 + lru.recurrent_param.exp()),
            "mixer.hook_reset": reset,
            "mixer.hook_multiplier": multiplier,
            "mixer.hook_state_start": torch.zeros(batch, model.cfg.lru_width, dtype=torch.float64),
            "mixer.hook_decay": decay,
            "mixer.hook_write": c[m + "hook_multiplier"] * c[m + "hook_input_gate"] * c[m + "hook_u"],
            "mixer.hook_state": state,
            "mixer.hook_scan": c[m + "hook_state"],
            "mixer.hook_y": c[m + "hook_scan"],
            "mixer.hook_gate": gelu_tanh(c[m + "hook_gate_pre"]),
            "mixer.hook_gated": c[m + "hook_y"] * c[m + "hook_gate"],
            "hook_mixer_out": c[m + "hook_gated"] @ t.linear_out.weight.T + t.linear_out.bias,
        }
    else:
        a, d, window = p + "attn.", model.cfg.d_head, model.cfg.window_size
        heads, kv_heads = model.cfg.n_heads, model.cfg.n_key_value_heads
        scores = torch.full((batch, heads, length, length), -torch.inf, dtype=torch.float64)
        z = torch.zeros(batch, length, heads, d, dtype=torch.float64)
        rotated = {}
        for word in "qk":
            rotated[word] = c[a + f"hook_{word}"].clone()
            for j in range(d // 4):  # pairs (j, j + d / 4) of the first half of the head
                angle = (places.double() * 10000.0 ** (-2 * j / (d // 2))).unsqueeze(-1)
                one, two = c[a + f"hook_{word}"][..., j], c[a + f"hook_{word}"][..., j + d // 4]
                rotated[word][..., j] = one * angle.cos() - two * angle.sin()
                rotated[word][..., j + d // 4] = two * angle.cos() + one * angle.sin()
        for b in range(batch):
            for h in range(heads):
                kv = h * kv_heads // heads
                for i in range(length):
                    for j in range(max(0, i - window + 1), i + 1):
                        if documents[b, i] == documents[b, j]:
                            score = c[a + "hook_rot_q"][b, i, h] @ c[a + "hook_rot_k"][b, j, kv]
                            scores[b, h, i, j] = score / d**0.5
                        z[b, i, h] += c[a + "hook_pattern"][b, h, i, j] * c[a + "hook_v"][b, j, kv]
        weights = c[a + "hook_attn_scores"].exp()
        rows |= {
            **{f"attn.hook_{s}": (n @ getattr(t, f"{s}_proj").weight.T).unflatten(-1, (-1, d)) for s in "qkv"},
            "attn.hook_rot_q": rotated["q"],
            "attn.hook_rot_k": rotated["k"],
            "attn.hook_attn_scores": scores,
            "attn.hook_pattern": weights / weights.sum(-1, keepdim=True),
            "attn.hook_z": z,
            "hook_mixer_out": c[a + "hook_z"].flatten(2) @ t.o_proj.weight.T + t.o_proj.bias,
        }
    return rows


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["griffin", "many key heads"])
def test_every_row_is_its_equation(kind):
    sizes = {"hidden_size": 32, "attention_window_size": 3} | KINDS[kind]
    model = HookedGriffin.tiny(dtype=torch.float64, **sizes)
    attention = model.wrapped.model.layers[2].temporal_block
    rotary = model.cfg.d_head // 2
    attention.rotary_emb.inv_freq.copy_(10000.0 ** (-torch.arange(0, rotary, 2).double() / rotary))
    tokens = some_tokens(2, 9)
    places = torch.stack([torch.arange(9), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4])])
    _, c = model.run_with_cache(tokens, position_ids=places, names_filter=lambda name: True)
    for layer in range(3):
        rows = literal(model, layer, c, places)
        assert set(rows) == {row.name for row in model.rows_for(layer)}
        for name, want in rows.items():
            torch.testing.assert_close(
                c[f"blocks.{layer}.{name}"], want, atol=1e-10, rtol=1e-10, msg=lambda m, n=name: n + m
            )
    scale = torch.tensor(32**0.5, dtype=torch.bfloat16).double()
    head, final = model.wrapped.lm_head.weight, model.wrapped.model.final_norm.weight
    last = c["blocks.2.hook_resid_post"]
    around = {
        "hook_embed": model.wrapped.model.embed_tokens.weight[tokens] * scale,
        "ln_final.hook_scale": (last.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt(),
        "ln_final.hook_normalized": last / c["ln_final.hook_scale"],
        "ln_final.hook_out": (1 + final) * c["ln_final.hook_normalized"],
        "hook_logits": 30 * torch.tanh(c["ln_final.hook_out"] @ head.T / 30),
    }
    for name, want in around.items():
        torch.testing.assert_close(c[name], want, atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_points_fire_in_order_and_in_shape(model):
    fired = []
    tokens = some_tokens(3, 10)
    model.run_with_hooks(tokens, fwd_hooks=[(lambda name: True, lambda x, hook: fired.append((hook.name, x.shape)))])
    assert [name for name, _ in fired] == list(model.names)
    sizes = {**model.cfg.sizes, "batch": 3, "pos": 10, "key_pos": 10}
    for name, shape in fired:
        assert tuple(shape) == tuple(sizes[dim] for dim in model.names[name].dims), name
    assert sizes["channel"] == 24 and sizes["kv_head"] == 1 and sizes["head"] == 2
    table = model.hook_table(layer=2)
    assert table["blocks.2.attn.hook_v"]["shape"] == ("batch", "pos", 1, 8)


# -- state ----------------------------------------------------------------------------------------------------------

PLACES = {
    "one document": None,
    "packed": torch.tensor([[*range(13), *range(9)], [0, 1, 2, 0, 0, 1, *range(16)]]),
    "from the middle": torch.arange(3, 25).expand(2, -1),
}


@torch.no_grad()
@pytest.mark.parametrize("places", PLACES)
def test_prefix_and_suffix_are_the_whole_at_every_split(model, places):
    tokens, places = some_tokens(2, 22), PLACES[places]
    whole, end = model(tokens, return_state=True, position_ids=places)
    for cut in range(1, 22):
        options = [{"position_ids": None if places is None else part} for part in _cut(places, cut)]
        first, state = model(tokens[:, :cut], return_state=True, **options[0])
        kept = state.clone()
        second, after = model(tokens[:, cut:], state=state, return_state=True, **options[1])
        assert relative(torch.cat([first, second], dim=1), whole) < 1e-10, cut
        assert all(torch.equal(kept[key], state[key]) for key in state)  # a call never changes the state it is given
        assert set(after) == set(end)
        for key in end:
            torch.testing.assert_close(after[key], end[key], atol=1e-10, rtol=0)
        assert after["keys", 2].shape[1] == 7  # the window less the own token


def _cut(places, at):
    return (None, None) if places is None else (places[:, :at], places[:, at:])


@torch.no_grad()
def test_a_state_goes_on_in_the_last_document(model):
    """Packed prefix, then a suffix without position_ids: it continues the second document and nothing else."""
    tokens = some_tokens(1, 12)
    _, state = model(tokens[:, :8], return_state=True, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]))
    assert state["next_position", 0].tolist() == [5]
    alone = model(tokens[:, 3:])
    assert relative(model(tokens[:, 8:], state=state), alone[:, 5:]) < 1e-10
    assert state["key_positions", 2].tolist() == [[-1, -1, 0, 1, 2, 3, 4]]


@torch.no_grad()
def test_a_new_document_behind_a_state_sees_nothing_of_it(model):
    tokens = some_tokens(2, 14)
    _, state = model(tokens[:, :5], return_state=True)
    fresh = model(tokens[:, 5:], state=state, position_ids=torch.arange(9))
    assert relative(fresh, model(tokens[:, 5:])) < 1e-10


@torch.no_grad()
def test_a_state_is_saved_picked_and_checked(model, tmp_path):
    tokens = some_tokens(2, 14)
    whole = model(tokens)
    _, state = model(tokens[:, :5], return_state=True)
    state.save(tmp_path / "state.safetensors")
    loaded = RecurrentState.load(tmp_path / "state.safetensors")
    assert relative(model(tokens[:, 5:], state=loaded), whole[:, 5:]) < 1e-10
    swapped = model(tokens[[1, 0, 1]][:, 5:], state=state.rows([1, 0, 1]))
    assert relative(swapped, whole[[1, 0, 1]][:, 5:]) < 1e-10
    state.tensors["blocks.2.keys"] = state["keys", 2][:, 1:]
    with pytest.raises(InputError, match=r"blocks.2.keys has shape \[2, 4, 1, 8\]; this call needs \[2, 5, 1, 8\]"):
        model(tokens[:, 5:], state=state)


# -- padding --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_a_padded_batch_is_its_rows_alone(model, side):
    rows = [some_tokens(1, n, seed=n)[0] for n in (12, 3, 17, 1)]
    tokens, mask = padded(rows, side if side != "holes" else "right")
    if side == "holes":
        order = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(3)).argsort(1)
        real = torch.zeros_like(mask)
        for i, row in enumerate(rows):
            at = order[i, : len(row)].sort().values
            tokens[i], real[i] = 1, False
            tokens[i, at], real[i, at] = row, True
        mask = real
    more = some_tokens(4, 9, seed=99)
    more_mask = torch.ones(4, 9, dtype=torch.bool)
    more_mask[1, 4:] = more_mask[2, ::2] = False
    out, state = model(tokens, attention_mask=mask, return_state=True)
    then, after = model(more, state=state, attention_mask=more_mask, return_state=True)
    assert torch.isfinite(out).all() and torch.isfinite(then).all()
    for i, row in enumerate(rows):
        alone, alone_state = model(row.unsqueeze(0), return_state=True)
        assert relative(out[i][mask[i]], alone[0]) < 1e-10
        assert torch.equal(state["next_position", 0][i : i + 1], alone_state["next_position", 0])
        next_alone, next_state = model(more[i][more_mask[i]].unsqueeze(0), state=alone_state, return_state=True)
        assert relative(then[i][more_mask[i]], next_alone[0]) < 1e-10
        for name, layer in (("scan", 0), ("conv", 1)):
            torch.testing.assert_close(after[name, layer][i : i + 1], next_state[name, layer], atol=1e-10, rtol=0)


@torch.no_grad()
def test_padding_and_documents_together(model):
    """Left padding with the usual position_ids, two documents in the second row."""
    first, second, third = (some_tokens(1, n, seed=n) for n in (9, 4, 3))
    tokens, mask = padded([first[0], torch.cat([second, third], 1)[0]], "left")
    places = torch.tensor([list(range(9)), [1, 1, 0, 1, 2, 3, 0, 1, 2]])
    out = model(tokens, attention_mask=mask, position_ids=places)
    assert relative(out[:1], model(first)) < 1e-10
    assert relative(out[1:, 2:6], model(second)) < 1e-10
    assert relative(out[1:, 6:], model(third)) < 1e-10


def test_gradients_are_finite_and_alone_under_padding(model):
    rows = [some_tokens(1, n, seed=n)[0] for n in (6, 2)]
    tokens, mask = padded(rows, "left")
    parameters = list(model.wrapped.parameters())
    got = torch.autograd.grad(model(tokens, attention_mask=mask)[mask].pow(2).sum(), parameters)
    want = torch.autograd.grad(sum(model(row.unsqueeze(0)).pow(2).sum() for row in rows), parameters)
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < 1e-10


# -- edits ----------------------------------------------------------------------------------------------------------


def every_point(model):
    """The points of one block of each kind, and those outside the blocks."""
    return [name for name in model.names if not name.startswith("blocks.1.")]


@torch.no_grad()
def test_edits_in_place_and_returned_agree_and_reach_the_output(model):
    tokens, more = some_tokens(2, 6), some_tokens(2, 6, seed=4)
    _, state = model(tokens, return_state=True)  # from a state, so that state_start matters too
    clean = model(more, state=state)
    for name in every_point(model):
        hooks = [lambda x, hook: x * 0.7 + 0.05, in_place]
        a, b = (model.run_with_hooks(more, state=state, fwd_hooks=[(name, hook)]) for hook in hooks)
        assert torch.equal(a, b), name
        assert relative(a, clean) > 1e-6, f"an edit of {name} has no effect"
    assert torch.equal(model(more, state=state), clean)


def in_place(x, hook):
    x.mul_(0.7).add_(0.05)


def test_gradients_of_edits_are_exact_at_every_point(model):
    tokens, more = some_tokens(2, 5), some_tokens(2, 5, seed=4)
    with torch.no_grad():
        _, state = model(tokens, return_state=True)
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(model(more).shape, generator=generator, dtype=torch.float64)
    for name in every_point(model):
        direction = {}

        def pushed(size, name=name, direction=direction):
            def edit(x, hook):
                if name not in direction:
                    direction[name] = torch.randn(x.shape, generator=generator, dtype=x.dtype)
                return x + size * direction[name]

            return (model.run_with_hooks(more, state=state, fwd_hooks=[(name, edit)]) * weight).sum()

        size = torch.zeros((), dtype=torch.float64, requires_grad=True)
        (exact,) = torch.autograd.grad(pushed(size), size)
        with torch.no_grad():
            numeric = (pushed(1e-5) - pushed(-1e-5)) / 2e-5
        assert torch.allclose(exact, numeric, rtol=1e-5, atol=1e-7), (name, exact, numeric)


@torch.no_grad()
def test_decay_zero_and_write_new_is_a_propagating_state_patch(model):
    tokens, m = some_tokens(1, 9), "blocks.0.mixer."
    _, c = model.run_with_cache(tokens, names_filter=m + "*")
    new = torch.randn(24, dtype=torch.float64)
    states = c[m + "hook_state"].clone()
    states[:, 4] = new
    for t in range(5, 9):
        states[:, t] = c[m + "hook_decay"][:, t] * states[:, t - 1] + c[m + "hook_write"][:, t]

    def cut(decay, hook):
        decay[:, 4] = 0

    def put(write, hook):
        write[:, 4] = new

    with model.hooks([(m + "hook_decay", cut), (m + "hook_write", put)]):
        _, patched = model.run_with_cache(tokens, names_filter=m + "hook_scan")
    assert relative(patched[m + "hook_scan"], states) < 1e-12

    def readout_only(state, hook):
        state[:, 4] = new

    with model.hooks([(m + "hook_state", readout_only)]):
        _, read = model.run_with_cache(tokens, names_filter=m + "hook_scan")
    changed = (read[m + "hook_scan"] - c[m + "hook_scan"]).abs().amax((0, 2)) > 1e-9
    assert changed.tolist() == [t == 4 for t in range(9)]


@torch.no_grad()
def test_lazy_points_are_built_only_for_listeners(model):
    lazy = [name for name, point in model.names.points.items() if point.lazy]
    assert {name.rpartition(".")[2] for name in lazy} == {
        "hook_conv_taps", "hook_state_start", "hook_decay", "hook_write", "hook_state",
    }  # fmt: skip
    tokens = some_tokens()
    plain = model(tokens)
    before = {name: model.hook_dict[name].visits for name in lazy}
    model(tokens)
    model.run_with_cache(tokens)
    model(tokens, position_ids=torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7]))
    assert before == {name: model.hook_dict[name].visits for name in lazy}
    for name in lazy:
        out, cache = model.run_with_cache(tokens, names_filter=name)
        assert list(cache.cache_dict) == [name] and relative(out, plain) < 1e-12
        assert model.hook_dict[name].visits == before[name] + 1
    out, _ = model.run_with_cache(tokens, names_filter=lambda name: True)
    assert relative(out, plain) < 1e-12


# -- implicit attention -----------------------------------------------------------------------------------------------


PACKED = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0], [6, 7, 0, 1, 0, 0, 1, 2, 3]])  # three documents and four


@pytest.mark.parametrize(
    "case",
    ["plain", "left padded", "from a state", "a new document behind a state", "packed", "packed, padded, from a state"],
)
def test_implicit_attention_is_the_frozen_jacobian_and_reconstructs(model, case):
    """o = A x + r, and A = d gated / d x with the gates and decays held."""
    tokens, options = some_tokens(2, 9), {}
    if case == "left padded":
        tokens, options["attention_mask"] = padded([some_tokens(1, 9)[0], some_tokens(1, 4)[0]], "left")
    if "packed" in case:
        options["position_ids"] = PACKED
        if "padded" in case:
            options["attention_mask"] = torch.ones(2, 9, dtype=torch.bool)
            options["attention_mask"][0, [1, 7]] = options["attention_mask"][1, [0, 3]] = False
    if "state" in case:
        with torch.no_grad():
            options["state"] = model(some_tokens(2, 6, seed=3), return_state=True)[1]
        if "new" in case:
            options["position_ids"] = torch.arange(9)
    for layer in (0, 1):
        A = gl.implicit_attention(model, tokens, layer=layer, **options)
        assert A.check().relative < 1e-10
        p = f"blocks.{layer}.mixer."
        held = [p + f"hook_{word}" for word in ("input_gate", "log_decay", "multiplier", "gate")]
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens, names_filter=[*held, p + "hook_x"], **options)
        seen = {}

        def gated_of(x, p=p, held=held, cache=cache, seen=seen):
            hooks = [(name, lambda value, hook, c=cache: c[hook.name]) for name in held]
            hooks += [(p + "hook_x", lambda value, hook: x), (p + "hook_gated", lambda o, hook: seen.update(o=o))]
            model.run_with_hooks(tokens, fwd_hooks=hooks, **options)
            return seen["o"]

        exact = torch.autograd.functional.jacobian(gated_of, cache[p + "hook_x"])
        dense = torch.einsum("bicbjc->bcij", exact)
        real = options.get("attention_mask", torch.ones(2, 9, dtype=torch.bool))
        real = (real[:, None, :, None] & real[:, None, None, :]).double()
        torch.testing.assert_close(A.dense(), dense * real, atol=1e-10, rtol=0)
        torch.testing.assert_close(A.mean(), A.dense().mean(1), atol=1e-10, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("case", ["packed", "padded", "state"])
def test_implicit_attention_of_packed_documents(model, case):
    """Every view of it is the dense matrix, which is block-diagonal; a document's is that of the document alone."""
    tokens, options = some_tokens(2, 9), {"position_ids": PACKED}
    if case != "packed":
        options["state"] = model(some_tokens(2, 6, seed=3), return_state=True)[1]
    if case == "padded":
        options["attention_mask"] = torch.ones(2, 9, dtype=torch.bool)
        options["attention_mask"][0, [1, 7]] = options["attention_mask"][1, [0, 3]] = False
    document = (PACKED == 0).cumsum(1)
    apart = (document[:, :, None] != document[:, None]).unsqueeze(1)
    for A in gl.implicit_attention(model, tokens, **options):
        check_views(A)
        check_views(A.without("gate", "scan"))
        assert A.check().relative < 1e-10 and (A.dense() * apart).abs().max() == 0
        F = A.contributions()
        direction = torch.randn(len(F.weight), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        total = F.along(direction).sum(-1) + F.remainder() @ direction
        torch.testing.assert_close(total, F.output() @ direction, atol=1e-10, rtol=0)
        alone = gl.implicit_attention(model, tokens[1:, 5:], layer=A.layer)
        torch.testing.assert_close(A.dense()[1:, :, 5:, 5:], alone.dense(), atol=1e-10, rtol=0)
        torch.testing.assert_close(A.bias[1:, 5:], alone.bias, atol=1e-10, rtol=0)


@torch.no_grad()
def test_nnsight_sees_lazy_points_of_both_kinds_of_layer(model):
    nnsight = pytest.importorskip("nnsight")
    tiny, tokens = HookedGriffin.tiny(dtype=torch.float64), some_tokens()
    names = ["blocks.0.mixer.hook_decay", "blocks.0.mixer.hook_state", "blocks.2.attn.hook_pattern"]
    traced = nnsight.NNsight(tiny)
    with traced.trace(tokens):
        decay = traced.blocks[0].mixer.hook_decay.output.save()
        state = traced.blocks[0].mixer.hook_state.output.save()
        pattern = traced.blocks[2].attn.hook_pattern.output.save()
    _, cache = model.run_with_cache(tokens, names_filter=names)
    for name, value in zip(names, (decay, state, pattern), strict=True):
        torch.testing.assert_close(value, cache[name])


# -- generation -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_greedy_generation_is_the_argmax_of_the_whole(model):
    rows = [some_tokens(1, n, seed=n)[0] for n in (5, 2)]
    tokens, mask = padded(rows, "left")
    fired = []
    with model.hooks([("blocks.2.attn.hook_pattern", lambda x, hook: fired.append(tuple(x.shape)))]):
        out = model.generate(tokens, max_new_tokens=12, do_sample=False, attention_mask=mask, verbose=False)
    assert len(fired) == 12 and fired[0] == (2, 2, 5, 5) and fired[-1] == (2, 2, 1, 8)
    for i, row in enumerate(rows):
        ids = row.unsqueeze(0)
        for _ in range(12):
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(out[i, 5:], ids[0, len(row) :])


# -- traps ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_no_cap_where_transformers_has_all_zero_logits():
    tokens = some_tokens()
    capped = HookedGriffin.tiny()
    free = HookedGriffin.tiny(logits_soft_cap=0.0)
    assert free.cfg.logits_soft_cap is None and capped.cfg.logits_soft_cap == 30.0
    assert relative(30 * torch.tanh(free(tokens) / 30), capped(tokens)) < 1e-5
    _, zeros = theirs(free, tokens)
    assert not zeros.nan_to_num().any()
    low = HookedGriffin.tiny(logits_soft_cap=1.0)
    assert low(tokens).abs().max() <= 1
    assert relative(low(tokens), theirs(low, tokens)[1]) < 1e-5


def test_the_slope_of_the_multiplier_is_bounded_as_in_transformers():
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import SqrtBoundDerivative

    x = torch.tensor([0.0, 1e-9, 2.4e-7, 2.6e-7, 1e-3, 1.0], dtype=torch.float64, requires_grad=True)
    ours, want = bounded_sqrt(x), SqrtBoundDerivative.apply(x)
    assert torch.equal(ours, want)
    (a,), (b,) = torch.autograd.grad(ours.sum(), x, create_graph=True), torch.autograd.grad(want.sum(), x)
    torch.testing.assert_close(a, b)
    assert a.detach().tolist()[:3] == [1000, 1000, 1000]
    (second,) = torch.autograd.grad(a.sum(), x)
    assert torch.isfinite(second).all()
    assert bounded_sqrt(torch.tensor(-0.5)) == 0  # an edit may make a decay exceed 1
    far = torch.tensor([0.3, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(bounded_sqrt, far, check_forward_ad=True) and torch.autograd.gradgradcheck(
        bounded_sqrt, far
    )


def test_decays_of_exactly_one_have_transformers_gradients():
    """A recurrence that never forgets (softplus underflows): sqrt(1 - a^2) = 0, where sqrt has no slope."""
    model, tokens = HookedGriffin.tiny(), some_tokens()
    with torch.no_grad():
        model.wrapped.model.layers[0].temporal_block.rg_lru.recurrent_param[::2] = -40.0
    wrapped, want = theirs(model, tokens)
    got = model(tokens)
    assert relative(got, want) < 1e-5
    ours = torch.autograd.grad(got.pow(2).sum(), list(model.wrapped.parameters()))
    expected = torch.autograd.grad(want.pow(2).sum(), list(wrapped.parameters()))
    for a, b in zip(ours, expected, strict=True):
        assert torch.isfinite(a).all() and relative(a, b) < 1e-4


@torch.no_grad()
def test_nothing_is_left_on_the_wrapped_model_and_nothing_on_it_matters(model):
    tokens = some_tokens()
    clean = model(tokens)
    block = model.wrapped.model.layers[0].temporal_block
    block.rg_lru.recurrent_states, block.conv1d_state = torch.ones(2, 24), torch.ones(2, 24, 3)
    assert torch.equal(model(tokens), clean)
    assert torch.equal(block.rg_lru.recurrent_states, torch.ones(2, 24))
    block.rg_lru.recurrent_states = block.conv1d_state = None
    copy.deepcopy(model.wrapped)


@torch.no_grad()
def test_parameters_are_read_at_call_time():
    model, other, tokens = HookedGriffin.tiny(seed=0), HookedGriffin.tiny(seed=1), some_tokens()
    model.wrapped.load_state_dict(other.wrapped.state_dict(), assign=True)
    assert torch.equal(model(tokens), other(tokens))


@torch.no_grad()
def test_the_embedding_is_scaled_and_the_stream_decomposes(model):
    tokens = some_tokens()
    _, cache = model.run_with_cache(tokens)
    assert torch.equal(cache["hook_embed"], model.W_E[tokens])
    assert torch.equal(cache["hook_embed"], cache["resid_pre", 0])
    parts, labels = cache.decompose_resid(return_labels=True)
    assert labels == ["embed", *(f"{layer}_{kind}_out" for layer in range(3) for kind in ("mixer", "mlp"))]
    assert relative(parts.sum(0), cache["resid_post", 2]) < 1e-12
    layers = model.wrapped.model.layers
    bias = layers[0].temporal_block.linear_out.bias + layers[0].mlp_block.down_proj.bias
    bias = bias + layers[1].temporal_block.linear_out.bias + layers[1].mlp_block.down_proj.bias
    torch.testing.assert_close(model.accumulated_bias(2), bias)
    torch.testing.assert_close(model.accumulated_bias(2, mlp_input=True), bias + layers[2].temporal_block.o_proj.bias)


@torch.no_grad()
def test_the_window_counts_the_own_token(model):
    tokens = some_tokens(1, 12)
    _, cache = model.run_with_cache(tokens, names_filter="blocks.2.attn.hook_pattern")
    seen = cache["pattern", 2][0] > 0
    i, j = torch.arange(12).unsqueeze(1), torch.arange(12)
    assert torch.equal(seen, ((j <= i) & (i - j < 8)).expand(2, 12, 12))
    assert torch.allclose(cache["pattern", 2].sum(-1), torch.ones(1, 2, 12, dtype=torch.float64))


# -- names, configuration, loading ----------------------------------------------------------------------------------


@torch.no_grad()
def test_names(model):
    names = model.names
    assert names.find("blocks.0.mixer.hook_ssm_state").name == "blocks.0.mixer.hook_state"
    assert names.find("blocks.2.hook_attn_out").name == "blocks.2.hook_mixer_out"
    assert names.short("pattern", 2).name == "blocks.2.attn.hook_pattern"
    assert names.short("q", -1, "attn").name == "blocks.2.attn.hook_q"
    assert names.short("post", 0, "mlp").name == "blocks.0.mlp.hook_post"
    assert names.select("blocks.*.hook_state")[0] == [f"blocks.{layer}.mixer.hook_state" for layer in (0, 1)]
    for missing in ("blocks.2.mixer.hook_decay", "blocks.0.attn.hook_q", "blocks.2.mixer.hook_ssm_state"):
        with pytest.raises(PointError, match="not a hook point of tiny-griffin"):
            names.find(missing)
    assert model.blocks[2].mixer is model.blocks[2].attn
    assert "mixer" not in dict(model.blocks[2].named_children())


def test_cfg(model):
    cfg = model.cfg
    assert (cfg.architecture, cfg.n_layers, cfg.n_heads, cfg.d_head) == ("griffin", 3, 2, 8)
    assert (cfg.lru_width, cfg.d_conv, cfg.d_mlp, cfg.window_size, cfg.n_key_value_heads) == (24, 4, 24, 8, 1)
    assert cfg.layer_types == ("recurrent", "recurrent", "attention") and cfg.tie_word_embeddings
    assert HookedGriffin.tiny(dtype=torch.bfloat16).cfg.dtype == torch.bfloat16


def test_tiny_leaves_torchs_random_numbers_alone():
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    a = HookedGriffin.tiny(seed=3)
    assert torch.equal(torch.rand(3), want)
    b, c = HookedGriffin.tiny(seed=3), HookedGriffin.tiny(seed=4)
    assert torch.equal(a(some_tokens()), b(some_tokens())) and not torch.equal(a(some_tokens()), c(some_tokens()))


@torch.no_grad()
def test_wrap_and_hub_layout(tmp_path):
    tiny, tokens = HookedGriffin.tiny(), some_tokens()
    assert isinstance(gl.wrap(tiny.wrapped), HookedGriffin)
    tiny.wrapped.save_pretrained(tmp_path)
    loaded = gl.from_pretrained(tmp_path, device="cpu")
    assert isinstance(loaded, HookedGriffin) and torch.equal(loaded(tokens), tiny(tokens))
    with pytest.raises(CheckpointError, match="hidden_activation='relu'"):
        HookedGriffin.tiny(hidden_activation="relu")


def test_a_damaged_original_checkpoint(tmp_path):
    weights, _ = golden("griffin_lm")
    (tmp_path / "config.json").write_text((GOLDEN / "griffin_lm" / "config.json").read_text())
    del weights["blocks.1.mlp_block.ffw_up.b"]
    weights["blocks.0.recurrent_block.conv_1d.w"] = torch.zeros(3, 32)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing 2 weights: .*mlp_block.gate_proj.bias.*; it has misshapen 1"):
        gl.from_pretrained(tmp_path)


@torch.no_grad()
def test_an_original_without_scale_cap_and_lru_width(tmp_path):
    weights, _ = golden("griffin_lm")
    config = json.loads((GOLDEN / "griffin_lm" / "config.json").read_text())
    del config["logits_soft_cap"], config["lru_width"]
    config["embeddings_scale_by_sqrt_dim"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "model.safetensors")
    model = gl.from_pretrained(tmp_path, device="cpu")
    assert model.cfg.logits_soft_cap is None
    assert torch.equal(model.W_E, weights["embedder.input_embedding"])


def test_padding_of_a_run_is_seen_by_documents():
    mask = torch.tensor([[False, True, True, False, True]])
    run = DocumentRun(torch.tensor([[0, 0, 1, 0, 0]]), Padding.of(mask))
    assert run.begins.tolist() == [[False, True, False, False, True]]
    assert run.ranks[mask].tolist() == [0, 1, 2]

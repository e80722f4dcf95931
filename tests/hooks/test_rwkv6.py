"""RWKV-5 and RWKV-6: each row against its literal equation, a loop over tokens, golden vectors, files of both versions."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import gatedlens as gl
from gatedlens import ablation
from gatedlens.formats.rwkv6_lm import MIXES, Rwkv6Weights
from gatedlens.hooks.rwkv6 import ROWS, HookedRWKV6
from tests.helpers import GOLDEN, golden, relative
from tests.hooks import battery
from tests.hooks.literal import before, norm

TOKENS = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(0))
VERSIONS = ("rwkv6", "rwkv5")


def tiny(version: str, **more) -> HookedRWKV6:
    return HookedRWKV6.tiny(seed=1, dtype=torch.float64, model_type=version, **more)


@pytest.fixture(params=VERSIONS)
def model(request):
    return tiny(request.param)


# -- the equations --------------------------------------------------------------------------------------------------


def shares(part, version: str, n, s, letters: str):
    """{m: n mixed with the position before by a share that the token does not move}"""
    if version == "rwkv5":
        return {m: n * getattr(part, f"time_mix_{m}") + s * (1 - getattr(part, f"time_mix_{m}")) for m in letters}
    return {m: n + (s - n) * getattr(part, f"time_maa_{m}") for m in letters}


def literal(cache, model, layer: int) -> dict[str, torch.Tensor]:
    """Every row of one block from its equation, with loops, reading the rows it names from the cache."""
    w, cfg, out = model.wrapped.blocks[layer], model.cfg, {}
    m, ffn, H, V = w.att, w.ffn, model.cfg.n_heads, model.cfg.d_head

    def c(name):
        return cache[f"blocks.{layer}.{name}"]

    def heads(x):
        return x.unflatten(-1, (H, V))

    if layer == 0:
        norm(out, c, "ln0", w.ln0, cache["hook_embed"], cfg.eps)
    out["hook_resid_pre"] = c("ln0.hook_out") if layer == 0 else cache["resid_post", layer - 1]
    out["hook_mixer_in"] = c("hook_resid_pre")
    norm(out, c, "ln1", w.ln1, c("hook_mixer_in"), cfg.eps)
    n, s = c("ln1.hook_out"), c("mixer.hook_shift")
    out["mixer.hook_shift"] = before(n)
    if cfg.version == "rwkv5":
        out |= {f"mixer.hook_x{name}": x for name, x in shares(m, "rwkv5", n, s, "kvrg").items()}
        out["mixer.hook_log_decay"] = -torch.exp(m.time_decay).expand(*TOKENS.shape, H, V)
    else:
        out["mixer.hook_xx"] = n + (s - n) * m.time_maa_x
        low = torch.tanh(c("mixer.hook_xx") @ m.time_maa_w1)
        out["mixer.hook_mix_low"] = torch.stack(low.chunk(5, dim=-1), 2)
        for i, name in enumerate("wkvrg"):
            share = getattr(m, f"time_maa_{name}") + c("mixer.hook_mix_low")[:, :, i] @ m.time_maa_w2[i]
            out[f"mixer.hook_x{name}"] = n + (s - n) * share
        out["mixer.hook_w_pre"] = heads(
            m.time_decay + torch.tanh(c("mixer.hook_xw") @ m.time_decay_w1) @ m.time_decay_w2
        )
        out["mixer.hook_log_decay"] = -torch.exp(c("mixer.hook_w_pre"))
    out["mixer.hook_r"] = heads(c("mixer.hook_xr") @ m.receptance.weight.T)
    out["mixer.hook_k"] = heads(c("mixer.hook_xk") @ m.key.weight.T)
    out["mixer.hook_x"] = c("mixer.hook_xv") @ m.value.weight.T
    out["mixer.hook_gate_pre"] = c("mixer.hook_xg") @ m.gate.weight.T
    out["mixer.hook_u"] = c("mixer.hook_x")
    r, k, u = c("mixer.hook_r"), c("mixer.hook_k"), heads(c("mixer.hook_u"))
    out["mixer.hook_bonus"] = (r * m.time_faaaa * k).sum(-1)
    out["mixer.hook_reset"] = torch.zeros(*TOKENS.shape, 1, dtype=torch.float64)
    kept = 1 - c("mixer.hook_reset")
    out["mixer.hook_state_start"] = torch.zeros(len(TOKENS), H, V, V, dtype=torch.float64)
    out["mixer.hook_decay"] = (
        (torch.exp(c("mixer.hook_log_decay")) * kept[..., None]).unsqueeze(-2).expand(-1, -1, -1, V, -1)
    )
    out["mixer.hook_write"] = torch.einsum("blhv,blhk->blhvk", u, k)
    states, scan = [], []
    for t in range(TOKENS.shape[1]):
        last = c("mixer.hook_state")[:, t - 1] if t else c("mixer.hook_state_start")
        scan.append(torch.einsum("bhvk,bhk->bhv", last, r[:, t]) * kept[:, t, :, None])
        states.append(c("mixer.hook_decay")[:, t] * last + c("mixer.hook_write")[:, t])
    out["mixer.hook_state"], out["mixer.hook_scan"] = torch.stack(states, 1), torch.stack(scan, 1).flatten(2)
    out["mixer.hook_y"] = c("mixer.hook_scan") + (c("mixer.hook_bonus")[..., None] * u).flatten(2)
    y = heads(c("mixer.hook_y"))
    centred = y - y.mean(-1, keepdim=True)
    out["mixer.hook_scale"] = (centred.pow(2).mean(-1) + cfg.mixer_eps).sqrt()
    normed = (centred / c("mixer.hook_scale")[..., None]).flatten(2)
    out["mixer.hook_normed"] = m.ln_x.weight * normed + m.ln_x.bias
    out["mixer.hook_gate"] = c("mixer.hook_gate_pre") * torch.sigmoid(c("mixer.hook_gate_pre"))
    out["mixer.hook_gated"] = c("mixer.hook_normed") * c("mixer.hook_gate")
    out["hook_mixer_out"] = c("mixer.hook_gated") @ m.output.weight.T
    out["hook_resid_mid"] = c("hook_resid_pre") + c("hook_mixer_out")
    out["hook_mlp_in"] = c("hook_resid_mid")
    norm(out, c, "ln2", w.ln2, c("hook_mlp_in"), cfg.eps)
    n, s = c("ln2.hook_out"), c("mlp.hook_shift")
    out["mlp.hook_shift"] = before(n)
    out |= {f"mlp.hook_x{name}": x for name, x in shares(ffn, cfg.version, n, s, "kr").items()}
    out["mlp.hook_k"] = c("mlp.hook_xk") @ ffn.key.weight.T
    out["mlp.hook_k_act"] = c("mlp.hook_k").clamp(min=0).pow(2)
    out["mlp.hook_kv"] = c("mlp.hook_k_act") @ ffn.value.weight.T
    out["mlp.hook_gate_pre"] = c("mlp.hook_xr") @ ffn.receptance.weight.T
    out["mlp.hook_gate"] = torch.sigmoid(c("mlp.hook_gate_pre"))
    out["hook_mlp_out"] = c("mlp.hook_kv") * c("mlp.hook_gate")
    out["hook_resid_post"] = c("hook_resid_mid") + c("hook_mlp_out")
    return out


def test_every_row_is_its_equation(model):
    battery.rows_are_their_equations(model, literal, TOKENS, 1e-10)


@pytest.mark.parametrize("layer", [0, 1])
def test_after_an_edit_every_row_downstream_is_its_equation(model, layer):
    """But the last position's state and step, which nobody reads any more."""
    battery.edits_reach_every_row(model, literal, layer, TOKENS, rtol=1e-10)


# -- a token at a time ----------------------------------------------------------------------------------------------


def layer_norm(x, weights):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weights.weight, weights.bias, weights.eps)


def by_hand(w, tokens):
    """The logits of each row, a token at a time, from a state of numbers; nothing of gatedlens."""
    version, size = w.config["model_type"], w.config["head_size"]
    rows = []
    for row in tokens:
        states = [[torch.zeros(16, dtype=torch.float64), torch.zeros(16, dtype=torch.float64), None] for _ in w.blocks]
        logits = []
        for token in row:
            x = layer_norm(w.emb.weight[token], w.blocks[0].ln0)
            for block, state in zip(w.blocks, states, strict=True):
                att, n, s = block.att, layer_norm(x, block.ln1), state[0]
                if version == "rwkv5":
                    mixed = {
                        m: n * getattr(att, f"time_mix_{m}")[0, 0] + s * (1 - getattr(att, f"time_mix_{m}")[0, 0])
                        for m in "kvrg"
                    }
                    decay = torch.exp(-torch.exp(att.time_decay))
                else:
                    xx = n + (s - n) * att.time_maa_x[0, 0]
                    low = torch.tanh(xx @ att.time_maa_w1).view(5, -1)
                    mixed = {
                        m: n + (s - n) * (getattr(att, f"time_maa_{m}")[0, 0] + low[i] @ att.time_maa_w2[i])
                        for i, m in enumerate("wkvrg")
                    }
                    rate = att.time_decay[0, 0] + torch.tanh(mixed["w"] @ att.time_decay_w1) @ att.time_decay_w2
                    decay = torch.exp(-torch.exp(rate)).view(-1, size)
                r, k, v = (
                    (p.weight @ mixed[m]).view(-1, size)
                    for p, m in ((att.receptance, "r"), (att.key, "k"), (att.value, "v"))
                )
                own = v.unsqueeze(2) * k.unsqueeze(1)
                last = torch.zeros_like(own) if state[2] is None else state[2]
                y = ((last + own * att.time_faaaa.unsqueeze(1)) @ r.unsqueeze(2)).squeeze(2)
                state[0], state[2] = n, decay.unsqueeze(1) * last + own
                y = (y - y.mean(1, keepdim=True)) / (y.var(1, unbiased=False, keepdim=True) + att.ln_x.eps).sqrt()
                y = y.flatten() * att.ln_x.weight + att.ln_x.bias
                x = x + att.output.weight @ (y * torch.nn.functional.silu(att.gate.weight @ mixed["g"]))
                ffn, n, s = block.ffn, layer_norm(x, block.ln2), state[1]
                mixed = {m: row[0, 0] for m, row in shares(ffn, version, n, s, "kr").items()}
                kv = ffn.value.weight @ torch.relu(ffn.key.weight @ mixed["k"]).pow(2)
                x, state[1] = x + torch.sigmoid(ffn.receptance.weight @ mixed["r"]) * kv, n
            logits.append(w.head.weight @ layer_norm(x, w.ln_out))
        rows.append(torch.stack(logits))
    return torch.stack(rows)


def test_logits_and_gradients_are_the_loops_and_the_same_with_somebody_inside(model):
    parameters = dict(model.wrapped.named_parameters())
    weight = torch.randn(2, 9, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = by_hand(model.wrapped, TOKENS)
    assert relative(model(TOKENS), want) < 1e-12
    wanted = torch.autograd.grad((want * weight).sum(), list(parameters.values()))
    for listen in ([], [("*.hook_state", lambda x, hook: None)]):
        with model.hooks(listen):
            found = torch.autograd.grad((model(TOKENS) * weight).sum(), list(parameters.values()))
        for name, got, own in zip(parameters, found, wanted, strict=True):
            assert relative(got, own) < 1e-10, name


@torch.no_grad()
@pytest.mark.parametrize("version", VERSIONS)
def test_golden_logits_and_states(version):
    """By ChatRWKV's code, a token at a time, in float32."""
    _, _, io = golden(f"{version}_lm")
    tokens = io["input_ids"].long()
    for dtype, bound in ((torch.float64, 2e-6), (torch.float32, 6e-6)):
        model = gl.from_pretrained(GOLDEN / f"{version}_lm" / "model.safetensors", device="cpu", dtype=dtype)
        assert isinstance(model, HookedRWKV6) and model.cfg.version == version and model.cfg.mixer_eps == 64e-5
        logits, state = model(tokens, return_state=True)
        assert relative(logits[0], io["logits"]) < bound
        for layer in range(model.cfg.n_layers):
            assert relative(state["scan", layer][0].mT, io[f"state.{layer}"]) < 2 * bound  # theirs is [key, value]


# -- implicit attention, states -------------------------------------------------------------------------------------


@torch.no_grad()
def test_attention_is_the_products_of_the_decays_and_the_bonus(model):
    """o = A x + r, number by number: what j wrote is read from j + 1 on, undecayed there; j's own read has the bonus."""
    _, cache = model.run_with_cache(TOKENS, names_filter=battery.everything)
    for layer in range(2):
        A = gl.implicit_attention(cache, layer=layer)
        assert A.check().relative < 1e-12
        log, r, k, bonus, gate, scale = (cache[x, layer] for x in ("log_decay", "r", "k", "bonus", "gate", "scale"))
        norm_x, dense = model.wrapped.blocks[layer].att.ln_x, A.dense()
        for h, v in ((0, 1), (3, 2)):
            c = 4 * h + v
            for i in range(9):
                for j in range(i + 1):
                    left = torch.exp(log[:, j + 1 : i, h].sum(1))
                    s = (r[:, i, h] * left * k[:, j, h]).sum(-1) if j < i else bonus[:, i, h]
                    want = gate[:, i, c] * norm_x.weight[c] * s / scale[:, i, h]
                    assert torch.allclose(dense[:, c, i, j], want, atol=1e-13), (layer, c, i, j)
        assert relative(A.bias, gate * norm_x.bias) < 1e-13


@torch.no_grad()
def test_a_cut_is_the_scan_without_the_source_under_the_same_scale(model):
    _, clean = model.run_with_cache(TOKENS, names_filter=battery.everything)
    layer, src, dst = 1, 2, 6
    stem = f"blocks.{layer}.mixer.hook_"
    lost = clean[stem + "write"][:, src]
    for t in range(src + 1, dst):
        lost = clean[stem + "decay"][:, t] * lost

    def without(state, point):
        state = state.clone()
        state[:, dst - 1] -= lost  # what dst reads
        return state

    edit = ablation.edit(stem + "state", without)
    edit += ablation.edit(stem + "scale", lambda scale, point: clean[stem + "scale"])
    with edit.on(model):
        want = model(TOKENS)
    with gl.knockout.cut(src, dst, layers=layer).on(model):
        assert relative(model(TOKENS), want) < 1e-12
    assert relative(model(TOKENS), want) > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("heard", [False, True], ids=["", "inside"])
def test_padding_counts_for_nothing_nor_do_holes(model, heard):
    battery.padding_and_holes_leave_states_of_their_own(model, TOKENS, heard)


@torch.no_grad()
@pytest.mark.parametrize("heard", [False, True], ids=["", "inside"])
def test_packed_documents_are_as_if_each_stood_alone(model, heard):
    battery.documents_leave_states_of_their_own(model, TOKENS, heard)


@torch.no_grad()
def test_a_patched_state_is_read_from_the_next_position_on(model):
    new = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    _, start = model(TOKENS[:, :4], return_state=True)
    plain = model.run_with_cache(TOKENS, names_filter="*.hook_scan")[1]["scan", 0]
    with gl.states.patch(new, pos=3, layers=0).on(model):
        scan = model.run_with_cache(TOKENS, names_filter="*.hook_scan")[1]["scan", 0]
    start["scan", 0] = new
    later = model.run_with_cache(TOKENS[:, 4:], state=start, names_filter="*.hook_scan")[1]["scan", 0]
    assert relative(scan[:, 4:], later) < 1e-12 and relative(scan[:, :4], plain[:, :4]) < 1e-14


# -- files ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("version", VERSIONS)
def test_a_file_says_its_version_and_its_sizes(version, tmp_path):
    weights = tiny(version, norm_eps=1e-5, ln_x_eps=64e-5, dim_att=24).wrapped
    torch.save({name: tensor.float() for name, tensor in weights.state_dict().items()}, tmp_path / "RWKV-World.pth")
    model = gl.from_pretrained(tmp_path / "RWKV-World.pth", device="cpu")
    assert model.cfg.version == version and model.cfg.n_heads == 6 and model.cfg.mixer_eps == 64e-5
    assert relative(model(TOKENS), gl.wrap(weights)(TOKENS)) < 1e-5


@torch.no_grad()
def test_a_saved_folder_is_opened(model, tmp_path):
    for tied in (False, True):
        own = tiny(model.cfg.version, tie_word_embeddings=tied)
        own.wrapped.save_pretrained(tmp_path / str(tied))
        again = gl.from_pretrained(str(tmp_path / str(tied)), device="cpu")
        assert torch.equal(again(TOKENS), own(TOKENS))
        assert (again.embedding.weight is again.unembedding.weight) == tied


@torch.no_grad()
def test_the_hubs_folder_of_rwkv6_is_opened(tmp_path):
    """By the names of the code beside RWKV/v6-Finch-1B6-HF, whose ranks and width of the channel mix go by hidden_size."""
    own = tiny("rwkv6", mix_rank=32, decay_rank=64, dim_ffn=32, norm_eps=1e-5, ln_x_eps=64e-5)
    words = {"att": "attention", "ffn": "feed_forward", "ln0": "pre_ln", "emb": "embeddings"}
    named = {
        ".".join(words.get(word, word) for word in name.split(".")): t for name, t in own.wrapped.state_dict().items()
    }
    save_file(
        {name if name == "head.weight" else f"rwkv.{name}": t for name, t in named.items()},
        tmp_path / "model.safetensors",
    )
    config = {
        "model_type": "rwkv6", "hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16, "head_size": 4,
        "head_size_divisor": 8, "intermediate_size": None, "layer_norm_epsilon": 1e-5, "vocab_size": 40, "rescale_every": 6,
        "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert relative(gl.from_pretrained(str(tmp_path), device="cpu")(TOKENS), own(TOKENS)) < 1e-13


def test_what_does_not_fit_is_named(tmp_path):
    weights = tiny("rwkv6").wrapped.state_dict()
    torch.save({k: v for k, v in weights.items() if k != "blocks.1.att.time_decay_w2"}, tmp_path / "less.pth")
    with pytest.raises(gl.CheckpointError, match=r"missing 1 weights: blocks.1.att.time_decay_w2"):
        gl.from_pretrained(tmp_path / "less.pth", device="cpu")
    early = {name.replace("time_faaaa", "time_first"): t for name, t in tiny("rwkv5").wrapped.state_dict().items()}
    torch.save(early, tmp_path / "early.pth")
    with pytest.raises(
        gl.CheckpointError, match=r"This is RWKV-5 \(it has .*\), and no RWKV-4. .* reads RWKV-5.2, RWKV-6"
    ):
        gl.from_pretrained(tmp_path / "early.pth", device="cpu")
    (tmp_path / "config.json").write_text('{"model_type": "rwkv5", "hidden_size": 16, "vocab_size": 40}')
    torch.save({"rwkv.blocks.0.attention.time_faaaa": torch.zeros(4, 4)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(gl.CheckpointError, match="This is rwkv5 in another layout than RWKV-LM's"):
        gl.from_pretrained(str(tmp_path), device="cpu")
    for wrong, message in (
        ({"head_size": 5}, "16 channels cannot be cut into heads of 5"),
        ({"model_type": "rwkv8"}, "model_type is 'rwkv8'; expected is 'rwkv5' or 'rwkv6'"),
        ({"mix_rank": 0}, "mix_rank is 0"),
    ):
        with pytest.raises(gl.CheckpointError, match=message):
            Rwkv6Weights({**HookedRWKV6.small.config, **wrong})
    with pytest.raises(gl.CheckpointError, match="lacks mix_rank"):
        Rwkv6Weights({k: v for k, v in HookedRWKV6.small.config.items() if k != "mix_rank"})


def test_both_versions_have_their_page():
    assert list(ROWS) == list(MIXES) and len(HookedRWKV6.kinds()) == 4

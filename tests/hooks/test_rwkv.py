"""RWKV-4: parity with transformers and the official numbers, every row from its equation, state, padding, edits."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import gatedlens as gl
from gatedlens.errors import CheckpointError, HookError, InputError, PointError
from gatedlens.hooks.rwkv import INSIDE, HookedRWKV
from gatedlens.recurrence import wkv_scan
from gatedlens.recurrence.wkv_scan import NOTHING, Carry, OpenWkv, wkv

torch.set_num_threads(1)
LAZY = tuple(f"hook_{name}" for name in INSIDE)
GOLDEN = Path(__file__).parent.parent / "golden"


def tokens(rows: int, length: int, seed: int = 0, vocab: int = 40) -> torch.Tensor:
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def tiny(dtype: torch.dtype = torch.float64, seed: int = 0, **sizes) -> HookedRWKV:
    return HookedRWKV.tiny(seed, dtype, **sizes)


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to the larger of 1 and the largest value."""
    return float(((a - b).abs().max() / b.abs().max().clamp(min=1)).detach())


def everything(name: str) -> bool:
    return True


# -- transformers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("history", ["fresh", "after eval", "after eval and train", "train", "train after eval"])
@pytest.mark.parametrize("sizes", [{}, {"rescale_every": 2, "num_hidden_layers": 5}, {"rescale_every": 0}])
def test_logits_and_gradients_are_transformers_whatever_it_has_done_to_its_weights(history, sizes):
    model = tiny(torch.float32, **sizes)
    hf, ids = model.wrapped, tokens(2, 9)
    if "after eval" in history:
        hf(ids, use_cache=False)
        assert hf.rwkv.layers_are_rescaled
    if history == "after eval and train":
        hf.train()(ids)
        hf.eval()
    model.train("train" in history and history != "after eval and train")
    reference = copy.deepcopy(hf)
    want = reference(ids, use_cache=False).logits  # rescales its own copy
    stored = {name: p.clone() for name, p in hf.named_parameters()}
    flag = hf.rwkv.layers_are_rescaled
    got = model(ids)
    assert far(got, want) < 1e-5
    got.square().sum().backward()
    for name, p in hf.named_parameters():
        assert torch.equal(p, stored[name]), name
    assert hf.rwkv.layers_are_rescaled == flag

    want.square().sum().backward()
    for (name, p), (_, q) in zip(hf.named_parameters(), reference.named_parameters(), strict=True):
        scale = q.detach().norm() / p.detach().norm()  # a power of two, where only the copy's are stored scaled
        assert abs(scale.log2() - scale.log2().round()) < 1e-5, name
        assert (p.grad / scale - q.grad).norm() <= 1e-4 * q.grad.norm() + 1e-6, name


def test_hook_values_are_the_same_whatever_transformers_has_done():
    model, ids = tiny(torch.float32), tokens(2, 7)
    _, fresh = model.run_with_cache(ids, names_filter=everything)
    model.wrapped(ids, use_cache=False)
    _, after = model.run_with_cache(ids, names_filter=everything)
    model.wrapped.rwkv.train()
    model.wrapped.rwkv._rescale_layers()  # as a training forward does
    model.wrapped.rwkv.eval()
    _, again = model.run_with_cache(ids, names_filter=everything)
    assert list(fresh.keys()) == list(model.names)
    for name in fresh:
        assert torch.equal(fresh[name], after[name]) and torch.equal(fresh[name], again[name]), name


def test_hidden_states_of_transformers_are_ours_halved():
    model, ids = tiny(torch.float32, num_hidden_layers=5, rescale_every=2), tokens(2, 7)
    _, cache = model.run_with_cache(ids)
    hidden = model.wrapped(ids, use_cache=False, output_hidden_states=True).hidden_states
    for layer in range(5):
        assert far(cache["resid_post", layer] / 2 ** ((layer + 1) // 2), hidden[layer]) < 1e-5
    assert far(cache["ln_final.hook_out"], hidden[-1]) < 1e-5
    assert far(cache["mixer_out", 0], model.wrapped(ids, use_cache=False, output_attentions=True).attentions[0]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(dtype):
    model, ids = tiny(torch.float32), tokens(2, 12)
    exact = model(ids)
    half = model.to(dtype)
    logits, cache = half.run_with_cache(ids, names_filter=everything)
    assert logits.dtype == torch.float32 and logits.isfinite().all()
    error = (half.wrapped(ids, use_cache=False).logits.float() - exact).abs().mean()
    assert (logits - exact).abs().mean() < 2 * error
    assert far(half(ids), logits) < 0.02
    assert cache["k", 0].dtype == cache["scan", 0].dtype == dtype
    assert cache["num", 0].dtype == torch.float32 and cache["state", 0].dtype == torch.float64
    assert cache["resid_post", 1].dtype == (torch.float32 if dtype == torch.float16 else dtype)


def test_float16_holds_a_stream_beyond_its_range():
    model, ids = tiny(torch.float32, num_hidden_layers=10, seed=3), tokens(1, 6)
    for block in model.wrapped.rwkv.blocks:
        block.feed_forward.value.weight.data *= 3000
    exact, cache = model.run_with_cache(ids)
    assert max(cache["resid_post", layer].abs().max() for layer in range(10)) > 65504
    model.wrapped(ids, use_cache=False)  # scaled in place: the stored weights are small
    assert (model.to(torch.float16)(ids) - exact).abs().mean() < 0.02 * exact.abs().mean()


def test_one_layer_wider_attention_and_tied_head():
    ids = tokens(2, 8)
    model = tiny(torch.float32, num_hidden_layers=1, attention_hidden_size=24)
    assert far(model(ids), model.wrapped(ids, use_cache=False).logits) < 1e-5
    assert model.cfg.sizes["channel"] == 24
    tied = tiny(torch.float32, tie_word_embeddings=True)
    assert tied.cfg.tie_word_embeddings and far(tied(ids), tied.wrapped(ids, use_cache=False).logits) < 1e-5


def test_wrap_and_a_folder_of_transformers(tmp_path):
    model, ids = tiny(torch.float32), tokens(1, 5)
    assert isinstance(gl.wrap(model.wrapped), HookedRWKV)
    with pytest.raises(CheckpointError, match="ForCausalLM"):
        gl.wrap(model.wrapped.rwkv)
    model.wrapped.save_pretrained(tmp_path)
    assert torch.equal(gl.from_pretrained(tmp_path)(ids), model(ids))


# -- the official implementation ------------------------------------------------------------------------------------


def test_golden_logits_with_and_without_rescaling_and_states():
    io = load_file(GOLDEN / "rwkv4_lm" / "io.safetensors")
    model, ids = gl.from_pretrained(GOLDEN / "rwkv4_lm"), io["input_ids"][None]
    assert (model.cfg.n_layers, model.cfg.rescale_every) == (7, 6)
    with torch.no_grad():
        assert (model(ids)[0] - io["logits"]).abs().max() < 1e-5
        assert (model.train()(ids)[0] - io["logits_pip_rwkv"]).abs().max() < 1e-5
        model.eval().wrapped.config.rescale_every = 0
        assert (model(ids)[0] - io["logits_pip_rwkv"]).abs().max() < 1e-5
        model.wrapped.config.rescale_every = 6
        state = None
        for t in range(ids.shape[1]):
            logits, state = model(ids[:, t : t + 1], state=state, return_state=True)
            assert (logits[0, 0] - io["logits"][t]).abs().max() < 1e-5
            for layer in range(7):
                for j, name in enumerate(("mlp_shift", "shift", "num", "den", "max")):
                    theirs = io["states"][t, 5 * layer + j]
                    assert far(state[name, layer].flatten(), theirs) < 1e-5, (t, layer, name)
        _, cache = model.run_with_cache(ids, names_filter=everything)
    for layer in range(7):
        for j, name in ((2, "aa"), (3, "bb"), (4, "pp")):
            assert far(cache[f"blocks.{layer}.mixer.hook_{name}"][0], io["states"][:, 5 * layer + j]) < 1e-5


def official(model: HookedRWKV) -> dict[str, torch.Tensor]:
    """A model's tensors by RWKV-LM's names, written independently of the loader."""
    rules = [
        (r"^rwkv\.", ""), ("embeddings", "emb"), ("pre_ln", "ln0"), ("attention", "att"), ("feed_forward", "ffn"),
        ("time_mix_key", "time_mix_k"), ("time_mix_value", "time_mix_v"), ("time_mix_receptance", "time_mix_r"),
    ]  # fmt: skip
    renamed = {}
    for name, tensor in model.wrapped.state_dict().items():
        for ours, theirs in rules:
            name = re.sub(ours, theirs, name)
        renamed[name] = tensor.clone()
    return renamed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_official_file_or_a_folder_that_holds_one(tmp_path, dtype):
    model, ids = tiny(dtype, rescale_every=6), tokens(2, 6)
    file = tmp_path / "RWKV-4-tiny.pth"
    torch.save(official(model), file)
    for source in (file, str(file), tmp_path):
        loaded = gl.from_pretrained(source)
        assert loaded.cfg.dtype == dtype and loaded.cfg.rescale_every == 6 and not loaded.training
        assert torch.equal(loaded(ids), model(ids))
    assert gl.from_pretrained(file, dtype="float64").cfg.dtype == torch.float64
    torch.save(official(model), tmp_path / "another.pth")
    with pytest.raises(CheckpointError, match="name one"):
        gl.from_pretrained(tmp_path)


def test_an_official_folder_with_its_arguments(tmp_path):
    model, ids = tiny(torch.float32, rescale_every=2, attention_hidden_size=24), tokens(2, 6)
    save_file(official(model), tmp_path / "model.safetensors")
    arguments = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "dim_att": 24, "dim_ffn": 24, "rescale_layer": 2}
    (tmp_path / "config.json").write_text(json.dumps(arguments))
    assert torch.equal(gl.from_pretrained(tmp_path)(ids), model(ids))
    (tmp_path / "config.json").write_text(json.dumps({**arguments, "version": 7}))
    with pytest.raises(CheckpointError, match="RWKV-4"):
        gl.from_pretrained(tmp_path)


def test_broken_files_are_refused(tmp_path):
    file, whole = tmp_path / "model.pth", official(tiny(torch.float32))
    for damage, message in (
        ({"blocks.1.att.time_first": None}, "missing.*time_first"),
        ({"blocks.1.extra": torch.zeros(1)}, "unknown.*extra"),
        ({"blocks.1.att.key.weight": torch.zeros(3, 3)}, "misshapen"),
        ({"blocks.0.att.time_mix_k": None}, "missing.*time_mix_key"),
    ):
        torch.save({k: v for k, v in {**whole, **damage}.items() if v is not None}, file)
        with pytest.raises(CheckpointError, match=message):
            gl.from_pretrained(file)
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"damaged|refused"):
        gl.from_pretrained(file)
    with pytest.raises(CheckpointError, match="There is no file"):
        gl.from_pretrained("RWKV-4-Pile-169M.pth")


# -- every row, literally -------------------------------------------------------------------------------------------


def shift(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x[:, t - 1] if t else torch.zeros_like(x[:, 0]) for t in range(x.shape[1])], dim=1)


def norm_rows(check, part: str, x: torch.Tensor, w, eps: float) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = check(f"{part}.hook_scale", (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt())
    normalized = check(f"{part}.hook_normalized", centred / scale)
    return check(f"{part}.hook_out", w.weight * normalized + w.bias)


@pytest.mark.parametrize("training", [False, True])
def test_every_row_is_its_equation(training):
    model, ids = tiny(num_hidden_layers=3).train(training), tokens(2, 6)
    backbone = model.wrapped.rwkv
    _, cache = model.run_with_cache(ids, names_filter=everything)
    seen = []

    def check(name: str, value: torch.Tensor) -> torch.Tensor:
        assert far(cache[name], value) < 1e-12, name
        assert cache[name].shape == value.shape, name
        seen.append(name)
        return value

    h = check("hook_embed", backbone.embeddings.weight[ids])
    for layer, w in enumerate(backbone.blocks):
        b, eps = f"blocks.{layer}", 1e-5 if training else 1e-5 * 4**layer
        if layer == 0:
            h = norm_rows(check, f"{b}.ln0", h, w.pre_ln, eps)
        check(f"{b}.hook_resid_pre", h)
        check(f"{b}.hook_mixer_in", h)
        n = norm_rows(check, f"{b}.ln1", h, w.ln1, eps)
        a, m = w.attention, f"{b}.mixer.hook_"
        s = check(m + "shift", shift(n))
        xk = check(m + "xk", n * a.time_mix_key + s * (1 - a.time_mix_key))
        xv = check(m + "xv", n * a.time_mix_value + s * (1 - a.time_mix_value))
        xr = check(m + "xr", n * a.time_mix_receptance + s * (1 - a.time_mix_receptance))
        k = check(m + "k", xk @ a.key.weight.T)
        v = check(m + "x", xv @ a.value.weight.T)
        r = check(m + "gate_pre", xr @ a.receptance.weight.T)
        check(m + "u", v)
        reset = check(m + "reset", torch.zeros(2, 6, 1, dtype=torch.float64))
        state = check(m + "state_start", torch.zeros(2, 16, 2, dtype=torch.float64))
        rate = torch.exp(-torch.exp(a.time_decay)).reshape(1, 1, 16, 1).repeat(2, 6, 1, 2)
        decay = check(m + "decay", rate * (1 - reset).unsqueeze(-1))
        write = check(m + "write", torch.stack([k.exp() * v, k.exp()], dim=-1))
        states, scans, tops, top = [], [], [], torch.full((2, 16), -700.0, dtype=torch.float64)
        for t in range(6):
            bonus = torch.exp(a.time_first + k[:, t])
            scans.append((state[..., 0] + bonus * v[:, t]) / (state[..., 1] + bonus))
            state = decay[:, t] * state + write[:, t]
            top = torch.maximum(top - torch.exp(a.time_decay), k[:, t])
            states.append(state)
            tops.append(top)
        states, tops = check(m + "state", torch.stack(states, dim=1)), torch.stack(tops, dim=1)
        check(m + "num", states[..., 0] * torch.exp(-tops))
        check(m + "den", states[..., 1] * torch.exp(-tops))
        check(m + "max", tops)
        scan = check(m + "scan", torch.stack(scans, dim=1))
        y = check(m + "y", scan)
        gate = check(m + "gate", torch.sigmoid(r))
        gated = check(m + "gated", y * gate)
        h = h + check(f"{b}.hook_mixer_out", gated @ a.output.weight.T)
        check(f"{b}.hook_resid_mid", h)
        check(f"{b}.hook_mlp_in", h)
        n, f, m = norm_rows(check, f"{b}.ln2", h, w.ln2, eps), w.feed_forward, f"{b}.mlp.hook_"
        s = check(m + "shift", shift(n))
        xk = check(m + "xk", n * f.time_mix_key + s * (1 - f.time_mix_key))
        xr = check(m + "xr", n * f.time_mix_receptance + s * (1 - f.time_mix_receptance))
        k = check(m + "k", xk @ f.key.weight.T)
        k_act = check(m + "k_act", k.clamp(min=0) ** 2)
        v = check(m + "kv", k_act @ f.value.weight.T)
        r = check(m + "gate_pre", xr @ f.receptance.weight.T)
        gate = check(m + "gate", torch.sigmoid(r))
        h = h + check(f"{b}.hook_mlp_out", v * gate)
        check(f"{b}.hook_resid_post", h)
    out = norm_rows(check, "ln_final", h, backbone.ln_out, 1e-5 if training else 1e-5 * 4**3)
    check("hook_logits", out @ model.wrapped.head.weight.T)
    assert seen == list(model.names) == list(cache.keys())  # all of them, in firing order


def test_scan_is_a_softmax_over_the_past():
    """The implicit attention's S (DESIGN, section 5): a row softmax of w (i - j - 1) + k_j, and u + k_i at j = i."""
    model, ids = tiny(), tokens(2, 9)
    _, cache = model.run_with_cache(ids)
    a, k, v = model.wrapped.rwkv.blocks[1].attention, cache["k", 1], cache["v", 1]
    i = torch.arange(9)
    ages = (i[:, None] - i[None] - 1).to(torch.float64)
    scores = -torch.exp(a.time_decay)[:, None, None] * ages + k.transpose(1, 2).unsqueeze(2)
    scores = torch.where(torch.eye(9, dtype=torch.bool), (a.time_first + k).transpose(1, 2).unsqueeze(2), scores)
    S = scores.masked_fill(i[None] > i[:, None], -torch.inf).softmax(-1)
    assert far(torch.einsum("bcij,bjc->bic", S, v), cache["scan", 1]) < 1e-12
    scan = gl.implicit_attention(cache, layer=1).only("scan")
    assert far(scan.dense(), S) < 1e-12 and far(scan.dense().sum(-1), torch.ones(2, 16, 9)) < 1e-12
    assert far(scan.mean(), S.mean(1)) < 1e-12


@torch.no_grad()
def test_implicit_attention_of_loud_keys():
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        model = loud(200, dtype)
        _, state = model(tokens(2, 5, seed=1), return_state=True)
        for before in (None, state):
            _, cache = model.run_with_cache(tokens(2, 24), state=before)
            A = gl.implicit_attention(cache, layer=0)
            assert A.check().relative < bound
            assert A.dense().isfinite().all() and far(A.mean(), A.dense().mean(1)) < bound


# -- state, padding, generation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("heard", [False, True])
def test_prefix_and_suffix_are_the_whole_at_every_split(heard):
    model, ids = tiny(), tokens(3, 8)
    whole, state = model(ids, return_state=True)
    assert sorted({name.split(".")[-1] for name in state}) == ["den", "max", "mlp_shift", "num", "shift"]
    _, cached = model.run_with_cache(ids, names_filter=everything)
    for split in range(1, 8):
        first, before = model(ids[:, :split], return_state=True)
        if heard:
            (rest, after), cache = model.run_with_cache(
                ids[:, split:], names_filter=everything, state=before, return_state=True
            )
            for name in ("decay", "write", "state", "num", "den", "max", "scan", "shift"):
                assert far(cache[name, 1], cached[name, 1][:, split:]) < 1e-10, (split, name)
            assert far(cache["state_start", 1], cached["state", 1][:, split - 1]) < 1e-10
        else:
            rest, after = model(ids[:, split:], state=before, return_state=True)
        assert far(torch.cat([first, rest], dim=1), whole) < 1e-10
        assert after.seen.tolist() == [8, 8, 8]
        for name in state:
            assert far(after[name], state[name]) < 1e-10, (split, name)


def test_batched_decoding_token_by_token_is_the_whole():
    """transformers' own is wrong for more than one row: its shifted [b, d] broadcasts to [b, b, d]."""
    model, ids = tiny(), tokens(4, 7)
    state, steps = None, []
    for t in range(7):
        logits, state = model(ids[:, t : t + 1], state=state, return_state=True)
        steps.append(logits)
    assert far(torch.cat(steps, dim=1), model(ids)) < 1e-10


def test_state_carries_gradients_and_can_be_saved(tmp_path):
    model, ids = tiny(), tokens(2, 8)
    emb = model.W_E
    whole = torch.autograd.grad(model(ids)[:, 5:].square().sum(), emb)[0]
    _, state = model(ids[:, :5], return_state=True)
    through = torch.autograd.grad(model(ids[:, 5:], state=state).square().sum(), emb)[0]
    assert far(through, whole) < 1e-10
    state.save(tmp_path / "state.safetensors")
    loaded = type(state).load(tmp_path / "state.safetensors")
    assert torch.equal(model(ids[:, 5:], state=loaded), model(ids[:, 5:], state=state))
    with pytest.raises(InputError, match="rows"):
        model(ids[:1, 5:], state=state)


MASKS = {
    "left": [[0, 0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1], [1] * 8],
    "right": [[1, 1, 1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0], [1] * 8],
    "holes": [[1, 0, 1, 1, 0, 0, 1, 1], [0, 1, 0, 1, 1, 1, 1, 0], [1, 1, 1, 0, 1, 1, 1, 1]],
    "one row": [[0, 0, 1, 1, 1, 0, 1, 0]],
}


@pytest.mark.parametrize("heard", [False, True])
@pytest.mark.parametrize("side", MASKS)
def test_padded_rows_are_their_rows_alone(side, heard):
    model = tiny()
    mask = torch.tensor(MASKS[side])
    ids, prefix = tokens(len(mask), 8), tokens(len(mask), 3, seed=1)
    _, before = model(prefix, return_state=True)
    for state in (None, before.detach()):
        names = everything if heard else "hook_logits"
        (logits, after), cache = model.run_with_cache(
            ids, names_filter=names, attention_mask=mask, state=state, return_state=True
        )
        assert logits.isfinite().all()
        loss = model(ids, attention_mask=mask, state=state).masked_fill(~mask.bool().unsqueeze(-1), 0).square().sum()
        grad = torch.autograd.grad(loss, list(model.parameters()))
        alone_grad = [torch.zeros_like(g) for g in grad]
        for row, real in enumerate(mask.bool()):
            own = None if state is None else state.rows([row])
            alone, own_after = model(ids[row : row + 1, real], state=own, return_state=True)
            assert far(logits[row, real], alone[0]) < 1e-10
            assert after.seen[row] == own_after.seen[0]
            for name in after:
                assert far(after[name][row], own_after[name][0]) < 1e-10, name
            if heard:
                _, own_cache = model.run_with_cache(ids[row : row + 1, real], names_filter=everything, state=own)
                for name in set(model.names) - {n for n in model.names if n.endswith("state_start")}:
                    assert far(cache[name][row, real], own_cache[name][0]) < 1e-10, name
            own_grad = torch.autograd.grad(alone.square().sum(), list(model.parameters()))
            alone_grad = [total + g for total, g in zip(alone_grad, own_grad, strict=True)]
        for g, want in zip(grad, alone_grad, strict=True):
            assert far(g, want) < 1e-9


def test_generate_is_greedy_decoding_from_scratch():
    model, ids = tiny(), tokens(3, 5)
    visits = []
    with model.hooks([("blocks.0.mixer.hook_gate", lambda gate, hook: visits.append(gate.shape[1]))]):
        out = model.generate(ids, max_new_tokens=6, do_sample=False, verbose=False)
    assert visits == [5, 1, 1, 1, 1, 1]
    want = ids
    for _ in range(6):
        want = torch.cat([want, model(want)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, want)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    padded = model.generate(ids, max_new_tokens=4, do_sample=False, verbose=False, attention_mask=mask)
    alone = model.generate(ids[:1, 2:], max_new_tokens=4, do_sample=False, verbose=False)
    assert torch.equal(padded[0, 5:], alone[0, 3:])


# -- edits ----------------------------------------------------------------------------------------------------------


def all_points() -> list[str]:
    return list(tiny().names)


@pytest.mark.parametrize("point", all_points())
def test_an_edit_takes_effect_in_value_and_gradient(point):
    model, ids = tiny(), tokens(2, 6)
    _, state = model(tokens(2, 3, seed=1), return_state=True)
    weight = torch.randn(2, 6, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    _, cache = model.run_with_cache(ids, names_filter=point, state=state)
    by = torch.randn(cache[point].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    by = 0.1 * by * cache[point] if cache[point].any() else 0.1 * by.abs()  # nothing is reset where no document begins

    def out(theta: torch.Tensor | float, in_place: bool = False) -> torch.Tensor:
        def hook(x, hook):
            if not in_place:
                return x + theta * by
            x += theta * by
            return None

        return (model.run_with_hooks(ids, fwd_hooks=[(point, hook)], state=state) * weight).sum()

    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(out(theta), theta)
    step = 1e-5
    numerical = (out(step) - out(-step)) / (2 * step)
    assert abs(slope - numerical) < 1e-6 * max(1, abs(numerical)), (slope, numerical)
    assert abs(slope) > 1e-6
    assert torch.equal(out(1.0), out(1.0, in_place=True)) and out(1.0) != out(0.0)


def test_observed_or_not_values_and_gradients_agree():
    model, ids = tiny(), tokens(2, 9)
    parameters = list(model.parameters())
    logits = model(ids)
    plain = torch.autograd.grad(logits.square().sum(), parameters)
    for names in ([f"blocks.*.mixer.{leaf}"] for leaf in LAZY):
        seen = model.run_with_hooks(ids, fwd_hooks=[(name, lambda x, hook: None) for name in names])
        assert far(seen, logits) < 1e-12
        for a, b in zip(torch.autograd.grad(seen.square().sum(), parameters), plain, strict=True):
            assert far(a, b) < 1e-10


def test_an_edit_of_the_state_changes_the_next_readout_only_and_not_what_is_carried():
    model, ids = tiny(), tokens(2, 8)
    _, state = model(ids, return_state=True)
    _, clean = model.run_with_cache(ids)
    for leaf in ("hook_state", "hook_num", "hook_den", "hook_max"):

        def edit(x, hook):
            x[:, 3] *= 1.5
            x[:, 3] += 0.2

        with model.hooks([(f"blocks.1.mixer.{leaf}", edit)]):
            (_, after), cache = model.run_with_cache(ids, return_state=True)
        changed = (cache["scan", 1] - clean["scan", 1]).abs().amax((0, 2)) > 1e-9
        assert changed.tolist() == [False] * 4 + [True] + [False] * 3, leaf
        assert all(far(after[name], state[name]) < 1e-12 for name in state if name.startswith("blocks.1"))


@pytest.mark.parametrize("at", [0, 3, 7])
def test_decay_zero_and_write_the_new_state_is_a_propagating_patch(at):
    """DESIGN, section 4: the state of another run, put in at one position, as if that run's past had been ours."""
    model, ours, theirs = tiny(), tokens(2, 8), tokens(2, 8, seed=5)
    names = ["blocks.1.mixer.hook_k", "blocks.1.mixer.hook_v", "blocks.1.mixer.hook_state"]
    _, source = model.run_with_cache(theirs, names_filter=names)
    _, clean = model.run_with_cache(ours, names_filter=names)

    def cut(decay, hook):
        decay[:, at] = 0

    def put(write, hook):
        write[:, at] = source["state", 1][:, at]

    hooks = [("blocks.1.mixer.hook_decay", cut), ("blocks.1.mixer.hook_write", put)]
    with model.hooks(hooks):
        (_, after), cache = model.run_with_cache(ours, names_filter=everything, return_state=True)
    a, state = model.wrapped.rwkv.blocks[1].attention, source["state", 1][:, at]
    assert far(cache["state", 1][:, at], state) < 1e-12
    for t in range(at + 1, 8):
        k, v = clean["k", 1][:, t], clean["v", 1][:, t]
        bonus = torch.exp(a.time_first + k)
        assert far(cache["scan", 1][:, t], (state[..., 0] + bonus * v) / (state[..., 1] + bonus)) < 1e-12
        state = torch.exp(-torch.exp(a.time_decay)).unsqueeze(-1) * state + torch.stack([k.exp() * v, k.exp()], dim=-1)
    scale = after["max", 1].exp()
    assert far(after["num", 1] * scale, state[..., 0]) < 1e-12 and far(after["den", 1] * scale, state[..., 1]) < 1e-12


@pytest.mark.parametrize("leaf", [*LAZY, "hook_k", "hook_x"])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.5])
def test_ablations_stay_finite_forward_and_backward(leaf, value):
    """Constants at any point inside the scan, a decay of 0, 1 or less than 0 among them."""
    model, ids = tiny(), tokens(2, 6)
    logits = model.run_with_hooks(ids, fwd_hooks=[(f"blocks.*.mixer.{leaf}", lambda x, hook: x * 0 + value)])
    assert logits.isfinite().all()
    for grad in torch.autograd.grad(logits.square().sum(), list(model.parameters()), allow_unused=True):
        assert grad is None or grad.isfinite().all()


def test_a_hook_that_returns_something_else_is_told_so():
    model, ids = tiny(torch.float32), tokens(1, 4)
    for bad, message in ((lambda x, hook: x[:, :2], "shape"), (lambda x, hook: x.float(), "float64")):
        with pytest.raises(HookError, match=message):
            model.run_with_hooks(ids, fwd_hooks=[("blocks.0.mixer.hook_write", bad)])
    with pytest.raises(PointError, match="not a hook point"):
        model.run_with_hooks(ids, fwd_hooks=[("blocks.0.mixer.hook_conv", lambda x, hook: x)])


def test_backward_hooks_and_gradients_of_lazy_points():
    model, ids = tiny(), tokens(2, 6)
    out, cache = model.run_with_cache(ids, names_filter=everything, incl_bwd=True, return_type="loss")
    assert out.ndim == 0
    for name in model.names:
        assert cache[f"{name}_grad"].shape == cache[name].shape
    assert cache["blocks.0.mixer.hook_write_grad"].abs().sum() > 0


# -- what is lazy, numbers, names -----------------------------------------------------------------------------------


def test_lazy_points_cost_nothing_unheard(monkeypatch):
    model, ids = tiny(), tokens(2, 6)

    def refuse(*args):
        raise AssertionError("the recurrence was laid open and nobody listens")

    monkeypatch.setattr("gatedlens.hooks.rwkv.OpenWkv", refuse)
    _, cache = model.run_with_cache(ids)
    model(ids).sum().backward()
    lazy = [name for name, point in model.names.points.items() if point.lazy]
    assert [n.rpartition(".")[2] for n in lazy if n.startswith("blocks.0")] == list(LAZY)
    assert not set(lazy) & set(cache.keys())
    assert all(model.hook_dict[name].visits == 0 for name in lazy)
    with pytest.raises(AssertionError, match="laid open"):
        model.run_with_cache(ids, names_filter="blocks.1.mixer.hook_decay")


def loud(scale: float, dtype: torch.dtype) -> HookedRWKV:
    """A model whose keys reach about +-`scale`."""
    model = tiny(torch.float64)
    _, cache = model.run_with_cache(tokens(2, 24), names_filter="blocks.*.mixer.hook_k")
    for layer, block in enumerate(model.wrapped.rwkv.blocks):
        block.attention.key.weight.data *= scale / cache["k", layer].abs().max()
    return model.to(dtype)


@pytest.mark.parametrize("decay", [None, -20.0, 3.0])
def test_keys_of_200_are_stable(decay):
    ids = tokens(2, 24)
    exact, model = loud(200, torch.float64), loud(200, torch.float32)
    for m in (exact, model):
        for block in m.wrapped.rwkv.blocks:
            if decay is not None:
                block.attention.time_decay.data.fill_(decay)
    _, cache = model.run_with_cache(ids, names_filter=everything)
    assert cache["k", 0].abs().max() > 150 and all(cache[name].isfinite().all() for name in cache)
    k, v, a = cache["k", 0].double(), cache["v", 0].double(), model.wrapped.rwkv.blocks[0].attention
    w, u = -torch.exp(a.time_decay.double()), a.time_first.double()
    i = torch.arange(24)
    scores = w[:, None, None] * (i[:, None] - i[None] - 1) + k.transpose(1, 2).unsqueeze(2)
    scores = torch.where(torch.eye(24, dtype=torch.bool), (u + k).transpose(1, 2).unsqueeze(2), scores)
    S = scores.masked_fill(i[None] > i[:, None], -torch.inf).softmax(-1)
    want = torch.einsum("bcij,bjc->bic", S, v)
    _, unheard = model.run_with_cache(ids)
    assert far(cache["scan", 0].double(), want) < 1e-6  # float64 inside
    assert far(unheard["scan", 0].double(), want) < 1e-4  # float32: u + k rounds at 1e-5
    for names in ("hook_logits", everything):
        logits, _ = exact.run_with_cache(ids, names_filter=names)
        assert far(logits, exact.wrapped(ids, use_cache=False).logits.double()) < 1e-4
    for m in (model, exact):
        for hooks in ([], [("blocks.*.mixer.hook_state", lambda x, hook: None)]):
            loss = m.run_with_hooks(ids, fwd_hooks=hooks).square().sum()
            assert all(g.isfinite().all() for g in torch.autograd.grad(loss, list(m.parameters())))


def test_keys_beyond_float64_run_unheard_and_are_refused_inside():
    model, ids = loud(5000, torch.float32), tokens(2, 24)
    assert model(ids).isfinite().all()
    with pytest.raises(InputError, match="exp"):
        model.run_with_cache(ids, names_filter="blocks.0.mixer.hook_write")


def test_names_of_other_tools():
    model, ids = tiny(), tokens(1, 5)
    _, cache = model.run_with_cache(ids, names_filter=everything)
    for layer in range(2):
        for alias in HookedRWKV.aliases:
            if layer and "pre_ln" in alias.name:
                continue
            name, target = alias.name.format(l=layer), alias.target.format(l=layer)
            assert torch.equal(cache[name], cache[target]), name
    assert torch.equal(cache["v", 1], cache["x", 1]) and torch.equal(cache["r", 1], cache["gate_pre", 1])
    assert torch.equal(cache["v", 1], cache["blocks.1.mixer.hook_x"])
    assert torch.equal(cache["r", 1, "mlp"], cache["blocks.1.mlp.hook_gate_pre"])
    edited = model.run_with_hooks(ids, fwd_hooks=[("blocks.1.mixer.hook_r", lambda r, hook: r * 0)])
    same = model.run_with_hooks(ids, fwd_hooks=[("blocks.1.mixer.hook_gate_pre", lambda r, hook: r * 0)])
    assert torch.equal(edited, same)
    assert "hook_decay" in str(model.hook_table())


def test_shapes_are_the_declared_ones():
    model, ids = tiny(num_hidden_layers=3, attention_hidden_size=24), tokens(2, 5)
    _, cache = model.run_with_cache(ids, names_filter=everything)
    for name, point in model.names.points.items():
        want = [{"batch": 2, "pos": 5}.get(dim, dim) for dim in point.shape(model.cfg.sizes)]
        assert list(cache[name].shape) == want, name


def test_the_stream_is_the_sum_of_what_is_written_into_it():
    model, ids = tiny(num_hidden_layers=4), tokens(2, 5)
    logits, cache = model.run_with_cache(ids)
    for layer in range(5):
        parts = cache.decompose_resid(layer)
        want = cache["resid_pre", layer] if layer < 4 else cache["resid_post", 3]
        assert far(parts.sum(0), want) < 1e-12
    w = model.wrapped.rwkv.ln_out
    stream = cache["resid_post", 3]
    normed = (stream - stream.mean(-1, keepdim=True)) / cache["ln_final.hook_scale"] * w.weight + w.bias
    assert far(normed @ model.W_U, logits) < 1e-12
    assert far(model(cache["resid_pre", 0], start_at_layer=0), logits) < 1e-12
    assert far(model(cache["resid_pre", 2], start_at_layer=2), logits) < 1e-12
    assert torch.equal(model(ids, stop_at_layer=0), cache["resid_pre", 0])
    assert model.accumulated_bias(2).abs().sum() == 0


def test_parameters_are_read_at_call_time():
    model, other, ids = tiny(), tiny(seed=7), tokens(2, 5)
    model.wrapped.load_state_dict(other.wrapped.state_dict(), assign=True)
    assert torch.equal(model(ids), other(ids))


def test_nnsight_reads_and_edits_inside_the_scan():
    nnsight = pytest.importorskip("nnsight")
    model, ids = tiny(), tokens(2, 5)
    _, cache = model.run_with_cache(ids, names_filter=everything)
    traced = nnsight.NNsight(model)
    with torch.no_grad(), traced.trace(ids):
        decay = traced.blocks[0].mixer.hook_decay.output.save()
        state = traced.blocks[1].mixer.hook_state.output.save()
        gate = traced.blocks[1].mixer.hook_gate.output.save()
    assert torch.equal(decay, cache["decay", 0]) and far(state, cache["state", 1]) < 1e-12
    assert far(gate, cache["gate", 1]) < 1e-12


# -- the recurrence itself ------------------------------------------------------------------------------------------


@pytest.fixture
def short_segments(monkeypatch):
    monkeypatch.setattr(wkv_scan, "SEGMENT_ELEMENTS", 12)
    monkeypatch.setattr(wkv_scan, "SEGMENT_ELEMENTS_GRAD", 12)


@pytest.mark.parametrize("masked", [False, True])
def test_wkv_gradients_numerically_to_second_order(short_segments, masked):
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :3] = mask[1, 7:] = mask[1, 2] = False
    mask = mask if masked else None
    carry = (draw(2, 3), draw(2, 3).abs() + 1, draw(2, 3))
    given = [t.requires_grad_() for t in (3 * draw(2, 9, 3), draw(2, 9, 3), -draw(3).abs(), draw(3), *carry)]

    def run(k, v, w, u, *carry):
        scan, after = wkv(k, v, w, u, mask, Carry(*carry))
        further, _ = wkv(k.flip(1), v, w, u, None, after)  # the carry, by what it does
        return scan, further

    assert torch.autograd.gradcheck(run, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *args: run(*args)[1], given, fast_mode=True)
    with torch.no_grad():
        lean = wkv(*given[:4], mask, Carry(*given[4:]))
        laid_open = OpenWkv(*given[:4], mask, Carry(*given[4:]))
        assert far(lean[0], wkv(*given[:4], mask, Carry(*given[4:]))[0]) == 0
        real = mask if masked else torch.ones(2, 9, dtype=torch.bool)
        assert far(lean[0][real], laid_open.scan[real]) < 1e-12
        assert all(far(a, b) < 1e-12 for a, b in zip(lean[1], laid_open.last, strict=True))


def test_wkv_is_the_step_by_step_recurrence_in_segments(short_segments):
    g = torch.Generator().manual_seed(1)
    k, v = 40 * torch.randn(2, 31, 3, generator=g), torch.randn(2, 31, 3, generator=g)
    w, u = -torch.rand(3, generator=g), torch.randn(3, generator=g)
    p, num, den = torch.full((2, 3), NOTHING), torch.zeros(2, 3), torch.zeros(2, 3)
    scan, carry = wkv(k, v, w, u, None, Carry(num, den, p))
    for t in range(31):
        q = torch.maximum(p, u + k[:, t])
        past, now = torch.exp(p - q), torch.exp(u + k[:, t] - q)
        assert far(scan[:, t], (past * num + now * v[:, t]) / (past * den + now)) < 1e-6
        q = torch.maximum(p + w, k[:, t])
        num = torch.exp(p + w - q) * num + torch.exp(k[:, t] - q) * v[:, t]
        den = torch.exp(p + w - q) * den + torch.exp(k[:, t] - q)
        p = q
    assert all(far(a, b) < 1e-6 for a, b in zip(carry, (num, den, p), strict=True))


def test_second_derivatives_of_the_model():
    model, ids = tiny(), tokens(1, 5)
    emb = model.W_E
    (grad,) = torch.autograd.grad(F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[0, 1:]), emb, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), emb)
    assert second.isfinite().all() and second.abs().max() > 0

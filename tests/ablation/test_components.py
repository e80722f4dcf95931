"""Component ablations: against models whose parameters lack the component, and against the rows' equations."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

import gatedlens as gl
from gatedlens import ablation
from gatedlens.model.norm import eps_of
from tests.ablation.test_ablation import fired, same
from tests.helpers import by_channel, earlier, example


def logits(model, intervention, x):
    with torch.no_grad(), intervention.on(model):
        return model(x)


def operated(model, part, change):
    """A copy whose parameters with `part` in their name (the last words) are changed."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in other.wrapped.named_parameters():
            if any(word in part for word in (".".join(name.split(".")[-2:]), name.split(".")[-1])):
                change(p)
    return other


CONV = [f"{conv}.weight" for conv in ("conv1d", "conv_1d", "conv1d_b", "q_conv1d", "k_conv1d", "v_conv1d")]
BIAS = [name.replace("weight", "bias") for name in CONV]


def tap(k):
    def keep(p):
        kept = p[..., k].clone()
        p.zero_()
        p[..., k] = kept

    return keep


def identity(p):
    p.zero_()
    p[..., -1] = 1


@pytest.mark.parametrize(
    ("make", "word", "surgery"),
    [
        (ablation.identity_conv, "conv", [(CONV, identity), (BIAS, torch.Tensor.zero_)]),
        (ablation.no_conv_bias, "conv", [(BIAS, torch.Tensor.zero_)]),
        (lambda layers="*": ablation.only_tap(1, layers), "conv", [(CONV, tap(1))]),
        (ablation.no_skip, "skip", [(["D", "D_b", "r_k", "time_faaaa"], torch.Tensor.zero_)]),
    ],
    ids=["identity conv", "no conv bias", "one tap", "no skip"],
)
def test_a_component_without_is_a_model_whose_parameters_are_without(model, make, word, surgery):
    x = example(model)
    said = model.recurrence[word]
    if said.startswith("none"):
        with pytest.raises(gl.PointError, match=f"{model.title} has no {word}: its recurrence says {word}: 'none"):
            logits(model, make(), x)
        return
    other = model
    for part, change in surgery:
        other = operated(other, part, change)
    with torch.no_grad():
        want = other(x)
        nothing_there = word == "conv" and surgery[0][0] is BIAS and "no bias" in said
        assert torch.allclose(want, model(x), atol=1e-4) == nothing_there
    assert torch.allclose(logits(model, make(), x), want, rtol=1e-10, atol=1e-11)
    with torch.no_grad():  # one layer alone, named from the end
        first = next(layer for layer in range(model.cfg.n_layers) if model.blocks[layer].mixer.place == "mixer")
        beside = earlier(model, x)
        half = other(model(x, stop_at_layer=first), start_at_layer=first, stop_at_layer=first + 1)
        want = model(half, start_at_layer=first + 1, **beside)
    assert torch.allclose(logits(model, make(first - model.cfg.n_layers), x), want, rtol=1e-10, atol=1e-11)


def first_layer(model, cache):
    """(gate, scan, scan -> what the gate multiplies) of each direction of block 0's mixer, and o -> what its mixer puts out."""
    stems = [name.removesuffix("hook_gate") for name in cache if name.startswith("blocks.0.mixer.")]
    stems = [stem for stem in stems if f"{stem}hook_gate" in cache.cache_dict]
    weight, bias = model.blocks[0].mixer.output_weights()

    def out(o):
        if "blocks.0.mixer.hook_product" in cache.cache_dict:  # the norm behind the gate
            norm, eps = model.blocks[0].mixer.weights.norm, model.blocks[0].mixer.shape.eps
            groups = o.unflatten(-1, (model.cfg.n_groups, -1))
            o = norm.weight * (groups / (groups.pow(2).mean(-1, keepdim=True) + eps).sqrt()).flatten(-2)
        o = o / len(stems) @ weight.T + (0 if bias is None else bias)
        if model.cfg.architecture != "qwen4_exp":
            return o
        return (cache["blocks.0.inject1.hook_gate"].unsqueeze(-1) * o.unsqueeze(-2)).flatten(-2)  # into each copy

    def before_the_gate(y):
        if "blocks.0.mixer.hook_normed" not in cache.cache_dict:
            return y
        named = {
            "fla": "o_norm",
            "kimi_linear": "o_norm",
            "bailing_hybrid": "o_norm",
            "minimax": "norm",
            "olmo_hybrid": "o_norm",
            "qwen3_next": "norm",
            "qwen4_exp": "norm",
        }
        norm = getattr(model.blocks[0].mixer.weights, named[model.cfg.architecture])
        heads = y.unflatten(-1, (-1, len(norm.weight)))  # of all heads together where its weight is as long
        return (norm.weight * heads / (heads.pow(2).mean(-1, keepdim=True) + eps_of(norm, 1e-6)).sqrt()).flatten(-2)

    def multiplied(stem, scan):
        """What the gate multiplies, with another scan."""
        y, own = cache[f"{stem}hook_y"], cache[f"{stem}hook_scan"]
        if model.cfg.architecture == "rwkv6":
            return torch.stack([model.wrapped.blocks[0].att.ln_x(row) for row in (y - own + scan).unbind(1)], 1)
        if model.cfg.architecture != "rwkv7":
            return before_the_gate(y - own + scan)
        norm = model.wrapped.model.layers[0].attn.g_norm  # of the scan alone: the bonus comes behind it
        return y - cache[f"{stem}hook_normed"] + torch.stack([norm(row) for row in scan.unbind(1)], 1)

    gates, scans = ([cache[f"{stem}hook_{leaf}"] for stem in stems] for leaf in ("gate", "scan"))
    return list(zip(gates, scans, (partial(multiplied, stem) for stem in stems), strict=True)), out


@torch.no_grad()
def test_the_gate_and_the_scan_by_their_equations(model, clean):
    parts, out = first_layer(model, clean)
    assert same(fired(model, ablation.open_gate(0)), out(sum(multiplied(scan) for _, scan, multiplied in parts)))
    nothing = [gate * multiplied(torch.zeros_like(scan)) for gate, scan, multiplied in parts]
    assert same(fired(model, ablation.no_scan(0)), out(sum(nothing)))
    channels = [1, 4]
    expected = []
    for gate, scan, multiplied in parts:
        scan = scan.clone()
        scan[..., channels] = 0
        expected.append(gate * multiplied(scan))
    assert same(fired(model, ablation.no_scan(0, channel=channels)), out(sum(expected)))


@torch.no_grad()
def test_layers_are_removed_by_number_and_by_pattern(model):
    x, n = example(model), model.cfg.n_layers
    resid = [model(x, stop_at_layer=layer) for layer in range(n)]
    assert same(logits(model, ablation.remove_layer("*"), x), model(resid[0], start_at_layer=n))
    assert same(logits(model, ablation.remove_layer(-1), x), model(resid[-1], start_at_layer=n))
    beside = earlier(model, x)
    assert same(logits(model, ablation.remove_layer(0), x), model(resid[0], start_at_layer=1, **beside))
    assert same(logits(model, ablation.remove_layer("[01]"), x), model(resid[0], start_at_layer=2))
    middle = model(resid[0], start_at_layer=1, stop_at_layer=n - 1)
    assert same(logits(model, ablation.remove_layer([0, -1]), x), model(middle, start_at_layer=n))


@torch.no_grad()
def test_channels_by_how_fast_they_forget(model, clean):
    x = example(model)
    slow, fast = (find(model, 1 / 3, x, progress=False) for find in (ablation.slowest, ablation.fastest))
    stems = {name.rpartition(".")[0] for name in clean if name.endswith("hook_decay")}
    assert set(slow) == set(fast) == stems
    for stem in stems:
        decay = by_channel(clean[f"{stem}.hook_decay"], model, 2)
        mean = decay.mean((0, 1)) if decay.ndim == 3 else decay.mean((0, 1, 3))
        k = round(len(mean) / 3)
        assert slow[stem] == sorted(mean.argsort(descending=True, stable=True)[:k].tolist()) and len(slow[stem]) == k
        assert fast[stem] == sorted(mean.argsort(stable=True)[:k].tolist())
    both = ablation.zero("blocks.*.mixer.*hook_write", channel=slow) + ablation.no_scan(channel=fast)
    with both.on(model):
        _, cache = model.run_with_cache(x, names_filter=lambda name: True)
    for stem in stems:
        states, scan = by_channel(cache[f"{stem}.hook_state"], model, 2), cache[f"{stem}.hook_scan"]
        kept = [c for c in range(scan.shape[-1]) if c not in slow[stem] + fast[stem]]
        assert (states[:, :, slow[stem]] == 0).all() and (scan[..., fast[stem]] == 0).all()
        assert (scan[..., kept] != 0).any()
        if stem.startswith("blocks.0"):
            assert same(scan[..., kept], clean[f"{stem}.hook_scan"][..., kept])
    with pytest.raises(gl.InputError, match="share=0"):
        ablation.slowest(model, 0, x)


def test_a_layer_that_mixes_by_attention_has_no_gate():
    model = gl.HookedGriffin.tiny()
    attention = model.cfg.layer_types.index("attention")
    with pytest.raises(
        gl.PointError, match=f"Layer {attention} of tiny-griffin has no gate: it mixes tokens by 'attn'"
    ):
        ablation.open_gate(attention).hooks(model)
    with pytest.raises(gl.PointError, match="No layer of layers='2'"):
        ablation.open_gate(str(attention)).hooks(model)
    assert len(ablation.open_gate().hooks(model)) == model.cfg.n_layers - 1


def test_components_compose_and_work_while_generating(lm):
    if lm.recurrence["conv"].startswith("none"):
        both = ablation.open_gate() + ablation.no_scan()
    else:
        both = ablation.only_tap(-1) + ablation.no_conv_bias() + ablation.open_gate()
    tokens = example(lm)
    with torch.no_grad(), both.on(lm):
        ids = lm.generate(tokens, max_new_tokens=4, do_sample=False, verbose=False)
        whole = tokens
        for _ in range(4):
            whole = torch.cat([whole, lm(whole)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(ids, whole)


@torch.no_grad()
def test_without_its_erase_a_delta_rule_adds_up_what_it_writes(model):
    """state_t = decay_t state_{t-1} + write_t, step by step, and it is another model; others say that they erase nothing."""
    x = example(model)
    if "erase" not in model.recurrence:
        with pytest.raises(gl.PointError, match=f"{model.title} has no erase: no block of .* has a hook_erase"):
            logits(model, ablation.no_erase(), x)
        return
    with ablation.no_erase().on(model):
        without, cache = model.run_with_cache(x, names_filter=lambda name: True)
    layers = [layer for layer in range(model.cfg.n_layers) if f"blocks.{layer}.mixer.hook_erase" in model.names]
    for layer in layers:
        decay, write, state = (cache[f"blocks.{layer}.mixer.hook_{name}"] for name in ("decay", "write", "state"))
        held = cache[f"blocks.{layer}.mixer.hook_state_start"]
        for t in range(x.shape[1]):
            held = decay[:, t] * held + write[:, t]
            torch.testing.assert_close(state[:, t], held, rtol=1e-12, atol=1e-13)
    assert not torch.allclose(without, model(x), atol=1e-4)
    one = ablation.no_erase(layers=layers[-1], head=1, pos=[2, 3])
    with one.on(model):
        erase = model.run_with_cache(x, names_filter="*.hook_erase")[1][f"blocks.{layers[-1]}.mixer.hook_erase"]
    own = model.run_with_cache(x, names_filter="*.hook_erase")[1][f"blocks.{layers[-1]}.mixer.hook_erase"].clone()
    own[:, 2:4, ..., 1, :, :] = 0
    torch.testing.assert_close(erase, own, rtol=0, atol=0)

"""Relevance: nothing is lost, values stay, the scan's share is A^T g, and a tiny Mamba by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import gatedlens as gl
from gatedlens import attribution
from gatedlens.attribution import Rules
from gatedlens.hooks.mamba import HookedMamba
from gatedlens.model.hookpoint import Capture
from gatedlens.runs.relevance_rules import GATES
from tests.helpers import example, padded, relative

CONSTANTS = ("bias", "pos_embed", "cls_token")  # what parameters that are added to activations are named


def what_constants_get(model, input, target, gates="content"):
    """sum of p . gradient over every additive parameter behind the embedding, under the rules."""
    added = [p for name, p in model.wrapped.named_parameters() if name.endswith(CONSTANTS)]
    start = 0 if model.grid is None else None
    entering = input if start is None else model(input, stop_at_layer=0).detach()
    with Rules.of(model, gates).on(model):
        logit = model(entering, start_at_layer=start).reshape(-1, model.cfg.d_vocab)[-1, target]
    found = torch.autograd.grad(logit, added, allow_unused=True) if added else []
    return sum(float((p.detach() * g).sum()) for p, g in zip(added, found, strict=True) if g is not None)


@pytest.mark.parametrize("gates", GATES)
def test_relevance_is_conserved(model, gates):
    """Scores and what biases get sum to the logit, for each row by itself, whatever gates get."""
    for row in range(2):
        input = example(model)[row : row + 1]
        found = attribution.lrp(model, input, target=3, gates=gates)
        assert found.facts["gates"] == gates
        logit, constants = float(found.explained), what_constants_get(model, input, 3, gates)
        assert abs(float(found.scores.sum()) + constants - logit) < 1e-11 * max(1, abs(logit))
        assert abs(found.facts["remainder"][0] - constants) < 1e-11
        assert found.scores.abs().max() > 1e-3


def test_without_biases_nothing_is_left_over():
    """A Mamba without biases: all relevance is the tokens'."""
    model = HookedMamba.tiny(dtype=torch.float64, ssm_cfg={"d_state": 4, "d_conv": 4, "conv_bias": False})
    found = attribution.lrp(model, example(model), target=(3, 7))
    assert torch.allclose(found.scores.sum(1), found.explained, atol=1e-13)


def test_rules_change_no_value_and_leave_no_hook(model):
    input = example(model)
    with torch.no_grad():
        every = {"names_filter": lambda name: True}  # who listens decides in which order sums are taken
        plain, before = model.run_with_cache(input, **every)
        with Rules.of(model).on(model):
            ruled, after = model.run_with_cache(input, **every)
    assert torch.equal(plain, ruled) and all(torch.equal(before[name], after[name]) for name in before)
    assert not model.list_hooks()


def through_rules(model, input, names, weight, gates="content"):
    """{name: (activation, gradient of (weight * the last logits))} under the rules."""
    values = {}
    rules = Rules.of(model, gates)
    with model.hooks([(name, Capture(values)) for name in names]), rules.on(model):
        out = (model(input).reshape(len(input), -1, model.cfg.d_vocab)[:, -1] * weight).sum()
    grads = torch.autograd.grad(out, [values[name] for name in names])
    return {name: (values[name].detach(), grad) for name, grad in zip(names, grads, strict=True)}


@pytest.mark.parametrize("gates", GATES)
def test_relevance_of_x_is_its_share_of_the_gate_times_a_transposed_g(model, gates):
    """x . (s A^T g) in every layer: s = 1/2 where the gate gets half, 1 where it only weighs or there is none."""
    input = example(model)
    with torch.no_grad():
        stack = gl.implicit_attention(model, input)
    weight = torch.randn(model.cfg.d_vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for A in stack:
        mixer = model.blocks[A.layer].mixer
        stem = f"blocks.{A.layer}.{mixer.place}."
        gate = [point.equation for name, point in model.names.points.items() if name == f"{stem}hook_gate"]
        gate += [point.equation for name, point in model.names.points.items() if name == f"{stem}fwd.hook_gate"]
        gate += [point.equation for name, point in model.names.points.items() if name == f"{stem}hook_gate_act"]
        sigmoid = any(equation.startswith("sigmoid(") for equation in gate)
        shared = bool(gate) and {"content": not sigmoid, "half": True, "none": False}[gates]
        inside = [name for name in mixer.attention_points if name.rpartition(".")[2] in ("hook_x", "hook_v")]
        first = [name for name in model.names.points if name.endswith("v_first")] if A.layer == 0 else []
        noted = [*(stem + name for name in (*inside, mixer.output_point)), *first]
        found = through_rules(model, input, noted, weight, gates)
        if model.cfg.architecture in ("rwkv6", "rwkv7"):
            g, (value, gradient) = found[stem + mixer.output_point][1], found[f"{stem}hook_x"]
            scanned, *beside = (replace(A, branches=(branch,)).T @ g for branch in A.branches)
            scanned = scanned.unflatten(2, (model.cfg.n_heads, -1))  # of x less its mean over the head
            back = ((scanned - scanned.mean(-1, keepdim=True)).flatten(2) + sum(beside)) * (0.5 if shared else 1.0)
            back = back + sum(found[name][1] for name in first)  # what later layers read of layer 0
            assert relative(value * gradient, value * back) < 1e-11
            continue
        if mixer.steps > 1:  # each step has a content of its own
            (value, gradient), g = found[f"{stem}hook_x"], found[stem + mixer.output_point][1].flatten(2)
            back = torch.stack([replace(A, branches=(branch,)).T @ g for branch in A.branches], 2)
            assert relative(value * gradient, value * back * (0.5 if shared else 1.0)) < 1e-11
            continue
        for branch, x in zip(A.branches, inside, strict=True):
            one = replace(A, branches=(branch,))
            g = found[stem + mixer.output_point][1].flatten(2)
            back = (one.T @ g) * (0.5 if shared else 1.0)
            value, gradient = found[stem + x]
            if value.ndim == 4:  # heads that share their values: each value gets what all of them send
                back = back.unflatten(2, (-1, value.shape[3])).unflatten(2, (value.shape[2], -1)).sum(3)
            assert relative(value * gradient, value * back) < 1e-11


def test_which_points_follow_which_rule():
    def detached(model):
        return {name.rpartition("blocks.1.")[2] for name in Rules.of(model).detached if name.startswith("blocks.1.")}

    def shares(model):
        rules = Rules.of(model).shares
        return {
            share.point.removeprefix("blocks.1."): [read.removeprefix("blocks.1.") for read in share.reads]
            for share in rules
            if share.point.startswith("blocks.1.")
        }

    mamba, griffin, rwkv, vim = (
        hooked.tiny() for hooked in (HookedMamba, gl.HookedGriffin, gl.HookedRWKV, gl.HookedViM)
    )

    def gates(model, layer=1):
        flow, stem = Rules.of(model).flows[layer], f"blocks.{layer}."
        assert flow.output == f"{stem}{model.blocks[layer].mixer.place}.{model.blocks[layer].mixer.output_point}"
        return {
            name.removeprefix(stem): (gate.weighs, gate.reads.removeprefix(stem))
            for name, gate in flow.gates.items()
            if gate.reads is not None
        }

    assert detached(mamba) == {"ln1.hook_scale"} and shares(mamba) == {}
    assert gates(mamba)["mixer.hook_gate"] == (False, "mixer.hook_gate_pre")
    assert detached(rwkv) == {"ln1.hook_scale", "ln2.hook_scale", "mlp.hook_gate"}
    assert shares(rwkv) == {"mlp.hook_k_act": ["mlp.hook_k"]}
    assert gates(rwkv)["mixer.hook_gate"] == (True, "mixer.hook_gate_pre")
    assert shares(griffin) == {"mlp.hook_post": ["mlp.hook_pre", "mlp.hook_pre_linear"]}
    assert gates(griffin)["mixer.hook_gate"] == (False, "mixer.hook_gate_pre") and gates(griffin, 2) == {}
    assert gates(vim)["mixer.bwd.hook_gate"] == (False, "mixer.bwd.hook_gate_pre") and shares(vim) == {}


def test_half_of_a_sigmoid_gate_by_hand():
    """RWKV's channel mix, kv * sigmoid(r): what each side gets under each rule."""
    model = gl.HookedRWKV.tiny(dtype=torch.float64)
    names = [f"blocks.1.{name}" for name in ("hook_mlp_out", "mlp.hook_kv", "mlp.hook_gate_pre")]
    weight = torch.randn(model.cfg.d_vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for gates, share in {"half": 0.5, "content": 1.0, "none": 1.0}.items():
        values = {}
        read = names if gates == "half" else names[:2]
        with model.hooks([(name, Capture(values)) for name in names]), Rules.of(model, gates).on(model):
            out = (model(example(model))[:, -1] * weight).sum()
        out_r, kv_r, *r_r = (
            values[name].detach() * g
            for name, g in zip(read, torch.autograd.grad(out, [values[n] for n in read]), strict=True)
        )
        assert torch.allclose(kv_r, share * out_r, atol=1e-13)
        assert all(torch.allclose(one, 0.5 * out_r, atol=1e-13) for one in r_r) and len(r_r) == (gates == "half")


def test_an_unknown_rule_for_gates_is_explained(model):
    with pytest.raises(gl.InputError, match="gates='hlaf': it is 'content', 'half', 'none'. Did you mean 'half'"):
        attribution.lrp(model, example(model), gates="hlaf")


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_gets_none(lm, side):
    tokens, mask = padded([example(lm, 1, n, seed=n)[0] for n in (6, 3)], side)
    found = attribution.lrp(lm, tokens, target=2, attention_mask=mask)
    assert (found.scores[~mask] == 0).all()
    alone = [attribution.lrp(lm, row[kept].unsqueeze(0), target=2) for row, kept in zip(tokens, mask, strict=True)]
    assert all(torch.allclose(found.scores[b][mask[b]], alone[b].scores[0], atol=1e-13) for b in range(2))


# -- by hand --------------------------------------------------------------------------------------------------------


def linear_back(relevance, x, weight, out):
    """R_j = x_j sum over i of W_ij R_i / out_i"""
    return x * ((relevance / out) @ weight)


@torch.no_grad()
def by_hand(model, tokens, token):
    """MambaLRP relevance by relevance, no autograd: what goes in is split as the forward added it up."""
    w, cache = model.wrapped, model.run_with_cache(tokens, names_filter=lambda name: True)[1]
    n = cache["ln_final.hook_out"]
    relevance = torch.zeros_like(n)
    relevance[:, -1] = n[:, -1] * w.lm_head.weight[token]  # a norm passes each entry's relevance on as it is
    for layer in reversed(range(model.cfg.n_layers)):
        mixer = w.backbone.layers[layer].mixer
        get = {
            name: cache[f"blocks.{layer}.mixer.hook_{name}"]
            for name in ("x", "conv", "u", "dt", "B", "C", "y", "gated")
        }
        post = cache["resid_post", layer]
        mixed = cache["mixer_out", layer]
        residual = relevance * cache["resid_pre", layer] / post
        to_gated = linear_back(relevance * mixed / post, get["gated"], mixer.out_proj.weight, mixed)
        to_y, to_z = to_gated / 2, to_gated / 2
        A, length, u = -torch.exp(mixer.A_log), tokens.shape[1], get["u"]
        to_u = to_y * mixer.D * u / get["y"]
        for i in range(length):
            for j in range(i + 1):
                decay = torch.exp(get["dt"][:, j + 1 : i + 1].sum(1)[:, :, None] * A)
                s = (get["C"][:, i, None] * decay * get["dt"][:, j, :, None] * get["B"][:, j, None]).sum(-1)
                to_u[:, j] += to_y[:, i] * s * u[:, j] / get["y"][:, i]
        to_c, to_x = to_u, torch.zeros_like(u)  # SiLU passes it on
        width = mixer.conv1d.weight.shape[-1]
        for i in range(length):
            for j in range(max(0, i - width + 1), i + 1):
                tap = mixer.conv1d.weight[:, 0, width - 1 - (i - j)]
                to_x[:, j] += to_c[:, i] * tap * get["x"][:, j] / get["conv"][:, i]
        n = cache[f"blocks.{layer}.ln1.hook_out"]
        both = F.linear(n, mixer.in_proj.weight)
        relevance = residual + linear_back(torch.cat([to_x, to_z], -1), n, mixer.in_proj.weight, both)
    return relevance.sum(-1)


def test_a_tiny_mamba_by_hand():
    model = HookedMamba.tiny(dtype=torch.float64)
    tokens = example(model)
    found = attribution.lrp(model, tokens, target=11)
    assert relative(found.scores, by_hand(model, tokens, 11)) < 1e-10

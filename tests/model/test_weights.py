"""Weights by one set of names: they are what the forward multiplies with, on every architecture, and views of the model's own."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens.model.weights import NamedWeights, Weight
from tests.helpers import example

# Of each kind of part: (what is multiplied, word of the matrix, what comes of it), points without `hook_`; "in" is what the part
# reads and "out" what it gives.
READS = (("in", "in", "x"), ("in", "gate", "gate_pre"))
KEYS = (("in", "Q", "q_pre"), ("in", "K", "k_pre"))
WRITES = (("gated", "out", "out"),)
MAMBA = (*READS, ("u", "dt_rank", "dt_rank"), ("dt_rank", "dt", "dt_pre"), *WRITES)
MAMBA2 = (*READS, ("in", "B", "B_pre"), ("in", "C", "C_pre"), ("in", "dt", "dt_pre"), *WRITES)
DELTA = (*KEYS, *READS, ("in", "beta", "beta_pre"), ("in", "dt", "dt_pre"), *WRITES)
OF_RWKV = (("xv", "in", "x"), ("xk", "K", "k"), *WRITES)
MIXED = (("xk", "in", "k"), ("k_act", "out", "kv"), ("xr", "gate", "gate_pre"))
GATED_MLP = (("in", "gate", "pre"), ("in", "in", "pre_linear"), ("post", "out", "out"))
MAPS = {
    "MambaMixer": (*MAMBA, ("u", "B", "B"), ("u", "C", "C")),
    "JambaMixer": (*READS, ("u", "B", "B_pre"), ("u", "C", "C_pre"), *WRITES),
    "Mamba2Mixer": MAMBA2,
    "MultipliedMixer": MAMBA2,
    "Mamba3Mixer": (*MAMBA2, ("in", "A", "A_pre"), ("in", "lambda", "lambda_pre"), ("in", "angle", "angle_pre")),
    "GriffinMixer": (*READS, *WRITES),
    "ViMMixer": (*READS, *WRITES),
    "RwkvMixer": (*OF_RWKV, ("xr", "gate", "gate_pre")),
    "Rwkv5Mixer": (*OF_RWKV, ("xr", "R", "r"), ("xg", "gate", "gate_pre")),
    "Rwkv6Mixer": (*OF_RWKV, ("xr", "R", "r"), ("xg", "gate", "gate_pre")),
    "Rwkv7Mixer": (("xv", "in", "v_own"), ("xk", "K", "k_pre"), ("xr", "R", "r"), *WRITES),
    "MixerByKeyHead": DELTA,
    "MixerSideBySide": DELTA,
    "OlmoDeltaMixer": DELTA,
    "KimiDeltaMixer": (
        *KEYS, READS[0], ("in", "beta", "beta_pre"), ("in", "gate_low", "gate_low"), ("gate_low", "gate", "gate_pre"),
        ("in", "dt_low", "dt_low"), ("dt_low", "dt", "dt_pre"), *WRITES,
    ),
    "GlaMixer": (*KEYS, *READS, *WRITES),
    "BailingDeltaMixer": DELTA,
    "ZambaMixer": (*READS, *WRITES),
    "RetentionMixer": (*KEYS, *READS, *WRITES),
    "Hgrn2Mixer": (KEYS[0], ("in", "F", "f_pre"), READS[0], *WRITES),
    "DeltaNetMixer": (*KEYS, READS[0], ("in", "beta", "beta_pre"), *WRITES),
    "GatedDeltaNetMixer": (*KEYS, *READS, ("in", "beta", "beta_pre"), *WRITES),
    "RwkvMlp": MIXED,
    "Rwkv6Mlp": MIXED,
    "Rwkv7Mlp": (("xk", "in", "k"), ("k_act", "out", "out")),
    "GatedMlp": GATED_MLP,
    "FusedMlp": GATED_MLP,
    "Mlp": (("in", "in", "pre"), ("post", "out", "out")),
    "Experts": (("in", "router", "router"),),
    "PlainExperts": (("in", "router", "router"),),
    "Attention": (("in", "Q", "q"), ("in", "K", "k"), ("in", "V", "v"), ("in", "gate", "gate_pre"), ("z", "O", "out")),
}  # fmt: skip


def parts(model):
    """(its name, the part) of each mixer, attention and channel mixer."""
    for name, part in model.named_modules():
        if isinstance(part, NamedWeights) and type(part).__name__ in MAPS and part.named_weights():
            yield name, part


def times(x, part, word):
    """x W + b, heads taken as they stand in W."""
    weight, bias = getattr(part, f"W_{word}"), part.named_weights().get(f"b_{word}", 0)
    if word == "O":
        return torch.einsum("blhd,hdm->blm", x, weight) + bias
    if weight.ndim == 3:
        return torch.einsum("blm,hmd->blhd", x, weight) + bias
    return (x if x.shape[-1] == len(weight) else x.flatten(2)) @ weight + bias


@torch.no_grad()
def test_a_weight_is_what_the_forward_multiplies_with(hooked):
    model, ends = hooked.tiny(dtype=torch.float64), {}
    handles = [
        part.register_forward_hook(lambda _, given, out, name=name: ends.update({name: {"in": given[0], "out": out}}))
        for name, part in parts(model)
    ]
    cache = model.run_with_cache(example(model))[1]
    for handle in handles:
        handle.remove()
    assert ends
    for name, part in parts(model):
        known, tried = ends[name], 0
        for source, word, target in MAPS[type(part).__name__]:
            x, y = (known.get(at, cache.cache_dict.get(f"{name}.hook_{at}")) for at in (source, target))
            if x is None or y is None or f"W_{word}" not in part.named_weights():  # a point, a gate that this one lacks
                continue
            if word == "O" and (part.kind.gated):  # a gate before it
                continue
            assert torch.allclose(times(x, part, word).reshape(y.shape), y, atol=1e-12), (name, word, target)
            tried += 1
        assert tried >= min(2, len(MAPS[type(part).__name__])), (name, tried)


def test_every_name_is_declared_once_and_says_its_axes(model):
    words = {name for name, value in vars(NamedWeights).items() if isinstance(value, Weight)}
    for _, part in parts(model):
        has = part.named_weights()
        assert has.keys() <= words, has.keys() - words
        assert all(getattr(part, word) is not None for word in has)
    assert all(getattr(NamedWeights, word).__doc__ for word in words)


def test_weights_are_views_read_at_call_time():
    model = gl.HookedMamba.tiny()
    mixer = model.blocks[1].mixer
    assert mixer.W_in.shape == (model.cfg.d_model, model.cfg.d_inner) and mixer.W_conv.shape == (model.cfg.d_inner, 4)
    with torch.no_grad():
        mixer.W_out[:, 3] = 0
    assert torch.equal(mixer.weights.out_proj.weight[3], torch.zeros(model.cfg.d_inner))
    mixer.W_in.sum().backward()
    grad = mixer.weights.in_proj.weight.grad
    assert grad is not None and grad[: model.cfg.d_inner].eq(1).all() and grad[model.cfg.d_inner :].eq(0).all()
    assert torch.equal(mixer.A, -mixer.weights.A_log.exp()) and mixer.D is mixer.weights.D


def test_a_weight_that_a_part_lacks_is_no_attribute():
    mixer = gl.HookedMamba.tiny().blocks[0].mixer
    with pytest.raises(AttributeError, match="W_K"):
        _ = mixer.W_K
    assert not hasattr(mixer, "W_K") and list(mixer.named_weights())[:2] == ["W_in", "W_gate"]

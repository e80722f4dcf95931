"""Folders of other tools, written here as their formats are defined, and read; each tool's own equation beside."""

from __future__ import annotations

import json

import numpy
import pytest
import torch
from safetensors.torch import save_file

import gatedlens as gl
from gatedlens.dictionaries import Gated, JumpReLU, ReLU, TopK, load
from gatedlens.errors import CheckpointError, InputError
from tests.dictionaries.making import draw

D, F, OUT = 5, 9, 4
BASE = {"d_in": D, "d_sae": F, "dtype": "float64", "device": "cpu", "apply_b_dec_to_input": True}
SAID = {"model_name": "tiny", "hook_name": "blocks.0.hook_resid_pre", "hook_head_index": None}


def weights(out=D, **more):
    r = draw()
    return {"W_enc": r(D, F), "b_enc": r(F), "W_dec": r(F, out), "b_dec": r(out), **more}


def folder(path, cfg, tensors, name="sae_weights.safetensors"):
    path.mkdir(exist_ok=True)
    (path / "cfg.json").write_text(json.dumps(cfg))
    save_file({key: value.contiguous() for key, value in tensors.items()}, path / name)
    return path


def p_of(w, x, centred=True):
    return (x - w["b_dec"] if centred else x) @ w["W_enc"] + w["b_enc"]


def top(p, k):
    values, at = p.topk(k, -1)
    return torch.zeros_like(p).scatter(-1, at, values.relu())


# SAELens: the cfg of a version, tensors beside the four, and the tool's own reconstruction
def standard(w, x):
    return p_of(w, x).relu() @ w["W_dec"] + w["b_dec"]


def gated(w, x):
    s = x - w["b_dec"]
    on = (s @ w["W_enc"] + w["b_gate"]) > 0
    f = on * (s @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).relu()
    return f @ w["W_dec"] + w["b_dec"]


def rescaled(w, x):
    length = w["W_dec"].norm(dim=-1)
    return (top(p_of(w, x) * length, 3) / length) @ w["W_dec"] + w["b_dec"]


def jumping(w, x):
    p = p_of(w, x, centred=False)
    return (p.relu() * (p > w["threshold"])) @ w["W_dec"] + w["b_dec"]


def skipping(w, x):
    return p_of(w, x, False).relu() @ w["W_dec"] + w["b_dec"] + x @ w["W_skip"].T


def normalised(w, x):
    mean = x.mean(-1, keepdim=True)
    std = (x - mean).std(-1, keepdim=True)
    return standard(w, (x - mean) / (std + 1e-5)) * (std + 1e-5) + mean


def fine_tuned(w, x):
    return (p_of(w, x).relu() * w["scaling_factor"]) @ w["W_dec"] + w["b_dec"]


V6 = {
    **BASE,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "metadata": {**SAID, "sae_lens_version": "6.9.1"},
}
V3 = {**BASE, **SAID, "architecture": "standard", "activation_fn_str": "relu", "normalize_activations": "none"}
V1 = {"d_in": D, "d_sae": F, "dtype": "torch.float64", "hook_point": SAID["hook_name"], "model_name": "tiny"}
TRANS = {**V6, "d_out": OUT, "apply_b_dec_to_input": False}
TRANS["metadata"] = {**V6["metadata"], "hook_name": "blocks.0.ln1.hook_out", "hook_name_out": "blocks.0.hook_mixer_out"}
r = draw(7)
CASES = {
    "version 1": (V1, {}, standard, ReLU),
    "version 3": (V3, {}, standard, ReLU),
    "version 3, topk": (
        {**V3, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}},
        {},
        lambda w, x: top(p_of(w, x), 3) @ w["W_dec"] + w["b_dec"],
        TopK,
    ),
    "version 3, gated": ({**V3, "architecture": "gated"}, {"b_gate": r(F), "r_mag": r(F), "b_mag": r(F)}, gated, Gated),
    "version 3, fine-tuned": (
        {**V3, "finetuning_scaling_factor": True},
        {"scaling_factor": r(F).abs()},
        fine_tuned,
        ReLU,
    ),
    "version 5, jumprelu": (
        {**V3, "architecture": "jumprelu", "apply_b_dec_to_input": False, "normalize_activations": None},
        {"threshold": r(F).abs()},
        jumping,
        JumpReLU,
    ),
    "version 6, topk": (
        {**V6, "architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": True},
        {},
        rescaled,
        TopK,
    ),
    "version 6, layer norm": (
        {**V6, "architecture": "standard", "normalize_activations": "layer_norm"},
        {},
        normalised,
        ReLU,
    ),
    "transcoder": ({**TRANS, "architecture": "jumprelu_transcoder"}, {"threshold": r(F).abs()}, jumping, JumpReLU),
    "skip transcoder": ({**TRANS, "architecture": "skip_transcoder"}, {"W_skip": r(OUT, D)}, skipping, ReLU),
}


@pytest.mark.parametrize("kind", list(CASES))
def test_sae_lens(kind, tmp_path):
    cfg, more, own, activation = CASES[kind]
    w = weights(OUT if "d_out" in cfg else D, **more)
    if "b_gate" in w:
        del w["b_enc"]
    d, x = load(folder(tmp_path / "sae", cfg, w)), draw(1)(3, D)
    torch.testing.assert_close(d(x), own(w, x), atol=1e-12, rtol=1e-12)
    assert isinstance(d.activation, activation) and d.facts["model"] == "tiny"
    if "d_out" in cfg:
        assert (d.point, d.out_point, d.kind) == ("blocks.0.ln1.hook_out", "blocks.0.hook_mixer_out", "transcoder")
    else:
        assert d.points == d.out_points == (SAID["hook_name"],)


def test_sae_lens_of_scaled_activations_needs_the_scale(tmp_path):
    path = folder(tmp_path / "sae", {**V3, "normalize_activations": "expected_average_only_in"}, weights())
    with pytest.raises(InputError, match="scale=that number"):
        load(path)
    w, x = weights(), draw(1)(3, D)
    d = load(path, point="blocks.1.hook_resid_pre", scale=2)
    folded = {**w, "W_enc": w["W_enc"] * 2, "W_dec": w["W_dec"] / 2, "b_dec": w["b_dec"] / 2}
    torch.testing.assert_close(d(x), standard(folded, x), atol=1e-12, rtol=0)
    assert d.point == "blocks.1.hook_resid_pre"


def test_sae_lens_of_one_head(tmp_path):
    d = load(folder(tmp_path / "sae", {**V3, "hook_name": "blocks.0.mixer.hook_scan", "hook_head_index": 3}, weights()))
    assert d.index == {"head": 3}


@pytest.mark.parametrize("transcode", [False, True])
def test_sparsify(transcode, tmp_path):
    w = weights()
    tensors = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    if transcode:
        tensors["W_skip"] = draw(8)(D, D)
    cfg = {
        "activation": "topk",
        "k": 3,
        "d_in": D,
        "num_latents": F,
        "transcode": transcode,
        "skip_connection": transcode,
    }
    d, x = load(folder(tmp_path / "layers.2.mlp", cfg, tensors, "sae.safetensors")), draw(1)(3, D)
    want = top(p_of(w, x, not transcode), 3) @ w["W_dec"] + w["b_dec"]
    torch.testing.assert_close(d(x), want + x @ tensors["W_skip"].mT if transcode else want, atol=1e-12, rtol=0)
    assert d.out_point == "blocks.2.hook_mlp_out" and d.point == ("blocks.2.ln2.hook_out" if transcode else d.out_point)


def test_gemma_scope(tmp_path):
    path = tmp_path / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71"
    path.mkdir(parents=True)
    w = weights(threshold=draw(7)(F).abs())
    numpy.savez(path / "params.npz", **{name: tensor.numpy() for name, tensor in w.items()})
    d, x = load(path), draw(1)(3, D)
    torch.testing.assert_close(d(x), jumping(w, x), atol=1e-12, rtol=0)
    assert d.point == "blocks.20.hook_resid_post"


def test_what_is_no_folder_of_one(tmp_path):
    own = gl.dictionaries.Dictionary(draw()(3, 4), draw()(4, 3), point="hook_embed").save(tmp_path / "own.safetensors")
    assert (
        load(own).point == "hook_embed"
        and load(own, point="blocks.0.hook_resid_pre").point == "blocks.0.hook_resid_pre"
    )
    folder(tmp_path / "blocks.0", {**V3, "architecture": "gatd"}, weights())
    folder(tmp_path / "blocks.1", {**V3, "architecture": "temporal"}, weights())
    folder(
        tmp_path / "nowhere",
        {"activation": "topk", "k": 2},
        {"encoder.weight": draw()(4, 3), "W_dec": draw()(4, 3)},
        "sae.safetensors",
    )
    folder(tmp_path / "group", {"activation": "groupmax", "k": 2}, {"W_dec": draw()(4, 3)}, "sae.safetensors")
    folder(tmp_path / "short", V3, {"W_enc": draw()(D, F)})
    folder(tmp_path / "odd", V3, {**weights(), "b_enc": draw()(3)})
    folder(tmp_path / "broken", V3, weights())
    (tmp_path / "broken" / "cfg.json").write_text("{")
    for where, error, said in (
        ("blocks.0", CheckpointError, "Did you mean 'gated'"),
        ("blocks.1", CheckpointError, "'temporal', which is not read"),
        ("nowhere", InputError, "does not say what it reads"),
        ("group", CheckpointError, "groupmax"),
        ("short", CheckpointError, "lacks W_dec"),
        ("broken", CheckpointError, "not JSON"),
        ("", CheckpointError, "Of the 7 dictionaries below it name one: blocks.0"),
        ("absent", CheckpointError, "is not there"),
    ):
        with pytest.raises(error, match=said):
            load(tmp_path / where)

"""What a model is and would cost, before a weight is read: against the model itself, and its own cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

import gatedlens as gl
from gatedlens.cli.command_line import main
from gatedlens.loading import skeleton
from tests.helpers import example

BUNDLED = gl.bundled_models()


@torch.no_grad()
def test_the_cache_weighs_what_is_said(model):
    input = example(model, batch=1, pos=9)
    found, cache = gl.inspect(model, tokens=9), model.run_with_cache(input)[1]
    assert found.cache_bytes == sum(x.numel() * x.element_size() for x in cache.cache_dict.values())
    states = model.run_with_cache(input, names_filter="*hook_state")[1].cache_dict
    assert found.state_bytes == sum(x.numel() * x.element_size() for x in states.values()) // found.tokens
    assert found.points == len(model.names.points) and found.opened_as == type(model).__name__
    assert found.parameters == sum(p.numel() for p in model.wrapped.parameters()) and found.dtype == "float64"
    assert (
        found.weight_bytes == 8 * found.parameters
        and gl.inspect(model, dtype="bfloat16").weight_bytes == 2 * found.parameters
    )
    assert (
        len(found.layers) == model.cfg.n_layers
        and json.loads(json.dumps(found.to_dict()))["model"] == model.cfg.model_name
    )
    assert found.largest[0][1] >= found.largest[-1][1] and f"{found.points:,}" in str(found)


@pytest.mark.parametrize("name", BUNDLED)
def test_a_config_says_all_that_the_model_does(name, capsys):
    opened, found = gl.from_pretrained(name, device="cpu"), gl.inspect(name, dtype="float32")
    assert found == gl.inspect(opened, dtype="float32")
    assert main(["inspect", name, "--dtype", "float32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found.to_dict()))
    assert main(["inspect", name]) == 0 and "hook points" in capsys.readouterr().out
    bare = skeleton(name)
    assert all(p.is_meta for p in bare.wrapped.parameters()) and list(bare.names) == list(opened.names)


RELEASED = {  # what transformers gives as the default is a released model: its parameters (in 1e9), layers, of attention
    "Mamba2": (7.3, 64, 0),
    "RecurrentGemma": (2.0, 26, 8),
    "Qwen3Next": (79.7, 48, 12),
    "KimiLinear": (49.1, 27, 6),
    "Bamba": (10.0, 32, 0),
    "FalconH1": (8.5, 32, 32),
    "Qwen3_5MoeText": (34.7, 40, 10),
}


@pytest.mark.parametrize("name", RELEASED)
def test_a_large_model_is_inspected_without_its_weights(name, tmp_path):
    if name == "KimiLinear" and not hasattr(transformers, "KimiLinearConfig"):
        pytest.skip("this transformers has no Kimi Linear")
    getattr(transformers, f"{name}Config")().save_pretrained(tmp_path)
    size, layers, attending = RELEASED[name]
    found = gl.inspect(tmp_path, tokens=2048, dtype="bfloat16")
    assert found.parameters / 1e9 == pytest.approx(size, rel=0.01) and len(found.layers) == layers
    assert sum("attention" in kinds for kinds in found.layers) == attending
    assert found.cache_bytes > 2**30 and found.weight_bytes == 2 * found.parameters


# The configs of released models, as the hub has them, and how many parameters (in 1e9) their makers count.
CONFIGS = Path(__file__).parent / "configs"
PUBLISHED = {
    "Qwen--Qwen3-Next-80B-A3B-Instruct": 79.67, "Qwen--Qwen3.5-9B": 9.0, "Qwen--Qwen3.5-27B": 26.9,
    "Qwen--Qwen3.5-35B-A3B": 34.7, "Qwen--Qwen3.5-122B-A10B": 122.1, "Qwen--Qwen3.5-397B-A17B": 396.8,
    "RWKV--rwkv-4-169m-pile": 0.1693, "RWKV--rwkv-4-430m-pile": 0.430, "RWKV--rwkv-4-1b5-pile": 1.515,
    "RWKV--rwkv-4-3b-pile": 2.985, "RWKV--rwkv-4-7b-pile": 7.393, "RWKV--rwkv-4-14b-pile": 14.15,
    "Zyphra--Zamba2-1.2B": 1.215, "Zyphra--Zamba2-2.7B": 2.66, "Zyphra--Zamba2-7B": 7.36,
    "ai21labs--AI21-Jamba-Large-1.5": 398.6, "ai21labs--AI21-Jamba-Reasoning-3B": 3.03, "ai21labs--Jamba-v0.1": 51.57,
    "allenai--Olmo-Hybrid-7B": 7.43,
    "fla-hub--delta_net-1.3B-100B": 1.365, "fla-hub--gla-340M-15B": 0.3745, "fla-hub--gla-1.3B-100B": 1.365,
    "fla-hub--gla-2.7B-100B": 2.705, "fla-hub--hgrn2-1.3B-100B": 1.364, "fla-hub--retnet-1.3B-100B": 1.352,
    "fla-hub--rwkv7-168M-pile": 0.168, "fla-hub--rwkv7-191M-world": 0.191, "fla-hub--rwkv7-0.4B-world": 0.45,
    "fla-hub--rwkv7-1.5B-world": 1.527, "fla-hub--rwkv7-2.9B-world": 2.948,
    "google--recurrentgemma-2b": 2.683, "google--recurrentgemma-9b": 8.58, "ibm-ai-platform--Bamba-9B-v2": 9.78,
    "ibm-granite--granite-4.0-h-350m": 0.340, "ibm-granite--granite-4.0-h-1b": 1.462,
    "ibm-granite--granite-4.0-h-micro": 3.191, "ibm-granite--granite-4.0-h-tiny": 6.939,
    "ibm-granite--granite-4.0-h-small": 32.21,
    "mistralai--Mamba-Codestral-7B-v0.1": 7.285, "moonshotai--Kimi-Linear-48B-A3B-Instruct": 49.12,
    "nvidia--Nemotron-H-8B-Base-8K": 8.10, "nvidia--NVIDIA-Nemotron-Nano-9B-v2": 8.89,
    "nvidia--NVIDIA-Nemotron-Nano-12B-v2": 12.31, "nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": 31.58,
    "state-spaces--mamba-130m": 0.1291, "state-spaces--mamba-370m": 0.3715, "state-spaces--mamba-790m": 0.7932,
    "state-spaces--mamba-1.4b": 1.372, "state-spaces--mamba-2.8b": 2.768,
    "state-spaces--mamba-130m-hf": 0.1291, "state-spaces--mamba-370m-hf": 0.3715, "state-spaces--mamba-790m-hf": 0.7932,
    "state-spaces--mamba-1.4b-hf": 1.372, "state-spaces--mamba-2.8b-hf": 2.768,
    "state-spaces--mamba2-130m": 0.1290, "state-spaces--mamba2-370m": 0.3683, "state-spaces--mamba2-780m": 0.7802,
    "state-spaces--mamba2-1.3b": 1.344, "state-spaces--mamba2-2.7b": 2.703,
    "tiiuae--falcon-mamba-7b": 7.273, "tiiuae--Falcon3-Mamba-7B-Base": 7.273,
    "tiiuae--Falcon-H1-0.5B-Base": 0.5214, "tiiuae--Falcon-H1-1.5B-Deep-Base": 1.555, "tiiuae--Falcon-H1-3B-Base": 3.149,
    "tiiuae--Falcon-H1-7B-Base": 7.586, "tiiuae--Falcon-H1-34B-Base": 33.64,
}  # fmt: skip


def test_every_config_has_its_size():
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_released_config_is_inspected(name, tmp_path):
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    kind = config.get("model_type", "")
    if name.startswith("moonshotai") and not hasattr(transformers, "KimiLinearConfig"):
        pytest.skip("this transformers has no Kimi Linear")
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = gl.inspect(tmp_path, tokens=2048)
    assert found.parameters / 1e9 == pytest.approx(PUBLISHED[name], rel=0.01)
    text = config.get("text_config", config)
    layers = text.get("num_hidden_layers", text.get("n_layer"))
    assert len(found.layers) == layers, kind
    told = text.get("torch_dtype", text.get("dtype"))
    assert told is None or (
        found.dtype == told and found.weight_bytes == found.parameters * getattr(torch, told).itemsize
    )
    assert 0 < found.state_bytes < found.cache_bytes and f"{found.parameters:,}" in str(found)
    if "layer_types" in text:
        attending = sum("attention" in kinds for kinds in found.layers)
        assert attending == sum(kind in ("attention", "full_attention") for kind in text["layer_types"])


def test_one_file_and_what_cannot_be_inspected(tmp_path, capsys):
    tiny = gl.HookedRWKV6.tiny()
    file = tmp_path / "RWKV-x060.pth"
    torch.save(tiny.wrapped.state_dict(), file)
    found = gl.inspect(file)
    assert found.opened_as == "HookedRWKV6" and found.parameters == gl.inspect(tiny).parameters
    file.unlink()
    with pytest.raises(gl.CheckpointError, match="no folder"):
        gl.inspect(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(gl.CheckpointError, match="'llama', which gatedlens does not support"):
        gl.inspect(tmp_path)
    for wrong in (0, -3, 2.5):
        with pytest.raises(gl.InputError, match="tokens="):
            gl.inspect("gatedlens/mamba-moby", tokens=wrong)
    assert main(["inspect", str(tmp_path)]) == 2 and "llama" in capsys.readouterr().err

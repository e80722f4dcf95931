"""What a model is and would cost, before a weight is read: against the model itself, and its own cache."""

from __future__ import annotations

import json

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

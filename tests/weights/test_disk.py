"""Weights on the disk: the same numbers as in memory, from every architecture and layout; and how much memory a run takes,
measured in a process of its own."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import gatedlens as gl
from gatedlens import store as gl_store
from gatedlens.model.checkpoint import save_checkpoint
from gatedlens.runs.fingerprints import fingerprint
from gatedlens.weights import disk
from tests.conftest import EVERY, LANGUAGE
from tests.helpers import example

TOKENS = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(0))


def save(wrapped, folder, **options):
    """A model as its makers keep it."""
    wrapped.save_pretrained(folder, **options) if "save_pretrained" in dir(wrapped) else save_checkpoint(
        folder, wrapped.config, wrapped
    )
    return folder


def both(folder, **options):
    """(in memory, on the disk)."""
    return gl.from_pretrained(folder, device="cpu"), gl.from_pretrained(folder, offload="disk", **options)


def windows(model) -> list[disk.Window]:
    return [
        one for module in model.wrapped.modules() if disk.MARK in vars(module) for one in vars(module)[disk.MARK].made
    ]


@pytest.fixture(scope="module")
def mamba(tmp_path_factory):
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 40, "state_size": 4}
    return save(MambaForCausalLM(MambaConfig(**sizes)), tmp_path_factory.mktemp("mamba"), max_shard_size="100KB")


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_every_architecture_runs_from_the_disk(name, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "SMALL", 1)  # what stands in no file is written to one, however small
    whole, ours = both(save(EVERY[name].tiny().wrapped, tmp_path / "model"), offload_folder=str(tmp_path / "spilled"))
    shown = {id(one.tensor) for one in windows(ours)}
    assert all(id(p) in shown and not p.requires_grad for p in ours.wrapped.parameters())
    input = example(whole)
    input = input if name in LANGUAGE else input.to(whole.W_U.dtype)
    wanted, cache = whole.run_with_cache(input, names_filter=lambda name: True)
    got, found = ours.run_with_cache(input, names_filter=lambda name: True)
    assert torch.equal(got, wanted) and all(torch.equal(found[point], cache[point]) for point in cache)
    layer = max(whole.mixers)
    A, B = (gl.implicit_attention(kept, layer=layer) for kept in (cache, found))
    assert torch.equal(A.abs_mean(), B.abs_mean()) and B.check().relative < 1e-4
    assert fingerprint(ours) == fingerprint(whole) and torch.equal(ours.W_U, whole.W_U)
    if name in LANGUAGE:
        _, state = ours(input[:, :4], return_state=True)
        assert torch.equal(
            ours(input[:, 4:], state=state), whole(input[:, 4:], state=whole(input[:, :4], return_state=True)[1])
        )


@torch.no_grad()
def test_shards_sweeps_generation_and_stores(mamba, tmp_path):
    whole, ours = both(mamba)
    assert len({one.file for one in windows(ours)}) > 2, "one mapping a shard"
    options = {"max_new_tokens": 3, "temperature": 0.8, "seed": 0, "verbose": False}
    assert torch.equal(ours.generate(TOKENS, **options), whole.generate(TOKENS, **options))
    clean = whole.run_with_cache(TOKENS, names_filter="blocks.*.hook_resid_pre")[1]
    metric = gl.metrics.logit_difference(TOKENS[:, 0], TOKENS[:, 1])
    swept = [
        gl.patching.get_act_patch_resid_pre(m, TOKENS.flip(1), clean, metric, progress=False) for m in (ours, whole)
    ]
    assert torch.equal(swept[0].values, swept[1].values)
    name = "blocks.2.hook_resid_post"
    kept = gl_store.harvest(ours, TOKENS, name, tmp_path / "store", progress=False)
    assert torch.equal(kept[name][:], whole.run_with_cache(TOKENS, names_filter=name)[1][name])


def test_activations_have_gradients_and_weights_have_none(mamba):
    whole, ours = both(mamba)
    seen = []
    for model in (ours, whole):
        given = {}
        hook = (
            "blocks.1.hook_resid_pre",
            lambda x, hook, given=given: given.setdefault("x", x.detach().requires_grad_()),
        )
        model.run_with_hooks(TOKENS, fwd_hooks=[hook]).pow(2).mean().backward()
        seen.append(given["x"].grad)
    assert torch.equal(*seen) and bool(seen[0].any())
    scores = [gl.attribution.grad_x_input(model, TOKENS[:1]).values for model in (ours, whole)]
    assert torch.allclose(*scores)
    ours.wrapped.backbone.layers[1].mixer.D.requires_grad_()
    with pytest.raises(
        gl.CheckpointError, match=r"layers.1.mixer.D requires a gradient, and its numbers are on the disk"
    ):
        ours(TOKENS)
    ours.wrapped.requires_grad_(False)
    ours(TOKENS)


@torch.no_grad()
def test_an_edit_in_place_stays(mamba):
    whole, ours = both(mamba)
    before = ours(TOKENS)
    for model in (whole, ours):
        model.wrapped.backbone.layers[0].mixer.in_proj.weight.mul_(1.5)
    for _ in range(2):
        assert torch.equal(ours(TOKENS), whole(TOKENS)) and not torch.equal(ours(TOKENS), before)
    assert torch.equal(gl.from_pretrained(mamba, device="cpu")(TOKENS), before), "the file is as it was"
    twin = copy.deepcopy(ours)
    assert torch.equal(twin(TOKENS), ours(TOKENS)) and not windows(twin), "a copy is in memory"


@torch.no_grad()
def test_layouts_of_other_makers(tmp_path):
    """mamba-ssm's in safetensors and in a pickle, tied and untied; a file alone."""
    for tied in (True, False):
        tiny = gl.HookedMamba.tiny(tie_embeddings=tied, d_model=64).wrapped
        folder = save(tiny, tmp_path / f"{tied}")
        if tied:
            state = load_file(folder / "model.safetensors")
            state.pop("lm_head.weight", None)
            save_file(state, folder / "model.safetensors")
        whole, ours = both(folder)
        assert torch.equal(ours(TOKENS), whole(TOKENS))
        assert (
            (ours.embedding.weight is ours.unembedding.weight)
            == tied
            == (whole.embedding.weight is whole.unembedding.weight)
        )
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        assert torch.equal(gl.from_pretrained(folder, offload="disk")(TOKENS), whole(TOKENS))
    file = tmp_path / "RWKV-x060.pth"
    torch.save(gl.HookedRWKV6.tiny().wrapped.state_dict(), file)
    whole, ours = both(file)
    assert torch.equal(ours(TOKENS), whole(TOKENS)) and windows(ours)


@torch.no_grad()
def test_what_is_in_no_file_is_written_to_one(tmp_path, monkeypatch):
    """As experts are, which transformers stacks while it loads them; the folder goes with the model, unless it was named."""
    monkeypatch.setattr(disk, "SMALL", 1)
    layer = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5)).eval()
    x, wanted = torch.randn(3, 7), None
    wanted = layer(x)
    disk.put_on_disk(layer)
    assert torch.equal(layer(x), wanted)
    folder = Path(vars(layer)[disk.MARK].folder.name)
    assert (folder / "weights.bin").stat().st_size > 0
    del layer
    assert not folder.exists()
    named = nn.Linear(7, 5)
    disk.put_on_disk(named, tmp_path)
    named(x)
    del named
    assert (tmp_path / "weights.bin").exists()
    monkeypatch.setattr(disk, "MAPS", tmp_path / "nowhere")  # no Linux: everything is written
    model = gl.from_pretrained("gatedlens/mamba-recall", offload="disk")
    assert len({one.file for one in windows(model)}) == 1
    text = "B 4 dog F 1 gnu but A 2 hay D 4 ? F"
    assert torch.equal(model(text), gl.from_pretrained("gatedlens/mamba-recall", device="cpu")(text))


@torch.no_grad()
def test_an_adapter_over_weights_on_the_disk(mamba, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    options = peft.LoraConfig(r=2, target_modules=["in_proj"], init_lora_weights=False)
    outer = peft.get_peft_model(gl.from_pretrained(mamba, device="cpu").wrapped, options).eval()
    outer.save_pretrained(tmp_path)
    ours = gl.from_pretrained(mamba, adapter=tmp_path, offload="disk")
    assert torch.equal(ours(TOKENS), gl.wrap(outer)(TOKENS)) and windows(ours)
    lora = ours.wrapped.backbone.layers[0].mixer.in_proj.lora_B["default"].weight.requires_grad_()
    with torch.enable_grad():
        ours(TOKENS, return_type="loss").backward()
    assert bool(lora.grad.any())


def test_what_does_not_go_with_it(mamba, tmp_path):
    for options, message in (
        ({"offload": "cpu"}, "offload='cpu': weights are in memory .None. or on the 'disk'"),
        ({"device_map": "auto"}, "offload='disk' and device_map='auto': give one"),
        ({"device": "cuda"}, "runs on the CPU, and device='cuda'"),
        ({"dtype": "bfloat16"}, "stores float32; dtype=bfloat16"),
    ):
        with pytest.raises(gl.CheckpointError, match=message):
            gl.from_pretrained(mamba, **{"offload": "disk", **options})
    config = json.loads((mamba / "config.json").read_text())
    for file in mamba.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(gl.CheckpointError, match="are quantised .fp8."):
        gl.from_pretrained(tmp_path, offload="disk")


def test_numbers_that_are_not_finite_are_told(mamba, tmp_path):
    gl.from_pretrained(mamba, device="cpu").wrapped.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["backbone.layers.1.mixer.D"][0] = float("nan")
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match=r"backbone.layers.1.mixer.D hold NaN"):
        gl.from_pretrained(tmp_path, offload="disk")


# -- measured ---------------------------------------------------------------------------------------------------------

ALLOWED, SIZE = 250, 600  # MB beside what Python and its packages take, and of weights
CHILD = """
import json, sys
import torch
import gatedlens as gl

def memory():
    lines = open("/proc/self/status").read()
    return {name: int(lines.split(name + ":")[1].split()[0]) / 1024 for name in ("VmHWM", "VmRSS", "RssAnon", "RssFile")}

torch.set_num_threads(1)
tokens = torch.randint(2000, (2, 16), generator=torch.Generator().manual_seed(0))
metric = gl.metrics.logit_difference(tokens[:, 0], tokens[:, 1])

def use(model):
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens, names_filter="blocks.*.hook_resid_pre")
        made = model.generate(tokens[:, :4], max_new_tokens=2, temperature=0, verbose=False)
        points = ["blocks.0.hook_resid_pre", f"blocks.{model.cfg.n_layers - 1}.hook_resid_pre"]
        swept = gl.patching.sweep(
            model, tokens.flip(1), cache, metric, points, "pos", groups={"pos": {"a few": [1, 2, 3]}}, progress=False
        )
        exact = gl.implicit_attention(model, tokens, layer=1).check().relative
    resid = cache["resid_pre", 0].clone().requires_grad_()
    model(resid, start_at_layer=0, stop_at_layer=4).float().sum().backward()
    return [float(x.double().abs().sum()) for x in (logits, made, swept.values, resid.grad)], exact

use(gl.from_pretrained(sys.argv[1], device="cpu"))  # a small one first: what is imported late is no part of the model
before = memory()
model = gl.from_pretrained(sys.argv[2], **({"offload": "disk"} if sys.argv[3] == "disk" else {"device": "cpu"}))
model.wrapped.requires_grad_(False)  # in memory as well: torch rounds a product by which of its factors have gradients
sums, exact = use(model)
weights = sum(p.nbytes for p in model.wrapped.parameters()) / 2**20
print(json.dumps({"before": before, "after": memory(), "weights": weights, "sums": sums, "exact": exact}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured on Linux")
def test_a_model_larger_than_the_memory_that_it_may_take(tmp_path, record_property):
    """Peak resident memory, of all kinds (anonymous memory and the pages of files), less what the process held before."""
    from transformers import MambaConfig, MambaForCausalLM

    for folder, width, layers in (("small", 64, 5), ("large", 768, 84)):
        torch.manual_seed(0)
        config = MambaConfig(hidden_size=width, num_hidden_layers=layers, vocab_size=2000, tie_word_embeddings=False)
        with torch.device("meta"):
            model = MambaForCausalLM(config).bfloat16()
        model.to_empty(device="cpu")
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.normal_(std=0.02) if p.ndim > 1 and "A_log" not in name else p.fill_(1.0)
        model.save_pretrained(tmp_path / folder, max_shard_size="150MB")
        del model
    found = {}
    for way in ("disk", "memory"):
        arguments = [sys.executable, "-W", "ignore", "-c", CHILD, str(tmp_path / "small"), str(tmp_path / "large"), way]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        found[way] = json.loads(done.stdout.splitlines()[-1])
        peak = found[way]["after"]["VmHWM"] - found[way]["before"]["VmRSS"]
        said = {kind: round(found[way]["after"][kind] - found[way]["before"][kind]) for kind in ("RssAnon", "RssFile")}
        print(
            f"{way}: weights {found[way]['weights']:.0f} MB, peak {peak:.0f} MB above the start, at the end {said} MB"
        )
        found[way]["peak"] = peak
    assert found["disk"]["weights"] > SIZE and found["disk"]["peak"] < ALLOWED
    assert found["disk"]["sums"] == found["memory"]["sums"]
    assert found["memory"]["peak"] > SIZE, "in memory it is all there, so this measures what it says"

"""Models that accelerate spread over memory and disk: the same numbers from our own forward, hooks and harvests as well."""

from __future__ import annotations

import copy

import pytest
import torch

import gatedlens as gl
from gatedlens import store as gl_store
from gatedlens.model import placement
from tests.helpers import example, relative

accelerate = pytest.importorskip("accelerate")


def models():
    from transformers import (
        MambaConfig,
        MambaForCausalLM,
        RecurrentGemmaConfig,
        RecurrentGemmaForCausalLM,
        RwkvConfig,
        RwkvForCausalLM,
    )

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "vocab_size": 40}
    griffin = {"lru_width": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    return {
        "mamba": MambaForCausalLM(MambaConfig(**sizes, state_size=4)),
        "griffin": RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**sizes, **griffin, attention_window_size=4)),
        "rwkv": RwkvForCausalLM(RwkvConfig(**sizes)),
    }


@pytest.fixture(params=["mamba", "griffin", "rwkv"])
def pair(request, tmp_path):
    """(the model in memory, the same with its later half on the disk)."""
    whole = models()[request.param].eval()
    half = copy.deepcopy(whole)
    device_map = {}
    for name, module in half.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            later = any(f".{layer}." in name for layer in (1, 2)) or "norm" in name.rpartition(".")[2]
            device_map[name] = "disk" if later else "cpu"
    placed = accelerate.dispatch_model(half, device_map, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert any(p.is_meta for p in placed.parameters()) and any(not p.is_meta for p in placed.parameters())
    return gl.wrap(whole), gl.wrap(placed)


@torch.no_grad()
def test_a_model_that_is_half_on_the_disk_gives_the_same(pair, tmp_path):
    whole, placed = pair
    tokens = example(whole, 2, 7)
    wanted, cache = whole.run_with_cache(tokens, names_filter=lambda name: True)
    got, ours = placed.run_with_cache(tokens, names_filter=lambda name: True)
    assert torch.equal(got, wanted) and all(torch.equal(ours[name], cache[name]) for name in cache)
    assert any(p.is_meta for p in placed.wrapped.parameters()), "what came from the disk left again"
    _, state = placed(tokens[:, :4], return_state=True)
    assert torch.allclose(placed(tokens[:, 4:], state=state), whole(tokens)[:, 4:], atol=1e-5)
    options = {"max_new_tokens": 3, "temperature": 0.8, "seed": 0, "verbose": False}
    assert torch.equal(placed.generate(tokens, **options), whole.generate(tokens, **options))
    mask = torch.ones_like(tokens)
    mask[0, 5:] = 0
    assert torch.equal(
        placed(tokens, attention_mask=mask, return_type="loss"), whole(tokens, attention_mask=mask, return_type="loss")
    )
    zero = [("blocks.2.hook_mixer_out", lambda x, hook: x * 0)]
    assert torch.equal(placed.run_with_hooks(tokens, fwd_hooks=zero), whole.run_with_hooks(tokens, fwd_hooks=zero))
    name = "blocks.2.hook_resid_post"
    _, cache = whole.run_with_cache(tokens, names_filter=name)
    store = gl_store.harvest(placed, tokens, name, tmp_path / "out", progress=False)
    assert torch.equal(store[name][:], cache[name])


@torch.no_grad()
def test_weights_are_at_hand_for_who_reads_them_beside_a_forward(pair):
    whole, placed = pair
    tokens = example(whole, 2, 7)
    with placement.at_hand(placed.wrapped):
        got = gl.implicit_attention(placed, tokens, layer=1).abs_mean()
    assert torch.equal(got, gl.implicit_attention(whole, tokens, layer=1).abs_mean())
    with pytest.raises(RuntimeError), placement.at_hand(placed.wrapped):
        raise RuntimeError
    assert any(p.is_meta for p in placed.wrapped.parameters())


def test_a_model_without_weights_is_explained():
    with torch.device("meta"):
        model = models()["mamba"]
    with pytest.raises(gl.CheckpointError, match="on the meta device: they have shapes and no numbers"):
        gl.wrap(model)(torch.tensor([[1, 2]]))


@pytest.mark.filterwarnings("ignore:.*device_map keys")  # accelerate wants the parameters named and then wonders
@pytest.mark.parametrize("options", [{}, {"if_cls_token": False, "if_abs_pos_embed": False}], ids=["cls", "bare"])
@torch.no_grad()
def test_a_vision_mamba_half_on_the_disk(tmp_path, options):
    """Its class token and positions are parameters of the model itself, beside patches, layers and head."""
    whole = gl.HookedViM.tiny(**options)
    half = copy.deepcopy(whole.wrapped)
    own = {name: "cpu" for name, _ in half.named_parameters(recurse=False)}
    device_map = {**own, "patch_embed": "disk", "layers.0": "cpu", "layers.1": "disk", "norm_f": "cpu", "head": "disk"}
    placed = gl.wrap(
        accelerate.dispatch_model(half, device_map, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    )
    assert {name for name, p in half.named_parameters() if p.is_meta} >= {"patch_embed.proj.weight", "head.weight"}
    images = example(whole, 2).float()
    wanted, cache = whole.run_with_cache(images, names_filter=lambda name: True)
    got, ours = placed.run_with_cache(images, names_filter=lambda name: True)
    assert torch.equal(got, wanted) and all(torch.equal(ours[name], cache[name]) for name in cache)
    assert all(p.is_meta for p in placed.wrapped.head.parameters()), "what came from the disk left again"
    name = "blocks.1.mixer.hook_gated"
    _, cache = whole.run_with_cache(images, names_filter=name)
    assert torch.equal(gl_store.harvest(placed, images, name, tmp_path / "out", progress=False)[name][:], cache[name])


@torch.no_grad()
def test_originals_take_a_device_map_too(tmp_path):
    """What transformers does not load is placed as well; a device map is never ignored."""
    whole = gl.HookedViM.tiny()
    whole.wrapped.save_pretrained(tmp_path / "vim")
    images = example(whole, 2).float()
    device_map = {"": "cpu", "layers.1": "disk"}
    placed = gl.from_pretrained(tmp_path / "vim", device_map=device_map, offload_folder=str(tmp_path / "off"))
    assert placed.wrapped.layers[1].mixer.D.is_meta and torch.equal(placed(images), whole(images))
    auto = gl.from_pretrained(tmp_path / "vim", device_map="auto")
    assert auto.wrapped.hf_device_map and torch.allclose(auto(images).cpu(), whole(images), atol=1e-5)
    with pytest.raises(gl.CheckpointError, match="device_map='every'"):
        gl.from_pretrained(tmp_path / "vim", device_map="every")
    with pytest.raises(gl.CheckpointError, match="give one of the two"):
        gl.from_pretrained(tmp_path / "vim", device="cpu", device_map="auto")


def test_from_pretrained_takes_a_device_map(tmp_path):
    models()["mamba"].save_pretrained(tmp_path)
    tokens = torch.tensor([[1, 2, 3]])
    plain = gl.from_pretrained(tmp_path, device="cpu")
    placed = gl.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert torch.equal(placed(tokens), plain(tokens))
    auto = gl.from_pretrained(tmp_path, device_map="auto")
    assert torch.equal(auto(tokens).cpu(), plain(tokens)) or torch.cuda.is_available()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_shards_that_accelerate_spreads_by_itself(tmp_path, dtype):
    """device_map='auto' with less memory than the model: shards in the hub's layout, in half precision as well, some on disk."""
    models()["mamba"].to(getattr(torch, dtype)).save_pretrained(tmp_path / "model", max_shard_size="10KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    whole = gl.from_pretrained(tmp_path / "model", device="cpu")
    assert whole.cfg.dtype == getattr(torch, dtype)
    whole.wrapped.requires_grad_(False)  # torch rounds a product by which of its factors have gradients
    options = {"device_map": "auto", "offload_folder": str(tmp_path / "off")}
    size = sum(p.numel() * p.element_size() for p in whole.wrapped.parameters())
    placed = gl.from_pretrained(tmp_path / "model", max_memory={"cpu": size // 2}, **options)
    placed.wrapped.requires_grad_(False)
    if torch.cuda.is_available():
        pytest.skip("it fits on the GPU")
    assert set(placed.wrapped.hf_device_map.values()) == {"cpu", "disk"}
    tokens = example(whole, 2, 7)
    wanted, cache = whole.run_with_cache(tokens, names_filter=lambda name: True)
    got, ours = placed.run_with_cache(tokens, names_filter=lambda name: True)
    assert torch.equal(got, wanted) and all(torch.equal(ours[name], cache[name]) for name in cache)
    alone = gl.from_pretrained(tmp_path / "model", **options)  # with all the memory there is
    assert relative(alone(tokens).cpu(), wanted) < (1e-5 if dtype == "float32" else 2e-2)


@pytest.mark.parametrize("name", ["HookedQwen3Next", "HookedMamba2Hybrid", "HookedJamba"])
@torch.no_grad()
def test_hybrids_and_experts_in_shards_and_bfloat16(name, tmp_path):
    tiny = getattr(gl, name).tiny(dtype=torch.bfloat16)
    tiny.wrapped.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    tokens = example(tiny, 2, 7)
    wanted = tiny(tokens)
    opened = gl.from_pretrained(tmp_path / "model", device="cpu")
    own, theirs = (dict(one.wrapped.named_parameters()) for one in (opened, tiny))
    assert opened.cfg.dtype == torch.bfloat16 and all(torch.equal(own[name], p) for name, p in theirs.items())
    assert relative(opened(tokens), wanted) < 2e-2
    placed = gl.from_pretrained(tmp_path / "model", device_map="auto", offload_folder=str(tmp_path / "off"))
    assert relative(placed(tokens).cpu(), wanted) < 2e-2

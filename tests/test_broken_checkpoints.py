"""Whatever is broken in a checkpoint, loading it works or raises a GatedlensError that names the file: every layout of
every architecture, every format, each key dropped, retyped, nulled; files flipped, cut, empty, folders in their place."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import FalconMambaConfig, FalconMambaForCausalLM, MambaConfig, MambaForCausalLM

import gatedlens as gl
from gatedlens.hooks import architectures, griffin, rwkv
from gatedlens.hooks.griffin import HookedGriffin
from gatedlens.hooks.mamba import HookedMamba
from gatedlens.hooks.rwkv import HookedRWKV
from gatedlens.hooks.vim import HookedViM
from gatedlens.loading import BUNDLED

WORDS = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 40, "state_size": 4}
ABSURD = (None, "no", True, [], {}, [1, "x"], -1, 0, 10**9, 10**30, 2.5, float("nan"), float("inf"))


def theirs(wrapped):
    """transformers' layout."""
    return lambda folder: wrapped().save_pretrained(folder)


def ours(config, state, name="model.safetensors"):
    """An original layout: a config.json and tensors."""

    def write(folder):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        tensors = {key: value.clone() for key, value in state().items()}
        (save_file if name.endswith("safetensors") else torch.save)(tensors, folder / name)

    return write


def backwards(module, wrapped):
    """transformers' names renamed to the original ones, for a model of ours."""
    return module(wrapped)


def griffin_state():
    """A tiny Griffin by recurrentgemma's names."""
    out = {}
    for name, value in HookedGriffin.tiny().wrapped.state_dict().items():
        if name == "lm_head.weight" or "gate_proj" in name:
            continue
        if "up_proj" in name:
            both = torch.stack([HookedGriffin.tiny().wrapped.state_dict()[name.replace("up", "gate")], value])
            kind = "w" if name.endswith("weight") else "b"
            value = both.transpose(1, 2) if kind == "w" else both[:, None, None]
            name = f"{name.rpartition('up_proj')[0]}ffw_up.{kind}"
        new = "attention_block" if ".2." in name else "recurrent_block"
        for theirs, our in griffin.RENAMES.items():
            if our != "temporal_block":
                name = name.replace(our, theirs)
        name = name.replace("temporal_block", new).replace("final_norm.weight", "final_norm.scale")
        out[name] = value.squeeze(1).t() if name.endswith("conv_1d.w") else value
    return out


def rwkv_state():
    """A tiny RWKV by RWKV-LM's names."""
    words = {our: theirs for table in (rwkv.NAMES, rwkv.MIXES) for theirs, our in table.items()}
    state = HookedRWKV.tiny().wrapped.state_dict()
    return {".".join(words.get(w, w) for w in key.removeprefix("rwkv.").split(".")): v for key, v in state.items()}


GRIFFIN = {"vocab_size": 40, "width": 16, "mlp_expanded_width": 24, "num_heads": 2, "lru_width": 24,
           "block_types": ["recurrent", "recurrent", "attention"], "embeddings_scale_by_sqrt_dim": True,
           "attention_window_size": 7, "logits_soft_cap": 30.0}  # fmt: skip
MAMBA = {"d_model": 16, "n_layer": 2, "vocab_size": 40, "ssm_cfg": {"d_state": 4}, "rms_norm": True, "d_intermediate": 0,
         "residual_in_fp32": True, "attn_layer_idx": [], "tie_embeddings": True, "pad_vocab_size_multiple": 8}  # fmt: skip
RWKV = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "dim_att": 16, "dim_ffn": 24, "ctx_len": 64, "rescale_layer": 6}
LAYOUTS = {
    "mamba, transformers'": theirs(lambda: MambaForCausalLM(MambaConfig(**WORDS))),
    "falcon, transformers'": theirs(lambda: FalconMambaForCausalLM(FalconMambaConfig(**WORDS))),
    "griffin, transformers'": theirs(lambda: HookedGriffin.tiny().wrapped),
    "rwkv, transformers'": theirs(lambda: HookedRWKV.tiny().wrapped),
    "mamba-ssm's": ours(MAMBA, lambda: HookedMamba.tiny().wrapped.state_dict(), "pytorch_model.bin"),
    "recurrentgemma's": ours(GRIFFIN, griffin_state),
    "RWKV-LM's": ours(RWKV, rwkv_state),
    "Vim's": theirs(lambda: HookedViM.tiny().wrapped),
}


@pytest.fixture(scope="module", params=list(LAYOUTS))
def whole(request, tmp_path_factory):
    """A small checkpoint of one layout, whole."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    LAYOUTS[request.param](folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of it, to break."""
    return shutil.copytree(whole, tmp_path / "model")


def loads(path, **options):
    """Whether `path` loads; if not, what was raised is ours and says where. Never anything else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numbers that are not finite: told is enough here
        try:
            gl.from_pretrained(path, device="cpu", **options)
        except gl.GatedlensError as error:
            assert str(path) in str(error), f"it does not name the file: {error}"
            return False
    return True


def weights(folder):
    return next(path for path in folder.iterdir() if path.name in ("model.safetensors", "pytorch_model.bin"))


def change(path, function):
    """Rewrite the tensors of a file."""
    state = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
    function(state)
    save_file(state, path, {"format": "pt"}) if path.suffix == ".safetensors" else torch.save(state, path)


def test_whole_it_loads(folder):
    assert loads(folder)


def test_every_key_of_a_config(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    kinds = [hooked for hooked in architectures().values() if config.get("model_type") in hooked.hub_types]
    known = kinds[0].hub_fields if kinds else config
    assert len(set(config) & set(known)) > 5
    for key in config:
        for value in ABSURD if key in known else ABSURD[:2]:  # the others are refused or not heard, which is slow to see
            path.write_text(json.dumps({**config, key: value}))
            loads(folder)
        path.write_text(json.dumps({k: v for k, v in config.items() if k != key}))
        loads(folder)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"3", b"\xff\xfe{}", b"{}", b"{" * 100_000, b'{"a": 1, "a": 2}'])
def test_a_config_that_is_none(folder, text):
    (folder / "config.json").write_bytes(text)
    assert not loads(folder)


def test_folders_in_place_of_files(folder):
    for path in (folder / "config.json", weights(folder)):
        held = path.read_bytes()
        path.unlink()
        path.mkdir()
        assert not loads(folder)
        path.rmdir()
        path.write_bytes(held)
    assert loads(folder)


def test_bytes_of_the_weights(folder):
    path = weights(folder)
    held = path.read_bytes()
    for cut in (0, 1, 7, 8, 9, 100, len(held) // 2, len(held) - 1):
        path.write_bytes(held[:cut])
        assert not loads(folder), cut
    for place in (0, 1, 7, 8, 9, 10, 20, 50, 100, 200, 400, len(held) - 30, len(held) - 3):
        for byte in (0, 0x22, 0x7F, 0xFF):
            path.write_bytes(held[:place] + bytes([byte]) + held[place + 1 :])
            loads(folder)


def test_tensors(folder):
    path = weights(folder)
    held = path.read_bytes()
    state = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
    names = [name for name in state if name != "lm_head.weight" and "embed" not in name]  # which are tied to one another
    for name in (names[0], names[len(names) // 2], names[-1]):
        value = state[name]
        for wrong in (value[None], value.flatten()[:3].clone(), value.new_zeros(0), value.long(), value.bool(),
                      value.to(torch.complex64), torch.tensor(1.0), value.to(torch.float8_e4m3fn)):  # fmt: skip
            change(path, lambda s, name=name, wrong=wrong: s.update({name: wrong}))
            assert not loads(folder), (name, wrong.shape, wrong.dtype)
            path.write_bytes(held)
        change(path, lambda s, name=name: s.pop(name))
        assert not loads(folder), name
        path.write_bytes(held)
        change(path, lambda s, name=name: s.update({f"{name}.more": s[name].clone()}))
        assert not loads(folder), name
        path.write_bytes(held)
        change(path, lambda s, name=name: s.update({name: s[name] * float("nan")}))
        with pytest.warns(UserWarning, match="NaN or infinite"):
            gl.from_pretrained(folder, device="cpu")
        path.write_bytes(held)
    change(path, lambda s: s.clear())
    assert not loads(folder)


def sharded(folder):
    """The folder's weights in two shards, with an index: (path of the index, what it says)."""
    path = weights(folder)
    state = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
    names, end = list(state), path.suffix
    weight_map = {name: f"{'ab'[i % 2]}{end}" for i, name in enumerate(names)}
    for shard in ("a", "b"):
        part = {name: state[name].clone() for name in names if weight_map[name] == f"{shard}{end}"}
        save_file(part, folder / f"a{end}".replace("a", shard, 1), {"format": "pt"}) if end == ".safetensors" else (
            torch.save(part, folder / f"{shard}{end}")
        )
    path.unlink()
    index = folder / f"{path.name}.index.json"
    said = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    index.write_text(json.dumps(said))
    return index, said


def test_an_index(folder, tmp_path):
    index, said = sharded(folder)
    assert loads(folder)
    first = next(iter(said["weight_map"]))
    outside = tmp_path / f"outside{folder.suffix}"
    shutil.copy(folder / said["weight_map"][first], outside)
    wrong = [None, [], 3, {}, {first: None}, {first: 3}, {first: ["a"]}]
    wrong += [{**said["weight_map"], first: name} for name in
              (str(outside), f"../{outside.name}", "..", "", "/etc/passwd", "..\\x", "C:\\x", "nowhere.bin", "a/../b", 5)]  # fmt: skip
    for value in wrong:
        index.write_text(json.dumps({**said, "weight_map": value}))
        assert not loads(folder), value
    index.write_text(json.dumps({"metadata": {}}))
    assert not loads(folder)
    for text in (b"", b"{", b"[]", b"\xff\xfe", json.dumps(said).encode()[:-20], b'{"weight_map": {"a": "b", "a": "c"}}'):
        index.write_bytes(text)
        assert not loads(folder), text
    other = next(file for file in said["weight_map"].values() if file != said["weight_map"][first])
    index.write_text(json.dumps({**said, "weight_map": {**said["weight_map"], first: other}}))
    assert not loads(folder), "a tensor in another shard than the index says"
    index.write_text(json.dumps(said))
    shard = folder / other
    moved = load_file(folder / said["weight_map"][first]) if shard.suffix == ".safetensors" else torch.load(folder / said["weight_map"][first])  # fmt: skip
    held = shard.read_bytes()
    change(shard, lambda s: s.update({first: moved[first]}))
    assert not loads(folder), "a tensor in two shards"
    shard.write_bytes(held)
    assert loads(folder)
    shard.unlink()
    assert not loads(folder)
    shard.mkdir()
    assert not loads(folder)


# -- one file -------------------------------------------------------------------------------------------------------


def vim_state():
    return gl.from_pretrained("gatedlens/vim-digits", device="cpu").wrapped.state_dict()


FILES = {"rwkv": (rwkv_state, {}), "vim": (lambda: HookedViM.tiny(img_size=224, patch_size=16, stride=16).wrapped.state_dict(), {"variant": "vim_tiny"})}


@pytest.mark.parametrize("kind", list(FILES))
def test_one_file(tmp_path, kind):
    make, options = FILES[kind]
    state, path = {name: value.clone() for name, value in make().items()}, tmp_path / "model.pth"
    torch.save(state, path)
    assert loads(path, **options)
    held = path.read_bytes()
    for cut in (0, 1, 50, len(held) // 2, len(held) - 1):
        path.write_bytes(held[:cut])
        assert not loads(path, **options)
    for place in range(0, 1500, 23):
        path.write_bytes(held[:place] + b"\xff" + held[place + 1 :])
        loads(path, **options)
    for wrong in (3, None, [], {}, {"a": 1}, {1: torch.zeros(1)}, {"model": {}}, {"model": 3}, {"a": torch.zeros(1)}):
        torch.save(wrong, path)
        assert not loads(path, **options), wrong
    for name, value in state.items():
        for other in (None, value[None], value.flatten()[:3].clone(), value.new_zeros(0), torch.tensor(1.0), value.long()):
            changed = {k: v for k, v in {**state, name: other}.items() if v is not None}
            torch.save(changed, path)
            assert not loads(path, **options), (name, other if other is None else other.shape)

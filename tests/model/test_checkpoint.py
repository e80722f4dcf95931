"""Whatever is broken in a checkpoint, loading it works or raises a GatedlensError that names the file: every layout of
every architecture, every format, each key dropped, retyped, nulled; files flipped, cut, empty, folders in their place."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import FalconMambaConfig, FalconMambaForCausalLM, MambaConfig, MambaForCausalLM

import gatedlens as gl
from gatedlens.formats import recurrentgemma, rwkv_lm
from gatedlens.hooks import architectures
from gatedlens.hooks.griffin import HookedGriffin
from gatedlens.hooks.mamba import HookedMamba
from gatedlens.hooks.rwkv import HookedRWKV
from gatedlens.hooks.vim import HookedViM

WORDS = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 40, "state_size": 4}
ABSURD = (None, "no", [1, "x"], -1, 10**9, 10**30, 2.5, float("nan"))


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
        for theirs, our in recurrentgemma.RENAMES.items():
            if our != "temporal_block":
                name = name.replace(our, theirs)
        name = name.replace("temporal_block", new).replace("final_norm.weight", "final_norm.scale")
        out[name] = (value.squeeze(1).t() if name.endswith("conv_1d.w") else value).contiguous()
    return out


def rwkv_state():
    """A tiny RWKV by RWKV-LM's names."""
    words = {our: theirs for table in (rwkv_lm.NAMES, rwkv_lm.MIXES) for theirs, our in table.items()}
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


def read(path):
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path)


def write(state, path):
    state = {name: value.clone() for name, value in state.items()}
    save_file(state, path, {"format": "pt"}) if path.suffix == ".safetensors" else torch.save(state, path)


def change(path, function):
    """Rewrite the tensors of a file."""
    state = read(path)
    function(state)
    write(state, path)


def test_whole_it_loads(folder):
    assert loads(folder)


def test_every_key_of_a_config(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    kinds = [hooked for hooked in architectures().values() if config.get("model_type") in hooked.hub_types]
    known = kinds[0].hub_fields if kinds else config
    assert len(set(config) & set(known)) > 5
    for key in config:
        for value in (
            ABSURD if key in known else ABSURD[:2]
        ):  # the others are refused or not heard, which is slow to see
            path.write_text(json.dumps({**config, key: value}))
            loads(folder)
        path.write_text(json.dumps({k: v for k, v in config.items() if k != key}))
        loads(folder)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"3", b"\xff\xfe{}", b"{}", b"{" * 100_000, b'{"a": 1, "a": 2}']
)
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
    state = read(path)
    names = [
        name for name in state if name != "lm_head.weight" and "embed" not in name
    ]  # which are tied to one another
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
    state = read(path)
    weight_map = {name: f"{'ab'[i % 2]}{path.suffix}" for i, name in enumerate(state)}
    for shard in set(weight_map.values()):
        write({name: state[name] for name in state if weight_map[name] == shard}, folder / shard)
    path.unlink()
    index = folder / f"{path.name}.index.json"
    said = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    index.write_text(json.dumps(said))
    return index, said


ELSEWHERE = ("..", "", "/etc/passwd", "..\\x", "C:\\x", "nowhere.bin", "a/../b", 5, None, ["a"])


def test_an_index(folder, tmp_path):
    index, said = sharded(folder)
    assert loads(folder)
    first, own = next(iter(said["weight_map"].items()))
    outside = tmp_path / f"outside{Path(own).suffix}"
    shutil.copy(folder / own, outside)
    maps = [{**said["weight_map"], first: name} for name in (str(outside), f"../{outside.name}", *ELSEWHERE)]
    for value in (None, [], 3, {}, *maps):
        index.write_text(json.dumps({**said, "weight_map": value}))
        assert not loads(folder), value
    cut = json.dumps(said).encode()[:-20]
    for text in (b"", b"{", b"[]", b"{}", b"\xff\xfe", cut, b'{"weight_map": {"a": "b", "a": "c"}}'):
        index.write_bytes(text)
        assert not loads(folder), text
    other = next(file for file in said["weight_map"].values() if file != own)
    index.write_text(json.dumps({**said, "weight_map": {**said["weight_map"], first: other}}))
    assert not loads(folder), "a tensor in another shard than the index says"
    index.write_text(json.dumps(said))
    shard = folder / other
    held, moved = shard.read_bytes(), read(folder / own)[first]
    change(shard, lambda s: s.update({first: moved}))
    assert not loads(folder), "a tensor in two shards"
    shard.write_bytes(held)
    assert loads(folder)
    shard.unlink()
    assert not loads(folder)
    shard.mkdir()
    assert not loads(folder)


# -- one file -------------------------------------------------------------------------------------------------------


def vim_state():
    return HookedViM.tiny(img_size=224, patch_size=16, stride=16).wrapped.state_dict()


FILES = {"rwkv": (rwkv_state, {}), "vim": (vim_state, {"variant": "vim_tiny"})}


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
    for place in range(0, 1500, 71):
        path.write_bytes(held[:place] + b"\xff" + held[place + 1 :])
        loads(path, **options)
    for wrong in (3, None, [], {}, {"a": 1}, {1: torch.zeros(1)}, {"model": {}}, {"model": 3}, {"a": torch.zeros(1)}):
        torch.save(wrong, path)
        assert not loads(path, **options), wrong
    for name, value in list(state.items())[::3]:
        for other in (None, value[None], value.new_zeros(0), value.long()):
            changed = {k: v for k, v in {**state, name: other}.items() if v is not None}
            torch.save(changed, path)
            assert not loads(path, **options), (name, other if other is None else other.shape)


@pytest.mark.parametrize("kind", list(FILES))
def test_what_training_puts_around_a_file(tmp_path, kind):
    make, options = FILES[kind]
    state, path = make(), tmp_path / "model.pth"
    torch.save(state, path)
    whole = gl.from_pretrained(path, device="cpu", **options).wrapped.state_dict()
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "model."):
        for around in (None, "state_dict", "model", "model_state_dict"):
            named = {f"{prefix}{name}": value for name, value in state.items()}
            torch.save(named if around is None else {around: named, "epoch": 3}, path)
            found = gl.from_pretrained(path, device="cpu", **options).wrapped.state_dict()
            assert all(torch.equal(found[name], value) for name, value in whole.items())


def test_what_training_puts_around_a_folder(folder):
    whole = gl.from_pretrained(folder, device="cpu").wrapped.state_dict()
    for prefix in ("module.", "_orig_mod."):
        path, held = weights(folder), weights(folder).read_bytes()
        write({f"{prefix}{name}": value for name, value in read(path).items()}, path)
        found = gl.from_pretrained(folder, device="cpu").wrapped.state_dict()
        assert all(torch.equal(found[name], value) for name, value in whole.items())
        path.write_bytes(held)


def test_a_small_file_that_asks_for_much_is_refused_before_anything_is_built(tmp_path):
    state, path = rwkv_state(), tmp_path / "model.pth"
    far = torch.zeros(1).expand(10**5, 10**5)
    for more, message in (
        ({"blocks.100000.att.key.weight": torch.zeros(1)}, r"has blocks.100000 and lacks blocks.2: layers"),
        ({"blocks.x.att.key.weight": torch.zeros(1)}, r"has blocks.x; expected is the number"),
        ({"emb.weight": far}, r"emb.weight claims the shape \[100000, 100000\], and the file holds 4 bytes of it"),
        ({"blocks.1.att.key.weight": far}, r"blocks.1.att.key.weight claims"),
        ({"head.weight": torch.zeros(40, 16).to_sparse()}, r"head.weight is torch.sparse_coo"),
    ):
        torch.save({**state, **more}, path)
        with pytest.raises(gl.CheckpointError, match=message):
            gl.from_pretrained(path)
    many = {f"blocks.{i}.att.x": torch.zeros(1) for i in range(2_000)}
    torch.save({**{k: v for k, v in state.items() if not k.startswith("blocks.1.")}, **many}, path)
    with pytest.raises(gl.CheckpointError, match="asks for 2000 layers"):
        gl.from_pretrained(path)


@pytest.mark.parametrize(
    ("key", "version"),
    [("att.time_maa_k", 6), ("att.ln_x.weight", 5), ("att.gate.weight", 5)],
)
def test_later_versions_of_rwkv_are_named(tmp_path, key, version):
    torch.save({**rwkv_state(), f"blocks.0.{key}": torch.zeros(16)}, tmp_path / "model.pth")
    with pytest.raises(
        gl.CheckpointError, match=f"model.pth: This is RWKV-{version} .*, and no RWKV-4. .* reads RWKV-5.2, RWKV-6"
    ):
        gl.from_pretrained(tmp_path / "model.pth")
    torch.save({"emb.weight": torch.zeros(9, 4), f"blocks.0.{key}": torch.zeros(4)}, tmp_path / "model.pth")
    with pytest.raises(gl.CheckpointError, match=f"This is RWKV-{version}"):
        gl.from_pretrained(tmp_path / "model.pth")
    LAYOUTS["RWKV-LM's"](tmp_path / "folder")
    change(tmp_path / "folder" / "model.safetensors", lambda s: s.update({f"blocks.1.{key}": torch.zeros(16)}))
    with pytest.raises(gl.CheckpointError, match=f"This is RWKV-{version}"):
        gl.from_pretrained(tmp_path / "folder")

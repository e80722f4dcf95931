"""from_pretrained and wrap: both layouts, shards, old configs, dtypes, and every way in which a checkpoint can be wrong."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MambaModel,
)

import gatedlens as gl
from gatedlens.hooks.mamba import HookedMamba
from tests.helpers import golden, relative

TOKENS = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(0))


def hf_model(**sizes):
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(**{"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 40} | sizes)).eval()


@pytest.fixture
def hf_folder(tmp_path):
    hf_model().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def original_folder(tmp_path):
    """A checkpoint as the hub's state-spaces/mamba-* hold it: an old config.json and a pickle of tensors."""
    model = HookedMamba.tiny(vocab_size=37)
    config = {"d_model": 16, "n_layer": 2, "vocab_size": 37, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True,
              "fused_add_norm": True, "pad_vocab_size_multiple": 8}  # fmt: skip
    model = HookedMamba.tiny(vocab_size=37, ssm_cfg={})
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(model.wrapped.state_dict(), tmp_path / "pytorch_model.bin")
    return tmp_path, model


@torch.no_grad()
def test_transformers_layout(hf_folder):
    model = gl.from_pretrained(hf_folder, device="cpu")
    assert isinstance(model, gl.HookedMamba) and not model.training
    assert relative(model(TOKENS), hf_model()(TOKENS).logits) < 1e-5
    assert model.cfg.model_name == str(hf_folder) and model.tokenizer is None


@torch.no_grad()
def test_sharded_safetensors_and_dtype(tmp_path):
    hf_model().save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert relative(gl.from_pretrained(tmp_path, device="cpu")(TOKENS), hf_model()(TOKENS).logits) < 1e-5
    model = gl.from_pretrained(tmp_path, dtype="bfloat16", device="cpu")
    assert model.cfg.dtype == torch.bfloat16 and model.W_E.dtype == torch.bfloat16
    assert gl.from_pretrained(tmp_path, dtype=torch.float64, device="cpu").cfg.dtype == torch.float64
    with pytest.raises(gl.CheckpointError, match="float16, bfloat16, float32, float64"):
        gl.from_pretrained(tmp_path, dtype="float31")


@torch.no_grad()
def test_original_layout(original_folder):
    folder, model = original_folder
    loaded = gl.from_pretrained(folder, device="cpu")
    assert torch.equal(loaded(TOKENS % 37), model(TOKENS % 37))
    assert loaded.cfg.d_vocab == 40, "37 is padded to a multiple of 8"
    assert loaded.wrapped.lm_head.weight is loaded.wrapped.backbone.embedding.weight


@torch.no_grad()
@pytest.mark.parametrize("rms_norm", [True, False])
def test_original_layout_in_shards_of_safetensors(tmp_path, rms_norm):
    model = HookedMamba.tiny(rms_norm=rms_norm)
    state = {k: v.clone() for k, v in model.wrapped.state_dict().items() if k != "lm_head.weight"}
    config = {"d_model": 16, "n_layer": 2, "vocab_size": 40, "ssm_cfg": {"d_state": 4}, "rms_norm": rms_norm,
              "d_intermediate": 0, "attn_layer_idx": [], "tie_embeddings": True}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = sorted(state)
    halves = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for shard, keys in halves.items():
        save_file({k: state[k] for k in keys}, tmp_path / shard)
    index = {"weight_map": {k: shard for shard, keys in halves.items() for k in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(gl.from_pretrained(tmp_path, device="cpu")(TOKENS), model(TOKENS))
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(gl.CheckpointError, match=r"lacks the shard b.safetensors"):
        gl.from_pretrained(tmp_path)


@torch.no_grad()
def test_golden_weights_load_from_a_folder(tmp_path):
    config, weights, io = golden("mamba1_lm")
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "model.safetensors")
    assert relative(gl.from_pretrained(tmp_path, device="cpu")(io["input_ids"]), io["logits"]) < 1e-5


def test_a_hub_name_is_looked_up_in_the_hubs_cache(tmp_path, monkeypatch):
    """The hub's folder layout, offline: models--org--name/snapshots/<commit>. The hub is asked for nothing."""
    asked = "huggingface_hub.file_download.get_hf_file_metadata"
    monkeypatch.setattr(asked, lambda url, **how: pytest.fail(f"the hub was asked for {url}"))
    commit = "0" * 40
    root = tmp_path / "models--some--mamba"
    hf_model().save_pretrained(root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    model = gl.from_pretrained("some/mamba", cache_dir=str(tmp_path), local_files_only=True, device="cpu")
    assert relative(model(TOKENS), hf_model()(TOKENS).logits) < 1e-5
    assert model.cfg.model_name == "some/mamba"
    with pytest.raises(gl.CheckpointError, match="some/other"):
        gl.from_pretrained("some/other", cache_dir=str(tmp_path), local_files_only=True)


def test_the_bundled_models_are_in_hub_layout():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gatedlens.loading import BUNDLED

    assert {"gatedlens/mamba-recall", "gatedlens/mamba-moby"} <= set(gl.bundled_models())
    folder = BUNDLED / "mamba-moby"
    model = gl.from_pretrained("gatedlens/mamba-moby", device="cpu")
    tokens = AutoTokenizer.from_pretrained(folder)("Call me", return_tensors="pt").input_ids
    with torch.no_grad():
        assert relative(model(tokens), AutoModelForCausalLM.from_pretrained(folder)(tokens).logits) < 1e-5


# -- what is wrong --------------------------------------------------------------------------------------------------


def change(folder, function):
    """Rewrite model.safetensors of a folder."""
    path = folder / "model.safetensors"
    state = load_file(path)
    function(state)
    save_file(state, path, {"format": "pt"})


def test_missing_extra_and_misshapen_weights_are_named(hf_folder):
    key = "backbone.layers.1.mixer.A_log"
    change(hf_folder, lambda s: s.pop(key))
    with pytest.raises(gl.CheckpointError, match=f"is missing 1 weights: {key}"):
        gl.from_pretrained(hf_folder)
    change(hf_folder, lambda s: s.update({key: torch.zeros(32, 16), "backbone.layers.7.what": torch.zeros(1)}))
    with pytest.raises(gl.CheckpointError, match=r"has unknown 1 weights: backbone.layers.7.what"):
        gl.from_pretrained(hf_folder)
    change(hf_folder, lambda s: (s.pop("backbone.layers.7.what"), s.update({key: torch.zeros(32, 15)})))
    with pytest.raises(gl.CheckpointError, match=key):
        gl.from_pretrained(hf_folder)


def test_missing_extra_and_misshapen_weights_of_an_original_are_named(original_folder):
    folder, model = original_folder
    state = model.wrapped.state_dict()
    for change, message in (
        (lambda s: s.pop("backbone.norm_f.weight"), "is missing 1 weights: backbone.norm_f.weight"),
        (lambda s: s.update(extra=torch.zeros(1)), "has unknown 1 weights: extra"),
        (
            lambda s: s.update({"backbone.norm_f.weight": torch.zeros(3)}),
            r"has misshapen 1 weights: .*\[3\] for \[16\]",
        ),
    ):
        wrong = dict(state)
        change(wrong)
        torch.save(wrong, folder / "pytorch_model.bin")
        with pytest.raises(gl.CheckpointError, match=message):
            gl.from_pretrained(folder)


@pytest.mark.parametrize("cut", [7, 200, 4000])
def test_truncated_safetensors(hf_folder, cut):
    path = hf_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(gl.CheckpointError, match="model.safetensors is damaged or cut short"):
        gl.from_pretrained(hf_folder)


@pytest.mark.parametrize("cut", [0, 7, 4000])
def test_truncated_pickle_or_safetensors_of_an_original(original_folder, cut):
    folder, model = original_folder
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(gl.CheckpointError):
        gl.from_pretrained(folder)
    path.unlink()
    save_file({k: v.clone() for k, v in model.wrapped.state_dict().items()}, folder / "model.safetensors")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:cut])
    with pytest.raises(gl.CheckpointError, match="damaged or cut short"):
        gl.from_pretrained(folder)


class Evil:
    def __reduce__(self):
        return (print, ("the pickle ran code",))


def test_a_pickle_that_carries_code_is_refused(original_folder, capsys):
    folder, _ = original_folder
    torch.save({"a": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(gl.CheckpointError, match="is refused"):
        gl.from_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(gl.CheckpointError):
        gl.from_pretrained(folder)
    torch.save([1, 2], folder / "pytorch_model.bin")
    with pytest.raises(gl.CheckpointError, match="holds no state dict"):
        gl.from_pretrained(folder)
    assert "the pickle ran code" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2', which gatedlens does not support. Supported are .*Mamba"),
        ({"architecture": "x"}, "a config.json with architecture"),
        ({"d_model": 16, "n_layer": 2, "vocab_size": 40, "ssm_cfg": {"layer": "Mamba3"}}, "ssm_cfg.layer is 'Mamba3'"),
        ({"d_model": 16, "n_layer": 2, "vocab_size": 40, "ssm_cfg": {"d_stat": 3}}, "asks for d_stat"),
        ({"d_model": 16, "n_layer": 2, "vocab_size": 40, "attn_layer_idx": [1]}, "mixes Mamba with attention"),
        ({"d_model": 16, "n_layer": 2, "vocab_size": 40, "d_intermediate": 64}, "mixes Mamba with attention"),
    ],
)
def test_unsupported_configs_are_refused_by_name(original_folder, config, message):
    folder, _ = original_folder
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(gl.CheckpointError, match=message):
        gl.from_pretrained(folder)


def test_places_where_nothing_is(tmp_path):
    with pytest.raises(gl.CheckpointError, match="has no config.json"):
        gl.from_pretrained(tmp_path)
    with pytest.raises(gl.CheckpointError, match="There is no folder"):
        gl.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(gl.CheckpointError, match="Did you mean 'gatedlens/mamba-recall'"):
        gl.from_pretrained("gatedlens/mamba-recal")
    (tmp_path / "config.json").write_text(json.dumps({"d_model": 16, "n_layer": 2, "vocab_size": 40}))
    with pytest.raises(gl.CheckpointError, match=r"neither model.safetensors nor pytorch_model.bin"):
        gl.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(gl.CheckpointError, match="cannot be loaded"):
        gl.from_pretrained(tmp_path)


def test_wrap_refuses_what_it_does_not_know():
    with pytest.raises(gl.CheckpointError, match="does not know GPT2LMHeadModel"):
        gl.wrap(GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=10)))
    with pytest.raises(gl.CheckpointError, match="with its head"):
        gl.wrap(MambaModel(MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=10)))
    with pytest.raises(gl.CheckpointError, match="is a HookedMamba already"):
        gl.wrap(HookedMamba.tiny())
    llama = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, num_hidden_layers=1, vocab_size=10, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=16,
        )
    )  # fmt: skip
    with pytest.raises(gl.CheckpointError, match="does not know LlamaForCausalLM"):
        gl.wrap(llama)
    with pytest.raises(gl.CheckpointError, match="supports 'silu'"):
        gl.wrap(hf_model(hidden_act="gelu"))


def test_adapted_layers_are_refused_since_their_forward_would_be_lost():
    class Adapted(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    class Peft(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer = base

    for make in (lambda old: Adapted(16, 64, bias=False), Peft):
        model = hf_model()
        model.backbone.layers[1].mixer.in_proj = make(model.backbone.layers[1].mixer.in_proj)
        with pytest.raises(gl.CheckpointError, match=r"layers.1.mixer.in_proj is a (.|\n)*Merge"):
            gl.wrap(model)


def test_names_and_models_are_told_apart():
    with pytest.raises(gl.CheckpointError, match="gl.wrap"):
        gl.from_pretrained(hf_model())
    with pytest.raises(gl.CheckpointError, match="gl.from_pretrained"):
        gl.wrap("state-spaces/mamba-130m-hf")


# -- what stands around a model, or instead of one ------------------------------------------------------------------


def test_what_is_around_a_model_points_at_it(hooked):
    inner = hooked.tiny().wrapped
    kind = type(inner).__name__
    with pytest.raises(gl.CheckpointError, match=rf"DataParallel is around a {kind}: gl.wrap\(model.module\)"):
        gl.wrap(torch.nn.DataParallel(inner))
    with pytest.raises(gl.CheckpointError, match=r"gl.wrap\(model._orig_mod\)"):
        gl.wrap(torch.compile(inner))

    class Lightning(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.ModuleDict({"inner": inner})

    with pytest.raises(gl.CheckpointError, match=rf"Lightning is around a {kind}: gl.wrap\(model.net.inner\)"):
        gl.wrap(Lightning())


def test_namesakes_are_told_what_to_do():
    class Mamba(torch.nn.Module):
        pass

    with pytest.raises(gl.CheckpointError, match=r"mambapy's or mamba-minimal's .*backbone.embedding.weight"):
        gl.wrap(Mamba())

    class MambaForCausalLM(torch.nn.Module):
        pass

    with pytest.raises(gl.CheckpointError, match="MambaForCausalLM.* is not built as Mamba is: .*backbone"):
        gl.wrap(MambaForCausalLM())


@pytest.mark.filterwarnings("ignore")
def test_quantised_models_are_refused(hooked):
    model = torch.ao.quantization.quantize_dynamic(hooked.tiny().wrapped, {torch.nn.Linear})
    with pytest.raises(gl.CheckpointError, match="without quantisation"):
        gl.wrap(model)

    class QuantLinear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("qweight", torch.zeros(2, 2, dtype=torch.int32))

    model = hooked.tiny().wrapped
    model.more = QuantLinear()
    with pytest.raises(gl.CheckpointError, match="without quantisation"):
        gl.wrap(model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.bool])
def test_weights_that_are_no_floats_are_refused(hooked, dtype):
    wrapped = hooked.tiny().wrapped
    name, p = next(iter(wrapped.named_parameters()))
    owner = wrapped.get_submodule(name.rpartition(".")[0])
    setattr(owner, name.rpartition(".")[2], torch.nn.Parameter(p.to(dtype), requires_grad=False))
    with pytest.raises(gl.CheckpointError, match=f"{name} is .*expected are floats"):
        gl.wrap(wrapped)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_told(hooked, value):
    wrapped = hooked.tiny().wrapped
    name, p = list(wrapped.named_parameters())[1]
    with torch.no_grad():
        p.flatten()[0] = value
    with pytest.warns(UserWarning, match=f"{name} hold NaN or infinite numbers"):
        gl.wrap(wrapped)


def test_values_of_a_config_are_checked_when_a_model_is_wrapped(hooked):
    wrapped = hooked.tiny().wrapped
    config = wrapped.config if isinstance(wrapped.config, dict) else vars(wrapped.config)
    known = hooked.layout.fields if isinstance(wrapped.config, dict) else hooked.hub_fields
    for key in known:
        if key in config:
            before = config[key]
            config[key] = object()
            with pytest.raises(
                gl.CheckpointError, match=rf"(config|attributes): {key} is .*expected is|is not built as"
            ):
                gl.wrap(wrapped)
            config[key] = before
    gl.wrap(wrapped)
    if "residual_in_fp32" in config:
        config["residual_in_fp32"] = "no"
        with pytest.raises(gl.CheckpointError, match="residual_in_fp32 is 'no'; expected is true or false"):
            gl.wrap(wrapped)


def test_options_of_other_tools():
    folding = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
    model = gl.from_pretrained("gatedlens/mamba-recall", device="cpu", **folding)
    assert torch.equal(model.W_U, gl.from_pretrained("gatedlens/mamba-recall", device="cpu").W_U)
    for name in (*folding, "refactor_factored_attn_matrices"):
        with pytest.raises(gl.CheckpointError, match=f"{name}=True: gatedlens folds nothing"):
            gl.from_pretrained("gatedlens/mamba-recall", **{name: True})
    with pytest.raises(gl.CheckpointError, match=r"hf_model is no option of gl.from_pretrained: gl.wrap"):
        gl.from_pretrained("gatedlens/mamba-recall", hf_model=hf_model())
    for name in ("gatedlens/mamba-recall", "gatedlens/vim-digits"):
        with pytest.raises(gl.CheckpointError, match="revison"):
            gl.from_pretrained(name, revison="main")
        for device in ("gpu", "cuda:77", "cpu:x"):
            with pytest.raises(gl.CheckpointError, match=f"device='{device}': expected is a device of this machine"):
                gl.from_pretrained(name, device=device)


@pytest.mark.parametrize("name", [None, 3, "", " ", b"x", [], "a" * 5000, "a\0b", "."])
def test_what_is_no_name(name):
    with pytest.raises(gl.CheckpointError):
        gl.from_pretrained(name, local_files_only=True)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("minimax_m2", "which gatedlens does not support. This MiniMax is a transformer"),
        ("minimax_m1", "which gatedlens does not support. This is MiniMax's makers' own code.*MiniMax-M1-40k-hf"),
        ("minimax_text_01", "which gatedlens does not support. This is MiniMax's makers' own code.*Text-01-hf"),
    ],
)
def test_namesakes_of_minimax_are_refused_by_name(tmp_path, kind, match):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "hidden_size": 16}))
    with pytest.raises(gl.CheckpointError, match=f"'{kind}', {match}"):
        gl.from_pretrained(str(tmp_path), device="cpu")

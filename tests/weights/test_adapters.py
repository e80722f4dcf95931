"""LoRA and DoRA of peft, merged as they are read: against peft's own merge, in value and in gradient; and what is refused."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from torch import nn

import gatedlens as gl
from tests.helpers import relative

peft = pytest.importorskip("peft")
TOKENS = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(0))
KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "dora": {"use_dora": True, "target_modules": ["in_proj", "x_proj"]},
    "bias": {"lora_bias": True, "target_modules": ["in_proj"]},
}


def mamba(dtype=torch.float64, **sizes):
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "vocab_size": 40,
        "state_size": 4,
        "tie_word_embeddings": False,
        **sizes,
    }
    return MambaForCausalLM(MambaConfig(**sizes)).to(dtype).eval()


def adapted(model=None, **options):
    """A PeftModel whose adapter does something."""
    model = mamba(use_bias="lora_bias" in options) if model is None else model
    torch.manual_seed(1)
    given = {"r": 3, "target_modules": ["in_proj", "x_proj", "embeddings"], "init_lora_weights": False, **options}
    outer = peft.get_peft_model(model, peft.LoraConfig(**given)).eval()
    with torch.no_grad():
        for name, p in outer.named_parameters():
            if "magnitude" in name:
                p.mul_(1.3)
    return outer


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_read_is_pefts_merged_model(kind):
    outer = adapted(**KINDS[kind])
    merged, hooked = gl.wrap(copy.deepcopy(outer).merge_and_unload()), gl.wrap(outer)
    assert relative(hooked(TOKENS), merged(TOKENS)) < 1e-12
    with outer.disable_adapter():
        assert relative(merged(TOKENS), hooked(TOKENS)) > 1e-2
    wanted, got = gl.implicit_attention(merged, TOKENS, layer=1), gl.implicit_attention(hooked, TOKENS, layer=1)
    assert torch.allclose(got.mean(), wanted.mean(), atol=1e-12) and got.check().relative < 1e-12
    assert torch.equal(hooked.W_E, hooked.wrapped.backbone.embeddings.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_adapter(kind):
    """Against peft's own forward; its Mamba computes in float32 inside."""
    outer = adapted(**KINDS[kind])
    outer(TOKENS).logits.pow(2).mean().backward()
    wanted = {name: p.grad.clone() for name, p in outer.named_parameters() if p.grad is not None}
    outer.zero_grad()
    gl.wrap(outer)(TOKENS).pow(2).mean().backward()
    got = {name: p.grad for name, p in outer.named_parameters() if p.grad is not None}
    assert got.keys() == wanted.keys() and any("lora_B" in name for name in got)
    for name, grad in wanted.items():
        assert relative(got[name], grad) < 2e-5, name


def test_a_step_of_training_is_seen_at_the_next_call():
    outer = adapted()
    hooked, optimiser = gl.wrap(outer), torch.optim.SGD([p for p in outer.parameters() if p.requires_grad], 1e-2)
    before = hooked(TOKENS, return_type="loss")
    before.backward()
    optimiser.step()
    after = hooked(TOKENS, return_type="loss")
    assert after < before
    assert relative(after, gl.wrap(copy.deepcopy(outer).merge_and_unload())(TOKENS, return_type="loss")) < 1e-12


@torch.no_grad()
def test_which_adapters_are_on_is_asked_at_each_call():
    outer = adapted()
    outer.add_adapter("second", peft.LoraConfig(r=2, target_modules=["in_proj"], init_lora_weights=False))
    hooked, plain = gl.wrap(outer), gl.wrap(mamba())
    first = hooked(TOKENS)
    with outer.disable_adapter():
        assert torch.equal(hooked(TOKENS), plain(TOKENS))
    outer.set_adapter("second")
    second = hooked(TOKENS)
    assert relative(second, first) > 1e-3
    outer.merge_adapter(["second"])
    assert relative(hooked(TOKENS), second) < 1e-12  # in the base weight now, and counted once
    outer.unmerge_adapter()
    outer.set_adapter("default")
    assert relative(hooked(TOKENS), first) < 1e-12


@torch.no_grad()
def test_modules_that_are_trained_whole():
    outer = adapted(mamba(), target_modules=["in_proj"], modules_to_save=["lm_head"])
    outer.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    hooked = gl.wrap(outer)
    assert torch.equal(hooked.W_U, outer.base_model.model.lm_head.modules_to_save["default"].weight.T)
    assert relative(hooked(TOKENS), gl.wrap(copy.deepcopy(outer).merge_and_unload())(TOKENS)) < 1e-12
    with outer.disable_adapter():
        assert torch.equal(hooked(TOKENS), gl.wrap(mamba())(TOKENS))


@torch.no_grad()
def test_hooks_states_generation_and_sweeps_on_a_model_with_an_adapter():
    outer = adapted()
    hooked, merged = gl.wrap(outer), gl.wrap(copy.deepcopy(outer).merge_and_unload())
    zero = [("blocks.0.mixer.hook_gate", lambda gate, hook: gate * 0)]
    assert (
        relative(hooked.run_with_hooks(TOKENS, fwd_hooks=zero), merged.run_with_hooks(TOKENS, fwd_hooks=zero)) < 1e-12
    )
    _, state = hooked(TOKENS[:, :4], return_state=True)
    assert relative(hooked(TOKENS[:, 4:], state=state), merged(TOKENS)[:, 4:]) < 1e-12
    options = {"max_new_tokens": 3, "temperature": 0, "verbose": False}
    assert torch.equal(hooked.generate(TOKENS, **options), merged.generate(TOKENS, **options))
    clean = merged.run_with_cache(TOKENS, names_filter="blocks.*.hook_resid_pre")[1]
    metric = gl.metrics.logit_difference(TOKENS[:, 0], TOKENS[:, 1])
    swept = [
        gl.patching.get_act_patch_resid_pre(m, TOKENS.flip(1), clean, metric, progress=False) for m in (hooked, merged)
    ]
    assert torch.allclose(*(one.values for one in swept), atol=1e-12)
    twin = copy.deepcopy(hooked)
    assert torch.equal(twin(TOKENS), hooked(TOKENS))
    for p in twin.wrapped.parameters():
        p.zero_()
    assert relative(hooked(TOKENS), merged(TOKENS)) < 1e-12, "a copy has weights of its own"


@torch.no_grad()
def test_an_adapter_that_comes_later_is_followed():
    mine = mamba()
    hooked = gl.wrap(mine)
    before = hooked(TOKENS)
    assert hooked.wrapped is mine
    outer = adapted(mine)
    now = hooked(TOKENS)
    assert relative(now, before) > 1e-2 and torch.equal(now, gl.wrap(outer)(TOKENS))
    assert torch.equal(gl.wrap(hooked.wrapped)(TOKENS), now)
    outer.unload()
    assert torch.equal(hooked(TOKENS), before) and hooked.wrapped is mine


# -- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """(base, adapter): two folders, the adapter's naming the base."""
    mamba(torch.float32).save_pretrained(tmp_path / "base")
    outer = adapted(mamba(torch.float32))
    outer.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    return tmp_path / "base", tmp_path / "adapter", gl.wrap(outer)(TOKENS)


@torch.no_grad()
def test_a_folder_over_beside_and_instead_of_a_model(folders):
    base, adapter, wanted = folders
    over = gl.from_pretrained(base, adapter=adapter, device="cpu")
    assert torch.equal(over(TOKENS), wanted) and not over.training
    assert torch.equal(gl.from_pretrained(adapter, device="cpu")(TOKENS), wanted)
    for file in base.iterdir():
        shutil.copy(file, adapter / file.name)
    assert torch.equal(gl.from_pretrained(adapter, device="cpu")(TOKENS), wanted)


def test_folders_that_do_not_fit_are_refused(folders, tmp_path):
    base, adapter, _ = folders
    with pytest.raises(gl.CheckpointError, match="there is no adapter_config.json"):
        gl.from_pretrained(base, adapter=base, device="cpu")
    mamba(torch.float32, num_hidden_layers=1).save_pretrained(tmp_path / "short")
    with pytest.raises(gl.CheckpointError, match="has unknown .* weights: .*another model"):
        gl.from_pretrained(tmp_path / "short", adapter=adapter, device="cpu")
    mamba(torch.float32, num_hidden_layers=3).save_pretrained(tmp_path / "long")
    with pytest.raises(gl.CheckpointError, match="lacks .* weights: .*another model"):
        gl.from_pretrained(tmp_path / "long", adapter=adapter, device="cpu")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(gl.CheckpointError, match="names no base model"):
        gl.from_pretrained(adapter, device="cpu")


# -- what is refused --------------------------------------------------------------------------------------------------


def test_dropout_in_front_of_an_adapter_cannot_be_merged():
    hooked = gl.wrap(adapted(lora_dropout=0.1))
    hooked(TOKENS)
    hooked.wrapped.train()
    with pytest.raises(gl.CheckpointError, match="lora_dropout=0.1 and the model trains"):
        hooked(TOKENS)
    hooked.wrapped.eval()
    hooked(TOKENS)


REFUSED = {
    "IA3": (lambda: peft.IA3Config(target_modules=["in_proj"], feedforward_modules=[]), "LoRA and DoRA are merged on read"),
    "a parameter": (lambda: peft.LoraConfig(r=2, target_parameters=["mixer.A_log"], target_modules=[]), "adapts"),
    "aLoRA": (
        lambda: peft.LoraConfig(r=2, target_modules=["in_proj"], alora_invocation_tokens=[1]),
        r"ALoraLinearVariant \(default\); plain LoRA and DoRA",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_other_adapters_are_refused_by_name(kind):
    make, message = REFUSED[kind]
    model = mamba()
    peft.inject_adapter_in_model(make(), model)
    with pytest.raises(gl.CheckpointError, match=message):
        gl.wrap(model)


def test_prompts_are_refused_by_name():
    class Prompted(nn.Module):
        """As much of a PeftModel as tells what it is."""

        active_peft_config = peft.PromptTuningConfig(num_virtual_tokens=2)

        def __init__(self):
            super().__init__()
            self.base_model = mamba()

    Prompted.__module__ = "peft.peft_model"
    with pytest.raises(gl.CheckpointError, match="PROMPT_TUNING, which puts learned tokens into the input"):
        gl.wrap(Prompted())

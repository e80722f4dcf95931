"""SAELens trains on our model: `override_model`, its ActivationsStore, at points wide and lazy.

Skipped where SAELens is not installed; see `gatedlens/compat/sae_lens.py` for which versions can be.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformer_lens

import gatedlens as gl
from gatedlens import store
from gatedlens.compat import sae_lens as compat
from tests.helpers import example


@pytest.fixture(scope="module")
def sae_lens():
    if importlib.util.find_spec("sae_lens") is None:
        pytest.skip("sae_lens is not installed")
    return compat.load()


def test_without_sae_lens_the_error_says_what_to_install():
    if importlib.util.find_spec("sae_lens") is None:
        with pytest.raises(ImportError, match="sae-lens==6.51.*"):
            compat.load()
    else:
        assert compat.load().__name__ == "sae_lens"


def test_the_stand_ins_are_for_removed_names_alone():
    """TransformerLens 4 has none of them; what is left of it under another name is that, and the rest is nothing's class."""
    standing = compat.stand_ins()
    home = Path(transformer_lens.__file__).parent
    assert not any((home / name.partition(".")[2].replace(".", "/")).with_suffix(".py").exists() for name in standing)
    old = standing["transformer_lens.HookedTransformer"]
    assert old.HookedRootModule is transformer_lens.HookedRootModule
    assert not isinstance(gl.HookedMamba.tiny(), old.HookedTransformer)
    assert standing["transformer_lens.utils"].get_act_name is transformer_lens.utilities.get_act_name


def run_config(sae_lens, folder, hook_name, width):
    return sae_lens.LanguageModelSAERunnerConfig(
        sae=sae_lens.StandardTrainingSAEConfig(d_in=width, d_sae=2 * width, normalize_activations="none"),
        model_name="gatedlens",
        dataset_path="none",
        hook_name=hook_name,
        is_dataset_tokenized=True,
        prepend_bos=False,
        context_size=8,
        streaming=False,
        training_tokens=64,
        train_batch_size_tokens=16,
        n_batches_in_buffer=4,
        store_batch_size_prompts=2,
        device="cpu",
        dtype="float32",
        n_checkpoints=0,
        checkpoint_path=None,
        output_path=None,
        logger=sae_lens.LoggingConfig(log_to_wandb=False),
    )


@pytest.mark.parametrize("word", ["hook_resid_post", "mixer.hook_gated", "mixer.hook_state"])
def test_training_with_override_model(sae_lens, lm, tmp_path, word):
    model = type(lm).tiny(seed=0)
    name = f"blocks.1.{word}"
    width = model.names[name].elements(model.cfg.sizes, batch=1, pos=1)
    tokens = example(model, 64, 8)
    data = pytest.importorskip("datasets").Dataset.from_dict({"tokens": tokens.tolist()})
    config = run_config(sae_lens, tmp_path, name, width)
    runner = sae_lens.LanguageModelSAETrainingRunner(config, override_dataset=data, override_model=model)
    stored = runner.activations_store.get_activations(tokens[:2])
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens[:2], names_filter=name)
    assert torch.equal(stored, cache[name].flatten(2).float())
    sae = runner.run()
    assert sae.W_dec.shape == (2 * width, width) and torch.isfinite(sae.W_dec).all()


def test_sae_lens_trains_on_a_store(sae_lens, lm, tmp_path):
    """`use_cached_activations` reads the Arrow folder of a harvest as SAELens's own: the same batches, bit for bit."""
    model, name = type(lm).tiny(seed=0), "blocks.1.hook_resid_post"
    tokens = example(model, 16, 8)
    held = store.harvest(model, tokens, name, tmp_path / "out", batch_size=3, shard_bytes=1000, progress=False)
    config = run_config(sae_lens, tmp_path, name, model.cfg.d_model)
    config.use_cached_activations, config.cached_activations_path = True, str(tmp_path / "out" / "activations")
    data = pytest.importorskip("datasets").Dataset.from_dict({"tokens": tokens.tolist()})
    runner = sae_lens.LanguageModelSAETrainingRunner(config, override_dataset=data, override_model=model)
    for first in (0, 2, 4):
        got, ids = runner.activations_store.get_raw_llm_batch()
        assert torch.equal(got, held[name][first : first + 2].flatten(0, 1))
        assert torch.equal(ids.long(), tokens[first : first + 2].flatten())
    assert torch.isfinite(runner.run().W_dec).all()


def test_splicing_an_sae_back_in(sae_lens, lm):
    """An SAE of SAELens as a hook: the loss with its reconstruction."""
    model = type(lm).tiny(seed=0)
    config = sae_lens.StandardSAEConfig(d_in=model.cfg.d_model, d_sae=32, dtype="float32", device="cpu")
    sae, tokens = sae_lens.SAE.from_dict(config.to_dict()), example(model, 2, 8)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        want = model(sae(cache["resid_post", 0]), start_at_layer=1)
        got = model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_resid_post", lambda x, hook: sae(x))])
    assert torch.allclose(got, want, atol=1e-5) and isinstance(model, gl.HookedLanguageModel)

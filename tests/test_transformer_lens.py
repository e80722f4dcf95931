"""TransformerLens 4's own tools on our models, unchanged."""

from __future__ import annotations

import torch
import transformer_lens
from transformer_lens import patching
from transformer_lens.model_protocol import TransformerLensModel, TransformerLensModelWithWeights

import gatedlens as gl
from tests.helpers import example, relative


def test_the_structural_protocols_hold(lm):
    assert isinstance(lm, TransformerLensModel) and isinstance(lm, TransformerLensModelWithWeights)
    assert isinstance(lm, transformer_lens.HookedRootModule)
    assert all(isinstance(p, transformer_lens.hook_points.HookPoint) for p in lm.hook_dict.values())


@torch.no_grad()
def test_get_act_patch_resid_pre_and_mixer_out(lm):
    """Layer x position, clean into corrupted, as TransformerLens runs it; each cell against a run by hand."""
    clean, corrupted = example(lm, 1, 5, seed=0), example(lm, 1, 5, seed=1)
    _, cache = lm.run_with_cache(clean)

    def metric(logits):
        return logits[:, -1, 3].sum()

    for name, function in (
        ("resid_pre", patching.get_act_patch_resid_pre),
        ("attn_out", patching.get_act_patch_attn_out),
    ):
        if name == "attn_out" and "blocks.0.hook_attn_out" not in lm.names.aliases:
            continue
        full = {"resid_pre": "hook_resid_pre", "attn_out": "hook_mixer_out"}[name]
        result = function(lm, corrupted, cache, metric)
        for layer in range(lm.cfg.n_layers):
            for pos in range(5):

                def patch(x, hook, layer=layer, pos=pos, full=full):
                    x[:, pos] = cache[f"blocks.{layer}.{full}"][:, pos]

                want = metric(lm.run_with_hooks(corrupted, fwd_hooks=[(f"blocks.{layer}.{full}", patch)]))
                assert torch.allclose(result[layer, pos].double(), want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_logit_lens_ends_in_the_logits():
    model = gl.from_pretrained("gatedlens/mamba-moby", device="cpu")
    logits, cache = model.run_with_cache("Call me")
    lens = cache.logit_lens()
    assert len(lens.labels) == model.cfg.n_layers + 1
    assert relative(lens.values[-1].reshape(-1), logits[0, -1]) < 1e-4


@torch.no_grad()
def test_logit_attrs(lm):
    tokens = example(lm, 1, 5)
    _, cache = lm.run_with_cache(tokens)
    parts = cache.decompose_resid()
    attrs = cache.logit_attrs(parts, tokens=3)
    scale = cache["ln_final.hook_scale"]
    want = torch.einsum("cbpd,d->cbp", parts / scale, lm.W_U[:, 3])
    if lm.cfg.normalization_type == "RMS":
        assert relative(attrs.double(), want) < 1e-5
    assert attrs.shape == (len(parts), 1, 5)


@torch.no_grad()
def test_cache_methods(lm):
    _, cache = lm.run_with_cache(example(lm, 1, 5))
    assert cache.to("cpu") is not None
    assert cache.stack_activation("mixer_out").shape[0] == lm.cfg.n_layers
    assert cache.remove_batch_dim()["resid_pre", 0].shape == (5, lm.cfg.d_model)

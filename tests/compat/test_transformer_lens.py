"""TransformerLens 4's own tools on our models, unchanged, each against a literal computation."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
import transformer_lens
from transformer_lens import patching, utilities
from transformer_lens.model_protocol import TransformerLensModel, TransformerLensModelWithWeights
from transformer_lens.tools.analysis.direct_logit_attribution import direct_logit_attribution

import gatedlens as gl
from gatedlens.model.norm import Norm
from tests.helpers import example, relative


def tune(model):
    """Norms of random weights and biases: a tool that forgets them must be found out."""
    generator = torch.Generator().manual_seed(7)
    for norm in {id(part.weights): part.weights for part in model.modules() if isinstance(part, Norm)}.values():
        for p in norm.parameters():
            p.data += 0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


@pytest.fixture
def tuned(lm):
    """A language model whose norms matter."""
    return tune(type(lm).tiny(seed=0, dtype=torch.float64))


@pytest.fixture
def tuned_model(hooked):
    return tune(hooked.tiny(seed=0, dtype=torch.float64))


def norm_bias(model):
    bias = dict(model.ln_final.weights.named_parameters()).get("bias")
    return model.W_U.new_zeros(len(model.W_U)) if bias is None else bias


def of_copies(model):
    """Whether its norms read several copies of the stream: they are held whole, their gain with them."""
    return "copy" in model.cfg.sizes


def by_hand(model, x):
    """The final norm, recomputed."""
    if of_copies(model):
        w, k = model.ln_final.mixing, model.cfg.n_copies
        copies = [one / (one.pow(2).mean(-1, keepdim=True) + model.ln_final.eps).sqrt() for one in x.chunk(k, dim=-1)]
        wide = (1 + w.hc_norm.weight) * torch.cat(copies, dim=-1)
        low = torch.nn.functional.silu(wide @ w.input_mix_weight_down.weight.T / k)
        return sum((torch.sigmoid(low @ w.input_mix_weight_up.weight.T) * wide).chunk(k, dim=-1)) / k
    if model.cfg.normalization_type == "LN":
        x = x - x.mean(-1, keepdim=True)
    return model.ln_final.gain * x / (x.pow(2).mean(-1, keepdim=True) + model.ln_final.eps).sqrt() + norm_bias(model)


def held(model, cache, name, x):
    """What the norm of this name makes of x, what it is held by as it was; its gain aside."""
    scale = cache[f"{name}.hook_scale"]
    if of_copies(model):
        copies = [
            one / s.unsqueeze(-1) for one, s in zip(x.chunk(model.cfg.n_copies, dim=-1), scale.unbind(-1), strict=True)
        ]
        gain = 1 + model.get_submodule(name).weights.weight
        gated = cache[f"{name}.hook_gate"] * gain * torch.cat(copies, dim=-1)
        return sum(gated.chunk(model.cfg.n_copies, dim=-1)) / model.cfg.n_copies
    return centred(model, x) / scale


def all_of_it(model, cache, name):
    """What it made of the whole stream."""
    return cache[f"{name}.hook_out" if of_copies(model) else f"{name}.hook_normalized"]


def centred(model, x):
    return x - x.mean(-1, keepdim=True) if model.cfg.normalization_type == "LN" else x


def before_the_cap(model, cache):
    """Each token's logit less what biases add, before any soft cap."""
    return (cache["ln_final.hook_out"] - norm_bias(model)) @ model.W_U


def has_mlp(model):
    return "blocks.0.hook_resid_mid" in model.names


def test_the_structural_protocols_hold(lm):
    assert isinstance(lm, TransformerLensModel) and isinstance(lm, TransformerLensModelWithWeights)
    assert isinstance(lm, transformer_lens.HookedRootModule)
    assert all(isinstance(p, transformer_lens.hook_points.HookPoint) for p in lm.hook_dict.values())


# -- the residual stream ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_accumulated_resid(tuned_model):
    model = tuned_model
    _, cache = model.run_with_cache(example(model))
    n = model.cfg.n_layers
    want = [cache["resid_pre", layer] for layer in range(n)] + [cache["resid_post", -1]]
    got, labels = cache.accumulated_resid(return_labels=True)
    assert labels == [f"{layer}_pre" for layer in range(n)] + ["final_post"]
    assert torch.equal(got, torch.stack(want))
    assert torch.equal(cache.accumulated_resid(pos_slice=2), torch.stack(want)[:, :, 2])
    assert relative(cache.accumulated_resid(apply_ln=True), by_hand(model, torch.stack(want))) < 1e-12
    layer = 1 if "blocks.1.ln1.hook_scale" in model.names.points else 0
    at_layer = cache.accumulated_resid(layer=layer, apply_ln=True)
    assert relative(at_layer, held(model, cache, f"blocks.{layer}.ln1", torch.stack(want[: layer + 1]))) < 1e-12
    if has_mlp(model):
        mids = cache.accumulated_resid(incl_mid=True)
        assert len(mids) == 2 * n + 1 and torch.equal(mids[1], cache["resid_mid", 0])
        assert torch.equal(cache.accumulated_resid(layer=1, mlp_input=True)[-1], cache["resid_mid", 1])
    else:
        assert torch.equal(cache.accumulated_resid(incl_mid=True), cache.accumulated_resid())  # no layer has a middle
        with pytest.raises(gl.PointError, match="resid_mid"):
            cache.accumulated_resid(layer=1, mlp_input=True)
    for layer in (99, -2):
        for method in (cache.accumulated_resid, cache.decompose_resid):
            with pytest.raises(gl.InputError, match=f"layer={layer}: a residual stream is read before layer 0 to"):
                method(layer=layer)


@torch.no_grad()
def test_decompose_resid_sums_to_the_stream_at_every_boundary(tuned_model):
    model = tuned_model
    _, cache = model.run_with_cache(example(model))
    for layer in range(model.cfg.n_layers):
        assert relative(cache.decompose_resid(layer=layer).sum(0), cache["resid_pre", layer]) < 1e-12
        if f"blocks.{layer}.ln1.hook_scale" not in model.names.points:  # normed behind
            with pytest.raises(gl.PointError, match=f"layer {layer} of .* reads the residual stream as it is"):
                cache.decompose_resid(layer=layer, apply_ln=True)
            continue
        normed = cache.decompose_resid(layer=layer, apply_ln=True).sum(0)
        assert relative(normed, all_of_it(model, cache, f"blocks.{layer}.ln1")) < 1e-12
        if has_mlp(model):
            assert (
                relative(cache.decompose_resid(layer=layer, mlp_input=True).sum(0), cache["resid_mid", layer]) < 1e-12
            )
            normed = cache.decompose_resid(layer=layer, mlp_input=True, apply_ln=True).sum(0)
            assert relative(normed, all_of_it(model, cache, f"blocks.{layer}.ln2")) < 1e-12
        else:
            with pytest.raises(gl.PointError, match="resid_mid"):
                cache.decompose_resid(layer=layer, mlp_input=True)
    parts, labels = cache.decompose_resid(return_labels=True)
    kinds = ("mixer", "mlp") if has_mlp(model) else ("mixer",)
    kinds = ("norm1", "mixer", "norm2", "mlp") if model.cfg.architecture == "minimax" else kinds
    assert labels == ["embed", *(f"{layer}_{kind}_out" for layer in range(model.cfg.n_layers) for kind in kinds)]
    assert relative(parts.sum(0), cache["resid_post", -1]) < 1e-12
    assert torch.equal(parts[1:], torch.stack([cache[label[2:], int(label[0])] for label in labels[1:]]))
    mixers = cache.decompose_resid(mode="attn", incl_embeds=False)
    assert torch.equal(mixers, cache.stack_activation("mixer_out"))
    assert relative(cache.apply_ln_to_stack(parts).sum(0), all_of_it(model, cache, "ln_final")) < 1e-12


@torch.no_grad()
def test_logit_attrs_sum_to_the_logits(tuned_model):
    """For one token, one a row, one a position, slices, differences, and without a batch axis."""
    model = tuned_model
    _, cache = model.run_with_cache(example(model, 2, 5))
    truth, parts = before_the_cap(model, cache), cache.decompose_resid()
    assert relative(cache.logit_attrs(parts, tokens=3).sum(0), truth[..., 3]) < 1e-11
    gain = 1 if of_copies(model) else model.ln_final.gain
    share = held(model, cache, "ln_final", parts[1]) * gain @ model.W_U[:, 3]
    assert relative(cache.logit_attrs(parts, tokens=3)[1], share) < 1e-11
    rows, wrong = torch.tensor([3, 4]), torch.tensor([1, 2])
    want = torch.stack([truth[0, :, 3] - truth[0, :, 1], truth[1, :, 4] - truth[1, :, 2]])
    assert relative(cache.logit_attrs(parts, rows, wrong).sum(0), want) < 1e-11
    last = cache.decompose_resid(pos_slice=-1)
    assert relative(cache.logit_attrs(last, rows, pos_slice=-1).sum(0), truth[[0, 1], -1, rows]) < 1e-11
    each = torch.arange(truth.shape[1]).expand(2, -1) % 5
    assert relative(cache.logit_attrs(parts, each).sum(0), truth.gather(-1, each[..., None])[..., 0]) < 1e-11
    assert relative(cache.logit_attrs(parts, 3, batch_slice=1).sum(0), truth[1, :, 3]) < 1e-11
    one = cache.apply_slice_to_batch_dim(1)
    assert relative(one.logit_attrs(one.decompose_resid(), 3, has_batch_dim=False).sum(0), truth[1, :, 3]) < 1e-11
    with pytest.raises(gl.InputError, match=r"shapes \[2\] and \[\]"):
        cache.logit_attrs(parts, rows, 3)


@torch.no_grad()
def test_direct_logit_attribution(tuned):
    """TransformerLens refuses this of its own bridge unless the norm was folded; here it is right as it stands."""
    tokens = example(tuned, 1, 5)
    _, cache = tuned.run_with_cache(tokens)
    truth = before_the_cap(tuned, cache)[0, -1]
    found = direct_logit_attribution(tuned, tokens, answer_tokens=3, incorrect_tokens=5)
    assert relative(found.attribution.sum(0), (truth[3] - truth[5])[None]) < 1e-11
    assert found.labels[0] == "embed"


@torch.no_grad()
def test_logit_lens_is_the_readout_at_every_layer(tuned):
    tokens = example(tuned, 2, 5)
    logits, cache = tuned.run_with_cache(tokens)
    if of_copies(tuned):
        with pytest.raises(gl.InputError, match="gl.lens.logit_lens"):
            cache.logit_lens(positions=None, return_type="logits")
        return
    lens = cache.logit_lens(positions=None, return_type="logits")
    for row, resid in zip(lens.values, cache.accumulated_resid(), strict=True):
        assert relative(row, tuned.unembed(by_hand(tuned, resid))) < 1e-12
    assert relative(lens.values[-1], logits) < 1e-12, "the readout ends in the model's logits, soft cap and all"
    assert len(lens.labels) == tuned.cfg.n_layers + 1


@torch.no_grad()
def test_the_logit_lens_of_an_image_ends_in_its_logits_at_the_class_token():
    vim = gl.HookedViM.tiny(dtype=torch.float64)
    logits, cache = vim.run_with_cache(example(vim))
    lens = cache.logit_lens(positions=None, return_type="logits")
    assert relative(lens.values[-1][:, vim.grid.cls[0]], logits) < 1e-12
    for row, resid in zip(lens.values, cache.accumulated_resid(), strict=True):
        assert relative(row, vim.unembed(by_hand(vim, resid))) < 1e-12


# -- the cache --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_cache_methods(model):
    _, cache = model.run_with_cache(example(model, 1, 5), names_filter=["blocks.*.hook_*", "blocks.*.hook_state"])
    names = list(cache)
    assert names == list(cache.keys()) and len(cache) == len(names) == len(cache.values()) == len(cache.items())
    state = cache.stack_activation("mixer_out")
    assert torch.equal(state, torch.stack([cache["mixer_out", layer] for layer in range(model.cfg.n_layers)]))
    assert torch.equal(cache.stack_activation("mixer_out", layer=1), state[:1])
    shapes = {name: value.shape for name, value in cache.items()}
    assert cache.remove_batch_dim() is cache and not cache.has_batch_dim
    assert {name: value.shape for name, value in cache.items()} == {name: shape[1:] for name, shape in shapes.items()}
    moved = cache.to("meta")
    assert all(value.device.type == "meta" for value in moved.values())


def test_toggle_autodiff(model):
    with torch.no_grad():
        _, cache = model.run_with_cache(example(model, 1, 5), names_filter="blocks.0.hook_resid_pre")
    before = torch.is_grad_enabled()
    try:
        cache.toggle_autodiff(False)
        assert not torch.is_grad_enabled()
        cache.toggle_autodiff(True)
        assert torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(before)


@torch.no_grad()
def test_what_a_gated_model_has_not_says_what_it_has(model):
    _, cache = model.run_with_cache(example(model, 1, 5))
    for method in (cache.stack_head_results, cache.compute_head_results, cache.get_full_resid_decomposition):
        if model.cfg.n_heads > 1:  # those of Mamba-2 and of Griffin's attention: tests/model/test_cache_by_head.py
            break
        with pytest.raises(gl.PointError, match="not made of attention heads"):
            method()
    for method in (cache.get_neuron_results, cache.stack_neuron_results):
        with pytest.raises(gl.PointError, match="decompose_resid"):
            method(0)
    for method in (cache.ssm_layers, cache.compute_ssm_state, cache.compute_ssm_effective_attention):
        with pytest.raises(gl.PointError, match=r"gl.implicit_attention\(cache, layer=...\)"):
            method()


# -- patching ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["resid_pre", "resid_mid", "attn_out", "mlp_out"])
def test_activation_patching(lm, name):
    """Layer x position, clean into corrupted, as TransformerLens runs it; each cell against a run by hand."""
    clean, corrupted = example(lm, 1, 5, seed=0), example(lm, 1, 5, seed=1)
    _, cache = lm.run_with_cache(clean)
    full = {"attn_out": "hook_mixer_out"}.get(name, f"hook_{name}")
    function = getattr(patching, f"get_act_patch_{name}")

    def metric(logits):
        return logits[:, -1, 3].sum()

    if f"blocks.0.{full}" not in lm.names:
        with pytest.raises(gl.PointError, match=f"hook_{name}"):
            function(lm, corrupted, cache, metric)
        return
    result = function(lm, corrupted, cache, metric)
    for layer in range(lm.cfg.n_layers):
        for pos in range(5):

            def patch(x, hook, layer=layer, pos=pos):
                x[:, pos] = cache[f"blocks.{layer}.{full}"][:, pos]

            want = metric(lm.run_with_hooks(corrupted, fwd_hooks=[(f"blocks.{layer}.{full}", patch)]))
            assert torch.allclose(result[layer, pos].double(), want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_generic_patching_of_any_point(model):
    """With an `index_df` of its own, TransformerLens's engine patches any point of any model, images too."""
    clean, corrupted = example(model, 1, 5, seed=0), example(model, 1, 5, seed=1)
    _, cache = model.run_with_cache(clean)
    index = pd.DataFrame({"layer": [0, 1, 1], "pos": [1, 0, 3]})

    def metric(logits):
        return logits.flatten(1)[:, 3].sum()

    def setter(corrupted_activation, index, clean_activation):
        corrupted_activation[:, index[1]] = clean_activation[:, index[1]]
        return corrupted_activation

    result = patching.generic_activation_patch(
        model, corrupted, cache, metric, setter, activation_name="resid_post", index_df=index
    )
    for got, (layer, pos) in zip(result, index.values.tolist(), strict=True):

        def patch(x, hook, layer=layer, pos=pos):
            x[:, pos] = cache["resid_post", layer][:, pos]

        want = metric(model.run_with_hooks(corrupted, fwd_hooks=[(f"blocks.{layer}.hook_resid_post", patch)]))
        assert torch.allclose(got.double(), want, rtol=1e-5, atol=1e-5)


# -- utilities --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_utilities(tuned):
    tokens = example(tuned, 2, 6)
    logits, loss = tuned(tokens, return_type="both")
    assert relative(utilities.lm_cross_entropy_loss(logits, tokens), loss) < 1e-12
    _, cache = tuned.run_with_cache(tokens)
    for word in ("resid_pre", "resid_post"):
        assert cache[utilities.get_act_name(word, 1)] is cache[word, 1]
    sliced = tuned.run_with_cache(tokens, pos_slice=utilities.Slice((1, 3)))[1]
    assert torch.equal(sliced["resid_pre", 1], cache["resid_pre", 1][:, 1:3])


def test_test_prompt(moby_model, capsys):
    utilities.test_prompt("Call me Ishmae", "l", moby_model, prepend_space_to_answer=False)
    assert "Rank: 0" in capsys.readouterr().out


@torch.no_grad()
def test_logit_lens_of_a_trained_model():
    model = gl.from_pretrained("gatedlens/mamba-moby", device="cpu")
    logits, cache = model.run_with_cache("Call me")
    lens = cache.logit_lens()
    assert relative(lens.values[-1].reshape(-1), logits[0, -1]) < 1e-4
    attrs = cache.logit_attrs(cache.decompose_resid(pos_slice=-1), tokens=" ", pos_slice=-1)
    assert torch.allclose(attrs.sum(0), logits[:, -1, model.to_single_token(" ")], atol=1e-4)

"""Attribution patching against the gradient of each point by a run of its own, on every architecture."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens import circuits
from tests.circuits.helpers import METRIC, fired, gradient, measured, put, two
from tests.helpers import padded


def axes_of(model, name):
    return model.names.points[name].dims


def cells(model):
    """The keep that leaves nothing out."""
    return tuple(dict.fromkeys(axis for name in model.names for axis in axes_of(model, name)))


def score_of(found, model, name):
    """The entry of a dict of results that is one point in one layer."""
    result = found[model.names.points[name].name]
    return result.at(layer=int(name.split(".")[1])).values if name.startswith("blocks.") else result.values


def test_attribution_is_difference_times_gradient_at_every_point_lazy_ones_too(model):
    clean, corrupted = two(model, pos=5)
    good, bad = (fired(model, one, lambda name: True) for one in (clean, corrupted))
    found = circuits.attribution_patch(model, clean, corrupted, METRIC, lambda name: True, keep=cells(model))
    for name in model.names:
        difference = torch.where(good[name] == bad[name], 0.0, good[name] - bad[name])
        want = difference * gradient(model, corrupted, name, bad[name])
        got = score_of(found, model, name)
        assert got.shape == want.shape, name
        assert torch.allclose(got, want, rtol=1e-8, atol=1e-11), name


@pytest.mark.parametrize("leaf", ["scan", "state", "dt", "gated"])
def test_by_head_is_the_sum_over_its_entries(leaf):
    """Each head's number by a loop: difference * gradient over the head's own channels, rows averaged."""
    model, name = gl.HookedMamba2.tiny(dtype=torch.float64), f"blocks.1.mixer.hook_{leaf}"
    clean, corrupted = two(model, pos=5)
    good, bad = (fired(model, one, lambda name: True) for one in (clean, corrupted))
    product = (good[name] - bad[name]) * gradient(model, corrupted, name, bad[name])
    heads = product.unflatten(2, (4, 8)) if "channel" in axes_of(model, name) else product
    want = torch.stack([torch.stack([heads[:, t, h].sum() / len(heads) for h in range(4)]) for t in range(5)])
    found = circuits.attribution_patch(
        model, clean, corrupted, METRIC, f"blocks.*.mixer.hook_{leaf}", keep=("head", "pos")
    )
    assert found.axes == ("layer", "pos", "head") and found["head"] == [0, 1, 2, 3]
    assert torch.allclose(found.values[1], want, rtol=1e-10, atol=1e-11)
    whole = circuits.attribution_patch(model, clean, corrupted, METRIC, f"blocks.*.mixer.hook_{leaf}")
    assert torch.allclose(found.values.sum(-1), whole.values, rtol=1e-10, atol=1e-11)
    for how in (circuits.attribution_patch_ig, circuits.attribution_patch_ig_activations):
        by_head, whole = (
            how(model, clean, corrupted, METRIC, name, keep=keep, steps=2, progress=False) for keep in ("head", ())
        )
        assert by_head.axes == ("layer", "head")
        assert torch.allclose(by_head.values.sum(-1), whole.values, rtol=1e-10, atol=1e-11)
    if leaf == "state":
        by_channel = circuits.attribution_patch(model, clean, corrupted, METRIC, name, keep=("channel",))
        want = product.flatten(2, 3).sum((0, 1, 3)) / len(product)
        assert torch.allclose(by_channel.values[0], want, rtol=1e-10, atol=1e-11)


def test_without_names_every_point_that_is_not_lazy_takes_part(model):
    clean, corrupted = two(model)
    found = circuits.attribution_patch(model, clean, corrupted, METRIC)
    wanted = {point.name for point in model.names.points.values() if not point.lazy}
    assert set(found) == wanted and all(isinstance(result, gl.Result) for result in found.values())
    whole = circuits.attribution_patch(model, clean, corrupted, METRIC, "blocks.*.hook_mixer_out")
    assert torch.allclose(whole.values, found["hook_mixer_out"].values, atol=1e-12)
    assert whole.facts["clean"] == pytest.approx(measured(model, clean).mean().item(), abs=1e-10)
    assert whole.facts["corrupted"] == pytest.approx(measured(model, corrupted).mean().item(), abs=1e-10)


def test_the_axes_that_remain(model):
    clean, corrupted = two(model)
    name = "blocks.*.hook_resid_mid" if "blocks.0.hook_resid_mid" in model.names else "blocks.*.hook_resid_pre"
    by_cell = circuits.attribution_patch(model, clean, corrupted, METRIC, name, keep=("batch", "pos", "d_model"))
    by_pos = circuits.attribution_patch(model, clean, corrupted, METRIC, name)
    whole = circuits.attribution_patch(model, clean, corrupted, METRIC, name, keep=())
    assert by_cell.axes == ("layer", "batch", "pos", "d_model") and by_pos.axes == ("layer", "pos")
    assert by_pos["layer"] == list(range(model.cfg.n_layers)) and whole.axes == ("layer",)
    assert torch.allclose(by_cell.values.sum(-1).mean(1), by_pos.values, atol=1e-12)
    assert torch.allclose(by_pos.values.sum(1), whole.values, atol=1e-12)
    (row, _) = circuits.attribution_patch(model, clean, corrupted, METRIC, "hook_embed", keep=("batch",)).values
    alone = circuits.attribution_patch(model, clean[:1], corrupted[:1], METRIC, "hook_embed", keep=())
    assert torch.allclose(row, alone.values, atol=1e-10), "a row's score is its own"


def test_where_the_metric_is_linear_it_is_the_effect(model):
    clean, corrupted = two(model)
    got = circuits.attribution_patch(model, clean, corrupted, METRIC, "hook_logits", keep=("batch",))
    assert torch.allclose(got.values, measured(model, clean) - measured(model, corrupted), atol=1e-10)


def test_padding_takes_no_part_in_an_attribution(lm):
    rows = [torch.randint(lm.cfg.d_vocab, (n,), generator=torch.Generator().manual_seed(n)) for n in (5, 8)]
    clean, mask = padded(rows, "left")
    corrupted, _ = padded([(row + 3) % lm.cfg.d_vocab for row in rows], "left")
    names = ["blocks.*.hook_resid_pre", "blocks.*.mixer.hook_gated"]
    both = circuits.attribution_patch(lm, clean, corrupted, METRIC, names, keep=("batch", "pos"), attention_mask=mask)
    for i, row in enumerate(rows):
        alone = circuits.attribution_patch(
            lm, row[None], ((row + 3) % lm.cfg.d_vocab)[None], METRIC, names, keep=("batch", "pos")
        )
        for name, result in both.items():
            assert torch.allclose(result[:, i, : len(row)], alone[name][:, 0], atol=1e-10)
            assert (result[:, i, len(row) :] == 0).all()


def test_integrated_over_the_input_is_the_mean_of_gradients_along_it(model):
    clean, corrupted = two(model)
    names = ["blocks.1.hook_mixer_out", "blocks.0.hook_mixer_in", "hook_embed"]
    good, bad = (fired(model, one, names) for one in (clean, corrupted))
    found = circuits.attribution_patch_ig(
        model, clean, corrupted, METRIC, names, ("batch", "pos"), steps=3, progress=False
    )
    for name in names:
        total = 0
        for share in (1 / 6, 3 / 6, 5 / 6):
            between = [("hook_embed", put(bad["hook_embed"] + share * (good["hook_embed"] - bad["hook_embed"])))]
            with model.hooks(between):
                here = fired(model, corrupted, name)[name]
            if name == "hook_embed":
                between = []
            total = total + gradient(model, corrupted, name, here, hooks=between) / 3
        want = ((good[name] - bad[name]) * total).sum(-1)
        assert torch.allclose(score_of(found, model, name), want, atol=1e-10), name


def test_integrated_over_the_input_is_complete_at_the_embedding(model):
    clean, corrupted = two(model)
    want = measured(model, clean) - measured(model, corrupted)

    def error(steps):
        got = circuits.attribution_patch_ig(
            model, clean, corrupted, METRIC, "hook_embed", ("batch",), steps, progress=False
        )
        return (got.values - want).abs().max()

    few, many = error(24), error(96)  # enough steps for any random path
    assert many < 0.005 * want.abs().max() and many < few / 2, "more steps, less error; kinks make it uneven"


@pytest.mark.parametrize("leaf", ["hook_resid_pre", "hook_mixer_out", "mixer.*hook_write"])
def test_integrated_over_the_activation_sums_to_the_effect_of_patching_the_point(model, leaf):
    clean, corrupted = two(model)
    (name, *_) = model.names.hooked(f"blocks.0.{leaf}")
    value = fired(model, clean, name.name)[name.name]
    want = measured(model, corrupted, [(name.name, put(value))]) - measured(model, corrupted)

    def error(steps):
        got = circuits.attribution_patch_ig_activations(
            model, clean, corrupted, METRIC, name.name, ("batch",), steps, progress=False
        )
        return (got.values[0] - want).abs().max()

    few, many = error(24), error(96)  # enough steps for any random path
    assert many < 0.005 * want.abs().max() and many < few / 2, "more steps, less error; kinks make it uneven"


def test_what_is_asked_wrongly_is_explained(model):
    clean, corrupted = two(model)
    attribute = circuits.attribution_patch
    with pytest.raises(gl.InputError, match="need one shape"):
        attribute(model, clean, corrupted[:1], METRIC)
    with pytest.raises(gl.PointError, match=r"hook_resid_pr.*Did you mean"):
        attribute(model, clean, corrupted, METRIC, "blocks.0.hook_resid_pr")
    with pytest.raises(gl.InputError, match="a string gives one Result"):
        attribute(model, clean, corrupted, METRIC, "blocks.*.hook_resid_*")
    with pytest.raises(gl.PointError, match=r"no axis 'poss'.*batch pos d_model"):
        attribute(model, clean, corrupted, METRIC, "blocks.*.hook_resid_pre", keep=("poss",))
    with pytest.raises(gl.PointError, match="empty list"):
        attribute(model, clean, corrupted, METRIC, [])
    with pytest.raises(gl.InputError, match="The metric has no gradient"):
        attribute(model, clean, corrupted, lambda logits: METRIC(logits.detach()), "hook_embed")
    with pytest.raises(gl.InputError, match="one number for 2 rows"):
        attribute(model, clean, corrupted, lambda logits: METRIC(logits).mean(), "hook_embed")
    with pytest.raises(gl.InputError, match="one number for 2 rows"):
        attribute(model, clean, corrupted, lambda logits: METRIC(logits)[:1], "hook_embed")
    with pytest.raises(gl.InputError, match="returned NaN"):
        attribute(model, clean, corrupted, lambda logits: METRIC(logits) * torch.nan, "hook_embed")
    with pytest.raises(gl.InputError, match="gradient of the metric at hook_embed is NaN"):
        attribute(model, clean, corrupted, lambda logits: (0 * METRIC(logits)).sqrt(), "hook_embed")
    with pytest.raises(gl.InputError, match="runs whole"):
        attribute(model, clean, corrupted, METRIC, "hook_embed", return_type="loss")
    with pytest.raises(gl.InputError, match="inference_mode"), torch.inference_mode():
        attribute(model, clean, corrupted, METRIC, "hook_embed")
    with pytest.raises(gl.TooLargeError):
        attribute(model, clean, corrupted, METRIC, max_bytes=10)
    for steps, told in ((0, "at least 1"), (-1, "at least 1"), (True, "steps=True.*expected a whole number")):
        with pytest.raises(gl.InputError, match=told):
            circuits.attribution_patch_ig(model, clean, corrupted, METRIC, "hook_embed", steps=steps)
        with pytest.raises(gl.InputError, match=told):
            circuits.attribution_patch_ig_activations(model, clean, corrupted, METRIC, "hook_embed", steps=steps)
    assert not model.list_hooks()


def test_a_metric_that_fails_leaves_the_model_as_it_was(model):
    clean, corrupted = two(model)

    def broken(logits):
        if logits.requires_grad:
            raise RuntimeError("broken")
        return METRIC(logits)

    with pytest.raises(RuntimeError, match="broken"):
        circuits.attribution_patch(model, clean, corrupted, broken)
    assert not model.list_hooks()


def test_frozen_parameters_and_other_interventions_are_respected(model):
    clean, corrupted = two(model)
    want = circuits.attribution_patch(model, clean, corrupted, METRIC)
    model.wrapped.requires_grad_(False)
    try:
        frozen = circuits.attribution_patch(model, clean, corrupted, METRIC)
    finally:
        model.wrapped.requires_grad_(True)
    assert all(torch.allclose(frozen[name].values, want[name].values, atol=1e-11) for name in want)
    with gl.ablation.zero("blocks.0.hook_mixer_out").on(model):
        cut = circuits.attribution_patch(model, clean, corrupted, METRIC, "blocks.*.hook_mixer_out")
        assert (fired(model, clean, "blocks.0.hook_mixer_out")["mixer_out", 0] == 0).all(), "it is still in force"
    assert (cut[0] == 0).all() and not torch.allclose(cut[1], want["hook_mixer_out"][1])


def test_different_padding_is_refused(recall_model):
    with pytest.raises(gl.InputError, match="padded at different places"):
        circuits.attribution_patch(recall_model, ["A 1 B 2", "A"], ["A", "A 1 B 2"], METRIC, "hook_embed")


def test_names_of_what_is_computed_from_points_are_refused(recall_model):
    with pytest.raises(gl.PointError, match=r"hook_B_bar is computed from .*hook_dt, .*hook_B: ask for these"):
        circuits.attribution_patch(recall_model, "A 1", "A 2", METRIC, "blocks.0.hook_B_bar")


def test_a_text_is_labelled_by_its_tokens_and_no_grad_may_be_on(recall_model):
    with torch.no_grad():
        found = circuits.attribution_patch(
            recall_model, "A 1 B 2 ? A", "A 3 B 2 ? A", gl.metrics.logit(5), "blocks.*.hook_resid_pre"
        )
    assert found["pos"] == ["<bos>", "A", "1", "B", "2", "?", "A"]
    assert (found[:, :2] == 0).all() and (found[0, 2] != 0).all()


def test_by_secants_the_scores_of_the_embedding_are_the_whole_effect(model):
    """Complete at one backward; of experts those that the clean run chooses."""
    clean, corrupted = two(model, pos=5)
    metric = gl.metrics.logit_difference(1, 2)
    found = circuits.attribution_patch(model, clean, corrupted, metric, "hook_embed", rule="secant")
    with torch.no_grad():
        rise = (metric(model(clean)) - metric(model(corrupted))).mean()
    if not any(name.endswith("hook_expert_weights") for name in model.names.points):
        assert torch.allclose(found.values.sum(), rise, atol=1e-10)
    every = circuits.attribution_patch(model, clean, corrupted, metric, rule="secant")
    stream = every["hook_resid_pre"].values.flatten(1).sum(1)
    assert torch.allclose(stream[0], found.values.sum(), atol=1e-10) and not model.list_hooks()
    if not model.hands_on:
        assert torch.allclose(stream, stream[0].expand_as(stream), atol=1e-10)
    with pytest.raises(gl.InputError, match="rule='secnat': it is 'gradient', 'secant'. Did you mean 'secant'"):
        circuits.attribution_patch(model, clean, corrupted, metric, rule="secnat")

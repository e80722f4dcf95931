"""Ablations: what stands where instead, on every architecture; composition, undoing, mistakes."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens import ablation
from tests.helpers import example, padded

NAME = "blocks.0.hook_mixer_out"


def fired(model, intervention, name=NAME, **options):
    """What a point holds under an intervention."""
    with torch.no_grad(), intervention.on(model):
        return model.run_with_cache(example(model), names_filter=name, **options)[1][name]


def same(a, b):
    """Equal to rounding: what is listened to decides how the scan is computed."""
    return torch.allclose(a, b, rtol=1e-12, atol=1e-13)


def test_values_at_entries_by_axis(model, clean):
    x = clean[NAME]
    want = x.clone()
    want[:, 2, 3:7] = 0
    assert same(fired(model, ablation.zero(NAME, pos=2, d_model=slice(3, 7))), want)
    want = x.clone()
    want[:, [0, -1]] *= 3
    assert same(fired(model, ablation.scale(NAME, 3, pos=[0, -1])), want)
    want = x.clone()
    want[1] = 0.5
    assert same(fired(model, ablation.constant(NAME, 0.5, batch=1)), want)


def test_values_from_other_runs_and_rows(model, clean):
    x = clean[NAME]
    with torch.no_grad():
        _, other = model.run_with_cache(example(model, 2, seed=5), names_filter=NAME)
    assert same(fired(model, ablation.freeze(NAME, other)), other[NAME])
    assert same(fired(model, ablation.resample(NAME)), x.flip(0))
    assert torch.allclose(fired(model, ablation.mean(NAME, other)), other[NAME].mean(0).expand_as(x))
    everywhere = ablation.mean(NAME, other, over=("batch", "pos"))
    assert torch.allclose(fired(model, everywhere), other[NAME].mean((0, 1)).expand_as(x))
    drawn = fired(model, ablation.resample(NAME, other, seed=1))
    assert all(any(same(row, given) for given in other[NAME]) for row in drawn)


def test_any_point_takes_any_value(model, clean):
    """Lazy ones and those of a single direction or of attention too; entries of the last axis alone as well."""
    once = {name.split(".", 2)[-1]: name for name in clean}.values()  # each row in one of its layers
    for name in once:
        x, last = clean[name], model.names.points[name].dims[-1]
        assert (fired(model, ablation.constant(name, 0.25), name) == 0.25).all(), name
        got = fired(model, ablation.freeze(name, {name: x.flip(0)}, **{last: 0}), name)
        want = torch.cat([x.flip(0)[..., :1], x[..., 1:]], dim=-1)
        assert torch.allclose(got, want, rtol=1e-10, atol=1e-12), name


def test_noise_has_its_size_and_its_seed(model, clean):
    a, b, c = (fired(model, ablation.noise(NAME, 0.1, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert 0.07 < (a - clean[NAME]).std() < 0.13


def test_they_compose_in_order_and_are_undone(model, clean):
    both = ablation.constant(NAME, 2.0) + ablation.scale(NAME, 5, pos=0)
    x = fired(model, both)
    assert (x[:, 0] == 10).all() and (x[:, 1:] == 2).all()
    with torch.no_grad():
        assert same(model.run_with_cache(example(model), names_filter=NAME)[1][NAME], clean[NAME])
    with pytest.raises(RuntimeError), both.on(model):
        raise RuntimeError
    assert not model.list_hooks()
    with torch.no_grad():
        out = model.run_with_hooks(example(model), fwd_hooks=both.hooks(model))
    assert not torch.allclose(out, clean["hook_logits"])


def test_components_as_seen_in_a_cache(model, clean):
    kinds = {model.blocks[layer].mixer.place: layer for layer in range(model.cfg.n_layers)}
    assert "mixer" in kinds
    gates = [name for name in clean if name.endswith(".hook_gate") and ".mixer." in name]
    with torch.no_grad(), ablation.open_gate().on(model):
        _, cache = model.run_with_cache(example(model), names_filter=lambda name: True)
    assert all((cache[name] == 1).all() for name in gates)
    with torch.no_grad(), ablation.no_scan().on(model):
        _, cache = model.run_with_cache(example(model), names_filter=lambda name: True)
    assert all((cache[name] == 0).all() for name in cache if name.endswith("hook_scan"))
    with torch.no_grad(), ablation.remove_layer(1).on(model):
        _, cache = model.run_with_cache(example(model))
    assert torch.equal(cache["resid_post", 1], cache["resid_pre", 1])
    if any(name.endswith("hook_conv_taps") for name in model.names):
        with torch.no_grad(), ablation.only_tap(-1).on(model):
            _, cache = model.run_with_cache(example(model), names_filter=lambda name: True)
        taps = [name for name in cache if name.endswith("hook_conv_taps")]
        assert taps and all(cache[name][..., :-1].abs().max() == 0 and cache[name].abs().max() > 0 for name in taps)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ablation.zero(NAME, head=0), gl.PointError, "has no axis 'head'; its axes are: batch pos d_model"),
        (lambda: ablation.zero(NAME, d_model=9999), gl.InputError, "d_model=9999 is out of range"),
        (lambda: ablation.zero(NAME, pos=500), gl.InputError, "pos=500 is out of range"),
        (lambda: ablation.zero("blocks.0.hook_mixer_ot"), gl.PointError, "Did you mean 'blocks.0.hook_mixer_out'"),
        (lambda: ablation.freeze(NAME, {}), gl.PointError, "The source holds no blocks.0.hook_mixer_out"),
        (lambda: ablation.freeze(NAME, {NAME: torch.zeros(3, 3)}), gl.InputError, r"has shape \[3, 3\]"),
        (lambda: ablation.freeze(NAME, None), gl.InputError, "The source is NoneType; it is an ActivationCache"),
        (lambda: ablation.zero(NAME, d_model="a"), gl.InputError, "d_model='a' is no index"),
        (lambda: ablation.zero(NAME) + 3, TypeError, "unsupported operand"),
        (lambda: ablation.resample(NAME), gl.InputError, "at least two"),
        (lambda: ablation.zero(NAME, d_model=slice(900, 950)), gl.InputError, "names no entry"),
        (lambda: ablation.zero(NAME, pos=[]), gl.InputError, "names no position"),
        (lambda: ablation.zero(NAME, d_model=[True, False]), gl.InputError, "a mask of shape"),
        (lambda: ablation.zero(NAME, d_model=0.5), gl.InputError, "is no index"),
        (lambda: ablation.zero(NAME, d_model={"blocks.1": [0]}), gl.InputError, "says nothing of blocks.0"),
        (lambda: ablation.remove_layer(7), gl.InputError, "layers=7"),
        (lambda: ablation.remove_layer("9*"), gl.InputError, "names no layer"),
        (lambda: ablation.only_tap(9), (gl.InputError, gl.PointError), "tap=9 is out of range|has no conv"),
    ],
)
def test_mistakes_are_explained_and_leave_nothing_behind(model, make, error, message):
    with pytest.raises(error, match=message), make().on(model):
        model(example(model, 1))
    assert not model.list_hooks()


def test_gradients_flow_around_what_is_ablated(lm):
    resid = lm(example(lm), stop_at_layer=0).detach().requires_grad_()
    with ablation.zero("blocks.*.hook_m*_out").on(lm):  # nothing mixes tokens, RWKV's channel mix neither
        (grad,) = torch.autograd.grad(lm(resid, start_at_layer=0)[:, -1].sum(), resid)
    assert grad[:, :-1].abs().max() == 0 and grad[:, -1].abs().max() > 0


# -- where the values come from -------------------------------------------------------------------------------------


def test_noise_is_each_rows_and_each_points_own(model, clean):
    """Layer numbers swapped, say, must not give one noise twice."""
    names = [f"blocks.{layer}.hook_mixer_in" for layer in range(model.cfg.n_layers)]
    with torch.no_grad(), ablation.noise(names, 1.0).on(model):
        _, noisy = model.run_with_cache(example(model))
    drawn = [noisy[name] - noisy[name.replace("mixer_in", "resid_pre")] for name in names]
    drawn = torch.cat(drawn).flatten(1)
    assert (torch.corrcoef(drawn) - torch.eye(len(drawn))).abs().max() < 0.5


def test_a_row_is_never_resampled_with_itself(model, clean):
    for seed in range(4):
        got = fired(model, ablation.resample(NAME, clean, seed=seed))
        assert same(got, clean[NAME].flip(0)), "the source are the same inputs: each of two rows gets the other"


def test_sources_of_one_row_and_slices(model, clean):
    x = example(model)
    with torch.no_grad():
        _, one = model.run_with_cache(x[:1], names_filter=NAME, remove_batch_dim=True)
        _, part = model.run_with_cache(x, names_filter=NAME, pos_slice=[1])
    assert same(fired(model, ablation.freeze(NAME, one)), clean[NAME][:1].expand_as(clean[NAME]))
    for make in (ablation.freeze, ablation.mean, ablation.resample):
        with pytest.raises(gl.InputError, match="keeps only some positions"):
            fired(model, make(NAME, part))
    with pytest.raises(gl.InputError, match=r"the axes there are batch pos d_model"):
        fired(model, ablation.freeze(NAME, {NAME: clean[NAME][0]}))


def test_padding_of_a_source_takes_no_part(lm):
    rows = [example(lm, 1, n, seed=n)[0] for n in (7, 4)]
    tokens, mask = padded(rows, "right")
    with torch.no_grad():
        _, cache = lm.run_with_cache(tokens, attention_mask=mask, names_filter=NAME)
        alone = [lm.run_with_cache(row.unsqueeze(0), names_filter=NAME)[1][NAME][0] for row in rows]
    got = fired(lm, ablation.mean(NAME, cache, over=("batch", "pos")))
    assert same(got, torch.cat(alone).mean(0).expand_as(got))
    got = fired(lm, ablation.mean(NAME, cache))
    assert same(got[0, :4], (alone[0][:4] + alone[1]) / 2) and same(got[0, 4:], alone[0][4:])
    with pytest.raises(gl.InputError, match="The source is padded"):
        fired(lm, ablation.resample(NAME, cache))
    averages = ablation.means(lm, [(tokens, mask), rows[0].unsqueeze(0)], NAME, progress=False)
    assert (averages.rows, averages.positions) == (3, 18)
    assert same(averages[NAME], torch.cat([*alone, alone[0]]).mean(0).reshape(1, 1, -1))


def test_means_of_a_data_set(model, clean):
    every = [name for name in model.names if "hook_state_start" not in name]
    batches = [example(model, 2, seed=0), example(model, 3, seed=1)]
    with torch.no_grad():
        caches = [model.run_with_cache(x, names_filter=lambda name: True)[1] for x in batches]
    averages, by_position = (ablation.means(model, batches, every, one, progress=False) for one in (False, True))
    assert (averages.rows, averages.positions) == (5, 5 * clean["resid_pre", 0].shape[1])
    for name in every:
        rows, point = torch.cat([cache[name] for cache in caches]), model.names.points[name]
        dims = [0, point.dims.index("pos")] if "pos" in point.dims else [0]
        assert torch.allclose(averages[name], rows.mean(dims, keepdim=True), rtol=1e-10, atol=1e-12), name
        assert torch.allclose(by_position[name], rows.mean(0, keepdim=True), rtol=1e-10, atol=1e-12), name
    for source in (averages, by_position):
        assert same(fired(model, ablation.mean(NAME, source)), source[NAME].expand_as(clean[NAME]))
        assert same(fired(model, ablation.freeze(NAME, source, batch=0))[0], source[NAME].expand_as(clean[NAME])[0])
    with pytest.raises(gl.PointError, match="not the means of 'blocks.1.hook_mixer_out'. Did you mean"):
        ablation.means(model, batches, NAME, progress=False)["blocks.1.hook_mixer_out"]
    with pytest.raises(gl.InputError, match="means are taken already"):
        fired(model, ablation.mean(NAME, averages, over=("batch", "pos")))
    with pytest.raises(gl.InputError, match="no batch"):
        ablation.means(model, [], NAME)


def test_an_ablation_at_a_position_in_each_row(model, clean):
    wanted = clean[NAME].clone()
    wanted[torch.arange(2), [1, 4]] = 0
    mask = torch.zeros(wanted.shape[:2], dtype=torch.bool)
    mask[0, 1] = mask[1, 4] = True
    for pos in (torch.tensor([1, 4]), [[1], [4]], mask):
        assert same(fired(model, ablation.zero(NAME, pos=pos)), wanted)
    with pytest.raises(gl.InputError, match="goes by row and has 3 rows; the batch has 2"):
        fired(model, ablation.zero(NAME, pos=torch.tensor([1, 2, 3])))


def test_one_text_is_one_batch_of_means(lm):
    with pytest.raises(gl.InputError, match="tokenizer"):  # it is read as a text, which needs one
        ablation.means(lm, "a text", NAME, progress=False)


def test_means_by_position_want_one_length(lm):
    with pytest.raises(gl.InputError, match="batches of one length"):
        ablation.means(lm, [example(lm, 2, 5), example(lm, 2, 6)], NAME, per_position=True, progress=False)
    assert not lm.list_hooks()


def test_rows_of_other_lengths_are_not_resampled(lm):
    tokens, mask = padded([example(lm, 1, n)[0] for n in (5, 3)], "left")
    with pytest.raises(gl.InputError, match="The batch is padded: another row's blocks.0.hook_mixer_out"):
        lm.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=ablation.resample(NAME).hooks(lm))
    assert not lm.is_hooked()


@torch.no_grad()
def test_a_number_beside_the_axis_value():
    """Behind the names the number leaves `value=` to the axis; by keyword it is the number."""
    model, name = gl.HookedMamba2.tiny(dtype=torch.float64), "blocks.0.mixer.hook_u"
    x = fired(model, ablation.Intervention(()), name)
    want = x.unflatten(2, (4, 8)).clone()
    want[:, :, :, [1, 3]] = 0.5
    assert torch.equal(fired(model, ablation.constant(name, 0.5, value=[1, 3]), name), want.flatten(2))
    assert (fired(model, ablation.constant(name, value=0.5), name) == 0.5).all()
    want = x.unflatten(2, (4, 8)).clone()
    want[:, :, 2] = 0.5
    assert torch.equal(fired(model, ablation.constant(name, value=0.5, head=2), name), want.flatten(2))
    with pytest.raises(
        gl.InputError, match=r"value= is the number that is put in.* constant\(names, 0.0, value=\[1, 3\]\)"
    ):
        ablation.constant(name, value=[1, 3])
    for numbers in ((), (1.0, 2.0)):
        with pytest.raises(gl.InputError, match="constant\\(\\) puts in one number"):
            ablation.constant(name, *numbers, head=2)


def test_means_are_saved_and_loaded(model, tmp_path):
    names = [NAME, "blocks.1.mixer.hook_state_start"][: 1 + ("blocks.1.mixer.hook_state_start" in model.names.points)]
    found = ablation.means(model, [example(model), example(model, 3, seed=2)], names, progress=False)
    back = ablation.Means.load(found.save(tmp_path / "means.safetensors"))
    assert (back.rows, back.positions, back.per_position) == (found.rows, found.positions, found.per_position)
    assert list(back) == sorted(found) and all(torch.equal(back[name], found[name]) for name in found)
    assert same(fired(model, ablation.mean(NAME, back)), fired(model, ablation.mean(NAME, found)))
    gl.steering.SteeringVector(NAME, torch.ones(3)).save(tmp_path / "other.safetensors")
    with pytest.raises(gl.CheckpointError, match="holds no saved Means"):
        ablation.Means.load(tmp_path / "other.safetensors")

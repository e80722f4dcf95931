"""Interchange interventions: the exact identities, on every architecture, at points and states, padded rows included."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformer_lens.tools.analysis import NormMatchedPlacebo, SubspaceInterchange

import gatedlens as gl
from gatedlens import subspaces
from gatedlens.subspaces import Interchange, Subspace
from tests.helpers import example, padded
from tests.hooks import test_fla
from tests.test_notebook_reprs import held

CLOSE = {"rtol": 1e-10, "atol": 1e-11}
NAME = "blocks.0.hook_resid_post"


def states(model):
    return [name for name in model.names if name.startswith("blocks.0.") and name.endswith(".hook_state")]


def whole(model, name, **index):
    return subspaces.random(model, name, subspaces.random(model, name, 0, **index).d, **index)


@torch.no_grad()
def run(model, given, *changes, **options):
    with model.hooks([hook for change in changes for hook in change.hooks(model)]):
        return model(given, **options)


@torch.no_grad()
def patched(model, name, base, source, pos, source_pos=None):
    """Plain patching by hand: the activation at one position, or gl.states.patch of a state."""
    source_pos = pos if source_pos is None else source_pos
    _, cache = model.run_with_cache(source, names_filter=name)
    if name.endswith("hook_state"):
        scan = name.split(".")[3] if len(name.split(".")) > 4 and model.blocks[0].mixer.scans != ("",) else None
        return model.run_with_hooks(
            base, fwd_hooks=gl.states.patch(cache, pos, 0, source_pos=source_pos, scan=scan).hooks(model)
        )

    def put(x, hook):
        x[:, pos] = cache[name][:, source_pos]
        return x

    return model.run_with_hooks(base, fwd_hooks=[(name, put)])


def test_all_of_the_space_is_plain_patching_and_none_of_it_nothing(model):
    base, source = example(model, seed=1), example(model, seed=2)
    with torch.no_grad():
        plain = model(base)
    for name in (NAME, *states(model)):
        want = patched(model, name, base, source, 3)
        change = whole(model, name).interchange(model, source, 3)
        assert torch.allclose(run(model, base, change), want, **CLOSE), name
        nothing = subspaces.random(model, name, 0).interchange(model, source, 3)
        same = (
            torch.allclose if name != NAME else lambda a, b, **_: torch.equal(a, b)
        )  # a state is computed in the open
        assert same(run(model, base, nothing), plain, **CLOSE), name
        assert not torch.allclose(want, plain, **CLOSE) or name != NAME


def test_twice_is_once_and_the_complement_makes_it_whole(model):
    base, source = example(model, seed=1), example(model, seed=2)
    for name in (NAME, *states(model)):
        some = subspaces.random(model, name, 3, seed=4)
        change, rest = some.interchange(model, source, 3), some.complement().interchange(model, source, 3)
        once = run(model, base, change)
        for again in ((change, change), (rest, change)):
            want = once if again[0] is change else patched(model, name, base, source, 3)
            assert torch.allclose(run(model, base, *again), want, **CLOSE), name
        assert some.rank + some.complement().rank == some.d and some.overlap(some.complement()) < 1e-12


def test_a_state_by_heads_and_values(erasing):
    """A basis of the value axis, in one head: the literal product, in the state that gl.states.patch then sets."""
    model = erasing
    base, source = example(model, seed=1), example(model, seed=2)
    (name,) = states(model)
    some = replace(subspaces.random(model, name, 2, axes="value", head=1), pos=3)
    _, held = model.run_with_cache(base, names_filter=name)
    _, other = model.run_with_cache(source, names_filter=name)
    new = held[name][:, 3].detach().clone()
    P = some.basis.mT @ some.basis
    new[:, 1] += torch.einsum("vw,bwk->bvk", P, other[name][:, 3, 1] - new[:, 1])
    want = run(model, base, gl.states.patch(new, 3, 0))
    assert torch.allclose(run(model, base, some.interchange(model, source)), want, **CLOSE), "where it was fitted"


def test_the_state_that_is_left_has_it_too(lm):
    base, source, later = example(lm, seed=1), example(lm, seed=2), example(lm, 2, 3, seed=3)
    for name in states(lm):
        change = subspaces.random(lm, name, 2).interchange(lm, source, 3)
        with torch.no_grad():
            whole_run = run(lm, torch.cat([base, later], 1), change)[:, -3:]
            _, left = run(lm, base, change, return_state=True)
            assert torch.allclose(lm(later, state=left), whole_run, rtol=1e-6, atol=1e-7), name


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_what_they_are_alone(lm, side):
    rows, others = ([example(lm, 1, n, seed=n + s)[0] for n in (7, 5)] for s in (0, 20))
    tokens, mask = padded(rows, side)
    for name in (NAME, *states(lm)):
        some = subspaces.random(lm, name, 2)
        change = some.interchange(lm, padded(others, side), -2)
        with torch.no_grad():
            found = run(lm, tokens, change, attention_mask=mask)
        for i, row in enumerate(rows):
            alone = run(lm, row[None], some.interchange(lm, others[i][None], -2))[0]
            assert torch.allclose(found[i][mask[i]], alone, **CLOSE), name


def test_positions_by_row_other_positions_of_the_source_and_one_row_for_all():
    lm = gl.HookedMamba2.tiny(seed=0, dtype=torch.float64)
    base, source = example(lm, seed=1), example(lm, seed=2)
    some = whole(lm, NAME)
    for pos, other in ((torch.tensor([2, 4]), torch.tensor([5, 1])), (3, 5)):
        found = run(lm, base, some.interchange(lm, source, pos, other))
        for i in range(2):
            p, q = (int(one[i]) if torch.is_tensor(one) else one for one in (pos, other))
            want = patched(lm, NAME, base[i : i + 1], source[i : i + 1], p, q)
            assert torch.allclose(found[i : i + 1], want, **CLOSE)
    found = run(lm, base, some.interchange(lm, source[:1], [2, 3]))
    assert torch.allclose(found, patched(lm, NAME, base, source[:1].expand(2, -1), [2, 3]), **CLOSE)


def test_it_saves_and_loads_and_adds_up(tmp_path):
    model = gl.HookedMamba2.tiny(seed=0, dtype=torch.float64)
    base, source = example(model, seed=1), example(model, seed=2)
    some = subspaces.random(model, NAME, 3)
    for pos in (torch.tensor([1, 3]), slice(1, 3)):
        change = some.interchange(model, source, pos)
        again = Interchange.load(change.save(tmp_path / "change.safetensors"))
        assert repr(again) == repr(change) and again.facts["model"] == model.cfg.model_name
        assert torch.equal(run(model, base, again), run(model, base, change))
    other = Subspace.load(some.save(tmp_path / "some.safetensors"))
    assert torch.equal(other.basis, some.basis) and other.frame == some.frame
    assert "Subspace" in held(other) and "Interchange" in held(change)
    with pytest.raises(gl.CheckpointError, match="no saved interchange"):
        Interchange.load(tmp_path / "some.safetensors")
    both = change.intervention() + gl.ablation.zero("blocks.1.hook_mixer_out")
    with both.on(model), torch.no_grad():
        found = model(base)
    with gl.ablation.zero("blocks.1.hook_mixer_out").on(model):
        assert torch.allclose(found, run(model, base, change), **CLOSE)


def test_a_placebo_goes_as_far_as_transformer_lens_has_it(tmp_path):
    model = gl.HookedMamba2.tiny(seed=0, dtype=torch.float64)
    base, source = example(model, seed=1), example(model, seed=2)
    change = subspaces.random(model, NAME, 3).interchange(model, source, 3)
    other = Interchange.load(change.placebo(seed=1).save(tmp_path / "placebo.safetensors"))
    want, seen = NormMatchedPlacebo(SubspaceInterchange(change.basis.mT), other.other.mT), []
    for hooks in ([], other.hooks(model)):
        with model.hooks([*hooks, (NAME, lambda x, hook: seen.append(x[:, 3].detach().clone()))]), torch.no_grad():
            model(base)
    assert torch.allclose(seen[1], want(seen[0], change.source[:, 0, 0]), **CLOSE)
    assert "placebo of" in repr(other)


def test_ablation_removes_its_component_alone(model):
    x, some = example(model), subspaces.random(model, NAME, 3)
    to = torch.arange(some.d, dtype=torch.float64)
    for toward in (None, to):
        with some.ablate(3, to=toward, rows=torch.tensor([True, False])).on(model), torch.no_grad():
            _, cache = model.run_with_cache(x, names_filter=NAME)
        _, plain = model.run_with_cache(x, names_filter=NAME)
        found, was = cache[NAME], plain[NAME]
        want = some.coordinates(torch.zeros(some.d, dtype=torch.float64) if toward is None else to)
        assert torch.allclose(some.coordinates(found[0, 3]), want, **CLOSE)
        rest = some.complement()
        assert torch.allclose(rest.coordinates(found[0, 3]), rest.coordinates(was[0, 3]), **CLOSE)
        found[0, 3] = was[0, 3]
        assert torch.equal(found, was)


def test_errors_name_what_is_wrong(recall_model):
    model = recall_model
    tokens = gl.tasks.recall(4).tokens
    some = subspaces.random(model, ("resid_post", 0), 2)
    with pytest.raises(gl.PointError, match="no axis 'head'"):
        subspaces.random(model, ("resid_post", 0), head=1)
    with pytest.raises(gl.InputError, match="rank=65: the point has 64 dimensions"):
        subspaces.random(model, ("resid_post", 0), 65)
    with pytest.raises(gl.InputError, match="from another model"):
        some.interchange(gl.from_pretrained("gatedlens/mamba-moby", device="cpu"), tokens)
    with pytest.raises(gl.InputError, match="3 rows of 1 positions"), some.interchange(model, tokens[:3], -1).on(model):
        model(tokens)
    with (
        pytest.raises(gl.InputError, match="rows says of 2 rows"),
        some.ablate(rows=torch.tensor([True, False])).on(model),
    ):
        model(tokens)
    everywhere = subspaces.random(model, ("state", 0), 2).ablate()
    with pytest.raises(gl.InputError, match="a state is moved at one position of each row"), everywhere.on(model):
        model(tokens)
    with pytest.raises(gl.InputError, match="orthonormal"):
        Subspace(some.frame, some.basis * 2)
    with pytest.raises(gl.InputError, match="of two places"):
        some + subspaces.random(model, ("resid_post", 1), 2)


def test_a_state_behind_several_steps_of_a_position():
    """Gated DeltaProduct: what is left of a move passes through every step of the positions behind it."""
    model = test_fla.tiny("gated_deltaproduct of two steps")
    base, source = example(model, seed=1), example(model, seed=2)
    for name in states(model):
        some = subspaces.random(model, name, 3)
        every = whole(model, name).interchange(model, source, 3)
        want = patched(model, name, base, source, 3)
        assert torch.allclose(run(model, base, every), want, **CLOSE)
        parts = some.complement().interchange(model, source, 3), some.interchange(model, source, 3)
        assert torch.allclose(run(model, base, *parts), want, **CLOSE)


def test_half_precision():
    """A basis is float32 at least, whatever the model computes in."""
    model = gl.HookedMamba2.tiny(seed=0, dtype=torch.bfloat16)
    base, source = example(model, seed=1), example(model, seed=2)
    for name in (NAME, *states(model)):
        made = subspaces.das(model, base, source, [1, 2], name, 3, rank=2, epochs=1, progress=False)
        assert (
            made.basis.dtype == torch.float32 and subspaces.pca(model, source, name, 1, 3).basis.dtype == torch.float32
        )
        logits = run(model, base, made.interchange(model, source, 3), made.interchange(model, source, 4))
        assert bool(logits.isfinite().all())

"""Knockout under a delta rule: the write, the erase, and both, each the run of the recurrence without them, word for word."""

from __future__ import annotations

import pytest
import torch

from gatedlens import ablation, errors, knockout
from tests.attention.test_state_profiles import writes_of
from tests.helpers import kept
from tests.knockout.test_sweeping import CASES, given, held_norms, o_of, places, run, same

SRC, DST = [1, 3], [4, 6]
HOWS = {  # how a target reads the state: (without the sources' writes, without what they erase)
    knockout.cut_scan: (True, False),
    knockout.cut_erase: (False, True),
    knockout.cut_update: (True, True),
}


def layers_of(model):
    """The numbers of the layers whose state erases."""
    return [layer for layer in range(model.cfg.n_layers) if f"blocks.{layer}.mixer.hook_erase" in model.names.points]


def states_without(cache, layer, writes, erases, sources):
    """The recurrence word for word, where the positions `sources` (a list a row) leave out their write, their erase or both:
    batch pos head value state."""
    stem = f"blocks.{layer}.mixer.hook_"
    decay, write = (cache[stem + name] for name in ("decay", "write"))
    every = torch.zeros_like(write)
    for row, some in enumerate(sources):
        state = cache[f"{stem}state_start"][row]
        for t in range(write.shape[1]):
            left, wrote = decay[row, t] * state, write[row, t]
            if erases and t in some:
                wrote = sum(one[row] for one in writes_of(cache, stem.removesuffix("hook_"), t))
            else:
                left = kept(cache, stem.removesuffix("hook_"), state.expand(len(write), *state.shape), t)[row]
            state = left if writes and t in some else left + wrote
            every[row, t] = state
    return every


def by_states(model, clean, layer, how, src, dst, heads=slice(None)):
    """The same cut as an edit of hook_state, which changes the readout of its own position alone; norms are held."""
    where = places(clean.mask, clean["hook_logits"][..., 0])
    sources = [[some[j] for j in src] for some in where]
    states = states_without(clean, layer, *HOWS[how], sources)

    def edit(state, point):
        state = state.clone()
        for row, some in enumerate(where):
            for i in dst:
                state[row, some[i], heads] = states[row, some[i], heads]
        return state

    return ablation.edit(f"blocks.{layer}.mixer.hook_state", edit) + held_norms(model, layer, clean)


@pytest.mark.parametrize("kind", CASES)
def test_each_cut_is_the_run_without_that(erasing, kind):
    layers = layers_of(erasing)
    input, options = given(erasing, kind)
    clean = run(erasing, ablation.Intervention(()), input, options, names=lambda name: True)
    real = slice(None) if clean.mask is None else clean.mask
    seen = []
    for layer in layers:
        for how in HOWS:
            got = run(erasing, how(SRC, DST, layers=layer), input, options)
            want = run(erasing, by_states(erasing, clean, layer, how, SRC, DST), input, options)
            assert same(o_of(got, erasing, layer)[real], o_of(want, erasing, layer)[real])
            assert same(got["hook_logits"][real], want["hook_logits"][real])
            seen.append(o_of(got, erasing, layer)[real] - o_of(clean, erasing, layer)[real])
            assert seen[-1].abs().max() > 1e-6, f"{how.__name__} changed nothing"
    assert not same(seen[0] + seen[1], seen[2]), "what is written is not erased by what is cut later: no sum of the two"


def test_by_head_the_others_are_untouched(erasing):
    layer = layers_of(erasing)[0]
    input, _ = given(erasing, "plain")
    clean = run(erasing, ablation.Intervention(()), input, names=lambda name: True)
    untouched = o_of(run(erasing, ablation.Intervention(()), input), erasing, layer)
    width = untouched.shape[2] // erasing.cfg.sizes["head"]
    for how in HOWS:
        got = o_of(run(erasing, how(SRC, DST, layers=layer, head=1), input), erasing, layer)
        want = o_of(run(erasing, by_states(erasing, clean, layer, how, SRC, DST, 1), input), erasing, layer)
        assert same(got, want)
        others = [c for c in range(got.shape[2]) if c // width != 1]
        assert torch.equal(got[..., others], untouched[..., others])
        assert not same(got, untouched)


def test_of_one_source_the_write_and_its_own_erase_add_up(erasing):
    """A source's erase takes nothing of its own write, so that without both a target loses the sum of what it loses alone; but
    where it takes several steps, the later ones erase of what the earlier write."""
    layer = layers_of(erasing)[0]
    input, _ = given(erasing, "plain")
    whole = o_of(run(erasing, ablation.Intervention(()), input), erasing, layer)
    wrote, erased, both = (whole - o_of(run(erasing, how(2, 5, layers=layer), input), erasing, layer) for how in HOWS)
    assert same(wrote + erased, both) == (erasing.blocks[layer].mixer.steps == 1)


def test_each_pair_is_a_run_of_its_own(erasing):
    layer = layers_of(erasing)[0]
    input, _ = given(erasing, "plain")
    together = o_of(run(erasing, knockout.pairs([(1, 4), (3, 6)], knockout.cut_update, layer), input), erasing, layer)
    for src, dst in ((1, 4), (3, 6)):
        alone = o_of(run(erasing, knockout.cut_update(src, dst, layers=layer), input), erasing, layer)
        assert same(together[:, dst], alone[:, dst])


def test_a_sweep_is_its_cells(erasing):
    layers = layers_of(erasing)
    input, _ = given(erasing, "plain")

    def metric(logits):
        return logits[:, -1, ::7].sum(1)

    clean = metric(run(erasing, ablation.Intervention(()), input)["hook_logits"]).mean()
    found = knockout.sweep(
        erasing, input, metric, dst=-1, src=[1, 3], how=knockout.cut_erase, layers=layers, progress=False
    )
    for row, layer in enumerate(layers):
        for column, src in enumerate((1, 3)):
            cut = metric(run(erasing, knockout.cut_erase(src, -1, layers=layer), input)["hook_logits"]).mean()
            assert abs(found[row, column] - (cut - clean) / clean.abs()) < 1e-9


def test_gradients_flow_through_the_state_that_is_read(erasing):
    layer = layers_of(erasing)[0]
    input, _ = given(erasing, "plain")
    with torch.no_grad():
        resid = erasing(input, stop_at_layer=0)
    step = torch.randn(resid.shape, generator=torch.Generator().manual_seed(0), dtype=resid.dtype)

    def loss(resid):
        return erasing(resid, start_at_layer=0).sin().sum()

    with knockout.cut_update(SRC, DST, layers=layer).on(erasing):
        live = resid.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(live), live)
        with torch.no_grad():
            ahead, behind = loss(resid + 1e-6 * step), loss(resid - 1e-6 * step)
    assert abs((grad * step).sum() - (ahead - behind) / 2e-6) < 1e-5 * (grad * step).abs().sum()


def test_where_nothing_is_erased_a_cut_says_so(model):
    input, _ = given(model, "plain")
    without = sorted(set(range(model.cfg.n_layers)) - set(layers_of(model)))
    if not without:
        pytest.skip("every layer erases")
    for how in (knockout.cut_erase, knockout.cut_update):
        with (
            pytest.raises(errors.InputError, match=f"layer {without[0]} .*has no delta rule.*cut_scan"),
            how(1, 4, layers=without[0]).on(model),
        ):
            run(model, ablation.Intervention(()), input)
    assert not model.list_hooks() and model.running is None

"""Profiles of a state, number by number from the cached states, decays, probes and keys; padding, documents, refusals."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import gatedlens as gl
from gatedlens import profiles
from gatedlens.hooks import architectures
from tests.attention.test_layer import cached
from tests.helpers import example, padded, steps_of

CASES = ["plain", "left", "holes+state"]


def everything(model, case):
    """The cache of every point, lazy ones too, of one run of the kind `case`."""
    given = cached(model, case)
    options = {} if given.mask is None else {"attention_mask": given.mask}
    if given.state is not None:
        options["state"] = given.state
    input = given.tokens if isinstance(model, gl.HookedLanguageModel) else example(model, 2, 11)
    return model.run_with_cache(input, names_filter=lambda name: True, **options)[1]


def scans(model):
    """(layer, scan, stem of its points) of each scan whose state is a sum of decaying writes."""
    found = []
    for layer in range(model.cfg.n_layers):
        mixer = model.blocks[layer].mixer
        for name in mixer.scans:
            stem = f"blocks.{layer}.{mixer.place}." + (f"{name}." if name else "")
            if f"{stem}hook_write" in model.names.points and f"{stem}hook_num" not in model.names.points:
                found.append((layer, name or None, stem))
    return found


def by_head(x, axes):
    """[channel, state], [channel] or [head, value, state], whichever has so many axes, as [head, value, key]."""
    return x if axes == 3 else x.unsqueeze(-2) if axes == 2 else x[:, None, None]


def places(cache, row, length):
    return list(range(length)) if cache.mask is None else cache.mask[row].nonzero().flatten().tolist()


def steps(cache, stem, row):
    """(place, state before, changes) of the real positions of a row in the order of the scan."""
    state, decay, write = (cache[f"{stem}hook_{name}"][row] for name in ("state", "decay", "write"))
    before, axes = cache[f"{stem}hook_state_start"][row], state.ndim - 1
    real = places(cache, row, len(state))
    for t in reversed(real) if "bwd" in stem else real:
        erased, written = torch.zeros_like(before), write[t]
        if f"{stem}hook_erase" in cache.cache_dict:
            own, at = steps_of(cache, stem, t), decay[t] * before
            written = torch.zeros_like(write[t])
            for s, ((erase, probe), wrote) in enumerate(zip(own, writes_of(cache, stem, t), strict=True)):
                taken = erase[row] * ((at if s else before) * probe[row].unsqueeze(-2)).sum(-1, keepdim=True)
                at, erased, written = at - taken + wrote[row], erased + taken, written + wrote[row]
        changes = (state[t] - before, (1 - decay[t]) * before, erased, written)
        yield t, by_head(before, axes), [by_head(change, axes) for change in changes]
        before = state[t]


def writes_of(cache, stem, t):
    """What each step of token t writes, before later ones erase of it."""
    if cache[f"{stem}hook_u"].ndim == 3:
        return [cache[f"{stem}hook_write"][:, t]]
    shape = cache[f"{stem}hook_state"].shape
    u = cache[f"{stem}hook_u"][:, t].unflatten(-1, shape[2:4])
    written = cache[f"{stem}hook_erase"][:, t]  # beta k, for each value
    return list((u.unsqueeze(-1) * written).unbind(1))


def size(x):
    return x.flatten(1).pow(2).sum(-1).sqrt()


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_rewrite_is_its_definition(model, case):
    cache = everything(model, case)
    for layer, scan, stem in scans(model):
        found = profiles.rewrite(cache, layer, scan)
        for row in range(2):
            seen = set()
            for t, before, changes in steps(cache, stem, row):
                seen.add(t)
                if before.abs().max() == 0:
                    assert found.relative[row, t].isnan().all()
                    continue
                for got, change in zip(found, changes, strict=True):
                    assert torch.allclose(got[row, t], size(change) / size(before), rtol=1e-9, atol=1e-12)
            padding = [t for t in range(found.relative.shape[1]) if t not in seen]
            assert len(seen) > 3 and found.relative[row, padding].isnan().all()


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_rank_is_that_of_the_singular_values(model, case):
    if model.cfg.architecture == "griffin":
        return
    cache = everything(model, case)
    for layer, scan, stem in scans(model):
        states, found = cache[f"{stem}hook_state"], profiles.state_rank(cache, layer, scan=scan, threshold=0.1)
        last = profiles.state_rank(cache, layer, pos=-1, scan=scan, threshold=0.1)
        for row in range(2):
            real = places(cache, row, states.shape[1])
            for t in real:
                matrices = (
                    states[row, t] if states.ndim == 5 else states[row, t].unsqueeze(0)
                )  # a layer's channels are one
                for head, matrix in enumerate(matrices):
                    values = torch.linalg.svdvals(matrix)
                    p = (values / values.sum()).tolist()
                    want = math.exp(-sum(x * math.log(x) for x in p if x > 0))
                    assert found.effective[row, t, head].item() == pytest.approx(want, rel=1e-9)
                    assert found.above[row, t, head].item() == sum(x > 0.1 * p[0] for x in p)
            assert torch.equal(last.effective[row], found.effective[row, real[-1]])
            assert found.effective[row].isnan().all(1).sum() == states.shape[1] - len(real)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_half_life_is_the_decays(model, case):
    """A state that only decays at the mean rate halves in that time."""
    cache = everything(model, case)
    for layer in range(model.cfg.n_layers):
        mixer = model.blocks[layer].mixer
        for name in mixer.scans:
            stem = f"blocks.{layer}.{mixer.place}." + (f"{name}." if name else "")
            if f"{stem}hook_decay" not in model.names.points:
                continue
            found = profiles.decay_half_life(cache, layer, name or None)
            own = f"{stem}hook_log_decay"  # without the resets that are in hook_decay
            log = cache[own] if own in model.names.points else cache[f"{stem}hook_decay"].log()
            log = log[:, :, :, 0] if log.ndim == 5 else log.unsqueeze(-1) if log.ndim == 3 else log
            for row in range(2):
                mean = log[row, places(cache, row, log.shape[1])].mean(0)[..., : found.shape[2]]
                assert found[row].shape == mean.shape
                assert torch.allclose(torch.exp(mean * found[row]), torch.full_like(mean, 0.5), rtol=1e-9)


@torch.no_grad()
def test_what_a_probe_finds_is_what_earlier_tokens_wrote(erasing):
    """Summed over sources it is what the probe meets in the cached state; and number by number the state of one source alone."""
    for case in ("plain", "left", "right"):
        cache = everything(erasing, case)
        for layer, stem in (
            (layer, stem) for layer, _, stem in scans(erasing) if f"{stem}hook_probe" in cache.cache_dict
        ):
            found, state = profiles.collisions(cache, layer), cache[f"{stem}hook_state"]
            n, length = erasing.blocks[layer].mixer.steps, state.shape[1]
            # over (pos step): what is written, and the probes
            u = (
                cache[f"{stem}hook_u"]
                .unflatten(-1, (erasing.cfg.sizes["head"], -1))
                .reshape(2, n * length, *state.shape[2:4])
            )
            probe = torch.stack([probe for t in range(length) for _, probe in steps_of(cache, stem, t)], 1)
            write = torch.stack([one for t in range(length) for one in writes_of(cache, stem, t)], 1)
            met = torch.einsum("bhij,bjhv->bihv", found.found, u)
            for row in range(2):
                real = places(cache, row, length)
                for before, t in itertools.pairwise(real):
                    want = (state[row, before] * probe[row, n * t].unsqueeze(-2)).sum(-1)
                    assert torch.allclose(met[row, n * t], want, rtol=1e-10, atol=1e-12)
                assert found.found[row, :, n * real[0]].abs().max() == 0
                for j, i in ((n * real[0], n * real[2]), (n * real[1], n * real[4] + n - 1)):
                    for head in range(u.shape[2]):
                        key = write[row, j, head, 0]  # of one value, so the key but for a factor
                        cosine = (key * probe[row, i, head]).sum() / (key.norm() * probe[row, i, head].norm())
                        assert torch.allclose(found.cosine[row, head, i, j], cosine.abs(), rtol=1e-9)
            out = ~cache.mask if cache.mask is not None else torch.zeros(state.shape[:2], dtype=torch.bool)
            out = out.repeat_interleave(n, dim=1)
            for field in found:
                assert torch.equal(field, field.tril(-1))
                assert not field.transpose(1, 2)[out].any() and not field.permute(0, 3, 1, 2)[out].any()
            one = profiles.collisions(cache, layer, heads=1)
            assert torch.allclose(one.found[:, 0], found.found[:, 1], rtol=1e-12, atol=1e-14)


@torch.no_grad()
def test_padding_changes_nothing(lm):
    rows = [example(lm, 1, 9)[0], example(lm, 1, 5, seed=1)[0]]
    for side in ("left", "right"):
        tokens, mask = padded(rows, side)
        together = lm.run_with_cache(tokens, attention_mask=mask)[1]
        for layer, _, _ in scans(lm):
            for row, alone in enumerate(lm.run_with_cache(one.unsqueeze(0))[1] for one in rows):
                for got, want in zip(profiles.rewrite(together, layer), profiles.rewrite(alone, layer), strict=True):
                    assert torch.allclose(got[row, mask[row]], want[0], rtol=1e-9, atol=1e-12, equal_nan=True)
                got, want = profiles.decay_half_life(together, layer), profiles.decay_half_life(alone, layer)
                assert torch.allclose(got[row], want[0])


@torch.no_grad()
def test_a_document_begins_with_no_state(lm):
    if not lm.has_positions:
        return
    first, second = example(lm, 1, 5), example(lm, 1, 6, seed=1)
    position_ids = torch.tensor([[*range(5), *range(6)]])
    packed = lm.run_with_cache(torch.cat([first, second], 1), position_ids=position_ids)[1]
    for layer, _, stem in scans(lm):
        for some, alone in ((slice(0, 5), first), (slice(5, 11), second)):
            own = lm.run_with_cache(alone)[1]
            for got, want in zip(profiles.rewrite(packed, layer), profiles.rewrite(own, layer), strict=True):
                assert torch.allclose(got[:, some], want, rtol=1e-9, atol=1e-12, equal_nan=True)
            if f"{stem}hook_probe" in lm.names.points:
                got, want = profiles.collisions(packed, layer), profiles.collisions(own, layer)
                n = lm.blocks[layer].mixer.steps
                part = slice(n * some.start, n * some.stop)
                for field, single in zip(got, want, strict=True):
                    assert torch.allclose(field[:, :, part, part], single, rtol=1e-9, atol=1e-12)
                    assert field[:, :, 5 * n :, : 5 * n].abs().max() == 0


def test_many_positions_in_parts_are_the_whole(erasing, monkeypatch):
    from gatedlens.attention import state_profiles
    from gatedlens.recurrence.states import walk

    with torch.no_grad():
        cache = erasing.run_with_cache(example(erasing, 2, 11))[1]
        layer = scans(erasing)[0][0]
        whole = (
            profiles.rewrite(cache, layer),
            profiles.state_rank(cache, layer),
            profiles.state_rank(cache, layer, pos=4),
        )
        monkeypatch.setattr(state_profiles, "walk", lambda *given, **more: walk(*given, **more, at_once=1))
        parts = (
            profiles.rewrite(cache, layer),
            profiles.state_rank(cache, layer),
            profiles.state_rank(cache, layer, pos=4),
        )
    for a, b in zip(whole, parts, strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.allclose(x, y, rtol=1e-10, atol=1e-12, equal_nan=True)


def test_a_rewritten_key_collides_with_what_it_overwrites():
    """Two writes under one unit key, beta 1, no decay: the second erases all of the first, and the state stays rank one."""
    model = architectures()["qwen3_next"].tiny(dtype=torch.float64)
    layer = scans(model)[0][0]
    stem = f"blocks.{layer}.mixer.hook_"
    key = torch.zeros(1, 2, model.cfg.sizes["group"], model.cfg.d_state, dtype=torch.float64)
    key[..., 0] = 1
    edit = gl.ablation.edit(f"{stem}k", lambda k, point: key)
    edit = edit + gl.ablation.edit(f"{stem}beta", lambda b, point: torch.ones_like(b))
    edit = edit + gl.ablation.edit(f"{stem}log_decay", lambda g, point: torch.zeros_like(g))
    with torch.no_grad(), edit.on(model):
        cache = model.run_with_cache(example(model, 1, 2))[1]
        found, rank = profiles.collisions(cache, layer), profiles.state_rank(cache, layer)
        part = profiles.rewrite(cache, layer)
    assert torch.allclose(found.cosine[0, :, 1, 0], torch.ones(()).double())
    assert torch.allclose(found.found[0, :, 1, 0], torch.ones(()).double())
    assert torch.allclose(part.erased[0, 1], torch.ones(()).double()) and part.decayed[0, 1].abs().max() == 0
    assert torch.allclose(rank.effective, torch.ones(()).double()) and (rank.above == 1).all()
    assert profiles.decay_half_life(cache, layer).isinf().all()


def test_where_there_is_no_such_state_it_is_said():
    with torch.no_grad():
        caches = {
            name: architectures()[name].tiny().run_with_cache(example(architectures()[name].tiny(), 1, 4))[1]
            for name in ("mamba", "mamba2", "griffin", "rwkv", "qwen3_next", "vim")
        }
    attends = caches["griffin"].model.cfg.layer_types.index("attention")
    for ask, message in [
        (lambda: profiles.rewrite(caches["griffin"], attends), "is attention: it keeps every token.*layer in "),
        (lambda: profiles.decay_half_life(caches["griffin"], attends), "is attention"),
        (lambda: profiles.state_rank(caches["griffin"], 0), "holds one number, no matrix"),
        (lambda: profiles.rewrite(caches["rwkv"], 0), "a numerator and a denominator"),
        (lambda: profiles.state_rank(caches["rwkv"], 0), "a numerator and a denominator"),
        (lambda: profiles.collisions(caches["mamba2"], 0), "has no delta rule, so no token probes its state"),
        (lambda: profiles.collisions(caches["mamba"], 0), "has no delta rule"),
        (lambda: profiles.rewrite(caches["vim"], 0), "say scan='fwd' or scan='bwd'"),
        (lambda: profiles.rewrite(caches["mamba"], 0, scan="fwd"), "has one scan: leave `scan` out"),
        (lambda: profiles.rewrite(caches["mamba"], 9), "layer=9"),
        (lambda: profiles.state_rank(caches["mamba2"], 0, threshold=2.0), "threshold=2.0"),
        (lambda: profiles.state_rank(caches["mamba2"], 0, pos=9), "pos=9 is out of range"),
        (lambda: profiles.state_rank(caches["mamba2"], 0, heads=99), "heads=99"),
    ]:
        with pytest.raises(gl.InputError, match=message):
            ask()
    with pytest.raises(gl.PointError, match="head"):
        profiles.state_rank(caches["mamba"], 0, heads=0)
    with pytest.raises(gl.PointError, match="needs points that this cache lacks: .*hook_u"):
        model = caches["mamba2"].model
        names = [name for name in caches["mamba2"].cache_dict if not name.endswith("hook_u")]
        profiles.rewrite(model.run_with_cache([[1, 2]], names_filter=names)[1], 0)
    with pytest.raises(gl.TooLargeError, match="collisions of 1 heads"):
        delta = scans(caches["qwen3_next"].model)[0][0]
        profiles.collisions(caches["qwen3_next"], delta, heads=0, max_bytes=1)

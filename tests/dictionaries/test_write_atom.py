"""Atoms of the write: what a later position reads of one is known before the run, on every architecture whose state decays."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens.dictionaries import WriteAtom
from gatedlens.errors import CheckpointError, InputError, PointError
from tests.dictionaries.making import draw, recurrent_layer
from tests.helpers import example, padded

WITHOUT = "rwkv"  # a quotient of two states


def random_atom(model, layer, head=1):
    """An atom with a key and a value of its own, that fit the layer's write."""
    r, point = draw(3), f"blocks.{layer}.mixer.hook_write"
    dims = model.names.points[point].dims[2:]
    sizes = [model.cfg.sizes[dim] for dim in dims]
    if dims[0] == "head":
        return WriteAtom(point, r(sizes[1]), r(sizes[2]), head)
    return WriteAtom(point, r(sizes[0]), r(sizes[1]) if len(sizes) > 1 else None)


@torch.no_grad()
def test_what_a_later_position_reads_of_it_is_the_runs(lm):
    layer, x = recurrent_layer(lm), example(lm, pos=6)
    atom, scan = random_atom(lm, layer), f"blocks.{layer}.mixer.hook_scan"
    _, cache = lm.run_with_cache(x)
    if lm.cfg.architecture == WITHOUT:
        with pytest.raises(InputError, match="no sum of writes"):
            atom.scan(cache, pos=1, at=-1)
        return
    with atom.added(pos=1, amount=0.7).on(lm):
        _, edited = lm.run_with_cache(x, names_filter=scan)
    change = edited[scan] - cache[scan]
    assert float(change[:, 2:].abs().max()) > 1e-8
    for at in (1, 3, -1):
        found = atom.scan(cache, pos=1, at=at, amount=0.7)
        torch.testing.assert_close(found, change[:, at], atol=1e-10, rtol=1e-9)


@pytest.fixture(scope="module")
def mamba2():
    return gl.HookedMamba2.tiny(seed=0, dtype=torch.float64)


@pytest.fixture(scope="module")
def cached(mamba2):
    x = example(mamba2, pos=6)
    with torch.no_grad():
        return x, mamba2.run_with_cache(x, names_filter=lambda name: True)[1]


@torch.no_grad()
def test_removed_and_substituted_it_is_what_the_write_held(mamba2, cached):
    x, cache = cached
    atom, other = (WriteAtom.of(cache, layer=1, pos=pos, head=2) for pos in (2, 4))
    point = "blocks.1.mixer.hook_write"
    assert abs(atom.share - 1) < 1e-10 and atom.point == point
    torch.testing.assert_close(torch.outer(atom.value, atom.key), cache[point][0, 2, 2], atol=1e-12, rtol=0)
    torch.testing.assert_close(atom.coefficient(cache)[0, 2], torch.tensor(1.0, dtype=torch.float64))
    with atom.removed(pos=2).on(mamba2):
        gone = mamba2.run_with_cache(x, names_filter=point)[1][point]
    with atom.substituted(other, pos=2).on(mamba2):
        put = mamba2.run_with_cache(x, names_filter=point)[1][point]
    want = cache[point].clone()
    want[0, 2, 2] = 0
    torch.testing.assert_close(gone[0], want[0], atol=1e-12, rtol=0)
    want[0, 2, 2] = cache[point][0, 4, 2]
    torch.testing.assert_close(put[0], want[0], atol=1e-12, rtol=0)
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(put[1, others], cache[point][1, others], atol=1e-12, rtol=0)
    # as by hand, and as the closed form has it
    by_hand = -atom.scan(cache, pos=2, at=-1) + other.scan(cache, pos=2, at=-1)
    with atom.substituted(other, pos=2).on(mamba2):
        scan = mamba2.run_with_cache(x, names_filter="blocks.1.mixer.hook_scan")[1]["scan", 1]
    torch.testing.assert_close(scan[0, -1] - cache["scan", 1][0, -1], by_hand[0], atol=1e-10, rtol=0)


LAST = ("HookedMamba", "HookedMamba2", "HookedRWKV6", "HookedRWKV7")


@pytest.mark.parametrize("name", LAST)
@torch.no_grad()
def test_its_effect_on_a_later_logit_is_the_runs_with_norms_held(name):
    """Of the last layer; in Mamba, which has no norm in its mixer, what it puts out is exact without holding any."""
    model = getattr(gl, name).tiny(seed=0, dtype=torch.float64)
    layer, x = model.cfg.n_layers - 1, example(model, pos=5)
    atom = random_atom(model, layer)
    logits, cache = model.run_with_cache(x)
    held = [n for n in ("ln_final.hook_scale", f"blocks.{layer}.mixer.hook_scale") if n in cache.cache_dict]
    held += [
        n
        for n in cache.cache_dict
        if n.startswith(f"blocks.{layer}.") and ("ln2" in n or "mlp" in n or "cmix" in n) and n.endswith("_out")
    ]
    hooks = [(n, lambda value, hook, v=cache[n]: v) for n in held]
    with atom.added(pos=1).on(model):
        with model.hooks(hooks):
            edited, other = model.run_with_cache(x, names_filter=f"blocks.{layer}.hook_mixer_out")
        free = model.run_with_cache(x, names_filter=f"blocks.{layer}.hook_mixer_out")[1]["mixer_out", layer]
    got = atom.output(cache, pos=1)
    torch.testing.assert_close(
        got, (other["mixer_out", layer] - cache["mixer_out", layer])[:, -1], atol=1e-10, rtol=1e-8
    )
    torch.testing.assert_close(atom.logits(cache, pos=1), (edited - logits)[:, -1], atol=1e-9, rtol=1e-8)
    if name == "HookedMamba":
        torch.testing.assert_close(got, (free - cache["mixer_out", layer])[:, -1], atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_positions_are_a_rows_real_ones(mamba2, side):
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(mamba2.cfg.d_vocab, (n,), generator=generator) for n in (6, 4)]
    tokens, mask = padded(rows, side)
    _, cache = mamba2.run_with_cache(tokens, attention_mask=mask)
    atom = random_atom(mamba2, 1)
    both = atom.scan(cache, pos=1, at=-1)
    for i, row in enumerate(rows):
        _, alone = mamba2.run_with_cache(row.unsqueeze(0))
        torch.testing.assert_close(both[i], atom.scan(alone, pos=1, at=-1)[0], atol=1e-10, rtol=0)


def test_saved_loaded_and_what_does_not_fit(mamba2, cached, tmp_path):
    x, cache = cached
    atom = random_atom(mamba2, 1)
    again = WriteAtom.load(atom.save(tmp_path / "a.safetensors"))
    assert torch.equal(again.value, atom.value) and (again.point, again.head) == (atom.point, 1)
    assert "WriteAtom" in again._repr_html_() and repr(again) == repr(atom)
    torch.testing.assert_close((2 * atom).scan(cache, 1), 2 * atom.scan(cache, 1))
    for error, said, make in (
        (InputError, "say which head", lambda: WriteAtom.of(cache, 1, 2)),
        (InputError, "has 6 positions", lambda: WriteAtom.of(cache, 1, 9, head=0)),
        (InputError, "another point", lambda: atom.substituted(random_atom(mamba2, 0))),
        (PointError, "mixer's own", lambda: WriteAtom("blocks.1.hook_resid_pre", atom.value).scan(cache, 1)),
        (
            CheckpointError,
            "no saved WriteAtom",
            lambda: WriteAtom.load(_dictionary(tmp_path)),
        ),
    ):
        with pytest.raises(error, match=said):
            make()
    wrong = WriteAtom(atom.point, atom.value[:2], atom.key, 1)
    with pytest.raises(InputError, match="of head 1"), wrong.added(pos=1).on(mamba2), torch.no_grad():
        mamba2(x)


def _dictionary(folder):
    r = draw()
    return gl.dictionaries.Dictionary(r(3, 4), r(4, 3), point="hook_embed").save(folder / "d.safetensors")

"""Heads in a store: harvested alone, read alone, and their statistics, each against the activations themselves."""

from __future__ import annotations

import json

import pytest
import torch

import gatedlens as gl
from tests.helpers import example

SCAN, STATE, DT = (f"blocks.0.mixer.hook_{leaf}" for leaf in ("scan", "state", "dt"))
QUIET = {"progress": False, "batch_size": 3}


def near(got, want):
    """To rounding: who else is listened to decides how the scan is computed."""
    return got.shape == want.shape and torch.allclose(got, want, rtol=1e-10, atol=1e-12)


@pytest.fixture(scope="module")
def model():
    return gl.HookedMamba2.tiny(dtype=torch.float64)


@pytest.fixture(scope="module")
def tokens(model):
    return example(model, 3, 5)


@pytest.fixture(scope="module")
def cache(model, tokens):
    with torch.no_grad():
        return model.run_with_cache(tokens, names_filter=lambda name: True)[1]


def test_reading_heads_of_a_whole_store(model, tokens, cache, tmp_path):
    store = gl.store.harvest(model, tokens, [SCAN, STATE, DT], tmp_path / "store", **QUIET)
    store = gl.store.open(store.folder)
    heads, states = cache[SCAN].unflatten(2, (4, 8)), cache[STATE]
    for index, scan, state in (
        ({"head": 2}, heads[:, :, 2], states[:, :, 2]),
        ({"head": [3, 0]}, heads[:, :, [3, 0]], states[:, :, [3, 0]]),
        ({"value": -1}, heads[..., -1], states[..., -1, :]),
        ({"channel": [17, 3]}, cache[SCAN][..., [17, 3]], states.flatten(2, 3)[:, :, [17, 3]]),
        ({"head": slice(1, 3), "value": 0}, heads[:, :, 1:3, 0], states[:, :, 1:3, 0]),
    ):
        for name, want in ((SCAN, scan), (STATE, state)):
            column = store[name].select(**index)
            assert near(column[1], want[1]) and near(column[0:3], want)
            assert near(column[2, -1], want[2, -1]) and near(column[0, [0, 3]], want[0, [0, 3]])
            data = store.dataset(name, **index)
            assert near(torch.cat(list(data.loader(4))), want.flatten(0, 1)) and near(data[7], want[1, 2])
    assert near(store[DT].select(head=[1])[0], cache[DT][0, :, [1]])
    both = store.dataset([SCAN, STATE], head=1)[0]
    assert near(both[SCAN], heads[0, 0, 1]) and near(both[STATE], states[0, 0, 1])


def test_a_store_of_some_heads(model, tokens, cache, tmp_path):
    whole = gl.store.estimate(model, tokens, [SCAN, STATE])
    part = gl.store.estimate(model, tokens, [SCAN, STATE], head=[3, 1])
    assert part.bytes < 0.6 * whole.bytes
    store = gl.store.harvest(model, tokens, [SCAN, STATE], tmp_path / "store", **QUIET, head=[3, 1])
    heads = cache[SCAN].unflatten(2, (4, 8))
    assert near(store[SCAN][0], heads[0][:, [3, 1]]) and near(store[STATE][1], cache[STATE][1][:, [3, 1]])
    assert near(store[SCAN].select(head=1)[2], heads[2, :, 1])
    assert near(store[STATE].select(head=-1, value=[4])[2], cache[STATE][2][:, 3, [4]])
    assert "head value" in repr(store[SCAN]) and store.verify() == []
    with pytest.raises(gl.InputError, match=r"head=0 of .*hook_scan was not harvested; stored are \[3, 1\]"):
        store[SCAN].select(head=[1, 0])
    with pytest.raises(gl.InputError, match="head=4 is out of range"):
        store[SCAN].select(head=4)
    with pytest.raises(gl.PointError, match="has no axis 'channel' in this store; its entries have: head value"):
        store[SCAN].select(channel=3)
    again = gl.store.harvest(model, tokens, [SCAN, STATE], tmp_path / "store", **QUIET, head=[3, 1])
    assert len(again) == 3
    with pytest.raises(gl.StoreError, match="another harvest"):
        gl.store.harvest(model, tokens, [SCAN, STATE], tmp_path / "store", **QUIET, head=[3, 2])
    channels = gl.store.harvest(model, tokens, SCAN, tmp_path / "channels", **QUIET, channel=slice(4, 12))
    assert near(channels[SCAN][0], cache[SCAN][0, :, 4:12])
    assert near(channels[SCAN].select(channel=9)[0], cache[SCAN][0, :, 9])


def test_statistics_by_head(model, tokens, cache, tmp_path):
    reduce = ["mean", "variance", "covariance", "max", gl.store.sample(4)]
    store = gl.store.harvest(model, tokens, [SCAN, STATE], tmp_path / "store", **QUIET, reduce=reduce)
    part = gl.store.harvest(model, tokens, [SCAN, STATE], tmp_path / "part", **QUIET, reduce=reduce, head=[3, 1])
    for name in (SCAN, STATE):
        x = cache[name].unflatten(2, (4, 8)) if name == SCAN else cache[name]
        entries = x.flatten(0, 1)  # entry head value ...
        found, kept = store.statistics.by_head(name), part.statistics.by_head(name)
        for head in range(4):
            own = entries[:, head]
            centred = (own - own.mean(0)).flatten(1)
            want = {
                "mean": own.mean(0),
                "variance": own.var(0, correction=0),
                "max": own.amax(0),
                "covariance": centred.T @ centred / len(own),
            }
            for key, value in want.items():
                assert torch.allclose(found[key][head], value, rtol=1e-10, atol=1e-12), key
                if head in (3, 1):
                    assert torch.allclose(kept[key][[3, 1].index(head)], value, rtol=1e-10, atol=1e-12), key
            sampled = found["sample(4, seed=0)"][head]
            assert sampled.shape == (4, *own.shape[1:]) and all(any(near(one, each) for each in own) for one in sampled)
        some = store.statistics.select(name, value=[0, 5])["mean"]
        assert torch.allclose(some, entries[:, :, [0, 5]].mean(0), rtol=1e-10, atol=1e-12)
    with pytest.raises(gl.PointError, match="has no axis 'tap'"):
        store.statistics.select(SCAN, tap=0)


def test_what_a_store_without_heads_holds_is_as_before(tmp_path):
    """No field that says nothing: a manifest of Mamba is the one that earlier versions wrote."""
    model = gl.HookedMamba.tiny(dtype=torch.float64)
    store = gl.store.harvest(model, example(model), SCAN, tmp_path / "store", **QUIET)
    (point,) = json.loads((store.folder / "manifest.json").read_text())["points"]
    assert set(point) == {"name", "axes", "equation", "per", "stored", "shape", "dtype"}
    with pytest.raises(gl.PointError, match="has no axis 'head' in this store; its entries have: channel"):
        store[SCAN].select(head=0)
    with pytest.raises(gl.InputError, match=r"harvest\(\) has no option 'contxt'.* Did you mean 'context'"):
        gl.store.harvest(model, example(model), SCAN, tmp_path / "other", **QUIET, contxt=4)

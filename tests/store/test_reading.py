"""What is harvested comes back lazily, by sample and position, as a Dataset, a DataLoader, and with labels."""

from __future__ import annotations

import pickle

import numpy
import pytest
import torch

import gatedlens as gl
from gatedlens import store as gl_store
from tests.helpers import example

NAMES = ["blocks.0.mixer.hook_gated", "blocks.1.mixer.hook_state", "blocks.0.mixer.hook_state_start"]


@pytest.fixture(scope="module")
def model():
    return gl.HookedMamba.tiny()


@pytest.fixture(scope="module")
def store(model, tmp_path_factory):
    rows = [example(model, 1, 2 + n % 4, seed=n)[0] for n in range(11)]
    return gl_store.harvest(model, rows, NAMES, tmp_path_factory.mktemp("store"), batch_size=3, progress=False)


def test_samples_and_positions(store):
    gated = store["gated", 0]
    assert len(gated) == 11 and [len(x) for x in gated] == [2 + n % 4 for n in range(11)]
    assert torch.equal(gated[5, 2], gated[5][2]) and torch.equal(gated[-1, [0, -1]], gated[10][[0, -1]])
    assert torch.equal(gated[3:4], gated[3].unsqueeze(0)) and torch.equal(
        gated[[1, 5], 1:], torch.stack([gated[1], gated[5]])[:, 1:]
    )
    assert torch.equal(gated[:, 0], torch.stack([x[0] for x in gated]))
    assert store["state_start", 0][4].shape == store["state", 1][4, 0].shape
    with pytest.raises(gl.InputError, match="the samples differ in length"):
        gated[:]
    with pytest.raises(gl.InputError, match="picks no sample"):
        gated[20:]
    with pytest.raises(gl.InputError, match="has no positions"):
        store["state_start", 0][0, 1]
    with pytest.raises(gl.InputError, match="Sample -12 is out of range"):
        gated[-12]


def test_an_index_that_is_no_number_is_refused(store):
    gated = store["gated", 0]
    assert torch.equal(gated[torch.tensor(3)], gated[3]) and torch.equal(gated[3, torch.tensor(1)], gated[3, 1])
    assert torch.equal(gated[torch.tensor([1, 5])], gated[[1, 5]])
    assert torch.equal(gated[numpy.array([1, 5]), numpy.int64(0)], gated[[1, 5], 0])
    for index, said in (
        (1.5, r"\[1.5\]: a sample is a number"),
        (True, r"\[True\]: a sample is a number"),
        (None, "a sample is a number"),
        ((), "give a sample, or a sample and a position"),
        ((1, 0, 0), r"\[1, 0, 0\]: give a sample, or a sample and a position"),
        ([1.5], "a sample is a whole number, and 1.5 is none"),
        (["a"], "a sample is a whole number, and 'a' is none"),
        (torch.tensor([True, False]), r"and True is none. Of a mask: `mask.nonzero\(\).flatten\(\)`"),
        (torch.tensor([[1, 2]]), r"has the shape \[1, 2\]: give a list"),
        (slice("a", None), "slice indices must be integers"),
        (slice(None, None, 0), r"\[::0\]: slice step cannot be zero"),
        ((0, 1.0), r"\[0, 1.0\]: a position is a number"),
        ((0, "a"), "a position is a number"),
        ((0, True), "a position is a number"),
        ((0, ...), "a position is a number"),
        ((0, [0, 1.5]), "a position is a whole number, and 1.5 is none"),
        ((0, slice("a", None)), "slice indices must be integers"),
    ):
        with pytest.raises(gl.InputError, match=said):
            gated[index]


@pytest.mark.parametrize(
    "key", [3, None, ["gated"], ("gated",), ("gated", "0"), (3, 1), ("gated", 0, 1), ("a", 0, "b", 2)]
)
def test_what_is_no_point_is_refused(store, key):
    assert key not in store
    with pytest.raises(gl.PointError, match=r"is no point: give its name, or \(word, layer\). It holds: "):
        store[key]


def test_a_batch_has_at_least_one_entry(store):
    labelled = store.with_labels(lambda ids: ids)
    for loader in (store.loader, labelled.loader):
        for size in (0, -1):
            with pytest.raises(gl.InputError, match=f"batch_size={size}: give at least 1"):
                loader(("gated", 0), batch_size=size)
        for size in (None, 2.0, True):
            with pytest.raises(gl.InputError, match="batch_size=.*: expected a whole number"):
                loader(("gated", 0), batch_size=size)
    with pytest.raises(gl.InputError, match="index=1.5.: expected a whole number"):
        store.dataset(("gated", 0))[1.5]


def test_what_is_read_is_the_readers_own(store):
    x = store["gated", 0][4]
    x += 1
    store["state", 1][4].zero_()
    assert not torch.equal(x, store["gated", 0][4]) and store["state", 1][4].abs().max() > 0 and store.verify() == []


@pytest.mark.parametrize("key", [("gated", 0), ("state", 1), ("state_start", 0)])
def test_datasets_and_loaders_give_every_entry(store, key):
    column = store[key]
    per_row = column.layout.per == "row"
    whole = torch.stack(list(column)) if per_row else torch.cat(list(column))
    data = store.dataset(key)
    assert len(data) == len(whole) and all(torch.equal(data[i], whole[i]) for i in (0, 5, len(whole) - 1, -1))
    assert torch.equal(torch.cat(list(store.loader(key, batch_size=4))), whole)
    shuffled = torch.cat(list(store.loader(key, batch_size=4, shuffle=True, seed=1)))
    again = torch.cat(list(store.loader(key, batch_size=4, shuffle=True, seed=1)))
    assert torch.equal(shuffled, again)
    if not per_row:  # the initial states are all zero
        assert not torch.equal(shuffled, whole)
        rows = {tuple(row.flatten().tolist()) for row in whole}
        assert {tuple(row.flatten().tolist()) for row in shuffled} == rows
    with pytest.raises(IndexError):
        data[len(whole)]


def test_several_points_side_by_side(store):
    both = next(iter(store.loader([("gated", 0), ("state", 1)], batch_size=5)))
    assert list(both) == NAMES[:2] and both[NAMES[1]].shape[0] == 5
    assert torch.equal(both[NAMES[0]], torch.cat(list(store["gated", 0]))[:5])
    with pytest.raises(gl.InputError, match="cannot be read side by side"):
        store.loader([NAMES[0], NAMES[2]], batch_size=5)
    with pytest.raises(gl.InputError, match="list of points is empty"):
        store.loader([], batch_size=5)


def test_labels(store):
    tokens = torch.cat([store.tokens(i) for i in range(11)])
    x = torch.cat(list(store["gated", 0]))
    for labels, per, wanted in (
        (torch.arange(len(tokens)), "token", torch.arange(len(tokens))),
        (list(range(11)), "sample", torch.cat([torch.full((2 + n % 4,), n) for n in range(11)])),
        (torch.arange(11) * 2, "document", torch.cat([torch.full((2 + n % 4,), 2 * n) for n in range(11)])),
        (lambda ids: ids % 2, "token", tokens % 2),
        (lambda ids: len(ids), "sample", torch.cat([torch.full((2 + n % 4,), 2 + n % 4) for n in range(11)])),
    ):
        batches = list(store.with_labels(labels, per).loader(("gated", 0), batch_size=7))
        assert torch.equal(torch.cat([b[0] for b in batches]), x)
        assert torch.equal(torch.cat([b[1] for b in batches]), wanted)
    entry, label = store.with_labels(torch.arange(11), "sample").dataset(("state_start", 0))[9]
    assert label == 9 and entry.shape == store["state_start", 0][0].shape
    with pytest.raises(gl.InputError, match="There are 5 labels, one per token"):
        store.with_labels([0] * 5).loader(("gated", 0), batch_size=7)
    with pytest.raises(gl.InputError, match="labels is one number: give one for each token"):
        store.with_labels(3)
    with pytest.raises(gl.InputError, match="labels is 'abc': it cannot be read as numbers"):
        store.with_labels("abc")
    with pytest.raises(gl.InputError, match="per='word'"):
        store.with_labels([0] * 5, per="word")


def test_a_store_travels_to_workers(store):
    again = pickle.loads(pickle.dumps(store))
    assert torch.equal(again["gated", 0][3], store["gated", 0][3])
    got = torch.cat(list(store.loader(("gated", 0), batch_size=6, num_workers=1)))
    assert torch.equal(got, torch.cat(list(store["gated", 0])))


def test_a_missing_extra_is_named(store, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"needs pyarrow, which is not installed: pip install 'gatedlens\[store\]'"):
        gl_store.open(store.folder)["gated", 0][0]


def test_a_slice_is_of_positions_as_a_number_is(tmp_path):
    """Where only some positions are stored, those of them that are meant come back, in order."""
    model, name = gl.HookedMamba.tiny(), "blocks.0.hook_resid_post"
    ids, mask = example(model, 2, 8), torch.zeros(2, 8, dtype=torch.bool)
    mask[:, [1, 4, 6]] = True
    out = tmp_path / "out"
    held = gl_store.harvest(model, {"ids": ids, "mask": mask}, name, out, positions="mask", progress=False)[name]
    assert torch.equal(held[0, 4:], torch.stack([held[0, 4], held[0, 6]]))
    assert torch.equal(held[:, 1:5], torch.stack([held[:, 1], held[:, 4]], dim=1))
    assert held[0, 2:4].shape == (0, model.cfg.d_model)
    with pytest.raises(gl.InputError, match="a sample is a number"):
        held["a"]
    (tmp_path / "file").touch()
    for function in (gl_store.open, lambda path: gl_store.harvest(model, ids, name, path, progress=False)):
        with pytest.raises(gl_store.StoreError, match="is a file; a store is a folder"):
            function(tmp_path / "file")

"""A harvest is what run_with_cache gives, to the bit, for every architecture and point; padding, positions, dtypes, layout."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import datasets
import pytest
import torch
from safetensors.torch import load_file

import gatedlens as gl
from gatedlens import store as gl_store
from gatedlens.store import sizes
from tests.helpers import example, padded

SOME = ["blocks.0.hook_mixer_out", "blocks.1.hook_resid_post"]


def harvest(model, data, names, out, **options):
    return gl_store.harvest(model, data, names, out, progress=False, **{"batch_size": 2, **options})


@torch.no_grad()
def test_every_point_is_what_run_with_cache_gives_to_the_bit(model, tmp_path):
    data = example(model, batch=5)
    store = harvest(model, data, lambda name: True, tmp_path / "out")
    assert store.names == list(model.names) and len(store) == 5 and store.is_finished
    for start in (0, 2, 4):
        _, cache = model.run_with_cache(data[start : start + 2], names_filter=lambda name: True)
        for name in store.names:
            point = model.names.points[name]
            along = cache[name] if "pos" not in point.dims else cache[name].movedim(point.axis("pos"), 1)
            for row in range(len(along)):
                got = store[name][start + row]
                assert got.dtype == along.dtype and torch.equal(got, along[row]), name


@torch.no_grad()
def test_padding_is_left_out(lm, tmp_path):
    rows = [example(lm, 1, n, seed=n)[0] for n in (3, 7, 5, 1)]
    store = harvest(lm, [row.tolist() for row in rows], [*SOME, "blocks.0.mixer.hook_state"], tmp_path)
    assert store.n_tokens == 16
    for first in (0, 2):
        tokens, mask = padded(rows[first : first + 2], "right")
        _, cache = lm.run_with_cache(tokens, names_filter=store.names, attention_mask=mask)
        for i, row in enumerate(rows[first : first + 2]):
            assert torch.equal(store.tokens(first + i), row.int())
            assert store.positions(first + i).tolist() == list(range(len(row)))
            for name in store.names:
                assert torch.equal(store[name][first + i], cache[name][i, : len(row)]), name


@torch.no_grad()
def test_last_and_marked_positions(lm, tmp_path):
    rows = [example(lm, 1, n, seed=n)[0] for n in (3, 7)]
    marked = [torch.tensor([True, False, True]), torch.arange(7) > 4]
    tokens, mask = padded(rows, "right")
    _, cache = lm.run_with_cache(tokens, names_filter=SOME, attention_mask=mask)
    last = harvest(lm, rows, SOME, tmp_path / "last", positions="last")
    some = harvest(lm, {"ids": rows, "mask": marked}, SOME, tmp_path / "mask", positions="mask")
    for name in SOME:
        for i, row in enumerate(rows):
            assert torch.equal(last[name][i], cache[name][i, len(row) - 1 : len(row)])
            assert torch.equal(some[name][i], cache[name][i, : len(row)][marked[i]])
    assert some[SOME[0]][1, 5].equal(cache[SOME[0]][1, 5]) and some[SOME[0]][0, -1].equal(cache[SOME[0]][0, 2])
    assert some.positions(1).tolist() == [5, 6] and last.documents(1).tolist() == [1]
    with pytest.raises(gl.InputError, match=r"Position 1 of sample 0 is not stored: it has 2, 0 to 2"):
        some[SOME[0]][0, 1]
    with pytest.raises(gl.InputError, match="has no mask"):
        harvest(lm, rows, SOME, tmp_path / "none", positions="mask")


@torch.no_grad()
def test_a_context_packs_documents_into_saelens_rows(lm, tmp_path):
    rows = [example(lm, 1, n, seed=n)[0] for n in (3, 7, 5, 1, 4)]
    name = SOME[0]
    store = harvest(lm, iter(rows), [name], tmp_path, context=6)
    packed = torch.cat(rows)[:18].view(3, 6)
    assert [store.tokens(i).tolist() for i in range(3)] == packed.tolist() and len(store) == 3
    _, cache = lm.run_with_cache(packed[:2], names_filter=name)
    assert torch.equal(store[name][:2], cache[name])
    assert store.documents(0).tolist() == [0, 0, 0, 1, 1, 1] and store.documents(2).tolist() == [2, 2, 2, 3, 4, 4]
    assert store.manifest["finished"]["notes"] == ["2 tokens at the end, which fill no row of 6, were left out"]
    folder = datasets.load_from_disk(str(tmp_path / "activations"))
    assert folder.features[name] == datasets.Array2D((6, lm.cfg.d_model), "float64")
    assert folder.features["token_ids"] == datasets.Sequence(datasets.Value("int32"), length=6)
    folder.set_format("torch", columns=[name, "token_ids"])
    assert torch.equal(folder[:][name], store[name][:].float())  # `datasets` hands out float32
    assert torch.equal(folder[:]["token_ids"], packed)


def test_states_are_safetensors_of_their_entries(lm, tmp_path):
    data = example(lm, 6)
    store = harvest(lm, data, "blocks.*.mixer.hook_state", tmp_path, shard_bytes=1)  # a shard for each batch
    columns = {x.name for x in store.layouts.values() if x.stored == "column"}
    for name in store.names:
        if name in columns:
            continue
        files = sorted((tmp_path / "tensors").glob(f"{name}-*.safetensors"))
        assert len(files) == 3
        whole = torch.cat([load_file(file)[name] for file in files])
        assert torch.equal(whole, torch.cat(list(store[name])))
    assert len(list((tmp_path / "activations").glob("*.arrow"))) == 3
    assert datasets.load_from_disk(str(tmp_path / "activations")).num_rows == 6


def test_dtypes(hooked, tmp_path):
    model = hooked.tiny(dtype=torch.bfloat16)
    name = "blocks.0.hook_mixer_out"
    data = example(model, 2).to(torch.bfloat16) if not isinstance(model, gl.HookedLanguageModel) else example(model, 2)
    store = harvest(model, data, name, tmp_path / "own")
    _, cache = model.run_with_cache(data, names_filter=name)
    assert cache[name].dtype == torch.bfloat16 and store[name][0].dtype == torch.float32
    assert torch.equal(store[name][:], cache[name].float()), "float32 holds bfloat16 exactly"
    half = harvest(model, data, name, tmp_path / "half", dtype="float16")
    assert torch.equal(half[name][:], cache[name].half())
    with pytest.raises(gl.InputError, match="dtype='int7'"):
        harvest(model, data, name, tmp_path / "none", dtype="int7")


def test_names_of_other_tools_and_mistakes(tmp_path):
    model = gl.HookedMamba.tiny()
    data = example(model, 2)
    store = harvest(model, data, ["blocks.1.hook_after_skip", "blocks.0.mixer.hook_dt"], tmp_path / "out")
    assert store.names == ["blocks.0.mixer.hook_dt", "blocks.1.mixer.hook_gated"]
    for key in ("blocks.1.hook_after_skip", ("gated", 1), ("hook_gated", -1), ("gated", 1, "mixer"), ("after_skip", 1)):
        assert store[key].name == "blocks.1.mixer.hook_gated" and key in store
    with pytest.raises(gl.PointError, match="Did you mean 'blocks.1.mixer.hook_gated'"):
        store["blocks.1.mixer.hook_gatd"]
    with pytest.raises(gl.PointError, match=r"\('dt', 1\) is not in .* It holds: blocks.0.mixer.hook_dt"):
        store["dt", 1]
    with pytest.raises(gl.PointError, match="Did you mean 'blocks.0.mixer.hook_dt'"):
        harvest(model, data, "blocks.0.mixer.hook_dtt", tmp_path / "x")
    with pytest.raises(gl.PointError, match="is computed from blocks.0.mixer.hook_state and not stored"):
        harvest(model, data, "blocks.0.hook_h.3", tmp_path / "x")
    for options, message in (
        ({"reduce": []}, r"reduce=\[\] names no statistic"),
        ({"shard_bytes": 0}, "shard_bytes=0: it is a number of bytes"),
        ({"dtype": "int8"}, "dtype='int8': it is float16, bfloat16"),
    ):
        with pytest.raises(gl.InputError, match=message):
            harvest(model, data, "blocks.0.mixer.hook_dt", tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()
    name = "blocks.0.mixer.hook_dt"
    spelt = [
        harvest(model, data, name, tmp_path / "half", dtype=d) for d in ("float16", "torch.float16", torch.float16)
    ]
    assert spelt[2][name][0].dtype is torch.float16, "one dtype however it is written: the three are one harvest"
    for index, message in ((2, "Sample 2 is out of range"), ((0, 9), "Position 9 of sample 0 is not stored")):
        with pytest.raises(gl.InputError, match=message):
            store["dt", 0][index]


def test_attention_patterns_need_rows_of_one_length(tmp_path):
    model = gl.HookedGriffin.tiny()
    name = next(name for name in model.names if name.endswith("hook_pattern"))
    rows = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 1]]
    with pytest.raises(gl.InputError, match="as wide as its row is long"):
        harvest(model, rows, name, tmp_path)
    store = harvest(model, rows, name, tmp_path, context=5)
    _, cache = model.run_with_cache(torch.tensor([1, 2, 3, *rows[1]]).view(2, 5), names_filter=name)
    assert torch.equal(store[name][:], cache[name].transpose(1, 2))


def test_sizes_are_estimated_and_a_small_disk_is_refused(lm, tmp_path, monkeypatch):
    data = example(lm, 8, pos=16)
    size = gl_store.estimate(lm, data, [*SOME, "blocks.0.mixer.hook_state"], tmp_path)
    assert size.tokens == 128
    store = harvest(lm, data, [*SOME, "blocks.0.mixer.hook_state"], tmp_path / "out")
    assert 0.5 < size.bytes / store.nbytes < 1.1
    assert gl_store.estimate(lm, data, SOME, tmp_path, max_tokens=50).tokens == 50
    monkeypatch.setattr(sizes.shutil, "disk_usage", lambda path: SimpleNamespace(free=sizes.SPARE + 100))
    with pytest.raises(gl.TooLargeError, match=r"The store would take .* free.*Harvest fewer points, fewer tokens"):
        harvest(lm, data, SOME, tmp_path / "small")
    assert not list((tmp_path / "small").glob("*.json*")), "nothing was begun"


def test_max_tokens_and_rows_longer_than_the_model_reads(lm, tmp_path, monkeypatch):
    data = example(lm, 8, pos=16)
    assert len(harvest(lm, data, SOME, tmp_path / "a", max_tokens=50)) == 3
    with pytest.raises(gl.InputError, match="the first row alone has 16 tokens"):
        harvest(lm, data, SOME, tmp_path / "b", max_tokens=5)
    monkeypatch.setattr(lm.cfg, "n_ctx", 6)
    store = harvest(lm, [list(range(16)), [1, 2]], SOME, tmp_path / "c")
    assert [len(store.tokens(i)) for i in range(4)] == [6, 6, 4, 2]
    assert store.manifest["finished"]["notes"] == ["1 documents of more than 6 tokens were cut into rows"]


def test_the_manifest_says_what_the_store_is(lm, tmp_path):
    store = harvest(lm, example(lm, 4), SOME, tmp_path)
    told = json.loads((tmp_path / "manifest.json").read_text())
    assert told["model"]["name"] == lm.cfg.model_name and told["model"]["architecture"] == lm.title
    assert told["points"][0]["equation"] == lm.names[SOME[0]].equation and told["points"][0]["dtype"] == "float64"
    assert told["finished"]["tokens"] == 28 and told["packages"]["torch"] and store.verify() == []
    (file,) = told["finished"]["files"]
    assert (tmp_path / file["name"]).stat().st_size == file["bytes"]


def test_a_folder_that_holds_something_else_is_refused(lm, tmp_path):
    data = example(lm, 4)
    harvest(lm, data, SOME, tmp_path / "out")
    other = type(lm).tiny(seed=1, dtype=torch.float64)
    changed = {
        "model fingerprint": lambda: harvest(other, data, SOME, tmp_path / "out"),
        "settings batch_size": lambda: harvest(lm, data, SOME, tmp_path / "out", batch_size=3),
        "corpus crc32": lambda: harvest(lm, data.flip(0), SOME, tmp_path / "out"),
        "list of points": lambda: harvest(lm, data, SOME[:1], tmp_path / "out"),
    }
    for what, call in changed.items():
        with pytest.raises(gl_store.StoreError, match=f"holds another harvest: its {what}"):
            call()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(gl_store.StoreError, match=r"no store and not empty \(it holds thesis.tex\)"):
        harvest(lm, data, SOME, tmp_path / "mine")
    with pytest.raises(gl_store.StoreError, match="it has no manifest.json"):
        gl_store.open(tmp_path / "mine")
    (tmp_path / "out" / "manifest.json").write_text("{")
    with pytest.raises(gl_store.StoreError, match="manifest.json is damaged"):
        gl_store.open(tmp_path / "out")


def test_a_store_can_be_moved_and_read_without_the_model(lm, tmp_path):
    store = harvest(lm, example(lm, 4), SOME, tmp_path / "out")
    want = store[SOME[0]][:]
    shutil.move(tmp_path / "out", tmp_path / "there")
    assert torch.equal(gl_store.open(tmp_path / "there")[SOME[0]][:], want)

"""A damaged store is never read as a whole one: what is read is what was written, or a StoreError names the file.

One mutation test over the format: manifest, journal, shards of both kinds, statistics, and the two files for `datasets`.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gatedlens as gl
from gatedlens import store as gl_store
from gatedlens.store.disk import journal, manifest
from tests.helpers import example

NAMES = ["blocks.0.mixer.hook_gated", "blocks.1.mixer.hook_state", "blocks.0.mixer.hook_state_start"]
REDUCE = ["mean", "kurtosis", "max", "covariance", "sample(5, seed=3)"]
KINDS = {"tensors": None, "statistics": REDUCE}


@pytest.fixture(scope="module")
def model():
    return gl.HookedMamba.tiny()


def harvest(model, out, reduce=None, seed=0, **options):
    rows = [example(model, 1, 2 + n % 3, seed=seed + n)[0] for n in range(7)]
    options = {"batch_size": 2, "shard_bytes": 3000, "progress": False, "reduce": reduce, **options}
    return gl_store.harvest(model, rows, NAMES, out, **options)


@pytest.fixture(scope="module")
def stores(model, tmp_path_factory):
    """{kind: folder} of whole stores, which the tests copy."""
    folder = tmp_path_factory.mktemp("stores")
    return {kind: harvest(model, folder / kind, reduce).folder for kind, reduce in KINDS.items()}


@pytest.fixture(scope="module")
def truth(stores):
    return {kind: everything(folder) for kind, folder in stores.items()}


def everything(folder: Path) -> dict[str, torch.Tensor]:
    """All that can be read of a store, by every way that reads."""
    store = gl_store.open(folder)
    if store.manifest["settings"]["reduce"]:
        return {f"{name} {key}": value for name in NAMES for key, value in store.statistics[name].items()}
    found = {"length": torch.tensor([len(store), store.n_tokens])}
    for name in NAMES:
        found |= {f"{name} {i}": x for i, x in enumerate(store[name])}
        found[f"{name} all"] = torch.cat(list(store.loader(name, batch_size=3)))
    for i in range(len(store)):
        found |= {
            f"tokens {i}": store.tokens(i),
            f"positions {i}": store.positions(i),
            f"documents {i}": store.documents(i),
        }
    return found


def same(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> bool:
    """The kurtosis of what is constant is NaN, and stays it."""
    return found.keys() == want.keys() and all(
        torch.equal(found[key].nan_to_num(0.123), want[key].nan_to_num(0.123)) for key in want
    )


def is_noticed(folder: Path, want: dict[str, torch.Tensor], name: str) -> bool:
    """Whether reading raises a StoreError that names the file; what is read without one must be what was written."""
    try:
        found = everything(folder)
    except gl.StoreError as error:
        assert Path(name).name in str(error), f"{name}: {error}"
        return True
    assert same(found, want), f"{name}: wrong numbers, and nobody noticed"
    return False


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in some JSON; of a list its first and last."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    inner = list(inner) if isinstance(value, dict) else list(inner)[:1] + list(inner)[1:][-1:]
    for key, one in inner:
        yield (*path, key)
        yield from places(one, (*path, key))


def edited(value: Any, path: tuple[Any, ...], edit: Callable[[Any, Any], None]) -> Any:
    whole = json.loads(json.dumps(value))
    inner = whole
    for key in path[:-1]:
        inner = inner[key]
    edit(inner, path[-1])
    return whole


def drop(inner: Any, key: Any) -> None:
    del inner[key]


def null(inner: Any, key: Any) -> None:
    inner[key] = None


def put(new: Any) -> Callable[[Any, Any], None]:
    def edit(inner: Any, key: Any) -> None:
        inner[key] = new

    return edit


EDITS = {
    "drop": drop, "null": null, "text": put("x"), "number": put(7), "minus": put(-1), "huge": put(10**30), "true": put(True),
    "half": put(0.5), "list": put([]), "lists": put([[1]]), "object": put({}), "away": put("../../x"),
}  # fmt: skip


@pytest.mark.parametrize("how", EDITS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_value_of_the_manifest(kind, how, stores, truth, tmp_path):
    """As it was found, and with the checksum of who means it: then what has another form is still named."""
    folder = tmp_path / "store"
    shutil.copytree(stores[kind], folder)
    told = json.loads((folder / "manifest.json").read_text())
    for path in places(told):
        changed = edited(told, path, EDITS[how])
        if changed == told and type_of(changed, path) is type_of(told, path):
            continue
        (folder / "manifest.json").write_text(json.dumps(changed))
        noticed = is_noticed(folder, truth[kind], "manifest.json")
        assert noticed or path == ("finished", "at"), f"{path} {how}"
        if "checksum" in changed and path[0] in ("points", "aliases", "settings", "finished"):
            if isinstance(changed.get("finished"), dict):
                changed["checksum"] = manifest.checksum_of(changed)
            (folder / "manifest.json").write_text(json.dumps(changed))
            with contextlib.suppress(gl.StoreError, gl.InputError, gl.PointError):
                everything(folder)
    (folder / "manifest.json").write_text(json.dumps(told))
    assert not is_noticed(folder, truth[kind], "manifest.json")


def type_of(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        if not isinstance(value, dict | list) or (isinstance(value, dict) and key not in value) or len(value) == 0:
            return None
        value = value[key] if isinstance(value, dict) or key < len(value) else None
    return type(value)


def test_a_misfit_says_where_what_and_what_was_expected(stores, tmp_path):
    folder = tmp_path / "store"
    shutil.copytree(stores["tensors"], folder)
    told = json.loads((folder / "manifest.json").read_text())
    for path, edit, said in (
        (
            ("points", 1, "dtype"),
            put("float99"),
            r"points\[1\].dtype is 'float99', expected one of 'float16', 'bfloat16'",
        ),
        (("points", 0, "shape"), null, r"points\[0\].shape is null, expected a list"),
        (("finished", "rows"), put("8"), "finished.rows is '8', expected a whole number of at least 0"),
        (("settings", "text"), drop, "settings.text is missing"),
        (
            ("finished", "files", 0, "name"),
            put("../x"),
            r"finished.files\[0\].name is '../x', expected the path of a file",
        ),
        (("format",), put("store 9"), "is no manifest of 'gatedlens activation store 2': format is 'store 9'"),
        (("model", "name"), put("another"), "its checksum is .* expected .*: it was changed after it was written"),
        (("finished", "tokens"), put(999), "its checksum is"),
    ):
        (folder / "manifest.json").write_text(json.dumps(edited(told, path, edit)))
        with pytest.raises(gl.StoreError, match=f"manifest.json .*{said}"):
            gl_store.open(folder)
    changed = edited(told, ("finished", "tokens"), put(999))
    (folder / "manifest.json").write_text(json.dumps({**changed, "checksum": manifest.checksum_of(changed)}))
    with pytest.raises(gl.StoreError, match=r"finished.tokens is 999 in manifest.json, and journal.jsonl has \d+"):
        gl_store.open(folder)


def line(told: Any) -> bytes:
    text = json.dumps(told, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


@pytest.mark.parametrize("how", EDITS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_value_of_the_journal(kind, how, stores, truth, tmp_path):
    folder = tmp_path / "store"
    shutil.copytree(stores[kind], folder)
    lines = (folder / "journal.jsonl").read_bytes().splitlines(keepends=True)
    told = json.loads(lines[1][9:])
    for path in places(told):
        changed = edited(told, path, EDITS[how])
        if line(changed) != lines[1]:
            (folder / "journal.jsonl").write_bytes(b"".join([lines[0], line(changed), *lines[2:]]))
            assert is_noticed(folder, truth[kind], "journal.jsonl"), f"{path} {how}"
    for order in ([1, 0, 2, 3], [0, 1, 3], [0, 1, 2], [0, 1, 2, 3, 3], [0, 0, 1, 2, 3], []):
        (folder / "journal.jsonl").write_bytes(b"".join(lines[i] for i in order))
        assert is_noticed(folder, truth[kind], "journal.jsonl"), order


def harms(folder: Path, path: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What can become of a file."""
    data = path.read_bytes()
    size = len(data)
    for at in sorted({0, 9, size // 3, 2 * size // 3, size - 40, size - 1}):
        if 0 <= at < size:
            for bit in (1, 7):
                yield (
                    f"byte {at} bit {bit}",
                    lambda at=at, bit=bit: path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]),
                )
            yield f"cut at {at}", lambda at=at: path.write_bytes(data[:at])
    yield "longer", lambda: path.write_bytes(data + b"xx\n")
    yield "not UTF-8", lambda: path.write_bytes(b"\xff\xfe" + data)
    yield "zeros", lambda: path.write_bytes(b"\0" * size)
    yield "text", lambda: path.write_text("nothing of ours\n")
    yield "nested", lambda: path.write_text("[" * 100_000)
    yield "digits", lambda: path.write_text('{"format": ' + "9" * 10_000 + "}")
    yield "missing", path.unlink
    yield "a folder", lambda: path.unlink() or path.mkdir()
    other = next((p for p in sorted(path.parent.glob(f"*{path.suffix}")) if p.is_file() and p != path), None)
    if other is not None:
        yield f"as {other.name}", lambda: path.write_bytes(other.read_bytes())


def whole(path: Path, data: bytes) -> None:
    if path.is_dir():
        path.rmdir()
    path.write_bytes(data)


FILES = {
    "tensors": [
        "manifest.json", "journal.jsonl", "activations/data-00000.arrow", "activations/dataset_info.json",
        "activations/state.json", "tensors/blocks.1.mixer.hook_state-00000.safetensors",
    ],
    "statistics": ["manifest.json", "journal.jsonl", "statistics.safetensors"],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in FILES.items() for name in names])
def test_every_file_harmed_in_every_way(model, kind, name, stores, truth, tmp_path):
    """Reading notices, or gives what was written; `verify` notices in any case; the same call of `harvest` mends it."""
    folder = tmp_path / "store"
    shutil.copytree(stores[kind], folder)
    path, data = folder / name, (folder / name).read_bytes()
    for harm, do in harms(folder, path):
        do()
        noticed = is_noticed(folder, truth[kind], name)
        if not noticed:
            assert gl_store.open(folder).verify() == [name] or name == "manifest.json", harm  # its white space
        whole(path, data)
    assert same(everything(folder), truth[kind]) and gl_store.open(folder).verify() == []
    if name == "manifest.json":  # without it nothing is known
        return
    for harm in (lambda: path.write_bytes(data[:-3]), lambda: path.write_bytes(b"x" + data[1:]), path.unlink):
        harm()
        harvest(model, folder, KINDS[kind])
        assert same(everything(folder), truth[kind]) and gl_store.open(folder).verify() == []
        assert path.read_bytes() == data
    path.unlink()
    path.mkdir()
    with pytest.raises(gl.StoreError, match=path.name):
        harvest(model, folder, KINDS[kind])


def test_every_tensor_of_the_statistics(stores, truth, tmp_path):
    from gatedlens.store.disk import statistics_file

    folder = tmp_path / "store"
    shutil.copytree(stores["statistics"], folder)
    told = json.loads((folder / "manifest.json").read_text())
    held = statistics_file.read_statistics(folder / "statistics.safetensors")
    told["finished"] = None  # under way: no checksum of the whole file is known
    (folder / "manifest.json").write_text(json.dumps({**told, "checksum": manifest.checksum_of(told)}))
    assert same(everything(folder), truth["statistics"])
    for key, part in held.parts.items():
        for field, value in part.items():
            for new in (
                None,
                value.double() if value.dtype != torch.float64 else value.float(),
                value[None],
                value.new_zeros(3, 7),
            ):
                changed = {**part, field: new} if new is not None else {k: v for k, v in part.items() if k != field}
                statistics_file.write_statistics(
                    folder / "statistics.safetensors", held._replace(parts={**held.parts, key: changed})
                )
                with pytest.raises(gl.StoreError, match=rf"statistics.safetensors is damaged: .*/{field} is"):
                    everything(folder)
    for batches in (0, 1, 9):
        statistics_file.write_statistics(folder / "statistics.safetensors", held._replace(batches=batches))
        with pytest.raises(gl.StoreError, match=f"it is of {batches} batches, expected 4"):
            everything(folder)


def test_files_of_another_store_are_noticed(model, stores, truth, tmp_path):
    """Equal in every count and length: only the checksums tell."""
    for kind, reduce in KINDS.items():
        other = harvest(type(model).tiny(seed=1), tmp_path / f"other-{kind}", reduce).folder
        for name in [name for name in FILES[kind] if name.endswith((".arrow", ".safetensors")) and "start" not in name]:
            folder = tmp_path / f"{kind}-{Path(name).name}"
            shutil.copytree(stores[kind], folder)
            shutil.copy(other / name, folder / name)
            assert is_noticed(folder, truth[kind], name)


def test_a_journal_that_is_gone_is_noticed_before_the_end(model, stores, tmp_path):
    for kind in KINDS:
        folder = tmp_path / kind
        shutil.copytree(stores[kind], folder)
        told = json.loads((folder / "manifest.json").read_text())
        told["finished"] = None
        (folder / "manifest.json").write_text(json.dumps({**told, "checksum": manifest.checksum_of(told)}))
        assert not gl_store.open(folder).is_finished
        lines = (folder / "journal.jsonl").read_bytes()
        (folder / "journal.jsonl").write_bytes(lines[:-7])  # the batch under way
        assert len(gl_store.open(folder)) == 6
        (folder / "journal.jsonl").unlink()
        with pytest.raises(gl.StoreError, match=r"journal.jsonl is missing, and .* holds"):
            gl_store.open(folder)
        shutil.rmtree(folder / "activations", ignore_errors=True)
        shutil.rmtree(folder / "tensors", ignore_errors=True)
        (folder / "statistics.safetensors").unlink(missing_ok=True)
        assert len(gl_store.open(folder)) == 0, "a harvest that has just begun"


def test_a_batch_is_compared_once(stores, monkeypatch):
    from gatedlens.store.disk import mapped

    store, counted = gl_store.open(stores["tensors"]), []

    class Counting:
        @staticmethod
        def crc32(data):
            counted.append(len(data))
            return zlib.crc32(data)

    monkeypatch.setattr(mapped, "zlib", Counting)
    for _ in range(3):
        _ = store[NAMES[1]][0], store[NAMES[1]][1], store.tokens(0)
    assert len(counted) == 2, "one tensor's batch and one record batch"


def test_statistics_under_way_go_on_only_with_their_own(model, tmp_path, caplog):
    """Of another harvest over the same batches: the file is whole, and not that of this journal."""
    whole = everything(harvest(model, tmp_path / "whole", REDUCE).folder)
    ours, other = (
        harvest(m, tmp_path / str(i), REDUCE).folder for i, m in enumerate((model, type(model).tiny(seed=1)))
    )
    told = json.loads((ours / "manifest.json").read_text())
    told["finished"] = None
    (ours / "manifest.json").write_text(json.dumps({**told, "checksum": manifest.checksum_of(told)}))
    shutil.copy(other / "statistics.safetensors", ours)
    harvest(model, ours, REDUCE)
    assert "is of other batches than journal.jsonl" in caplog.text and same(everything(ours), whole)


def test_whoever_goes_on_compares_every_number_of_the_model(tmp_path):
    """One weight, wherever it lies; a number that is no parameter; a hook: each gives other activations."""
    model = gl.HookedMamba.tiny()
    harvest(model, tmp_path)
    weight = model.wrapped.backbone.embedding.weight
    with torch.no_grad():
        weight[-1, -1] += 1
    with pytest.raises(gl.StoreError, match="holds another harvest: its model fingerprint"):
        harvest(model, tmp_path)
    with torch.no_grad():
        weight[-1, -1] -= 1
    norm = model.wrapped.backbone.layers[0].norm
    norm.eps *= 2
    with pytest.raises(gl.StoreError, match="holds another harvest: its model fingerprint"):
        harvest(model, tmp_path)
    norm.eps /= 2
    with (
        model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: x + 1)]),
        pytest.raises(gl.StoreError, match="holds another harvest: its model hooks"),
    ):
        harvest(model, tmp_path)
    assert harvest(model, tmp_path).verify() == []


def test_the_same_ids_as_other_documents_are_another_batch(model, tmp_path):
    ids = [[1, 2], [3, 4]]
    options = {"batch_size": 2, "progress": False}
    gl_store.harvest(model, iter(ids), NAMES[:1], tmp_path, **options)
    told = json.loads((tmp_path / "manifest.json").read_text())
    told["finished"] = None
    (tmp_path / "manifest.json").write_text(json.dumps({**told, "checksum": manifest.checksum_of(told)}))
    with pytest.raises(gl.StoreError, match="batch 0 of this corpus is not the one that was harvested"):
        gl_store.harvest(model, iter([[], *ids]), NAMES[:1], tmp_path, **options)


def test_a_store_of_version_0_1_0_is_read(model, stores, truth, tmp_path):
    """It has no checksum of its manifest; whoever would go on with it is told why not."""
    folder = tmp_path / "store"
    shutil.copytree(stores["tensors"], folder)
    told = json.loads((folder / "manifest.json").read_text())
    told["format"] = manifest.FIRST
    del told["checksum"], told["model"]["hooks"], told["finished"]["besides"]
    (folder / "manifest.json").write_text(json.dumps(told))
    assert same(everything(folder), truth["tensors"]) and gl_store.open(folder).verify() == []
    with pytest.raises(gl.StoreError, match="was written by an earlier version of gatedlens"):
        harvest(model, folder)
    next(point for point in told["points"] if point["name"] == NAMES[1])["shape"].reverse()
    (folder / "manifest.json").write_text(json.dumps(told))
    with pytest.raises(gl.StoreError, match="its head is not that of blocks.1.mixer.hook_state"):
        everything(folder)


def test_reading_needs_no_journal_lines_beyond_its_own(stores):
    assert [entry.batch for entry in journal.read(stores["tensors"] / "journal.jsonl")] == [0, 1, 2, 3]

"""Saved values: what was written is read again; what was tampered with is read for what it says, or refused by name."""

from __future__ import annotations

import copy
import csv
import json
import random
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import gatedlens as gl
from gatedlens.attribution.scores import Attribution
from gatedlens.circuits.circuit import Circuit
from gatedlens.steering import SteeringVector

WRONG = (None, True, -1, 10**400, 1.5, "x", "", [], [None], [[1]], {}, {"x": 1})


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    """One of each kind that saves itself."""
    model = gl.from_pretrained("gatedlens/mamba-recall", device="cpu")
    batch = gl.tasks.recall(2, seed=0)
    clean, corrupted = batch.tokens[:1], batch.tokens[1:]
    metric = gl.metrics.logit_difference(1, 2)
    _, state = model(clean, return_state=True)
    result = gl.Result(
        torch.tensor([[0.0, 1.0, torch.nan], [2.0, -3.0, 0.5]]),
        ("layer", "pos"),
        {"pos": ["<bos>", "D", "D"]},
        title="patching",
        value="normalised",
        facts={"model": "tiny", "baseline": 0.25},
    )
    return {
        "result": result,
        "attribution": gl.attribution.random(model, batch.tokens),
        "circuit": gl.circuits.eap(model, clean, corrupted, metric).top(3),
        "state": state,
        "steering": gl.steering.vector(model, clean, corrupted, "blocks.0.hook_resid_post"),
    }


LOADERS = {
    "result": gl.Result.load,
    "attribution": Attribution.load,
    "circuit": Circuit.load,
    "state": gl.RecurrentState.load,
    "steering": SteeringVector.load,
}
JSON = ("result", "attribution", "circuit")


def suffix(kind: str) -> str:
    return "json" if kind in JSON else "safetensors"


def use(loaded: Any) -> None:
    """What a notebook does first: whatever loads must stand this."""
    repr(loaded)
    if isinstance(loaded, gl.Result):
        loaded.top(2)
        loaded.to_dict()
    if isinstance(loaded, Attribution):
        assert all(read is not None for read in (loaded.method, loaded.layers, loaded.ranks, loaded.explained))
    if isinstance(loaded, Circuit):
        assert loaded.nodes is not None and loaded.pruned() is not None


def opens(kind: str, path: Any) -> bool:
    """Whether the file loads (and can then be used); if not, the error is ours and names the file."""
    try:
        loaded = LOADERS[kind](path)
    except gl.GatedlensError as error:
        assert path.name in str(error), f"the error does not name the file: {error}"
        return False
    use(loaded)
    return True


@pytest.mark.parametrize("kind", LOADERS)
def test_what_was_saved_is_loaded(kind, values, tmp_path):
    path = tmp_path / f"saved.{suffix(kind)}"
    values[kind].save(path)
    assert opens(kind, path)


def places(data: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all fields, and of the first entries of lists, within JSON."""
    inner = (
        list(data.items()) if isinstance(data, dict) else list(enumerate(data[:2])) if isinstance(data, list) else []
    )
    return [path for key, value in inner for path in [(*at, key), *places(value, (*at, key))]]


@pytest.mark.parametrize("kind", JSON)
def test_a_field_that_is_gone_or_another_is_named(kind, values, tmp_path):
    data, path = json.loads(json.dumps(values[kind].to_dict())), tmp_path / "saved.json"
    refused = total = 0
    for place in places(data):
        for wrong in (*WRONG, "gone"):
            broken = copy.deepcopy(data)
            holder = broken
            for key in place[:-1]:
                holder = holder[key]
            if wrong == "gone":
                del holder[place[-1]]
            else:
                holder[place[-1]] = wrong
            path.write_text(json.dumps(broken))
            total += 1
            refused += not opens(kind, path)
    assert refused > total / 2
    for field in data:  # a field of the file itself is named, whatever is wrong with it
        path.write_text(json.dumps({key: value for key, value in data.items() if key != field}))
        if field != "nodes":  # for whoever reads the file: they follow from the edges
            with pytest.raises(gl.InputError, match=f"{field!r} is missing"):
                LOADERS[kind](path)


@pytest.mark.parametrize("kind", LOADERS)
def test_bytes_that_are_flipped_cut_or_foreign_are_explained(kind, values, tmp_path):
    path = tmp_path / f"saved.{suffix(kind)}"
    values[kind].save(path)
    whole = path.read_bytes()
    dice = random.Random(0)
    for _ in range(60):
        data = bytearray(whole)
        data[dice.randrange(min(len(data), 4000))] ^= 1 << dice.randrange(8)
        path.write_bytes(data)
        opens(kind, path)
    for cut in (0, 1, 7, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert not opens(kind, path)
    for foreign in (b"\xff\xfe\x00", b"[" * 100_000, b"null", b"[1, 2]", b'"text"', b"1" * 5000, b"PK\x03\x04"):
        path.write_bytes(foreign)
        assert not opens(kind, path)
    path.unlink()
    assert not opens(kind, path)
    path.mkdir()
    assert not opens(kind, path)


@pytest.mark.parametrize("kind", ["state", "steering"])
def test_tensors_and_metadata_that_are_gone_or_others_are_named(kind, values, tmp_path):
    path, refused = tmp_path / "saved.safetensors", 0
    values[kind].save(path)
    with safe_open(str(path), "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        meta = file.metadata()
    odd = (torch.zeros(()), torch.zeros(0), torch.zeros(9, 9), torch.ones(1, dtype=torch.bool), torch.tensor([-1]))
    for name in tensors:
        for wrong in (None, *odd):
            others = {key: value for key, value in tensors.items() if key != name}
            save_file(others if wrong is None else {**others, name: wrong}, path, meta)
            refused += not opens(kind, path)
        save_file({**tensors, f"{name}.other": tensors[name].clone(), "blocks.x.scan": torch.zeros(1)}, path, meta)
        opens(kind, path)
    assert refused
    for name in meta:
        for wrong in (None, "", "x", "[]", "{", "1"):
            others = {key: value for key, value in meta.items() if key != name}
            save_file(tensors, path, others if wrong is None else {**others, name: wrong})
            opens(kind, path)
    save_file(tensors, path)
    assert not opens(kind, path)


def test_a_result_is_written_as_json_or_as_cells_and_nothing_else(values, tmp_path):
    result = values["result"]
    with (result.save(tmp_path / "cells.csv")).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[4] == {"layer": "1", "pos": "1", "pos_label": "D", "value": "-3.0"} and len(rows) == 6
    pandas = pytest.importorskip("pandas")
    read = pandas.read_csv(tmp_path / "cells.csv")
    assert list(read.columns) == list(result.to_dataframe().columns)
    assert read["value"].equals(result.to_dataframe()["value"])
    for name in ("cells.xlsx", "cells.pt", "cells.txt"):
        with pytest.raises(gl.InputError, match=r"\.json .* or \.csv"):
            result.save(tmp_path / name)
        assert not (tmp_path / name).exists()
    with pytest.raises(gl.InputError, match="not JSON"):
        gl.Result.load(tmp_path / "cells.csv")


def test_a_result_that_json_cannot_hold_is_refused_and_the_old_file_stays(values, tmp_path):
    path = values["result"].save(tmp_path / "result.json")
    before = path.read_bytes()
    odd = gl.Result(torch.zeros(1), ("pos",), facts={"why": object()})
    with pytest.raises(gl.InputError, match=r"facts.*object"):
        odd.save(path)
    assert path.read_bytes() == before

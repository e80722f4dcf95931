"""Bundles (profiles) and dicts of Results keep what a Result promises: axes, data frames, files, pictures."""

from __future__ import annotations

import json

import matplotlib
import pytest
import torch

import gatedlens as gl
from gatedlens.errors import InputError, PointError
from tests.helpers import example

matplotlib.use("agg")


def test_profiles_know_their_axes_and_go_there_and_back(model, tmp_path):
    stack = gl.implicit_attention(model, example(model))
    found = stack.profiles(progress=False)
    distance, half_life, *_ = found
    assert distance is found.distance and len(found) == 5, "a named tuple as before"
    assert half_life.axes == ("layer", "batch") and distance.axes == ("layer", "batch", "distance")
    assert half_life.labels["layer"] == list(stack.names)
    frame = found.to_dataframe()
    assert list(frame.columns) == ["layer", "batch", "half_life", "mean_distance", "effective_context", "sharpness"]
    assert len(frame) == half_life.numel() and frame["half_life"][0] == pytest.approx(float(half_life[0, 0]))
    back = gl.profiles.Profile.load(found.save(tmp_path / "profile.json"))
    for one, other in zip(found, back, strict=True):
        assert torch.allclose(one.double(), other) and one.axes == other.axes and one.labels == other.labels
    assert found.plot("half_life").axes and found.plot().axes
    with pytest.raises(InputError, match="'half_lives' is no field.*Did you mean 'half_life'"):
        found.plot("half_lives")
    with pytest.raises(InputError, match="kind"):
        gl.profiles.Induction.load(tmp_path / "profile.json")


def test_several_results_are_a_dict_that_saves_and_sorts(tmp_path):
    a = gl.Result(
        torch.tensor([[1.0, -5.0]]), ("layer", "pos"), {"layer": [3], "pos": ["x", "y"]}, "Attribution: a", "score"
    )
    b = gl.Result(torch.tensor([2.0]), ("pos",), title="Attribution: b", value="score")
    found = gl.Results({"mixer.hook_a": a, "hook_b": b})
    assert isinstance(found, dict) and found["hook_b"] is b and list(found) == ["mixer.hook_a", "hook_b"]
    assert found.top(2) == [{"name": "mixer.hook_a", **a.top(1)[0]}, {"name": "hook_b", **b.top(1)[0]}]
    assert found.top(1, signed=True)[0]["value"] == 2
    assert found.strongest().values.tolist() == [-5, 2] and found.plot().axes
    frame = found.to_dataframe()
    assert len(frame) == 3 and list(frame["name"]) == ["mixer.hook_a"] * 2 + ["hook_b"]
    back = gl.Results.load(found.save(tmp_path / "found.json"))
    assert torch.equal(back["mixer.hook_a"].values, a.values.double()) and back["hook_b"].title == b.title
    with pytest.raises(PointError, match="no result of 'hook_c'.*Did you mean 'hook_b'"):
        found["hook_c"]
    (tmp_path / "found.json").write_text(json.dumps({"format": 1, "results": {"a": {}}}))
    with pytest.raises(InputError, match="result"):
        gl.Results.load(tmp_path / "found.json")


def test_some_entries_stay_axes():
    found = gl.Result(torch.arange(12.0).reshape(3, 4), ("layer", "pos"), {"pos": [*"abcd"]})
    some = found.some(pos=slice(1, 3), layer=[-1])
    assert torch.equal(some.values, found.values[[2]][:, 1:3]) and some.labels == {"pos": ["b", "c"], "layer": [2]}
    with pytest.raises(InputError, match="entries are numbers from 0 to 3"):
        found.some(pos=[4])

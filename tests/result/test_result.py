"""Result: named axes, labels, its plot, and every way out of it and back."""

from __future__ import annotations

import json
from dataclasses import replace

import matplotlib
import numpy
import pytest
import torch

from gatedlens import InputError
from gatedlens.result.result import Result

matplotlib.use("agg")
VALUES = torch.tensor([[0.0, 1.0, -3.0], [0.5, torch.nan, 2.0]], dtype=torch.float64)


@pytest.fixture
def result():
    labels = {"pos": ["<bos>", "D", "D"]}
    return Result(VALUES, ("layer", "pos"), labels, "Patching", "normalised", {"model": "m", "clean": 0.25})


def test_it_stands_where_a_tensor_does(result):
    assert result.shape == (2, 3) and result[0, 2] == -3 and len(result) == 2
    assert torch.equal(torch.nan_to_num(result), torch.nan_to_num(VALUES))
    assert result.nansum() == VALUES.nansum() and numpy.asarray(result).shape == (2, 3)
    assert torch.stack([result, result]).shape == (2, 2, 3)


def test_it_is_computed_with_as_a_tensor_is(result):
    want = VALUES.nan_to_num(7)
    result = replace(result, values=want)
    for found, value in (
        (torch.as_tensor(result), want), (torch.tensor([1.0]) - result, 1 - want), (result - 1, want - 1),
        (1 - result, 1 - want), (2 * result / result, 2 * want / want), (result**2, want**2), (-result, -want),
        (abs(result), want.abs()), (result @ result.T, want @ want.T), (result > 0.5, want > 0.5),
        (result == result, want == want), (result != want, want != want), (result + result, 2 * want),
    ):  # fmt: skip
        assert type(found) is torch.Tensor and torch.allclose(found, value.to(found), equal_nan=True)
    one = result.at(layer=0, pos=1)
    assert float(one) == 1 and int(one) == 1 and bool(one) and f"{one:.2f}" == "1.00"
    assert len({result, result}) == 1, "it is told apart by identity, as a tensor is"


def test_a_layer_that_is_not_there_is_no_index():
    some = Result(torch.arange(3.0), ("layer",), {"layer": [0, 1, 3]})
    assert some.at(layer=3).values == 2 and some.at(layer=-1).values == 2
    with pytest.raises(InputError, match="layer=2 is not there; the axis holds"):
        some.at(layer=2)


def test_entries_and_labels_by_name(result):
    assert result["pos"] == ["<bos>", "D", "D"] and result["layer"] == [0, 1]
    assert torch.equal(result.at(pos="<bos>").values, VALUES[:, 0])
    assert result.at(pos=-1, layer=0).values == -3 and result.at(layer=1).axes == ("pos",)
    assert torch.allclose(result.mean_over("layer").values, VALUES.mean(0), equal_nan=True)


def test_the_strongest_cells(result):
    assert [cell["value"] for cell in result.top(10)] == [-3, 2, 1, 0.5, 0]
    assert result.top(1) == [{"layer": 0, "pos": 2, "pos_label": "D", "value": -3.0}]
    assert result.top(1, signed=True)[0]["value"] == 2 and "'D'" in repr(result)


def test_sizes_and_colours_are_measured_from_the_baseline(result):
    raw = replace(result, values=VALUES - 9, facts={"baseline": -9.0})
    assert [cell["value"] for cell in raw.top(2)] == [-12, -7] and raw.top(1, signed=True)[0]["value"] == -7
    assert raw.plot().axes[0].images[0].get_clim() == (-12, -6), "white where nothing happens"
    bars = raw.at(layer=0).plot().axes[0].patches
    assert [(bar.get_y(), bar.get_height()) for bar in bars] == [(-9, 0), (-9, 1), (-9, -3)]


def test_there_and_back(result, tmp_path):
    back = Result.load(result.save(tmp_path / "r.json"))
    assert torch.allclose(back.values, VALUES, equal_nan=True)
    assert (back.axes, back.labels, back.title, back.value, back.facts) == (
        result.axes,
        result.labels,
        result.title,
        result.value,
        result.facts,
    )
    assert json.loads((tmp_path / "r.json").read_text())["values"][4] is None
    frame = result.to_dataframe()
    assert list(frame.columns) == ["layer", "pos", "pos_label", "value"] and len(frame) == 6


def test_plots_have_titles_units_and_labels(result):
    figure = result.plot()
    ax = figure.axes[0]
    assert ax.get_title() == "Patching" and ax.get_xlabel() == "pos" and ax.get_ylabel() == "layer"
    assert figure.axes[1].get_ylabel() == "normalised"
    assert [t.get_text() for t in ax.get_xticklabels()] == ["<bos>", "D", "D"]
    bars = result.at(layer=0).plot().axes[0]
    assert [bar.get_height() for bar in bars.patches] == [0, 1, -3] and bars.get_ylabel() == "normalised"
    many = Result(torch.rand(3, 2, 200), ("kind", "layer", "pos"), title="T").plot()
    assert [ax.get_title() for ax in many.axes if ax.images] == ["kind 0", "kind 1", "kind 2"]
    limits = {ax.images[0].get_clim() for ax in many.axes if ax.images}
    assert len(limits) == 1, "panels share one scale"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.at(head=0), "no axis 'head'; its axes are layer, pos"),
        (lambda r: r.at(pos="D"), "stands there more than once"),
        (lambda r: r.at(pos="<boss>"), "Did you mean '<bos>'"),
        (lambda r: r.at(layer=7), "layer=7 is not there"),
        (lambda r: Result(VALUES, ("pos",)), "one name a dim"),
        (lambda r: Result(VALUES, ("layer", "pos"), {"pos": ["a"]}), "1 labels for the 3 entries"),
        (lambda r: Result(torch.rand(1, 1, 1, 1), ("a", "b", "c", "d")).plot(), "one to three axes"),
        (lambda r: Result(torch.rand(99, 2, 2), ("a", "b", "c")).plot(), "at most 72"),
        (lambda r: Result.from_dict({}), "no saved result"),
    ],
)
def test_mistakes_are_explained(result, call, message):
    with pytest.raises(InputError, match=message):
        call(result)


def test_the_strongest_do_not_hang_on_rounding():
    """What agrees in five figures stands in the order of the cells; what is a million times smaller is still in order."""
    values = torch.tensor([[1 - 1e-9, 1.0, 1 + 1e-9], [3e-7, 1e-7, 2e-7]], dtype=torch.float64)
    result = Result(values, ("layer", "pos"))
    assert [(c["layer"], c["pos"]) for c in result.top(6)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 2), (1, 1)]
    assert [c["pos"] for c in Result(torch.tensor([0.0, torch.nan, -torch.inf, 2.0]), ("pos",)).top(9)] == [2, 3, 0]
    assert Result(torch.zeros(0), ("pos",)).top() == []

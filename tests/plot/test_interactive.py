"""plotly's figures: the same numbers and labels as matplotlib's, to hover over."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import gatedlens as gl
from tests.plot import gallery

pytest.importorskip("plotly")
TOKENS = ["<bos>", " a", "<b>"]


def test_a_heat_map_holds_the_matrix_and_its_tokens():
    matrix = torch.tensor([[1.0, 0, 0], [0.5, -2, 0], [0, 0, torch.nan]])
    figure = gl.plot.heatmap(matrix, TOKENS, title="A <title>", value="attention", backend="plotly")
    (shown,) = figure.data
    assert shown.z[1][1] == -2 and shown.z[2][2] is None and (shown.zmin, shown.zmax) == (-2, 2)
    assert figure.layout.title.text == "A &lt;title&gt;" and figure.layout.xaxis.ticktext == (
        "&lt;bos&gt;",
        "␣a",
        "&lt;b&gt;",
    )
    assert "␣a (1)" in shown.text[1][0] and shown.colorbar.title.text == "attention"
    json.loads(figure.to_json())


def test_results_of_one_two_and_three_axes():
    bars = gl.Result(torch.tensor([1.0, -1, 3]), ("pos",), {"pos": TOKENS}, "T", "score").plot(backend="plotly")
    assert list(bars.data[0].y) == [1, -1, 3] and bars.layout.yaxis.title.text == "score"
    two = gl.Result(gallery.sweep(4, 300), ("layer", "pos"), title="T").plot(backend="plotly", pos=slice(0, 50))
    assert len(two.data[0].z) == 4 and len(two.data[0].z[0]) == 50 and len(two.layout.xaxis.ticktext) <= 40
    three = gl.Result(gallery.sweep(2, 3, 4), ("layer", "pos", "head"), title="T").plot(backend="plotly")
    assert len(three.data) == 2 and len({(one.zmin, one.zmax) for one in three.data}) == 1
    assert [step.label for step in three.layout.sliders[0].steps] == ["0", "1"]
    ranks = gl.Result(torch.tensor([[0.0, 99]]).T, ("layer", "pos"), value="rank", facts={"scale": "log"})
    assert gl.Result(ranks.values.expand(2, 2), ("a", "b"), value="rank", facts={"scale": "log"}).plot(
        backend="plotly"
    ).data[0].z[1] == pytest.approx([2, 2])


def test_a_token_map_and_a_circuit():
    figure = gl.plot.text([0.5, -1.0, 0.0], TOKENS, "T", value="relevance", backend="plotly")
    assert len(figure.layout.shapes) == 3 and figure.data[0].text == ("&lt;bos&gt;", "␣a", "&lt;b&gt;")
    some = gallery.circuit(2, 5)
    drawn = some.plot(backend="plotly")
    assert len(drawn.data) == 5 + 1 and set(drawn.data[-1].text) == set(some.graph)
    assert {one.line.color for one in drawn.data[:-1]} <= {"#b2182b", "#2166ac"}


def test_without_plotly_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(ImportError, match=r"gatedlens\[plotly\]"):
        gl.plot.heatmap(torch.rand(2, 2), backend="plotly")

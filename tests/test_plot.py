"""Plots: what is drawn, what is labelled, what is refused."""

from __future__ import annotations

import matplotlib
import pytest
import torch

import gatedlens as gl
from gatedlens.page import attention_page

matplotlib.use("agg")
TOKENS = ["<bos>", " a", "\n", "<b>", "&"]


def test_heatmap_draws_the_matrix_with_its_labels():
    matrix = torch.randn(5, 5)
    figure = gl.plot.heatmap(matrix, TOKENS, title="T", value="v")
    ax = figure.axes[0]
    assert torch.allclose(torch.as_tensor(ax.images[0].get_array().data), matrix)
    assert ax.get_title() == "T" and ax.get_xlabel() == "source token" and figure.axes[1].get_ylabel() == "v"
    assert [t.get_text() for t in ax.get_xticklabels()] == ["<bos>", "␣a", "⏎", "<b>", "&"]
    low, high = ax.images[0].get_clim()
    assert low == -high, "signed values are centred"
    assert gl.plot.heatmap(matrix.abs()).axes[0].images[0].get_clim()[0] == 0


def test_layers_draws_one_panel_each():
    figure = gl.plot.layers({0: torch.rand(5, 5), 3: torch.rand(5, 5)}, TOKENS, title="All")
    assert [ax.get_title() for ax in figure.axes if ax.images] == ["layer 0", "layer 3"]
    assert figure.get_suptitle() == "All"


def test_text_is_escaped_and_coloured():
    shown = gl.plot.text([0.0, 1.0, -0.5, 0.25, 0.0], TOKENS, title="A <title>")
    body = shown._repr_html_()
    assert "&lt;b&gt;" in body and "<b>&" not in body and "A &lt;title&gt;" in body
    assert "rgba(214,40,40,1.000)" in body and "rgba(29,78,216,0.500)" in body
    assert body.count("<span") == 5


def test_pages_are_saved_whole(tmp_path):
    path = attention_page({"layer 0": torch.rand(5, 5).tril()}, TOKENS, "P & Q", notes=["<note>"]).save(
        tmp_path / "p.html"
    )
    text = path.read_text()
    assert text.startswith("<!doctype html>") and "P &amp; Q" in text and "&lt;note&gt;" in text
    assert '"</' not in text.split("gl-data'>")[1].split("</script>")[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gl.plot.heatmap(torch.rand(2, 5, 5)), "Pick a row of the batch"),
        (lambda: gl.plot.heatmap(torch.rand(4, 4), TOKENS), "5 token labels for a matrix of 4"),
        (lambda: gl.plot.text(torch.rand(4), TOKENS), r"5 tokens by as many scores; these have shape \[4\]"),
        (lambda: gl.plot.layers({}), "no layer to plot"),
    ],
)
def test_what_cannot_be_drawn_is_explained(call, message):
    with pytest.raises(gl.InputError, match=message):
        call()


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'gatedlens\[plot\]'"):
        gl.plot.heatmap(torch.rand(3, 3))

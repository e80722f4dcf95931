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


def grid_of(**sizes):
    from gatedlens.hooks.vim import HookedViM

    return HookedViM.tiny(**sizes).grid


def test_a_map_lies_over_its_image():
    grid = grid_of()  # 12 x 12, patches of 4, the class token at 4
    image, row = torch.randn(3, 12, 12), torch.arange(10.0)
    ax = gl.plot.over_image(row, image, grid, title="T").axes[0]
    picture, colours = ax.images
    assert (
        picture.get_array().shape == (12, 12, 3) and picture.get_array().min() == 0 and picture.get_array().max() == 1
    )
    want = torch.tensor([[0, 1, 2], [3, 5, 6], [7, 8, 9]]).float()
    assert torch.equal(torch.as_tensor(colours.get_array().data), want) and ax.get_title() == "T"
    assert colours.get_extent() == [-0.5, 11.5, 11.5, -0.5]
    assert colours.get_clim() == (0, 9)
    for same in (want.flatten(), want):
        assert torch.equal(
            torch.as_tensor(gl.plot.over_image(same, image, grid).axes[0].images[1].get_array().data), want
        )
    assert gl.plot.over_image(row - 5, image, grid).axes[0].images[1].get_clim() == (-5, 5)


def test_overlapping_patches_stand_for_their_centres():
    grid = grid_of(stride=2)  # 5 x 5 patches of 4, 2 apart: centres at 1.5, 3.5, ...
    ax = gl.plot.over_image(torch.rand(26), torch.randn(3, 12, 12), grid).axes[0]
    assert ax.images[1].get_extent() == [0.5, 10.5, 10.5, 0.5]


def test_a_pil_image_is_shown_as_it_is():
    from PIL import Image

    ax = gl.plot.over_image(torch.rand(10), Image.new("L", (12, 12)), grid_of()).axes[0]
    assert ax.images[0].get_array().shape == (12, 12)


@pytest.mark.parametrize(
    ("row", "shape", "message"),
    [
        (torch.rand(10, 10), (3, 12, 12), r"one number a position \[10\], or a patch \[3, 3\].*Pick a row"),
        (torch.rand(10), (3, 16, 16), r"\[1 or 3, 12, 12\]; this has shape \[3, 16, 16\].*preprocess"),
        (torch.rand(10), (2, 3, 12, 12), r"this has shape \[2, 3, 12, 12\]"),
    ],
)
def test_maps_that_do_not_fit_are_explained(row, shape, message):
    with pytest.raises(gl.InputError, match=message):
        gl.plot.over_image(row, torch.randn(shape), grid_of())


def test_an_activation_is_titled_by_its_row():
    model = gl.HookedMamba.tiny()
    _, cache = model.run_with_cache([[1, 2, 3]], names_filter=["blocks.1.mixer.hook_decay", "blocks.0.mixer.hook_B"])
    ax, bar = gl.plot.activation(cache, ("B", 0), ["a", "b", " c"]).axes
    assert ax.get_title() == "blocks.0.mixer.hook_B = x_proj(u)[dt_rank:dt_rank + state]"
    assert (ax.get_ylabel(), ax.get_xlabel(), bar.get_ylabel()) == ("pos", "state", "B")
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b", "␣c"]
    ax, bar = gl.plot.activation(cache, ("decay", 1)).axes
    assert (ax.get_ylabel(), ax.get_xlabel(), bar.get_ylabel()) == ("pos", "channel", "mean over state")
    assert torch.allclose(torch.as_tensor(ax.images[0].get_array().data), cache["decay", 1][0].mean(-1))
    with pytest.raises(gl.InputError, match="2 token labels for 3 positions"):
        gl.plot.activation(cache, ("B", 0), ["a", "b"])
    _, cache = model.run_with_cache([[1, 2, 3]], names_filter="blocks.0.mixer.hook_state_start", remove_batch_dim=False)
    assert gl.plot.activation(cache, "blocks.0.mixer.hook_state_start").axes[0].get_ylabel() == "channel"

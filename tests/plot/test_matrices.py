"""Plots: what is drawn, what is labelled, what is refused."""

from __future__ import annotations

import matplotlib
import pytest
import torch

import gatedlens as gl
from gatedlens.plot.page import attention_page
from tests.helpers import example, in_parts

matplotlib.use("agg")
TOKENS = ["<bos>", " a", "\n", "<b>", "&"]


def one_line(text):
    return " ".join(text.split())


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


def test_heads_draws_one_panel_each():
    model = gl.HookedMamba2.tiny(dtype=torch.float64)
    A = gl.implicit_attention(model, example(model, 1, 5), layer=1)
    figure = gl.plot.heads(A)
    shown = [ax for ax in figure.axes if ax.images]
    assert [ax.get_title() for ax in shown] == ["head 0", "head 1", "head 2", "head 3"]
    assert figure.get_suptitle() == "Implicit attention by head, layer 1"
    for ax, matrix in zip(shown, A.mean(heads=slice(None))[0].detach().float(), strict=True):
        assert torch.allclose(torch.as_tensor(ax.images[0].get_array().data), matrix)
    labels = [one_line(ax.get_ylabel()) for ax in figure.axes if not ax.images]
    assert set(labels) == {"attention (mean over channels of a head)"}
    some = gl.plot.heads(A.abs_mean(heads=[3, 1])[0], TOKENS, names=[3, 1], title="Two")
    assert [ax.get_title() for ax in some.axes if ax.images] == ["head 3", "head 1"] and some.get_suptitle() == "Two"
    assert "|attention| (mean over channels of a head)" in [one_line(ax.get_ylabel()) for ax in some.axes]
    assert [ax.get_title() for ax in gl.plot.heads(A, names=[2]).axes if ax.images] == ["head 2"]


def test_a_result_by_head_says_head():
    found = gl.Result(torch.rand(2, 3, 4), ("head", "layer", "pos"), {"head": [3, 5]}, title="T")
    assert [ax.get_title() for ax in found.plot().axes if ax.images] == ["head 3", "head 5"]
    two = gl.Result(torch.rand(3, 2), ("layer", "head"), {"head": [3, 5]}).plot().axes[0]
    assert two.get_xlabel() == "head" and [t.get_text() for t in two.get_xticklabels()] == ["3", "5"]


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
        (lambda: gl.plot.heads(torch.rand(2, 3, 5, 5)), "a matrix a head, .* Pick a row of the batch"),
        (lambda: gl.plot.heads(torch.rand(3, 5, 5), names=[1]), "1 names for the matrices of 3 heads"),
    ],
)
def test_what_cannot_be_drawn_is_explained(call, message):
    with pytest.raises(gl.InputError, match=message):
        call()


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.delitem(sys.modules, "gatedlens.plot.picture", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
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


# -- signs that stand for themselves, numbers that are none ---------------------------------------------------------

SIGNS = [
    "$$",
    "$x$",
    "$\\frac{$",
    "a$b",
    "\\$",
    "_^{",
    "$\\alpha",
    "%&#~",
    "\x00",
    "\x1b[31m",
    "\udcff",
    "",
    "<!--",
    "</script>",
]


def save(figure):
    import io

    figure.savefig(io.BytesIO(), format="png", dpi=20)
    return figure


@pytest.mark.parametrize("sign", ["$$", "$\\frac{$ a_^{ %&#~ \udcff\x00 <!-- \\$"])
@pytest.mark.filterwarnings("ignore:Glyph")
def test_every_sign_stands_for_itself_everywhere(sign, tmp_path):
    """In tokens, titles, labels, axis names, words in cells: nothing is read as mathematics."""
    from gatedlens.evaluation.curves import AXES, Curve
    from gatedlens.plot import results

    shown = gl.plot.label(sign)
    tokens, matrix = [*SIGNS[:-1], sign], torch.rand(len(SIGNS), len(SIGNS))
    figure = save(gl.plot.heatmap(matrix, tokens, title=shown, value=shown))
    labels = [t.get_text().removesuffix("…") for t in figure.axes[0].get_xticklabels()]
    assert all(gl.plot.label(token).startswith(label) and label for token, label in zip(tokens, labels, strict=True))
    assert not any(t.get_parse_math() for t in [*figure.axes[0].get_xticklabels(), figure.axes[0].title])
    assert not figure.axes[1].yaxis.label.get_parse_math()
    save(gl.plot.layers({shown: matrix, 1: matrix}, tokens, title=shown, value=shown))
    save(gl.plot.image(torch.rand(3, 4, 4), title=shown))
    grid = grid_of()
    save(gl.plot.over_image(torch.rand(10), torch.rand(3, 12, 12), grid, title=shown, value=shown))
    for values, axes in ((matrix[0], ("a",)), (matrix[:3], ("a", shown)), (torch.rand(2, 3, 3), (shown, "a", "b"))):
        labels = {axis: [sign] * size for axis, size in zip(axes, values.shape, strict=True)}
        found = gl.Result(values, axes, labels, title=shown, value=shown)
        save(found.plot())
    save(results.words(gl.Result(matrix[:3, :3], ("a", "b"), title=shown), [[sign] * 3] * 3))
    _, cache = gl.HookedMamba.tiny().run_with_cache([[1, 2, 3]], names_filter="blocks.0.mixer.hook_B")
    save(gl.plot.activation(cache, ("B", 0), tokens[:3]))
    figure = Curve(torch.rand(2, 3), AXES, {"share": [0.1, 0.5, 0.9]}, shown, shown, {"baseline": 0.0}).plot()
    figure.axes[0].legend()  # a legend is the caller's
    save(figure)
    for html in (gl.plot.text(matrix[0], tokens, title=sign), attention_page({sign: matrix}, tokens, sign)):
        html.save(tmp_path / "page.html").read_text(encoding="utf-8")


def test_an_axes_of_the_callers_is_plain_too():
    import matplotlib.pyplot as plt

    _, ax = plt.subplots()
    save(gl.plot.heatmap(torch.rand(2, 2), ["$$", "$"], title="$$", value="$$", ax=ax))


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_is_no_trouble(odd, tmp_path):
    import json
    import re

    matrix = torch.rand(3, 3)
    matrix[1, 0] = odd
    ax = save(gl.plot.heatmap(matrix)).axes[0]
    assert ax.images[0].get_clim()[1] == matrix[matrix.isfinite()].max()
    save(gl.plot.heatmap(torch.full((2, 2), odd)))
    save(gl.plot.image(matrix.expand(3, 3, 3)))
    for values, axes in ((matrix[1], ("a",)), (matrix, ("a", "b")), (matrix.expand(2, 3, 3), ("a", "b", "c"))):
        save(gl.Result(values, axes).plot())
    body = gl.plot.text(matrix[1], ["a", "b", "c"]).body
    assert "rgba(214,40,40,nan)" not in body and body.count("<span") == 3
    page = attention_page({"l": matrix}, ["<!--", "<script>", "c"], "t").page()
    payload = re.search(r"id='gl-data'>(.*?)</script>", page, re.S)[1]
    assert "<" not in payload and "NaN" not in payload and "Infinity" not in payload
    data = json.loads(payload, parse_constant=lambda name: pytest.fail(name))
    assert data["tokens"] == ["<!--", "<script>", "c"] and data["layers"]["l"][1][0] is None


def test_the_reports_pictures_and_curves_take_what_is_no_number():
    from gatedlens.evaluation.report_page import curves, heat, png
    from gatedlens.result.bootstrap import Estimate

    scores = torch.tensor([[1.0, torch.nan], [-torch.inf, -2.0]])
    shown = heat(scores)
    assert shown.isfinite().all() and shown[0, 1].eq(0.6).all() and png(scores).startswith("data:image/png")
    nothing, some = Estimate(torch.nan, torch.nan, torch.nan), Estimate(torch.inf, 0.1, 0.2)
    for steps in ([nothing, nothing], [some, nothing], [some, some]):
        said = curves({"a<b": steps}, (0.1, 0.9), "T<")
        assert "nan" not in said and "inf" not in said.replace("info", "") and "a&lt;b" in said


# -- what an attention is drawn as ----------------------------------------------------------------------------------


@pytest.fixture
def stack(model):
    return gl.implicit_attention(model, example(model, 1))


def test_an_attention_is_drawn_as_its_mean(stack):
    A = stack[0]
    ax, bar = gl.plot.heatmap(A).axes
    assert (
        torch.allclose(torch.as_tensor(ax.images[0].get_array().data), A.mean()[0].float())
        and one_line(bar.get_ylabel()) == A.mean().label
    )
    assert len(ax.get_xticklabels()) == A.shape[1]
    for given in (
        stack,
        dict(enumerate(stack)),
        dict(zip(stack.layers, stack.mean(progress=False)[:, 0], strict=True)),
    ):
        figure = gl.plot.layers(given)
        drawn = [ax for ax in figure.axes if ax.images and ax.get_xlabel()]
        assert [ax.get_title() for ax in drawn] == [f"layer {i}" for i in stack.layers]
        assert torch.allclose(torch.as_tensor(drawn[-1].images[0].get_array().data), stack[-1].mean()[0].float())
    assert len(gl.plot.layers(A).axes) == 2
    for call, said in (
        (lambda: gl.plot.heatmap(stack), r"gl.plot.layers\(stack\)"),
        (lambda: gl.plot.heatmap(A.contributions()), "contributions.norms"),
        (lambda: gl.plot.heatmap("a text"), "draws numbers, not a str"),
        (lambda: gl.plot.heatmap(None), "draws numbers, not a NoneType"),
        (lambda: gl.plot.layers(torch.rand(2, 3, 3)), "a stack or a matrix by layer"),
        (lambda: gl.plot.text(stack, ["a"]), "gl.plot.layers"),
        (lambda: gl.plot.heatmap(torch.zeros(0, 0)), r"shape \[0, 0\]"),
    ):
        with pytest.raises(gl.InputError, match=said):
            call()


def test_a_batch_of_rows_asks_for_one():
    A = gl.implicit_attention(gl.HookedMamba.tiny(), [[1, 2], [3, 4]], layer=0)
    with pytest.raises(gl.InputError, match="Pick a row of the batch"):
        gl.plot.heatmap(A)


@in_parts
def test_views_carry_their_own_label(stack, part):
    A = stack[0]
    direction = torch.ones(A.model.cfg.d_model)
    views = {
        "attention (mean over channels)": [A.mean(), stack.mean(progress=False)[0]],
        "|attention| (mean over channels)": [A.abs_mean(), stack.abs_mean(progress=False)[-1]],
        "attention (weighted over channels)": [A.weighted(torch.ones(A.shape[2]))],
        "attention (mean over a group of channels)": [A.grouped([[0, 1]])[:, 0]],
        "attention (of one channel)": [A.dense([0])[:, 0]],
        "|attention| (mean over channels and layers)": [stack.layer_mean(absolute=True, progress=False)],
        "rollout of the attention (mean over channels)": [stack.rollout(progress=False)],
        "norm of the contribution": [A.contributions().norms()],
        "contribution along the direction": [A.contributions().along(direction)],
    }
    for label, several in list(views.items())[part]:
        for view in several:
            for one in (view, view[0], view[0].detach().float().cpu(), next(iter(view))):
                assert one_line(gl.plot.heatmap(one).axes[1].get_ylabel()) == label
    for computed in (
        A.abs_mean()[0] - A.mean()[0],
        A.abs_mean()[0].log1p(),
        A.mean()[0].T @ A.mean()[0],
        torch.rand(3, 3),
    ):
        assert type(computed) is torch.Tensor and gl.plot.heatmap(computed).axes[1].get_ylabel() == "attention"
    assert gl.plot.heatmap(A.abs_mean()[0], value="mine").axes[1].get_ylabel() == "mine"


@torch.no_grad()
def test_a_labelled_tensor_is_a_tensor_like_any_other(tmp_path):
    import copy
    import pickle

    from safetensors.torch import load_file, save_file

    A = gl.implicit_attention(gl.HookedMamba.tiny(), [[1, 2, 3]], layer=0)
    view, want = A.mean(), A.dense().mean(1)
    assert (
        torch.allclose(view, want, atol=1e-6) and repr(view).startswith("tensor(") and torch.equal(view, view.clone())
    )
    assert type(pickle.loads(pickle.dumps(view))) is torch.Tensor and copy.deepcopy(view).label == view.label
    torch.save(view, tmp_path / "a.pt")
    assert torch.equal(torch.load(tmp_path / "a.pt", weights_only=True), view)
    save_file({"a": view.contiguous()}, tmp_path / "a.safetensors")
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], view)
    assert view.numpy().shape == (1, 3, 3) and type(torch.stack([view, view])) is torch.Tensor
    weights = torch.ones(A.shape[2])
    wanted = torch.func.jacrev(lambda w: sum(w[c] * A.dense([c])[:, 0] for c in range(len(w))))(weights)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        assert torch.allclose(transform(A.weighted)(weights), wanted, atol=1e-6)

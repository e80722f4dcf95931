"""At every size: no label over another, nothing outside the figure, no letter too small to read."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import matplotlib
import pytest
from matplotlib.text import Text

import gatedlens as gl
from tests.plot import gallery

matplotlib.use("agg")
DRAWN = dict(gallery.pictures())
QUICK = (
    "heatmap-60",
    "layers-2x8",
    "sweep-24x60",
    "by-head-2x60x16",
    "lens-2x8",
    "ranks-24x8",
    "circuit-2-8",
    "bars-300",
    "one-row-24",
)
LEAST = 4.5  # points
ROUNDING = 2.0  # pixels


def troubles(figure: Any) -> list[str]:
    figure.draw_without_rendering()
    frame, found = figure.bbox, []
    texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    off = set()  # labels that matplotlib keeps and does not draw
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            off |= set() if ax.axison else set(axis.findobj(Text))
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                off |= set() if low <= tick.get_loc() <= high else {tick.label1, tick.label2}
    for text in texts:
        if text in off:
            continue
        box = text.get_window_extent()
        if box.x0 < -ROUNDING or box.y0 < -ROUNDING or box.x1 > frame.x1 + ROUNDING or box.y1 > frame.y1 + ROUNDING:
            found.append(f"{text.get_text()!r} stands outside of the figure")
        if text.get_fontsize() < LEAST:
            found.append(f"{text.get_text()!r} is {text.get_fontsize()} points high")
    for ax in figure.axes:
        for axis, side in ((ax.xaxis, "x"), (ax.yaxis, "y")):
            labels = [label for label in axis.get_ticklabels() if label.get_text() and label not in off]
            boxes = sorted(
                (b.x0, b.x1) if side == "x" else (b.y0, b.y1) for b in (t.get_window_extent() for t in labels)
            )
            found += [f"labels overlap at {a}, {b}" for a, b in pairwise(boxes) if b[0] < a[1] - ROUNDING]
    return found


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in DRAWN]
)
@pytest.mark.filterwarnings("error:constrained_layout not applied")
def test_a_picture_is_legible(name):
    figure = DRAWN[name]()
    if not isinstance(figure, gl.plot.Html):
        assert not troubles(figure)[:5]


def test_a_circuit_stays_inside_its_frame_and_below_its_title():
    for layers, edges in ((2, None), (24, 40), (64, 40)):
        (ax,) = (figure := gallery.circuit(layers, edges).plot()).axes
        figure.draw_without_rendering()
        top = ax.title.get_window_extent().y0
        arcs = [patch for patch in ax.patches if isinstance(patch, matplotlib.patches.FancyArrowPatch)]
        assert arcs and all(patch.get_window_extent().y1 <= top for patch in arcs)
        assert all(patch.get_window_extent().y0 >= figure.bbox.y0 for patch in arcs)


def test_long_axes_are_thinned_and_say_so():
    ax = gl.plot.heatmap(gallery.attention(300), gallery.tokens(300)).axes[0]
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert 30 < len(labels) < 150 and all(label.endswith("…") for label in labels) and labels[0] == "0 <bos> …"
    some = gl.plot.heatmap(gallery.attention(300), gallery.tokens(300), pos=slice(-20, None)).axes[0]
    assert [label.get_text() for label in some.get_xticklabels()] == [*map(gl.plot.label, gallery.tokens(300)[-20:])]
    assert some.images[0].get_array().shape == (20, 20)
    with pytest.raises(gl.InputError, match="there are 300 positions"):
        gl.plot.heatmap(gallery.attention(300), pos=[300])
    found = gl.Result(gallery.sweep(4, 300), ("layer", "pos"), {"pos": gallery.tokens(300)}, "T")
    assert found.plot(pos=slice(0, 8), layer=[1, 3]).axes[0].images[0].get_array().shape == (2, 8)
    with pytest.raises(gl.InputError, match="no axis 'head'"):
        found.plot(head=[0])


def test_one_row_is_bars_and_the_title_says_of_what():
    found = gl.Result(gallery.sweep(1, 6), ("layer", "pos"), {"layer": [3]}, "Patching", "score")
    ax = found.plot().axes[0]
    assert len(ax.patches) == 6 and ax.get_title() == "Patching, layer 3" and ax.get_xlabel() == "pos"


def test_ranks_are_on_a_log_scale_with_the_best_dark():
    ranks = gl.Result(
        gallery.torch.tensor([[0.0, 9.0], [99.0, 50_000.0]]), ("layer", "pos"), value="rank", facts={"scale": "log"}
    )
    shown = ranks.plot().axes[0].images[0]
    assert isinstance(shown.norm, matplotlib.colors.LogNorm)
    dark = [sum(shown.cmap(shown.norm(rank + 1.0))[:3]) for rank in (0, 9, 99, 50_000)]
    assert dark == sorted(dark), "the smaller the rank, the darker"
    assert "<td" in ranks._repr_html_() and ranks._repr_html_().index(">0<") < ranks._repr_html_().index(">9<")


def test_scales_compare_or_the_picture_says_that_they_do_not():
    several = {i: gallery.attention(6, i) for i in range(3)}
    own, one = gl.plot.layers(several), gl.plot.layers(several, one_scale=True)
    assert "do not compare" in own.get_supxlabel() and "do not compare" not in one.get_supxlabel()
    limits = {ax.images[0].get_clim() for ax in one.axes if ax.images}
    assert len(limits) == 1 and len({ax.images[0].get_clim() for ax in own.axes if ax.images}) == 3


def test_a_text_keeps_its_tokens_apart_and_says_what_its_colours_are():
    body = gl.plot.text([0.5, -1.0, 0.0], ["a", "b", "c\n"], value="relevance").body
    assert body.count("box-shadow") == 3 and "linear-gradient" in body and "relevance" in body and "<br>" in body
    part = gl.plot.text([float(i) for i in range(9)], [*"abcdefghi"], pos=[0, 1, 4]).body
    assert part.count("<span") == 3 and part.count("…") == 2, "what is left out is marked"


@pytest.mark.parametrize("backend", ["plotly", "matplot"])
def test_a_backend_that_is_none_is_explained(backend):
    with pytest.raises(gl.InputError, match=r"figure of its own|matplotlib or|it is 'matplotlib'"):
        gl.plot.heatmap(gallery.attention(3), ax=gl.plot.panels(1, 1)[1][0][0], backend=backend)

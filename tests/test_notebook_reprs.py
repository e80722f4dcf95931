"""What every value of an analysis shows in a notebook: short, escaped, nothing fetched; its text repr is one line."""

from __future__ import annotations

import re

import matplotlib
import pytest
import torch

import gatedlens as gl
from gatedlens.markup import card, number, shown, table
from tests.helpers import example

matplotlib.use("agg")


def held(value):
    """The HTML of a value, held to what all of them promise."""
    html, line = value._repr_html_(), repr(value)
    assert html and "\n" not in line and len(line) < 400, line
    text = re.sub(r"data:image/png;base64,[\w+/=]*", "", html)
    assert len(text) < 8000, "short"
    assert not re.search(r"(src|href)=['\"]https?:|<script|<link|@import", text), "nothing is fetched"
    assert not re.search(r"[ ;'\"]color:\s*(black|#000|#222)", text), "legible on a dark page"
    return text


def test_a_model_is_one_line_and_a_table(model):
    text = held(model)
    assert type(model).__name__ in repr(model) and f"{model.cfg.n_layers} layer" in repr(model)
    assert "hook points" in text and f"{model.cfg.d_model:,}" in text
    assert "(blocks): ModuleList(" in model.tree(), "torch's own repr"


@pytest.fixture(scope="module")
def recalled():
    model = gl.from_pretrained("gatedlens/mamba-recall", device="cpu")
    clean = gl.tasks.recall(2, seed=0)
    corrupted = clean.with_answer(clean.answers.roll(1))
    metric = gl.metrics.logit_difference(clean.answers, corrupted.answers)
    return model, clean.tokens, corrupted.tokens, metric


def test_values_of_analyses_show_themselves(recalled, tmp_path):
    model, clean, corrupted, metric = recalled
    _, cache = model.run_with_cache(clean)
    stack = gl.implicit_attention(model, clean[:1])
    found = gl.patching.get_act_patch_resid_pre(model, corrupted, cache, metric, progress=False)
    circuit = gl.circuits.eap(model, clean, corrupted, metric)
    every = gl.circuits.attribution_patch(model, clean, corrupted, metric, ["blocks.*.hook_resid_pre", "hook_embed"])
    means = gl.ablation.means(model, [clean], "blocks.*.mixer.hook_gate", progress=False)
    vector = gl.steering.vector(model, clean, corrupted, "blocks.1.hook_resid_post")
    lens = gl.lens.logit_lens(model, clean)
    path = gl.circuits.path_patch(model, clean, corrupted, metric, "0.mixer")
    profile = stack.profiles(progress=False)
    values = [
        cache, found, circuit, circuit.top(2), every, means, vector, lens, lens.rank("1"), path, stack, stack[0], profile,
        gl.attribution.lrp(model, clean[:1]), gl.profiles.rewrite(cache, layer=0), gl.profiles.of_layer(stack[0]),
    ]  # fmt: skip
    graph = gl.feature_graph.attribute(model, clean[:1], progress=False).prune()
    values += [gl.inspect(model), gl.verify(model), graph, graph.intervene({graph.of("token")[0]: 0.0})]
    for value in values:
        held(value)
    assert "<img" in found._repr_html_() and "<img" in circuit._repr_html_() and "<img" in stack._repr_html_()
    assert "blocks.0.hook_mixer_in" in cache._repr_html_() and "KiB" in cache._repr_html_()
    assert "<img" in stack.abs_mean(progress=False)[0]._repr_html_()
    store = gl.store.harvest(model, clean.tolist(), "blocks.1.mixer.hook_gated", tmp_path / "store", progress=False)
    assert "blocks.1.mixer.hook_gated" in held(gl.store.open(tmp_path / "store")) and store is not None


def test_metrics_give_their_names_to_results(recalled):
    model, clean, corrupted, metric = recalled

    def my_own_metric(logits):
        return metric(logits)

    _, cache = model.run_with_cache(clean)
    for given, said in (
        (metric, "logit difference"),
        (my_own_metric, "my own metric"),
        (lambda x: metric(x), "metric"),
    ):
        found = gl.patching.get_act_patch_resid_pre(model, corrupted, cache, given, progress=False)
        assert found.value == said and found.plot().axes[1].get_ylabel() == said
        assert gl.circuits.path_patch(model, clean, corrupted, given, "0.mixer").value == f"rise of the {said}"
        assert gl.circuits.eap(model, clean, corrupted, given).scores.value == f"approximate rise of the {said}"
    assert gl.metrics.name_of(gl.metrics.kl(torch.zeros(1, 3))) == "KL divergence"


def test_numbers_have_digits_and_cells_are_escaped():
    assert number(-3.2e-5) == "-3.2e-05" and number(-0.0) == "0" and number(0.123456) == "0.1235"
    assert shown("<b>&") == "&lt;b&gt;&amp;" and shown(-0.0) == "0"
    assert "&lt;i&gt;" in card("<i>", {"a": "<b>"}) and "<b>" not in card("x", {"a": "<u>"}).replace("<b>x</b>", "")
    many = table(["a<"], [[i] for i in range(100)])
    assert many.count("<tr>") == 14 and "88 more" in many and "a&lt;" in many


def test_without_matplotlib_a_table_is_left(monkeypatch):
    import sys

    monkeypatch.delitem(sys.modules, "gatedlens.plot.picture", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    html = gl.Result(torch.rand(2, 3), ("layer", "pos"))._repr_html_()
    assert "<table" in html and "<img" not in html


def test_a_view_knows_its_axes_and_tokens(lm):
    x = example(lm)
    stack = gl.implicit_attention(lm, x)
    *_, A = stack
    several = len(lm.blocks[A.layer].mixing) > 1
    layer = f"{A.layer} {A.which}" if several else A.layer
    view = A.abs_mean()
    assert view.axes == ("batch", "dst", "src") and view.title == f"Implicit attention, layer {layer}"
    assert view.tokens is None, "rows of a batch have tokens of their own"
    row = view[1]
    assert row.axes == ("dst", "src") and row.tokens == A.words(1) == row.labels["dst"] and row.title.endswith("row 1")
    assert row[2:5, :3].labels == {"dst": A.words(1)[2:5], "src": A.words(1)[:3]}
    assert row[-1].axes == ("src",) and row[:, [0, 2]].tokens == [A.words(1)[0], A.words(1)[2]]
    assert row[[0], 0].axes == () and row[row > 0].axes == () and row.T.__class__ is torch.Tensor
    assert view.float().detach()[0].tokens == A.words(0) and view.select(0, 1).tokens == A.words(1)
    assert type(view + 1) is torch.Tensor and type(row.mean()) is torch.Tensor
    result = row.result()
    assert result.axes == ("dst", "src") and result.value == view.label and torch.equal(result.values, row)
    layers = stack.mean(progress=False)
    assert layers.axes == ("layer", "batch", "dst", "src") and layers[:, 0].labels["layer"] == list(stack.names)
    assert gl.plot.heatmap(row).axes[0].get_title().replace("\n", " ") == row.title
    labels = [label.get_text() for label in gl.plot.heatmap(row).axes[0].get_xticklabels()]
    assert labels == [gl.plot.label(token) for token in A.words(1)]

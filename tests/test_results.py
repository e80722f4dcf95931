"""docs/results.md is of the models that are bundled, says what its numbers say, and can be made anew."""

from __future__ import annotations

import json

import pytest
import torch

import gatedlens as gl
from benchmarks import results
from gatedlens.evaluation import Estimate
from gatedlens.evaluation.record import fingerprint
from tests.conftest import ROOT

RECALL = [name for name, data in results.MODELS.items() if data == "recall"]


@pytest.fixture(scope="module")
def held():
    return json.loads((ROOT / "docs" / "results.json").read_text())["models"]


def number(held, model, method, metric):
    (cell,) = (c for c in held[model]["table"]["cells"] if c["method"] == method and c["metric"] == metric)
    return Estimate(cell["value"], cell["low"], cell["high"])


def test_the_results_are_those_of_the_bundled_models(held):
    page = (ROOT / "docs" / "results.md").read_text()
    for name in results.MODELS:
        assert held[name]["run"]["weights"] == fingerprint(gl.from_pretrained(name, device="cpu")), "run `make results`"
        assert {cell["method"] for cell in held[name]["table"]["cells"]} >= set(results.METHODS)
        assert f"## {name}\n" in page and held[name]["run"]["limit"] == results.LIMIT
    assert results.PUBLISHED in page and results.MARK in page


@pytest.mark.parametrize("name", results.MODELS)
def test_chance_is_in_the_middle_and_occlusion_near_the_top(held, name):
    methods = results.METHODS
    for metric, sign in (("positive probability", -1), ("negative probability", 1)):
        order = sorted(methods, key=lambda m: -sign * number(held, name, m, metric).value)
        assert order.index("occlusion") < 4 and order.index("random") >= len(methods) // 2
    # Taking away at random is the same in both orders.
    one, other = (number(held, name, "random", f"{order} probability") for order in ("positive", "negative"))
    assert one.low < other.high and other.low < one.high
    if name in RECALL:
        assert number(held, name, "random", "rank").low < 9 < number(held, name, "random", "rank").high
        assert number(held, name, "random", "mass").low < 1 / 19 < number(held, name, "random", "mass").high


def test_the_table_can_be_made_anew(tmp_path, monkeypatch):
    """One sample and a few methods, of three models."""
    few = ("rollout:sign=abs", "gradient_attention", "gradient_attention:factors=hidden", "lrp", "random")
    monkeypatch.setattr(results, "METHODS", few)
    (tmp_path / "results.md").write_text(f"By hand.\n\n{results.MARK}\n\nto be gone")
    models = ["gatedlens/griffin-recall", "gatedlens/rwkv-recall", "gatedlens/vim-digits"]
    results.main(["--limit", "1", "--models", *models, "--out", str(tmp_path)])
    page, data = (tmp_path / "results.md").read_text(), json.loads((tmp_path / "results.json").read_text())
    assert page.startswith("By hand.") and "to be gone" not in page and "1 samples a model" in page
    assert list(data["models"]) == models and results.PUBLISHED in page
    rows = {name: list(data["models"][name]["differences"]) for name in models}
    assert rows[models[0]][0] == "gradient_attention: unified - hidden"
    assert any("with conv" in row for row in rows[models[0]])
    assert not any("with conv" in row or "with skip" in row for row in rows[models[1]]), "RWKV has neither"
    assert len(rows[models[2]]) == 1 + 2 * 4


def test_a_contrast_is_paired():
    x = torch.linspace(0, 1, 20).double()
    down = results._contrast("positive", x * 0 - 0.1, "down")
    assert down.better == 1 and down.estimate.value == pytest.approx(-0.1) and down.column == "positive ↓"
    assert results._contrast("negative", x * 0 - 0.1, "up").better == -1
    assert results._contrast("negative", x - x.mean(), "up").better == 0
    table = results.contrast_table({"a - b": [down]})
    assert table.splitlines()[2].startswith("| a - b | -0.1 [-0.1, -0.1] better |")

"""docs/results.md is of the models that are bundled, says what its numbers say, and can be made anew."""

from __future__ import annotations

import json

import pytest
import torch

import gatedlens as gl
from benchmarks import results
from gatedlens import attribution
from gatedlens.evaluation import Estimate
from gatedlens.runs.fingerprints import fingerprint
from tests.conftest import ROOT

PAPERS = ["gatedlens/mamba-recall", "gatedlens/griffin-recall", "gatedlens/rwkv-recall", "gatedlens/vim-digits"]
RECALL = PAPERS[:3]
OTHERS = [name for name in results.MODELS if name not in PAPERS]


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
        assert {cell["method"] for cell in held[name]["table"]["cells"]} >= set(results.methods_of(name))
        limit = results.LIMIT_OF_BYTES if results.MODELS[name] == "moby" else results.LIMIT
        assert f"## {name}\n" in page and held[name]["run"]["limit"] == limit
    assert results.PUBLISHED in page and results.MARK in page


@pytest.mark.parametrize("name", results.MODELS)
def test_chance_is_chance_and_occlusion_near_the_top(held, name):
    methods = results.METHODS
    for metric, sign in (("positive probability", -1), ("negative probability", 1)):
        order = sorted(methods, key=lambda m: -sign * number(held, name, m, metric).value)
        assert order.index("occlusion") < (4 if name in PAPERS else 9) and order.index("random") > order.index("lrp")
    # Taking away at random is the same in both orders.
    one, other = (number(held, name, "random", f"{order} probability") for order in ("positive", "negative"))
    assert one.low < other.high and other.low < one.high
    if results.MODELS[name] == "recall":
        assert number(held, name, "random", "rank").low < 9 < number(held, name, "random", "rank").high
        assert number(held, name, "random", "mass").low < 1 / 19 < number(held, name, "random", "mass").high


def test_the_reading_is_what_the_numbers_say(held):
    """Every claim of the text above the numbers."""

    def value(model, method, metric):
        return number(held, model, method, metric).value

    def verdicts(model, start, column):
        return [row[column][3] for name, row in held[model]["differences"].items() if name.startswith(start)]

    official = "gradient_attention:mode=official,start_layer=0"
    for name in PAPERS:
        kept, gone = "negative probability", "positive probability"
        assert max(results.METHODS, key=lambda m: value(name, m, kept)) == "occlusion"
        assert min(results.METHODS, key=lambda m: value(name, m, gone)) == "integrated_gradients"
        assert number(held, name, "lrp", kept).low > number(held, name, "random", kept).high
        assert number(held, name, "lrp", gone).high < number(held, name, "random", gone).low
        assert value(name, official, kept) > value(name, "gradient_attention", kept)
        assert value(name, official, gone) < value(name, "gradient_attention", gone)
    for name in RECALL:
        assert max(results.METHODS, key=lambda m: value(name, m, "activation probability")) == "occlusion"
        assert min(results.METHODS, key=lambda m: value(name, m, "pruning squared error")) == "occlusion"
        assert max(results.METHODS, key=lambda m: value(name, m, "mass")) == "lrp"
        assert 0.595 < value(name, "lrp", "mass") < 0.715
        assert value(name, "raw_attention:sign=abs", "negative probability") > value(
            name, "gradient_attention", "negative probability"
        )
        for method in results.PAPER:
            for column in ("positive ↓", "negative ↑", "activation ↑"):
                # under RWKV's LayerNorms the formula's gradient is 0, and so are all of its scores
                nothing = method == "gradient_attention" and name == RECALL[2]
                assert verdicts(name, f"{method}:sign=abs: unified", column) == [0 if nothing else 1]
    mamba, griffin, rwkv = RECALL
    for method in ("raw_attention", "rollout"):
        assert number(held, mamba, method, "rank").low > number(held, mamba, "random", "rank").high
        assert value(mamba, method, "negative probability") < 0.2 and value(mamba, method, "rank") > 14
        assert (
            value(mamba, f"{method}:sign=abs", "hit") > 0.9
            and value(mamba, f"{method}:sign=abs", "negative probability") > 0.73
        )
        assert verdicts(mamba, f"{method}: unified", "activation ↑") == [-1] and verdicts(
            mamba, f"{method}: unified", "pruning ↓"
        ) == [1]
        for metric in ("positive probability", "negative probability", "mass"):
            assert value(rwkv, method, metric) == pytest.approx(value(rwkv, f"{method}:sign=abs", metric), abs=1e-5)
    assert value(mamba, "gradient_attention", "negative probability") > value(
        mamba, "raw_attention", "negative probability"
    )
    assert verdicts(griffin, "rollout: unified", "negative ↑") == [-1]
    assert verdicts(griffin, "rollout: unified", "activation ↑") == [-1]
    for name, faster in ((mamba, "lrp"), (griffin, "lrp"), (rwkv, "integrated_gradients")):
        best = value(name, faster, "positive accuracy")
        assert best == min(value(name, m, "positive accuracy") for m in results.METHODS)
    assert value(griffin, "integrated_gradients", "positive accuracy") == value(griffin, "lrp", "positive accuracy")
    for metric in ("negative accuracy", "negative probability", "activation probability", "pruning squared error"):
        ends = [number(held, rwkv, method, metric) for method in ("lrp", official)]
        assert abs(ends[0].value / ends[1].value - 1) < 0.02, "level"
    assert value(rwkv, "lrp", "positive probability") < 0.6 * value(rwkv, official, "positive probability")
    for name in RECALL:
        error = "pruning squared error"
        assert value(name, "gradient_attention", error) > value(name, "raw_attention", error)
    signed, absolute = (number(held, griffin, f"raw_attention{s}", "negative accuracy") for s in ("", ":sign=abs"))
    assert signed.high > number(held, griffin, "random", "negative accuracy").low and signed.high < absolute.low

    def added(model, factor, column="negative ↑"):
        return held[model]["differences"][f"rollout:sign=abs: with {factor} - without"][column]

    assert added(mamba, "conv")[0] > 0.4 and added(mamba, "gate")[3] == 1 and added(mamba, "gate", "mass ↑")[0] > 0.05
    assert added(mamba, "act", "mass ↑")[3] == 1 and added(mamba, "skip", "mass ↑")[3] == -1
    assert added(mamba, "act")[3] <= 0 and added(mamba, "skip")[3] <= 0
    assert added(griffin, "conv")[0] > added(griffin, "gate")[0] > 0.08 and added(rwkv, "gate")[0] > 0.1
    digits = "gatedlens/vim-digits"
    assert (
        added(digits, "skip")[3]
        == added(digits, "skip", "positive ↓")[3]
        == added(digits, "conv", "positive ↓")[3]
        == 1
    )
    assert added(digits, "act", "positive ↓")[3] == 1 and added(digits, "act", "positive ↓")[0] > -0.02
    skipped = number(held, digits, "rollout:sign=abs,factors=all", "positive accuracy")
    assert skipped.high < number(held, digits, "random", "positive accuracy").low
    assert added(digits, "gate")[3] == added(digits, "gate", "positive ↓")[3] == 0
    chance = {m: number(held, digits, "random", m) for m in ("positive probability", "negative probability")}
    for method in (*results.PAPER, "raw_attention:sign=abs", "rollout:sign=abs", "grad_x_input", "smoothgrad"):
        assert number(held, digits, method, "positive probability").high > chance["positive probability"].low
        assert number(held, digits, method, "negative probability").low < chance["negative probability"].high
    found = number(held, digits, official, "positive probability")
    assert found.value < chance["positive probability"].low < found.high
    unified = [row for name, row in held[digits]["differences"].items() if "unified" in name]
    assert {cell[3] for row in unified for cell in row.values()} == {0, 1}
    for metric, sign in (("positive probability", -1), ("pixel accuracy", 1)):
        best = max(results.PAPER, key=lambda m: sign * value(digits, m, metric))
        assert best == "gradient_attention"
    for metric in ("positive probability", "negative probability", "pixel accuracy"):
        assert abs(value(digits, "raw_attention", metric) - value(digits, "rollout", metric)) < 0.01


def test_the_reading_of_matrix_states_is_what_the_numbers_say(held):
    kept, gone = "negative probability", "positive probability"

    def value(model, method, metric):
        return number(held, model, method, metric).value

    def added(model, row, column="negative ↑"):
        return held[model]["differences"][f"rollout:sign=abs: {row}"][column]

    mamba2, gdn, hybrid, rwkv7 = OTHERS
    for name in OTHERS:
        assert value(name, "occlusion", kept) > max(value(name, m, kept) for m in results.METHODS) - 0.01
        assert number(held, name, "lrp", kept).low > number(held, name, "random", kept).high
        assert number(held, name, "lrp", gone).high < number(held, name, "random", gone).low
        most = max(value(name, m, "mass") for m in results.METHODS)
        assert (value(name, "lrp", "mass") == most) == (name != mamba2)
        assert 0.92 < most < 0.99 or (name == mamba2 and abs(value(name, "lrp", "mass") - 0.66) < 0.005)
    for method in ("raw_attention", "rollout"):
        assert value(rwkv7, method, "rank") == 18 and value(rwkv7, method, "hit") == 0
        assert value(mamba2, method, "rank") > 15
        for name in (rwkv7, mamba2):
            assert value(name, f"{method}:sign=abs", "rank") == 0 and value(name, f"{method}:sign=abs", "hit") == 1
    assert value(rwkv7, "gradient_attention", "mass") == 0
    hidden = number(held, gdn, "rollout:sign=abs,factors=hidden", "rank")
    assert hidden.high > number(held, gdn, "random", "rank").low and value(gdn, "rollout:sign=abs", "rank") == 0
    assert abs(added(gdn, "with conv - without")[0] - 0.28) < 0.005 and added(gdn, "with conv - without")[3] == 1
    assert abs(added(mamba2, "with conv - without")[0] - 0.32) < 0.005 and added(mamba2, "with conv - without")[3] == 1
    assert added(rwkv7, "unified - hidden")[3] == -1 and added(rwkv7, "unified - hidden", "mass ↑")[3] == 1
    for method in ("raw_attention", "rollout", "raw_attention:sign=abs", "rollout:sign=abs,factors=hidden"):
        assert value(hybrid, method, "hit") == 1
    assert value(hybrid, "raw_attention", kept) < 0.4 and value(hybrid, "raw_attention:sign=abs", kept) < 0.4
    ends = [number(held, hybrid, method, kept) for method in ("rollout:sign=abs", "occlusion")]
    assert ends[0].value > 0.76 and ends[0].high > ends[1].low, "level"


def test_the_hidden_matrix_of_mamba_points_two_tokens_behind_the_answer(recall_model):
    batch = gl.tasks.recall(128, seed=3)
    for factors, behind in (("hidden", 2), ("unified", 0)):
        found = attribution.raw_attention(recall_model, batch.tokens, factors=factors, sign="abs")
        peak = found.scores[:, 1:-1].argmax(1) + 1
        assert int((peak == batch.answer_pos + behind).sum()) == {"hidden": 99, "unified": 120}[factors]


def test_the_table_can_be_made_anew(tmp_path, monkeypatch):
    """One sample and a few methods, of three models."""
    few = ("rollout:sign=abs", "gradient_attention", "gradient_attention:factors=hidden", "lrp", "random")
    monkeypatch.setattr(results, "METHODS", few)
    (tmp_path / "results.md").write_text(f"By hand.\n\n{results.MARK}\n\nto be gone")
    models = ["gatedlens/griffin-recall", "gatedlens/rwkv-recall", "gatedlens/vim-digits"]
    results.main(["--limit", "1", "--models", *models, "--out", str(tmp_path)])
    page, data = (tmp_path / "results.md").read_text(), json.loads((tmp_path / "results.json").read_text())
    assert page.startswith("By hand.") and "to be gone" not in page and "1 samples a model (of bytes 1)" in page
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

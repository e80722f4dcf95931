"""The bundled models do what their training.json says, and their attention points at the token that holds the answer."""

from __future__ import annotations

import json

import pytest
import torch

import gatedlens as gl
from gatedlens.bundled import make
from gatedlens.loading import BUNDLED

RECALL = [name for name in gl.bundled_models() if name.endswith("-recall")]
MOBY = [name for name in gl.bundled_models() if name.endswith("-moby")]


def test_every_architecture_has_trained_models():
    words = {"mamba": ("recall", "moby"), "griffin": ("recall", "moby"), "rwkv": ("recall", "moby"), "vim": ("digits",)}
    words |= dict.fromkeys(("mamba2", "gdn", "hybrid", "rwkv7"), ("recall",))
    assert set(gl.bundled_models()) == {f"gatedlens/{name}-{task}" for name, tasks in words.items() for task in tasks}


def report(name: str) -> dict:
    return json.loads((BUNDLED / name.partition("/")[2] / "training.json").read_text())


def test_sizes_stay_small():
    sizes = {path: path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert all(size < 2**20 for size in sizes.values()) and sum(sizes.values()) < 8 * 2**20


@pytest.mark.parametrize("name", RECALL)
def test_recall_accuracy_is_the_recorded_one(name):
    told = report(name)
    metric = make.TASKS[told["task"]][1](gl.from_pretrained(name, device="cpu"))
    assert metric.keys() == told["metric"].keys()
    for word, value in metric.items():
        assert abs(value - told["metric"][word]) < 2e-3 and value >= 0.95, word


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", MOBY)
def test_bits_per_byte_are_the_recorded_ones(name):
    metric = make.moby_metric(gl.from_pretrained(name, device="cpu"))
    assert abs(metric["bits_per_byte"] - report(name)["metric"]["bits_per_byte"]) < 2e-3
    assert metric["bits_per_byte"] < 2.4


def test_digit_accuracy_is_the_recorded_one():
    metric = make.digits_metric(gl.from_pretrained("gatedlens/vim-digits", device="cpu"))
    assert abs(metric["accuracy"] - report("gatedlens/vim-digits")["metric"]["accuracy"]) < 3e-3
    assert metric["accuracy"] >= 0.95


@torch.no_grad()
@pytest.mark.parametrize("name", RECALL)
def test_the_attention_points_at_the_token_that_holds_the_answer(name):
    """In the layer that does it (at depth 0 or 1), the last position reads the right one of the 4 values far more often
    than chance (1/4); in Mamba it is the strongest source of all 21 positions (chance 1/21)."""
    model, batch = gl.from_pretrained(name, device="cpu"), gl.tasks.recall(200, seed=11)
    right = model(batch.tokens)[:, -1].argmax(-1) == batch.answers
    assert right.float().mean() > 0.95
    among_values, among_all = [], []
    for layer in range(2):
        row = gl.implicit_attention(model, batch.tokens, layer=layer).row(-1).abs().mean(1)
        value = batch.pair_pos.gather(1, row.gather(1, batch.pair_pos).argmax(-1, keepdim=True)).squeeze(1)
        among_values.append((value == batch.answer_pos).float().mean())
        among_all.append((row.argmax(-1) == batch.answer_pos).float().mean())
    assert max(among_values) > 0.7, f"chance is 0.25, this is {max(among_values):.2f}"
    assert max(among_all) > (0.8 if "mamba-" in name else 0.2), f"chance is 0.05, this is {max(among_all):.2f}"


def test_recall_prompts_are_what_they_say():
    batch = gl.tasks.recall(300, seed=1)
    words = gl.tasks.VOCABULARY
    for row, answer, at in zip(batch.tokens.tolist(), batch.answers.tolist(), batch.answer_pos.tolist(), strict=True):
        text = [words[i] for i in row]
        assert text[0] == "<bos>" and text[-2] == "?" and text.count("?") == 1
        keys = [w for w in text[:-1] if w in gl.tasks.KEYS]
        assert len(set(keys)) == len(keys) == 4 and text[-1] in keys
        for i, word in enumerate(text[:-1]):
            if word in gl.tasks.KEYS:
                assert text[i + 1] in gl.tasks.VALUES
        assert row[at] == answer and text[at - 1] == text[-1]
        assert sum(w in gl.tasks.NOISE for w in text) == 10
    other = batch.with_answer((batch.answers - 14 + 1) % 8 + 14)
    assert (other.tokens != batch.tokens).sum() == 300 and torch.equal(
        other.tokens[range(300), batch.answer_pos], other.answers
    )
    assert torch.equal(gl.tasks.recall(5, seed=3).tokens, gl.tasks.recall(5, seed=3).tokens)


def test_the_script_trains_saves_and_reports(tmp_path):
    recipe = make.Recipe("mini", make.mamba(8, 1, 2), "recall", steps=3, batch=4)
    made = make.train(recipe, tmp_path, verbose=False)
    model = gl.from_pretrained(tmp_path / "mini", device="cpu")
    assert json.loads((tmp_path / "mini" / "training.json").read_text()) == made
    assert model.to_str_tokens("A 3 ? A") == ["<bos>", "A", "3", "?", "A"]
    assert made["metric"] == {k: round(v, 4) for k, v in make.recall_metric(model).items()}


def test_rewritten_prompts_are_what_they_say():
    batch = gl.tasks.rewritten_recall(300, seed=1)
    words = gl.tasks.VOCABULARY
    for row, answer, at, old, old_at in zip(
        batch.tokens.tolist(), batch.answers.tolist(), batch.answer_pos.tolist(),
        batch.old_answers.tolist(), batch.old_pos.tolist(), strict=True,
    ):  # fmt: skip
        text = [words[i] for i in row]
        assert len(text) == gl.tasks.recall(1).tokens.shape[1] and text[-2] == "?"
        keys = [w for w in text[:-1] if w in gl.tasks.KEYS]
        assert len(keys) == 5 and len(set(keys)) == 4 and keys.count(text[-1]) == 2
        places = [i for i, word in enumerate(text[:-1]) if word == text[-1]]
        assert [old_at - 1, at - 1] == places and row[at] == answer and row[old_at] == old != answer
        assert sum(w in gl.tasks.NOISE for w in text) == 8
    assert torch.equal(
        batch.tokens.gather(1, batch.pair_pos).sort(1).values[:, 0] >= 14, torch.ones(300, dtype=torch.bool)
    )
    later = (batch.old_pos < batch.answer_pos).float().mean()
    assert later == 1 and 4 < batch.old_pos.float().mean() < 12
    first = batch.pair_pos[:, 0] == batch.answer_pos  # either of the two may come first
    assert 0.4 < first.float().mean() < 0.6


def test_the_bundled_dictionary_is_the_recorded_one():
    (recipe,) = make.DICTIONARIES
    name = f"gatedlens/{recipe.model}"
    found, model = gl.dictionaries.load(name), gl.from_pretrained(name, device="cpu")
    assert (found.point, found.n_features, found.activation.k) == (recipe.point, recipe.n_features, recipe.k)
    now, then = make.dictionary_metric(model, found, 256), found.facts["measured"]
    assert abs(now["explained"] - then["explained"]) < 5e-3 and now["recovered"] > 0.999 and then["recovered"] > 0.999
    with pytest.raises(gl.CheckpointError, match="There is no bundled dictionary of gatedlens/mamba-recall"):
        gl.dictionaries.load("gatedlens/mamba-recall")

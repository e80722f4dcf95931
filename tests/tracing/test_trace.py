"""Causal tracing: every cell is that of the literal loop, one forward a cell, on every architecture."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import gatedlens as gl
from gatedlens.tracing.trace import causal_trace
from tests.helpers import example, padded

CLOSE = {"rtol": 1e-9, "atol": 1e-10}
SUBJECT = [1, 2]
POINTS = ["resid_post", "mixer_out", "scan", "mixer.hook_gated", "mlp_out"]


METRIC = gl.metrics.logit_difference([1, 4], 3)


def layers_of(model, point):
    """layer -> the full name of the point, in the layers that have it; None if no layer does, or one is not enough."""
    found = {}
    for layer in range(model.cfg.n_layers):
        tails = [name for name in model.names if name.startswith(f"blocks.{layer}.") and name.endswith(f"hook_{point}")]
        full = f"blocks.{layer}.{point}"
        if full in model.names:
            found[layer] = full
        elif "hook_" not in point and len(tails) == 1:
            found[layer] = tails[0]
    return found


def corruptions(model, x):
    """Options of `causal_trace`, and the corrupted runs they mean: (input, hooks) of each sample."""
    embedded = model.run_with_cache(x, names_filter="hook_embed")[1]["hook_embed"]
    drawn = torch.randn(2, *embedded.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    noise = torch.zeros_like(drawn)
    noise[:, :, SUBJECT] = 3 * embedded.std() * drawn[:, :, SUBJECT]
    yield (
        {"subject": SUBJECT, "samples": 2, "seed": 5},
        [(x, [("hook_embed", lambda e, hook, n=n: e + n)]) for n in noise],
    )
    other = example(model, seed=9)
    yield {"corrupt": other}, [(other, [])]


def literal(model, clean, runs, metric, names, window, position):
    """One cell: each sample by itself, the clean values put back layer by layer."""
    n, layer = position
    start, stop = layer - window // 2, layer + -(-window // 2)
    total = []
    for given, hooks in runs:
        bad = metric(model.run_with_hooks(given, fwd_hooks=hooks))
        restore = []
        for one, name in names.items():
            if start <= one < stop:

                def put(value, hook):
                    value[:, n] = clean[hook.name][:, n]
                    return value

                restore.append((name, put))
        total.append(metric(model.run_with_hooks(given, fwd_hooks=[*hooks, *restore])) - bad)
    return torch.stack(total).mean()


@torch.no_grad()
@pytest.mark.parametrize(
    "window", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_every_cell_is_the_literal_one(model, window):
    x, metric = example(model), METRIC
    length = model.run_with_cache(x, names_filter="hook_embed")[1]["hook_embed"].shape[1]
    point = POINTS[window % 2]
    for options, runs in corruptions(model, x):
        found = causal_trace(model, x, metric, point=point, window=window, max_rows=7, progress=False, **options)
        names = layers_of(model, point)
        _, clean = model.run_with_cache(x, names_filter=list(names.values()))
        assert found.axes == ("layer", "pos") and found.shape == (len(names), length)
        for layer in names:
            for n in (1, 3, length - 1):
                want = literal(model, clean, runs, metric, names, window, (n, layer))
                assert torch.allclose(found.at(layer=layer).values[n], want, **CLOSE), (layer, n)
        bad = torch.stack([metric(model.run_with_hooks(g, fwd_hooks=hooks)).mean() for g, hooks in runs]).mean()
        assert abs(found.facts["clean"] - metric(model(x)).mean()) < 1e-10
        assert abs(found.facts["corrupted"] - bad) < 1e-10
        assert abs(found.facts["total_effect"] - (metric(model(x)).mean() - bad)) < 1e-10
        assert found.values.abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("point", POINTS[2:])
def test_any_point_can_be_restored(model, point):
    x, metric, names = example(model), METRIC, layers_of(model, point)
    options, runs = next(corruptions(model, x))
    if not names:
        with pytest.raises(gl.PointError, match="is not a hook point|ambiguous"):
            causal_trace(model, x, metric, point=point, progress=False, **options)
        return
    found = causal_trace(model, x, metric, point=point, positions=[2], progress=False, **options)
    assert found["layer"] == list(names)
    _, clean = model.run_with_cache(x, names_filter=list(names.values()))
    for layer in names:
        want = literal(model, clean, runs, metric, names, 1, (2, layer))
        assert torch.allclose(found.at(layer=layer).values[0], want, **CLOSE)


@torch.no_grad()
def test_all_restored_is_the_clean_run(model):
    """The last layer at every position that the output reads, and any layer of which all positions are restored."""
    x = example(model)
    metric = METRIC
    last = model.cfg.n_layers - 1
    at = {"read": -1} if model.pooling() is None else {"read": int(model.pooling().argmax())}
    found = causal_trace(model, x, metric, subject=SUBJECT, positions=at, samples=2, progress=False)
    assert abs(found.at(layer=last, pos=0).values - found.facts["total_effect"]) < 1e-9


@torch.no_grad()
def test_how_much_runs_at_once_changes_nothing(model):
    x, metric = example(model), METRIC
    rows = []
    forward = type(model).forward

    def options(max_rows):
        return {"subject": SUBJECT, "samples": 3, "max_rows": max_rows, "positions": range(4), "progress": False}

    def count(self, batch, *args, **kwargs):
        rows.append(len(batch.value))
        return forward(self, batch, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "forward", count)
        few, many = (causal_trace(model, x, metric, **options(n)) for n in (1, 1000))
    assert torch.allclose(few.values, many.values, **CLOSE)
    few_rows, many_rows = rows[: rows.index(2 * 3)], rows[rows.index(2 * 3) :]
    assert max(few_rows) == 2, "one sample of one cell"
    assert 2 * 3 < max(many_rows) <= 2 * 3 * 4 * model.cfg.n_layers, "all samples of cells that change anything"


@torch.no_grad()
@torch.no_grad()
def test_under_hooks_of_the_users_own_and_with_a_subject_in_each_row(model):
    clean, rows = example(model, 2), torch.tensor([1, 3])
    options = {"subject": rows, "samples": 2, "positions": [2], "progress": False}
    with gl.ablation.resample("blocks.0.hook_mixer_out").on(model):
        many, one = (gl.tracing.causal_trace(model, clean, METRIC, **options, max_rows=n) for n in (64, 2))
    assert torch.allclose(many.values, one.values, rtol=0, atol=1e-12) and many.facts["subject"] == [[1], [3]]


def test_positions_of_each_row(lm):
    x, metric = example(lm), METRIC
    mask = torch.zeros_like(x, dtype=torch.bool)
    mask[0, 1] = mask[1, 4] = True
    at = {"subject": torch.tensor([1, 4]), "later": [3, 5], "last": -1}
    found = causal_trace(lm, x, metric, subject=mask, positions=at, samples=2, progress=False)
    assert found["pos"] == ["subject*", "later", "last"]
    both = causal_trace(lm, x, metric, subject=mask, positions=range(2), samples=1, progress=False)
    assert both["pos"] == ["0", "1"], "rows differ, so positions are numbers, and no subject is common"
    names, each = layers_of(lm, "resid_post"), []
    for row in range(2):
        lone = gl.metrics.logit_difference([1, 4][row], 3)
        _, clean = lm.run_with_cache(x[row : row + 1], names_filter=list(names.values()))
        drawn = torch.randn(2, 2, 7, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        noise = 3 * float(lm.hook_embed(lm.embed(x)).std()) * drawn * mask.unsqueeze(-1)
        cells = []
        for label in ("subject", "later", "last"):
            place = at[label] if label == "last" else int(at[label][row])
            runs = [(x[row : row + 1], [("hook_embed", lambda e, hook, n=n[row : row + 1]: e + n)]) for n in noise]
            cells.append([literal(lm, clean, runs, lone, names, 1, (place, layer)) for layer in names])
        each.append(torch.tensor(cells).T)
    assert torch.allclose(found.values, (each[0] + each[1]) / 2, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_takes_no_part_in_a_trace(lm, side):
    """A padded row is traced as if it were alone, and positions are averaged over the rows that have them."""
    rows = [example(lm, 1, n, seed=n)[0] for n in (6, 4)]
    others = [example(lm, 1, n, seed=n + 10)[0] for n in (6, 4)]
    (tokens, mask), (corrupt, _) = padded(rows, side), padded(others, side)
    metric = gl.metrics.logit_difference([1, 4], 3)
    found = causal_trace(lm, (tokens, mask), metric, corrupt=(corrupt, mask), progress=False)
    at_end = causal_trace(
        lm, (tokens, mask), metric, corrupt=(corrupt, mask), positions={"last": -1, "third": 2}, progress=False
    )
    ends = 0
    want, count = torch.zeros(found.shape, dtype=torch.float64), torch.tensor([2, 2, 2, 2, 1, 1])
    for i, (row, other) in enumerate(zip(rows, others, strict=True)):
        lone = gl.metrics.logit_difference([1, 4][i], 3)
        alone = causal_trace(lm, row.unsqueeze(0), lone, corrupt=other.unsqueeze(0), progress=False)
        want[:, : len(row)] += alone.values
        ends = ends + alone.values[:, [-1, 2]] / 2
    assert torch.allclose(at_end.values, ends, **CLOSE)
    assert torch.allclose(found.values, want / count, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("under_hooks", [False, True])
def test_noise_in_padded_rows_is_one_forward_a_sample(lm, side, under_hooks):
    """Samples of a padded batch together, one at a time, and under hooks of the user's own: as written out by hand."""
    tokens, mask = padded([example(lm, 1, n, seed=n)[0] for n in (3, 5, 4)], side)
    metric, ends = gl.metrics.logit_difference([1, 4, 2], 3), mask.long().cumsum(1).argmax(1)
    name, start = "blocks.1.hook_resid_post", mask.long().argmax(1)
    options = {"subject": 1, "samples": 2, "attention_mask": mask, "positions": [1, 3, -1], "progress": False}
    with gl.ablation.scale("blocks.0.hook_mixer_out", 0.5, pos=-1).on(lm) if under_hooks else nullcontext():
        found = [causal_trace(lm, tokens, metric, **options, max_rows=n) for n in (64, 4)]
        hand = {"attention_mask": mask}
        _, cache = lm.run_with_cache(tokens, names_filter=["hook_embed", name], **hand)
        embedded = cache["hook_embed"]
        drawn = torch.randn(2, *embedded.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        want = []
        for places in (start + 1, start + 3, ends):
            rows = mask.gather(1, places.clamp(max=4).unsqueeze(1)).squeeze(1) & (places < 5)
            rises = []
            for sample in drawn:
                added = torch.zeros_like(embedded)
                for row in range(3):
                    added[row, start[row] + 1] = 3 * embedded[mask].std() * sample[row, start[row] + 1]
                noisy = [("hook_embed", lambda x, hook, added=added: x + added)]

                def put(x, hook, places=places, rows=rows):
                    for row in rows.nonzero().flatten():
                        x[row, places[row]] = cache[name][row, places[row]]

                good, bad = (
                    lm.run_with_hooks(tokens, fwd_hooks=hooks, **hand) for hooks in ([*noisy, (name, put)], noisy)
                )
                read = [metric(logits[torch.arange(3), ends]) for logits in (good, bad)]
                rises.append((read[0] - read[1])[rows].mean())
            want.append(torch.stack(rises).mean())
    for one in found:
        assert torch.allclose(one.values[1], torch.stack(want), **CLOSE)


def test_a_trained_model_keeps_the_value_until_the_query(recall_model):
    pytest.importorskip("matplotlib").use("agg")
    batch = gl.tasks.recall(1, seed=0)
    value = int(batch.answer_pos[0])
    changed = batch.with_answer(
        gl.tasks.ids(("1",)) if int(batch.answers) != int(gl.tasks.ids(("1",))) else gl.tasks.ids(("2",))
    )
    metric = gl.metrics.logit_difference(batch.answers, changed.answers)
    found = causal_trace(recall_model, batch.tokens, metric, corrupt=changed.tokens, progress=False)
    assert found.facts["subject"] == [[value]]
    assert found["pos"][value].endswith("*") and sum(label.endswith("*") for label in found["pos"]) == 1
    best = found.top(1, signed=True)[0]
    total = found.facts["total_effect"]
    assert total > 5 and best["value"] > 0.9 * total
    assert found.at(layer=1, pos=-1).values > 0.99 * total
    assert "Causal trace" in found.plot().axes[0].get_title()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, gl.InputError, "needs subject="),
        ({"subject": [400]}, gl.InputError, "subject=400 is out of range"),
        ({"subject": []}, gl.InputError, "names no position"),
        ({"subject": torch.zeros(2, 2, dtype=torch.bool)}, gl.InputError, r"subject is a mask \[2, 2\]"),
        ({"subject": [1], "window": 0}, gl.InputError, "window=0: it is at least 1"),
        ({"subject": "D"}, gl.InputError, "subject='D' is no position"),
        ({"subject": [1], "samples": 0}, gl.InputError, "samples=0"),
        ({"subject": [1], "noise": 0.0}, gl.InputError, "noise=0.0: it is more than 0"),
        (
            {"subject": [1], "positions": [99]},
            gl.InputError,
            r"positions 99 is out of range: the longest row has \d+ positions",
        ),
        (
            {"subject": [1], "positions": {"a": [0, 1, 2]}},
            gl.InputError,
            "positions 'a'=.*: one position is meant in each row",
        ),
        ({"subject": [1], "positions": []}, gl.InputError, "positions is empty"),
        ({"subject": [1], "point": "resid_pots"}, gl.PointError, "Did you mean"),
        ({"subject": [1], "point": "mixer.hook_nothing"}, gl.PointError, "is not a hook point"),
    ],
)
def test_mistakes_about_where_and_how_much_are_explained(model, options, error, message):
    with pytest.raises(error, match=message):
        causal_trace(model, example(model), METRIC, progress=False, **options)
    assert not model.list_hooks()


def test_mistakes_about_the_counterfactual_and_the_metric(model):
    x, metric = example(model), METRIC
    with pytest.raises(gl.InputError, match="is the clean input"):
        causal_trace(model, x, metric, corrupt=x)
    with pytest.raises(gl.InputError, match="the same positions"):
        causal_trace(model, x, metric, corrupt=example(model, 1, seed=9))
    with pytest.raises(gl.InputError, match="subject goes with noise"):
        causal_trace(model, x, metric, corrupt=example(model, seed=9), subject=[1])
    with pytest.raises(gl.InputError, match="one number for 2 rows"):
        causal_trace(model, x, lambda logits: logits.mean(), subject=[1], progress=False)
    with pytest.raises(gl.InputError, match="NaN"):
        causal_trace(model, x, lambda logits: logits.flatten(1)[:, 0] * torch.nan, subject=[1], progress=False)
    assert not model.list_hooks()


@torch.no_grad()
@pytest.mark.parametrize("leaf", ["scan", "write"])
def test_heads_alone_are_restored(leaf):
    """Each cell by hand: one head's clean values put back at one position of one layer, sample by sample."""
    model, point = gl.HookedMamba2.tiny(dtype=torch.float64), f"mixer.hook_{leaf}"
    x, names = example(model), layers_of(model, point)
    _, clean = model.run_with_cache(x, names_filter=list(names.values()))
    for options, runs in corruptions(model, x):
        found = causal_trace(model, x, METRIC, point=point, positions=[1, 4], progress=False, **options, head=2)
        for layer, name in names.items():
            for column, n in enumerate((1, 4)):
                some = slice(16, 24) if leaf == "scan" else 2

                def put(value, hook, name=name, n=n, some=some):
                    value[:, n, some] = clean[name][:, n, some]

                want = torch.stack(
                    [
                        METRIC(model.run_with_hooks(given, fwd_hooks=[*hooks, (name, put)]))
                        - METRIC(model.run_with_hooks(given, fwd_hooks=hooks))
                        for given, hooks in runs
                    ]
                ).mean()
                assert torch.allclose(found.at(layer=layer).values[column], want, **CLOSE), (layer, n)
        assert found.facts["entries"] == "head=2" and "head=2" in found.title
    with pytest.raises(gl.InputError, match="pos=1: a trace says by positions= which are restored"):
        causal_trace(model, x, METRIC, point=point, corrupt=x, pos=1)

"""Curves against one changed input at a time; orders, ties, what stays; the best and the worst map; mistakes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import gatedlens as gl
from gatedlens import attribution, evaluation
from gatedlens.evaluation import removal
from gatedlens.evaluation.case import Case
from gatedlens.evaluation.curves import Curve
from gatedlens.evaluation.protocol import PROTOCOLS
from tests.helpers import example, padded

NOTHING = 9  # a token of the tiny models, which have no tokenizer
FEW = {name: row.shares[:: len(row.shares) // 4] for name, row in PROTOCOLS.items()}


def scores_of(model, input, seed=3):
    shape = input.shape if model.grid is None else (len(input), model.grid.rows, model.grid.columns)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nothing_of(model, name):
    return {"nothing": NOTHING} if model.grid is None else {}


def black(model):
    mean, std = (torch.tensor(t, dtype=torch.float64) for t in (model.cfg.image_mean, model.cfg.image_std))
    return ((0 - mean) / std)[:, None]


@torch.no_grad()
def by_hand(model, name, input, scores, labels):
    """One sample, one share at a time: a list of places, sorted with Python, written over one by one."""
    text, rows = model.grid is None, []
    for b in range(len(input)):
        if text:
            flat, empty = input[b].clone()[None], torch.full_like(input[b][None], NOTHING)
            places, given = list(range(input.shape[1] - 1)), scores[b]  # the last token is read from, and stays
        else:
            flat = input[b].flatten(1)
            empty = removal.blurred(input)[b].flatten(1) if name == "insertion" else black(model).expand_as(flat)
            height, width = input.shape[2:]
            wide = torch.nn.functional.interpolate(scores[b][None, None], (height, width), mode="bilinear")
            places, given = list(range(flat.shape[1])), wide.flatten()
        size = {"pruning": lambda p, given=given: abs(given[p].item())}.get(
            name, lambda p, given=given: given[p].item()
        )
        most_first = name in ("positive", "activation", "deletion", "insertion")
        order = sorted(places, key=size, reverse=most_first)
        clean, row = answer(model, flat, input[b]), []
        for share in FEW[name]:
            exact = round(share * len(places), 6)
            chosen = order[: math.ceil(exact) if text else math.floor(exact)]
            changed = flat.clone()
            if name in ("activation", "insertion"):
                for p in places:
                    changed[:, p] = empty[:, p]
                for p in chosen:
                    changed[:, p] = flat[:, p]
            else:
                for p in chosen:
                    changed[:, p] = empty[:, p]
            logits = answer(model, changed, input[b])
            p = float(logits.exp()[labels[b]] / logits.exp().sum())
            row.append(
                {
                    "accuracy": float(int(logits.argmax()) == labels[b]),
                    "probability": p,
                    "squared_error": float(sum((x - y) ** 2 for x, y in zip(logits, clean, strict=True)) / len(logits)),
                }[PROTOCOLS[name].measure]
            )
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def answer(model, flat, like):
    logits = model(flat.reshape(1, *like.shape) if like.ndim > 1 else flat)
    return logits[0, -1] if logits.ndim == 3 else logits[0]


def measured(model, name, input, scores, labels=None, **options):
    row = {"progress": False, **nothing_of(model, name), **options}
    return evaluation.curve(PROTOCOLS[name], model, input, scores, labels, **row)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_curve_is_that_of_a_slow_loop(model, name):
    input = example(model, 2, 7)
    scores, labels = scores_of(model, input), torch.tensor([3, 1])
    found = measured(model, name, input, scores, labels, batch_size=5, shares=FEW[name])
    want = by_hand(model, name, input, scores, labels.tolist())
    assert found.values.shape == want.shape and torch.allclose(found.values, want, rtol=1e-10, atol=1e-12)
    assert found.shares == list(FEW[name]) and found.better == PROTOCOLS[name].better
    width = FEW[name][1] - FEW[name][0]
    for b in range(2):
        area = sum(width * (x + y) / 2 for x, y in itertools.pairwise(want[b].tolist()))
        assert float(found.areas[b]) == pytest.approx(area, rel=1e-9, abs=1e-12)
        assert float(found.averages[b]) == pytest.approx(float(want[b].mean()), rel=1e-9, abs=1e-12)


def test_the_functions_are_their_protocols(model):
    input = example(model)
    scores, options = scores_of(model, input), {"progress": False, **nothing_of(model, "")}
    for name, function in {
        "activation": evaluation.activation_curve,
        "pruning": evaluation.pruning_curve,
        "deletion": evaluation.deletion,
        "insertion": evaluation.insertion,
    }.items():
        assert torch.equal(function(model, input, scores, **options), measured(model, name, input, scores))
    for order in ("positive", "negative"):
        found = evaluation.perturbation(model, input, scores, order=order, **options)
        assert torch.equal(found, measured(model, order, input, scores)) and found.facts["protocol"] == order
    up, down = (measured(model, name, input, scores) for name in ("insertion", "deletion"))
    both = evaluation.difference(up, down)
    assert torch.allclose(both.areas, up.areas - down.areas, atol=1e-14) and both.better == "up"


def test_ends_of_the_curves(model):
    """Nothing taken away is the clean answer, and without labels that answer is what is measured."""
    input = example(model)
    scores = scores_of(model, input)
    with torch.no_grad():
        logits = model(input).reshape(2, -1, model.cfg.d_vocab)[:, -1]
    best = logits.softmax(-1).amax(-1)
    for name, end in (("deletion", 0), ("insertion", -1), ("activation", -1)):
        assert torch.allclose(measured(model, name, input, scores).values[:, end], best, atol=1e-12)
    assert measured(model, "pruning", input, scores).values[:, 0].abs().max() < 1e-24
    whole = measured(model, "deletion", input, scores).values[:, -1]
    assert torch.allclose(whole, measured(model, "deletion", input, -scores).values[:, -1], atol=1e-12)


def test_curves_of_a_batch_stand_alone(model):
    input = example(model, 3)
    scores = scores_of(model, input)
    whole = measured(model, "positive", input, scores, measure="probability")
    alone = [measured(model, "positive", input[b : b + 1], scores[b : b + 1], measure="probability") for b in range(3)]
    assert torch.allclose(whole.values, Curve.joined(alone).values, atol=1e-12)
    with pytest.raises(gl.InputError, match="not measured alike"):
        Curve.joined([alone[0], measured(model, "negative", input, scores)])


def test_ties_go_to_the_first_place(model):
    input = example(model)
    flat = torch.zeros(2, input.shape[1]) if model.grid is None else torch.zeros(2, *input.shape[2:])
    n = flat[0].numel()
    case = Case.of(model, input, **nothing_of(model, ""))
    last = int(model.grid is None)  # it stays, so it is behind all others
    for most_first in (True, False):
        assert case.ranks(flat, most_first).tolist() == [list(range(n))] * 2
    one = flat.flatten(1).clone()
    one[:, 2] = -1.0
    order = case.ranks(one.reshape(flat.shape), True).argsort(1)[0].tolist()
    assert order == [*[p for p in range(n - last) if p != 2], 2, *range(n - last, n)]
    assert case.ranks(one.reshape(flat.shape), True, absolute=True).argsort(1)[0, 0] == 2


def test_orders_do_not_hang_on_rounding(model):
    """Scores that differ in their last digits give one order, at the level of pixels too."""
    input = example(model)
    case = Case.of(model, input, **nothing_of(model, ""))
    scores = scores_of(model, input).round()  # many ties
    for seed in range(5):
        noisy = scores * 0.3 + 1e-15 * scores_of(model, input, seed=seed)
        for choice in ({"most_first": True}, {"most_first": False}, {"most_first": False, "absolute": True}):
            assert torch.equal(case.ranks(scores, **choice), case.ranks(noisy, **choice))


def test_an_input_in_which_nothing_changed_answers_as_before(model):
    """To the last bit, in whatever batch: its squared error is 0 and no rounding."""
    input = example(model, 3)
    case = Case.of(model, input, **nothing_of(model, ""))
    rows = torch.tensor([2, 0, 1, 0])
    values = case.values[rows].clone()
    values[2] = case.nothing[0]
    found = case.logits(values, rows)
    assert torch.equal(found[[0, 1, 3]], case.clean[[2, 0, 0]]) and not torch.equal(found[2], case.clean[1])
    assert torch.equal(case.logits(case.values, torch.arange(3)), case.clean)
    assert (measured(model, "pruning", input, scores_of(model, input), batch_size=3).values[:, 0] == 0).all()


def test_padding_and_kept_places_stay(lm):
    rows = [example(lm, 1, n, seed=n)[0] for n in (7, 4)]
    for side in ("left", "right"):
        tokens, mask = padded(rows, side)
        scores = scores_of(lm, tokens)
        found = measured(lm, "pruning", tokens, scores, attention_mask=mask)
        for b, row in enumerate(rows):
            alone = measured(lm, "pruning", row[None], scores[b][mask[b]][None])
            assert torch.allclose(found.values[b], alone.values[0], atol=1e-12)
    keep = torch.zeros(1, 7, dtype=torch.bool)
    keep[0, [0, 1, 6]] = True
    case = Case.of(lm, rows[0][None], nothing=NOTHING, keep=keep)
    assert case.free[0].tolist() == [False, False, True, True, True, True, False] and case.counts(
        (0.5, 1.0)
    ).tolist() == [[2, 4]]
    every = Case.of(lm, rows[0][None], nothing=NOTHING, keep=torch.zeros(1, 7, dtype=torch.bool))
    assert bool(every.free.all())


def test_answers_to_choose_from(lm):
    tokens = example(lm)
    scores, among = scores_of(lm, tokens), torch.tensor([[4, 7], [2, 11]])
    found = measured(lm, "deletion", tokens, scores, [1, 0], among=among)
    with torch.no_grad():
        logits = lm(tokens)[:, -1]
    want = [logits[0, [4, 7]].softmax(-1)[1], logits[1, [2, 11]].softmax(-1)[0]]
    assert torch.allclose(found.values[:, 0], torch.stack(want), atol=1e-12)


@torch.no_grad()
def test_the_best_and_the_worst_map_are_at_the_ends(lm):
    """Of all 6 orders of three tokens, those that are best by a direct count get the extreme areas, and no map is beyond."""
    tokens = example(lm, 1, 4)
    label = int(lm(tokens)[0, -1].argmax())
    options = {"progress": False, "nothing": NOTHING, "measure": "probability", "shares": (1 / 3, 2 / 3)}
    areas, counted = {}, {}
    for order in itertools.permutations(range(3)):
        scores = torch.zeros(1, 4)
        scores[0, list(order)] = torch.tensor([3.0, 2.0, 1.0])
        areas[order] = float(evaluation.perturbation(lm, tokens, scores, label, **options).average.value)
        total = 0.0
        for k in (1, 2):
            changed = tokens.clone()
            changed[0, list(order[:k])] = NOTHING
            total += float(lm(changed)[0, -1].softmax(-1)[label])
        counted[order] = total / 2
    assert min(areas, key=areas.get) == min(counted, key=counted.get)
    assert max(areas, key=areas.get) == max(counted, key=counted.get)
    assert min(areas.values()) < max(areas.values())
    assert areas == pytest.approx(counted, abs=1e-12)


def test_on_trained_models_occlusion_beats_chance_and_its_opposite(recall_model):
    batch = gl.tasks.recall(24, seed=5)
    found = attribution.occlusion(recall_model, batch.tokens, batch.answers, baseline="and", progress=False)
    chance = attribution.random(recall_model, batch.tokens, batch.answers)

    def area(scores, order):
        curve = evaluation.perturbation(recall_model, batch.tokens, scores, batch.answers, order=order, progress=False)
        return curve.area

    assert area(found, "positive").high < area(chance, "positive").low
    assert area(found, "negative").low > area(chance, "negative").high
    assert area(found, "negative").low > 0.7  # of 0.8: almost all can go before the answer does
    opposite = found.scores * -1
    assert area(opposite, "positive").low > area(found, "positive").high
    # Key and value at the top: without them no prompt can be answered but by luck, with them alone every one can.
    truth = torch.zeros(batch.tokens.shape)
    truth[torch.arange(24), batch.answer_pos] = 2.0
    truth[torch.arange(24), batch.key_pos] = 1.0
    assert area(truth, "negative").low > 0.7 and area(truth, "positive").high < area(chance, "positive").low


def test_what_is_put_in_a_place(recall_model, moby_model, lm):
    assert removal.of_tokens(recall_model, None) == (recall_model.to_single_token("and"), "token 'and'")
    assert removal.of_tokens(moby_model, None) == (32, "token ' '")
    with pytest.raises(gl.InputError, match="pass nothing="):
        removal.of_tokens(lm, None)
    with pytest.raises(gl.InputError, match="is no token"):
        removal.of_tokens(lm, 4000)
    vim = gl.HookedViM.tiny()
    images = torch.rand(2, *vim.image_shape)
    pixels, _ = removal.of_pixels(vim, images, None)
    mean, std = (torch.tensor(t)[:, None, None] for t in (vim.cfg.image_mean, vim.cfg.image_std))
    assert torch.allclose(pixels * std + mean, torch.zeros(1), atol=1e-6)
    assert torch.equal(removal.of_pixels(vim, images, "mean")[0], torch.zeros_like(images[:1]))
    assert float(removal.of_pixels(vim, images, 0.25)[0].unique()) == 0.25
    assert torch.equal(removal.of_pixels(vim, images, images[1])[0][0], images[1])
    for wrong, message in (
        ("blak", "Did you mean 'black'"),
        (torch.zeros(3, 2, 2), "images are"),
        ([1], "a number for every"),
    ):
        with pytest.raises(gl.InputError, match=message):
            removal.of_pixels(vim, images, wrong)


def test_the_blur_is_a_gaussian_of_eleven_pixels():
    spot = torch.zeros(1, 1, 31, 31, dtype=torch.float64)
    spot[0, 0, 15, 15] = 1
    found = removal.blurred(spot)[0, 0]
    weights = torch.tensor([[math.exp(-(x * x + y * y) / 50) for x in range(-5, 6)] for y in range(-5, 6)])
    assert torch.allclose(found[10:21, 10:21].float(), (weights / weights.sum()).float(), atol=1e-7)
    assert float(found.sum()) == pytest.approx(1) and float(found[9].abs().max()) == 0
    flat = torch.full((1, 2, 4, 5), 0.7, dtype=torch.float64)
    assert torch.allclose(removal.blurred(flat), flat)


def test_a_curve_is_a_result(model, tmp_path):
    import matplotlib

    matplotlib.use("agg")
    input = example(model)
    found = measured(model, "deletion", input, scores_of(model, input))
    loaded = Curve.load(found.save(tmp_path / "curve.json"))
    assert torch.equal(loaded.values, found.values) and loaded.area == found.area and loaded.facts == found.facts
    frame = found.to_dataframe()
    assert len(frame) == 42 and set(frame.columns) >= {"sample", "share", "value"}
    assert found.plot().axes[0].get_xlabel() == "share" and found.at(share=0.5).shape == (2,)
    assert "area" in repr(found) and "better down" in repr(found)


def test_the_bar_of_a_curve_can_be_switched_off(lm, capsys):
    tokens = example(lm)
    measured(lm, "positive", tokens, scores_of(lm, tokens))
    assert capsys.readouterr().err == ""
    measured(lm, "positive", tokens, scores_of(lm, tokens), progress=True)
    assert "positive" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "postive"}, "Did you mean 'positive'"),
        ({"measure": "acuracy"}, "Did you mean 'accuracy'"),
        ({"shares": (0.5, 0.1)}, "ascending"),
        ({"shares": (0.5, 1.5)}, "from 0 to 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"labels": 4000}, "out of range"),
        ({"labels": [1, 2, 3]}, "one for each of the 2 rows"),
        ({"labels": 1.5}, "give one id"),
        ({"scores": torch.zeros(2, 3)}, r"scores have shape \[2, 3\]"),
        ({"scores": torch.zeros(1, 7)}, "scores have shape"),
        ({"scores": torch.full((2, 7), torch.nan)}, "not finite"),
        ({"keep": torch.ones(2, 7, dtype=torch.bool)}, "no place that can be taken away"),
        ({"keep": torch.ones(2, 3, dtype=torch.bool)}, r"booleans \[2, 7\]"),
        ({"among": [1, 4000]}, "ids of the answers"),
        ({"nothing": None}, "pass nothing="),
    ],
)
def test_wrong_questions_of_a_curve_are_explained(lm, options, message):
    given = {"scores": torch.zeros(2, 7), "nothing": NOTHING, "progress": False, **options}
    with pytest.raises(gl.InputError, match=message):
        evaluation.perturbation(lm, example(lm), **given)
    assert not lm.list_hooks()


def test_foreign_models_and_images_are_explained():
    with pytest.raises(gl.InputError, match="expected a gatedlens model"):
        evaluation.perturbation(torch.nn.Linear(1, 1), torch.zeros(1, 1), torch.zeros(1, 1))
    vim = gl.HookedViM.tiny()
    with pytest.raises(gl.InputError, match="reads float images"):
        evaluation.deletion(vim, torch.zeros(1, 3, 5, 5), torch.zeros(1, 5, 5))
    with pytest.raises(gl.InputError, match="row, column"):
        evaluation.deletion(vim, example(vim).float(), torch.zeros(2, 9))

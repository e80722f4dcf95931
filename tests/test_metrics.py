"""Metrics against their definitions, row by row; what they refuse."""

from __future__ import annotations

import math

import pytest
import torch

from gatedlens import InputError, metrics

LOGITS = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
OTHER = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_each_is_its_definition_row_by_row():
    pos, right, wrong = [4, 0, -2], torch.tensor([1, 2, 3]), 5
    found = {
        "logit": metrics.logit(right, pos)(LOGITS),
        "difference": metrics.logit_difference(right, wrong, pos)(LOGITS),
        "log": metrics.log_probability(right, pos)(LOGITS),
        "probability": metrics.probability(right, pos)(LOGITS),
        "kl": metrics.kl(OTHER, pos)(LOGITS),
    }
    for row in range(3):
        z, ref = LOGITS[row, pos[row]].tolist(), OTHER[row, pos[row]].tolist()
        total, ref_total = sum(map(math.exp, z)), sum(map(math.exp, ref))
        p, q = [math.exp(a) / total for a in z], [math.exp(a) / ref_total for a in ref]
        token = int(right[row])
        want = {
            "logit": z[token],
            "difference": z[token] - z[5],
            "log": math.log(p[token]),
            "probability": p[token],
            "kl": sum(b * math.log(b / a) for a, b in zip(p, q, strict=True)),
        }
        for name, value in want.items():
            assert abs(float(found[name][row]) - value) < 1e-12, name


def test_a_classifiers_logits_have_no_position():
    assert torch.equal(metrics.logit(2)(LOGITS[:, 0]), LOGITS[:, 0, 2])
    want = -LOGITS[:, 0].log_softmax(-1)[:, 2]
    assert torch.allclose(metrics.cross_entropy(2)(LOGITS[:, 0]), want)


def test_loss_is_the_models_row_by_row(lm):
    tokens = torch.randint(lm.cfg.d_vocab, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1, :2] = mask[2, 4:] = False
    with torch.no_grad():
        logits = lm(tokens, attention_mask=mask)
        found = metrics.loss(tokens, mask)(logits)
        for row in range(3):
            alone = tokens[row, mask[row]].unsqueeze(0)
            assert torch.allclose(found[row], lm(alone, return_type="loss"), atol=1e-12)


def test_normalised_is_1_for_clean_and_0_for_corrupted():
    metric = metrics.logit_difference(1, 2)
    score = metrics.normalised(metric, LOGITS, OTHER)
    assert abs(score(LOGITS).mean() - 1) < 1e-12 and abs(score(OTHER).mean()) < 1e-12
    with pytest.raises(InputError, match="nothing to normalise by"):
        metrics.normalised(metric, LOGITS, LOGITS)


def test_what_is_true_or_a_whole_number_is_measured_too():
    right = metrics.measure(lambda x: x[:, -1].argmax(-1) == LOGITS[:, -1].argmax(-1), LOGITS)
    assert right.dtype == torch.float64 and right.tolist() == [1, 1, 1]
    rank = metrics.per_row(lambda x: (x[:, -1] > x[:, -1, :1]).sum(-1), LOGITS)
    assert rank.tolist() == [(row > row[0]).sum() for row in LOGITS[:, -1]]
    assert metrics.measure(lambda x: x.mean().numpy(), LOGITS) == LOGITS.mean().float()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.logit(7)(LOGITS), r"token=7 is out of range: the logits have 7 entries \(0 to 6\)"),
        (lambda: metrics.logit([1, 2])(LOGITS), "the logits have 3 rows: give one for all, or one a row"),
        (lambda: metrics.logit(1, pos=5)(LOGITS), "pos=5 is out of range: row 0 has 5 positions"),
        (lambda: metrics.logit(torch.tensor(1.0))(LOGITS), "whole numbers"),
        (lambda: metrics.kl(OTHER[:2])(LOGITS), "kl compares with logits"),
        (lambda: metrics.loss(torch.zeros(2, 2, dtype=torch.long))(LOGITS), "loss needs logits"),
        (lambda: metrics.per_row(lambda x: x.mean(), LOGITS), "one number for 3 rows"),
        (lambda: metrics.per_row(lambda x: x.mean().reshape(1), LOGITS), "one number for 3 rows"),
        (lambda: metrics.measure(lambda x: x[:, 0, 0] * 1j, LOGITS), "real numbers"),
        (lambda: metrics.measure(lambda x: x[:, :, 0], LOGITS), r"returned shape \[3, 5\] for 3 rows"),
        (lambda: metrics.measure(lambda x: x[:, 0, 0] * torch.nan, LOGITS), "NaN"),
        (lambda: metrics.measure(lambda x: "a", LOGITS), "returned str"),
        (lambda: metrics.measure(None, LOGITS), "The metric is None; it is a function of logits"),
        (lambda: metrics.logit("A")(LOGITS), "token='A': whole numbers are meant; model.to_single_token"),
    ],
)
def test_mistakes_are_explained(call, message):
    with pytest.raises(InputError, match=message):
        call()

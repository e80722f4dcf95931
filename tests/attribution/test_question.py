"""Question: where a prediction is read from, what enters, the number for other inputs, rows alone."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens.attribution import Question
from gatedlens.attribution.target import Target
from tests.helpers import example, padded


def shares_by_gradient(model, question):
    """How much of d number / d ln_final.hook_out stands at each position."""
    g = question.gradients("ln_final.hook_out")["ln_final.hook_out"].norm(dim=-1)
    return g / g.sum(1, keepdim=True)


def test_a_prediction_is_read_from_where_its_gradient_is(model):
    question = Question.of(model, example(model))
    assert torch.allclose(shares_by_gradient(model, question), question.read, atol=1e-14)
    if model.grid is None:
        for side, last in (("left", [5, 5]), ("right", [5, 2])):
            tokens, mask = padded([example(model, 1, n, seed=n)[0] for n in (6, 3)], side)
            question = Question.of(model, tokens, attention_mask=mask)
            assert question.read.argmax(1).tolist() == last
            assert torch.allclose(shares_by_gradient(model, question), question.read, atol=1e-14)


@pytest.mark.parametrize(
    ("options", "own"),
    [
        ({}, [4]),
        ({"use_middle_cls_token": False}, [0]),
        ({"use_middle_cls_token": False, "use_end_cls_token": True}, [9]),
        ({"use_double_cls_token": True}, [0, 10]),
        ({"if_cls_token": False}, []),
        ({"if_cls_token": False, "final_pool_type": "none"}, [8]),
    ],
)
def test_class_tokens_and_pools(options, own):
    model = gl.HookedViM.tiny(dtype=torch.float64, **options)
    question = Question.of(model, example(model))
    assert torch.allclose(shares_by_gradient(model, question), question.read, atol=1e-14)
    assert question.own[0].nonzero()[:, 0].tolist() == own
    for mode in ("paper", "official"):
        found = gl.attribution.gradient_attention(model, example(model), mode=mode, start_layer=0)
        assert torch.isfinite(found.scores).all() and found.scores.abs().max() > 0


def test_features_make_the_number(model):
    input = example(model)
    question = Question.of(model, input, (3, 1))
    with torch.no_grad():
        logits = model(input).reshape(2, -1, model.cfg.d_vocab)[:, -1]
        assert torch.allclose(question.explained, logits[:, 3] - logits[:, 1], atol=1e-13)
        assert torch.allclose(question.measure(question.features), question.explained, atol=1e-12)
        other = Question.of(model, example(model, seed=9), (3, 1))
        both = question.measure(torch.cat([question.features, other.features]))
        assert torch.allclose(both, torch.cat([question.explained, other.explained]), atol=1e-12)
        flipped = question.features_of(question.batch.value.flip(0))
        assert torch.equal(flipped, question.features.flip(0))


def test_gradients_by_name(model):
    """Against differences of the number, one entry moved."""
    input, name = example(model), "blocks.1.hook_mixer_out"
    question = Question.of(model, input, 2)
    gradient = question.gradients(name)[name]

    def moved(by):
        def shift(x, hook):
            x[:, 1, 3] += by
            return x

        with torch.no_grad(), model.hooks([(name, shift)]):
            return question.measure(question.features)

    want = (moved(1e-5) - moved(-1e-5)) / 2e-5
    assert torch.allclose(gradient[:, 1, 3], want, atol=1e-8)
    assert torch.equal(question.gradients(question.entrance)[question.entrance], question.gradient())


def test_rows_without_padding(lm):
    tokens, mask = padded([example(lm, 1, n, seed=n)[0] for n in (6, 3)], "left")
    question = Question.of(lm, tokens, [4, 7], mask)
    rows = list(question.rows())
    assert [row.features.shape[1] for row in rows] == [6, 3]
    for r, row in enumerate(rows):
        with torch.no_grad():
            assert torch.allclose(row.measure(row.features), question.explained[r], atol=1e-12)
    spread = question.spread([torch.ones(1, 6), torch.full((1, 3), 2.0)])
    assert spread.tolist() == [[1.0] * 6, [0, 0, 0, 2, 2, 2]]


def test_a_target_of_one_row_asks_for_its_own_number():
    logits = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
    pos = torch.tensor([3, 3])
    real = torch.tensor([False, True, True, True])
    pair = Target(pos, torch.tensor([1, 2]), torch.tensor([5, 6]))
    mine = Target(pos, custom=lambda logits: logits[:, -1, 2] * torch.tensor([1.0, 10.0]))
    for target, want in ((pair, logits[1, 3, 2] - logits[1, 3, 6]), (mine, 10 * logits[1, 3, 2])):
        assert torch.equal(target.row(1, logits, real).metric(logits[1:, 1:]), want.reshape(1))
    assert pair.said == {"right": [1, 2], "wrong": [5, 6]} and mine.said == "<lambda>"

"""Secant relevance of whole models: complete on every architecture, padded, packed, carried, saturated; inside; and against
lrp."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch.autograd.function import Function

import gatedlens as gl
from gatedlens import attribution
from gatedlens.attribution.question import Question
from gatedlens.attribution.two_runs import TwoRuns
from gatedlens.hooks.vim import HookedViM
from gatedlens.model.by_head import head_outputs
from gatedlens.secant import difference
from tests.helpers import example, padded, relative

EXACT = 1e-10


def explained(model, features, question):
    """The number of other features, by a forward of its own."""
    with torch.no_grad():
        return question.measure(features)


def experts_stay(model):
    """Whether no expert is chosen: else the reference's run is one by the input's choices."""
    return not any(name.endswith("hook_expert_weights") for name in model.names.points)


@pytest.mark.parametrize("options", [{}, {"steps": 2}, {"keep": "nothing"}], ids=str)
def test_scores_sum_to_the_difference_of_two_runs(model, options):
    input = example(model)
    found = attribution.secant(model, input, target=(3, 1), **options)
    question = Question.of(model, input, (3, 1))
    runs = TwoRuns.of(question, keep=options.get("keep", "read"))
    gap = question.explained - explained(model, runs.nodes[0], question)
    reference = torch.tensor(found.facts["reference"], dtype=torch.float64)
    if experts_stay(model):
        assert torch.allclose(question.explained - reference, gap, atol=1e-12)
    assert torch.allclose(found.scores.flatten(1).sum(1), question.explained - reference, atol=EXACT)
    assert max(map(abs, found.facts["remainder"])) < EXACT
    assert found.scores.abs().max() > 1e-3 and found.facts["steps"] == options.get("steps", 1)


def test_what_is_read_gets_nothing_and_what_is_the_reference_neither(lm):
    tokens = example(lm)
    tokens[:, 2] = 7
    found = attribution.secant(lm, tokens, target=3, baseline=7)
    assert not found.scores[:, -1].any() and not found.scores[:, 2].any()
    given = torch.zeros(2, 7, dtype=torch.bool)
    given[:, 4] = True
    assert not attribution.secant(lm, tokens, target=3, keep=given).scores[:, 4].any()
    assert not attribution.secant(lm, torch.full_like(tokens, 7), target=3, baseline=7).scores.any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_their_rows_alone(lm, side):
    tokens, mask = padded([example(lm, 1, n, seed=n)[0] for n in (6, 3)], side)
    found = attribution.secant(lm, tokens, target=2, attention_mask=mask)
    assert (found.scores[~mask] == 0).all() and max(map(abs, found.facts["remainder"])) < EXACT
    alone = [attribution.secant(lm, row[kept].unsqueeze(0), target=2) for row, kept in zip(tokens, mask, strict=True)]
    assert all(torch.allclose(found.scores[b][mask[b]], alone[b].scores[0], atol=1e-12) for b in range(2))


def two_runs_of(model, tokens, **forward):
    """(logits of the last position in both runs, scores of the positions) of any forward under the rules."""
    question = Question.of(model, tokens, 3)
    runs = TwoRuns.of(question)
    kept = {}
    with runs.on(model), model.hooks([(question.entrance, lambda x, hook: kept.update(x=x))]):
        logits = model(tokens, **forward)
    x = kept["x"]
    grads = torch.autograd.grad(logits[:, -1, 3].sum(), x)
    scores = sum(((step * g).sum(-1) for step, g in zip(difference(x), grads, strict=True)))
    with torch.no_grad():
        assert torch.allclose(logits.plain[1], model(tokens, **forward).detach(), atol=1e-12)
    return logits.plain, scores


def test_packed_documents_do_not_reach_each_other(lm):
    if not lm.has_positions:
        pytest.skip("no position_ids")
    tokens, places = example(lm, 2, 8), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]] * 2)
    plain, scores = two_runs_of(lm, tokens, position_ids=places)
    assert torch.allclose(scores.sum(1), (plain[1] - plain[0])[:, -1, 3], atol=EXACT)
    assert not scores[:, :4].any() and scores[:, 4:7].any()


def test_a_carried_state_is_held(lm):
    tokens = example(lm, 2, 9)
    with torch.no_grad():
        _, state = lm(tokens[:, :4], return_state=True)
    plain, scores = two_runs_of(lm, tokens[:, 4:], state=state)
    assert torch.allclose(scores.sum(1), (plain[1] - plain[0])[:, -1, 3], atol=EXACT)


def test_saturated_gates_stay_complete(hooked):
    """Weights eight times as large: gates of 0 and 1, decays of 0, scores far apart."""
    loud = hooked.tiny(seed=1, dtype=torch.float64)
    with torch.no_grad():
        for name, p in loud.wrapped.named_parameters():
            if p.ndim == 2 and "embed" not in name:
                p.mul_(8)
    found = attribution.secant(loud, example(loud), target=3)
    size = found.scores.flatten(1).abs().sum(1)
    assert found.scores.isfinite().all()
    assert (torch.tensor(found.facts["remainder"]).abs() <= EXACT * size.clamp(min=1)).all()


def test_longer_than_a_chunk_and_a_block(hooked):
    if not issubclass(hooked, gl.HookedLanguageModel):
        return
    model = hooked.tiny(seed=0, dtype=torch.float64)
    found = attribution.secant(model, example(model, 1, 150), target=3)
    assert max(map(abs, found.facts["remainder"])) < EXACT


def test_a_metric_of_ones_own_is_complete_to_its_integral(model):
    def surprise(logits):
        return logits.reshape(len(logits), -1, logits.shape[-1])[:, -1].log_softmax(-1)[:, 2]

    found = attribution.secant(model, example(model), surprise)
    assert max(map(abs, found.facts["remainder"])) < 1e-6 and found.target == "surprise"
    with pytest.raises(gl.InputError, match="does not depend on the input"):
        attribution.secant(model, example(model), lambda logits: torch.zeros(len(logits)))


def test_values_stay_and_no_hook_is_left(model):
    input = example(model)
    question = Question.of(model, input, 3)
    with torch.no_grad():
        plain = model(input)
        with TwoRuns.of(question).on(model):
            ruled = model(input)
    assert torch.equal(plain, ruled.plain[1]) and not model.list_hooks()
    with contextlib.suppress(RuntimeError), TwoRuns.of(question).on(model):
        raise RuntimeError
    assert not model.list_hooks()


def test_in_float32_and_under_no_grad(hooked):
    model = hooked.tiny(seed=0)
    input = example(model).float() if model.grid is not None else example(model)
    wide = hooked.tiny(seed=0, dtype=torch.float64)
    with torch.no_grad():
        found = attribution.secant(model, input, target=3)
    want = attribution.secant(wide, input.double() if model.grid is not None else input, target=3)
    assert found.scores.dtype == torch.float32
    assert torch.allclose(found.scores.double(), want.scores, atol=1e-3 * float(want.scores.abs().max()))


# -- inside -----------------------------------------------------------------------------------------------------------


def test_every_layer_holds_the_whole(model):
    found = attribution.secant_by_layer(model, example(model), target=3)
    sums = found.values.sum(-1) + torch.tensor(found.facts["beside"], dtype=torch.float64)
    gap = attribution.secant(model, example(model), target=3)
    whole = gap.explained - torch.tensor(gap.facts["reference"], dtype=torch.float64)
    assert torch.allclose(sums, whole.unsqueeze(1).expand_as(sums), atol=EXACT)
    if not model.hands_on:
        assert torch.tensor(found.facts["beside"]).abs().max() < EXACT
    assert found.axes == ("batch", "layer", "pos") and found.labels["layer"][-1] == "end"


def test_points_hand_on_what_they_are_given(model):
    """What goes into a branch goes into its norm; what comes out of the last norm is what its input got."""
    input, last = example(model), model.cfg.n_layers - 1
    names = ["ln_final.hook_out", f"blocks.{last}.hook_resid_post"]
    if any(name not in model.names.points for name in names):
        names = names[1:]
    found = attribution.relevance_at(model, input, names, target=3)
    one = attribution.secant(model, input, target=3)
    whole = one.explained - torch.tensor(one.facts["reference"], dtype=torch.float64)
    for name in names:
        assert torch.allclose(found[name].flatten(1).sum(1), whole, atol=EXACT), name
    stream = attribution.relevance_at(model, input, "blocks.*.hook_mixer_out", target=3)
    assert stream and all(r.shape[-1] == model.cfg.d_model for r in stream.values())


def test_lazy_points_have_relevance_and_change_no_score(model):
    input = example(model)
    lazy = [name for name, point in model.names.points.items() if point.lazy]
    if model.cfg.architecture == "rwkv":
        with pytest.raises(gl.InputError, match="hook_k, hook_u or hook_scan"):
            attribution.relevance_at(model, input, "blocks.0.mixer.hook_state", target=3)
        return
    first = [name for name in model.names if name.endswith("hook_resid_pre")][:1]
    plain = attribution.relevance_at(model, input, first, target=3)[first[0]]
    heard = attribution.relevance_at(model, input, [*first, *lazy], target=3)
    assert torch.allclose(heard[first[0]], plain, atol=1e-10)
    assert all(heard[name].isfinite().all() for name in lazy)


def test_heads_and_sources(model):
    if not head_outputs(model):
        with pytest.raises(gl.PointError):
            attribution.secant_by_head(model, example(model), target=3)
        return
    found = attribution.secant_by_head(model, example(model), target=3)
    of_heads = torch.tensor(found.facts["head"], dtype=torch.float64)
    rest = torch.tensor(found.facts["remainder"], dtype=torch.float64)
    assert torch.allclose(found.values.sum(-1) + rest, of_heads, atol=EXACT)
    layer = found.labels["layer"][-1]
    block = model.blocks[layer]
    names = [block.mixer.output_name, f"blocks.{layer}.hook_{next(iter(block.mixing))}_in"]
    at = attribution.relevance_at(model, example(model), names, target=3)
    assert torch.allclose(of_heads[:, -1].sum(1), at[names[0]].flatten(1).sum(1), atol=EXACT)
    if not model.hands_on:
        assert rest.abs().max() < EXACT
        whole = at[names[1]].sum(-1)
        if block.held(block.mixer.place):  # what is read goes to a weight behind the mixer, too
            gate = f"blocks.{layer}.{block.held(block.mixer.place)[0]}"
            beside = attribution.relevance_at(model, example(model), [gate], target=3)[gate]
            assert relative(found.values[:, -1].sum((1, 2)), (whole.sum(1) - beside.flatten(1).sum(1))) < 1e-8
        else:
            assert torch.allclose(found.values[:, -1].sum(1), whole, atol=EXACT)


# -- mix, and errors --------------------------------------------------------------------------------------------------


def test_mix_is_the_mean_of_both_at_unit_mass(model):
    input = example(model)
    one, other = (attribution.method(name)(model, input, 3).scores for name in ("secant", "lrp"))
    unit = [s / s.abs().flatten(1).sum(1).reshape(-1, *[1] * (s.ndim - 1)) for s in (one, other)]
    found = attribution.mix(model, input, 3)
    assert torch.allclose(found.scores, sum(unit) / 2, atol=1e-12)
    assert found.method == "mix" and found.facts["gates"] == "content"


def test_a_gradient_of_ones_own_is_refused():
    """A torch.autograd.Function in a hook tells no rule what it does."""

    class Mine(Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, *grads):
            return 2 * grads[0]

    model = gl.HookedMamba.tiny(dtype=torch.float64)
    mine = model.hooks([("blocks.1.hook_mixer_in", lambda x, hook: Mine.apply(x))])
    with mine, pytest.raises(gl.InputError, match=r"Secant relevance is off by .*of_one_number"):
        attribution.secant(model, example(model), target=3)


def test_wrong_options_are_explained(model):
    input = example(model)
    with pytest.raises(gl.InputError, match="steps=0: give at least 1"):
        attribution.secant(model, input, steps=0)
    with pytest.raises(gl.InputError, match="keep='raed': it is 'read', 'nothing', or booleans. Did you mean 'read'"):
        attribution.secant(model, input, keep="raed")
    with pytest.raises(gl.InputError, match=r"keep is torch.bool \[1, 2\]: give booleans"):
        attribution.integrated_gradients(model, input, keep=torch.zeros(1, 2, dtype=torch.bool))


def test_dropout_that_is_on_is_refused():
    model = copy.deepcopy(gl.HookedGriffin.tiny(dtype=torch.float64))
    for module in model.wrapped.modules():
        if "attention_dropout" in vars(module):
            module.attention_dropout = 0.5
    model.train()
    with pytest.raises(gl.InputError, match="model.eval"):
        attribution.secant(model, example(model), target=3)


def test_integrated_gradients_keep_what_is_read(lm):
    tokens = example(lm)
    found = attribution.integrated_gradients(lm, tokens, target=3, keep="read", n_steps=64)
    question = Question.of(lm, tokens, 3)
    gap = question.explained - explained(lm, TwoRuns.of(question).nodes[0], question)
    assert not found.scores[:, -1].any() and found.facts["keep"] == "read"
    assert torch.allclose(found.scores.sum(1) - gap, torch.tensor(found.facts["error"]).double(), atol=1e-6)


def test_images_keep_nothing():
    model = HookedViM.tiny(dtype=torch.float64)
    one, other = (attribution.secant(model, example(model), 3, keep=keep).scores for keep in ("read", "nothing"))
    assert torch.equal(one, other)

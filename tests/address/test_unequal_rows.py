"""A batch of unequal rows equals its rows alone, in every tool, on whichever side it is padded.

One test for all of them: each tool says what it finds for a batch, by row or as a mean over rows, and what is found for each
row alone must be it. Positions are asked as a user asks them, among a row's real ones.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import gatedlens as gl
from gatedlens import ablation, circuits, knockout, lens, metrics, patching, states, steering, tracing
from tests.helpers import example, padded

LENGTHS = (4, 6)
RIGHT, WRONG = [3, 1, 2], 5
QUIET = {"progress": False}


@dataclass
class Case:
    """The rows of a batch: `input` and `other` are pairs (ids, mask), `tokens` says which answers are whose."""

    model: Any
    input: tuple
    other: tuple
    rows: list[int]

    def metric(self, pos: Any = -1) -> Any:
        return metrics.logit_difference([RIGHT[row] for row in self.rows], WRONG, pos)

    def logits(self) -> torch.Tensor:
        return metrics.Logits.of(self.model(self.input[0], attention_mask=self.input[1]), self.input[1])

    def under(self, intervention: Any) -> torch.Tensor:
        with intervention.on(self.model):
            return self.metric()(self.logits())

    def cache(self, input: tuple, names: Any = None) -> Any:
        return self.model.run_with_cache(input[0], attention_mask=input[1], names_filter=names)[1]

    def by_row(self, *given: Any) -> torch.Tensor:
        """A tensor with one entry a row."""
        return torch.tensor([given[row] for row in self.rows])


def cases(model: Any, side: str) -> tuple[Case, list[Case]]:
    """(the batch, its rows alone)"""
    rows, others = ([example(model, 1, n, seed=n + by)[0] for n in LENGTHS] for by in (0, 20))
    alone = [
        Case(model, padded([a], side), padded([b], side), [i])
        for i, (a, b) in enumerate(zip(rows, others, strict=True))
    ]
    return Case(model, padded(rows, side), padded(others, side), list(range(len(rows)))), alone


def per_row(values: torch.Tensor) -> list[torch.Tensor]:
    return list(values)


# -- each: name -> what it finds, a list with an entry a row ----------------------------------------------------------

NAME = "blocks.1.hook_resid_pre"


def _metric(case, pos):
    return per_row(case.metric(pos(case))(case.logits()))


def _ablation(case, pos):
    return per_row(case.under(ablation.zero("blocks.0.hook_mixer_out", pos=pos(case))))


def _frozen(case, pos):
    return per_row(case.under(ablation.freeze("blocks.0.hook_mixer_out", case.cache(case.other), pos=pos(case))))


def _at_the_ends(case, pos):
    outside = ablation.scale(["hook_embed", "ln_final.hook_normalized"], 2.0, pos=pos(case))
    return per_row(case.under(outside))


def _knockout(case, pos):
    return per_row(case.under(knockout.cut(pos(case), -1)))


def _states(case, pos):
    names = [name for name in case.model.names if name.endswith("hook_state")]
    return per_row(case.under(states.patch(case.cache(case.other, names), pos(case))))


def _steering(case, pos):
    vector = torch.linspace(-1, 1, case.model.cfg.d_model, dtype=torch.float64)
    with steering.SteeringVector(NAME, vector).on(case.model, 2.0, pos(case)):
        return per_row(case.metric()(case.logits()))


def _path_patching(case, pos):
    mask = {"attention_mask": case.input[1]}
    return per_row(
        circuits.path_patch(
            case.model, case.input[0], case.other[0], case.metric(), "embed", ["1.mixer", "logits"], pos(case), **mask
        )
    )


def _path_patching_under_hooks(case, pos):
    """Each cell a run by itself, of the input as it is laid out."""
    with ablation.scale("blocks.0.hook_mixer_out", 0.5, pos=-1).on(case.model):
        return _path_patching(case, pos)


def _row_of_attention(case, pos):
    found = gl.implicit_attention(case.cache(case.input), layer=0)
    both = [found.row(pos(case)), found.column(pos(case))]
    return [torch.stack([one[i][:, real] for one in both]) for i, real in enumerate(case.input[1])]


def _row_of_contributions(case, pos):
    found = gl.implicit_attention(case.cache(case.input), layer=0).contributions()
    both = [found.row(pos(case)), found.column(pos(case))]
    return [torch.stack([one[i][real] for one in both]) for i, real in enumerate(case.input[1])]


def _logit_attribution(case, pos):
    found = lens.logit_attribution(case.model, case.input, [RIGHT[row] for row in case.rows], WRONG, pos(case))
    return per_row(found.values)


def _token_attribution(case, pos):
    found = lens.token_attribution(case.model, case.input, [RIGHT[row] for row in case.rows], WRONG, pos(case)).values
    return [torch.cat([found[i, :, :n], found[i, :, -1:]], dim=1) for i, n in enumerate(case.input[1].sum(1))]


AT_A_POSITION = {
    "metrics": _metric,
    "ablation": _ablation,
    "freeze": _frozen,
    "ablation outside the blocks": _at_the_ends,
    "knockout": _knockout,
    "states": _states,
    "steering": _steering,
    "path patching": _path_patching,
    "path patching under hooks": _path_patching_under_hooks,
    "attention": _row_of_attention,
    "contributions": _row_of_contributions,
    "logit attribution": _logit_attribution,
    "token attribution": _token_attribution,
}
POSITIONS = {
    "first": lambda case: 0,
    "third": lambda case: 2,
    "last": lambda case: -1,
    "by row": lambda case: case.by_row(3, 5, -2),
}
SEVERAL = {
    "list": lambda case: [1, -1],
    "range": lambda case: range(1, 3),
    "slice": lambda case: slice(-3, None),
    "glob": lambda case: "[02]",
    "several by row": lambda case: torch.tensor([[[0, 2], [1, -1], [3, 4]][row] for row in case.rows]),
    "all": lambda case: "*",
}
TAKES_SEVERAL = (
    "ablation",
    "freeze",
    "ablation outside the blocks",
    "knockout",
    "steering",
    "path patching",
)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tool", AT_A_POSITION)
def test_at_a_position(lm, tool, side):
    batch, alone = cases(lm, side)
    for said, pos in {**POSITIONS, **(SEVERAL if tool in TAKES_SEVERAL else {})}.items():
        found = AT_A_POSITION[tool](batch, pos)
        for row, case in enumerate(alone):
            want = AT_A_POSITION[tool](case, pos)[0]
            assert found[row].shape == want.shape and torch.allclose(found[row], want, rtol=1e-8, atol=1e-9), (
                said,
                row,
            )


# -- results over positions: [..., pos] a row ---------------------------------------------------------------------------


def _sweep(points, **options):
    def tool(case):
        cache = case.cache(case.other, lambda name: True)
        found = patching.sweep(
            case.model, case.input, cache, case.metric(), points, ("layer", "pos"), reduce="none", **options, **QUIET
        )
        return found.values.unbind(-1)

    return tool


def _under_hooks(case):
    """A sweep under a hook of the user's own: each cell a run by itself, of the input as it is laid out."""
    with ablation.scale("blocks.0.hook_mixer_out", 0.5, pos=-1).on(case.model):
        return _sweep("blocks.*.hook_resid_pre")(case)


def _generic(case):
    def setter(x, index, clean):
        x[:, index[1]] = clean[:, index[1]]
        return x

    cache = case.cache(case.other)
    axes = ("layer", "pos")
    found = patching.generic_activation_patch(
        case.model, case.input, cache, case.metric(), setter, "resid_pre", axes, reduce="none", **QUIET
    )
    return found.values.unbind(-1)


def _attribution_patching(case):
    mask = {"attention_mask": case.input[1]}
    found = circuits.attribution_patch(
        case.model, case.other[0], case.input[0], case.metric(), "blocks.*.hook_resid_pre", ("batch", "pos"), **mask
    )
    return found.values.movedim(1, 0)


def _lens(case):
    found = lens.logit_lens(case.model, case.input)
    return [found.top(row).values for row in range(len(case.rows))]


OVER_POSITIONS = {
    "resid_pre": _sweep("blocks.*.hook_resid_pre"),
    "gate": _sweep("blocks.*.mixer.hook_gate"),
    "state": _sweep("blocks.*.mixer.hook_state", edits=patching.carried),
    "under hooks": _under_hooks,
    "generic": _generic,
    "attribution patching": _attribution_patching,
    "lens": _lens,
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tool", OVER_POSITIONS)
def test_over_positions(lm, tool, side):
    batch, alone = cases(lm, side)
    found = OVER_POSITIONS[tool](batch)
    for row, case in enumerate(alone):
        want = OVER_POSITIONS[tool](case)[0]
        assert torch.allclose(found[row][..., : LENGTHS[row]], want, rtol=1e-8, atol=1e-9), row


# -- means over the rows --------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_means_over_rows(lm, side):
    """Knockout sweeps, traces, edges, paths and sweeps of named positions give means over rows."""
    batch, alone = cases(lm, side)

    def knocked(case):
        found = knockout.sweep(lm, case.input, case.metric(), -1, {"ends": [0, -1], "second": 1}, **QUIET)
        return found.values * abs(found.facts["clean"]) + found.facts["clean"]

    def traced(case):
        where = {"last": -1, "own": case.by_row(3, 1, 2)}
        return tracing.causal_trace(lm, case.input, case.metric(), corrupt=case.other, positions=where, **QUIET).values

    def edges(case):
        mask = {"attention_mask": case.input[1]}
        found = circuits.eap(lm, case.other[0], case.input[0], case.metric(), positions=True, **mask).scores.values
        return found[..., :4].nan_to_num()  # the positions that every row has

    def grouped(case):
        cache, groups = (
            case.cache(case.other),
            {"pos": {"last": -1, "own": case.by_row(3, 1, 2), "late": slice(-2, None)}},
        )
        return patching.sweep(
            lm, case.input, cache, case.metric(), "blocks.*.hook_resid_pre", groups=groups, **QUIET
        ).values

    def patched(case):
        mask = {"attention_mask": case.input[1], **QUIET}
        exact = circuits.edge_patch(lm, case.other[0], case.input[0], case.metric(), **mask).scores.values
        into = circuits.path_patch_senders(
            lm, case.other[0], case.input[0], case.metric(), "logits", case.by_row(3, 1, 2), **mask
        )
        return torch.cat([exact.flatten().nan_to_num(), into.values])

    def under_hooks(case):
        with ablation.scale("blocks.0.hook_mixer_out", 0.5, pos=-1).on(lm):
            return torch.cat([tool(case).flatten() for tool in (knocked, traced, patched)])

    for tool in (knocked, traced, edges, grouped, patched, under_hooks):
        want = torch.stack([tool(case) for case in alone]).mean(0)
        assert torch.allclose(tool(batch), want, rtol=1e-8, atol=1e-9), tool.__name__


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_circuit_by_positions(lm, side):
    batch, alone = cases(lm, side)
    options = {"attention_mask": batch.input[1]}
    found = circuits.eap(lm, batch.other[0], batch.input[0], batch.metric(), positions=True, **options)
    early = found.keep([("embed", "0.mixer", 1), ("0.mixer", "logits", 3), ("embed", "logits", 2)])
    got = batch.metric()(early.run(lm, batch.other[0], batch.input[0], **options))
    for row, case in enumerate(alone):
        own = circuits.eap(lm, case.other[0], case.input[0], case.metric(), positions=True)
        kept = own.keep(list(early.edges))
        assert torch.allclose(got[row], case.metric()(kept.run(lm, case.other[0], case.input[0])), atol=1e-9)


@torch.no_grad()
def test_what_another_run_gives_goes_by_position_whatever_sides_the_two_were_padded_on(lm):
    (left, _), (right, _) = cases(lm, "left"), cases(lm, "right")
    name = "blocks.0.hook_mixer_out"
    for make in (ablation.freeze, ablation.mean):
        found = [a.under(make(name, b.cache(b.other), pos=[0, 2])) for a in (left, right) for b in (left, right)]
        assert all(torch.allclose(one, found[0], rtol=1e-9, atol=1e-10) for one in found), make.__name__


# -- metrics --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_metric_of_the_users_own_is_told_of_padding_on_the_right(lm):
    (right, _), (left, _) = cases(lm, "right"), cases(lm, "left")

    def sweep(case, metric):
        return patching.sweep(lm, case.input, case.cache(case.other), metric, NAME, "pos", **QUIET).values

    with pytest.warns(UserWarning, match="padded on the right, and this metric did not ask where they end"):
        sweep(right, lambda logits: logits[:, -1, 3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = sweep(left, lambda logits: logits[:, -1, 3])
        handed_on = sweep(right, lambda logits: metrics.logit(3)(logits.float().double() * 1.0).clone())
        read = sweep(right, lambda logits: metrics.at_position(logits, -1)[:, 3])
    assert torch.allclose(plain, read, atol=1e-9) and torch.allclose(plain, handed_on, atol=1e-5)


def test_logits_know_their_rows():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    mask = torch.tensor([[False, True, True], [True, True, True]])
    known = metrics.Logits.of(logits, mask)
    assert torch.equal(metrics.logit(1, pos=0)(known), torch.stack([logits[0, 1, 1], logits[1, 0, 1]]))
    assert torch.equal(
        metrics.logit(1, pos=0)(known.log_softmax(-1) * 2), metrics.logit(1, pos=0)(known.log_softmax(-1)) * 2
    )
    assert type(known[:, -1]) is torch.Tensor and metrics.Logits.of(logits, None) is logits
    assert metrics.Logits.of(logits, torch.ones(2, 3)) is logits
    metrics.logit(1)(known).sum().backward()
    assert logits.grad[:, -1, 1].tolist() == [1, 1]
    with pytest.raises(gl.InputError, match=r"The mask is \[2, 2\] and the logits \[2, 3, 5\]"):
        metrics.Logits.of(logits, mask[:, :2])

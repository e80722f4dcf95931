"""DAS: the same subspace as TransformerLens's fit_das, the same numbers twice and after a stop, at states too; fixed
directions.
"""

from __future__ import annotations

import numpy
import pytest
import torch
import torch.nn.functional as F
from transformer_lens.tools.analysis import fit_das

import gatedlens as gl
from gatedlens import subspaces
from tests.helpers import example, padded

RESID = "blocks.0.hook_resid_post"


def pairs(model, n=6, pos=5):
    answers = torch.arange(n) % 4
    return example(model, n, pos, seed=1), example(model, n, pos, seed=2), answers


def test_the_subspace_is_that_of_transformer_lens(recall_model):
    """The same initial rotation and the same steps, so the same subspace; at one position of each row; in a later block, which
    our runs begin at."""
    batch = gl.tasks.recall(24, seed=3)
    source = batch.with_answer(batch.answers.roll(1))
    options = {"rank": 2, "epochs": 4, "batch_size": 10, "lr": 3e-2, "seed": 5}
    last = torch.full((24,), batch.tokens.shape[1] - 1)
    for name, at in (("blocks.0.hook_resid_post", batch.answer_pos), ("blocks.1.hook_mixer_in", last)):
        theirs = fit_das(
            recall_model, name, batch.tokens, source.tokens, source.answers, lambda t: recall_model(t)[:, -1],
            base_positions=at, source_positions=at, **options,
        )  # fmt: skip
        ours = subspaces.das(
            recall_model, batch.tokens, source.tokens, source.answers, name, at, progress=False, **options
        )
        start = subspaces.das(recall_model, batch.tokens, source.tokens, source.answers, name, rank=2, seed=5, epochs=0)
        P, Q = ours.basis.mT @ ours.basis, theirs.basis @ theirs.basis.mT
        assert (P - Q).abs().max() < 1e-5 < (P - start.basis.mT @ start.basis).abs().max()
        assert numpy.allclose(ours.facts["losses"], theirs.losses, rtol=1e-5)


def literal(model, name, base, source, answers, pos, place, rank, epochs, lr, seed):
    """DAS by its equation: the state of each base, moved by P (source - base), set by gl.states.patch; place: of the state."""
    torch.manual_seed(seed)
    x, y = (model.run_with_cache(one, names_filter=name)[1][name][:, pos].detach() for one in (base, source))
    turn = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(rank, x[place].shape[-2], bias=False)).double()
    adam, order = torch.optim.Adam(turn.parameters(), lr=lr), numpy.random.default_rng(seed)
    losses = []
    for _ in range(epochs):
        order.permutation(len(base))
        new = x.clone()
        P = turn.weight @ turn.weight.mT
        new[place] = x[place] + torch.einsum("vw,bwk->bvk", P, y[place] - x[place])
        with gl.states.patch(new, pos, 0).on(model):
            loss = F.cross_entropy(model(base)[:, -1], answers)
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    return turn.weight.detach(), losses


@pytest.mark.parametrize("name", ["mamba2", "qwen3_next"])
def test_at_a_state_it_is_the_equation(name):
    model = gl.hooks.architectures()[name].tiny(seed=0, dtype=torch.float64)
    base, source, answers = pairs(model)
    state = next(one for one in model.names if one.endswith("blocks.0.mixer.hook_state"))
    grads = [p.requires_grad for p in model.parameters()]
    made = subspaces.das(
        model, base, source, answers, state, 2, rank=2, axes="value", head=1, epochs=3, lr=0.1, seed=4, progress=False
    )
    assert [p.requires_grad for p in model.parameters()] == grads and all(p.grad is None for p in model.parameters())
    model.requires_grad_(False)
    want, losses = literal(model, state, base, source, answers, 2, (slice(None), 1), 2, 3, 0.1, 4)
    model.requires_grad_(True)
    assert numpy.allclose(made.facts["losses"], losses, rtol=1e-7)
    assert torch.allclose(made.basis.mT @ made.basis, want @ want.mT, atol=1e-6)


def test_twice_the_same_and_again_after_a_stop(tmp_path):
    lm = gl.HookedMamba2.tiny(seed=0, dtype=torch.float64)
    base, source, answers = pairs(lm)
    options = {"rank": 2, "seed": 1, "batch_size": 4, "progress": False, "pos": 2}
    whole = subspaces.das(lm, base, source, answers, RESID, epochs=4, **options)
    path = tmp_path / "fit.safetensors"
    subspaces.das(lm, base, source, answers, RESID, epochs=2, checkpoint=path, **options)
    again = subspaces.das(lm, base, source, answers, RESID, epochs=4, checkpoint=path, **options)
    assert torch.equal(again.basis, whole.basis) and again.facts == whole.facts
    assert torch.allclose(again.basis @ again.basis.mT, torch.eye(2, dtype=torch.float64), atol=1e-14)
    with pytest.raises(gl.InputError, match="of another fit"):
        subspaces.das(lm, base, source, answers.flip(0), RESID, epochs=4, checkpoint=path, **options)


def test_padded_pairs_are_fitted_as_they_are_alone():
    lm = gl.HookedMamba2.tiny(seed=0, dtype=torch.float64)
    rows, others = ([example(lm, 1, n, seed=n + s)[0] for n in (6, 4, 5)] for s in (0, 20))
    answers, found = torch.tensor([1, 2, 3]), []
    for side in ("left", "right"):
        given = padded(rows, side), padded(others, side)
        found.append(subspaces.das(lm, *given, answers, RESID, pos=-2, epochs=3, batch_size=2, progress=False))
    assert torch.allclose(found[0].basis, found[1].basis, atol=1e-8)
    alone = [
        F.cross_entropy(lm.run_with_hooks(row[None], fwd_hooks=change.hooks(lm))[:, -1], answer[None]).item()
        for row, other, answer in zip(rows, others, answers, strict=True)
        for change in [
            subspaces.das(lm, row[None], other[None], answer, RESID, -2, epochs=0).interchange(lm, other[None], -2)
        ]
    ]
    one = subspaces.das(lm, padded(rows, "left"), padded(others, "left"), answers, RESID, -2, epochs=1, progress=False)
    assert one.facts["losses"][0] == pytest.approx(sum(alone) / 3, rel=1e-6)


def test_fixed_directions_are_their_formulas(recall_model):
    tokens = gl.tasks.recall(40, seed=1).tokens
    labels = list("aabcaabbcc" * 4)
    x = recall_model.run_with_cache(tokens, names_filter=RESID)[1][RESID][:, 3].double()
    first = subspaces.pca(recall_model, tokens, RESID, 3, pos=3)
    values, vectors = torch.linalg.eigh(torch.cov(x.mT))
    want = vectors[:, -3:]
    assert torch.allclose(first.basis.double().mT @ first.basis.double(), want @ want.mT, atol=1e-5)
    assert first.facts["share"] == pytest.approx((values.flip(0)[:3] / values.sum()).tolist(), rel=1e-5)
    means = torch.stack([x[[one == word for one in labels]].mean(0) for word in "abc"])
    between = subspaces.mean_difference(recall_model, tokens, labels, RESID, 3)
    assert between.rank == 2 and (between.complement().coordinates(means - means.mean(0)).abs().max() < 1e-4)
    fisher = subspaces.lda(recall_model, tokens, labels, RESID, 3, shrinkage=0.5)
    rest = x - means[["abc".index(one) for one in labels]]
    W = rest.mT @ rest / (len(x) - 3)
    W = 0.5 * W + 0.5 * W.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    want = torch.linalg.solve(W, (means - means.mean(0)).mT).mT
    assert fisher.rank == 2 and fisher.complement().coordinates(want).norm() < 1e-4 * want.norm()
    again = subspaces.spanned(recall_model, RESID, want.float())
    assert again.overlap(fisher) == pytest.approx(1, abs=1e-6)
    for wrong, why in ((labels[:-1], "39 labels and 40 rows"), (["a"] * 40, "All labels are 'a'")):
        with pytest.raises(gl.InputError, match=why):
            subspaces.lda(recall_model, tokens, wrong, RESID)


def test_the_sweep_scores_what_the_interventions_do(recall_model, tmp_path):
    """The engine's cells against each interchange by itself, and the controls beside."""
    batch = gl.tasks.recall(16, seed=0)
    other = batch.with_answer(batch.answers.roll(3))
    names, columns = "blocks.*.hook_resid_post", {"value": batch.answer_pos, "last": -1}
    options = {"rank": 3, "epochs": 1, "folder": tmp_path, "progress": False}
    found = subspaces.sweep(recall_model, batch.tokens, other.tokens, other.answers, names, columns, **options)
    assert found.axes == ("measure", "subspace", "layer", "pos")
    assert found["subspace"] == ["das", "random", "start", "shuffled"] and found["pos"] == ["value", "last"]
    assert len(list(tmp_path.iterdir())) == 8  # of das and of shuffled answers, by layer and position
    whole = subspaces.sweep(
        recall_model, batch.tokens, other.tokens, other.answers, names, [-1], fit="whole", progress=False
    )
    assert whole.at(measure="interchange accuracy", layer=1).values.tolist() == [[1.0]]
    for name in ("blocks.0.hook_resid_post", "blocks.0.mixer.hook_state"):
        for where in (-2, batch.answer_pos, slice(-3, None) if "resid" in name else 4):
            some = subspaces.random(recall_model, name, 20)
            cells = subspaces.score(
                recall_model, {"it": some}, batch.tokens, other.tokens, other.answers, where, progress=False
            )
            with some.interchange(recall_model, other.tokens, where).on(recall_model), torch.no_grad():
                logits = recall_model(batch.tokens)[:, -1].log_softmax(-1)
            want = (logits.argmax(-1) == other.answers).float().mean(), logits.gather(1, other.answers[:, None]).mean()
            assert torch.allclose(cells.values[[0, 3], 0], torch.stack(want), atol=1e-5)


def test_errors_name_what_is_wrong(recall_model, tmp_path):
    batch = gl.tasks.recall(4)
    given = batch.tokens, batch.tokens, batch.answers

    def das(*args, **options):
        return subspaces.das(recall_model, *args, RESID, progress=False, **options)

    for call, why in (
        (lambda: das(batch.tokens, batch.tokens[:3], batch.answers), "4 bases and 3 sources"),
        (lambda: das(*given[:2], batch.answers[:3]), "3 answers and 4 pairs"),
        (lambda: das(*given[:2], [40] * 4), "answers are token ids, 0 to 29"),
        (lambda: das(*given, rank=65), "rank=65: a vector has 64 numbers"),
        (lambda: das(*given, epochs=-1), "epochs=-1: give 0 or more"),
        (lambda: das(*given, checkpoint=tmp_path), "name a file"),
        (lambda: subspaces.sweep(recall_model, *given, RESID, fit="dsa"), "it is 'das', 'pca'"),
        (lambda: subspaces.sweep(recall_model, *given, ["blocks.0.hook_resid_*"]), "name one point a layer"),
        (
            lambda: subspaces.sweep(recall_model, *given, RESID, fit="pca", controls=["start"]),
            "'start' is none of 'pca'",
        ),
        (lambda: subspaces.sweep(recall_model, *given, RESID, fit="pca", folder=tmp_path), "fits of 'das' are kept"),
        (lambda: subspaces.score(recall_model, {}, *given), "no subspace to score"),
    ):
        with pytest.raises(gl.InputError, match=why):
            call()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_pairs_are_scored_as_they_are_alone(side):
    lm = gl.HookedMamba2.tiny(seed=0, dtype=torch.float64)
    rows, others = ([example(lm, 1, n, seed=n + s)[0] for n in (6, 4, 5)] for s in (0, 20))
    answers, given = torch.tensor([1, 2, 3]), (padded(rows, side), padded(others, side))
    for name in (RESID, "blocks.1.mixer.hook_state"):
        some = subspaces.random(lm, name, 4)
        for hooks in (
            [],
            [("blocks.0.hook_mixer_out", lambda x, hook: x * 0.5)],
        ):  # under a user's hook each is a whole run
            with lm.hooks(hooks), torch.no_grad():
                found = subspaces.score(lm, some, *given, answers, -2, progress=False).values[:, 0]
                logits = [
                    lm.run_with_hooks(row[None], fwd_hooks=some.interchange(lm, other[None], -2).hooks(lm))[0, -1]
                    for row, other in zip(rows, others, strict=True)
                ]
            log = torch.stack(logits).log_softmax(-1)
            assert found[0] == (log.argmax(-1) == answers).double().mean()
            assert torch.allclose(found[3], log[torch.arange(3), answers].mean(), rtol=1e-9)


def test_classes_of_images(tmp_path):
    model = gl.HookedViM.tiny(seed=0, dtype=torch.float64)
    base, source = example(model, 4, seed=1), example(model, 4, seed=2)
    name = "blocks.0.mixer.bwd.hook_state"
    made = subspaces.das(model, base, source, [0, 1, 2, 3], name, 3, rank=2, epochs=2, lr=0.1, progress=False)
    assert made.facts["losses"][1] < made.facts["losses"][0]
    found = subspaces.score(model, made, base, source, [0, 1, 2, 3], progress=False).values[:, 0]
    with made.interchange(model, source, 3).on(model), torch.no_grad():
        log = model(base).log_softmax(-1)
    assert torch.allclose(found[3], log[torch.arange(4), torch.arange(4)].mean(), rtol=1e-9)

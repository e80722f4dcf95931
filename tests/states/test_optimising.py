"""Trained initial states: the loss falls and is the run's own, nothing of the model changes, files, resuming, mistakes."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens import states
from tests.helpers import example, padded

METRIC = gl.metrics.log_probability(3)
QUIET = {"progress": False}


def test_a_trained_state_does_the_task(lm):
    x = example(lm)
    before = {name: one.clone() for name, one in lm.wrapped.named_parameters()}
    trained = states.optimise(lm, x, METRIC, steps=6, lr=0.05, **QUIET)
    first, last = trained.facts["losses"][0][0], trained.facts["losses"][-1][0]
    assert last < first - 1e-4
    with torch.no_grad():
        with trained.on(lm):
            got, later = METRIC(lm(x)).mean().item(), lm.generate(x[:1], max_new_tokens=2, verbose=False, temperature=0)
        assert got == METRIC(lm(x, state=trained.rows(lm, 2))).mean().item() and got > -first
        assert later.shape[1] == x.shape[1] + 2
    assert all(torch.equal(one, before[name]) and one.grad is None for name, one in lm.wrapped.named_parameters())
    assert not lm._forward_pre_hooks


def test_the_first_step_is_adam_s_on_the_run_s_own_gradient():
    """Literally: S - lr sign(gradient), for Adam's first step divides a gradient by its own size."""
    model = gl.HookedMamba2.tiny(dtype=torch.float64)
    x = example(model)
    _, start = model(example(model, 1, 4, seed=5), return_state=True)
    start = start.detach()
    trained = states.optimise(model, x, METRIC, start, layers=0, steps=1, lr=0.1, **QUIET)
    leaf = start["scan", 0].clone().requires_grad_()
    state = gl.RecurrentState({**start.tensors, "blocks.0.scan": leaf}, start.seen)
    (-METRIC(model(x, state=state.rows([0, 0]))).mean()).backward()
    step = 0.1 * leaf.grad / (leaf.grad.abs() + 1e-8)
    assert torch.allclose(trained.state["scan", 0], start["scan", 0] - step, rtol=1e-10, atol=1e-12)
    for key in start:
        assert key == "blocks.0.scan" or torch.equal(trained.state[key], start[key])


def test_padded_rows_texts_and_losses(moby_model, lm):
    rows = [example(lm, 1, n, seed=n)[0] for n in (6, 4)]
    alone = states.optimise(lm, [row.unsqueeze(0) for row in rows], steps=1, lr=0.01, **QUIET).facts["losses"][0][0]
    side = states.optimise(lm, [padded(rows, "left")], steps=1, lr=0.01, **QUIET).facts["losses"][0][0]
    assert alone > 0 and side > 0
    if lm.cfg.architecture != "mamba":
        return
    found = states.optimise(moby_model, "Call me Ishmael.", steps=3, lr=0.05, **QUIET)
    assert found.losses.axes == ("step", "loss") and found.losses.values[-1] < found.losses.values[0]
    tokens = moby_model.to_tokens("Call me Ishmael.", prepend_bos=False)
    with torch.no_grad(), found.on(moby_model):
        assert torch.equal(moby_model("Call me Ishmael."), moby_model(tokens))


def test_it_goes_on_where_it_stopped_and_is_saved(tmp_path):
    model, other = gl.HookedMamba.tiny(), gl.HookedMamba.tiny(seed=1)
    batches = [example(model, seed=seed) for seed in range(3)]
    options = {"lr": 0.05, "checkpoint": str(tmp_path / "under-way"), **QUIET}
    whole = states.optimise(model, batches, METRIC, steps=8, lr=0.05, **QUIET)
    states.optimise(model, batches, METRIC, steps=3, **options)
    again = states.optimise(model, batches, METRIC, steps=8, **options)
    assert again.facts == whole.facts
    assert all(torch.equal(again.state[key], whole.state[key]) for key in whole.state)
    with pytest.raises(gl.InputError, match="is of another fit: its seed is 0 and here it is 1"):
        states.optimise(model, batches, METRIC, steps=8, seed=1, **options)
    loaded = states.TrainedState.load(whole.save(tmp_path / "trained.safetensors"))
    assert repr(loaded) == repr(whole) and loaded.facts == whole.facts and list(loaded.state) == list(whole.state)
    assert all(torch.equal(loaded.state[key], whole.state[key]) for key in whole.state)
    assert "tiny-mamba" in loaded._repr_html_()
    with pytest.raises(
        gl.InputError, match="This trained state was fitted to tiny-mamba, and this is tiny-mamba: its param"
    ):
        loaded.rows(other)
    with pytest.raises(gl.InputError, match="fitted to"), loaded.on(other):
        pass
    with pytest.raises(gl.CheckpointError, match="no saved trained state"):
        states.TrainedState.load(tmp_path / "under-way")


def test_mistakes_are_explained():
    model = gl.HookedMamba.tiny()
    x = example(model)
    _, two = model(x, return_state=True)
    for ask, message in (
        (lambda: states.optimise(model, [], METRIC, **QUIET), "given no batch"),
        (lambda: states.optimise(model, [x, x], [METRIC], **QUIET), "There are 1 metrics for 2 batches"),
        (lambda: states.optimise(model, x, METRIC, two, **QUIET), "start holds 2 rows"),
        (lambda: states.optimise(model, x, METRIC, parts="scn", **QUIET), "Did you mean 'scan'"),
        (lambda: states.optimise(model, x, METRIC, layers=7, **QUIET), "layers=7 does not exist"),
        (lambda: states.optimise(model, x, lambda logits: logits[:, -1].argmax(-1), **QUIET), "has no gradient"),
        (lambda: states.optimise(model, x, METRIC, steps=0, **QUIET), "steps=0"),
        (lambda: states.optimise(model, x, METRIC, lr=-1, **QUIET), "lr=-1"),
        (lambda: states.optimise(model, x, METRIC, steps=1, **QUIET).rows(model, 0), "rows=0"),
    ):
        with pytest.raises(gl.InputError, match=message):
            ask()

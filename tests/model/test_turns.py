"""Threads that share a model: plain calls side by side, hooked calls alone, nobody waits for good."""

from __future__ import annotations

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import gatedlens as gl
from gatedlens.model import turns
from tests.helpers import example

POINT = "blocks.0.hook_resid_post"


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(turns, "IDLE", 0.3)
    monkeypatch.setattr(turns, "BUSY", 0.3)


def in_threads(*works):
    """What each function returns, all run at once; what one raises is raised."""
    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result(timeout=60) for future in [pool.submit(work) for work in works]]


def test_caches_and_edits_of_two_threads_stay_apart(model):
    inputs = [example(model, seed=seed) for seed in (1, 2)]
    with torch.no_grad():
        plain = [model(x) for x in inputs]
        caches = [model.run_with_cache(x, names_filter=POINT)[1][POINT] for x in inputs]
        edited = model.run_with_hooks(inputs[0], fwd_hooks=[(POINT, lambda x, hook: x * 0)])

    def cached(i):
        with torch.no_grad():
            for _ in range(8):
                assert torch.equal(model.run_with_cache(inputs[i], names_filter=POINT)[1][POINT], caches[i])

    def edits():
        with torch.no_grad():
            for _ in range(8):
                assert torch.equal(model.run_with_hooks(inputs[0], fwd_hooks=[(POINT, lambda x, hook: x * 0)]), edited)

    def calls():
        with torch.no_grad():
            for _ in range(8):
                assert torch.equal(model(inputs[1]), plain[1])

    in_threads(lambda: cached(0), lambda: cached(1), edits, calls)
    assert not model.list_hooks() and model.running is None


def test_plain_calls_run_side_by_side(model):
    meet, inputs = threading.Barrier(2, timeout=30), example(model)

    def hook(x, hook):
        meet.wait()  # passes only if both are inside at once

    model.add_hook(POINT, hook)
    try:
        in_threads(lambda: model(inputs), lambda: model(inputs))
    finally:
        model.reset_hooks()


def test_a_thread_calls_the_model_inside_its_own_hooks(model):
    inputs, inner = example(model), []

    def nested(x, hook):
        inner.append(model.run_with_cache(inputs, names_filter="blocks.1.hook_resid_pre")[1]["resid_pre", 1])

    first = []

    def once(x, hook):
        if not first:
            first.append(True)
            nested(x, hook)

    with torch.no_grad():
        model.run_with_hooks(inputs, fwd_hooks=[(POINT, once)])
    assert len(inner) == 1 and model.running is None


def test_a_pool_inside_hooks_is_told_what_to_do(model, impatient):
    inputs = example(model)
    with model.hooks([(POINT, lambda x, hook: None)]), pytest.raises(gl.HookError, match="add_hook"):
        in_threads(lambda: model(inputs))
    in_threads(lambda: model(inputs))


def test_a_hook_that_waits_for_another_threads_call_is_told(model, impatient):
    inputs = example(model)

    def hook(x, hook):
        in_threads(lambda: model(inputs))

    with pytest.raises(gl.HookError, match="has it for itself"):
        model.run_with_hooks(inputs, fwd_hooks=[(POINT, hook)])
    assert not model.list_hooks()


def test_two_calls_that_both_want_hooks_inside_are_told(model):
    inputs, meet = example(model), threading.Barrier(2, timeout=30)
    busy = threading.local()

    def inside(x, hook):
        if not getattr(busy, "yes", False):
            busy.yes = True
            meet.wait()
            model.run_with_cache(inputs, names_filter=POINT)

    def call():
        try:
            model(inputs)
        except gl.HookError as error:
            return str(error)

    model.add_hook("blocks.1.hook_mixer_out", inside)
    try:
        told = in_threads(call, call)
    finally:
        model.reset_hooks()
    assert sum(error is None for error in told) == 1 and any("each would wait" in str(error) for error in told)


def test_a_generator_left_open_holds_the_model_until_it_is_closed(model, impatient):
    def leave_open():
        with model.hooks([(POINT, lambda x, hook: x * 0)]):
            yield

    inputs = example(model)
    plain, held = model(inputs), leave_open()
    next(held)
    model(inputs)  # the same thread goes on
    with pytest.raises(gl.HookError, match="generator"):
        in_threads(lambda: model(inputs))
    in_threads(held.close)  # another thread may close it, as the garbage collector does
    assert torch.equal(in_threads(lambda: model(inputs))[0], plain)


def test_a_thread_that_ended_with_its_hooks_on_is_named(model):
    opened = []

    def leave_open():
        held = model.hooks([(POINT, lambda x, hook: x * 0)])
        held.__enter__()
        opened.append(held)

    thread = threading.Thread(target=leave_open, name="careless")
    thread.start()
    thread.join()
    inputs = example(model)
    with pytest.raises(gl.HookError, match="careless .*reset_hooks"):
        model(inputs)
    model.reset_hooks()
    model(inputs)
    opened[0].__exit__(None, None, None)
    assert not model.list_hooks()


def test_the_model_is_free_again_after_an_exception(model):
    inputs = example(model)

    def fails(x, hook):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.run_with_hooks(inputs, fwd_hooks=[(POINT, fails)])
    start = time.monotonic()
    in_threads(lambda: model(inputs), lambda: model.run_with_cache(inputs, names_filter=POINT))
    assert time.monotonic() - start < 60 and not model.list_hooks()


def test_copies_made_inside_hooks_are_free(model):
    inputs = example(model)
    with model.hooks([(POINT, lambda x, hook: None)]):
        twin = copy.deepcopy(model)
        in_threads(lambda: twin(inputs))


def test_backward_runs_in_hooks(model):
    inputs, grads = example(model), []
    with model.hooks(bwd_hooks=[(POINT, lambda grad, hook: grads.append(grad))]):
        out = model(inputs)
        torch.autograd.backward(out.sum(), inputs=[out])
        torch.autograd.grad(model(inputs).sum(), list(model.wrapped.parameters()), allow_unused=True)
    assert len(grads) == 1

"""What test_compile.py runs in a process of its own, where no type checker is wrapped around the functions to compile.

    python -m tests.model.compiled          # then a question a line: block mamba, model mamba, default mamba

answers each with a line: "fine", or what was raised as one JSON string."""

from __future__ import annotations

import json
import sys
import traceback

import torch
from torch._dynamo.backends.registry import lookup_backend

from gatedlens.hooks import architectures
from gatedlens.model.batch import Batch
from tests.helpers import example, relative


def block(model):
    """Each block is one graph, of one size whatever the length, with the same numbers and gradients."""
    for one in {type(one.mixer): one for one in model.blocks if one.mixing}.values():
        sizes = {_graph(model, one, True, 7, "aot_eager"), _graph(model, one, True, 40, "eager")}
        assert len(sizes) == 1, "the graph grows with the positions"
        _graph(model, one, False, 7, "eager")


def _graph(model, one, grad, pos, compiler):
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    resid = torch.randn(2, pos, model.cfg.d_model, dtype=torch.float64, generator=generator).requires_grad_(grad)
    run = model.begin(Batch(resid, is_resid=True), None, False)
    for name in model.hands_on:
        width = model.names.points[name].elements(model.cfg.sizes, batch=1, pos=1)
        run.hand_on(name, torch.randn(2, pos, width, dtype=torch.float64, generator=generator))
    with torch.set_grad_enabled(grad):
        sizes = []

        def backend(graph, inputs):
            sizes.append(len(graph.graph.nodes))
            return lookup_backend(compiler)(graph, inputs)

        out, own = torch.compile(one, fullgraph=True, backend=backend)(resid, run), one(resid, run)
    assert relative(out, own) < 1e-12
    if grad:
        weights = torch.randn(out.shape, dtype=out.dtype, generator=generator)
        found, want = (torch.autograd.grad((o * weights).sum(), resid)[0] for o in (out, own))
        assert relative(found, want) < 1e-10
    (size,) = sizes  # one graph
    return size


def model(model):
    """The whole model compiles; its parameters get the same gradients; hooks put on later are seen."""
    compiled = torch.compile(model, backend="aot_eager")
    inputs, grads = example(model), []
    for run in (model, compiled):
        model.wrapped.zero_grad()
        run(inputs).square().mean().backward()
        grads.append({name: p.grad.clone() for name, p in model.wrapped.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(relative(grads[1][name], grads[0][name]) < 1e-9 for name in grads[0])
    with torch.no_grad():
        plain = model(inputs)
        assert relative(compiled(inputs), plain) < 1e-12
        with model.hooks([("blocks.0.hook_mixer_out", lambda x, hook: x * 0)]):
            edited = model(inputs)
            assert relative(edited, plain) > 1e-3
            assert relative(compiled(inputs), edited) < 1e-12, "a hook does not reach the compiled model"
        assert relative(compiled(inputs), plain) < 1e-12


def default(model):
    """The default backend (inductor)."""
    with torch.no_grad():
        assert relative(torch.compile(model)(example(model)), model(example(model))) < 1e-12


def answer(what, name):
    torch._dynamo.reset()
    check = {"block": block, "model": model, "default": default}[what]
    try:
        check(architectures()[name].tiny(seed=0, dtype=torch.float64))
    except Exception:
        return json.dumps(traceback.format_exc())
    return "fine"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(answer(*line.split()), flush=True)

"""Derivatives of every order and kind, vmap and checkpointing: each against the plain gradient, row by row, or differences."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.autograd.functional as AF
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import gatedlens as gl
from gatedlens.errors import HookError, InputError
from gatedlens.model.block import Block
from gatedlens.model.cache import ActivationCache
from gatedlens.recurrence.transforms import plain
from tests.helpers import example, relative

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # of torch's old vmap, which runs inputs in turn
]
OUTPUTS = 3


def embedded(model, batch=1, pos=5):
    """A residual stream as it enters block 0."""
    with torch.no_grad():
        _, cache = model.run_with_cache(example(model, batch, pos), names_filter="hook_embed")
    return cache["hook_embed"]


def few(model, resid, **options):
    """Some numbers that depend on all of the model."""
    return model(resid, start_at_layer=0, **options).flatten()[-OUTPUTS:]


def unchanged(value, hook):
    return value


def lazy_points(model):
    return [name for name, point in model.hook_dict.items() if point.point.lazy]


def heard(model, resid):
    """As `few`, with a listener at every lazy point."""
    with model.hooks([(name, unchanged) for name in lazy_points(model)]):
        return few(model, resid)


def rows(f, x):
    """The Jacobian, an output at a time."""
    x = x.clone().requires_grad_()
    out = f(x)
    return torch.stack([torch.autograd.grad(y, x, retain_graph=True, materialize_grads=True)[0] for y in out])


def same(a, b, tolerance=1e-10):
    assert relative(a.detach(), b.detach()) < tolerance


def same_gradients(got, want, tolerance=1e-10):
    size = max(b.abs().max() for b in want if b is not None)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        assert b is None or (a - b).abs().max() <= tolerance * size


def parameters(model):
    return list(model.wrapped.parameters())


def gradients(model, out, **options):
    return torch.autograd.grad(out.square().mean(), parameters(model), allow_unused=True, **options)


# -- a gradient that is differentiated -------------------------------------------------------------------------------


@pytest.mark.parametrize("listening", [False, True], ids=["", "inside the scan"])
def test_a_gradient_is_the_same_whether_it_is_differentiated_or_not(model, listening):
    hooks = [(name, unchanged) for name in lazy_points(model)] if listening else []
    with model.hooks(hooks):
        want = gradients(model, model(example(model)))
        got = gradients(model, model(example(model)), create_graph=True)
    same_gradients([None if g is None else g.detach() for g in got], want)


def differences(f, x, direction, step=3e-4):
    """The derivative of f along a direction, from four points around x: exact to step^4."""
    a, b, c, d = (f(x + k * step * direction) for k in (-2, -1, 1, 2))
    return (a - 8 * b + 8 * c - d) / (12 * step)


def test_hessian_products_are_differences_of_gradients(model):
    x = embedded(model)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)

    def total(x):
        return few(model, x).square().sum()

    def slope(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(total(x), x)[0]

    want = differences(slope, x, v)
    again = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(total(again), again, create_graph=True)
    for got in (
        torch.autograd.grad(first, again, v)[0],
        AF.hvp(total, x, v)[1],
        AF.vhp(total, x, v)[1],
        jvp(grad(total), (x,), (v,))[1],
        grad(lambda x: (grad(total)(x) * v).sum())(x),
        grad(lambda x: jvp(total, (x,), (v,))[1])(x),
    ):
        same(got, want, 1e-7)


def test_the_gradient_of_a_gradient_penalty_is_its_differences(model):
    """d/d parameters of |d output / d stream|^2, along a random direction in the space of all parameters."""
    x, generator = embedded(model), torch.Generator().manual_seed(2)
    start = {name: p.detach() for name, p in model.named_parameters()}
    way = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) * p.abs().mean() for n, p in start.items()}

    def penalty(along):
        moved = {name: p + along * way[name] for name, p in start.items()}
        stream = x.clone().requires_grad_()
        out = functional_call(model, moved, (stream,), {"start_at_layer": 0}).flatten()[-OUTPUTS:]
        return torch.autograd.grad(out.square().sum(), stream, create_graph=True)[0].square().sum()

    zero = torch.zeros((), dtype=x.dtype)
    along = zero.clone().requires_grad_()
    (got,) = torch.autograd.grad(penalty(along), along)
    want = differences(lambda a: penalty(a).detach(), zero, 1.0)
    same(got, want, 1e-7)


# -- Jacobians and Hessians, every way there is ----------------------------------------------------------------------


def batched_gradient(f, x, create_graph=False):
    x = x.clone().requires_grad_()
    out = f(x)
    return torch.autograd.grad(out, x, torch.eye(len(out)).to(x), is_grads_batched=True, create_graph=create_graph)[0]


def vmapped_gradient(f, x):
    x = x.clone().requires_grad_()
    out = f(x)
    return vmap(lambda v: torch.autograd.grad(out, x, v, retain_graph=True)[0])(torch.eye(len(out)).to(x))


JACOBIANS = {
    "jacrev": lambda f, x: jacrev(f)(x),
    "jacrev in chunks": lambda f, x: jacrev(f, chunk_size=2)(x),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "jacobian": lambda f, x: AF.jacobian(f, x, strict=True),
    "jacobian to be differentiated": lambda f, x: AF.jacobian(f, x, create_graph=True),
    "jacobian, vectorised": lambda f, x: AF.jacobian(f, x, vectorize=True),
    "jacobian, forward": lambda f, x: AF.jacobian(f, x, vectorize=True, strategy="forward-mode"),
    "is_grads_batched": batched_gradient,
    "is_grads_batched to be differentiated": partial(batched_gradient, create_graph=True),
    "vmap over a backward": vmapped_gradient,
    "vmap over a vjp": lambda f, x: vmap(vjp(f, x)[1])(torch.eye(OUTPUTS).to(x))[0],
}


@pytest.mark.parametrize("way", JACOBIANS)
def test_a_jacobian_is_its_rows(model, way):
    x = embedded(model)
    same(JACOBIANS[way](partial(few, model), x), rows(partial(few, model), x))
    same(JACOBIANS[way](partial(heard, model), x), rows(partial(few, model), x))


def test_a_product_with_the_jacobian(model):
    x, f = embedded(model), partial(few, model)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    want = torch.einsum("o b p d, b p d -> o", rows(f, x), v)
    with torch.autograd.forward_ad.dual_level():
        dual = few(model, torch.autograd.forward_ad.make_dual(x, v))
        same(torch.autograd.forward_ad.unpack_dual(dual).tangent, want)
    same(AF.jvp(f, x, v)[1], want)
    same(jvp(f, (x,), (v,))[1], want)
    same(AF.vjp(f, x, torch.ones(OUTPUTS).to(x))[1], rows(f, x).sum(0))


HESSIANS = {
    "hessian": lambda f, a: hessian(f)(a),
    "reverse over reverse": lambda f, a: jacrev(jacrev(f))(a),
    "reverse over forward": lambda f, a: jacrev(jacfwd(f))(a),
    "forward over forward": lambda f, a: jacfwd(jacfwd(f))(a),
    "autograd's": AF.hessian,
    "autograd's, vectorised": partial(AF.hessian, vectorize=True),
    "autograd's, forward": partial(AF.hessian, vectorize=True, outer_jacobian_strategy="forward-mode"),
}


@pytest.mark.parametrize("way", HESSIANS)
def test_a_hessian_is_the_differences_of_the_gradient(model, way):
    x = embedded(model)
    directions = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(4), dtype=x.dtype)

    def total(a):
        return few(model, x + torch.einsum("a, a b p d -> b p d", a, directions)).square().sum()

    def slope(a):
        a = a.clone().requires_grad_()
        return torch.autograd.grad(total(a), a)[0]

    origin = torch.zeros(2, dtype=x.dtype)
    want = torch.stack([differences(slope, origin, axis) for axis in torch.eye(2, dtype=x.dtype)])
    same(HESSIANS[way](total, origin), want, 1e-7)


def test_a_third_derivative_is_the_same_forward_and_backward(model):
    x, one = embedded(model), torch.ones((), dtype=torch.float64)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype)

    def f(a):
        return few(model, x + a * v).square().sum()

    def push(f):
        return lambda a: jvp(f, (a,), (one,))[1]

    zero = torch.zeros((), dtype=x.dtype)
    same(push(push(push(f)))(zero), grad(grad(grad(f)))(zero), 1e-9)


# -- vmap ------------------------------------------------------------------------------------------------------------


def several(model, n=3):
    return torch.stack([example(model, batch=2, pos=5, seed=seed) for seed in range(n)])


def one_by_one(f, *inputs):
    with torch.no_grad():
        same(vmap(f)(*inputs), torch.stack([f(*one) for one in zip(*inputs, strict=True)]))


def test_vmap_runs_each_input_as_if_alone(model):
    inputs = several(model)
    one_by_one(model, inputs)
    with torch.no_grad():
        want = torch.stack([model(one) for one in inputs])
        same(vmap(model, in_dims=1, out_dims=1)(inputs.movedim(0, 1)).movedim(1, 0), want)
        same(vmap(vmap(model))(torch.stack([inputs, inputs.flip(0)]))[1], want.flip(0))
        same(vmap(model, chunk_size=2)(inputs), want)


def test_vmap_reaches_every_point(model):
    inputs = several(model)
    for name in lazy_points(model):
        one_by_one(partial(model.run_with_hooks, fwd_hooks=[(name, lambda value, hook: 0.9 * value)]), inputs)
    names = list(model.hook_dict)
    one_by_one(
        partial(model.run_with_hooks, fwd_hooks=[(name, lambda value, hook: 1.01 * value) for name in names]), inputs
    )
    for name in names[-3:]:
        one_by_one(lambda x, name=name: model.run_with_cache(x, names_filter=name)[1][name], inputs)


def test_vmap_with_padding_states_and_documents(lm):
    tokens, mask = several(lm), torch.ones(3, 2, 5, dtype=torch.long)
    mask[0, 0, 0] = mask[1, 1, 3:] = mask[2, 0, :2] = 0

    def masked(tokens, mask):
        return lm(tokens, attention_mask=mask).masked_fill(mask.unsqueeze(-1) == 0, 0)

    def onward(tokens, mask):
        _, state = lm(tokens, attention_mask=mask, return_state=True)
        return lm(tokens, state=state)

    for f in (masked, onward, lambda tokens, mask: lm(tokens, attention_mask=mask, return_type="loss")):
        one_by_one(f, tokens, mask)
        one_by_one(partial(f, mask=mask[0]), tokens)
        one_by_one(f, tokens, torch.ones_like(mask))
    one_by_one(lambda tokens: lm(tokens, return_type="loss", loss_per_token=True), tokens)
    if lm.has_positions:
        places = torch.arange(5).repeat(3, 2, 1)
        places[0], places[1, 0] = torch.tensor([0, 1, 0, 1, 2]), torch.tensor([3, 0, 1, 0, 0])
        one_by_one(lambda tokens, places: lm(tokens, position_ids=places), tokens, places)
        one_by_one(lambda tokens: lm(tokens, position_ids=places[0]), tokens)


def test_vmap_over_the_parameters_and_the_gradients_of_each_sample(model):
    inputs = several(model)
    whole = {name: p.detach() for name, p in model.named_parameters()}
    scales = torch.tensor([1.0, 1.1, 0.9], dtype=torch.float64)

    def called(scale):
        return functional_call(model, {name: scale * p for name, p in whole.items()}, (inputs[0],))

    one_by_one(called, scales)

    def loss(parameters, input):
        return functional_call(model, parameters, (input,)).square().mean()

    got = vmap(grad(loss), in_dims=(None, 0))(whole, inputs)
    for i, input in enumerate(inputs):
        want = gradients(model, model(input))
        named = {id(p): name for name, p in model.named_parameters()}
        same_gradients(
            [got[named[id(p)]][i] for p in parameters(model)],
            [torch.zeros_like(p) if g is None else g for p, g in zip(parameters(model), want, strict=True)],
        )


def test_a_wrong_input_is_named_inside_vmap(lm):
    tokens = several(lm)
    tokens[1, 1, 3] = 1000
    for dim in range(2):
        with pytest.raises(InputError, match="Token id 1000 at row 1, position 3 is out of range"):
            vmap(lm, in_dims=dim)(tokens.movedim(0, dim))
    mask = torch.ones_like(tokens)
    mask[2, 1] = 0
    with pytest.raises(InputError, match="masks all of row 1"):
        vmap(lambda tokens, mask: lm(tokens, attention_mask=mask))(several(lm), mask)


def test_plain_puts_hidden_axes_in_front():
    x = torch.arange(24).reshape(2, 3, 4)
    seen = []

    def look(row):
        seen.append(plain(row))
        return row.sum()

    vmap(vmap(look), in_dims=2)(x)  # outer axis 2, then the first of what is left
    assert sorted(seen[0].shape[:2]) == [2, 4] and seen[0].shape[2:] == (3,)
    assert plain(x) is x


def test_backward_hooks_inside_a_transform_are_refused(model):
    x = embedded(model)
    with model.hooks(bwd_hooks=[("blocks.0.hook_resid_post", lambda value, hook: 2 * value)]):
        with pytest.raises(HookError, match=r"blocks.0.hook_resid_post.*torch.autograd.grad"):
            grad(lambda x: few(model, x).sum())(x)
        same(batched_gradient(partial(few, model), x), rows(partial(few, model), x))


# -- implicit attention ----------------------------------------------------------------------------------------------

READINGS = {
    "mean": lambda A: A.mean(),
    "abs_mean": lambda A: A.abs_mean(),
    "dense": lambda A: A.dense(),
    "row": lambda A: A.row(-1),
    "column": lambda A: A.column(0),
    "output": lambda A: A.output(),
    "contributions": lambda A: A.contributions().norms(),
}


@pytest.mark.parametrize("reading", READINGS)
def test_implicit_attention_inside_transforms(model, reading):
    last = f"blocks.{model.cfg.n_layers - 1}."
    eager = [name for name in model.hook_dict if name.startswith(last) and name not in lazy_points(model)]

    def read(x):
        """From a cache that keeps the tensors themselves: run_with_cache's copies are detached."""
        values = {}
        model.run_with_hooks(
            x,
            start_at_layer=0,
            fwd_hooks=[(name, lambda value, hook: values.update({hook.name: value})) for name in eager],
        )
        return READINGS[reading](gl.implicit_attention(ActivationCache(values, model), layer=-1))

    def f(x):
        return read(x).flatten()[[1, -2]]

    x = embedded(model)
    want = rows(lambda x: read(x).square().sum().reshape(1), x)
    assert want.any()
    same(grad(lambda x: read(x).square().sum())(x), want[0])
    want = rows(f, x)
    same(jacrev(f)(x), want)
    same(jacfwd(f)(x), want)
    same(batched_gradient(f, x), want)
    one_by_one(read, torch.stack([x, 1.1 * x, x.flip(1)]))
    one_by_one(grad(lambda x: f(x).sum()), torch.stack([x, 1.1 * x]))


# -- checkpointing ---------------------------------------------------------------------------------------------------


def test_a_checkpointed_model_has_the_same_gradients(model):
    want = gradients(model, model(example(model)))
    same_gradients(gradients(model, checkpoint(model, example(model), use_reentrant=False)), want)
    got = gradients(model, checkpoint(model, example(model), use_reentrant=False), create_graph=True)
    same_gradients([None if g is None else g.detach() for g in got], want)


@pytest.mark.parametrize("way", CheckpointImpl)
def test_checkpointed_blocks_have_the_same_gradients(hooked, way):
    """As FSDP's activation checkpointing wraps them; also with hooks, which must be there when the backward runs."""
    model, wrapped = hooked.tiny(dtype=torch.float64), hooked.tiny(dtype=torch.float64)
    wrapper = partial(checkpoint_wrapper, checkpoint_impl=way)
    apply_activation_checkpointing(
        wrapped, checkpoint_wrapper_fn=wrapper, check_fn=lambda part: isinstance(part, Block)
    )
    assert list(wrapped.hook_dict) == list(model.hook_dict)
    input = example(model)
    for names in ([], lazy_points(model), ["blocks.0.hook_mixer_out"]):
        found = []
        for each in (model, wrapped):
            with each.hooks([(name, lambda value, hook: 1.1 * value) for name in names]):
                out = each(input).square().mean()
                if each is wrapped and way is CheckpointImpl.REENTRANT and model.hands_on:
                    with pytest.raises(gl.InputError, match="Checkpoint with use_reentrant=False"):
                        out.backward()
                    return
                out.backward()
            found.append([p.grad for p in parameters(each)])
            each.zero_grad()
        same_gradients(found[1], found[0])
    _, cache = wrapped.run_with_cache(input)
    assert "blocks.0.hook_mixer_out" in cache

"""Products: the midpoint rule, D(a b) = mean(b) Da + mean(a) Db, of anything that is linear in each of two factors.

With means in the place of both factors a gradient *is* that rule, so that whatever torch knows the gradient of has it. Where one
side is the same in both runs (a weight), it is the plain gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function

from gatedlens.errors import InputError
from gatedlens.secant.contrast import Call, Contrast, Valued
from gatedlens.secant.elementwise import of_reciprocal


class Times(Function):
    """a b, with the mean of the other side as the gradient of each."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, mean_a: Tensor, mean_b: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(mean_a, mean_b)
        ctx.dtypes = a.dtype, b.dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (mean_a, mean_b), (g,) = ctx.saved_tensors, grads
        of_a = (g * mean_b).sum_to_size(mean_a.shape).to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
        of_b = (g * mean_a).sum_to_size(mean_b.shape).to(ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
        return of_a, of_b, None, None, None


def linear(call: Call) -> Any:
    """What is linear in all that differs: as it is."""
    with torch.no_grad():
        first = call.outcome(0)
    return call.wrapped([first, *(call.outcome(run) for run in range(1, call.number))])


def mean_of(runs: tuple[Tensor, ...], run: int) -> Tensor:
    """What stands between a run and the one before it."""
    with torch.no_grad():
        return (runs[run] + runs[run - 1]) / 2


def times(call: Call) -> Any:
    """a * b"""
    if len(call.places) < 2:
        return linear(call)
    a, b = (call.leaves[place] for place in call.places)
    values = call.values()
    outs = [values[0]]
    for run in range(1, call.number):
        means = mean_of(a.runs, run), mean_of(b.runs, run)
        outs.append(Times.apply(a.runs[run], b.runs[run], *means, values[run]))
    return call.together(outs)


def bilinear(call: Call) -> Any:
    """A function of two factors that is linear in each (a matrix product, an einsum), or adds something to their product: its
    gradient at the means."""
    if len(call.places) < 2:
        return linear(call)
    values = call.values()

    def flow(run: int) -> Tensor:
        leaves = list(call.leaves)
        for place in call.places:
            runs = call.leaves[place].runs
            leaves[place] = Valued.apply(runs[run], mean_of(runs, run))
        args, kwargs = torch.utils._pytree.tree_unflatten(leaves, call.form)
        found: Tensor = call.func(*args, **kwargs)
        return found

    return call.valued(values, flow)


class Einsum(Function):
    """A value whose gradients are those of an einsum of two factors at their means: einsums too."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, mean_a: Tensor, mean_b: Tensor, value: Tensor, axes: Any) -> Tensor:
        ctx.save_for_backward(mean_a, mean_b)
        ctx.axes = axes
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (mean_a, mean_b), (of_a, of_b, out) = ctx.saved_tensors, ctx.axes
        left = torch.einsum(f"{out},{of_b}->{of_a}", grads[0], mean_b) if ctx.needs_input_grad[0] else None
        right = torch.einsum(f"{out},{of_a}->{of_b}", grads[0], mean_a) if ctx.needs_input_grad[1] else None
        return left, right, None, None, None, None


def einsum(call: Call) -> Any:
    """torch.einsum of two factors, without the product of the means that `bilinear` would take first."""
    if len(call.places) < 2:
        return linear(call)
    if len(call.places) > 2:
        raise InputError(
            f"Secant relevance: {call.name!r} multiplies {len(call.places)} factors at once; take two at a time."
        )
    equation = str(call.leaves[0]).replace(" ", "")
    inputs, _, out = equation.partition("->")
    axes = (*inputs.split(","), out)
    plain = len(axes) == 3 and out and "." not in equation and all(len(set(each)) == len(each) for each in axes)
    if not plain or not all(set(one) <= set(other) | set(out) for one, other in (axes[:2], axes[1::-1])):
        return bilinear(call)
    a, b = (call.leaves[place] for place in call.places)
    values = call.values()
    outs = [values[0]]
    for run in range(1, call.number):
        means = mean_of(a.runs, run), mean_of(b.runs, run)
        outs.append(Einsum.apply(a.runs[run], b.runs[run], *means, values[run], axes))
    return call.together(outs)


def divided(call: Call) -> Any:
    """a / b = a * (1 / b): D(a / b) = mean(1 / b) Da - mean(a) Db / (b b')."""
    a, b = call.leaves[:2]
    if not isinstance(b, Contrast):
        return linear(call)
    values = call.values()
    inverse = [1 / b_run.detach() for b_run in b.runs]

    def flow(run: int) -> Tensor:
        slope = of_reciprocal(inverse[run], inverse[run - 1], b, b)
        one_over = Valued.apply(b.runs[run] * slope, (inverse[run] + inverse[run - 1]) / 2)
        above = Valued.apply(a.runs[run], mean_of(a.runs, run)) if isinstance(a, Contrast) else a
        return above * one_over

    return call.valued(values, flow)


def lerp(call: Call) -> Any:
    """a + w (b - a)"""
    (a, b, w), _ = torch.utils._pytree.tree_unflatten(call.leaves, call.form)
    if not isinstance(w, Contrast):
        return linear(call)
    return _kept(call, lambda: a + w * (b - a))


def logaddexp(call: Call) -> Any:
    """logaddexp(a, b) = a + softplus(b - a)"""
    (a, b), _ = torch.utils._pytree.tree_unflatten(call.leaves, call.form)
    return _kept(call, lambda: a + F.softplus(b - a))


def normalize(call: Call) -> Any:
    """F.normalize: x / max(|x|, eps)."""
    args, kwargs = torch.utils._pytree.tree_unflatten(call.leaves, call.form)
    given = dict(zip(("input", "p", "dim", "eps"), args, strict=False)) | kwargs
    x, p, dim, eps = given["input"], given.get("p", 2.0), given.get("dim", 1), given.get("eps", 1e-12)
    if p != 2:
        raise InputError(f"Secant relevance knows the norm of F.normalize for p=2, not for p={p}.")
    return _kept(call, lambda: x / x.pow(2).sum(dim, keepdim=True).sqrt().clamp(min=eps))


def _kept(call: Call, written: Callable[[], Any]) -> Contrast:
    """The values that the function gives, with the flow of how it is `written` in other operations."""
    values = call.values()
    with torch._C._EnableTorchFunction():
        found = written()
    return call.valued(values, lambda run: found.runs[run])

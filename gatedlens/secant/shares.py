"""Shares: the secant of softmax and of the logarithm of a sum of exponentials.

    Dp_j = q_j (Ds_j - sum_i q_i Ds_i / sum_i q_i)            q the logarithmic mean of p and p'
    D log sum_i exp s_i = sum_i q_i Ds_i / sum_i q_i

since Dp = q D log p and log p_j = s_j - log sum_i exp s_i. (Taken as a quotient, exp s over its sum, softmax has another rule
that is as complete, and far worse: it credits a score with what it takes away from all others, and takes that back elsewhere.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from gatedlens.secant.contrast import Call, Contrast
from gatedlens.secant.elementwise import logarithmic_mean


class Shared(Function):
    """p with the gradient q (g - sum q g / sum q): the matrix of the rule is symmetric."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, q: Tensor, p: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(q)
        ctx.dim, ctx.dtype = dim, s.dtype
        return p.view_as(p)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (q,), (g,), dim = ctx.saved_tensors, grads, ctx.dim
        weighed = q * g
        return (weighed - q * (weighed.sum(dim, keepdim=True) / _total(q, dim))).to(ctx.dtype), None, None, None


class Summed(Function):
    """log sum exp (kept along its axis) with the gradient q g / sum q."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, q: Tensor, value: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(q / _total(q, dim))
        ctx.dtype = s.dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (ctx.saved_tensors[0] * grads[0]).to(ctx.dtype), None, None, None


def _total(q: Tensor, dim: int) -> Tensor:
    return q.sum(dim, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)


def mean_shares(s: Tensor, s0: Tensor, p: Tensor, p0: Tensor, dim: int) -> Tensor:
    """q: the logarithmic mean of p and p', the softmax of s and s'; 0 where a score is -inf."""
    further = s.logsumexp(dim, keepdim=True) - s0.logsumexp(dim, keepdim=True)
    return logarithmic_mean(p, p0, (s - s0).sub_(further))


def _asked(call: Call) -> tuple[Contrast, int]:
    """(the scores, the axis) of a softmax."""
    args, kwargs = torch.utils._pytree.tree_unflatten(call.leaves, call.form)
    s = args[0] if args else kwargs["input"]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", -1)
    with torch._C._EnableTorchFunction():
        return s if kwargs.get("dtype") is None else s.to(kwargs["dtype"]), dim


def softmax(call: Call) -> Contrast:
    """softmax(s, dim)"""
    (s, dim), values = _asked(call), call.values()
    outs = [values[0]]
    for run in range(1, call.number):
        with torch.no_grad():
            q = mean_shares(s.runs[run].detach(), s.runs[run - 1].detach(), values[run], values[run - 1], dim)
        outs.append(Shared.apply(s.runs[run], q, values[run], dim))
    return call.together(outs)


def logsumexp(call: Call) -> Contrast:
    """torch.logsumexp(s, dim, keepdim)"""
    args, kwargs = torch.utils._pytree.tree_unflatten(call.leaves, call.form)
    s, dim = args[0], args[1] if len(args) > 1 else kwargs["dim"]
    keep = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    (dim,) = (dim,) if isinstance(dim, int) else dim
    outs = [call.outcome(0).detach()]
    for run in range(1, call.number):
        after, before = s.runs[run].detach(), s.runs[run - 1].detach()
        q = mean_shares(after, before, after.softmax(dim), before.softmax(dim), dim)
        found = Summed.apply(s.runs[run], q, after.logsumexp(dim, keepdim=True), dim)
        outs.append(found if keep else found.squeeze(dim))
    return call.together(outs)


def log_softmax(call: Call) -> Contrast:
    """log_softmax(s, dim) = s - logsumexp(s, dim)"""
    (s, dim), values = _asked(call), call.values()
    with torch._C._EnableTorchFunction():
        found: Any = s - torch.logsumexp(s, dim, keepdim=True)
    return call.valued(values, lambda run: found.runs[run])

"""What the tests of circuits share: two inputs and a metric for any architecture, and ranks."""

from __future__ import annotations

import torch

import gatedlens as gl
from tests.helpers import example

METRIC = gl.metrics.logit_difference(1, 2)


def two(model, **options):
    """(clean, corrupted)."""
    return example(model, **options), example(model, seed=1, **options)


@torch.no_grad()
def measured(model, tokens, hooks=(), metric=METRIC, **options):
    """The metric of a run under hooks, [batch]."""
    return metric(model.run_with_hooks(tokens, fwd_hooks=list(hooks), **options))


@torch.no_grad()
def fired(model, tokens, names, **options):
    return model.run_with_cache(tokens, names_filter=names, **options)[1]


def put(value):
    """The hook that puts a value in an activation's place."""
    return lambda x, hook: value.to(x.dtype)


def gradient(model, tokens, name, value, metric=METRIC, hooks=()):
    """d metric / d activation of one point where it holds `value`, by a run of its own; the metric summed over rows."""
    leaf = value.detach().clone().requires_grad_()
    out = metric(model.run_with_hooks(tokens, fwd_hooks=[*hooks, (name, lambda x, hook: leaf.clone())])).sum()
    if not out.requires_grad:
        return torch.zeros_like(leaf)
    (found,) = torch.autograd.grad(out, leaf, allow_unused=True)
    return torch.zeros_like(leaf) if found is None else found


def spearman(a, b) -> float:
    """The rank correlation; equal numbers share their mean rank."""
    ranks = []
    for x in (a, b):
        _, inverse, count = x.flatten().double().unique(return_inverse=True, return_counts=True)
        ranks.append((count.cumsum(0) - (count - 1) / 2)[inverse])
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])

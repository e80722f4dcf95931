"""What a transform has done to tensors: torch.func's (vmap, grad, jvp, and what is made of them) and those of autograd.

A transform hides an axis or a derivative inside a tensor. Whoever writes into buffers, or asks a tensor for a plain truth
value, asks here first; where no transform is under way every answer costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool
from torch import Tensor
from torch._C import _functorch


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is under way: only differentiable operations pass it on."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def has_old_axis(*tensors: Tensor) -> bool:
    """Whether autograd's own vmap (`is_grads_batched`, `vectorize=True`) hides an axis in any of them."""
    return any(_functorch.is_legacy_batchedtensor(t) for t in tensors)


def has_axis(*tensors: Tensor) -> bool:
    """Whether any vmap may hide an axis in some of them: then no buffer of another tensor's shape can hold them."""
    return torch._C._are_functorch_transforms_active() or has_old_axis(*tensors)


def anywhere(condition: Bool[Tensor, "*any"]) -> bool:
    """Whether it holds at any place, for every input that a vmap runs side by side."""
    while _functorch.is_functorch_wrapped_tensor(condition):
        condition = _functorch.get_unwrapped(condition)
    return bool(condition.any())


def gradients(
    run: Callable[..., tuple[Tensor, ...]], given: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """What a Function's backward gives for `given` where `run(*given)` is its forward, written differentiably.

    Where a second derivative is wanted, what it gives can be differentiated again. Each of `given` is taken through a view
    of its own: they may depend on one another, and a gradient would flow on from one into the next and count twice.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        own = [t.view_as(t) for t in given]
        ways = [(out, grad) for out, grad in zip(run(*own), grads, strict=True) if out.requires_grad]
        needed = [t for t in own if t.requires_grad]
        outs, flows = zip(*ways, strict=True)
        found = iter(torch.autograd.grad(outs, needed, flows, create_graph=again, allow_unused=True))
    return tuple(next(found) if t.requires_grad else None for t in own)

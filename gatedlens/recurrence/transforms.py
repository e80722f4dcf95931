"""What a transform has done to tensors: torch.func's (vmap, grad, jvp, and what is made of them) and those of autograd.

A transform hides an axis or a derivative inside a tensor. Whoever writes into buffers, or asks a tensor for a plain truth
value, asks here first; where no transform is under way every answer costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor
from torch._C import _functorch
from torch.overrides import handle_torch_function, has_torch_function


def forward_mode() -> bool:
    """Whether forward-mode differentiation is under way. A Function's own jvp is wrong there, and silently so, as soon as one
    runs inside another (in torch 2.6 to 2.13): only operations of torch will do."""
    return torch.autograd.forward_ad._current_level >= 0


def transformed() -> bool:
    """Whether a transform of torch.func or forward mode is under way: only what has a rule for each passes it on."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def overridden(*tensors: object) -> bool:
    """Whether any of them is of a tensor class that computes functions its own way, by torch's protocol: whoever is asked hands
    the call on by `handle_torch_function`."""
    return not torch.compiler.is_compiling() and has_torch_function(tensors)


def of_one_number(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`@of_one_number`: says of a function with a gradient of its own that it takes each number by itself, as torch's `exp`: so a
    tensor class that computes functions its own way can compute this one."""

    @wraps(f)
    def at_each(x: Tensor) -> Tensor:
        if overridden(x):
            return handle_torch_function(at_each, (x,), x)
        return f(x)

    at_each.__name__ = "of_one_number"
    return at_each


def has_old_axis(*tensors: Tensor) -> bool:
    """Whether autograd's own vmap (`is_grads_batched`, `vectorize=True`) hides an axis in any of them."""
    return any(_functorch.is_legacy_batchedtensor(t) for t in tensors)


def plain(x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, ...]:
    """The numbers of `x` as they are in memory, for a check: axes that torch.func.vmap hides stand in front."""
    while _functorch.is_functorch_wrapped_tensor(x):
        axis, x = _functorch.maybe_get_bdim(x), _functorch.get_unwrapped(x)
        x = x if axis < 0 else x.movedim(axis, 0)
    return x


def anywhere(condition: Bool[Tensor, "*any"]) -> bool:
    """Whether it holds at any place, for any of the inputs that a vmap runs side by side."""
    return bool(plain(condition).any())


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

"""Softmax attention whose scores and pattern nobody sees: torch's own, which never holds them.

    z = attend(q, keys, values, seen, scale)           # softmax(scale q . k) v, over the keys that each query sees
    unheard(q, keys, values)                           # whether no transform, compiler or tensor class needs them

Its gradient keeps no pattern either: it is computed again, block by block, from q, k and v. torch's fast form has no second
derivative, so where one is wanted the backward is that of the plain products.

b batch, l pos, k key position, h head, d width of a head.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import Function
from torch.nn.attention import SDPBackend, sdpa_kernel

from gatedlens.recurrence.transforms import gradients, has_old_axis, overridden, transformed


def unheard(*given: Tensor) -> bool:
    """`unheard(q, keys, values)`: whether torch's own attention can take them: it has no rule for transforms of torch.func and
    forward mode, and other tensor classes have theirs for products and softmax."""
    return not (torch.compiler.is_compiling() or transformed() or overridden(*given))


def attend(
    q: Float[Tensor, "batch pos head d_qk"],
    keys: Float[Tensor, "batch key_pos head d_qk"],
    values: Float[Tensor, "batch key_pos head d_v"],
    seen: Bool[Tensor, "batch 1 pos key_pos"] | None,
    scale: float,
) -> Float[Tensor, "batch pos head d_v"]:
    """`attend(q, keys, values, seen, scale)`: softmax(scale q . k) v over the keys where `seen` says so; None: over those that
    are not ahead of the query."""
    given = tuple(x.transpose(1, 2) for x in (q, keys, values))
    needed = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    out = Attended.apply(seen, scale, *given) if needed else _attend(seen, scale, *given)
    return out.transpose(1, 2)


def _attend(seen: Tensor | None, scale: float, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    # Only where keys and values are equally wide does torch's form on processors hold no pattern: what is narrower is filled up.
    width, more = values.shape[-1], keys.shape[-1] - values.shape[-1]
    values = F.pad(values, (0, max(more, 0)))
    q, keys = (F.pad(x, (0, max(-more, 0))) for x in (q, keys))
    out = F.scaled_dot_product_attention(q, keys, values, seen, is_causal=seen is None, scale=scale)
    return out[..., :width]


class Attended(Function):
    """`_attend`, differentiable any number of times, which keeps nothing but what it was given."""

    @staticmethod
    def forward(ctx: Any, seen: Tensor | None, scale: float, *given: Tensor) -> Tensor:
        ctx.seen, ctx.scale = seen, scale
        ctx.save_for_backward(*given)
        return _attend(seen, scale, *given)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        def run(*given: Tensor) -> tuple[Tensor, ...]:
            return (_attend(ctx.seen, ctx.scale, *given),)

        plain = torch.is_grad_enabled() or has_old_axis(*grads)
        with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            return None, None, *gradients(run, ctx.saved_tensors, grads)

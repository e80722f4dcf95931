"""Keep: the hooks behind run_with_cache: what a run fired, copied as it is wanted, and its gradients.

b batch. `Keep` for activations alone; `KeepLive` for `incl_bwd`, whose gradients `gradients` takes at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy
import torch
from torch import Tensor
from transformer_lens.utilities import Slice

from gatedlens.model.hookpoint import HookPoint, Saver
from gatedlens.recurrence.autocast import exact

# What `pos_slice=` and `batch_slice=` take: some positions of the input as it is laid out, or some rows. For editors and type
# checkers; whoever passes something else gets the error of the function that reads it.
if TYPE_CHECKING:
    SliceLike: TypeAlias = (
        int | slice | tuple[int, ...] | Sequence[int] | numpy.ndarray[Any, Any] | Tensor | Slice | None
    )
else:
    SliceLike = Any


class Keep(Saver):
    """The hook behind run_with_cache: a detached copy, on `device`, of the positions `pos_slice` picks."""

    def __init__(self, store: dict[str, Tensor], device: Any, remove_batch_dim: bool, pos_slice: Slice):
        self.store = store
        self.device = device
        self.remove_batch_dim = remove_batch_dim
        self.pos_slice = pos_slice

    def trim(self, tensor: Tensor, point: HookPoint) -> Tensor:
        """The part of an activation (or of its gradient) that is kept."""
        if point.pos_dim is not None:
            tensor = self.pos_slice.apply(tensor, dim=point.pos_dim)
        if self.remove_batch_dim and tensor.shape[0] == 1:
            tensor = tensor[0]
        return tensor

    def __call__(self, tensor: Tensor, hook: Any) -> None:
        kept = self.trim(tensor.detach(), hook)
        moves = self.device is not None and self.device != kept.device
        self.store[hook.name] = kept.to(self.device) if moves else kept.clone()


class KeepLive:
    """The hook behind run_with_cache(incl_bwd=True): what `Keep` keeps, and the tensor itself, for its gradient."""

    def __init__(self, keep: Keep, live: dict[str, tuple[Tensor, HookPoint]]):
        self.keep = keep
        self.live = live

    def __call__(self, tensor: Tensor, hook: Any) -> Tensor:
        self.keep(tensor, hook)
        leaf = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
        self.live[hook.name] = (leaf, hook)
        return leaf.clone()


def gradients(
    out: Tensor, live: dict[str, tuple[Tensor, HookPoint]], keep: Callable[[Tensor, HookPoint], Tensor]
) -> dict[str, Tensor]:
    """`{name_grad: d out / d activation}`; zeros where `out` does not depend on it. Parameters' .grad stay untouched."""
    with exact(out):
        found = torch.autograd.grad(out, [leaf for leaf, _ in live.values()], allow_unused=True)
    grads = {}
    for (name, (leaf, point)), grad in zip(live.items(), found, strict=True):
        grads[f"{name}_grad"] = keep(torch.zeros_like(leaf) if grad is None else grad, point)
    return grads

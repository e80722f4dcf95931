"""Intervention: edits at places, as a value that can be added, entered and handed to `run_with_hooks`.

    cut = Intervention((EditStep(Where(("blocks.*.mixer.hook_write",), {"pos": 3}), lambda x, point: x * 0),))
    with (cut + other).on(model): ...
    model.run_with_hooks(tokens, fwd_hooks=cut.hooks(model))

Where says which points and which entries, an edit (tensor, point) -> tensor what stands there instead. An edit that
`reads` other points of the same part gets their values too: `edit(tensor, point, *values)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from gatedlens.address.entries import Index, Where
from gatedlens.address.names import Name, listed
from gatedlens.model.base import HookedModel
from gatedlens.model.hookpoint import Capture, HookPoint

if TYPE_CHECKING:
    from gatedlens.model.base import HookedModel
else:  # that file imports this one
    HookedModel = Any

Edit = Callable[..., Tensor]


@runtime_checkable
class Step(Protocol):
    """What an intervention is made of: it says with which hooks it is done on a model, having checked that it can be."""

    def hooks(self, model: HookedModel) -> list[tuple[str, Callable[..., Any]]]:
        """`step.hooks(model)`: [(name, hook)], in the order in which they must be put on."""
        ...


@dataclass(frozen=True)
class EditStep:
    """One edit: where, what, and the leaf names of the points beside it whose values the edit is given."""

    where: Where
    edit: Edit
    reads: tuple[str, ...] = ()

    def hooks(self, model: HookedModel) -> list[tuple[str, Callable[..., Any]]]:
        """`step.hooks(model)`: [(name, hook)], in the order in which they must be put on."""
        found: list[tuple[str, Callable[..., Any]]] = []
        for name in self.where.points(model):
            part, values = name.rpartition(".")[0], dict[str, Tensor]()
            needed = [model.names.find(f"{part}.{leaf}").name for leaf in self.reads]
            found += [(one, Capture(values)) for one in needed]
            found.append((name, _hook(model, self.where, self.edit, values, needed)))
        return found


def _hook(
    model: HookedModel, where: Where, edit: Edit, values: dict[str, Tensor], needed: list[str]
) -> Callable[..., Tensor]:
    def hook(tensor: Tensor, hook: HookPoint) -> Tensor:
        value = edit(tensor, hook, *(values.pop(name) for name in needed))
        real = model.current().padding.mask if "pos" in where.index else None
        mask = where.entries(tensor.shape, hook.point, tensor.device, hook.name or "", real, model.cfg.sizes)
        return torch.where(mask, value.to(tensor.dtype), tensor)

    return hook


@dataclass(frozen=True)
class Intervention:
    """Steps, in order; `a + b` does both. `on(model)` is a context manager, `hooks(model)` a list of hooks."""

    steps: tuple[Step, ...]

    def __add__(self, other: Intervention) -> Intervention:
        if not isinstance(other, Intervention):
            return NotImplemented
        return Intervention(self.steps + other.steps)

    def hooks(self, model: HookedModel) -> list[tuple[str, Callable[..., Any]]]:
        """`model.run_with_hooks(tokens, fwd_hooks=cut.hooks(model))`: [(name, hook)] for `run_with_hooks`, everything
        checked against `model` first.
        """
        return [hook for step in self.steps for hook in step.hooks(model)]

    @contextmanager
    def on(self, model: HookedModel) -> Iterator[HookedModel]:
        """`with ablation.on(model): ...`"""
        with model.hooks(self.hooks(model)):
            yield model


def edit(names: Name | Sequence[Name], function: Edit, **index: Index) -> Intervention:
    """`edit(names, lambda tensor, point: ..., pos=3)`: any function, at some entries."""
    return Intervention((EditStep(Where(tuple(listed(names)), index), function),))

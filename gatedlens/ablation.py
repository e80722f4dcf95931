"""Ablation: interventions as values. Each says where (points by name, entries by axis) and what stands there instead.

    without_gate = gl.ablation.constant("blocks.*.mixer.hook_gate", 1.0)
    cut = gl.ablation.zero("blocks.2.mixer.hook_write", pos=3, channel=slice(0, 64))
    with (without_gate + cut).on(model):
        logits = model(tokens)
    model.run_with_hooks(tokens, fwd_hooks=cut.hooks(model))

Where: a point's name, alias or glob, or a list of them, and `axis=index` for any of its axes (int, slice or list). An edit
is a function (tensor, point) -> tensor, so a new kind of ablation is one more function. Everything is undone at the end,
also after an exception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from gatedlens.errors import InputError, PointError
from gatedlens.hookpoint import HookPoint
from gatedlens.points import Point

Edit = Callable[[Tensor, HookPoint], Tensor]
Index = int | slice | Sequence[int] | Tensor


@dataclass(frozen=True)
class Where:
    """Some entries of some points: `Where(("blocks.*.mixer.hook_write",), {"pos": 3})`."""

    names: tuple[str, ...]
    index: Mapping[str, Index] = field(default_factory=dict)

    def points(self, model: Any) -> list[str]:
        """The full names that are meant, each checked to have the axes and the indices."""
        found = dict.fromkeys(one.name for name in self.names for one in model.names.hooked(name) if one.view is None)
        if not found:
            raise PointError(f"{', '.join(self.names)} names views only; ablate the points behind them.")
        for name in found:
            self.check(name, model.names.points[name], model.cfg.sizes)
        return list(found)

    def check(self, name: str, point: Point, sizes: Mapping[str, int]) -> None:
        """Refuse an axis that `point` lacks, and an index that its size (if known) does not reach."""
        for axis, index in self.index.items():
            if axis not in point.dims:
                raise PointError(f"{name} has no axis {axis!r}; its axes are: {point.axes}.")
            size = sizes.get(axis)
            if size is not None and not isinstance(index, slice):
                for i in torch.as_tensor(index).reshape(-1).tolist():
                    if not -size <= i < size:
                        raise InputError(f"{axis}={i} is out of range: {name} has {size} of that axis.")

    def entries(self, shape: Sequence[int], point: Point, device: torch.device) -> Tensor:
        """A boolean mask that broadcasts to an activation of `shape`: True at the entries that are meant."""
        mask = torch.ones([1] * len(shape), dtype=torch.bool, device=device)
        for axis, index in self.index.items():
            dim = point.axis(axis)
            along = torch.zeros(shape[dim], dtype=torch.bool, device=device)
            try:
                along[index if isinstance(index, int | slice) else torch.as_tensor(index, device=device)] = True
            except IndexError:
                raise InputError(
                    f"{axis}={index} is out of range: this activation has {shape[dim]} of that axis."
                ) from None
            mask = mask & along.reshape([-1 if d == dim else 1 for d in range(len(shape))])
        return mask


@runtime_checkable
class Step(Protocol):
    """What an intervention is made of: it says with which hooks it is done on a model, having checked that it can be."""

    def hooks(self, model: Any) -> list[tuple[str, Callable[..., Any]]]: ...


@dataclass(frozen=True)
class EditStep:
    """An edit at a place."""

    where: Where
    edit: Edit

    def hooks(self, model: Any) -> list[tuple[str, Callable[..., Any]]]:
        """One hook a point."""
        return [(name, _hook(self.where, self.edit)) for name in self.where.points(model)]


@dataclass(frozen=True)
class Intervention:
    """Steps, in order; `a + b` does both. `on(model)` is a context manager, `hooks(model)` a list of hooks."""

    steps: tuple[Step, ...]

    def __add__(self, other: Intervention) -> Intervention:
        return Intervention(self.steps + other.steps)

    def hooks(self, model: Any) -> list[tuple[str, Callable[..., Any]]]:
        """[(name, hook)] for `run_with_hooks`, everything checked against `model` first."""
        return [pair for step in self.steps for pair in step.hooks(model)]

    @contextmanager
    def on(self, model: Any) -> Iterator[Any]:
        """`with ablation.on(model): ...`"""
        with model.hooks(self.hooks(model)):
            yield model


def _hook(where: Where, edit: Edit) -> Callable[..., Tensor]:
    def hook(tensor: Tensor, hook: HookPoint) -> Tensor:
        value = edit(tensor, hook)
        return torch.where(where.entries(tensor.shape, hook.point, tensor.device), value.to(tensor.dtype), tensor)

    return hook


def edit(names: str | Sequence[str], function: Edit, **index: Index) -> Intervention:
    """`edit(names, lambda tensor, point: ..., pos=3)`: any function, at some entries."""
    return Intervention((EditStep(Where((names,) if isinstance(names, str) else tuple(names), index), function),))


# -- what stands there instead --------------------------------------------------------------------------------------


def constant(names: str | Sequence[str], value: int | float, **index: Index) -> Intervention:
    """A number: `constant("blocks.*.mixer.hook_gate", 1)` opens every gate."""
    return edit(names, lambda x, point: torch.full_like(x, value), **index)


def zero(names: str | Sequence[str], **index: Index) -> Intervention:
    """Zero."""
    return constant(names, 0.0, **index)


def scale(names: str | Sequence[str], factor: int | float, **index: Index) -> Intervention:
    """The activation times a factor."""
    return edit(names, lambda x, point: x * factor, **index)


def noise(names: str | Sequence[str], std: int | float, seed: int = 0, **index: Index) -> Intervention:
    """The activation plus Gaussian noise; the same seed gives every point the same noise at every run."""

    def add(x: Tensor, point: HookPoint) -> Tensor:
        generator = torch.Generator().manual_seed(seed + sum(map(ord, point.name or "")))
        return x + std * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)

    return edit(names, add, **index)


def freeze(names: str | Sequence[str], source: Any, **index: Index) -> Intervention:
    """What another run had there; `source` is its ActivationCache (or a mapping of full names to tensors)."""
    return edit(names, lambda x, point: _fitting(source, x, point), **index)


def mean(names: str | Sequence[str], source: Any, over: Sequence[str] = ("batch",), **index: Index) -> Intervention:
    """The mean of a cache over some axes (`over`): its rows, or `("batch", "pos")` for one vector per point."""

    def average(x: Tensor, point: HookPoint) -> Tensor:
        dims = [point.point.axis(axis) for axis in over]
        return _stored(source, point).mean(dims, keepdim=True).expand_as(x)

    return edit(names, average, **index)


def resample(names: str | Sequence[str], source: Any = None, seed: int = 0, **index: Index) -> Intervention:
    """Another row's activation: of the same batch (each row gets that of another), or of a cache's rows, drawn at random."""

    def other(x: Tensor, point: HookPoint) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if source is None:
            if len(x) < 2:
                raise InputError("resample without a source takes other rows of the batch: give at least two.")
            shift = int(torch.randint(1, len(x), (), generator=generator))
            return x.roll(shift, 0)
        stored = _stored(source, point)
        return stored[torch.randint(len(stored), (len(x),), generator=generator)].expand_as(x)

    return edit(names, other, **index)


def _stored(source: Any, point: HookPoint) -> Tensor:
    try:
        return source[point.name]
    except KeyError as error:
        raise PointError(f"The source holds no {point.name}: cache it first (names_filter={point.name!r}).") from error


def _fitting(source: Any, x: Tensor, point: HookPoint) -> Tensor:
    value = _stored(source, point)
    try:
        return value.to(x.device).expand_as(x)
    except RuntimeError as error:
        raise InputError(
            f"The source's {point.name} has shape {list(value.shape)}; the activation {list(x.shape)}."
        ) from error


# -- whole components -----------------------------------------------------------------------------------------------


def open_gate(layers: str = "*") -> Intervention:
    """gate = 1 in the layers of a glob ("*", "3", "[01]")."""
    return constant(f"blocks.{layers}.mixer.*hook_gate", 1.0)


def no_scan(layers: str = "*") -> Intervention:
    """The scan's readout is zero: what is left is the skip."""
    return zero(f"blocks.{layers}.mixer.*hook_scan")


def only_tap(tap: int, layers: str = "*") -> Intervention:
    """The conv keeps one tap (-1: the token itself)."""

    def keep(x: Tensor, point: HookPoint) -> Tensor:
        kept = torch.zeros_like(x)
        kept[..., tap] = x[..., tap]
        return kept

    return edit(f"blocks.{layers}.mixer.*hook_conv_taps", keep)


def remove_layer(layer: int) -> Intervention:
    """A block writes nothing into the residual stream."""
    return zero(f"blocks.{layer}.hook_m*_out")  # mixer_out, and mlp_out where there is one

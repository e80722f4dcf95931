"""Labelled tensors: what a view of the attention is, in words, and what stands along its axes, for the picture of it.

    @labelled("|attention| (mean over channels)", "batch dst src")
    def abs_mean(self) -> Tensor: ...

    view = A.abs_mean()[0]
    label_of(view)                     # "|attention| (mean over channels)"; None of what was computed from it
    view.title, view.axes, view.tokens # "Implicit attention, layer 1", ("dst", "src"), ["<bos>", "D", ...]
    view.result()                      # the same as a Result: plots, data frames, JSON

A labelled tensor is a Tensor like any other. Its label stays while its numbers do: picked rows, copies, other dtypes and
devices. Whatever computes with it gets plain tensors, and so does whoever loads it from a file.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from gatedlens.result.legend import Legend
from gatedlens.result.result import Result

SAME = {  # axes and entries stay as they are
    Tensor.detach, Tensor.clone, Tensor.contiguous, Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.float, Tensor.double,
    Tensor.half, Tensor.bfloat16, torch.detach, torch.clone,
}  # fmt: skip
KEEP = SAME | {
    Tensor.__getitem__, Tensor.select, Tensor.squeeze, Tensor.narrow, Tensor.index_select,
    torch.select, torch.squeeze, torch.narrow, torch.index_select,
}  # fmt: skip
Function = TypeVar("Function", bound=Callable[..., Any])


class LabelledTensor(Tensor):
    """A Tensor with a `label`, and a legend of its axes (None where they are not known)."""

    label: str
    legend: Legend | None

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            found = function(*args, **(kwargs or {}))
        if function not in KEEP:
            return _plain(found)
        said = next((one for one in args if isinstance(one, LabelledTensor)), None)
        if said is None:
            return found
        legend = _legend(function, *args)
        fits = legend is not None and [*map(len, legend.places)] == [*found.shape]
        return with_label(found, said.label, legend if fits else None)

    @property
    def title(self) -> str:
        """What it is of: "Implicit attention, layer 1"."""
        return "" if self.legend is None else self.legend.title

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of its axes; none where they are not known."""
        return () if self.legend is None else self.legend.axes

    @property
    def labels(self) -> dict[str, list[Any]]:
        """What stands along its axes, by name."""
        return {} if self.legend is None else self.legend.labels

    @property
    def tokens(self) -> list[Any] | None:
        """What stands along its sources: the tokens of its row of the batch."""
        return self.labels.get("src")

    def result(self) -> Result:
        """`A.abs_mean().result()`: the same numbers on named axes, to plot, to save, as a data frame."""
        axes = self.axes or tuple(f"dim {i}" for i in range(self.ndim))
        return Result(self.detach().as_subclass(Tensor), axes, self.labels, self.title, self.label)

    def _repr_html_(self) -> str | None:
        found = self.result()
        for axis in ("batch", "head", "group", "channel"):
            if axis in found.axes and found.size(axis) == 1:
                found = found.mean_over(axis)
        return found._repr_html_() if self.legend is not None and found.axes else None

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))  # not unbind's, which must not be edited in place

    def __repr__(self, *, tensor_contents: Any = None) -> Any:  # type: ignore[override]
        return repr(self.as_subclass(Tensor))

    def __format__(self, spec: str) -> str:
        return format(self.as_subclass(Tensor), spec)

    def __deepcopy__(self, memo: Any) -> Any:
        return with_label(copy.deepcopy(self.as_subclass(Tensor), memo), self.label, self.legend)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def with_label(value: Any, label: str, legend: Legend | None = None) -> Any:
    """The tensor, or each of a tuple, under a label."""
    if isinstance(value, tuple):
        return tuple(with_label(one, label, legend) for one in value)
    found = value.as_subclass(LabelledTensor)
    found.label, found.legend = label, legend
    return found


def _legend(function: Any, tensor: Any, *args: Any) -> Legend | None:
    """What is left of a tensor's legend behind a function that keeps its numbers."""
    legend = tensor.legend if isinstance(tensor, LabelledTensor) else None
    if legend is None or function in SAME:
        return legend
    if function is Tensor.__getitem__:
        return legend.picked(*args)
    if function in (Tensor.select, torch.select) and len(args) == 2:
        return legend.picked(tuple(args[1] if i == args[0] % tensor.ndim else slice(None) for i in range(tensor.ndim)))
    if function in (Tensor.squeeze, torch.squeeze):
        dims = [args[0] % tensor.ndim] if args else range(tensor.ndim)
        return legend.picked(tuple(0 if i in dims and n == 1 else slice(None) for i, n in enumerate(tensor.shape)))
    return None


def _plain(value: Any) -> Any:
    """What changes a labelled tensor in place gives it back."""
    return value.as_subclass(Tensor) if isinstance(value, LabelledTensor) else value


def label_of(value: Any) -> str | None:
    """What a tensor says it is; None of one that says nothing."""
    return value.label if isinstance(value, LabelledTensor) else None


def labelled(label: str, axes: str = "") -> Callable[[Function], Function]:
    """The tensor that a method gives is what `label` says, on `axes`, of which its object knows the legend."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            found = function(*args, **options)
            return with_label(found, label, args[0].legend(axes, found.shape) if axes else None)

        return call  # type: ignore[return-value]

    return decorate

"""Labelled tensors: what a view of the attention is, in words, for the picture that is made of it.

    @labelled("|attention| (mean over channels)")
    def abs_mean(self) -> Tensor: ...

    label_of(A.abs_mean()[0])          # "|attention| (mean over channels)"; None of what was computed from it

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

KEEP = {
    Tensor.__getitem__, Tensor.select, Tensor.squeeze, Tensor.narrow, Tensor.index_select, Tensor.detach,
    Tensor.clone, Tensor.contiguous, Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.float, Tensor.double, Tensor.half,
    Tensor.bfloat16, torch.select, torch.squeeze, torch.narrow, torch.index_select, torch.detach, torch.clone,
}  # fmt: skip
Function = TypeVar("Function", bound=Callable[..., Any])


class LabelledTensor(Tensor):
    """A Tensor with a `label`."""

    label: str

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            found = function(*args, **(kwargs or {}))
        if function not in KEEP:
            return _plain(found)
        said = next((one.label for one in args if isinstance(one, LabelledTensor)), None)
        return with_label(found, said) if said is not None else found

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))  # not unbind's, which must not be edited in place

    def __repr__(self, *, tensor_contents: Any = None) -> Any:  # type: ignore[override]
        return repr(self.as_subclass(Tensor))

    def __format__(self, spec: str) -> str:
        return format(self.as_subclass(Tensor), spec)

    def __deepcopy__(self, memo: Any) -> Any:
        return with_label(copy.deepcopy(self.as_subclass(Tensor), memo), self.label)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def with_label(value: Any, label: str) -> Any:
    """The tensor, or each of a tuple, under a label."""
    if isinstance(value, tuple):
        return tuple(with_label(one, label) for one in value)
    found = value.as_subclass(LabelledTensor)
    found.label = label
    return found


def _plain(value: Any) -> Any:
    """What changes a labelled tensor in place gives it back."""
    return value.as_subclass(Tensor) if isinstance(value, LabelledTensor) else value


def label_of(value: Any) -> str | None:
    """What a tensor says it is; None of one that says nothing."""
    return value.label if isinstance(value, LabelledTensor) else None


def labelled(label: str) -> Callable[[Function], Function]:
    """The tensor that a function gives is what `label` says."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            return with_label(function(*args, **options), label)

        return call  # type: ignore[return-value]

    return decorate

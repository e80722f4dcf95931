"""Tensorlike: what stands wherever a tensor does, by its `values`.

    class Result(Tensorlike): values: Tensor
    result - 1, result > 0.5, result[0, 3], result.max(), float(result.at(layer=0, pos=3))
    torch.allclose(result, other), torch.as_tensor(result), numpy.asarray(result)

Each gives a bare tensor: whoever computes with numbers has left their names behind. Nothing is changed in place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def bare(value: Any) -> Any:
    """The values of whatever is Tensorlike, also in lists and tuples."""
    if isinstance(value, Tensorlike):
        return value.values
    return type(value)(map(bare, value)) if type(value) in (list, tuple) else value


def _left(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, other: function(self.values, bare(other))


def _right(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, other: function(bare(other), self.values)


def _alone(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self: function(self.values)


class Tensorlike:
    """`values` is the tensor."""

    values: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def __len__(self) -> int:
        return len(self.values)

    def __array__(self, *args: Any, **options: Any) -> Any:
        return self.values.detach().cpu().numpy().__array__(*args, **options)

    def __dlpack__(self, **options: Any) -> Any:  # torch.as_tensor and torch.tensor ask for it
        return self.values.detach().__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.values.__dlpack_device__()

    def __format__(self, how: str) -> str:
        return format(self.values, how) if how else str(self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "values":
            raise AttributeError(name)
        return getattr(self.values, name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*bare(args), **{key: bare(value) for key, value in (kwargs or {}).items()})

    __add__, __radd__ = _left(operator.add), _right(operator.add)
    __sub__, __rsub__ = _left(operator.sub), _right(operator.sub)
    __mul__, __rmul__ = _left(operator.mul), _right(operator.mul)
    __truediv__, __rtruediv__ = _left(operator.truediv), _right(operator.truediv)
    __matmul__, __rmatmul__ = _left(operator.matmul), _right(operator.matmul)
    __pow__, __rpow__ = _left(operator.pow), _right(operator.pow)
    __lt__, __le__ = _left(operator.lt), _left(operator.le)
    __gt__, __ge__ = _left(operator.gt), _left(operator.ge)
    __eq__, __ne__ = _left(operator.eq), _left(operator.ne)
    __hash__ = object.__hash__  # as a tensor: by identity
    __neg__, __abs__ = _alone(operator.neg), _alone(abs)
    __float__, __int__, __bool__ = _alone(float), _alone(int), _alone(bool)

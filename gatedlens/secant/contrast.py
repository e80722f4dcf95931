"""Contrast: an activation in the run of the input, beside what it is in the run of a reference. Whatever is computed from it is
one.

    x = Contrast.of(features, (reference,), RULES)
    y = F.silu(x @ W) * x                      # any code of torch: y is a Contrast, y.earlier[0] what it is of the reference
    torch.autograd.grad(y.sum(), x)            # the secant between the two runs where a derivative would stand

A Contrast is the tensor of the last run, and in `earlier` it has those of the runs before: the reference, then what stands
between it and the input (`steps`). Every run is computed as it would be alone, so no forward knows that there are several. What
differs is the gradient: of two neighbouring runs the rule of each operation gives a linear map that takes the difference of what
goes in to the difference of what comes out, *exactly*, and autograd strings these maps together from the end. Hence

    sum over (x - x') M = f(x) - f(x')         M the gradient under the rules

for any code whatsoever: each operation hands on what it is given (the page docs/secant.md has the proof). `rules` is a table by
the operations' names (rules.py); an operation that has none is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from gatedlens.errors import InputError

Rule = Callable[["Call"], Any]


class Contrast(Tensor):
    """See the head of this file. `earlier`: the same activation of the runs before, the reference first."""

    earlier: tuple[Tensor, ...]
    rules: Mapping[str, Rule]

    @staticmethod
    def of(value: Tensor, earlier: Sequence[Tensor], rules: Mapping[str, Rule]) -> Contrast:
        """`Contrast.of(x, (reference,), RULES)`: `x`, and what it is in the runs before, in order."""
        with torch._C.DisableTorchFunctionSubclass():
            found = value.as_subclass(Contrast)
        found.earlier, found.rules = tuple(earlier), rules
        return found

    @property
    def runs(self) -> tuple[Tensor, ...]:
        """Every run's, the reference's first and the input's last, each in the graph of its own gradient."""
        return (*self.earlier, self)

    @property
    def plain(self) -> tuple[Tensor, ...]:
        """Every run's as a plain tensor without a gradient."""
        with torch._C.DisableTorchFunctionSubclass():
            return tuple(run.detach().as_subclass(Tensor) for run in self.runs)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            call = Call(func, args, kwargs or {})
            return call.rule()(call)


class Call:
    """One operation, as it was called: the function, what it is given in each run, and the rules of who called."""

    def __init__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]):
        self.func = func
        self.leaves, self.form = tree_flatten((args, dict(kwargs)))
        self.places = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Contrast)]
        one = self.leaves[self.places[0]]
        self.number = len(one.earlier) + 1
        self.rules: Mapping[str, Rule] = one.rules

    @property
    def name(self) -> str:
        """What the function is called."""
        return str(self.func.__name__)

    def rule(self) -> Rule:
        """The rule for it; InputError where there is none."""
        if self.name in self.rules:
            return self.rules[self.name]
        raise InputError(
            f"Secant relevance has no rule for {self.name!r} ({self.func}), so what it passes on cannot be told. A forward in "
            "other operations has one, or give the rules a line: `{**RULES, 'name': rule}`; see gatedlens/secant/rules.py."
        )

    def given(self, run: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of a run; what is the same in all of them is held: no gradient goes there."""
        leaves = [
            (leaf.runs[run] if isinstance(leaf, Contrast) else leaf.detach()) if isinstance(leaf, Tensor) else leaf
            for leaf in self.leaves
        ]
        args, kwargs = tree_unflatten(leaves, self.form)
        return args, kwargs

    def outcome(self, run: int) -> Any:
        """What the function gives in a run."""
        args, kwargs = self.given(run)
        return self.func(*args, **kwargs)

    def values(self) -> list[Any]:
        """The same of every run, without a gradient."""
        with torch.no_grad():
            return [self.outcome(run) for run in range(self.number)]

    def wrapped(self, outs: Sequence[Any]) -> Any:
        """What the runs give as one: a Contrast at each tensor."""
        return tree_map(lambda *each: self.together(each) if isinstance(each[-1], Tensor) else each[-1], *outs)

    def together(self, each: Sequence[Tensor]) -> Contrast:
        """The tensors of every run as a Contrast."""
        return Contrast.of(each[-1], each[:-1], self.rules)

    def valued(self, values: Sequence[Tensor], flow: Callable[[int], Tensor]) -> Contrast:
        """The values as they are; the gradient of run `i`, which is that of its secant with run i - 1, is the gradient of
        `flow(i)`."""
        return self.together([values[0], *(Valued.apply(flow(run), values[run]) for run in range(1, self.number))])


class Valued(Function):
    """A value with the gradient of another tensor."""

    @staticmethod
    def forward(ctx: Any, flow: Tensor, value: Tensor) -> Tensor:
        ctx.dtype = flow.dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].to(ctx.dtype), None


class Sloped(Function):
    """A value whose gradient is that of slope * z: Dg = slope Dz."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, slope: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        ctx.shape, ctx.dtype = z.shape, z.dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (grads[0] * ctx.saved_tensors[0]).sum_to_size(ctx.shape).to(ctx.dtype), None, None


def difference(x: Contrast) -> list[Tensor]:
    """What each step adds, from the reference on: its sum is x - x'."""
    runs = x.plain
    return [after - before for before, after in pairwise(runs)]

"""The HookPoint: TransformerLens's, with its row, and aware of whether anybody listens.

y = self.hook_y(y)                         # an eager point: identity, unless a hook edits it
if self.hook_state.heard():                # a lazy point: ask right before building its tensor
    states = self.hook_state(states)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import transformer_lens.hook_points
from torch import Tensor
from torch.nn.modules import module as torch_module
from transformer_lens.hook_points import LensHandle

from gatedlens.address.point import Point
from gatedlens.errors import CheckpointError, HookError, InputError
from gatedlens.model.watch import AGAIN
from gatedlens.model.weights import NamedWeights
from gatedlens.recurrence.transforms import transformed

NNSIGHT = "__nnsight__"  # where nnsight 0.8 keeps a wrapped module's state


def _wanted(interleaver: Any, location: str) -> bool:
    """Whether a cache of the trace observes `location`, or a worker is parked on it and on this very visit."""
    if location in interleaver.observers:
        return True
    return location in interleaver.parked and bool(interleaver._ready(location))


class Saver:
    """A hook that only reads: it keeps a copy, so a point that has no other listener need not protect its tensor."""

    def __call__(self, tensor: Tensor, hook: Any) -> None:
        raise NotImplementedError


class Capture:
    """A hook that notes an activation as it leaves its point, after every other hook: `values[name]`."""

    def __init__(self, values: dict[str, Tensor]):
        self.values = values

    def __call__(self, tensor: Tensor, hook: Any) -> None:
        self.values[hook.name] = tensor


class ByPosition:
    """A hook that does to each position of each row what it does to it alone, whatever else is in the batch."""

    def __call__(self, tensor: Tensor, hook: Any) -> Tensor | None:
        raise NotImplementedError


def _torch_hooks_everywhere() -> bool:
    """Whether torch has hooks that hear every module (torch.nn.modules.module.register_module_..._hook)."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


class HookPoint(transformer_lens.hook_points.HookPoint):
    """`HookPoint(Point("hook_y", ...))`: the identity, at which hooks read and edit an activation.

    A hook gets its own copy and may edit it in place or return another tensor of the same shape, dtype and device;
    either takes effect downstream. `visits` counts how often somebody was served.
    """

    def __init__(self, point: Point):
        super().__init__()
        self.point = point
        self.visits = 0
        self.pos_dim = point.dims.index("pos") if "pos" in point.dims else None

    def add_hook(
        self,
        hook: Callable[..., Any],
        dir: str = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
        alias_names: list[str] | None = None,
    ) -> LensHandle:
        """`point.add_hook(f)`: run `f(activation, hook=point)` at every visit; what it returns, if anything, goes on in
        its place.

        As TransformerLens's. dir: "fwd", or "bwd" for `f(gradient, hook=point)`. A backward hook gets its own copy of the
        gradient of the point's (edited) output; what it returns, or does to the copy, goes on from there through the
        forward hooks. InputError for another `dir`.
        """
        if dir not in ("fwd", "bwd"):
            raise InputError(f"dir={dir!r}: a hook runs in the forward, 'fwd', or on the gradient, 'bwd'.")
        if dir == "fwd":
            return super().add_hook(hook, dir, is_permanent, level, prepend, alias_names)

        def on_gradient(module: Any, grads: Any) -> Any:
            if grads[0] is None:
                return None
            grad = grads[0].clone()
            out = hook(grad, hook=self)
            if out is None:  # it looked, or it wrote into its copy: torch counts writes in `_version`
                return (grad,) if grad._version else None
            if isinstance(out, tuple) and len(out) == 1:
                (out,) = out
            self._check(out, grad, "backward hook", "gradient")
            return (out,)

        # A pre-hook sees the gradient of the module's output, the edited activation. TransformerLens registers a full backward
        # hook, which would replace the gradient of the input: wrong as soon as a forward hook edits here as well.
        handle = LensHandle(
            self.register_full_backward_pre_hook(on_gradient, prepend=prepend), is_permanent, level, user_hook=hook
        )
        self.bwd_hooks.insert(0 if prepend else len(self.bwd_hooks), handle)
        return handle

    def remove_hooks(self, dir: str = "fwd", including_permanent: bool = False, level: int | None = None) -> None:
        """`point.remove_hooks("both")`: take off the hooks of a direction ("fwd", "bwd" or "both") and of a level, as
        TransformerLens's.

        Permanent ones stay unless `including_permanent`.
        """
        if self.fwd_hooks or self.bwd_hooks:
            super().remove_hooks(dir, including_permanent, level)

    def forward(self, x: Tensor | None) -> Tensor | None:
        """`point.forward(x)`: x. Behind a backward hook a copy, since torch hands in a view that must not be edited in place."""
        return x.clone() if x is not None and (self._backward_hooks or self._backward_pre_hooks) else x

    def hooked(self) -> bool:
        """`point.hooked()`: whether any torch hook would run here (TransformerLens's hooks are torch hooks)."""
        return bool(
            self._forward_hooks
            or self._forward_pre_hooks
            or self._backward_hooks
            or self._backward_pre_hooks
            or _torch_hooks_everywhere()
        )

    def at_rest(self) -> bool:
        """`point.at_rest()`: whether nobody can be listening: no hook of any kind, and no nnsight trace running.

        TransformerLens's handles are asked first, by themselves: torch.compile guards lists, but no torch hooks.
        """
        if self.fwd_hooks or self.bwd_hooks or self.hooked():
            return False
        # nnsight wraps a module without a hook: only its own state tells whether a trace is running.
        return NNSIGHT not in self.__dict__ or not self._traced()

    def _nnsight(self) -> tuple[Any, Any]:
        """The interleaver of the nnsight trace that is running, with this module's locations; None outside one."""
        state = self.__dict__.get(NNSIGHT)
        if state is None:
            return None, ()
        interleaver, _, locations = state.active()
        return interleaver, locations

    def _traced(self) -> bool:
        """Whether an nnsight trace is running over this module; it is taken to be, if nnsight's internals are unknown."""
        try:
            return self._nnsight()[0] is not None
        except (AttributeError, TypeError, ValueError):
            return True

    def heard(self) -> bool:
        """`if point.heard(): x = point(x)`: whether somebody wants this visit, a torch hook of any kind or a running
        nnsight trace.

        Ask right before firing: an nnsight worker announces its next location only once it has been served the last. A
        visit that a trace does not want is counted all the same, so that `tracer.iter` stays in step.
        """
        if self.hooked():
            return True
        if NNSIGHT not in self.__dict__:
            return False
        try:
            interleaver, locations = self._nnsight()
            if interleaver is None:
                return False
            wanted = any(_wanted(interleaver, location) for location in locations)
        except (AttributeError, TypeError, ValueError):
            return True  # an nnsight whose internals we do not know: somebody may listen
        if not wanted and self.point.lazy:
            super().__call__(None)
        return wanted

    def __call__(self, x: Tensor) -> Tensor:
        if self.at_rest():
            return x
        if self.bwd_hooks and x.requires_grad and transformed():
            raise HookError(
                f"A backward hook is on {self.name or self.point.name}, inside torch.func or forward-mode differentiation: torch "
                "runs no backward hooks there. Take the gradient by torch.autograd.grad or .backward(), or edit the activation "
                "in a forward hook."
            )
        self.visits += 1
        # A hook may write into what it gets. A copy keeps the original for the autograd graph and for whoever else holds it;
        # savers copy for themselves, so a run that only caches pays for one copy, not for two.
        given = x if self.only_saved() else x.clone()
        out = super().__call__(given)
        if out is not given:  # somebody returned another tensor
            self._check(out, x)
        for handle in self.fwd_hooks:
            if isinstance(handle.user_hook, Capture):
                handle.user_hook(out, hook=self)  # once more, with what the hooks behind it made of it
        return out

    def only_saved(self) -> bool:
        """`point.only_saved()`: whether every listener is a Saver, which copies for itself. More torch hooks than
        TransformerLens has handles
        means that somebody registered one with torch directly.
        """
        return self._only(Saver)

    def only_by_position(self) -> bool:
        """`point.only_by_position()`: whether what its listeners do depends on no other row and position."""
        return self._only((Saver, ByPosition))

    def _only(self, kinds: type | tuple[type, ...]) -> bool:
        """Whether every listener is a hook of these kinds."""
        return (
            len(self._forward_hooks) == len(self.fwd_hooks)
            and all(isinstance(handle.user_hook, kinds) for handle in self.fwd_hooks)
            and not (NNSIGHT in self.__dict__ and self._traced())
            and not self._forward_pre_hooks
            and not _torch_hooks_everywhere()
        )

    def _check(self, out: Any, x: Tensor, hook: str = "hook", what: str = "activation") -> None:
        where = f"The {hook} at {self.name or self.point.name} ({self.point.axes})"
        if not isinstance(out, Tensor):
            raise HookError(f"{where} returned {type(out).__name__}; return a tensor, or None to leave it as it is.")
        if out.shape != x.shape:
            raise HookError(f"{where} returned shape {list(out.shape)}; the {what} has shape {list(x.shape)}.")
        if out.dtype != x.dtype:
            raise HookError(f"{where} returned {out.dtype}; the {what} is {x.dtype}: return `value.to({x.dtype})`.")
        if out.device != x.device:
            raise HookError(f"{where} returned a tensor on {out.device}; the {what} is on {x.device}.")


RECURRENT, ATTENTION, CONV, MLP, EXPERTS = "recurrent", "attention", "conv", "mlp", "experts"  # what stands in a layer
NORM = "norm"  # what norms the residual stream itself: no kind of layer, it mixes neither tokens nor channels


class Part(NamedWeights, torch.nn.Module):
    """A piece of the open forward: hook points of its own, parameters of the wrapped module's.

    `weights` is a reference to the wrapped module and not a submodule: its parameters stay where they are and are
    read at call time, so a later `load_state_dict(assign=True)` is seen.
    """

    weights: Any
    role: ClassVar[str] = MLP  # one word for what it is in a layer, for `gl.layers.where`

    if TYPE_CHECKING:  # hook points are attributes, named by rows

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, weights: Any, rows: tuple[Point, ...]):
        super().__init__()
        self.__dict__["weights"] = weights
        for row in rows:
            if not row.part:
                self.add_module(row.leaf, HookPoint(row))

    def read_as(self, fresh: Part) -> None:
        """Read the weights and numbers that `fresh` does, which was made of the same model at a later time."""
        for name, value in vars(fresh).items():
            if not (name.startswith("_") or name == "training" or isinstance(value, Part)):
                self.__dict__[name] = value

    def at_rest(self) -> bool:
        """Whether nobody can be listening at any point of this piece."""
        return all(point.at_rest() for point in self.children() if isinstance(point, HookPoint))


def same(old: torch.nn.Module, fresh: torch.nn.Module) -> list[tuple[Part, Part]]:
    """Each part of `fresh` beneath the part of `old` in its place, outermost first; CheckpointError where they differ in
    kind. `old` may stand inside a wrapper (of FSDP, say)."""
    inner = next((part for part in old.modules() if isinstance(part, type(fresh))), None)
    kin = {name: child for name, child in fresh.named_children() if isinstance(child, Part | HookPoint)}
    if not isinstance(inner, Part) or not isinstance(fresh, Part) or not kin.keys() <= inner._modules.keys():
        raise CheckpointError(
            f"A layer of the wrapped model is of another kind than when it was wrapped (a {type(fresh).__name__} now), so its "
            f"hook points are others. {AGAIN}"
        )
    pairs = [(inner, fresh)]
    for name, child in kin.items():
        if isinstance(child, Part):
            pairs += same(inner.get_submodule(name), child)
    return pairs


def rows_of(part: str, rows: tuple[Point, ...]) -> tuple[Point, ...]:
    """The rows under `part`, named relative to it: `rows_of("mixer", rows)` holds `hook_x` for `mixer.hook_x`."""
    stem = f"{part}."
    return tuple(replace(row, name=row.name[len(stem) :]) for row in rows if row.name.startswith(stem))

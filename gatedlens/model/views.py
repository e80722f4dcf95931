"""Hooks on views: what another tool calls a hook point and we compute from several.

`model.add_hook("blocks.1.hook_h.3", edit)` captures the points behind MambaLens's name as they fire and, at the last of
them, lets `edit` see the tensor that it expects and writes the effect of its edit back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gatedlens.address.point import Found
from gatedlens.errors import HookError, PointError
from gatedlens.model.hookpoint import Capture

if TYPE_CHECKING:  # base.py imports this file, through hooking.py
    from gatedlens.model.base import HookedModel
else:
    HookedModel = Any


@dataclass
class ViewPoint:
    """What a hook on a view gets as its `hook`: the name that was asked for, a layer, a place for notes."""

    name: str
    at: int
    ctx: dict[str, Any] = field(default_factory=dict)

    def layer(self) -> int:
        return self.at


class Visit:
    """All hooks on one view of one layer, at one context level: they act together, whatever order they came in."""

    def __init__(self, model: HookedModel, found: Found, level: int | None, permanent: bool):
        self.model = model
        self.found = found
        self.level = level
        self.permanent = permanent
        self.values: dict[str, Tensor] = {}
        self.calls: list[tuple[dict[str, int], Callable[[Tensor], Tensor]]] = []

    @classmethod
    def add(
        cls,
        model: HookedModel,
        found: Found,
        hook: Callable[..., Any],
        dir: str,
        permanent: bool,
        level: int | None,
    ) -> None:
        """Put `hook` on the view `found`: beside its kin if there are any, else with captures of its own."""
        view = found.view
        assert view is not None
        if view.visit is None:
            raise PointError(f"{found.asked} can be read from a cache and not hooked: {view.instead}.")
        if dir != "fwd":
            raise PointError(f"{found.asked} has no gradient of its own; hook {', '.join(found.at())} backward.")
        last = model.hook_dict[found.at()[-1]]
        for handle in last.fwd_hooks:
            kin = handle.user_hook
            if isinstance(kin, cls) and kin._is_kin(found, level, permanent):
                kin.calls.append((dict(found.params), kin._call(found, hook)))
                return
        visit = cls(model, found, level, permanent)
        visit.calls.append((dict(found.params), visit._call(found, hook)))
        for name in found.at()[:-1]:
            model.hook_dict[name].add_hook(Capture(visit.values), is_permanent=permanent, level=level)
        last.add_hook(visit, is_permanent=permanent, level=level)

    def _is_kin(self, found: Found, level: int | None, permanent: bool) -> bool:
        mine = (self.found.view, self.found.layer, self.level, self.permanent)
        return mine == (found.view, found.layer, level, permanent)

    def _call(self, found: Found, hook: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        """`hook` as a function from tensor to tensor that has its result checked."""
        alias = ViewPoint(found.asked, found.layer)

        def call(tensor: Tensor) -> Tensor:
            out = hook(tensor, hook=alias)
            if out is None:
                return tensor
            if not isinstance(out, Tensor) or out.shape != tensor.shape or out.dtype != tensor.dtype:
                got = f"{list(out.shape)} {out.dtype}" if isinstance(out, Tensor) else type(out).__name__
                raise HookError(
                    f"The hook at {found.asked} returned {got}; it got {list(tensor.shape)} {tensor.dtype}."
                )
            return out

        return call

    def __call__(self, tensor: Tensor, hook: Any) -> Tensor:
        """At the last point: compute, let the hooks edit, and return what this point must be for the edits to hold."""
        values = [self.values.pop(name) for name in self.found.at()[:-1]]
        view = self.found.view
        assert view is not None and view.visit is not None
        return view.visit(self.model, self.found.layer, [*values, tensor], self.calls)

"""Movement: the step of an intervention that moves vectors of an activation, at some positions of some rows.

    step = Movement(frame, lambda v, row, nth: source[row, nth] - v, pos=-1)
    Intervention((step,)).on(model)

`move` says by how much each vector moves: (vectors [some other d], row [some], nth [some]) -> [some other d], `nth` counting a
row's chosen positions. A state is moved for good: what a move D adds to state_t is in all that follows,

    D_t = move,   D_u = decay_u D_{u-1} - erase_u (probe_u . D_{u-1})   (u > t)        state_u += D_u

which is what the recurrence makes of a write that is D_t larger. It reaches the state that a call leaves, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gatedlens.address.positions import Positions
from gatedlens.errors import InputError
from gatedlens.model.base import HookedModel
from gatedlens.model.hookpoint import Capture, HookPoint
from gatedlens.model.state import RecurrentState
from gatedlens.recurrence.delta_states import states_of_delta_rule
from gatedlens.recurrence.micro_steps import at_step
from gatedlens.recurrence.scanning import at_least_float32, linear_scan
from gatedlens.runs.vectors import Frame, back, by_place, chosen

Move = Callable[[Tensor, Tensor, Tensor], Tensor]
STATE = ".hook_state"


@dataclass(frozen=True)
class Movement:
    """One step: vectors of `frame`, `width` numbers wide, move at `pos` of the rows where `rows` is True (None: of all).
    fitted: on which model they were found, for the error of who puts them on another.
    """

    frame: Frame
    move: Move
    width: int
    pos: Positions = None
    rows: Bool[Tensor, " batch"] | None = None
    fitted: str = "unnamed"

    def hooks(self, model: HookedModel) -> list[tuple[str, Callable[..., Any]]]:
        """`step.hooks(model)`: [(name, hook)], in the order in which they must be put on. PointError for a model without the
        point, InputError for one whose vectors have another width.
        """
        places = self.frame.places(model)
        check_width(model, self.frame, self.width, self.fitted)
        setting = Moving(self, model, places)
        if not self.frame.name.endswith(STATE):
            return [(self.frame.name, setting.moved)]
        stem = self.frame.name.removesuffix("hook_state")
        inside = [name for name in ("decay", "erase", "probe") if f"{stem}hook_{name}" in model.names]
        values: dict[str, Tensor] = {}
        heard: list[tuple[str, Callable[..., Any]]] = [(f"{stem}hook_{name}", Capture(values)) for name in inside]
        state = MovingState(setting, stem, values)
        return [*heard, (self.frame.name, state.moved), (f"{stem}hook_scan", state.left)]


def check_width(model: HookedModel, frame: Frame, width: int, fitted: str) -> None:
    """`check_width(model, frame, 64, "mamba-130m")`: PointError for a model without the point of `frame`, InputError for one
    whose vectors there have another width.
    """
    there = frame.width(model)
    if there != width:
        raise InputError(
            f"This is of vectors of {width} numbers at {frame.said}; {model.cfg.model_name} has {there} there: it is from "
            f"another model ({fitted})."
        )


def as_far(move: Float[Tensor, "*any d"], reference: Float[Tensor, "*any d"]) -> Float[Tensor, "*any d"]:
    """`as_far(move, reference)`: each move the way it goes, as long as the reference is."""
    length = move.norm(dim=-1, keepdim=True)
    return move * (reference.norm(dim=-1, keepdim=True) / length.clamp(min=torch.finfo(move.dtype).tiny))


@dataclass(frozen=True)
class Moving:
    """The hook of a movement on a model; `places` are where its vectors' numbers stand."""

    step: Movement
    model: HookedModel
    places: Int[Tensor, "other d"]

    def moved(self, x: Tensor, hook: HookPoint) -> Tensor:
        """x with its vectors moved."""
        return back(by_place(x, hook.point) + self.change(x, hook), x, hook.point)

    def change(self, x: Tensor, hook: HookPoint) -> Float[Tensor, "batch pos entry"]:
        """By how much x moves; 0 where it does not."""
        flat, places = by_place(x, hook.point), self.places.to(x.device)
        mask = self._where(flat, hook)
        row, at = mask.nonzero(as_tuple=True)
        nth = (mask.cumsum(1) - 1)[row, at]
        by = self.step.move(at_least_float32(flat[row, at][:, places]), row, nth)
        change = torch.zeros_like(flat)
        change[row.unsqueeze(1), at.unsqueeze(1), places.flatten()] = by.flatten(1).to(flat.dtype)
        return change

    def _where(self, flat: Tensor, hook: HookPoint) -> Bool[Tensor, "batch pos"]:
        real = self.model.current().padding.mask
        real = torch.ones(flat.shape[:2], dtype=torch.bool) if real is None else real
        mask = chosen(self.step.pos, real.cpu(), hook.point)
        rows = self.step.rows
        if rows is not None:
            if len(rows) != len(mask):
                raise InputError(f"rows says of {len(rows)} rows whether they are meant; the run has {len(mask)}.")
            mask = mask & rows.cpu().unsqueeze(1)
        return mask.to(flat.device)


@dataclass
class MovingState:
    """The hooks of a movement of a state: `values` are what decay, erase and probe held in this call, by point."""

    setting: Moving
    stem: str
    values: dict[str, Tensor]
    last: Tensor | None = None

    def moved(self, x: Tensor, hook: HookPoint) -> Tensor:
        """Every state from the position on, with what is left of the move."""
        change = self.setting.change(x, hook)
        places = change.detach().any(-1)
        if bool((places.sum(1) > 1).any()):
            raise InputError(f"{hook.name}: a state is moved at one position of each row; pos says several.")
        write = back(change, x, hook.point)
        mixer, padding = self._mixer(), self.setting.model.current().padding
        decay, erase, probe = (self.values.pop(f"{self.stem}hook_{n}", None) for n in ("decay", "erase", "probe"))
        assert decay is not None
        decay = padding.fill(decay, 1.0)
        if erase is None or probe is None:
            states = linear_scan(mixer.along(decay), mixer.along(write))
        else:
            states = _under_a_delta_rule(decay, write, padding.zero(erase), padding.zero(probe))
        self.last = states[:, -1]
        return x + mixer.along(states)

    def _mixer(self) -> Any:
        return self.setting.model.get_submodule(self.stem.removesuffix("."))

    def left(self, scan: Tensor, hook: HookPoint) -> None:
        """The state that the call leaves, which the recurrence gave out before hook_state was heard, has the move in it."""
        left, last, layer = self.setting.model.current().left, self.last, self._mixer().layer
        self.last = None
        if left is None or last is None:
            return
        whole, top = (RecurrentState.key(name, layer) for name in ("scan", "max"))
        if whole in left:
            left[whole] = left[whole] + last.to(left[whole]).reshape(left[whole].shape)
            return
        for i, name in enumerate(("num", "den")):  # RWKV-4 leaves both relative to a maximum
            key = RecurrentState.key(name, layer)
            left[key] = left[key] + (last[..., i] * torch.exp(-left[top].to(last))).to(left[key])


def _under_a_delta_rule(decay: Tensor, write: Tensor, erase: Tensor, probe: Tensor) -> Tensor:
    """What is left of `write` at each position; of several steps a position behind the last of them."""
    nothing = torch.zeros_like(write[:, 0])
    if erase.ndim == write.ndim:
        return states_of_delta_rule(decay, write, erase, probe, nothing)
    n = erase.shape[2]
    long = at_step(decay, 0, n, otherwise=1.0), at_step(write, -1, n), erase.flatten(1, 2), probe.flatten(1, 2)
    return states_of_delta_rule(*long, nothing)[:, n - 1 :: n]

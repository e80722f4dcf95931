"""StatePatch: the step of an intervention that sets the state of a recurrence. `surgery.py` is its face.

decay[t] := 0,  erase[t] := 0 (of a delta rule),  write[t] := the new state    so state_t is the new state, later ones follow
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from gatedlens.address.entries import Index, Where
from gatedlens.address.layers import Layers, layers_of, scans_of
from gatedlens.address.positions import Positions, one_a_row
from gatedlens.errors import InputError, PointError
from gatedlens.model.base import HookedModel
from gatedlens.model.cache import ActivationCache
from gatedlens.model.hookpoint import HookPoint
from gatedlens.model.state import RecurrentState

# Where the new state comes from. For editors and type checkers: whoever passes something else gets the error of `_state`.
if TYPE_CHECKING:
    Source: TypeAlias = ActivationCache | Mapping[str, Tensor] | RecurrentState | Tensor
else:
    Source = Any


@dataclass(frozen=True)
class StatePatch:
    """One step of an intervention: a state set."""

    source: Source
    pos: Positions
    layers: Layers
    source_pos: Positions
    scan: str | None
    index: Mapping[str, Index]

    def hooks(self, model: HookedModel) -> list[tuple[str, Callable[..., Any]]]:
        """At decay, erase and write of each scan; everything but the positions is checked here."""
        for axis in ("batch", "pos"):
            if axis in self.index:
                raise InputError(
                    f"{axis}={self.index[axis]!r}: a state patch says its position by pos, and patches every row."
                )
        found: list[tuple[str, Callable[..., Any]]] = []
        for layer in self._layers(model):
            mixer: Any = model.blocks[layer].mixer
            for name in scans_of(mixer, self.scan):
                stem = f"blocks.{layer}.{mixer.place}.{name + '.' if name else ''}"
                setting = Setting(self, model, layer, stem, self._state(mixer, stem))
                edits = {"decay": setting.forget, "erase": setting.forget, "write": setting.set}
                edits = {
                    f"{stem}hook_{name}": edit for name, edit in edits.items() if f"{stem}hook_{name}" in model.names
                }
                found += zip(Where(tuple(edits), self.index).points(model), edits.values(), strict=True)
        return found

    def _layers(self, model: HookedModel) -> list[int]:
        """The layers that are meant; one that has no recurrence only if nobody named it."""
        chosen = layers_of(model, self.layers)
        mixers = {layer: mixer for layer, mixer in model.mixers.items() if layer in chosen}
        has = [n for n, mixer in mixers.items() if _scan_points(model, n, mixer)]
        lacking = [layer for layer in chosen if layer not in has]
        if lacking and (self.layers is not None or not has):
            mixer = mixers.get(lacking[0])
            how = "it mixes no tokens" if mixer is None else f"its tokens mix under {mixer.place}"
            raise PointError(
                f"Layer {lacking[0]} of {model.cfg.model_name} has no recurrence ({how}), so no state to patch. What it "
                "remembers between calls moves by gl.states.splice."
            )
        return has

    def _state(self, mixer: Any, stem: str) -> Tensor:
        """The new state, or (from a cache) the states of all positions."""
        if isinstance(self.source, Tensor):
            return self.source
        if isinstance(self.source, RecurrentState):
            return mixer.state_of(self.source)
        name = f"{stem}hook_state"
        if isinstance(self.source, ActivationCache) and self.source.sliced:
            raise InputError(
                "This cache keeps only some positions (pos_slice); a state patch needs the numbering of all."
            )
        if isinstance(self.source, ActivationCache) and not self.source.has_batch_dim:
            raise InputError("This cache was made with remove_batch_dim=True; a state patch needs the batch axis.")
        try:
            return self.source[name]
        except (KeyError, TypeError) as error:
            raise PointError(
                f"The source holds no {name}: run_with_cache(..., names_filter='*.hook_state')."
            ) from error


def _scan_points(model: HookedModel, layer: int, mixer: Any) -> bool:
    """Whether the scans of a layer are recurrences."""
    return all(f"blocks.{layer}.{mixer.place}.{s + '.' if s else ''}hook_decay" in model.names for s in mixer.scans)


@dataclass(frozen=True)
class Setting:
    """The hooks that set one scan's state: decay and erase 0 and write `state` at the position of each row."""

    patch: StatePatch
    model: HookedModel
    layer: int
    stem: str
    state: Tensor

    def _entries(self, tensor: Tensor, hook: HookPoint) -> Tensor:
        """True at the position of each row, in the channels that are meant."""
        rows, length = tensor.shape[:2]
        mask = self.model.current().padding.mask
        pos = one_a_row(self.patch.pos, "pos", _everywhere(tensor) if mask is None else mask).to(tensor.device)
        at = torch.arange(length, device=tensor.device) == pos.unsqueeze(1)
        chosen = Where((), self.patch.index).entries(
            tensor.shape, hook.point, tensor.device, sizes=self.model.cfg.sizes
        )
        return at.reshape(rows, length, *[1] * (tensor.ndim - 2)) & chosen

    def forget(self, kept: Tensor, hook: HookPoint) -> Tensor:
        """decay[t] := 0, erase[t] := 0"""
        return torch.where(self._entries(kept, hook), 0.0, kept)

    def set(self, write: Tensor, hook: HookPoint) -> Tensor:
        """write[t] := the new state"""
        return torch.where(self._entries(write, hook), self._new(write).unsqueeze(1), write)

    def _new(self, write: Tensor) -> Tensor:
        """The state for each row, as one position of `write`."""
        new, rows = self.state.to(write), len(write)
        if not isinstance(self.patch.source, Tensor | RecurrentState):
            given = self.patch.pos if self.patch.source_pos is None else self.patch.source_pos
            if len(new) not in (1, rows):
                raise InputError(f"The source's {self.stem}hook_state has {len(new)} rows; the run has {rows}.")
            mask = self.patch.source.mask if isinstance(self.patch.source, ActivationCache) else None
            real = (_everywhere(new) if mask is None else mask.bool()).expand(rows, -1)
            place = one_a_row(given, "source_pos", real).to(new.device)
            new = new.expand(rows, *new.shape[1:])[torch.arange(rows, device=new.device), place]
        wanted = (rows, *write.shape[2:])
        if tuple(new.shape) != wanted and tuple(new.shape) != (1, *wanted[1:]):
            raise InputError(
                f"The new state of {self.stem}hook_state has shape {list(new.shape)}; it must be {list(wanted)}."
            )
        return new.expand(wanted)


def _everywhere(x: Tensor) -> Tensor:
    """The positions of an activation without padding."""
    return torch.ones(x.shape[:2], dtype=torch.bool)

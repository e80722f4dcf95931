"""Where: some entries of some points of some layers, resolved and checked against a model.

    Where(("blocks.*.mixer.hook_write",), {"pos": 3, "channel": slice(0, 64)})
    Where(("blocks.{l}.hook_m*_out",), layers=-1)
    Where((Component("gate", "hook_gate", "gate"),), layers=[0, 2])

Components are parts that an architecture may lack; then the error quotes what it says of itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy
import torch
from jaxtyping import Bool
from torch import Tensor

from gatedlens.address.layers import Layers, layers_of
from gatedlens.address.names import Name, Names, is_placed
from gatedlens.address.point import MADE_OF, Point, refuse_overlap
from gatedlens.address.positions import mask_of
from gatedlens.errors import InputError, PointError

if TYPE_CHECKING:
    from gatedlens.model.base import HookedModel
else:  # that file imports this one
    HookedModel = Any

# What `channel=`, `state=`, any axis takes, or a dict of the parts of a model to these; see `positions.Positions`.
if TYPE_CHECKING:
    Index: TypeAlias = int | slice | Sequence[Any] | numpy.ndarray[Any, Any] | Tensor | Mapping[str, Any]
else:
    Index = Any

if TYPE_CHECKING:  # the address knows no model at run time: `model` here is whatever has `cfg` and `names`
    from gatedlens.model.base import HookedModel
else:
    HookedModel = Any


@dataclass(frozen=True)
class Component:
    """A part that mixers of some architectures have: `what` it is called, the `leaf` of its point, and `word`, the key
    under which an architecture's `recurrence` says what it has there ("none ..." if it has none)."""

    what: str
    leaf: str
    word: str

    def lacks(self, model: HookedModel) -> str | None:
        """`component.lacks(model)`: what the architecture says where it has no such part; None where it has it."""
        said = str(model.recurrence.get(self.word, ""))
        return said if said.startswith("none") else None

    def points(self, model: HookedModel, layers: Layers) -> list[str]:
        """`component.points(model, "*")`: the full names of its points in some layers: those that have it if `layers` is a
        pattern, else all of them.
        """
        said = self.lacks(model)
        if said is not None:
            raise PointError(f"{model.title} has no {self.what}: its recurrence says {self.word}: {said!r}.")
        if not any(name.endswith(f".{self.leaf}") for name in model.names):
            raise PointError(f"{model.title} has no {self.what}: no block of {model.cfg.model_name} has a {self.leaf}.")
        found = []
        for layer in layers_of(model, layers):
            prefix = f"blocks.{layer}.mixer."
            own = [name for name in model.names if name.startswith(prefix) and name.endswith(f".{self.leaf}")]
            if not own and not isinstance(layers, str | slice | None):
                raise PointError(
                    f"Layer {layer} of {model.cfg.model_name} has no {self.what}: it mixes tokens by "
                    f"{model.blocks[layer].mixer.place!r}. A pattern of layers ('*') passes over such layers."
                )
            found += own
        if not found:
            raise PointError(f"No layer of layers={layers!r} of {model.cfg.model_name} has a {self.what}.")
        return found


@dataclass(frozen=True)
class Where:
    """Some entries of some points: `Where(("blocks.*.mixer.hook_write",), {"pos": 3})`.

    An index is a number, slice, list or boolean mask; or, where parts differ, a mapping of the parts of the model to these:
    `{"blocks.0.mixer": [3, 5], ...}`. `pos` may go by row as well, a tensor [batch]: see `positions.py`; positions are the
    real ones of the call. `layers` replaces {l} in names.
    `others`: all entries but these.
    """

    names: tuple[Name | Component, ...]
    index: Mapping[str, Any] = field(default_factory=dict)
    layers: Layers = "*"
    others: bool = False

    def points(self, model: HookedModel) -> list[str]:
        """`where.points(model)`: the full names that are meant, each checked to have the axes and the indices."""
        found = dict.fromkeys(one for name in self.names for one in self._named(model, name))
        if not found:
            raise PointError(f"{', '.join(map(str, self.names))} names views only; ablate the points behind them.")
        for name in found:
            self.check(name, model.names, model.cfg.sizes)
        return list(found)

    def _named(self, model: HookedModel, name: Name | Component) -> list[str]:
        if isinstance(name, Component):
            return name.points(model, self.layers)
        if not isinstance(name, str) and not is_placed(name):
            raise PointError(f"{name!r:.80} is no point: name one, or a list of names.")
        asked = [name]
        if isinstance(name, str) and "{l}" in name:
            asked = [name.replace("{l}", str(layer)) for layer in layers_of(model, self.layers)]
        return [one.name for each in asked for one in model.names.hooked(each) if one.view is None]

    def check(self, name: str, names: Names, sizes: Mapping[str, int]) -> None:
        """`where.check(name, model.names, sizes)`: refuse an axis that the point lacks, one beside a part of it, and an index
        that its size (if known) does not reach.
        """
        refuse_overlap(self.index)
        for axis, index in self.at(name).items():
            if not names.points[name].reaches(axis, sizes):
                raise names.lacking(name, axis, sizes)
            size = sizes.get(axis)
            if size is not None and axis != "pos":
                along(axis, index, size, name)

    def at(self, name: str) -> dict[str, Any]:
        """`where.at("blocks.3.mixer.hook_write")`: the indices that a point has, by axis."""
        return {axis: _of_part(index, axis, name) for axis, index in self.index.items()}

    def entries(
        self,
        shape: Sequence[int],
        point: Point,
        device: torch.device,
        name: str = "",
        real: Bool[Tensor, "batch pos"] | None = None,
        sizes: Mapping[str, int] | None = None,
    ) -> Tensor:
        """`where.entries(x.shape, point, x.device)`: a boolean mask that broadcasts to an activation of `shape`: True at
        the entries that are meant.

        real: where the rows of the call are no padding (None: everywhere). sizes: of the model's axes, where an index may go by
        a part of an axis: by `head` or `value` where a channel is (head value).
        """
        mask = torch.ones([1] * len(shape), dtype=torch.bool, device=device)
        for axis, index in self.at(name).items():
            whole = None if axis in point.dims else point.whole(axis, sizes or {})
            dims = point.spans(axis if whole is None else whole)
            if whole is not None:
                chosen = _of_whole(axis, index, whole, sizes or {}).to(device)
            elif axis == "pos":
                own = torch.ones(shape[0], shape[dims[0]], dtype=torch.bool) if real is None else real
                chosen, dims = mask_of(index, axis, own).to(device), (0, *dims)
            else:
                chosen = along(axis, index, math.prod(shape[d] for d in dims), "this activation").to(device)
            mask = mask & chosen.reshape([shape[d] if d in dims else 1 for d in range(len(shape))])
        return ~mask if self.others else mask


def _of_whole(axis: str, index: Any, whole: str, sizes: Mapping[str, int]) -> Tensor:
    """Which entries of an axis an index of one of its parts means: those of a head among channels [channel]."""
    parts = MADE_OF[whole]
    chosen = along(axis, index, sizes[axis], "this activation")
    spread = chosen.reshape([sizes[part] if part == axis else 1 for part in parts])
    return spread.expand([sizes[part] for part in parts]).flatten()


def _of_part(index: Any, axis: str, name: str) -> Any:
    """The index that the part of the model with the point `name` has."""
    if not isinstance(index, Mapping):
        return index
    for part, own in index.items():
        if name.startswith(f"{part}."):
            return own
    raise InputError(f"{axis}=... says nothing of {name}; it speaks of {', '.join(index)}.")


def _as_tensor(axis: str, index: Any) -> Tensor:
    try:
        return torch.as_tensor(index)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{axis}={index!r} is no index: give whole numbers, a slice or a boolean mask.") from error


def along(axis: str, index: Any, size: int, name: str) -> Tensor:
    """Which of the `size` entries of an axis an index means [size]; InputError for one that means none or too many."""
    chosen = torch.zeros(size, dtype=torch.bool)
    chosen[numbers(axis, index, size, name)] = True
    return chosen


def numbers(axis: str, index: Any, size: int, name: str) -> list[int]:
    """The numbers of the entries of an axis that an index means, as it orders them; errors as of `along`."""
    if isinstance(index, slice):
        found = list(range(size))[index]
    else:
        asked = _as_tensor(axis, index).cpu()
        if asked.dtype == torch.bool and tuple(asked.shape) != (size,):
            raise InputError(f"{axis}: a mask of shape {list(asked.shape)}; {name} has {size} of that axis.")
        if asked.is_floating_point() and asked.numel():
            raise InputError(f"{axis}={index} is no index: give whole numbers, a slice or a boolean mask.")
        if asked.dtype != torch.bool and asked.numel() and (asked.min() < -size or asked.max() >= size):
            raise InputError(f"{axis}={index} is out of range: {name} has {size} of that axis.")
        places = asked.nonzero() if asked.dtype == torch.bool else asked.long()
        found = [place % size for place in places.flatten().tolist()]
    if not found:
        raise InputError(f"{axis}={index} names no entry: {name} has {size} of that axis.")
    return found

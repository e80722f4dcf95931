"""Layers: which layers a user means.

3, -1, [0, 3], range(4), slice(2, 5), tensor([0, 3])      by number; negative ones count from the end
None, "*", "[01]", ["0", "1?"]                            all of them, or globs of their numbers
[True, False, ...], tensor([True, False, ...])            a mask of all layers
gl.layers.where(kind="attention")                         those in which that stands; of what mixes tokens in them, that alone
"""

from __future__ import annotations

import fnmatch
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy
from torch import Tensor

from gatedlens.errors import InputError, did_you_mean
from gatedlens.options import is_whole

if TYPE_CHECKING:
    from gatedlens.model.base import HookedModel
else:  # that file imports this one
    HookedModel = Any

# What `layers=` takes; see `positions.Positions` for why it is said to type checkers alone.
if TYPE_CHECKING:
    Layers: TypeAlias = "int | slice | str | Sequence[Any] | numpy.ndarray[Any, Any] | Tensor | Where | Mixers | None"
else:
    Layers = Any

if TYPE_CHECKING:  # the address knows no model at run time: `model` here is whatever has `cfg` and `names`
    from gatedlens.model.base import HookedModel
else:
    HookedModel = Any

ONE = ("layer={!r}", "layer={!r}:")  # how a refusal begins: of what is no number, of what is out of range
START = ("start_layer={!r}: a whole number is meant; it", "start_layer={!r}:")
SEVERAL = ("layers: {!r}", "layers={} does not exist;")


@dataclass(frozen=True)
class Where:
    """`Where(("attention",))`: the layers of a model in which something of one of these kinds stands; see `gl.layers.where`.

    layers: of these alone (None: of all).
    """

    kinds: tuple[str, ...]
    layers: Layers = None

    def of(self, model: HookedModel) -> list[int]:
        """`gl.layers.where("attention").of(model)`: [3, 7], their numbers; InputError if the model has no such layer."""
        by_layer = [block.kinds for block in model.blocks]
        every = sorted(set().union(*by_layer))
        for kind in self.kinds:
            if kind not in every:
                raise InputError(
                    f"layers.where(kind={kind!r}): no layer of {model.cfg.model_name} is of this kind; its layers have "
                    f"{', '.join(map(repr, every))}.{did_you_mean(kind, every)}"
                )
        some = layers_of(model, self.layers)
        found = [layer for layer in some if not by_layer[layer].isdisjoint(self.kinds)]
        if not found:
            raise InputError(
                f"layers.where(kind={', '.join(self.kinds)!r}, layers={self.layers!r}): none of these layers of "
                f"{model.cfg.model_name} is of this kind; {', '.join(map(str, Where(self.kinds).of(model)))} are."
            )
        return found

    def meant(self, mixers: Sequence[Any]) -> list[Any]:
        """`where.meant(block.mixers)`: of what mixes tokens in a layer, that which is of these kinds; all of it where none is."""
        return [mixer for mixer in mixers if mixer.role in self.kinds] or list(mixers)


@dataclass(frozen=True)
class Mixers:
    """`Mixers(((3, "attn"), (4, "mixer")))`: some of what mixes tokens, each by its layer and where it stands in it."""

    places: tuple[tuple[int, str], ...]

    def of(self, model: HookedModel) -> list[int]:
        """`mixers.of(model)`: the numbers of their layers."""
        return [layer for layer, _ in self.places]

    def meant(self, mixers: Sequence[Any]) -> list[Any]:
        """`some.meant(block.mixers)`: those of a layer that are meant."""
        return [mixer for mixer in mixers if (mixer.layer, mixer.place) in self.places]


def layers_of(model: HookedModel, layers: Layers) -> tuple[int, ...]:
    """`layers_of(model, "[01]")`: (0, 1), the numbers of the layers, ascending; InputError for one that the model lacks."""
    chosen = set(_meant(model, layers))
    if not chosen:
        raise InputError(f"layers={layers!r} names no layer: {_has(model)}.")
    return tuple(sorted(chosen))


def mixers_of(model: HookedModel, layers: Layers) -> tuple[Any, ...]:
    """`mixers_of(model, gl.layers.where(kind="attention"))`: what mixes tokens in the layers that are meant, in running order.

    Of layers that mix tokens more than once all of it, unless a kind is named. A pattern passes over layers that mix none.
    InputError for a number of such a layer, and where nothing is left.
    """
    chosen: set[tuple[int, str]] = set()
    for one in layers if isinstance(layers, list | tuple) and not _is_mask(layers) else [layers]:
        if isinstance(one, list | tuple | range) and not _is_mask(one):
            chosen |= {(mixer.layer, mixer.place) for mixer in mixers_of(model, list(one))}
            continue
        several = one is None or isinstance(one, slice | str | Where | Mixers) or _is_mask(one)
        for layer in layers_of(model, one):
            block = model.blocks[layer]
            found = list(block.mixers if several else block.mixers or (block.mixer,))  # which says that there is none
            if isinstance(one, Where | Mixers):
                found = one.meant(found)
            chosen |= {(mixer.layer, mixer.place) for mixer in found}
    if not chosen:
        raise InputError(f"layers={layers!r} names no layer that mixes tokens: {_has(model)}.")
    return tuple(mixer for block in model.blocks for mixer in block.mixers if (mixer.layer, mixer.place) in chosen)


def _is_mask(layers: Any) -> bool:
    """Whether layers are told by a yes or no for each."""
    return isinstance(layers, list | tuple) and bool(layers) and all(isinstance(one, bool) for one in layers)


def _meant(model: HookedModel, layers: Any) -> Sequence[int]:
    every = range(model.cfg.n_layers)
    if layers is None or isinstance(layers, slice):
        return every[layers or slice(None)]
    if isinstance(layers, Where | Mixers):
        return layers.of(model)
    if isinstance(layers, str):
        return [layer for layer in every if fnmatch.fnmatchcase(str(layer), layers)]
    if isinstance(layers, Tensor | numpy.ndarray):
        layers = layers.tolist()  # of one number, a number
    if _is_mask(layers):
        if len(layers) != len(every):
            raise InputError(f"layers is a mask of {len(layers)}: {_has(model)}.")
        return [layer for layer, meant in zip(every, layers, strict=True) if meant]
    if isinstance(layers, Iterable):
        return [layer for one in layers for layer in _meant(model, one)]
    if is_whole(layers):
        return [layer_of(model, layers, SEVERAL)]
    raise InputError(
        f"layers={layers!r}: give a number, a slice, a sequence of numbers, a glob, gl.layers.where(kind=...), or None for all."
    )


def layer_of(model: HookedModel, layer: Any, words: tuple[str, str] = ONE) -> int:
    """`layer_of(model, -1)`: the number of one layer, negative ones from the end; InputError for one that the model lacks."""
    if not is_whole(layer):
        raise InputError(f"{words[0].format(layer)} is no layer number.")
    index, n = operator.index(layer), model.cfg.n_layers
    if not -n <= index < n:
        raise InputError(f"{words[1].format(layer)} {_has(model)}.")
    return index % n


def _has(model: HookedModel) -> str:
    return f"{model.cfg.model_name} has layers 0 to {model.cfg.n_layers - 1}"


def scans_of(mixer: Any, scan: str | None) -> tuple[str, ...]:
    """The scans of a layer that are meant: all for None, else the one of that name ("fwd", "bwd")."""
    if scan is None:
        return tuple(mixer.scans)
    if scan not in mixer.scans:
        named = [name for name in mixer.scans if name]
        has = f"has the scans {', '.join(named)}" if named else "has one scan: leave `scan` out"
        raise InputError(f"scan={scan!r}: layer {mixer.layer} {has}.")
    return (scan,)

"""Layers: which layers a user means: `None` or "*" (all), `3`, `-1`, `"[01]"`, `slice(2, 5)`, `range(4)`, `[0, 3]`."""

from __future__ import annotations

import fnmatch
import operator
from collections.abc import Iterable
from typing import Any, SupportsIndex

from gatedlens.errors import InputError

ONE = ("layer={!r}", "layer={!r}:")  # how a refusal begins: of what is no number, of what is out of range
SEVERAL = ("layers: {!r}", "layers={} does not exist;")


def layers_of(model: Any, layers: Any) -> tuple[int, ...]:
    """The numbers of the layers, ascending; an InputError for one that the model lacks."""
    n = model.cfg.n_layers
    if layers is None or isinstance(layers, slice):
        chosen = set(range(n)[layers or slice(None)])
    elif isinstance(layers, str):
        chosen = {layer for layer in range(n) if fnmatch.fnmatchcase(str(layer), layers)}
    elif isinstance(layers, SupportsIndex):
        chosen = {layer_of(model, layers, SEVERAL)}
    elif isinstance(layers, Iterable):
        chosen = {layer_of(model, layer, SEVERAL) for layer in layers}
    else:
        raise InputError(f"layers={layers!r}: give a number, a slice, a sequence of numbers, a glob, or None for all.")
    if not chosen:
        raise InputError(f"layers={layers!r} names no layer: {model.cfg.model_name} has layers 0 to {n - 1}.")
    return tuple(sorted(chosen))


def layer_of(model: Any, layer: Any, words: tuple[str, str] = ONE) -> int:
    """The number of one layer, negative ones from the end; an InputError for one that the model lacks."""
    n = model.cfg.n_layers
    try:
        index = operator.index(layer)
    except TypeError:
        raise InputError(f"{words[0].format(layer)} is no layer number.") from None
    if not -n <= index < n:
        raise InputError(f"{words[1].format(layer)} {model.cfg.model_name} has layers 0 to {n - 1}.")
    return index % n


def scans_of(mixer: Any, scan: str | None) -> tuple[str, ...]:
    """The scans of a layer that are meant: all for None, else the one of that name ("fwd", "bwd")."""
    if scan is None:
        return tuple(mixer.scans)
    if scan not in mixer.scans:
        named = [name for name in mixer.scans if name]
        has = f"has the scans {', '.join(named)}" if named else "has one scan: leave `scan` out"
        raise InputError(f"scan={scan!r}: layer {mixer.layer} {has}.")
    return (scan,)

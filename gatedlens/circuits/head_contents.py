"""What the heads of a layer hold of the stream, clean minus corrupted: what senders by head are compared by.

    store = in_clean(pair, layers)                       # {layer: batch pos copy channel}, as `Writing.contents`
    pair.run(pair.corrupted, subtracting(pair.model, store))         # ... and now clean minus corrupted

Where numbers of each position stand behind the output projection (a norm's 1 / scale, say), they are in it, of either run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gatedlens.model.by_head import head_outputs, held_of, writing_of
from gatedlens.model.hookpoint import Capture, Saver
from gatedlens.runs.pair import Pair

Contents = dict[int, Float[Tensor, "batch pos copy channel"]]


@torch.no_grad()
def in_clean(pair: Pair, layers: Iterable[int]) -> Contents:
    """`in_clean(pair, layers)`: of the clean run."""
    model, outputs = pair.model, head_outputs(pair.model)
    names = {layer: [outputs[layer], *held_of(model, layer)] for layer in layers}
    _, cached = pair.cached(pair.clean, [name for some in names.values() for name in some])
    return {layer: writing_of(model, layer, cached.__getitem__).contents(cached.pop(outputs[layer])) for layer in names}


@torch.no_grad()
def differences(pair: Pair, layers: Iterable[int]) -> Contents:
    """`differences(pair, layers)`: clean minus corrupted."""
    store = in_clean(pair, layers)
    pair.run(pair.corrupted, subtracting(pair.model, store))
    return store


class _Subtract(Saver):
    """The hook at what a mixer writes, behind all that is read: takes the contents of this run from those in a store."""

    def __init__(self, model: Any, layer: int, store: Contents, values: Mapping[str, Tensor]):
        self.model = model
        self.layer = layer
        self.store = store
        self.values = values

    def __call__(self, tensor: Tensor, hook: Any) -> None:
        with torch.no_grad():
            own = self.values[head_outputs(self.model)[self.layer]].detach()
            writing = writing_of(self.model, self.layer, lambda name: self.values[name].detach())
            self.store[self.layer] = self.store[self.layer] - writing.contents(own)


def subtracting(model: Any, store: Contents) -> list[tuple[str, Any]]:
    """`subtracting(model, store)`: hooks under which a run of the corrupted input turns a store of clean contents into
    differences."""
    values: dict[str, Tensor] = {}
    hooks: list[tuple[str, Any]] = []
    for layer in store:
        names = [head_outputs(model)[layer], *held_of(model, layer)]
        block = model.blocks[layer]
        hooks += [(name, Capture(values)) for name in names]
        written = f"blocks.{layer}.{block.written(block.mixer.place)}"
        hooks.append((written, _Subtract(model, layer, store, values)))
    return hooks

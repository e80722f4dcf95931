"""By head: which mixers of a model are made of heads, and where their outputs stand.

head_outputs(model)        # {0: "blocks.0.mixer.hook_gated", 2: ...}, by layer; {} where no mixer has heads
with_heads(model)          # the same, or a PointError that says where heads are
writing_of(model, 2, cache.__getitem__)      # how the mixer of a layer writes what its heads hold to the stream
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from gatedlens.model.writing import Writing


def head_outputs(model: Any) -> dict[int, str]:
    """`head_outputs(model)`: by layer, the output point of each mixer whose channels are those of heads."""
    outputs = {layer: mixer.output_name for layer, mixer in model.mixers.items()}
    points, sizes = model.names.points, model.cfg.sizes
    return {layer: name for layer, name in outputs.items() if points[name].reaches("head", sizes)}


def with_heads(model: Any) -> dict[int, str]:
    """`with_heads(model)`: `head_outputs`; a PointError that names the nearest point with heads where no mixer has them."""
    found = head_outputs(model)
    if not found:
        first = next(iter(model.mixers.values()))
        raise model.names.lacking(first.output_name, "head", model.cfg.sizes)
    return found


def writing_of(model: Any, layer: int, cached: Callable[[str], Tensor]) -> Writing:
    """`writing_of(model, 3, cache.__getitem__)`: how the first mixer of a layer writes to the stream, the points that it is held
    by read by their full names."""
    block = model.blocks[layer]
    place = block.mixer.place
    found: Writing = block.writing(place, block.held_by(place, lambda name: cached(f"blocks.{layer}.{name}")))
    return found


def held_of(model: Any, layer: int) -> list[str]:
    """`held_of(model, 3)`: the full names of the points that `writing_of` reads."""
    block = model.blocks[layer]
    return [f"blocks.{layer}.{name}" for name in block.held(block.mixer.place)]

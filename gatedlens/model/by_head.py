"""By head: which mixers of a model are made of heads, and where their outputs stand.

head_outputs(model)        # {0: "blocks.0.mixer.hook_gated", 2: ...}, by layer; {} where no mixer has heads
with_heads(model)          # the same, or a PointError that says where heads are
"""

from __future__ import annotations

from typing import Any


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

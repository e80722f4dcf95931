"""What Vision Mamba has by a name that Mamba has: the sum of both directions' y. The other names are Mamba's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from gatedlens.address.point import View

if TYPE_CHECKING:
    from gatedlens.model.base import HookedModel
else:  # that file imports this one
    HookedModel = Any


def both_directions(
    model: HookedModel, layer: int, fwd: Float[Tensor, "batch pos channel"], bwd: Float[Tensor, "batch pos channel"]
) -> Float[Tensor, "batch pos channel"]:
    """scale * (fwd + bwd)"""
    return model.blocks[layer].mixer.scale * (fwd + bwd)


VIEWS = (
    View(
        "blocks.{l}.mixer.hook_y", "batch pos channel", "scale * (fwd.y + bwd.y)", "gatedlens",
        read=both_directions,
        needs=("blocks.{l}.mixer.fwd.hook_y", "blocks.{l}.mixer.bwd.hook_y"),
        instead="hook its directions, mixer.fwd.hook_y and mixer.bwd.hook_y",
    ),
)  # fmt: skip

"""Key: how a cache or a store is asked for one activation: its full name, another tool's name for it, or TransformerLens's
(word, layer[, part]) in front of the layer's number.

    cache["blocks.3.mixer.hook_dt"], cache["dt", 3], cache["normalized", 3, "ln1"]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

# For type checkers: whoever passes something else gets a PointError that names the nearest point.
if TYPE_CHECKING:
    Key: TypeAlias = str | tuple[str] | tuple[str, int] | tuple[str, int, str]
else:
    Key = Any

__all__ = ["Key"]

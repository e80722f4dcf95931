"""The architectures: one file each, holding its rows, its open forward and how it fills the one recurrence.

`architectures()` finds them; a file beside these that defines `HOOKED` (a HookedModel subclass) is one more.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from gatedlens.late import late
from gatedlens.model.base import HookedModel

if not TYPE_CHECKING:  # a checker would take every misspelt name for an architecture
    __getattr__ = late(__name__, {})  # `gatedlens.hooks.mamba`, whether or not a Mamba was asked for before


def architectures() -> dict[str, type[HookedModel]]:
    """`architectures()["mamba"]`: every architecture in this folder, by file name: `{"mamba": HookedMamba, ...}`."""
    modules = {info.name: importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)}
    return {name: module.HOOKED for name, module in modules.items()}

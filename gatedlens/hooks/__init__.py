"""The architectures: one file each, holding its rows, its open forward and how it fills the one recurrence.

`architectures()` finds them; a file beside these that defines `HOOKED` (a HookedModel subclass) is one more.
"""

from __future__ import annotations

import importlib
import pkgutil

from gatedlens.model.base import HookedModel


def architectures() -> dict[str, type[HookedModel]]:
    """`architectures()["mamba"]`: every architecture in this folder, by file name: `{"mamba": HookedMamba, ...}`."""
    modules = {info.name: importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)}
    return {name: module.HOOKED for name, module in modules.items()}

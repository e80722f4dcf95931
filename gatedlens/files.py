"""Optional packages, imported where they are used: `pyarrow = optional("pyarrow", "store")`."""

from __future__ import annotations

import importlib
from typing import Any


def optional(module: str, extra: str) -> Any:
    """The module, or an ImportError that names the extra which brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"This needs {package}, which is not installed: pip install 'gatedlens[{extra}]'.") from error

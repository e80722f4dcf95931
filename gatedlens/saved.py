"""Saved files: what a user's values are written to and read from; what is no such file is explained.

write_json(path, value.to_dict()); data = read_json(path, "result")
tensors, meta = read_tensors(path)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gatedlens.errors import CheckpointError, InputError


def write_json(path: str | Path, data: Mapping[str, Any]) -> Path:
    """Write JSON, and return the path."""
    Path(path).write_text(json.dumps(data, indent=1), encoding="utf-8")
    return Path(path)


def read_json(path: str | Path, kind: str) -> Any:
    """What `write_json` wrote; InputError for a file that is not JSON and so no saved `kind`."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is no saved {kind}: it is not JSON ({error}).") from error


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file; CheckpointError for one that cannot be read."""
    try:
        with safe_open(str(path), "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}.") from error

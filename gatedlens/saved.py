"""Saved files: what a user's values are written to and read from; what is no such file is explained.

write_json(path, value.to_dict()); data = read_json(path, "result")
write_whole(path, data)            # a file that is replaced: all or nothing, whatever stops it
tensors, meta = read_tensors(path)
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gatedlens.errors import CheckpointError, InputError


def write_json(path: str | Path, data: Mapping[str, Any]) -> Path:
    """Write JSON, and return the path; a file that was there is replaced whole, or not at all."""
    write_whole(Path(path), json.dumps(data, indent=1).encode())
    return Path(path)


def write_whole(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, all or nothing, also when the machine stops."""
    path = path.resolve()  # behind a link lies the file that is meant
    if path.exists() and not path.is_file():  # a pipe, a device
        path.write_bytes(data)
        return
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last; Windows knows no such thing."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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

"""Out folder: where a command writes, made before it computes anything.

folder = out_folder("figures")        # a Path that exists and can be written into, or an InputError that says why not
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from gatedlens.errors import InputError


def out_folder(out: str | Path) -> Path:
    """The folder, made if need be; InputError if it cannot be made or written into."""
    folder = Path(out).expanduser()
    try:
        if not str(out):
            raise ValueError("its name is empty")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        reason = "it is a file" if folder.is_file() else getattr(error, "strerror", None) or error
        raise InputError(f"--out {out}: this folder cannot be made or written into: {reason}.") from error
    return folder

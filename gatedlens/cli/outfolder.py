"""Out folder: where a command writes, made before it computes anything, and what its files are called.

folder = out_folder("figures")        # a Path that exists and can be written into, or an InputError that says why not
written(folder, "gatedlens/mamba-moby", "lens", result)       # ["figures/mamba-moby-lens.png", "figures/mamba-moby-lens.json"]
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gatedlens.errors import InputError

if TYPE_CHECKING:
    from gatedlens.result.result import Result


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


def stem(folder: Path, model: str, what: str, suffix: str = "") -> Path:
    """`stem(folder, "gatedlens/mamba-moby", "patch-gate")`: folder/mamba-moby-patch-gate, with a suffix where one is given."""
    plain = re.sub(r"[^A-Za-z0-9_]+", "-", what).strip("-")
    return folder / f"{Path(model).name}-{plain}{suffix}"


def written(folder: Path, model: str, what: str, found: Result, figure: Any = ...) -> list[str]:
    """The paths of the picture (None: there is none; else that of the Result) and of the numbers."""
    where = stem(folder, model, what)
    files = []
    if figure is not None:
        drawn = found.plot() if figure is ... else figure
        drawn.savefig(f"{where}.png", dpi=110, bbox_inches="tight")
        files.append(f"{where}.png")
    return [*files, str(found.save(f"{where}.json"))]

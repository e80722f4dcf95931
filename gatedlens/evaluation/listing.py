"""Listing: a text file that names images or classes, one a line.

listed(Path("ImageSets/Segmentation/val.txt"))       # the first word of each line; empty lines are passed over
"""

from __future__ import annotations

from pathlib import Path

from gatedlens.errors import InputError


def listed(path: Path) -> list[str]:
    """InputError for a file that is no text."""
    try:
        return [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is damaged, or no text: {error}.") from error

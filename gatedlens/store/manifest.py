"""The manifest: what a store holds, written before the first batch, so that whoever goes on with it goes on with the same.

manifest.json       {"format", "model", "corpus", "settings", "points", "aliases", "packages", "finished"}

`finished` is null while the harvest is under way; then it has the rows, tokens and batches, every file's bytes and
checksum, and notes on what the corpus held that is not here.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch

from gatedlens.errors import StoreError
from gatedlens.saved import write_whole
from gatedlens.store.layout import Layout

FORMAT = "gatedlens activation store 1"
PACKAGES = ("gatedlens", "torch", "transformers", "transformer-lens", "datasets", "pyarrow", "safetensors")
SAME = ("model", "corpus", "settings", "points")  # what a later run must agree on
SAMPLED = 4096  # numbers of each parameter that its fingerprint reads


def model_card(model: Any) -> dict[str, Any]:
    """Which model: its name, revision and dtype, and a fingerprint of its parameters."""
    config = getattr(model.wrapped, "config", None)
    revision = getattr(config, "_commit_hash", None)
    return {
        "name": model.cfg.model_name,
        "revision": revision,
        "architecture": model.title,
        "dtype": str(model.cfg.dtype).removeprefix("torch."),
        "fingerprint": fingerprint(model),
    }


def fingerprint(model: Any) -> str:
    """A checksum of every parameter's name, shape and up to 4,096 of its numbers, evenly spread."""
    found = hashlib.sha256()
    for name, parameter in sorted(model.wrapped.state_dict().items()):
        found.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
        if parameter.is_meta:
            continue
        flat = parameter.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // SAMPLED)].cpu().contiguous()
        found.update(some.view(torch.uint8).numpy().tobytes() if len(some) else b"")
    return found.hexdigest()[:32]


def packages() -> dict[str, str]:
    """Versions of what computed and wrote the store."""
    installed = {name: list(importlib.metadata.distributions(name=name)) for name in PACKAGES}
    found = {name: several[0].version if several else "none" for name, several in installed.items()}
    return {"python": platform.python_version(), **found}


def compose(
    model: Any, corpus: dict[str, Any], settings: dict[str, Any], layouts: list[Layout], aliases: dict[str, str]
) -> dict[str, Any]:
    """The manifest of a harvest that begins."""
    return {
        "format": FORMAT,
        "model": model_card(model),
        "corpus": corpus,
        "settings": settings,
        "points": [layout.to_dict() for layout in layouts],
        "aliases": aliases,
        "packages": packages(),
        "finished": None,
    }


def load(folder: Path) -> dict[str, Any] | None:
    """The manifest in a folder; None if there is none; StoreError if it is none of ours or damaged."""
    path = folder / "manifest.json"
    if not path.exists():
        return None
    try:
        told = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(
            f"{path} is damaged ({error}). Without it nothing is known of the store: begin anew."
        ) from error
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise StoreError(f"{path} is no manifest of {FORMAT!r}.")
    return told


def save(folder: Path, told: dict[str, Any]) -> None:
    write_whole(folder / "manifest.json", (json.dumps(told, indent=1) + "\n").encode())


def check_same(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """StoreError that names the first difference between the harvest in `folder` and this one."""
    new = json.loads(json.dumps(new))
    for part in SAME:
        if old[part] != new[part]:
            what, was, now = _difference(part, old[part], new[part])
            raise StoreError(
                f"{folder} holds another harvest: its {what} is {was!r}, this one's {now!r}. Use another folder, or the "
                "same call as before to go on with it."
            )


def _difference(what: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *new]:
            if old.get(key) != new.get(key):
                return _difference(f"{what} {key}" if key != "name" else f"{what}'s name", old.get(key), new.get(key))
    if isinstance(old, list) and isinstance(new, list) and what == "points":
        was, now = ([f"{p['name']} {p['dtype']}{p['shape']}" for p in side] for side in (old, new))
        return "list of points", was, now
    return what, old, new

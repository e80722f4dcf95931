"""The manifest: what a store holds, written before the first batch, so that whoever goes on with it goes on with the same.

manifest.json       {"format", "model", "corpus", "settings", "points", "aliases", "packages", "finished", "checksum"}

`finished` is null while the harvest is under way; then it has the rows, tokens and batches, every file's bytes and
checksum, and notes on what the corpus held that is not here. `checksum` is that of all the rest but the time: a manifest
that somebody edited is no longer that of its files.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import zlib
from pathlib import Path
from typing import Any

from gatedlens.errors import StoreError
from gatedlens.files import write_whole
from gatedlens.model.base import HookedModel
from gatedlens.runs.fingerprints import bytes_checksum
from gatedlens.store.corpus.batches import POSITIONS
from gatedlens.store.disk.files import explained_reading
from gatedlens.store.disk.form import CHECKSUM, COUNT, FLAG, OBJECT, TEXT, TEXTS, Kind, Maybe, is_whole, misfit, one_of
from gatedlens.store.disk.layout import DTYPES, Layout

FIRST = "gatedlens activation store 1"  # of version 0.1.0, without checksum: it is read, and not gone on with
FORMAT = "gatedlens activation store 2"
PACKAGES = ("gatedlens", "torch", "transformers", "transformer-lens", "datasets", "pyarrow", "safetensors")
SAME = ("model", "corpus", "settings", "points")  # what a later run must agree on


def _is_name(value: Any) -> bool:
    """Whether a text names a file here and not elsewhere."""
    return isinstance(value, str) and value not in ("", ".", "..") and not set(value) & set("/\\\0")


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and all(map(_is_name, value.split("/")))


NAME = Kind("the name of a point", _is_name)
SIZE = Kind("a whole number of at least 1", lambda value: is_whole(value, least=1))
POINT = {
    "name": NAME,
    "axes": TEXT,
    "equation": TEXT,
    "per": one_of(("token", "row")),
    "stored": one_of(("column", "tensor")),
    "shape": [SIZE],
    "dtype": one_of(DTYPES),
}
CARD = {"bytes": COUNT, "crc32": CHECKSUM, "name": Kind("the path of a file in the store", _is_path)}
FINISHED: dict[str, Any] = {
    "at": TEXT,
    "batches": COUNT,
    "rows": COUNT,
    "tokens": COUNT,
    "read": COUNT,
    "notes": [TEXT],
    "files": [CARD],
}
MODEL = {"name": TEXT, "revision": Maybe(TEXT), "architecture": TEXT, "dtype": TEXT, "fingerprint": TEXT}
FORMS: dict[str, dict[str, Any]] = {
    FIRST: {
        "model": MODEL,
        "corpus": OBJECT,
        "settings": {
            "batch_size": SIZE,
            "context": Maybe(SIZE),
            "max_tokens": Maybe(SIZE),
            "positions": one_of(POSITIONS),
            "dtype": Maybe(TEXT),
            "reduce": Maybe([TEXT]),
            "field": Maybe(TEXT),
            "shard_bytes": SIZE,
            "length": Maybe(SIZE),
            "text": FLAG,
        },
        "points": [POINT],
        "aliases": TEXTS,
        "packages": TEXTS,
        "finished": Maybe(FINISHED),
    }
}
FORMS[FORMAT] = {
    **FORMS[FIRST],
    "model": {**MODEL, "hooks": [TEXT]},
    "finished": Maybe({**FINISHED, "besides": [CARD]}),
    "checksum": CHECKSUM,
}


def model_card(model: HookedModel) -> dict[str, Any]:
    """Which model: its name, revision and dtype, a fingerprint of its numbers, and the points that a hook is attached to."""
    config = getattr(model.wrapped, "config", None)
    revision = getattr(config, "_commit_hash", None)
    return {
        "name": model.cfg.model_name,
        "revision": revision,
        "architecture": model.title,
        "dtype": str(model.cfg.dtype).removeprefix("torch."),
        "fingerprint": fingerprint(model),
        "hooks": [name for name, point in model.hook_dict.items() if point.fwd_hooks],
    }


def fingerprint(model: HookedModel) -> str:
    """A checksum of all that decides what the model computes: every number of its parameters and buffers, and the numbers
    that its modules hold besides (an eps, a scale, whether they train)."""
    found = 0
    for name, tensor in sorted(model.wrapped.state_dict().items()):
        found = zlib.crc32(f"{name} {list(tensor.shape)} {tensor.dtype}".encode(), found)
        found = bytes_checksum(tensor, found)
    for name, module in model.wrapped.named_modules():
        held = {
            key: value for key, value in sorted(vars(module).items()) if type(value) in (float, bool) and key[0] != "_"
        }
        found = zlib.crc32(f"{name} {held}".encode(), found)
    return f"{found:08x}"


def packages() -> dict[str, str]:
    """Versions of what computed and wrote the store."""
    installed = {name: list(importlib.metadata.distributions(name=name)) for name in PACKAGES}
    found = {name: several[0].version if several else "none" for name, several in installed.items()}
    return {"python": platform.python_version(), **found}


def compose(
    model: HookedModel, corpus: dict[str, Any], settings: dict[str, Any], layouts: list[Layout], aliases: dict[str, str]
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
    """The manifest in a folder; None if there is none; StoreError if it is none of ours, damaged or edited."""
    path = folder / "manifest.json"
    with explained_reading(path):
        if not path.exists():
            return None
        data = path.read_bytes()
    try:
        told = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise StoreError(
            f"{path} is damaged: it is not JSON in UTF-8 ({error}). Without it nothing is known of the store: begin anew."
        ) from error
    if not isinstance(told, dict) or not isinstance(told.get("format"), str) or told["format"] not in FORMS:
        held = told.get("format", "missing") if isinstance(told, dict) else "missing"
        raise StoreError(f"{path} is no manifest of {FORMAT!r}: format is {held!r}.")
    said = misfit(told, FORMS[told["format"]]) or _at_odds(told)
    if said:
        raise StoreError(f"{path} is damaged: {said}.")
    return told


def _at_odds(told: dict[str, Any]) -> str | None:
    """Where a manifest of the right form contradicts itself."""
    names = [point["name"] for point in told["points"]]
    if not names or len(set(names)) < len(names):
        return f"points are {names}, expected at least one, and each once"
    for i, point in enumerate(told["points"]):
        layout = Layout.from_dict(point)
        for key, wanted in (("per", layout.fitting_per), ("stored", layout.fitting_stored)):
            if point[key] != wanted:
                return (
                    f"points[{i}].{key} is {point[key]!r}, expected {wanted!r} for the axes {layout.axes}, the shape "
                    f"{list(layout.shape)} and the dtype {point['dtype']}"
                )
    strange = next((alias for alias, name in told["aliases"].items() if name not in names), None)
    if strange is not None:
        return f"aliases.{strange} is {told['aliases'][strange]!r}, expected one of the points ({', '.join(names[:4])})"
    if told["format"] != FIRST and told["checksum"] != checksum_of(told):
        return (
            f"its checksum is {told['checksum']}, expected {checksum_of(told)}: it was changed after it was written, in one "
            f"of {', '.join(key for key in told if key != 'checksum')}"
        )
    return None


def checksum_of(told: dict[str, Any]) -> int:
    """Of a manifest: all of it but the checksum itself, and when it was finished."""
    rest = {key: value for key, value in told.items() if key != "checksum"}
    if rest["finished"] is not None:
        rest["finished"] = {key: value for key, value in rest["finished"].items() if key != "at"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def save(folder: Path, told: dict[str, Any]) -> None:
    whole = json.loads(json.dumps(told))  # as it will be read
    whole["checksum"] = checksum_of(whole)
    write_whole(folder / "manifest.json", (json.dumps(whole, indent=1) + "\n").encode())


def identity(told: dict[str, Any]) -> int:
    """A checksum of what a later run must agree on."""
    return zlib.crc32(json.dumps([told[part] for part in SAME], sort_keys=True).encode())


def check_same(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """StoreError that names the first difference between the harvest in `folder` and this one."""
    if old["format"] != FORMAT:
        raise StoreError(
            f"{folder} was written by an earlier version of gatedlens, which did not note all that decides the numbers: it "
            "can be read, but not gone on with. Use another folder."
        )
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

"""Saved: what was fitted, in one file: tensors as safetensors, all else as JSON in its header.

    write_saved(path, "subspace", {"basis": basis}, {"frame": frame.to_dict(), "facts": facts})
    tensors, fields = read_saved(path, "subspace", {"basis": "rank d"}); frame = frame_of(fields)

CheckpointError for a file that is none, naming the file, the tensor or field and what was expected.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from gatedlens.errors import CheckpointError, InputError
from gatedlens.files import Fields, read_tensors, write_whole
from gatedlens.options import is_whole
from gatedlens.runs.vectors import Frame


def write_saved(path: str | Path, kind: str, tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> Path:
    """`write_saved(path, "subspace", {"basis": basis}, said)`: the file, whole or not at all; returns the path.

    InputError, and nothing is written, for what JSON cannot hold.
    """
    try:
        header = json.dumps(dict(said))
    except (TypeError, ValueError) as error:
        raise InputError(f"{path} is not written: JSON cannot hold what is known of this {kind} ({error}).") from error
    held = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_whole(Path(path), save(held, {"gatedlens": kind, "said": header}))
    return Path(path)


def read_saved(
    path: str | Path, kind: str, wanted: Mapping[str, str | Tensor] | None = None
) -> tuple[dict[str, Tensor], Fields]:
    """`read_saved(path, "subspace", {"basis": "rank d"})`: the tensors, and the JSON of the header, of a saved `kind`.

    wanted: as of `check_tensors`.
    """
    tensors, meta = read_tensors(path)
    word = kind.replace("_", " ")
    if meta.get("gatedlens") != kind:
        said = f"it is a {meta['gatedlens']} of gatedlens" if "gatedlens" in meta else "it is none of gatedlens"
        holds = ", ".join(list(tensors)[:5]) or "nothing"
        raise CheckpointError(f"{path} is no saved {word}: {said}, and it holds {holds}.")
    try:
        # Older dictionaries and feature graphs have each field in the header by itself.
        known: Any = json.loads(meta["said"]) if "said" in meta else {key: _unpacked(one) for key, one in meta.items()}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no saved {word}: its header is not JSON ({error}).") from error
    check_tensors(path, word, tensors, wanted or {})
    return tensors, Fields(known, word, path, CheckpointError)


def _unpacked(text: str) -> Any:
    """What a field of an older header says, in JSON; the text itself where it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def check_tensors(
    path: str | Path, kind: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, str | Tensor]
) -> None:
    """`check_tensors(path, "probe", tensors, {"weight": "out d", "mean": "d"})`: that a file holds what it should.

    wanted: by name the axes of floats, one word of one size throughout, or a tensor that it is like. CheckpointError otherwise.
    """
    sizes: dict[str, int] = {}
    for name, like in wanted.items():
        held = tensors.get(name)
        if held is None:
            raise CheckpointError(f"{path} is no saved {kind}: it lacks {name} and holds {', '.join([*tensors][:5])}.")
        if isinstance(like, Tensor):
            shape = list(map(str, like.shape))
            fits, floats = held.shape == like.shape, like.is_floating_point()
        else:
            axes, floats = like.split(), True
            fits = len(axes) == held.ndim and all(
                sizes.setdefault(axis, size) == size for axis, size in zip(axes, held.shape, strict=True)
            )
            shape = [str(sizes.get(axis, axis)) for axis in axes]
        if not fits or held.is_floating_point() != floats:
            said = f"{'floats' if floats else 'whole numbers'} [{', '.join(shape)}]"
            raise CheckpointError(
                f"{path} is no saved {kind}: its {name} is {held.dtype} {list(held.shape)}; expected {said}."
            )


def frame_of(fields: Fields) -> Frame:
    """`frame_of(fields)`: the Frame of something saved."""
    inner = Fields(fields.fields("frame"), fields.kind, fields.where, CheckpointError)
    index = inner.fields("index")
    inner.check(
        all(isinstance(some, list) and all(map(is_whole, some)) for some in index.values()), "index", "numbers by axis"
    )
    return Frame(inner.word("name"), tuple(inner.words("axes")), dict(index))

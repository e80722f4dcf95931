"""Saved: what was fitted, in one file: tensors as safetensors, all else as JSON in its header.

    write_saved(path, "subspace", {"basis": basis}, {"frame": frame.to_dict(), "facts": facts})
    tensors, fields = read_saved(path, "subspace", ("basis",)); frame = frame_of(fields)

CheckpointError for a file that is none, naming the file, the field and what was expected.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save as to_bytes
from torch import Tensor

from gatedlens.errors import CheckpointError, InputError
from gatedlens.files import Fields, read_tensors, write_whole
from gatedlens.options import is_whole
from gatedlens.runs.vectors import Frame


def write_saved(path: str | Path, kind: str, tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> Path:
    """`write_saved(path, "subspace", {"basis": basis}, said)`, whole or not at all; InputError for what JSON cannot hold."""
    try:
        header = json.dumps(said)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path} is not written: JSON cannot hold what is known of this {kind} ({error}).") from error
    held = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_whole(Path(path), to_bytes(held, {"gatedlens": kind, "said": header}))
    return Path(path)


def read_saved(path: str | Path, kind: str, names: Sequence[str] = ()) -> tuple[dict[str, Tensor], Fields]:
    """`read_saved(path, "subspace", ("basis",))`: the tensors, and the JSON of the header, of a saved `kind`.

    CheckpointError for a file of another kind, one that is damaged, and one that lacks one of `names` or holds no floats there.
    """
    tensors, meta = read_tensors(path)
    holds = f"it holds {', '.join(list(tensors)[:5]) or 'nothing'}"
    if meta.get("gatedlens") != kind:
        said = f"it is a {meta['gatedlens']} of gatedlens" if "gatedlens" in meta else "it is none of gatedlens"
        raise CheckpointError(f"{path} is no saved {kind}: {said}, and {holds}.")
    for name in names:
        if name not in tensors:
            raise CheckpointError(f"{path} is no saved {kind}: it lacks {name}, and {holds}.")
        if not tensors[name].is_floating_point():
            raise CheckpointError(f"{path} is no saved {kind}: its {name} holds {tensors[name].dtype}.")
    try:
        header = json.loads(meta.get("said", ""))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no saved {kind}: its header is not JSON ({error}).") from error
    return tensors, Fields(header, kind, path, CheckpointError)


def frame_of(fields: Fields) -> Frame:
    """`frame_of(fields)`: the Frame of something saved."""
    inner = Fields(fields.fields("frame"), fields.kind, fields.where, CheckpointError)
    index = inner.fields("index")
    inner.check(
        all(isinstance(some, list) and all(map(is_whole, some)) for some in index.values()), "index", "numbers by axis"
    )
    return Frame(inner.word("name"), tuple(inner.words("axes")), dict(index))

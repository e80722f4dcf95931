"""Saving: a feature graph as safetensors, whose header tells its nodes and facts."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gatedlens.errors import CheckpointError
from gatedlens.feature_graph.node import KINDS, Node
from gatedlens.files import in_json
from gatedlens.runs.saved import read_saved, write_saved

if TYPE_CHECKING:
    from gatedlens.feature_graph.graph import FeatureGraph
else:  # that file imports this one
    FeatureGraph = Any

KIND = "feature_graph"
AXES = {"adjacency": "target n", "values": "n", "slopes": "n", "probability": "n"}
TENSORS = ("adjacency", "values", "slopes", "probability", "tokens", "kept", "joined")


def write(graph: FeatureGraph, path: Path) -> Path:
    """`write(graph, path)`: all of it but the run; the file is replaced whole, or not at all."""
    tensors = {name: getattr(graph, name) for name in TENSORS}
    said = {"nodes": [asdict(node) for node in graph.nodes], "words": graph.words, "facts": dict(graph.facts)}
    return write_saved(path, KIND, tensors, in_json(said))


def read(path: str | Path) -> dict[str, Any]:
    """`read(path)`: the fields of a graph; CheckpointError for a file that holds none."""
    tensors, found = read_saved(path, KIND, AXES)
    missing = [name for name in TENSORS if name not in tensors]
    if missing:
        raise CheckpointError(f"{path} is no saved feature graph: it lacks {', '.join(missing)}.")
    sizes = [list(tensors[name].shape) for name in ("values", "adjacency")]
    alike = {"kept": sizes[0], "joined": sizes[1]}
    for name, size in alike.items():
        if list(tensors[name].shape) != size or tensors[name].dtype != torch.bool:
            raise CheckpointError(
                f"{path} is no saved feature graph: its {name} is {tensors[name].dtype}, not truths {size}."
            )
    if tensors["tokens"].ndim != 1 or tensors["tokens"].is_floating_point():
        raise CheckpointError(f"{path} is no saved feature graph: its tokens are {list(tensors['tokens'].shape)}.")
    names = {one.name for one in fields(Node)}
    nodes = found.get(
        "nodes",
        f"{len(tensors['values'])} nodes",
        lambda v: (
            isinstance(v, list)
            and len(v) == len(tensors["values"])
            and all(isinstance(one, dict) and set(one) == names and one["kind"] in KINDS for one in v)
        ),
    )
    words = found.get("words", "a list of texts", lambda v: isinstance(v, list) and all(isinstance(w, str) for w in v))
    given = {name: tensors[name] for name in TENSORS}
    return {
        "nodes": tuple(Node(**one) for one in nodes),
        "words": tuple(words),
        "facts": found.fields("facts"),
        **given,
    }

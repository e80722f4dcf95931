"""Summary: a model in one line, and as a table of its blocks. torch's own repr, every module within every other, is `tree()`."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from gatedlens.errors import in_bytes
from gatedlens.markup import card, table
from gatedlens.model.config import dtype_name

if TYPE_CHECKING:
    from gatedlens.model.base import HookedModel
else:  # that file asks this one
    HookedModel = Any


def sizes(model: HookedModel) -> dict[str, object]:
    """What a model is made of, by name."""
    weights = list(model.wrapped.parameters())
    count, size = sum(w.numel() for w in weights), sum(w.numel() * w.element_size() for w in weights)
    kinds = sorted({dtype_name(w.dtype) for w in weights})
    return {
        "layers": model.cfg.n_layers,
        "d_model": f"{model.cfg.d_model:,}",
        "d_vocab": f"{model.cfg.d_vocab:,}",
        "parameters": f"{count:,} ({in_bytes(size)}, {', '.join(kinds)})",
    }


def line(model: HookedModel) -> str:
    """`HookedMamba(mamba-130m-hf: 24 layers, d_model 768, d_vocab 50,280, parameters 129,135,360 (492.6 MiB, float32))`"""
    layers, *rest = sizes(model).items()
    said = [f"{layers[1]} layer{'s' * (layers[1] != 1)}", *(f"{name} {value}" for name, value in rest)]
    return f"{type(model).__name__}({model.cfg.model_name}: {', '.join(said)})"


def page(model: HookedModel) -> str:
    """Title, sizes, and what stands in which blocks."""
    rows = []
    for (kinds, mixers), same in groupby(range(model.cfg.n_layers), lambda layer: _block(model, layer)):
        layers = list(same)
        which = f"{layers[0]}" if len(layers) == 1 else f"{layers[0]} to {layers[-1]}"
        points = sum(name.startswith(f"blocks.{layers[0]}.") for name in model.names.points)
        rows.append((which, kinds, mixers, points))
    more = {"architecture": model.title, "opened as": f"gl.{type(model).__name__}", "device": model.cfg.device}
    inner = table(["blocks", "what stands there", "mixes tokens by", "hook points"], rows)
    every = "<div style='opacity:.8'>model.hook_table() lists the points; model.tree() is torch's own repr.</div>"
    return card(f"{type(model).__name__}: {model.cfg.model_name}", {**sizes(model), **more}, inner, every)


def _block(model: HookedModel, layer: int) -> tuple[str, str]:
    block = model.blocks[layer]
    return ", ".join(sorted(block.kinds)), ", ".join(type(mixer).__name__ for mixer in block.mixers)

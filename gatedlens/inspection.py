"""Inspection: what a model is and what it would cost, from its config alone, before any weight is read.

    print(gl.inspect("Qwen/Qwen3-Next-80B-A3B-Instruct"))         # a folder or hub name needs no more than its config.json
    gl.inspect(model, tokens=4096).cache_bytes                     # or a model that you have
    gl.inspect("path/to/folder").layers                            # ("recurrent, experts", ..., "attention, experts")

A cache of n tokens is what `run_with_cache` keeps of one row by default: every point that is not lazy. A state is the recurrent
state of all layers at one position, what `hook_state` holds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from gatedlens.address.point import Point
from gatedlens.errors import InputError, in_bytes
from gatedlens.loading import HubOption, skeleton
from gatedlens.markup import card, table
from gatedlens.model.base import HookedModel
from gatedlens.model.config import dtype_of
from gatedlens.model.hookpoint import ATTENTION, CONV, EXPERTS, MLP, RECURRENT
from gatedlens.options import checked, is_whole

__all__ = ["Inspection", "inspect"]

# For editors and type checkers: whoever passes something else gets the error of `from_pretrained`.
if TYPE_CHECKING:
    Inspected: TypeAlias = HookedModel | str | Path
else:
    Inspected = Any


@dataclass(frozen=True, repr=False)
class Inspection:
    """What `inspect` found; `print` shows it as lines, `to_dict()` is what --json prints."""

    model: str
    architecture: str
    opened_as: str  # the class: "HookedQwen3Next"
    layers: tuple[str, ...]  # what stands in each
    d_model: int
    d_vocab: int
    parameters: int
    dtype: str
    weight_bytes: int
    points: int  # all of them
    lazy_points: int
    tokens: int
    cache_bytes: int
    state_bytes: int
    largest: tuple[
        tuple[str, int], ...
    ]  # the points of a block that weigh most in a cache, and their bytes in all layers

    def to_dict(self) -> dict[str, Any]:
        """`gl.inspect(name).to_dict()`: all of it as JSON holds it."""
        return asdict(self)

    def __repr__(self) -> str:
        return (
            f"Inspection({self.model}: {self.architecture}, {len(self.layers)} layers, {self.parameters:,} parameters)"
        )

    def _repr_html_(self) -> str:
        runs = [(kinds, len(list(same))) for kinds, same in groupby(self.layers)]
        facts = {"architecture": self.architecture, "opened as": f"gl.{self.opened_as}", "dtype": self.dtype}
        facts |= {"parameters": f"{self.parameters:,} ({in_bytes(self.weight_bytes)})", "d_model": f"{self.d_model:,}"}
        facts |= {f"cache of {self.tokens:,} tokens": in_bytes(self.cache_bytes), "state": in_bytes(self.state_bytes)}
        heavy = table(["heaviest points", "bytes"], [(name, in_bytes(size)) for name, size in self.largest])
        return card(f"Inspection: {self.model}", facts, table(["what stands there", "layers"], runs), heavy)

    def __str__(self) -> str:
        runs = [(kinds, len(list(same))) for kinds, same in groupby(self.layers)]
        counted = ", ".join(f"{count} x ({kinds})" for kinds, count in runs[:6]) + (", ..." if len(runs) > 6 else "")
        heavy = ", ".join(f"{name} {in_bytes(size)}" for name, size in self.largest)
        rows = {
            "model": f"{self.model}: {self.architecture}, opened as gl.{self.opened_as}",
            "layers": f"{len(self.layers)}: {counted}",
            "sizes": f"d_model {self.d_model:,}, d_vocab {self.d_vocab:,}",
            "parameters": f"{self.parameters:,}, {in_bytes(self.weight_bytes)} in {self.dtype}",
            "hook points": f"{self.points:,}, of which {self.lazy_points:,} are lazy: computed when asked for by name",
            f"cache of {self.tokens:,} tokens": f"{in_bytes(self.cache_bytes)} a row by default; largest: {heavy}",
            "recurrent state": f"{in_bytes(self.state_bytes)} a row",
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:>{width}}  {said}" for name, said in rows.items())


@checked
def inspect(
    model: Inspected,
    tokens: int = 1024,
    dtype: torch.dtype | str | None = None,
    variant: str | None = None,
    **hub: HubOption,
) -> Inspection:
    """`print(gl.inspect("path/to/folder", tokens=4096))`: what a model is and what its cache would weigh; no weight is read.

    model: a name or path as `gl.from_pretrained` takes it, with its options of the hub (variant, revision, token, ...), or a
    model that you have. tokens: of the row that is cached (of an image model: none, its own patches count). dtype: in which
    bytes are counted; None: that of the config, or of the model.

    CheckpointError for what `from_pretrained` would refuse before it reads weights; InputError for tokens that are no number.
    """
    if not is_whole(tokens) or tokens < 1:
        raise InputError(f"tokens={tokens!r}: give how many tokens a row has, 1 or more.")
    opened = model if isinstance(model, HookedModel) else skeleton(model, variant=variant, **hub)
    chosen = dtype_of(dtype) or opened.W_U.dtype
    sizes, length = opened.cfg.sizes, tokens if opened.grid is None else opened.cfg.n_ctx

    def weigh(points: Iterable[tuple[str, Point]], pos: int) -> dict[str, int]:
        given = {"batch": 1, "pos": pos, "key_pos": pos}
        each = chosen.itemsize
        return {name: point.elements(sizes, **given) * each for name, point in points}

    every = opened.names.points
    kept = weigh(((name, point) for name, point in every.items() if not point.lazy), length)
    states = weigh(((name, point) for name, point in every.items() if name.endswith("hook_state")), 1)
    parameters = sum(p.numel() for p in opened.wrapped.parameters())
    return Inspection(
        model=opened.cfg.model_name,
        architecture=opened.title,
        opened_as=type(opened).__name__,
        layers=tuple(", ".join(sorted(block.kinds, key=ORDER.index)) for block in opened.blocks),
        d_model=opened.cfg.d_model,
        d_vocab=opened.cfg.d_vocab,
        parameters=parameters,
        dtype=str(chosen).removeprefix("torch."),
        weight_bytes=parameters * chosen.itemsize,
        points=len(every),
        lazy_points=sum(point.lazy for point in every.values()),
        tokens=length,
        cache_bytes=sum(kept.values()),
        state_bytes=sum(states.values()),
        largest=_heaviest(kept),
    )


ORDER = (RECURRENT, ATTENTION, CONV, MLP, EXPERTS)  # of the words for a layer


def _heaviest(sizes: dict[str, int], n: int = 3) -> tuple[tuple[str, int], ...]:
    """Which points of a block weigh most, all layers together."""
    total: dict[str, int] = {}
    for name, size in sizes.items():
        first, _, rest = name.partition(".")
        leaf = f"blocks.*.{rest.partition('.')[2]}" if first == "blocks" else name
        total[leaf] = total.get(leaf, 0) + size
    return tuple(sorted(total.items(), key=lambda item: -item[1])[:n])

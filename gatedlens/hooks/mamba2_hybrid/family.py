"""Family: a hybrid of transformers as data: what stands in its layers, and where transformers keeps it.

BAMBA = Family("Bamba", "BambaForCausalLM", {"Mamba-2, MLP": (MAMBA, MLP), "attention, MLP": (ATTENTION, MLP)}, ...)
BAMBA.rows["Mamba-2, MLP"]                                  # the rows of such a layer, in firing order
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from gatedlens.address.point import Point, block_rows
from gatedlens.model.block import Block, Sub, SubRows, residual_rows
from gatedlens.model.hookpoint import Part, rows_of
from gatedlens.model.norm import Norm, norm_rows
from gatedlens.parts.attention import RMSNORM


class Site(NamedTuple):
    """Where a part is made: its module of the wrapped model, its rows, the layer; and the whole model with its config."""

    weights: Any
    rows: tuple[Point, ...]
    layer: int
    wrapped: Any

    @property
    def config(self) -> Any:
        """That of transformers."""
        return self.wrapped.config


class Branch(NamedTuple):
    """`Branch("mixer", ROWS, "out_proj(gated)", make, "mamba", "input_layernorm")`: one branch of a layer.

    out: what it puts out, in words; make: its part; weights, norm: the names of their modules in the wrapped layer. ln and place:
    where norm and part stand in our block (None: under the name); scale: what a channel mixer's output is multiplied by.
    """

    name: str
    rows: tuple[Point, ...]
    out: str
    make: Callable[[Site], Part]
    weights: str
    norm: str
    ln: str = "ln1"
    place: str | None = None
    scale: Callable[[Any], float] | None = None

    def sub_rows(self) -> SubRows:
        """Its rows, with those of its norm."""
        part = block_rows(self.place or self.name, self.rows)
        return SubRows(self.name, part, self.out, norm_rows(self.ln, f"{self.name}_in", RMSNORM))

    def sub(self, layer: int, wrapped: Any, inside: Any, rows: tuple[Point, ...], eps: float) -> Sub:
        """The branch over layer `layer` of a wrapped model, which is `inside`."""
        weights = inside if not self.weights else getattr(inside, self.weights)
        part = self.make(Site(weights, rows_of(self.place or self.name, rows), layer, wrapped))
        norm = Norm(getattr(inside, self.norm), rows_of(self.ln, rows), eps)
        scale = 1.0 if self.scale is None else self.scale(wrapped.config)
        return Sub(self.name, part, norm, self.ln, self.place, scale=scale)


Layer = tuple[Branch | tuple[Branch, ...], ...]  # branches one after the other; those in a tuple are parallel


@dataclass(frozen=True)
class Family:
    """`Family("Bamba", "BambaForCausalLM", LAYERS, kind_of, told)`.

    wraps: its class in transformers; layers: by what they are called; kind_of(layer, config): what a wrapped layer is called;
    told(config): what its config says of it, as fields of our cfg. embedding, final_norm, eps: their names in the wrapped model
    and in its config.
    """

    title: str
    wraps: str
    layers: Mapping[str, Layer]
    kind_of: Callable[[Any, Any], str]
    told: Callable[[Any], Mapping[str, Any]]
    embedding: str = "embed_tokens"
    final_norm: str = "final_layernorm"
    eps: str = "rms_norm_eps"

    @cached_property
    def rows(self) -> dict[str, tuple[Point, ...]]:
        """The rows of each kind of layer."""
        return {kind: residual_rows(*map(_sub_rows, layer)) for kind, layer in self.layers.items()}

    def block(self, kind: str, layer: int, wrapped: Any) -> Block:
        """Our block over layer `layer` of a wrapped model."""
        inside, rows = wrapped.model.layers[layer], self.rows[kind]
        eps = float(getattr(wrapped.config, self.eps))

        def sub(one: Branch | tuple[Branch, ...]) -> Sub | tuple[Sub, ...]:
            if isinstance(one, Branch):
                return one.sub(layer, wrapped, inside, rows, eps)
            return tuple(branch.sub(layer, wrapped, inside, rows, eps) for branch in one)

        return Block(inside, rows, *map(sub, self.layers[kind]))


def _sub_rows(one: Branch | tuple[Branch, ...]) -> SubRows | tuple[SubRows, ...]:
    return one.sub_rows() if isinstance(one, Branch) else tuple(branch.sub_rows() for branch in one)

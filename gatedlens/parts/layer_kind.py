"""LayerKind: what stands in a layer of a hybrid: what mixes tokens, then what mixes channels, both behind a norm.

ROWS = rows_by_kind(
    {"delta net": ("mixer", MIXER_ROWS, "out_proj(gated)"), "attention": ("attn", ATTENTION_ROWS, "o_proj(z)")},
    {"MLP": (MLP_ROWS, "down_proj(post)"), "experts": (EXPERTS_ROWS, EXPERTS_OUT)},
)
ROWS[LayerKind("attention", "MLP")]                # the rows of such a block, in firing order
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from gatedlens.address.point import Point, block_rows
from gatedlens.model.block import SubRows, residual_rows
from gatedlens.model.norm import norm_rows
from gatedlens.parts.attention import RMSNORM


class LayerKind(NamedTuple):
    """`LayerKind("delta net", "experts")`; as text "delta net, experts"."""

    mixing: str
    channels: str

    def __str__(self) -> str:
        return f"{self.mixing}, {self.channels}"


def rows_by_kind(
    mixing: Mapping[str, tuple[str, tuple[Point, ...], str]],
    channels: Mapping[str, tuple[tuple[Point, ...], str]],
    normed: str = "w * normalized",
) -> dict[LayerKind, tuple[Point, ...]]:
    """`rows_by_kind(MIXING, CHANNEL_MIXING)`: the rows of a block of each kind.

    mixing: by its word, where it stands in the block, its rows, and its output in words; channels: rows and output. normed: the
    equation of the two norms.
    """
    found = {}
    for mixer, (part, points, out) in mixing.items():
        for mlp, (inner, mlp_out) in channels.items():
            ln1, ln2 = (norm_rows(ln, f"{name}_in", RMSNORM, normed) for ln, name in (("ln1", "mixer"), ("ln2", "mlp")))
            found[LayerKind(mixer, mlp)] = residual_rows(
                SubRows("mixer", block_rows(part, points), out, ln1),
                SubRows("mlp", block_rows("mlp", inner), mlp_out, ln2),
            )
    return found

"""Channel mixers: a gated one (GLU) and a plain one, with any activation.

    gated    out = down(act(gate(m)) * up(m))          plain    out = down(act(up(m)))

m is what the mixer reads, the normed residual stream. GLU variants: Shazeer 2020, arXiv 2002.05202.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatedlens.address.point import Point
from gatedlens.model.hookpoint import Part
from gatedlens.model.run import Run
from gatedlens.parts.activation import Activation

GLU = "GLU variants, arXiv 2002.05202"


def gated_mlp_rows(act: str, source: str = GLU, reads: str = "ln2.out", width: str = "d_mlp") -> tuple[Point, ...]:
    """`gated_mlp_rows("SiLU")`: the points of a `GatedMlp`; its output is down_proj(post)."""
    return (
        Point("hook_pre", f"batch pos {width}", f"gate_proj({reads})", source),
        Point("hook_pre_linear", f"batch pos {width}", f"up_proj({reads})", source),
        Point("hook_post", f"batch pos {width}", f"{act}(pre) * pre_linear", source),
    )


def mlp_rows(act: str, source: str, reads: str = "ln2.out", width: str = "d_mlp") -> tuple[Point, ...]:
    """`mlp_rows("relu_squared", PAPER)`: the points of an `Mlp`; its output is down_proj(post)."""
    return (
        Point("hook_pre", f"batch pos {width}", f"up_proj({reads})", source),
        Point("hook_post", f"batch pos {width}", f"{act}(pre)", source),
    )


class GatedMlp(Part):
    """out = down_proj(act(gate_proj(m)) * up_proj(m))."""

    def __init__(self, weights: Any, rows: tuple[Point, ...], act: Activation):
        super().__init__(weights, rows)
        self.act = act.function

    def forward(self, m: Float[Tensor, "batch pos d_model"], run: Run) -> Float[Tensor, "batch pos d_model"]:
        w = self.weights
        pre = self.hook_pre(F.linear(m, w.gate_proj.weight, w.gate_proj.bias))
        pre_linear = self.hook_pre_linear(F.linear(m, w.up_proj.weight, w.up_proj.bias))
        post = self.hook_post(self.act(pre) * pre_linear)
        return F.linear(post, w.down_proj.weight, w.down_proj.bias)


class Mlp(Part):
    """out = down_proj(act(up_proj(m)))."""

    def __init__(self, weights: Any, rows: tuple[Point, ...], act: Activation):
        super().__init__(weights, rows)
        self.act = act.function

    def forward(self, m: Float[Tensor, "batch pos d_model"], run: Run) -> Float[Tensor, "batch pos d_model"]:
        w = self.weights
        post = self.hook_post(self.act(self.hook_pre(F.linear(m, w.up_proj.weight, w.up_proj.bias))))
        return F.linear(post, w.down_proj.weight, w.down_proj.bias)

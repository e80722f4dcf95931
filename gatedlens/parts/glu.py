"""Channel mixers: a gated one (GLU) and a plain one, with any activation.

    gated    out = down(act(gate(m)) * up(m))          plain    out = down(act(up(m)))

m is what the mixer reads, the normed residual stream. Gate and up may be one matrix, `FusedMlp`. GLU variants: Shazeer 2020,
arXiv 2002.05202.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatedlens.address.point import Point
from gatedlens.model.hookpoint import Part
from gatedlens.model.mixer import multiplied
from gatedlens.model.run import Run
from gatedlens.model.weights import linear, several
from gatedlens.parts.activation import Activation

GLU = "GLU variants, arXiv 2002.05202"


def gated_mlp_rows(
    act: str, source: str = GLU, reads: str = "ln2.out", width: str = "d_mlp", gate: str = "gate_proj({})"
) -> tuple[Point, ...]:
    """`gated_mlp_rows("SiLU")`: the points of a `GatedMlp`; its output is down_proj(post). gate: how `pre` is made, in words."""
    return (
        Point("hook_pre", f"batch pos {width}", gate.format(reads), source),
        Point("hook_pre_linear", f"batch pos {width}", f"up_proj({reads})", source),
        Point("hook_post", f"batch pos {width}", f"{act}(pre) * pre_linear", source),
    )


def fused_mlp_rows(
    act: str, source: str = GLU, reads: str = "ln2.out", width: str = "d_mlp", up: str = "input_linear"
) -> tuple[Point, ...]:
    """`fused_mlp_rows("SiLU")`: the points of a `FusedMlp`."""
    return (
        Point("hook_pre", f"batch pos {width}", f"{up}({reads}), its half for the gate", source),
        Point("hook_pre_linear", f"batch pos {width}", f"{up}({reads}), its other half", source),
        Point("hook_post", f"batch pos {width}", f"{act}(pre) * pre_linear", source),
    )


def mlp_rows(act: str, source: str, reads: str = "ln2.out", width: str = "d_mlp") -> tuple[Point, ...]:
    """`mlp_rows("relu_squared", PAPER)`: the points of an `Mlp`; its output is down_proj(post)."""
    return (
        Point("hook_pre", f"batch pos {width}", f"up_proj({reads})", source),
        Point("hook_post", f"batch pos {width}", f"{act}(pre)", source),
    )


class GatedMlp(Part):
    """out = down_proj(act(gate_scale * gate_proj(m)) * up_proj(m)). names: of gate_proj, up_proj and down_proj."""

    def __init__(
        self,
        weights: Any,
        rows: tuple[Point, ...],
        act: Activation,
        gate_scale: float = 1.0,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    ):
        super().__init__(weights, rows)
        self.act = act.function
        self.gate_scale = gate_scale
        self.names = names

    def forward(self, m: Float[Tensor, "batch pos d_model"], run: Run) -> Float[Tensor, "batch pos d_model"]:
        gate, up, down = (getattr(self.weights, name) for name in self.names)
        pre = self.hook_pre(multiplied(F.linear(m, gate.weight, gate.bias), self.gate_scale))
        pre_linear = self.hook_pre_linear(F.linear(m, up.weight, up.bias))
        post = self.hook_post(self.act(pre) * pre_linear)
        return F.linear(post, down.weight, down.bias)

    def named_weights(self) -> dict[str, Tensor]:
        w, gate = self.weights, linear("gate", self.weights.gate_proj)
        gate = {word: multiplied(weight, self.gate_scale) for word, weight in gate.items()}
        return {**gate, **linear("in", w.up_proj), **linear("out", w.down_proj)}


class FusedMlp(Part):
    """out = down(act(gate) * up), gate and up the halves of one matrix's output.

    up, down: what the matrices are called; gate_first: which half is the gate.
    """

    def __init__(
        self,
        weights: Any,
        rows: tuple[Point, ...],
        act: Activation,
        up: str = "input_linear",
        down: str = "output_linear",
        gate_first: bool = True,
    ):
        super().__init__(weights, rows)
        self.act = act.function
        self.up, self.down, self.gate_first = up, down, gate_first

    def halves(self, m: Float[Tensor, "batch pos d_model"]) -> tuple[Tensor, Tensor]:
        """The gate, before its activation, and what it multiplies."""
        # In memory of their own: a copy that a hook gets has the same layout then, and so the same rounding behind it.
        first, second = (half.contiguous() for half in self.both(m).chunk(2, dim=-1))
        return (first, second) if self.gate_first else (second, first)

    def both(self, m: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos some"]:
        """What the one matrix gives."""
        up = getattr(self.weights, self.up)
        return F.linear(m, up.weight, up.bias)

    def forward(self, m: Float[Tensor, "batch pos d_model"], run: Run) -> Float[Tensor, "batch pos d_model"]:
        down = getattr(self.weights, self.down)
        pre, linear = self.halves(m)
        post = self.hook_post(self.act(self.hook_pre(pre)) * self.hook_pre_linear(linear))
        return F.linear(post, down.weight, down.bias)

    def named_weights(self) -> dict[str, Tensor]:
        up, down = getattr(self.weights, self.up), getattr(self.weights, self.down)
        words = ("gate", "in") if self.gate_first else ("in", "gate")
        both = several(up.weight, up.bias, dict.fromkeys(words, len(up.weight) // 2))
        return {**both, **linear("out", down)}


class Mlp(Part):
    """out = down_proj(act(up_proj(m)))."""

    def __init__(self, weights: Any, rows: tuple[Point, ...], act: Activation):
        super().__init__(weights, rows)
        self.act = act.function

    def forward(self, m: Float[Tensor, "batch pos d_model"], run: Run) -> Float[Tensor, "batch pos d_model"]:
        w = self.weights
        post = self.hook_post(self.act(self.hook_pre(F.linear(m, w.up_proj.weight, w.up_proj.bias))))
        return F.linear(post, w.down_proj.weight, w.down_proj.bias)

    def named_weights(self) -> dict[str, Tensor]:
        return {**linear("in", self.weights.up_proj), **linear("out", self.weights.down_proj)}

"""Copies: a residual stream that holds several copies side by side, and what reads and writes them (hyper-connections).

    n, wide = read(resid)                       # what a branch reads: a mean over copies, each number gated
    resid + inject(branch(n), wide)             # what it writes goes into every copy, as much as a number of each says

b batch, l pos, k copy, d hidden (the width of a copy, and of branches), d_model = (copy hidden):

    wide  = (1 + w) resid / scale, copy by copy             scale_k = sqrt(mean(resid_k^2) + eps)
    gate  = sigmoid(up SiLU(down wide / K))                 n = mean over k of gate_k wide_k
    share = 2 sigmoid(W wide / K), a number a copy          written_k = share_k branch(n)

The copies are never mixed among themselves: the stream, all copies of it, is the plain sum of what is written to it. With scale,
gate and share held, all of it is linear. Qwen4's gated residual; hyper-connections: Zhu et al. 2024, arXiv 2409.19606.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatedlens.address.point import Point
from gatedlens.model.behind import Behind
from gatedlens.model.norm import Norm
from gatedlens.recurrence.scanning import at_least_float32

SOURCE = "gated residual of Qwen4; hyper-connections, arXiv 2409.19606"
RMSNORM = "RMSNorm, arXiv 1910.07467"


def read_rows(part: str, reads: str) -> tuple[Point, ...]:
    """`read_rows("ln1", "mixer_in")`: the points of a `CopyRead` under `part`, which reads the row `reads`."""
    return (
        Point(f"{part}.hook_scale", "batch pos copy", f"sqrt(mean({reads}^2) + eps), of each copy", RMSNORM),
        Point(f"{part}.hook_normalized", "batch pos d_model", f"{reads} / scale, copy by copy", RMSNORM),
        Point(f"{part}.hook_wide", "batch pos d_model", "(1 + w) * normalized", RMSNORM),
        Point(f"{part}.hook_low", "batch pos low", "SiLU(input_mix_weight_down(wide) / copy.size)", SOURCE),
        Point(f"{part}.hook_gate", "batch pos d_model", "sigmoid(input_mix_weight_up(low))", SOURCE),
        Point(f"{part}.hook_out", "batch pos hidden", "mean over copy of gate * wide", SOURCE),
    )


def inject_rows(part: str, reads: str, norm: str) -> tuple[Point, ...]:
    """`inject_rows("inject1", "out_proj(mixer.gated)", "ln1")`: the points of an `Inject`; reads: what the branch puts out, in
    words; norm: where the `CopyRead` in front of it stands."""
    gate = f"sigmoid(block_inject_weight({norm}.wide) / copy.size) * 2"
    return (
        Point(f"{part}.hook_in", "batch pos hidden", reads, SOURCE),
        Point(f"{part}.hook_gate", "batch pos copy", gate, SOURCE),
    )


class CopyRead(Norm):
    """out = mean over copies of gate * (1 + w) * x / scale, the gate made of all copies.

    weights: the wrapped norm of the copies, and `mixing` what it stands in, with the matrices of the gate; copies: how many there
    are.
    """

    torch_norms = ()
    held_points: ClassVar[tuple[str, ...]] = ("hook_scale", "hook_gate")

    def __init__(self, mixing: Any, rows: tuple[Point, ...], eps: float, copies: int):
        super().__init__(mixing.hc_norm, rows, eps)
        self.__dict__["mixing"] = mixing  # of the wrapped model, as `weights` is
        self.copies = copies

    @property
    def gain(self) -> Float[Tensor, " d_model"]:
        return 1 + at_least_float32(self.weights.weight)

    @property
    def gain_behind(self) -> None:
        return None

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... hidden"]:
        return self.read(x)[0]

    def read(self, x: Float[Tensor, "... d_model"]) -> tuple[Float[Tensor, "... hidden"], Float[Tensor, "... d_model"]]:
        """`n, wide = part.read(x)`: what the branch reads, and the normed copies that it is made of."""
        w, copies = self.mixing, self._copies(at_least_float32(x))
        scale = self.hook_scale((copies.pow(2).mean(-1) + self.eps).sqrt())
        normalized = self.hook_normalized((copies / scale.unsqueeze(-1)).flatten(-2))
        wide = self.hook_wide((normalized * self.gain).to(x.dtype))
        low = self.hook_low(F.silu(F.linear(wide, w.input_mix_weight_down.weight) / self.copies))
        gate = self.hook_gate(torch.sigmoid(F.linear(low, w.input_mix_weight_up.weight)))
        return self.hook_out(self._copies(gate * wide).mean(-2)), wide

    def scaled(self, x: Float[Tensor, "... d_model"], cached: Callable[[str], Tensor]) -> Float[Tensor, "... hidden"]:
        scale = cached("hook_scale").to(x).unsqueeze(-1)
        wide = (self._copies(x) / scale).flatten(-2) * self.gain.to(x)
        return self._copies(cached("hook_gate").to(x) * wide).mean(-2)

    def directions(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... hidden"]:
        return self._copies(x * self.gain.to(x)).mean(-2) / 2

    def _copies(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... copy hidden"]:
        return x.unflatten(-1, (self.copies, -1))


class Inject(Behind):
    """out = share_k x in copy k, share = 2 sigmoid(W wide / K): what a branch puts out goes into every copy.

    `weights` is the wrapped gated residual in front of the branch, whose normed copies it reads.
    """

    held_points: ClassVar[tuple[str, ...]] = ("hook_gate",)
    reads_norm: ClassVar[bool] = True

    def forward(
        self, x: Float[Tensor, "batch pos hidden"], wide: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        given, weight = self.hook_in(x), self.weights.block_inject_weight.weight
        share = self.hook_gate(torch.sigmoid(F.linear(wide, weight) / len(weight)) * 2)
        return (share.unsqueeze(-1) * given.unsqueeze(-2)).flatten(-2)

    def held(self, cached: Callable[[str], Tensor]) -> Float[Tensor, "*batch pos copy"]:
        return at_least_float32(cached("hook_gate"))

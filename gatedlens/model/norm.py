"""Norm: a normalisation with its scale and its normalised input as points.

    out = weight * x / scale (+ bias)        scale = sqrt(mean(x^2) + eps)

Which of the two dtypes a model rounds in is its own: `NormOfNarrow` reads the stream in the dtype of its weights, `NarrowNorm`
reads it at its full width and puts out what the weights are in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatedlens import fused
from gatedlens.address.point import Point
from gatedlens.errors import InputError
from gatedlens.model.behind import Behind
from gatedlens.model.watch import NORMS
from gatedlens.recurrence.scanning import at_least_float32


class Norm(Behind):
    """out = weight * x / scale (+ bias), scale = sqrt(mean(x^2) + eps), computed in at least float32.

    RMSNorm or LayerNorm (x centred first), as the wrapped norm's class says, or else `centred`; so with the wrapped norm's
    own eps and `eps`. The result has x's dtype times the weight's, as in transformers. Zhang and Sennrich 2019 (RMSNorm),
    Ba et al. 2016 (LayerNorm).
    """

    torch_norms: ClassVar[tuple[type, ...]] = NORMS  # torch's norms that this is the mathematics of
    held_points: ClassVar[tuple[str, ...]] = ("hook_scale",)  # with these it is linear in what it reads

    def __init__(self, weights: Any, rows: tuple[Point, ...], eps: float, centred: bool = False):
        super().__init__(weights, rows)
        self.eps = eps_of(weights, eps)
        self.centred = isinstance(weights, nn.LayerNorm) if isinstance(weights, NORMS) else centred

    @property
    def gain(self) -> Float[Tensor, " d_model"]:
        """What `normalized` is multiplied by."""
        return self.weights.weight

    @property
    def gain_behind(self) -> Float[Tensor, " d_model"] | None:
        """By what `scaled` is multiplied to be what the norm puts out, its bias aside; None: by nothing."""
        return self.gain

    def scaled(self, x: Float[Tensor, "... d_model"], cached: Callable[[str], Tensor]) -> Float[Tensor, "... d_out"]:
        """`norm.scaled(x, cached)`: what it makes of x with its `held_points` held, read by `cached`; without the gain."""
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return x / cached("hook_scale").to(x)

    def directions(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_out"]:
        """`norm.directions(x)`: directions of the stream as what reads the norm sees them, wherever: up to the length, which goes
        by the position."""
        return x * self.gain.to(x)

    def held(self, cached: Callable[[str], Tensor]) -> Float[Tensor, "*batch pos one"]:
        """`norm.held(cached)`: 1 / scale, by which it multiplies a position behind a mixer; InputError for one that centres."""
        if self.centred:
            raise InputError(
                "A norm that centres stands behind a mixer: what each token writes through it is not known."
            )
        return 1 / at_least_float32(cached("hook_scale"))

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        if not self.centred and fused.fits(x) and x.dtype == self.weights.weight.dtype and self.at_rest():
            return F.rms_norm(x, x.shape[-1:], self.weights.weight, self.eps)
        wide = at_least_float32(x)
        if self.centred:
            wide = wide - wide.mean(-1, keepdim=True)
        scale = self.hook_scale((wide.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        normalized = self.hook_normalized((wide / scale).to(x.dtype))
        out = self.weights.weight * normalized
        bias = self.weights.bias if self.centred else None
        return self.hook_out(out if bias is None else out + bias)


class NormOfNarrow(Norm):
    """The same of a stream that is rounded to the dtype of the weights first, as transformers' and mamba-ssm's Mamba does."""

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        return super().forward(x.to(self.weights.weight.dtype))


class NarrowNorm(Norm):
    """The same of a stream at its full width, rounded to the dtype of the weights behind it, as a fused addition and norm do."""

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        return super().forward(x).to(self.weights.weight.dtype)


class LateNorm(Norm):
    """out = weight * x / scale, scale = sqrt(mean(x^2) + eps); rounded to x's dtype only at the end, as in OLMo."""

    torch_norms = ()

    @property
    def gain(self) -> Float[Tensor, " d_model"]:
        return at_least_float32(self.weights.weight)

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        wide = at_least_float32(x)
        scale = self.hook_scale((wide.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        normalized = self.hook_normalized(wide / scale)
        return self.hook_out((normalized * self.gain).to(x.dtype))


class GemmaNorm(LateNorm):
    """The same with the gain 1 + weight, as in Gemma's line of models, and in Qwen3-Next."""

    @property
    def gain(self) -> Float[Tensor, " d_model"]:
        return 1 + at_least_float32(self.weights.weight)


class NormOfHeads(LateNorm):
    """The same of all heads together: one scale at a position, a gain for each number of each head."""

    def forward(self, x: Float[Tensor, "batch pos head d_head"]) -> Float[Tensor, "batch pos head d_head"]:
        wide = at_least_float32(x)
        scale = self.hook_scale((wide.pow(2).mean((-2, -1)).unsqueeze(-1) + self.eps).sqrt())
        normalized = self.hook_normalized(wide / scale.unsqueeze(-1))
        return self.hook_out((normalized * self.gain.unflatten(0, x.shape[-2:])).to(x.dtype))


def eps_of(norm: Any, otherwise: float) -> float:
    """The eps that a wrapped norm adds; `otherwise` if it does not say."""
    told = vars(norm)
    eps = told.get("eps", told.get("variance_epsilon", otherwise))
    return float(torch.finfo(norm.weight.dtype).eps if eps is None else eps)  # None is torch's way to say so


def norm_rows(
    part: str,
    reads: str,
    source: str,
    equation: str = "w * normalized",
    axes: str = "batch pos d_model",
    over: str = "",
) -> tuple[Point, ...]:
    """The points of a norm under `part`, which normalises the row `reads`, with these axes, along the last of them.

    over: the last two, in words, where it is along both (`NormOfHeads`).
    """
    outer = axes.rpartition(" ")[0]
    outer = outer.rpartition(" ")[0] if over else outer
    mean = f"mean over {over} of {reads}^2" if over else f"mean({reads}^2)"
    return (
        Point(f"{part}.hook_scale", f"{outer} one", f"sqrt({mean} + eps)", source),
        Point(f"{part}.hook_normalized", axes, f"{reads} / scale", source),
        Point(f"{part}.hook_out", axes, equation, source),
    )

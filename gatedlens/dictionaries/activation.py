"""Activations of a dictionary: what makes features of the encoder's sums, as data that is saved beside the weights.

    ReLU()                          f = max(p, 0)
    TopK(32)                        the 32 largest p of each position, through a ReLU; the others are 0
    BatchTopK(32)                   32 a position on average, over a whole batch, while it trains; then a JumpReLU
    JumpReLU(threshold)             f = p where p > threshold, else 0 (and never below 0)
    Gated(scale, shift)             f = max(scale p + shift, 0) where p > 0, else 0

p = x W_enc + b_enc, [..., feature]. Sources: TopK: Gao et al. 2024, arXiv 2406.04093; BatchTopK: Bussmann et al. 2024, arXiv
2412.06410; JumpReLU: Rajamanoharan et al. 2024, arXiv 2407.14435; Gated: the same, arXiv 2404.16014, where scale = exp(r_mag) and
shift = b_mag - exp(r_mag) b_gate, so that p is the gate's own sum.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gatedlens.errors import InputError
from gatedlens.options import checked

__all__ = ["ACTIVATIONS", "Activation", "BatchTopK", "Gated", "JumpReLU", "ReLU", "TopK"]


class Activation(nn.Module):
    """`features = activation(p)`; `on(p)`: which are not held at 0; `held(p)`: how they hang on p while these stay so."""

    kind: ClassVar[str] = ""
    numbers: ClassVar[tuple[str, ...]] = ()  # what is said in a header beside the tensors

    def on(self, p: Float[Tensor, "... feature"]) -> Bool[Tensor, "... feature"]:
        """`activation.on(p)`: which features are above 0, [..., feature]."""
        return self(p) > 0

    def held(
        self, p: Float[Tensor, "... feature"]
    ) -> tuple[Float[Tensor, "... feature"], Float[Tensor, "... feature"]]:
        """`slope, rest = activation.held(p)`: features = slope * p + rest, exactly, while the same ones are on."""
        slope = self.on(p).to(p.dtype)
        return slope, torch.zeros_like(slope)

    def forward(self, p: Float[Tensor, "... feature"]) -> Float[Tensor, "... feature"]:
        """`activation.forward(p)`, `activation(p)`: the features, [..., feature]."""
        raise NotImplementedError

    def said(self) -> dict[str, object]:
        """`activation.said()`: {"kind": "topk", "k": 32}: what a header says of it."""
        return {"kind": self.kind, **{name: getattr(self, name) for name in self.numbers}}

    def extra_repr(self) -> str:
        """`activation.extra_repr()`: "k=32": what torch puts into its repr."""
        return ", ".join(f"{name}={getattr(self, name)}" for name in self.numbers)

    def check(self, width: int) -> None:
        """`activation.check(width)`: InputError where it is not for so many features."""
        for name, held in self.named_buffers():
            if held.ndim and held.shape != (width,):
                raise InputError(
                    f"{type(self).__name__}: its {name} has shape {list(held.shape)}, and the dictionary has {width} "
                    f"features: give one number, or [{width}]."
                )


class ReLU(Activation):
    """`ReLU()`: f = max(p, 0)."""

    kind = "relu"

    def forward(self, p: Float[Tensor, "... feature"]) -> Float[Tensor, "... feature"]:
        return torch.relu(p)


class TopK(Activation):
    """`TopK(32)`: of each position the 32 largest, through a ReLU. InputError for a k below 1, or above the width."""

    kind = "topk"
    numbers = ("k",)

    @checked
    def __init__(self, k: int):
        super().__init__()
        self.k = _at_least_one(type(self).__name__, k)

    def forward(self, p: Float[Tensor, "... feature"]) -> Float[Tensor, "... feature"]:
        values, at = p.topk(self.k, dim=-1)
        return torch.zeros_like(p).scatter(-1, at, torch.relu(values))

    def check(self, width: int) -> None:
        _within(type(self).__name__, self.k, width)


class JumpReLU(Activation):
    """`JumpReLU(threshold)`: f = max(p, 0) where p > threshold, else 0; a number, or one a feature [feature]."""

    kind = "jumprelu"
    threshold: Tensor

    def __init__(self, threshold: Float[Tensor, "*feature"] | float):
        super().__init__()
        self.register_buffer("threshold", torch.as_tensor(threshold))

    def forward(self, p: Float[Tensor, "... feature"]) -> Float[Tensor, "... feature"]:
        return torch.relu(p) * (p > self.threshold)


class BatchTopK(Activation):
    """`BatchTopK(32)`: while it trains the largest 32 x positions of a whole batch; else a JumpReLU at the `threshold` that
    training left: the mean of the smallest value that a batch let through.

    InputError for a k below 1, or above the width.
    """

    kind = "batchtopk"
    numbers = ("k",)
    threshold: Tensor

    @checked
    def __init__(self, k: int, threshold: Float[Tensor, ""] | float = 0.0):
        super().__init__()
        self.k = _at_least_one(type(self).__name__, k)
        self.register_buffer("threshold", torch.as_tensor(threshold))

    def forward(self, p: Float[Tensor, "... feature"]) -> Float[Tensor, "... feature"]:
        f = torch.relu(p)
        if not self.training:
            return f * (p > self.threshold)
        kept = f.flatten().topk(self.k * (f.numel() // f.shape[-1])).indices
        return torch.zeros_like(f).flatten().scatter(0, kept, f.flatten()[kept]).view_as(f)

    def check(self, width: int) -> None:
        super().check(width)
        _within(type(self).__name__, self.k, width)


class Gated(Activation):
    """`Gated(scale, shift)`: f = max(scale p + shift, 0) where p > 0; both [feature] or numbers, scale above 0."""

    kind = "gated"
    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Float[Tensor, "*feature"] | float, shift: Float[Tensor, "*feature"] | float):
        super().__init__()
        self.register_buffer("scale", torch.as_tensor(scale))
        self.register_buffer("shift", torch.as_tensor(shift))

    def forward(self, p: Float[Tensor, "... feature"]) -> Float[Tensor, "... feature"]:
        return torch.relu(self.scale * p + self.shift) * (p > 0)

    def held(
        self, p: Float[Tensor, "... feature"]
    ) -> tuple[Float[Tensor, "... feature"], Float[Tensor, "... feature"]]:
        on = self.on(p).to(p.dtype)
        return on * self.scale, on * self.shift


def _at_least_one(name: str, k: int) -> int:
    if k < 1:
        raise InputError(f"{name}(k={k}): a position has at least one feature.")
    return int(k)


def _within(name: str, k: int, width: int) -> None:
    if k > width:
        raise InputError(f"{name}(k={k}): the dictionary has {width} features, so k is at most {width}.")


ACTIVATIONS = {kind.kind: kind for kind in (ReLU, TopK, BatchTopK, JumpReLU, Gated)}

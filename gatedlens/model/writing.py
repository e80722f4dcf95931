"""Writing: what a mixer writes to the residual stream, of what its implicit attention yields.

    writing = model.blocks[3].writing("attn", cache.__getitem__)
    writing.of(o)                  # batch pos d_model: the mixer's hook_mixer_out
    writing.seen(direction)        # batch pos copy channel: a direction in the stream, seen from o

    written[i, (k d)] = by[i, k] (W o[i] + b)[d]

W, b the output projection's. by is what stands between it and the stream, held, numbers of each position: 1 / scale of a norm
(its gain is in W and b then), or the shares in which what is written goes to the k copies that a stream holds side by side. With
neither, by is 1. So the bias's part, as every head's, may differ from position to position.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gatedlens.recurrence.autocast import exact


@dataclass(frozen=True)
class Writing:
    """`Writing(weight, bias, by)`; see the head of this file."""

    weight: Float[Tensor, "d_out channel"]
    bias: Float[Tensor, " d_out"] | None = None
    by: Float[Tensor, "*batch pos copy"] | None = None

    @property
    def width(self) -> int:
        """How wide what is written is: d_model."""
        return len(self.weight) * (1 if self.by is None else self.by.shape[-1])

    def of(self, o: Float[Tensor, "batch pos *channel"]) -> Float[Tensor, "batch pos d_model"]:
        """`writing.of(o)`: what is written, the bias with it."""
        weight, wide = self.weight.to(o.device), o.flatten(2)
        with exact(wide):
            projected = wide.to(weight.dtype) @ weight.T
        return self.spread(projected if self.bias is None else projected + self.bias.to(projected))

    def spread(
        self, x: Float[Tensor, "batch *place d_out"], by: Tensor | None = None
    ) -> Float[Tensor, "batch *place wide"]:
        """`writing.spread(x)`: what is projected as it is written, of every position; by [batch *place copy]: of some."""
        given = self.by if by is None else by
        if given is None:
            return x
        return (given.to(x).unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)

    def at(
        self, place: Int[Tensor, " batch"], x: Float[Tensor, "batch *some d_out"]
    ) -> Float[Tensor, "batch *some wide"]:
        """`writing.at(place, x)`: the same of x at a place of each row, whatever axes stand between."""
        if self.by is None:
            return x
        own = self.by[torch.arange(len(place), device=place.device), place]
        return self.spread(x, own.reshape(len(own), *(1 for _ in x.shape[1:-1]), -1))

    def by_heads(self, o: Float[Tensor, "*any"], heads: int) -> Float[Tensor, "*batch pos head d_model"]:
        """`writing.by_heads(o, heads=4)`: what each head of o writes, the bias left out, which is none's."""
        return self.of_heads(self.contents(o), heads)

    def of_heads(
        self, contents: Float[Tensor, "*batch pos copy channel"], heads: int
    ) -> Float[Tensor, "*batch pos head d_model"]:
        """`writing.of_heads(writing.contents(o), heads=4)`: the same of contents, or of a difference of some."""
        weight = self.weight.to(contents.device)
        with exact(contents):
            each = contents.unflatten(-1, (heads, -1)).to(weight.dtype)
            return torch.einsum("...khv,dhv->...hkd", each, weight.unflatten(1, (heads, -1))).flatten(-2)

    def contents(self, o: Float[Tensor, "*any"]) -> Float[Tensor, "*batch pos copy channel"]:
        """`writing.contents(o)`: o [*batch, pos, channel] (or [..., head, value]) as it stands in each copy: with `seen`,
        (contents(o) * seen(u)).sum() is u . what is written (the bias's part aside)."""
        wide = (o.flatten(-2) if o.shape[-1] != self.weight.shape[1] else o).unsqueeze(-2)
        return wide if self.by is None else wide * self.by.to(wide).unsqueeze(-1)

    def seen(self, direction: Float[Tensor, "batch *place d_model"]) -> Float[Tensor, "batch *place copy channel"]:
        """`writing.seen(direction)`: a direction in the stream as each copy's channels see it, W^T of its part."""
        with exact(direction):
            return direction.unflatten(-1, (-1, len(self.weight))) @ self.weight.to(direction)

    def of_bias(self, like: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """`writing.of_bias(resid)`: what the bias writes at each position, 0 where there is none."""
        if self.bias is None:
            return torch.zeros_like(like)
        return self.spread(self.bias.to(like).expand(*like.shape[:2], -1)).expand_as(like)

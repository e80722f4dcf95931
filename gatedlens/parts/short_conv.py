"""A gated short convolution as the whole of what mixes tokens: LFM2's. It has no scan and no state but the conv's tail.

    B, C, x = in_proj(n)              u = B x             c = causal depthwise conv(u) + bias             out = out_proj(C c)

The implicit attention is the conv's band between the two gates, held: A[i, j] = C[i] conv.weight[K - 1 - (i - j)] B[j].
b batch, l pos, c channel, K taps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatedlens.address.point import Point
from gatedlens.model.hookpoint import CONV
from gatedlens.model.path import Content, Held, PathMixer, Stage, Streams
from gatedlens.model.run import Run
from gatedlens.model.stages import Conv, Gate
from gatedlens.recurrence.band_matrix import BandScan


def short_conv_rows(source: str) -> tuple[Point, ...]:
    """`short_conv_rows(PAPER)`: the points of a `ShortConv`, in firing order."""
    return (
        Point("hook_in_gate", "batch pos channel", "in_proj(ln1.out)[:channel]", source),
        Point("hook_gate_pre", "batch pos channel", "in_proj(ln1.out)[channel:2 * channel]", source),
        Point("hook_x", "batch pos channel", "in_proj(ln1.out)[2 * channel:]", source),
        Point("hook_u", "batch pos channel", "in_gate * x", source),
        Point(
            "hook_conv_taps",
            "batch pos channel tap",
            "conv.weight[tap] * u[pos - (tap.size - 1) + tap], 0 from another document",
            source,
            True,
        ),
        Point("hook_conv", "batch pos channel", "sum over tap of conv_taps + conv.bias", source),
        Point("hook_gate", "batch pos channel", "gate_pre", source),
        Point("hook_gated", "batch pos channel", "conv * gate", source),
    )


class InGate(Stage):
    """u = in_gate x, 0 at padding."""

    def reads(self, mixer: PathMixer) -> tuple[str, ...]:
        return ("in_gate",)

    def forward(self, mixer: PathMixer, content: Content, streams: Streams, run: Run) -> Content:
        streams["x"] = mixer.fire("u", run.padding.zero(content * streams["in_gate"]))
        return streams["x"]

    def hold(self, mixer: PathMixer, held: Held) -> None:
        held.times("act", held.cached("in_gate") * held.padding.packed_mask(held.x))


class Band(Conv):
    """c = causal depthwise conv of u, as what the scan is elsewhere."""

    def hold(self, mixer: PathMixer, held: Held) -> None:
        (weight, bias), documents = self.filters(mixer), held.documents
        several = documents is not None and bool((documents != documents[:, :1]).any())
        rows, length, _ = held.x.shape
        taps = weight.to(held.x.dtype).squeeze(1)
        held.factors["scan"] = BandScan(taps, length, rows, documents if several else None)
        if held.state is not None:
            start = held.state["conv", mixer.layer].to(held.x)
            if documents is not None:  # nothing of it where a document begins at once
                start = start * (documents[:, :1] == 0).unsqueeze(-1)
            held.factors["start"] = start
        if bias is not None:
            behind = held.factors.get("gate", torch.ones_like(held.x))
            held.factors["rest"] = behind * bias.to(held.x.dtype) * held.padding.packed_mask(held.x)


def as_it_is(x: Tensor) -> Tensor:
    """x: a gate without an activation."""
    return x


class ShortConv(PathMixer):
    """out = out_proj(C conv(B x)). weights: with in_proj, conv and out_proj."""

    role = CONV
    path = (InGate(), Band("conv"), Gate(as_it_is))

    def project(self, n: Float[Tensor, "batch pos d_model"], run: Run) -> Streams:
        w = self.weights.in_proj
        # In memory of their own: a copy that a hook gets has the same layout then, and so the same rounding behind it.
        B, C, x = (part.contiguous() for part in F.linear(n, w.weight, w.bias).chunk(3, dim=-1))
        return {
            "in_gate": self.hook_in_gate(B),
            "gate_pre": self.hook_gate_pre(C),
            "x": self.hook_x(run.padding.zero(x)),
        }

    def output_weights(self) -> tuple[Float[Tensor, "d_model channel"], Float[Tensor, " d_model"] | None]:
        out: Any = self.weights.out_proj
        return out.weight, out.bias

"""Attention with one projection of q, k and v, and maybe a short convolution over all three: mamba-ssm's MHA.

    q, k, v = in_proj(n), each through a causal depthwise conv of a few taps (without an activation), if there is one
    out     = out_proj(softmax(q . k / sqrt(d)) v)

b batch, l pos, h head, d d_head. What a position brings is its v, behind the conv.
"""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatedlens.address.point import Point
from gatedlens.model.mixer import Mixer
from gatedlens.model.run import DocumentRun
from gatedlens.parts.attention import Attention, AttentionKind, rotate


def fused_rows(kind: AttentionKind, conv: bool, source: str) -> tuple[Point, ...]:
    """`fused_rows(AttentionKind(rotary=False), True, PAPER)`: the points of a `FusedAttention`, with a conv or without."""
    rows = {row.name: row for row in kind.rows(source)}
    own = {name: rows.pop(f"hook_{name}") for name in "qkv"}
    given = {name: f"in_proj(ln1.out), its part of {name}" for name in own}
    if not conv:
        return *(replace(row, equation=given[name]) for name, row in own.items()), *rows.values()
    before = [Point(f"hook_{name}_pre", row.axes, given[name], source) for name, row in own.items()]
    taps = [
        Point(
            f"hook_{name}_conv_taps",
            f"{row.axes} qkv_tap",
            f"conv1d.weight[qkv_tap] * {name}_pre[pos - (qkv_tap.size - 1) + qkv_tap], 0 from another document",
            source,
            True,
        )
        for name, row in own.items()
    ]
    behind = [replace(row, equation=f"sum over qkv_tap of {name}_conv_taps + conv1d.bias") for name, row in own.items()]
    return *before, *taps, *behind, *rows.values()


class FusedAttention(Attention, Mixer):
    """The same as `Attention`, its q, k and v from one matrix."""

    last = "out_proj"

    def read(
        self, n: Float[Tensor, "batch pos d_model"], run: DocumentRun
    ) -> tuple[
        Float[Tensor, "batch pos head d_head"],
        Float[Tensor, "batch pos kv_head d_head"],
        Float[Tensor, "batch pos kv_head d_head"],
        None,
    ]:
        w = self.weights
        heads = w.out_proj.weight.shape[1] // self.d_head
        shared = (w.in_proj.weight.shape[0] // self.d_head - heads) // 2
        given = F.linear(n, w.in_proj.weight, w.in_proj.bias).unflatten(-1, (-1, self.d_head))
        # In memory of their own: a copy that a hook gets has the same layout then, and so the same rounding behind it.
        parts = zip("qkv", given.split([heads, shared, shared], dim=2), strict=True)
        streams = {name: part.contiguous() for name, part in parts}
        if "conv1d" in w._modules:
            pad = run.padding
            before = {name: pad.zero(getattr(self, f"hook_{name}_pre")(pad.zero(x))) for name, x in streams.items()}
            together = {f"{name}_conv": x for name, x in before.items()}
            found = self.causal_convs(together, run, w.conv1d.weight, w.conv1d.bias)
            streams = {name: found[f"{name}_conv"] for name in streams}
        q, k, v = self.hook_q(streams["q"]), self.hook_k(streams["k"]), self.hook_v(streams["v"])
        if self.kind.rotary:
            cos, sin = self.angles(run.positions, q)
            q, k = self.hook_rot_q(rotate(q, cos, sin)), self.hook_rot_k(rotate(k, cos, sin))
        return q, k, v, None

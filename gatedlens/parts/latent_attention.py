"""Multi-head latent attention (MLA): keys and values of all heads from one small latent, and a part of the key for all heads.

b batch, l pos, h head, d d_head (of a value), e d_shared_key (of the shared part of a key), qk a key's whole width:

    q           = q_proj(n)                                  or q_b(norm(q_a(n))), each head [.., the last e may be rotary]
    latent, s   = kv_a(n)                                    [.., r], [.., e]
    k, v        = kv_b(norm(latent))                         k of each head has the shared s behind it, which may be rotary
    pattern     = softmax(q . k / sqrt(qk)) over what is before;   z = pattern v;   out = o_proj(z)

Which of these a layer has is data, `LatentKind`. DeepSeek-V2, arXiv 2405.04434, sec. 2.1; without rotary: Kimi Linear, arXiv
2510.26692.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatedlens.address.point import Point
from gatedlens.model.mixer import written
from gatedlens.model.norm import Norm, norm_rows
from gatedlens.model.run import DocumentRun
from gatedlens.model.state import Carried
from gatedlens.parts.attention import RMSNORM, ROPE, Attention, AttentionKind, Multipliers, rotate

MLA = "multi-head latent attention, arXiv 2405.04434"


def carried_by(head: str = "head") -> dict[str, Carried]:
    """`carried_by("q_head")`: what such a layer leaves for the next call, its axis of heads by this name."""
    return {
        "keys": Carried("window", f"batch key_pos {head} d_qk"),
        "values": Carried("window", f"batch key_pos {head} d_head"),
        "key_positions": Carried("window", "batch key_pos"),
    }


@dataclass(frozen=True)
class LatentKind(AttentionKind):
    """`LatentKind(rotary=False, narrow_q=True)`: what a latent attention does.

    rotary: the shared part of the key, and as much at the end of each query, is turned by position. pairs: neighbours are turned
    with one another, (0, 1), (2, 3), ..., and stand apart behind it, as in DeepSeek's; else the halves are. narrow_q: queries
    come from a latent of their own. gated, gate_of_heads: a sigmoid of one number a head, of g_proj, before o_proj (or none).
    head: what the axis of the heads is called.
    """

    pairs: bool = False
    narrow_q: bool = False

    def rows(self, source: str = MLA, reads: str = "ln1.out") -> tuple[Point, ...]:
        """`LatentKind().rows()`: the points of such a `LatentAttention`, in firing order."""
        qk, v = f"batch pos {self.head} d_qk", f"batch pos {self.head} d_head"
        rows = []
        if self.gated:
            rows.append(Point("hook_gate_pre", f"batch pos {self.head}", f"g_proj({reads}), a number a head", source))
        if self.narrow_q:
            rows.append(Point("hook_q_latent", "batch pos q_latent", f"q_a_proj({reads})", source))
            rows += norm_rows("q_norm", "q_latent", RMSNORM, axes="batch pos q_latent")
        of_q = "q_b_proj(q_norm.out)" if self.narrow_q else f"q_proj({reads})"
        latent = f"kv_a_proj_with_mqa({reads})"
        rows += [
            Point("hook_q", qk, of_q, source),
            Point("hook_kv_latent", "batch pos kv_latent", f"{latent}[:kv_latent]", source),
            Point("hook_k_shared", "batch pos d_shared_key", f"{latent}[kv_latent:]", source),
            *norm_rows("kv_norm", "kv_latent", RMSNORM, axes="batch pos kv_latent"),
        ]
        shared = "k_shared"
        names = {"q": "q", "k": "k"}
        if self.rotary:
            turned = "turned by position" + (", neighbours in pairs" if self.pairs else "")
            rows.append(Point("hook_rot_q", qk, f"q, its last d_shared_key {turned}", ROPE))
            rows.append(Point("hook_rot_k_shared", "batch pos d_shared_key", f"k_shared {turned}", ROPE))
            shared, names["q"] = "rot_k_shared", "rot_q"
        own = "kv_b_proj(kv_norm.out), each head"
        rows += [
            Point("hook_k", qk, f"{own}'s first, behind it {shared} for all heads", source),
            Point("hook_v", v, f"{own}'s last d_head", source),
        ]
        return (*rows, *self.mixing_rows(source, v, names, "d_qk"))


class LatentAttention(Attention):
    """Causal latent attention over all real tokens of a document. Its state carries whole keys and values, not latents.

    norms: that of the query's latent (None where the kind has none) and that of the keys' and values'.
    """

    kind: LatentKind

    def __init__(
        self,
        weights: Any,
        rows: tuple[Point, ...],
        layer: int,
        kind: LatentKind,
        d_head: int,
        norms: tuple[Norm | None, Norm],
        rotary: Any = None,
        multipliers: Multipliers = Multipliers(),  # noqa: B008  # a constant
    ):
        super().__init__(weights, rows, layer, kind, d_head, rotary=rotary, multipliers=multipliers)
        q_norm, self.kv_norm = norms
        if q_norm is not None:
            self.q_norm = q_norm

    def named_weights(self) -> dict[str, Tensor]:
        return written(self)

    def read(
        self, n: Float[Tensor, "batch pos d_model"], run: DocumentRun
    ) -> tuple[
        Float[Tensor, "batch pos head d_qk"],
        Float[Tensor, "batch pos head d_qk"],
        Float[Tensor, "batch pos head d_v"],
        Float[Tensor, "batch pos head"] | None,
    ]:
        w, kind = self.weights, self.kind
        width = w.kv_b_proj.weight.shape[1]  # of the keys' and values' latent
        d_shared = w.kv_a_proj_with_mqa.weight.shape[0] - width
        gate_pre = self.hook_gate_pre(F.linear(n, w.g_proj.weight)) if kind.gated else None
        if kind.narrow_q:
            narrow = self.q_norm(self.hook_q_latent(F.linear(n, w.q_a_proj.weight, w.q_a_proj.bias)))
            q = F.linear(narrow, w.q_b_proj.weight)
        else:
            q = F.linear(n, w.q_proj.weight)
        heads = w.o_proj.weight.shape[1] // self.d_head
        q = self.hook_q(q.unflatten(-1, (heads, -1)))
        latent, shared = F.linear(n, w.kv_a_proj_with_mqa.weight, w.kv_a_proj_with_mqa.bias).split(
            [width, d_shared], -1
        )
        latent, shared = self.hook_kv_latent(latent), self.hook_k_shared(shared)
        latent = self.kv_norm(latent)
        if kind.rotary:
            cos, sin = self.angles(run.positions, q)
            still, turning = q.split([q.shape[-1] - d_shared, d_shared], dim=-1)
            q = self.hook_rot_q(torch.cat([still, self.turned(turning, cos, sin)], dim=-1))
            shared = self.hook_rot_k_shared(self.turned(shared.unsqueeze(2), cos, sin).squeeze(2))
        both = F.linear(latent, w.kv_b_proj.weight).unflatten(-1, (heads, -1))
        own, v = both.split([both.shape[-1] - self.d_head, self.d_head], dim=-1)
        k = self.hook_k(torch.cat([own, shared.unsqueeze(2).expand(-1, -1, heads, -1)], dim=-1))
        return q, k, self.hook_v(v), gate_pre

    def turned(
        self,
        x: Float[Tensor, "batch pos some d_shared_key"],
        cos: Float[Tensor, "batch pos d_shared_key"],
        sin: Float[Tensor, "batch pos d_shared_key"],
    ) -> Float[Tensor, "batch pos some d_shared_key"]:
        """`rotate`, of neighbours in pairs where the kind says so: the first of each pair then stand before the second."""
        if self.kind.pairs:
            x = torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)
        return rotate(x, cos, sin)

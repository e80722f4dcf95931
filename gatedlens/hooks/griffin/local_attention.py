"""Local attention: causal softmax attention over a window, the token mixing of every third Griffin block.

b batch, l pos, h head, k key position, W the window, d d_head:

    q, k, v = proj(n), half of each head rotary;   pattern = softmax(q . k / sqrt(d)) over the last W tokens;   z = pattern v

Griffin (arXiv 2402.19427), sec. 2.3; rotary embedding: arXiv 2104.09864.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gatedlens.address.point import Point
from gatedlens.model.memory import SMALL, afford, free
from gatedlens.model.mixer import TokenMixing
from gatedlens.model.padding import Padding
from gatedlens.model.run import DocumentRun
from gatedlens.model.state import RecurrentState
from gatedlens.recurrence.factors import Factors
from gatedlens.recurrence.pattern_matrix import PatternScan
from gatedlens.recurrence.scanning import at_least_float32


def rotate(
    x: Float[Tensor, "batch pos some d_head"],
    cos: Float[Tensor, "batch pos rotary"],
    sin: Float[Tensor, "batch pos rotary"],
) -> Float[Tensor, "batch pos some d_head"]:
    """The first `rotary` of d_head turned in pairs (j, j + rotary / 2); the rest as it is."""
    turning, still = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    first, second = turning.chunk(2, dim=-1)
    aside = torch.cat([-second, first], dim=-1)
    return torch.cat([turning * cos.unsqueeze(2) + aside * sin.unsqueeze(2), still], dim=-1)


class LocalAttention(TokenMixing):
    """Causal attention over the last `window` tokens, the own one included, of the same document.

    The state carries the last window - 1 `keys` (rotary applied) and `values`, oldest first, with `key_positions`, -1
    for an empty place. A call that goes on from a state has them in front: key_pos = carried + pos.
    """

    place = "attn"
    attention_points = ("hook_v", "hook_pattern", "hook_z")
    output_point = "hook_z"

    def __init__(self, weights: Any, rows: tuple[Point, ...], layer: int, d_head: int, window: int):
        super().__init__(weights, rows, layer)
        self.d_head = d_head
        self.window = window

    def branches(
        self, cached: Callable[[str], Tensor], padding: Padding, state: RecurrentState | None
    ) -> tuple[Factors, ...]:
        """A is the pattern of each channel's head, x the values, and r what the carried window's values bring."""
        v, pattern, z = (at_least_float32(cached(name)) for name in self.attention_points)
        heads, length = pattern.shape[1], v.shape[1]
        groups = heads // v.shape[2]

        def channels(values: Tensor) -> Tensor:
            return values.repeat_interleave(groups, dim=2).flatten(2)

        before, own = pattern[..., :-length], pattern[..., -length:]
        if padding.order is not None:
            rows = padding.order[:, None, :, None]
            before = before.gather(2, rows.expand(-1, heads, -1, before.shape[-1]))
            own = own.gather(2, rows.expand_as(own)).gather(3, rows.mT.expand_as(own))
        head = torch.arange(heads, device=v.device).repeat_interleave(self.d_head)
        start = None if state is None else channels(state["values", self.layer].to(v))
        x, o = padding.pack(channels(v)), padding.pack(z.flatten(2))
        return (Factors(x=x, o=o, scan=PatternScan(own, before, head), start=start),)

    def output_weights(self) -> tuple[Float[Tensor, "d_model channel"], Float[Tensor, " d_model"] | None]:
        return self.weights.o_proj.weight, self.weights.o_proj.bias

    def project(
        self, n: Float[Tensor, "batch pos d_model"], projection: nn.Linear
    ) -> Float[Tensor, "batch pos some d_head"]:
        return F.linear(n, projection.weight, projection.bias).unflatten(-1, (-1, self.d_head))

    def angles(self, positions: Int[Tensor, "batch pos"], like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of position * theta^(-2j / rotary_dim), twice side by side, for the pairs of `rotate`."""
        frequency = at_least_float32(self.weights.rotary_emb.inv_freq)
        angle = (positions.unsqueeze(-1) * frequency).repeat(1, 1, 2)
        return angle.cos().to(like.dtype), angle.sin().to(like.dtype)

    def visible(self, carried: Int[Tensor, "batch carried"], run: DocumentRun) -> Bool[Tensor, "batch 1 pos key_pos"]:
        """Which keys each query sees, counted in real tokens; a position always sees itself, so no row is empty."""
        before = torch.arange(-carried.shape[1], 0, device=carried.device).expand_as(carried)
        behind = run.ranks.unsqueeze(2) - torch.cat([before, run.ranks], dim=1).unsqueeze(1)
        real = torch.cat([carried >= 0, run.real], dim=1).unsqueeze(1)
        seen = (behind >= 0) & (behind < self.window) & real
        if run.documents is not None:
            of_keys = torch.cat([torch.zeros_like(carried), run.documents], dim=1)
            seen &= run.documents.unsqueeze(2) == of_keys.unsqueeze(1)
        return (seen | (behind == 0)).unsqueeze(1)

    def _afford(
        self, q: Float[Tensor, "batch pos head d_head"], keys: Float[Tensor, "batch key_pos some d_head"]
    ) -> None:
        """TooLargeError for scores and a pattern that the device does not hold."""
        batch, length, heads, _ = q.shape
        pairs = batch * length * keys.shape[1]
        size = pairs * (heads * (2 * q.element_size() + 8) + 10)  # scores twice, their float32 softmax; who sees whom
        if size < SMALL or torch.compiler.is_compiling():
            return
        afford(
            f"The attention of layer {self.layer}, {heads} heads over {length} x {keys.shape[1]} positions,",
            size,
            free(q.device),
            f"Run the text in parts: `_, state = model(first, return_state=True)`, then `model(rest, state=state)`; a part "
            f"of n positions takes n * (n + {self.window - 1}).",
            f"the {{}} that are free on {q.device}",
        )

    def remember(self, keys: Tensor, values: Tensor, carried: Int[Tensor, "batch carried"], run: DocumentRun) -> None:
        """Leave the last window - 1 real keys and values of each row, without those of documents that have ended."""
        if run.left is None:
            return
        places = torch.cat([carried, run.positions.masked_fill(~run.real, -1)], dim=1)
        if run.documents is not None:
            of_keys = torch.cat([torch.zeros_like(carried), run.documents], dim=1)
            places = places.masked_fill(of_keys != run.last, -1)
        # Oldest first with the empty places in front: a stable sort keeps the order of the others.
        order = (places >= 0).to(torch.int8).argsort(dim=1, stable=True)
        order = order[:, max(0, order.shape[1] - (self.window - 1)) :]
        rows = torch.arange(len(order), device=order.device).unsqueeze(1)
        for name, value in (("keys", keys), ("values", values), ("key_positions", places)):
            run.leave(name, self.layer, value[rows, order])

    def forward(self, n: Float[Tensor, "batch pos d_model"], run: DocumentRun) -> Float[Tensor, "batch pos d_model"]:
        w = self.weights
        q = self.hook_q(self.project(n, w.q_proj))
        k = self.hook_k(self.project(n, w.k_proj))
        v = run.padding.zero(self.hook_v(self.project(n, w.v_proj)))  # 0 * NaN at a masked key would be NaN
        cos, sin = self.angles(run.positions, q)
        rot_q = self.hook_rot_q(rotate(q, cos, sin))
        rot_k = self.hook_rot_k(rotate(k, cos, sin))

        carried = run.start("key_positions", self.layer, (len(n), -1), run.positions)
        shape = (len(n), carried.shape[1], *k.shape[2:])
        keys = torch.cat([run.start("keys", self.layer, shape, k), rot_k], dim=1)
        values = torch.cat([run.start("values", self.layer, shape, v), v], dim=1)
        self.remember(keys, values, carried, run)

        self._afford(q, keys)
        groups = q.shape[2] // k.shape[2]  # so many heads share one key and value head
        scores = torch.einsum("bqhd,bkhd->bhqk", rot_q, keys.repeat_interleave(groups, dim=2)) * self.d_head**-0.5
        scores = self.hook_attn_scores(scores.masked_fill(~self.visible(carried, run), -torch.inf))
        pattern = self.hook_pattern(at_least_float32(scores).softmax(-1).to(v.dtype))
        pattern = F.dropout(pattern, w.attention_dropout, self.training)
        z = self.hook_z(torch.einsum("bhqk,bkhd->bqhd", pattern, values.repeat_interleave(groups, dim=2)))
        return F.linear(z.flatten(2), w.o_proj.weight, w.o_proj.bias)

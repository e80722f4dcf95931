"""RetNet's multi-scale retention (Sun et al. 2023, arXiv 2307.08621), as flash-linear-attention lays it out.

q, k turned by position (rotary, all of a key)          decay = 1 - 2^(-5 - h), the same at each position
state_t = decay state_{t-1} + u_t k_t^T          scan_t = state_t q_t / sqrt(n)
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from gatedlens.address.point import Point
from gatedlens.hooks.fla.mixer import KEYS, FlaMixer
from gatedlens.model.path import Content, Streams
from gatedlens.model.run import DocumentRun
from gatedlens.parts.attention import ROPE, rotate, turns
from gatedlens.recurrence.scanning import at_least_float32
from gatedlens.recurrence.terms import Terms

RETNET = "RetNet, arXiv 2307.08621"
BASE = 10000.0  # of the angles


class RetentionMixer(FlaMixer):
    """Multi-scale retention."""

    paper = RETNET
    selection = ("rot_q", "rot_k", "log_decay")
    written = "u * rot_k"
    read = "sum over state of rot_q * state / sqrt(state.size)"
    select_rows = (
        Point("hook_q", KEYS, "{q}", RETNET),
        Point("hook_k", KEYS, "{k}", RETNET),
        Point("hook_rot_q", KEYS, "q, turned by position", ROPE),
        Point("hook_rot_k", KEYS, "k, turned by position", ROPE),
        Point("hook_log_decay", "batch pos head", "log(1 - 2^(-5 - head))", f"{RETNET}, eq. 8"),
    )

    def select(self, u: Content, streams: Streams, run: DocumentRun) -> None:  # type: ignore[override]
        zero = run.padding.zero  # k and log decay 0 at padding: nothing is written, and the state passes unchanged
        q, k = self.hook_q(at_least_float32(streams["q"])), self.hook_k(at_least_float32(streams["k"]))
        pairs = torch.arange(0, q.shape[-1], 2, dtype=q.dtype, device=q.device)
        cos, sin = turns(run.positions, BASE ** (-pairs / q.shape[-1]))
        streams["rot_q"] = self.hook_rot_q(rotate(q, cos, sin))
        streams["rot_k"] = zero(self.hook_rot_k(zero(rotate(k, cos, sin))))
        heads = torch.arange(self.heads, dtype=q.dtype, device=q.device)
        log_decay = torch.log1p(-(2 ** (-5 - heads))).expand(q.shape[:3])
        streams["log_decay"] = zero(self.hook_log_decay(zero(log_decay)))

    def terms(  # type: ignore[override]
        self,
        rot_q: Float[Tensor, "batch pos head state"],
        rot_k: Float[Tensor, "batch pos head state"],
        log_decay: Float[Tensor, "batch pos head"],
    ) -> Terms:
        return Terms(log_decay.unsqueeze(-1), key=rot_k, read=rot_q * rot_q.shape[-1] ** -0.5)

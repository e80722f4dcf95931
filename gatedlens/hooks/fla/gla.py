"""Gated linear attention (Yang et al. 2023, arXiv 2312.06635), as flash-linear-attention lays it out.

log decay = logsigmoid(W2 W1 n + b) / 16 (the config's gate_logit_normalizer), a number for each of a key's
state_t   = diag(decay_t) state_{t-1} + u_t k_t^T          scan_t = state_t q_t / sqrt(n)
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatedlens.address.point import Point
from gatedlens.hooks.fla.mixer import KEYS, FlaMixer
from gatedlens.model.path import Content, Streams
from gatedlens.model.run import Run
from gatedlens.recurrence.scanning import at_least_float32
from gatedlens.recurrence.terms import Terms

GLA = "GLA, arXiv 2312.06635"
DECAY = "log(sigmoid(decay_pre)) / gate_logit_normalizer (16), at least clamp_min if the config has one"


class GlaMixer(FlaMixer):
    """Gated linear attention."""

    paper = GLA
    selection = ("q", "k", "log_decay")
    beside_rows = (
        Point("hook_decay_low", "batch pos low", "gk_proj.0(ln1.out)", f"{GLA}, sec. 4"),
        Point("hook_decay_pre", "batch pos head state", "gk_proj.1(decay_low)", f"{GLA}, sec. 4"),
    )
    select_rows = (
        Point("hook_q", KEYS, "{q}", GLA),
        Point("hook_k", KEYS, "{k}", GLA),
        Point("hook_log_decay", "batch pos head state", DECAY, f"{GLA}, sec. 4"),
    )  # fmt: skip

    def read_beside(self, n: Float[Tensor, "batch pos d_model"], run: Run) -> Streams:
        first, second = self.weights.gk_proj
        low = self.hook_decay_low(F.linear(n, first.weight))
        pre = F.linear(low, second.weight, second.bias).unflatten(-1, (self.heads, -1))
        return {"decay_pre": self.hook_decay_pre(at_least_float32(pre))}

    def select(self, u: Content, streams: Streams, run: Run) -> None:
        zero = run.padding.zero  # k and log decay 0 at padding: nothing is written, and the state passes unchanged
        streams["q"] = self.hook_q(streams["q"])
        streams["k"] = zero(self.hook_k(streams["k"]))
        log_decay = F.logsigmoid(streams["decay_pre"]) / self.cfg.log_decay_divisor
        if self.cfg.least_log_decay is not None:
            log_decay = log_decay.clamp(min=self.cfg.least_log_decay)
        streams["log_decay"] = zero(self.hook_log_decay(zero(log_decay)))

    def terms(  # type: ignore[override]
        self,
        q: Float[Tensor, "batch pos head state"],
        k: Float[Tensor, "batch pos head state"],
        log_decay: Float[Tensor, "batch pos head state"],
    ) -> Terms:
        return Terms(log_decay, key=k, read=q * q.shape[-1] ** -0.5)

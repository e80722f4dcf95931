"""HGRN2 (Qin et al. 2024, arXiv 2404.07904), as flash-linear-attention lays it out: the key is what the gate forgets.

decay   = lower + (1 - lower) sigmoid(f), a number for each of a key's; lower rises from layer to layer, 0 in the first
state_t = diag(decay_t) state_{t-1} + u_t (1 - decay_t)^T          scan_t = state_t SiLU(q_t) / sqrt(n)
out     = o_proj(RMSNorm(scan)), the norm over all channels; no gate
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatedlens.address.point import Point
from gatedlens.hooks.fla.mixer import KEYS, FlaConfig, FlaKind, FlaMixer
from gatedlens.model.path import Content, Stage, Streams
from gatedlens.model.run import Run
from gatedlens.model.stages import Real
from gatedlens.recurrence.scanning import at_least_float32
from gatedlens.recurrence.terms import Terms

HGRN2 = "HGRN2, arXiv 2404.07904"


class Hgrn2Mixer(FlaMixer):
    """Gated linear RNN with state expansion."""

    paper = HGRN2
    projections: ClassVar = {"q": "q", "f": "f", "x": "i"}
    norms_heads = False
    selection = ("q", "k", "log_decay")
    select_rows = (
        Point("hook_q", KEYS, "SiLU({q})", HGRN2),
        Point("hook_log_decay", KEYS, "log(lower + (1 - lower) * sigmoid({f})), lower of the layer", HGRN2),
        Point("hook_k", KEYS, "1 - exp(log_decay)", HGRN2),
    )

    def __init__(self, weights: Any, rows: tuple[Point, ...], layer: int, cfg: FlaConfig, decoder: Any):
        super().__init__(weights, rows, layer, cfg)
        self.__dict__["decoder"] = decoder  # of the wrapped model, as `weights` is: it holds all layers' lower bounds

    @classmethod
    def entered(cls, stream: str, kind: FlaKind) -> str:
        return f"{stream}_conv" if kind.conv else f"{stream}_pre"

    @property
    def entering(self) -> Stage:
        return Real("u")

    def lower(self) -> Float[Tensor, "head state"] | None:
        """The share of the state that each number of a key keeps at least; None: 0."""
        bounds = self.decoder._parameters.get("lower_bounds")
        if bounds is None or self.layer == 0:
            return None
        steps = at_least_float32(bounds).softmax(0)
        return steps[1 : self.layer + 1].sum(0).unflatten(0, (self.heads, -1))

    def select(self, u: Content, streams: Streams, run: Run) -> None:
        zero, lower = run.padding.zero, self.lower()
        streams["q"] = self.hook_q(F.silu(at_least_float32(streams["q"])))
        log_decay = F.logsigmoid(at_least_float32(streams["f"]))
        if lower is not None:
            lower = lower.to(log_decay.device)
            log_decay = torch.logaddexp(torch.log(lower), torch.log1p(-lower) + log_decay)
        streams["log_decay"] = zero(self.hook_log_decay(zero(log_decay)))
        streams["k"] = zero(self.hook_k(-torch.expm1(streams["log_decay"])))

    def terms(  # type: ignore[override]
        self,
        q: Float[Tensor, "batch pos head state"],
        k: Float[Tensor, "batch pos head state"],
        log_decay: Float[Tensor, "batch pos head state"],
    ) -> Terms:
        return Terms(log_decay, key=k, read=q * q.shape[-1] ** -0.5)

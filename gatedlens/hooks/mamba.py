"""Mamba (Gu and Dao 2023, arXiv 2312.00752): selective state spaces, and FalconMamba, which norms dt, B and C.

b batch, l pos, d d_model, c channel (d_inner = expand * d_model), n state, r dt_rank, K taps of the causal conv.

    x, z    = in_proj(n)                        c = conv1d(x) + bias            u = SiLU(c)
    dt, B, C = x_proj(u)                        dt = softplus(dt_proj(dt))      A = -exp(A_log)
    state_t = exp(dt_t A) state_{t-1} + dt_t B_t u_t                            scan_t = C_t . state_t
    y       = scan + D u                        out = out_proj(y SiLU(z))

Wraps transformers' MambaForCausalLM and FalconMambaForCausalLM, mamba-ssm's MambaLMHeadModel (by its parameter names)
and `Weights` of formats/mamba_ssm.py, which holds a checkpoint in mamba-ssm's original layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatedlens import fused
from gatedlens.address.point import Point, block_rows
from gatedlens.compat.names.mamba import ALIASES, VIEWS
from gatedlens.errors import CheckpointError
from gatedlens.formats.mamba_ssm import TINY, MambaSsm
from gatedlens.formats.mamba_ssm import Weights as Weights  # where it was before
from gatedlens.formats.mamba_stack import MambaStack, StackConfig, has_matrix_states, is_hybrid, writes_two_terms
from gatedlens.formats.transformers_config import MAMBA
from gatedlens.model.base import Wrapped
from gatedlens.model.block import Block, Sub, SubRows, residual_rows
from gatedlens.model.hookpoint import rows_of
from gatedlens.model.norm import NormOfNarrow, eps_of, norm_rows
from gatedlens.model.path import Kernel, PathMixer, Streams
from gatedlens.model.run import Run
from gatedlens.model.stages import ChannelScan, Conv, Gate, SiLU, Skip
from gatedlens.model.weights import linear, several
from gatedlens.recurrence.channels import ChannelTerms
from gatedlens.recurrence.scanning import at_least_float32

PAPER = "Mamba, arXiv 2312.00752"
UIA = "UIA, arXiv 2405.16504"

RESET = Point(
    "hook_reset", "batch pos one", "1 where a document begins (position 0 of position_ids), else 0", f"{PAPER}, eq. 2"
)
MIXER_ROWS = (
    Point("hook_x", "batch pos channel", "in_proj(ln1.out)[:channel]", f"{PAPER}, fig. 3"),
    Point("hook_gate_pre", "batch pos channel", "in_proj(ln1.out)[channel:]", f"{PAPER}, fig. 3"),
    Point(
        "hook_conv_taps",
        "batch pos channel tap",
        "conv1d.weight[tap] * x[pos - (tap.size - 1) + tap], 0 from another document",
        f"{UIA}, eq. 9",
        True,
    ),
    Point("hook_conv", "batch pos channel", "sum over tap of conv_taps + conv1d.bias", f"{PAPER}, fig. 3"),
    Point("hook_u", "batch pos channel", "SiLU(conv)", f"{PAPER}, fig. 3"),
    Point("hook_dt_rank", "batch pos dt_rank", "x_proj(u)[:dt_rank]", f"{PAPER}, alg. 2"),
    Point("hook_B", "batch pos state", "x_proj(u)[dt_rank:dt_rank + state]", f"{PAPER}, alg. 2"),
    Point("hook_C", "batch pos state", "x_proj(u)[dt_rank + state:]", f"{PAPER}, alg. 2"),
    Point("hook_dt_pre", "batch pos channel", "dt_proj(dt_rank)", f"{PAPER}, alg. 2"),
    Point("hook_dt", "batch pos channel", "softplus(dt_pre)", f"{PAPER}, alg. 2"),
    RESET,
    Point(
        "hook_state_start",
        "batch channel state",
        "state before the first position (zero without a state)",
        f"{PAPER}, eq. 2",
        True,
    ),
    Point("hook_decay", "batch pos channel state", "exp(dt * A) * (1 - reset)", f"{PAPER}, eq. 4", True),
    Point("hook_write", "batch pos channel state", "dt * B * u", f"{PAPER}, eq. 4 (Euler)", True),
    Point("hook_state", "batch pos channel state", "decay * state[pos - 1] + write", f"{PAPER}, eq. 2a", True),
    Point("hook_scan", "batch pos channel", "sum over state of C * state", f"{PAPER}, eq. 2b"),
    Point("hook_y", "batch pos channel", "scan + D * u", f"{PAPER}, alg. 2"),
    Point("hook_gate", "batch pos channel", "SiLU(gate_pre)", f"{PAPER}, fig. 3"),
    Point("hook_gated", "batch pos channel", "y * gate", f"{PAPER}, fig. 3"),
)
FALCON = "Falcon Mamba, arXiv 2410.05355"
RMSNORM = "RMSNorm, arXiv 1910.07467"
BLOCK_ROWS = residual_rows(
    SubRows("mixer", block_rows("mixer", MIXER_ROWS), "out_proj(gated)", norm_rows("ln1", "mixer_in", RMSNORM))
)


class SelectiveScan(PathMixer):
    """gated = y * SiLU(z), y = SSM(SiLU(conv(x))): what lies between the two projections, every intermediate a point."""

    path = (Conv("conv1d"), SiLU(), Skip(ChannelScan()), Gate(F.silu))
    selection = ("dt", "B", "C")

    def __init__(
        self, weights: Any, rows: tuple[Point, ...], layer: int, rms_eps: tuple[float, float, float] | None = None
    ):
        super().__init__(weights, rows, layer)
        self.rms_eps = rms_eps  # of FalconMamba's weightless RMS of dt, B and C; None in Mamba

    @property
    def A(self) -> Float[Tensor, "channel state"]:  # type: ignore[override]
        """-exp(A_log), at least float32."""
        return -torch.exp(at_least_float32(self.weights.A_log))

    def select(self, u: Float[Tensor, "batch pos channel"], streams: Streams, run: Run) -> None:
        w, pad = self.weights, run.padding
        dt_rank, B, C = self.selected(u)
        streams["B"] = self.hook_B(B)
        streams["C"] = self.hook_C(C)
        dt_pre = self.hook_dt_pre(F.linear(dt_rank, w.dt_proj.weight, w.dt_proj.bias))
        # 0 at a masked position: the state passes unchanged
        streams["dt"] = pad.zero(self.hook_dt(pad.zero(F.softplus(dt_pre))))

    def selected(self, u: Float[Tensor, "batch pos channel"]) -> tuple[Tensor, Tensor, Tensor]:
        """What dt_proj reads, B and C, with FalconMamba's weightless RMS norm of each, where there is one."""
        selection = self.projected(u)
        if self.rms_eps is not None:
            selection = [_rms(x, eps) for x, eps in zip(selection, self.rms_eps, strict=True)]
        dt_rank, B, C = selection
        return self.hook_dt_rank(dt_rank), B, C

    def projected(self, u: Float[Tensor, "batch pos channel"]) -> Sequence[Tensor]:
        """What x_proj gives: dt of low rank, B and C."""
        w = self.weights
        ranks, n_state = w.dt_proj.weight.shape[1], w.A_log.shape[1]
        return F.linear(u, w.x_proj.weight).split([ranks, n_state, n_state], dim=-1)

    def terms(  # type: ignore[override]
        self,
        dt: Float[Tensor, "batch pos channel"],
        B: Float[Tensor, "batch pos state"],
        C: Float[Tensor, "batch pos state"],
    ) -> ChannelTerms:
        """decay = exp(dt A), write = dt B u, read = C: Mamba, eq. 2 and 4."""
        return ChannelTerms(dt, amount=dt, key=B, read=C, rate=self.A.to(dt))

    def kernel(self, terms: ChannelTerms, u: Float[Tensor, "batch pos channel"], run: Run) -> Kernel | None:
        """mamba-ssm's scan, where it can stand in for ours: from no state, and without gradients if it leaves one."""
        found = fused.kernels_for(u) if run.before is None and terms.fresh is None else None
        if found is None or (run.left is not None and torch.is_grad_enabled()):
            return None
        assert terms.key is not None and terms.read is not None and terms.rate is not None
        dt, B, C, u = (self.along(x) for x in (terms.log_decay, terms.key, terms.read, u))
        return partial(fused.selective_scan, found, dt, B, C, u, terms.rate)

    def named_weights(self) -> dict[str, Tensor]:
        w = self.weights
        dt_rank, state = w.dt_proj.weight.shape[1], w.A_log.shape[1]
        selection = several(w.x_proj.weight, None, {"dt_rank": dt_rank, "B": state, "C": state})
        return {**selection, **linear("dt", w.dt_proj), "A": self.A, **super().named_weights()}


def _rms(x: Tensor, eps: float) -> Tensor:
    wide = at_least_float32(x)
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


class MambaMixer(SelectiveScan):
    """out = out_proj(gated), x and z = in_proj(n)."""

    def project(self, n: Float[Tensor, "batch pos d_model"], run: Run) -> Streams:
        x, z = F.linear(n, self.weights.in_proj.weight, self.weights.in_proj.bias).chunk(2, dim=-1)
        return {"x": self.hook_x(run.padding.zero(x)), "gate_pre": self.hook_gate_pre(z)}

    def output_weights(self) -> tuple[Float[Tensor, "d_model channel"], Float[Tensor, " d_model"] | None]:
        return self.weights.out_proj.weight, self.weights.out_proj.bias

    def named_weights(self) -> dict[str, Tensor]:
        channels = self.weights.A_log.shape[0]
        read = several(self.weights.in_proj.weight, self.weights.in_proj.bias, {"in": channels, "gate": channels})
        return {**read, **super().named_weights()}

    def forward(self, n: Float[Tensor, "batch pos d_model"], run: Run) -> Float[Tensor, "batch pos d_model"]:
        found = fused.kernels_for(n)
        if found is not None and found.mamba_inner is not None and self.plain(run):
            return fused.mixer(found.mamba_inner, n, self.weights, self.A)
        return super().forward(n, run)

    def plain(self, run: Run) -> bool:
        """Whether a call is what mamba-ssm's fused mixer computes: no state, no padding, no documents, no norms inside, no
        listener."""
        taps = self.weights.conv1d.weight.shape[-1]
        alone = run.before is None and run.left is None and run.padding.mask is None and run.in_document(taps) is None
        return alone and self.rms_eps is None and taps in fused.TAPS and self.at_rest()


# -- the model ------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class MambaConfig(StackConfig):
    """cfg of Mamba and FalconMamba. `rms_eps`: FalconMamba's norm of dt, B, C; None in Mamba."""

    dt_rank: int
    rms_eps: float | None = None

    @property
    def sizes(self) -> dict[str, int]:
        own = {"channel": self.d_inner, "state": self.d_state, "tap": self.d_conv, "dt_rank": self.dt_rank}
        return {**super().sizes, **own}


class HookedMamba(MambaStack):
    """`HookedMamba(MambaForCausalLM(...))`, or better `gl.wrap(...)`: Mamba with every intermediate a hook point."""

    title = "Mamba"
    paper = "Gu and Dao, Mamba: Linear-Time Sequence Modeling with Selective State Spaces (arXiv 2312.00752)"
    reference = ("state-spaces/mamba-130m-hf", {"d_model": 768, "channel": 1536, "state": 16, "tap": 4, "dt_rank": 48})
    recurrence: ClassVar = {
        "decay": "exp(dt * A), [channel, state]",
        "write": "dt * B * u, [channel, state]",
        "read": "C, [state]",
        "skip": "D * u",
        "conv": "causal depthwise conv over x, with bias",
        "activation before the scan": "SiLU: u = sigmoid(c) * c",
        "gate": "SiLU(gate_pre)",
    }
    attention_words: ClassVar = {
        "x": "x",
        "o": "gated",
        "gate": "gate",
        "scan": "S[i, j] = sum over state of C[i] * exp(A * (dt[j + 1] + ... + dt[i])) * dt[j] * B[j], j <= i; "
        "0 where a reset lies between, j < reset <= i",
        "skip": "D",
        "act": "sigmoid(conv): u = act * conv",
        "conv": "M[i, j] = conv1d.weight[K - 1 - (i - j)], 0 <= i - j < K taps",
        "r": "gate * (S + D) * act * conv1d.bias; with a carried state also what its conv tail and its scan state bring",
    }
    wraps = ("MambaForCausalLM", "FalconMambaForCausalLM", "MambaLMHeadModel", "Weights")
    hub_types = ("mamba", "falcon_mamba")
    hub_fields = MAMBA
    layout = MambaSsm()
    small = TINY
    block_points = BLOCK_ROWS
    aliases = ALIASES
    views = VIEWS
    has_positions = True
    cfg: MambaConfig

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return not (has_matrix_states(module) or is_hybrid(module) or writes_two_terms(module))

    @classmethod
    def describe(cls, wrapped: Wrapped, model_name: str) -> MambaConfig:
        """The cfg of a wrapped model, from the shapes of its parameters and the few numbers that shapes do not tell."""
        given = cls.told(wrapped, model_name)
        first = wrapped.backbone.layers[0]
        if not isinstance(getattr(first.mixer, "A_log", None), Tensor) or first.mixer.A_log.ndim != 2:
            raise CheckpointError(
                f"{model_name} is no Mamba-1 model: A_log must be [channel, state]; supported are Mamba and FalconMamba."
            )
        cls.check_activation(wrapped, given, model_name)
        d_inner, d_state = first.mixer.A_log.shape
        return MambaConfig(
            **cls.shared(wrapped, given, d_inner),
            model_name=model_name,
            architecture="mamba",
            d_state=d_state,
            dt_rank=first.mixer.dt_proj.weight.shape[1],
            rms_eps=given.get("mixer_rms_eps") if given.get("model_type") == "falcon_mamba" else None,
        )

    def make_block(self, layer: int) -> Block:
        w, cfg = self.wrapped.backbone.layers[layer], self.cfg
        ln1 = NormOfNarrow(w.norm, rows_of("ln1", BLOCK_ROWS), cfg.eps, centred=cfg.normalization_type == "LN")
        rms_eps = None if cfg.rms_eps is None else _selection_eps(w.mixer, cfg.rms_eps)
        mixer = MambaMixer(w.mixer, rows_of("mixer", BLOCK_ROWS), layer, rms_eps)
        return Block(w, BLOCK_ROWS, Sub("mixer", mixer, ln1))


def _selection_eps(mixer: Any, otherwise: float) -> tuple[float, float, float]:
    """What FalconMamba's norms of dt, B and C add; older transformers have a number of the mixer in their place."""
    own = vars(mixer).get("rms_eps", otherwise)
    norms = (mixer._modules.get(name) for name in ("dt_layernorm", "b_layernorm", "c_layernorm"))
    dt, B, C = (own if norm is None else eps_of(norm, own) for norm in norms)
    return dt, B, C


HOOKED = HookedMamba

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

from collections.abc import Callable
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
from gatedlens.formats.mamba_stack import MambaStack, StackConfig, has_matrix_states
from gatedlens.formats.transformers_config import MAMBA
from gatedlens.model.base import Wrapped
from gatedlens.model.block import Block, Mixer, Norm, Run, eps_of, norm_rows, residual_rows
from gatedlens.model.hookpoint import rows_of
from gatedlens.model.padding import Padding
from gatedlens.model.state import RecurrentState
from gatedlens.recurrence.decay_matrix import DecayScan
from gatedlens.recurrence.factors import Factors, reach
from gatedlens.recurrence.scanning import at_least_float32
from gatedlens.recurrence.transforms import forward_mode

PAPER = "Mamba, arXiv 2312.00752"
UIA = "UIA, arXiv 2405.16504"

MIXER_ROWS = (
    Point("hook_x", "batch pos channel", "in_proj(ln1.out)[:channel]", f"{PAPER}, fig. 3"),
    Point("hook_gate_pre", "batch pos channel", "in_proj(ln1.out)[channel:]", f"{PAPER}, fig. 3"),
    Point(
        "hook_conv_taps",
        "batch pos channel tap",
        "conv1d.weight[tap] * x[pos - (tap.size - 1) + tap]",
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
    Point(
        "hook_state_start",
        "batch channel state",
        "state before the first position (zero without a state)",
        f"{PAPER}, eq. 2",
        True,
    ),
    Point("hook_decay", "batch pos channel state", "exp(dt * A)", f"{PAPER}, eq. 4", True),
    Point("hook_write", "batch pos channel state", "dt * B * u", f"{PAPER}, eq. 4 (Euler)", True),
    Point("hook_state", "batch pos channel state", "decay * state[pos - 1] + write", f"{PAPER}, eq. 2a", True),
    Point("hook_scan", "batch pos channel", "sum over state of C * state", f"{PAPER}, eq. 2b"),
    Point("hook_y", "batch pos channel", "scan + D * u", f"{PAPER}, alg. 2"),
    Point("hook_gate", "batch pos channel", "SiLU(gate_pre)", f"{PAPER}, fig. 3"),
    Point("hook_gated", "batch pos channel", "y * gate", f"{PAPER}, fig. 3"),
)
FALCON = "Falcon Mamba, arXiv 2410.05355"
RMSNORM = "RMSNorm, arXiv 1910.07467"
BLOCK_ROWS = residual_rows(norm_rows("ln1", "mixer_in", RMSNORM), block_rows("mixer", MIXER_ROWS))


def mamba_terms(
    dt: Float[Tensor, "... channel"],
    B: Float[Tensor, "... state"],
    C: Float[Tensor, "... state"],
    u: Float[Tensor, "... channel"],
    A: Float[Tensor, "channel state"],
) -> tuple[Float[Tensor, "... channel state"], Float[Tensor, "... channel state"], Float[Tensor, "... state"]]:
    """decay = exp(dt A), write = dt B u, read = C for any slice of positions: Mamba, eq. 2 and 4.

    The tensors are [b, l, c, n] and lie in memory with channels innermost: states are few, and a processor likes long rows.
    """
    exp = torch.exp if forward_mode() else torch.exp_  # a second tensor of this size costs more than the exponential
    decay = exp(dt.unsqueeze(-2) * A.mT).mT
    write = ((dt * u).unsqueeze(-2) * B.unsqueeze(-1)).mT
    return decay, write, C


class SelectiveScan(Mixer):
    """gated = y * SiLU(z), y = SSM(SiLU(conv(x))): what lies between the two projections, every intermediate a point."""

    attention_points = ("hook_x", "hook_conv", "hook_dt", "hook_B", "hook_C", "hook_gate", "hook_gated")

    def __init__(
        self, weights: Any, rows: tuple[Point, ...], layer: int, rms_eps: tuple[float, float, float] | None = None
    ):
        super().__init__(weights, rows, layer)
        self.rms_eps = rms_eps  # of FalconMamba's weightless RMS of dt, B and C; None in Mamba

    @property
    def A(self) -> Float[Tensor, "channel state"]:
        """-exp(A_log), at least float32."""
        return -torch.exp(at_least_float32(self.weights.A_log))

    def normed(self, *selection: Tensor) -> tuple[Tensor, ...]:
        """FalconMamba's weightless RMS norm of dt, B and C; the identity in Mamba."""
        if self.rms_eps is None:
            return selection
        return tuple(map(_rms, selection, self.rms_eps))

    def factors(self, cached: Callable[[str], Tensor], padding: Padding, state: RecurrentState | None) -> Factors:
        """The factors of the implicit attention: c = M x + drift, u = sigmoid(c) c, S from dt, B, C and A (UIA, eq. 9).

        Positions are in the order of the scan (`along`), so S and M look back.
        """
        x, conv, dt, B, C, gate, o = (
            self.along(padding.pack(at_least_float32(cached(name)))) for name in self.attention_points
        )
        taps, bias = self.weights.conv1d.weight.to(x.dtype).squeeze(1), self.weights.conv1d.bias
        drift, start = torch.zeros_like(x), None
        if state is not None:
            drift = reach(state["conv", self.layer], x, taps)
            start = state["scan", self.layer].to(x)
        real = padding.packed_mask(x)
        return Factors(
            x=x,
            o=o,
            scan=DecayScan(dt.double().cumsum(1), self.A.to(x.dtype), read=C, amount=dt, key=B),
            gate=gate,
            skip=at_least_float32(self.weights.D).to(x.dtype),
            act=torch.sigmoid(conv) * real,
            taps=taps,
            drift=drift if bias is None else drift + bias.to(x.dtype) * real,
            start=start,
        )

    def kernel(self, x: Tensor, run: Run) -> Callable[..., tuple[Tensor, Tensor]] | None:
        """mamba-ssm's scan, where it can stand in for ours: from no state, and without gradients if it leaves one."""
        found = fused.kernels_for(x) if run.before is None else None
        if found is None or (run.left is not None and torch.is_grad_enabled()):
            return None
        return partial(fused.selective_scan, found)

    def gated(
        self, x: Float[Tensor, "batch pos channel"], z: Float[Tensor, "batch pos channel"], run: Run
    ) -> Float[Tensor, "batch pos channel"]:
        """What the output projection reads, from the two halves of the input projection."""
        w, pad = self.weights, run.padding
        x = self.hook_x(pad.zero(x))
        z = self.hook_gate_pre(z)
        c = self.hook_conv(self.causal_conv(x, run, self.weights.conv1d))
        u = self.hook_u(pad.zero(F.silu(c)))

        ranks, n_state = w.dt_proj.weight.shape[1], w.A_log.shape[1]
        dt_rank, B, C = self.normed(*F.linear(u, w.x_proj.weight).split([ranks, n_state, n_state], dim=-1))
        dt_rank = self.hook_dt_rank(dt_rank)
        B = self.hook_B(B)
        C = self.hook_C(C)
        dt_pre = self.hook_dt_pre(F.linear(dt_rank, w.dt_proj.weight, w.dt_proj.bias))
        dt = pad.zero(self.hook_dt(pad.zero(F.softplus(dt_pre))))  # 0 at a masked position: the state passes unchanged

        wide = tuple(at_least_float32(t) for t in (dt, B, C, u))
        start = run.start("scan", self.layer, (u.shape[0], u.shape[2], n_state), wide[0])
        scan, last = self.recur(mamba_terms, wide, (self.A.mT.contiguous().mT,), start, pad, self.kernel(x, run))
        run.leave("scan", self.layer, last)

        scan = self.hook_scan(scan.to(u.dtype))
        y = self.hook_y(scan + u * at_least_float32(w.D))
        gate = self.hook_gate(F.silu(z))
        return self.hook_gated((y * gate).to(u.dtype))


def _rms(x: Tensor, eps: float) -> Tensor:
    wide = at_least_float32(x)
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


class MambaMixer(SelectiveScan):
    """out = out_proj(gated), x and z = in_proj(n)."""

    def output_weights(self) -> tuple[Float[Tensor, "d_model channel"], Float[Tensor, " d_model"] | None]:
        return self.weights.out_proj.weight, self.weights.out_proj.bias

    def plain(self, run: Run) -> bool:
        """Whether a call is what mamba-ssm's fused mixer computes: no state, no padding, no norms inside, no listener."""
        alone = run.before is None and run.left is None and run.padding.mask is None
        known = self.rms_eps is None and self.weights.conv1d.weight.shape[-1] in fused.TAPS
        return alone and known and self.at_rest()

    def forward(self, n: Float[Tensor, "batch pos d_model"], run: Run) -> Float[Tensor, "batch pos d_model"]:
        w = self.weights
        found = fused.kernels_for(n)
        if found is not None and found.mamba_inner is not None and self.plain(run):
            return fused.mixer(found.mamba_inner, n, w, self.A)
        x, z = F.linear(n, w.in_proj.weight, w.in_proj.bias).chunk(2, dim=-1)
        return F.linear(self.gated(x, z, run), w.out_proj.weight, w.out_proj.bias)


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
        "scan": "S[i, j] = sum over state of C[i] * exp(A * (dt[j + 1] + ... + dt[i])) * dt[j] * B[j], j <= i",
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
    cfg: MambaConfig

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return not has_matrix_states(module)

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
        ln1 = Norm(w.norm, rows_of("ln1", BLOCK_ROWS), cfg.eps, centred=cfg.normalization_type == "LN")
        rms_eps = None if cfg.rms_eps is None else _selection_eps(w.mixer, cfg.rms_eps)
        return Block(w, BLOCK_ROWS, ln1, MambaMixer(w.mixer, rows_of("mixer", BLOCK_ROWS), layer, rms_eps))


def _selection_eps(mixer: Any, otherwise: float) -> tuple[float, float, float]:
    """What FalconMamba's norms of dt, B and C add; older transformers have a number of the mixer in their place."""
    own = vars(mixer).get("rms_eps", otherwise)
    norms = (mixer._modules.get(name) for name in ("dt_layernorm", "b_layernorm", "c_layernorm"))
    dt, B, C = (own if norm is None else eps_of(norm, own) for norm in norms)
    return dt, B, C


HOOKED = HookedMamba

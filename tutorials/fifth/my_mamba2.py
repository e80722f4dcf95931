"""Mamba-2 (Dao and Gu 2024, arXiv 2405.21060), as if gatedlens did not have it: an architecture in one file. See tutorial 8.

b batch, l pos, d d_model, h head, v value (of a head), c channel = (head value), g group, n state, K taps of the conv.

    z, x, B, C, dt = in_proj(n)                   x, B, C through one causal conv, with SiLU: u, B, C
    dt      = softplus(dt + dt_bias)              A = -exp(A_log), a number a head
    state_t = exp(dt_t A) state_{t-1} + dt_t u_t B_t^T          scan_t = state_t C_t          B, C: a group of heads shares them
    y       = scan + D u                          out = out_proj(RMSNorm(y SiLU(z))), the norm by groups of channels

The parameters stay where they are, in your module, by mamba-ssm's names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatedlens.address import Point, block_rows
from gatedlens.model import (
    Block,
    Carried,
    Conv,
    Gate,
    GroupNorm,
    HookedConfig,
    HookedLanguageModel,
    Norm,
    PathMixer,
    Run,
    Scan,
    SiLU,
    Skip,
    Streams,
    Sub,
    SubRows,
    norm_rows,
    residual_rows,
    rows_of,
)
from gatedlens.recurrence import Terms, at_least_float32

# -- rows -----------------------------------------------------------------------------------------------------------

PAPER = "Mamba-2, arXiv 2405.21060"
MIXER_ROWS = (
    Point("hook_gate_pre", "batch pos channel", "in_proj(ln1.out)[:channel]", PAPER),
    Point("hook_x", "batch pos channel", "in_proj(ln1.out)[channel:2 * channel]", PAPER),
    Point("hook_B_pre", "batch pos group state", "in_proj(ln1.out), the next group * state", PAPER),
    Point("hook_C_pre", "batch pos group state", "in_proj(ln1.out), the next group * state", PAPER),
    Point("hook_dt_pre", "batch pos head", "in_proj(ln1.out)[-head:] + dt_bias", PAPER),
    Point("hook_conv_taps", "batch pos channel tap", "conv1d.weight[tap] * x[pos - tap.size + 1 + tap]", PAPER, True),
    Point("hook_B_conv_taps", "batch pos group state tap", "the same of B_pre", PAPER, True),
    Point("hook_C_conv_taps", "batch pos group state tap", "the same of C_pre", PAPER, True),
    Point("hook_conv", "batch pos channel", "sum over tap of conv_taps + conv1d.bias", PAPER),
    Point("hook_B_conv", "batch pos group state", "sum over tap of B_conv_taps + conv1d.bias", PAPER),
    Point("hook_C_conv", "batch pos group state", "sum over tap of C_conv_taps + conv1d.bias", PAPER),
    Point("hook_u", "batch pos channel", "SiLU(conv)", PAPER),
    Point("hook_B", "batch pos group state", "SiLU(B_conv)", PAPER),
    Point("hook_C", "batch pos group state", "SiLU(C_conv)", PAPER),
    Point("hook_dt", "batch pos head", "softplus(dt_pre)", PAPER),
    Point("hook_reset", "batch pos one", "1 where a document begins, else 0", PAPER),
    Point("hook_state_start", "batch head value state", "state before the first position", PAPER, True),
    Point("hook_decay", "batch pos head value state", "exp(dt * A) * (1 - reset)", PAPER, True),
    Point("hook_write", "batch pos head value state", "dt * u * B", PAPER, True),
    Point("hook_state", "batch pos head value state", "decay * state[pos - 1] + write", PAPER, True),
    Point("hook_scan", "batch pos channel", "sum over state of C * state", PAPER),
    Point("hook_y", "batch pos channel", "scan + D * u", PAPER),
    Point("hook_gate", "batch pos channel", "SiLU(gate_pre)", PAPER),
    Point("hook_product", "batch pos channel", "y * gate", PAPER),
    Point("hook_scale", "batch pos group", "sqrt(mean over the group's channels of product^2 + eps)", PAPER),
    Point("hook_gated", "batch pos channel", "norm.weight * product / scale", PAPER),
)
LN1_ROWS = norm_rows("ln1", "mixer_in", "RMSNorm, arXiv 1910.07467")
ROWS = residual_rows(SubRows("mixer", block_rows("mixer", MIXER_ROWS), "out_proj(gated)", LN1_ROWS))


# -- the mixer ------------------------------------------------------------------------------------------------------


class Mixer(PathMixer):
    """out = out_proj(gated), every intermediate a point."""

    selection = ("dt", "B", "C")

    def __init__(self, weights: Any, rows: tuple[Point, ...], layer: int, cfg: MyConfig):
        super().__init__(weights, rows, layer)
        self.cfg = cfg
        self.sizes = {"x": cfg.d_inner, "B": cfg.n_groups * cfg.d_state, "C": cfg.n_groups * cfg.d_state}
        norm = GroupNorm(cfg.n_groups, weights.norm.eps)
        self.path = (Conv("conv1d", ("x", "B", "C")), SiLU(("B", "C")), Skip(Scan()), Gate(F.silu, "product"), norm)

    @property
    def heads(self) -> int:
        return self.cfg.n_heads

    def project(self, n: Float[Tensor, "batch pos d_model"], run: Run) -> Streams:
        w, pad, groups = self.weights, run.padding, (self.cfg.n_groups, self.cfg.d_state)
        z, x, B, C, dt = w.in_proj(n).split([self.cfg.d_inner, *self.sizes.values(), self.heads], dim=-1)
        return {
            "gate_pre": self.hook_gate_pre(z),
            "x": self.hook_x(pad.zero(x)),
            "B": pad.zero(self.hook_B_pre(pad.zero(B).unflatten(-1, groups))),
            "C": pad.zero(self.hook_C_pre(pad.zero(C).unflatten(-1, groups))),
            "dt_pre": self.hook_dt_pre(dt + w.dt_bias),
        }

    def select(self, u: Float[Tensor, "batch pos channel"], streams: Streams, run: Run) -> None:
        streams["B"] = self.hook_B(streams["B"])
        streams["C"] = self.hook_C(streams["C"])
        # 0 at a masked position: the state passes unchanged, whatever a hook did there
        streams["dt"] = run.padding.zero(self.hook_dt(run.padding.zero(F.softplus(streams["dt_pre"]))))

    def terms(self, dt: Tensor, B: Tensor, C: Tensor) -> Terms:  # type: ignore[override]
        """decay = exp(dt A), value = dt u, key = B, read = C: eq. 1."""
        A = -at_least_float32(self.weights.A_log).exp()
        return Terms((dt * A.to(dt)).unsqueeze(-1), key=B, read=C, amount=dt)

    def output_weights(self) -> tuple[Tensor, Tensor | None]:
        return self.weights.out_proj.weight, self.weights.out_proj.bias


# -- the model ------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class MyConfig(HookedConfig):
    """n_heads heads of d_head channels."""

    d_inner: int
    d_state: int
    d_conv: int
    n_groups: int

    @property
    def sizes(self) -> dict[str, int]:
        heads = {"channel": self.d_inner, "head": self.n_heads, "value": self.d_head, "group": self.n_groups}
        return {**super().sizes, **heads, "state": self.d_state, "tap": self.d_conv}


class MyMamba2(HookedLanguageModel):
    """`gl.wrap(module)`: Mamba-2 with every intermediate a hook point."""

    title = "My Mamba-2"
    paper = "Dao and Gu, Transformers are SSMs (arXiv 2405.21060)"
    wraps = ("Mamba2Weights",)
    block_points = ROWS
    has_positions = True
    carried: ClassVar = {
        "scan": Carried("scan", "batch head value state"),
        "conv": Carried("conv", "batch tail conv_channel"),
    }
    recurrence: ClassVar = {"decay": "exp(dt * A), [head]", "write": "dt * u * B", "read": "C", "skip": "D * u"}
    attention_words: ClassVar = {
        "x": "x",
        "o": "gated",
        "gate": "gate * norm.weight / scale",
        "scan": "S[i, j] = C[i] . B[j] * exp(A * (dt[j + 1] + ... + dt[i])) * dt[j], j <= i; 0 across a reset",
        "skip": "D",
        "act": "sigmoid(conv)",
        "conv": "conv1d.weight",
        "r": "what conv1d.bias and a carried state bring",
    }
    cfg: MyConfig

    @classmethod
    def describe(cls, wrapped: Any, model_name: str) -> MyConfig:
        weight, first = wrapped.backbone.embedding.weight, wrapped.backbone.layers[0].mixer
        heads, inner, groups = len(first.A_log), first.out_proj.in_features, wrapped.config["ssm_cfg"].get("ngroups", 1)
        return MyConfig(
            model_name=model_name,
            architecture="my-mamba2",
            n_layers=len(wrapped.backbone.layers),
            d_model=weight.shape[1],
            d_vocab=weight.shape[0],
            n_heads=heads,
            d_head=inner // heads,
            d_inner=inner,
            d_state=(first.conv1d.in_channels - inner) // (2 * groups),
            d_conv=first.conv1d.kernel_size[0],
            n_groups=groups,
            eps=wrapped.backbone.norm_f.eps,
            dtype=weight.dtype,
            device=str(weight.device),
        )

    def make_block(self, layer: int) -> Block:
        w = self.wrapped.backbone.layers[layer]
        mixer = Mixer(w.mixer, rows_of("mixer", ROWS), layer, self.cfg)
        return Block(w, ROWS, Sub("mixer", mixer, Norm(w.norm, rows_of("ln1", ROWS), self.cfg.eps)))

    def make_final_norm(self, rows: tuple[Point, ...]) -> Norm:
        return Norm(self.wrapped.backbone.norm_f, rows, self.cfg.eps)

    @property
    def embedding(self) -> Any:
        return self.wrapped.backbone.embedding

    @property
    def unembedding(self) -> Any:
        return self.wrapped.lm_head

    def stream(self, embedded: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return at_least_float32(embedded)

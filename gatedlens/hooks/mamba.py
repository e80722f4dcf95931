"""Mamba (Gu and Dao 2023, arXiv 2312.00752): selective state spaces, and FalconMamba, which norms dt, B and C.

b batch, l pos, d d_model, c channel (d_inner = expand * d_model), n state, r dt_rank, K taps of the causal conv.

    x, z    = in_proj(n)                        c = conv1d(x) + bias            u = SiLU(c)
    dt, B, C = x_proj(u)                        dt = softplus(dt_proj(dt))      A = -exp(A_log)
    state_t = exp(dt_t A) state_{t-1} + dt_t B_t u_t                            scan_t = C_t . state_t
    y       = scan + D u                        out = out_proj(y SiLU(z))

Wraps transformers' MambaForCausalLM and FalconMambaForCausalLM, mamba-ssm's MambaLMHeadModel (by its parameter names)
and `Weights` below, which holds a checkpoint in mamba-ssm's original layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatedlens import fused
from gatedlens.address.point import Alias, Point, View, block_aliases, block_rows
from gatedlens.errors import CheckpointError
from gatedlens.model import fields
from gatedlens.model.base import HookedModel, Wrapped
from gatedlens.model.block import Block, Norm, Run, eps_of, norm_rows, residual_rows
from gatedlens.model.config import HookedConfig
from gatedlens.model.fields import (
    COUNT,
    EPS,
    FLAG,
    INTEGER,
    NUMBER,
    POSITIVE,
    SIZE,
    TEXT,
    ConfigValue,
    layers_of,
    listed,
    one_of,
    table,
)
from gatedlens.model.hookpoint import rows_of
from gatedlens.model.language import HookedLanguageModel
from gatedlens.model.path import Kernel, PathMixer, Streams
from gatedlens.model.stages import ChannelScan, Conv, Gate, SiLU, Skip
from gatedlens.recurrence.channels import ChannelTerms
from gatedlens.recurrence.scanning import at_least_float32, linear_scan

if TYPE_CHECKING:
    from gatedlens.model.base import HookedModel
else:  # that file imports this one
    HookedModel = Any

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
BLOCK_ROWS = residual_rows(norm_rows("ln1", "mixer_in", RMSNORM), block_rows("mixer", MIXER_ROWS))


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
    def A(self) -> Float[Tensor, "channel state"]:
        """-exp(A_log), at least float32."""
        return -torch.exp(at_least_float32(self.weights.A_log))

    def select(self, u: Float[Tensor, "batch pos channel"], streams: Streams, run: Run) -> None:
        w, pad = self.weights, run.padding
        ranks, n_state = w.dt_proj.weight.shape[1], w.A_log.shape[1]
        dt_rank, B, C = self.normed(*F.linear(u, w.x_proj.weight).split([ranks, n_state, n_state], dim=-1))
        dt_rank = self.hook_dt_rank(dt_rank)
        streams["B"] = self.hook_B(B)
        streams["C"] = self.hook_C(C)
        dt_pre = self.hook_dt_pre(F.linear(dt_rank, w.dt_proj.weight, w.dt_proj.bias))
        # 0 at a masked position: the state passes unchanged
        streams["dt"] = pad.zero(self.hook_dt(pad.zero(F.softplus(dt_pre))))

    def normed(self, *selection: Tensor) -> tuple[Tensor, ...]:
        """FalconMamba's weightless RMS norm of dt, B and C; the identity in Mamba."""
        if self.rms_eps is None:
            return selection
        return tuple(map(_rms, selection, self.rms_eps))

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


# -- other tools' names ---------------------------------------------------------------------------------------------


ALIASES = (
    *block_aliases(
        "MambaLens",
        ("hook_layer_input", "hook_mixer_in"),
        ("hook_normalized_input", "ln1.hook_out"),
        ("hook_skip", "mixer.hook_gate_pre"),
        ("hook_in_proj", "mixer.hook_x"),
        ("hook_conv", "mixer.hook_conv"),
        ("hook_ssm_input", "mixer.hook_u"),
        ("hook_delta_1", "mixer.hook_dt_rank"),
        ("hook_delta_2", "mixer.hook_dt_pre"),
        ("hook_B", "mixer.hook_B"),
        ("hook_C", "mixer.hook_C"),
        ("hook_delta", "mixer.hook_dt"),
        ("hook_A_bar", "mixer.hook_decay"),
        ("hook_h_start", "mixer.hook_state_start"),
        ("hook_y", "mixer.hook_scan"),
        ("hook_ssm_output", "mixer.hook_y"),
        ("hook_after_skip", "mixer.hook_gated"),
        ("hook_out_proj", "hook_mixer_out"),
    ),
    Alias("hook_norm", "ln_final.hook_out", "MambaLens"),
    *block_aliases(
        "TransformerLens",
        ("hook_in", "hook_resid_pre"),
        ("hook_out", "hook_resid_post"),
        ("hook_attn_out", "hook_mixer_out"),
        ("norm.hook_out", "ln1.hook_out"),
        ("norm.hook_scale", "ln1.hook_scale"),
        ("norm.hook_normalized", "ln1.hook_normalized"),
        ("mixer.hook_in", "ln1.hook_out"),
        ("mixer.hook_out", "hook_mixer_out"),
        ("mixer.hook_ssm_out", "hook_mixer_out"),
        ("mixer.x_proj.hook_in", "mixer.hook_u"),
        ("mixer.dt_proj.hook_in", "mixer.hook_dt_rank"),
        ("mixer.dt_proj.hook_out", "mixer.hook_dt_pre"),
        ("mixer.hook_dt_proj", "mixer.hook_dt_pre"),
        ("mixer.hook_ssm_dt", "mixer.hook_dt"),
        ("mixer.hook_ssm_write", "mixer.hook_write"),
        ("mixer.hook_ssm_state", "mixer.hook_state"),
        ("mixer.out_proj.hook_in", "mixer.hook_gated"),
    ),
)


def _edit_steps(
    model: HookedModel, layer: int, values: list[Tensor], calls: list[tuple[dict[str, int], Any]]
) -> Tensor:
    """MambaLens's `hook_h.{t}`: walk the positions, let each hook edit the state after its step, and go on from there.

    The recurrence is linear, so adding (new - old) to the write of position t makes `new` its state and propagates.
    """
    state, decay, write = values
    done = 0
    for params, call in sorted(calls, key=lambda item: item[0]["t"]):
        t = params["t"]
        if t >= write.shape[1]:
            raise model.names.unknown(f"blocks.{layer}.hook_h.{t}", f"hook_h.{t} at {write.shape[1]} positions")
        if t >= done:
            state = linear_scan(decay[:, done : t + 1], write[:, done : t + 1], state)[:, -1]
            done = t + 1
        new = call(state.clone())
        step = torch.nn.functional.one_hot(torch.tensor(t), write.shape[1]).to(write).reshape(1, -1, 1, 1)
        write = write + step * (new - state).unsqueeze(1)
        state = new
    return write


def _edit_B_bar(
    model: HookedModel, layer: int, values: list[Tensor], calls: list[tuple[dict[str, int], Any]]
) -> Tensor:
    """MambaLens's `hook_B_bar` = dt * B; the write is B_bar * u."""
    u, B, dt, write = values
    B_bar = dt.to(write.dtype).unsqueeze(-1) * B.to(write.dtype).unsqueeze(-2)
    edited = B_bar
    for _, call in calls:
        edited = call(edited.clone())
    return write + (edited - B_bar) * u.to(write.dtype).unsqueeze(-1)  # an edit of the write itself stays


def _read_A(model: HookedModel, layer: int) -> Tensor:
    return model.blocks[layer].mixer.A


def _read_B_bar(model: HookedModel, layer: int, dt: Tensor, B: Tensor) -> Tensor:
    return at_least_float32(dt).unsqueeze(-1) * at_least_float32(B).unsqueeze(-2)


def _read_step(model: HookedModel, layer: int, states: Tensor, t: int) -> Tensor:
    return states.select(-3, t)  # from the end: the batch axis may have been dropped


def _read_side_by_side(model: HookedModel, layer: int, *parts: Tensor) -> Tensor:
    return torch.cat(parts, dim=-1)


_M = "blocks.{l}.mixer."
VIEWS = (
    View(
        "blocks.{l}.hook_A",
        "channel state",
        "-exp(A_log)",
        "MambaLens",
        read=_read_A,
        instead="it is a parameter: edit A_log of the wrapped model, or hook mixer.hook_decay",
    ),
    View(
        "blocks.{l}.hook_B_bar",
        "batch pos channel state",
        "dt * B",
        "MambaLens",
        read=_read_B_bar,
        needs=(_M + "hook_dt", _M + "hook_B"),
        at=(_M + "hook_u", _M + "hook_B", _M + "hook_dt", _M + "hook_write"),
        visit=_edit_B_bar,
    ),
    View(
        "blocks.{l}.hook_h.{t}",
        "batch channel state",
        "state[t]; an edit propagates",
        "MambaLens",
        read=_read_step,
        needs=(_M + "hook_state",),
        at=(_M + "hook_state_start", _M + "hook_decay", _M + "hook_write"),
        visit=_edit_steps,
    ),
    View(
        "blocks.{l}.mixer.hook_in_proj",
        "batch pos 2channel",
        "x and gate_pre, concatenated",
        "TransformerLens",
        read=_read_side_by_side,
        needs=(_M + "hook_x", _M + "hook_gate_pre"),
        instead="hook its halves, mixer.hook_x and mixer.hook_gate_pre",
    ),
    View(
        "blocks.{l}.mixer.hook_x_proj",
        "batch pos dt_rank+2state",
        "dt_rank, B and C, concatenated",
        "TransformerLens",
        read=_read_side_by_side,
        needs=(_M + "hook_dt_rank", _M + "hook_B", _M + "hook_C"),
        instead="hook its parts, mixer.hook_dt_rank, mixer.hook_B and mixer.hook_C",
    ),
)


# -- configs --------------------------------------------------------------------------------------------------------

HUB_FIELDS = {
    **fields.TRANSFORMERS,
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "num_hidden_layers": layers_of(9),
    "state_size": SIZE,
    "conv_kernel": SIZE,
    "expand": POSITIVE,
    "time_step_rank": SIZE | one_of("auto"),
    "layer_norm_epsilon": EPS,
    "mixer_rms_eps": EPS,
    "hidden_act": TEXT,
    "residual_in_fp32": FLAG,
    "use_bias": FLAG,
    "use_conv_bias": FLAG,
}
SSM_FIELDS = {
    "layer": TEXT,
    "d_state": SIZE,
    "d_conv": SIZE,
    "expand": POSITIVE,
    "dt_rank": SIZE | one_of("auto"),
    "bias": FLAG,
    "conv_bias": FLAG,
    "dt_min": POSITIVE,
    "dt_max": POSITIVE,
    "dt_init_floor": POSITIVE,
    "dt_scale": NUMBER,
    "dt_init": TEXT,
    "use_fast_path": FLAG,
}
STACK_FIELDS = {  # of mamba-ssm's config.json, whatever its mixers are
    "d_model": SIZE,
    "vocab_size": SIZE,
    "d_intermediate": COUNT,
    "attn_layer_idx": listed(INTEGER).or_null(),
    "rms_norm": FLAG,
    "residual_in_fp32": FLAG,
    "norm_epsilon": EPS,
    "pad_vocab_size_multiple": SIZE,
    "tie_embeddings": FLAG,
}
ORIGINAL_FIELDS = {**STACK_FIELDS, "n_layer": layers_of(9), "ssm_cfg": table(**SSM_FIELDS).or_null()}


# -- the model ------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class StackConfig(HookedConfig):
    """What the cfg of Mamba and that of Mamba-2 have in common."""

    d_inner: int
    d_state: int
    d_conv: int
    expand: float = 2
    residual_in_fp32: bool = True
    use_bias: bool = False
    use_conv_bias: bool = True
    tie_word_embeddings: bool = True


@dataclass(kw_only=True)
class MambaConfig(StackConfig):
    """cfg of Mamba and FalconMamba. `rms_eps`: FalconMamba's norm of dt, B, C; None in Mamba."""

    dt_rank: int
    rms_eps: float | None = None

    @property
    def sizes(self) -> dict[str, int]:
        own = {"channel": self.d_inner, "state": self.d_state, "tap": self.d_conv, "dt_rank": self.dt_rank}
        return {**super().sizes, **own}


class MambaStack(HookedLanguageModel):
    """Blocks under `backbone`, between an embedding and `lm_head`: as transformers and mamba-ssm lay out Mamba and Mamba-2."""

    cfg: StackConfig

    @classmethod
    def told(cls, wrapped: Wrapped, model_name: str) -> Mapping[str, Any]:
        """`HookedMamba.told(wrapped, "mine")`: the config of a wrapped model, by name.

        CheckpointError for a value that does not fit, for a hybrid, and for a model without layers.
        """
        if len(wrapped.backbone.layers) == 0:
            raise CheckpointError(f"{model_name} has no layers.")
        given = config_of(wrapped)
        fields.check(given, cls.hub_fields if is_hf(wrapped.config) else cls.original_fields, f"{model_name}'s config")
        if given.get("attn_layer_idx") or given.get("d_intermediate"):
            raise CheckpointError(
                f"{model_name} mixes {cls.title} with attention or MLP layers (attn_layer_idx={given.get('attn_layer_idx')}, "
                f"d_intermediate={given.get('d_intermediate')}); gatedlens supports pure {cls.title} stacks."
            )
        return given

    @staticmethod
    def check_activation(wrapped: Wrapped, given: Mapping[str, Any], model_name: str) -> None:
        """`HookedMamba.check_activation(wrapped, given, "mine")`: CheckpointError for a mixer whose activation is no SiLU."""
        for layer in wrapped.backbone.layers:
            act = vars(layer.mixer).get("activation", given.get("hidden_act", "silu"))
            if act not in ("silu", "swish"):
                raise CheckpointError(f"{model_name} has hidden_act={act!r}; gatedlens supports 'silu'.")

    @staticmethod
    def shared(wrapped: Wrapped, given: Mapping[str, Any], d_inner: int) -> dict[str, Any]:
        """`MambaConfig(**cls.shared(wrapped, given, d_inner), ...)`: what any such stack says in its cfg."""
        first, weight = wrapped.backbone.layers[0], embedding_of(wrapped).weight
        mixer = first.mixer
        return {
            "n_layers": len(wrapped.backbone.layers),
            "d_model": weight.shape[1],
            "d_vocab": weight.shape[0],
            "normalization_type": "RMS" if getattr(first.norm, "bias", None) is None else "LN",
            "eps": eps_of(first.norm, norm_eps(given)),
            "dtype": mixer.in_proj.weight.dtype,
            "device": str(weight.device),
            "original_architecture": type(wrapped).__name__,
            "d_inner": d_inner,
            "d_conv": mixer.conv1d.weight.shape[-1],
            "expand": d_inner / weight.shape[1],
            "residual_in_fp32": bool(vars(first).get("residual_in_fp32", given.get("residual_in_fp32", True))),
            "use_bias": mixer.in_proj.bias is not None,
            "use_conv_bias": mixer.conv1d.bias is not None,
            "tie_word_embeddings": wrapped.lm_head.weight is weight,
        }

    def make_final_norm(self, rows: tuple[Point, ...]) -> Norm:
        return Norm(self.wrapped.backbone.norm_f, rows, self.cfg.eps, centred=self.cfg.normalization_type == "LN")

    @property
    def embedding(self) -> Any:
        return embedding_of(self.wrapped)

    @property
    def unembedding(self) -> Any:
        return self.wrapped.lm_head

    def stream(self, embedded: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return at_least_float32(embedded) if self.cfg.residual_in_fp32 else embedded


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
    hub_fields = HUB_FIELDS
    original_fields = ORIGINAL_FIELDS
    block_points = BLOCK_ROWS
    aliases = ALIASES
    views = VIEWS
    has_positions = True
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

    @classmethod
    def is_original(cls, config: dict[str, Any]) -> bool:
        """mamba-ssm's config.json: d_model, n_layer, vocab_size, ssm_cfg, and no model_type; unless it says Mamba2."""
        ssm = config.get("ssm_cfg")
        if isinstance(ssm, Mapping) and ssm.get("layer") == "Mamba2":
            return False
        return {"d_model", "n_layer", "vocab_size"} <= set(config)

    @classmethod
    def empty(cls, config: dict[str, Any]) -> nn.Module:
        return Weights(config)

    @classmethod
    def tiny(cls, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: ConfigValue) -> HookedMamba:
        """A small random model for tests and tours: 2 layers, 16 wide, state 4, 3 taps... whatever `sizes` say."""
        config: dict[str, Any] = {
            "d_model": 16,
            "n_layer": 2,
            "vocab_size": 40,
            "ssm_cfg": {"d_state": 4, "d_conv": 4},
        } | sizes
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            weights = Weights(config)
        with torch.no_grad():
            for name, p in weights.named_parameters():
                if p.ndim > 1 and "A_log" not in name:
                    p.copy_(
                        torch.randn(p.shape, generator=generator) * (0.5 if "embed" in name else p.shape[-1] ** -0.5)
                    )
                elif "norm" not in name:
                    p.add_(torch.randn(p.shape, generator=generator) * 0.3)
        return cls(weights.to(dtype).eval(), model_name="tiny-mamba")


def is_hf(config: Any) -> bool:
    """Whether this is a transformers config (mamba-ssm's is a dataclass, a checkpoint's a dict)."""
    return any(base.__name__ in ("PretrainedConfig", "PreTrainedConfig") for base in type(config).__mro__)


def config_of(wrapped: Any) -> Mapping[str, Any]:
    """The config of a wrapped model by name, whoever made it."""
    config = wrapped.config
    if isinstance(config, Mapping):
        return config
    given: Mapping[str, Any] = config.to_dict() if is_hf(config) else vars(config)
    return given


def has_matrix_states(wrapped: Any) -> bool:
    """Whether the first mixer of a model has one decay a head, A_log [head], as Mamba-2's."""
    layers = getattr(getattr(wrapped, "backbone", None), "layers", None) or [None]
    A_log = getattr(getattr(layers[0], "mixer", None), "A_log", None)
    return isinstance(A_log, Tensor) and A_log.ndim == 1


def norm_eps(config: Mapping[str, Any]) -> float:
    """The eps of the norms by a config of transformers or of mamba-ssm."""
    return float(config.get("layer_norm_epsilon", config.get("norm_epsilon", 1e-5)))


def _selection_eps(mixer: Any, otherwise: float) -> tuple[float, float, float]:
    """What FalconMamba's norms of dt, B and C add; older transformers have a number of the mixer in their place."""
    own = vars(mixer).get("rms_eps", otherwise)
    norms = (mixer._modules.get(name) for name in ("dt_layernorm", "b_layernorm", "c_layernorm"))
    dt, B, C = (own if norm is None else eps_of(norm, own) for norm in norms)
    return dt, B, C


def embedding_of(wrapped: Any) -> Any:
    """`backbone.embeddings` in transformers, `backbone.embedding` in mamba-ssm."""
    names = dict(wrapped.backbone.named_children())
    return names.get("embeddings", names.get("embedding"))


# -- the original checkpoint layout ---------------------------------------------------------------------------------


class StackWeights(nn.Module):
    """The parameters of a stack by mamba-ssm's names, around the `layers` that a config's ssm_cfg asks for."""

    def __init__(self, config: Mapping[str, Any], layer: Callable[..., nn.Module], ssm: Mapping[str, Any]):
        super().__init__()
        self.config = dict(config)
        d, multiple = config["d_model"], config.get("pad_vocab_size_multiple", 8)
        vocab = math.ceil(config["vocab_size"] / multiple) * multiple
        norm = with_eps(nn.RMSNorm if config.get("rms_norm", True) else nn.LayerNorm, norm_eps(config))
        self.backbone = nn.Module()
        self.backbone.embedding = nn.Embedding(vocab, d)
        self.backbone.layers = nn.ModuleList(layer(d, norm, **ssm) for _ in range(config["n_layer"]))
        self.backbone.norm_f = norm(d)
        self.lm_head = nn.Linear(d, vocab, bias=False)
        if config.get("tie_embeddings", True):
            self.lm_head.weight = self.backbone.embedding.weight


class Weights(StackWeights):
    """Parameters in mamba-ssm's layout and names, without mamba-ssm: `Weights(config.json).load_state_dict(...)`.

    config: `d_model, n_layer, vocab_size`, and optionally `ssm_cfg {d_state 16, d_conv 4, expand 2, dt_rank "auto",
    bias False, conv_bias True}`, `rms_norm` True (False: LayerNorm), `residual_in_fp32` True,
    `pad_vocab_size_multiple` 8, `tie_embeddings` True.
    """

    def __init__(self, config: dict[str, Any]):
        fields.check(config, ORIGINAL_FIELDS, "The config", required=("d_model", "n_layer", "vocab_size"))
        ssm = dict(config.get("ssm_cfg") or {})
        kind = ssm.pop("layer", "Mamba1")
        if kind != "Mamba1":
            raise CheckpointError(f"ssm_cfg.layer is {kind!r}; supported is 'Mamba1'.")
        super().__init__(config, layer_parameters, ssm)


def with_eps(norm: Any, eps: float) -> Callable[[int], nn.Module]:
    """`with_eps(nn.RMSNorm, 1e-6)(16)`: norms of a width, all with this eps."""
    return lambda width: norm(width, eps=eps)


def layer_parameters(
    d: int,
    norm: Callable[[int], nn.Module],
    d_state: int = 16,
    d_conv: int = 4,
    expand: int | float = 2,
    dt_rank: int | str = "auto",
    bias: bool = False,
    conv_bias: bool = True,
    dt_min: float = 0.001,
    dt_max: float = 0.1,
    dt_init_floor: float = 1e-4,
    **unsupported: Any,
) -> nn.Module:
    """One layer as mamba-ssm initialises it: A_log = log(1..N), D = 1, softplus(dt_proj.bias) log-uniform in dt."""
    harmless = {"dt_init", "dt_scale", "use_fast_path"}
    if unknown := set(unsupported) - harmless:
        raise CheckpointError(f"ssm_cfg asks for {', '.join(sorted(unknown))}, which gatedlens does not support.")
    inner, ranks = int(expand * d), math.ceil(d / 16) if dt_rank == "auto" else int(dt_rank)
    layer, mixer = nn.Module(), nn.Module()
    layer.norm, layer.mixer = norm(d), mixer
    mixer.in_proj = nn.Linear(d, 2 * inner, bias=bias)
    mixer.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner, bias=conv_bias, padding=d_conv - 1)
    mixer.x_proj = nn.Linear(inner, ranks + 2 * d_state, bias=False)
    mixer.dt_proj = nn.Linear(ranks, inner)
    dt = torch.exp(torch.linspace(math.log(dt_min), math.log(dt_max), inner)).clamp(min=dt_init_floor)
    mixer.dt_proj.bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
    mixer.A_log = nn.Parameter(torch.log(torch.arange(1.0, d_state + 1)).repeat(inner, 1))
    mixer.D = nn.Parameter(torch.ones(inner))
    mixer.out_proj = nn.Linear(inner, d, bias=bias)
    return layer


HOOKED = HookedMamba

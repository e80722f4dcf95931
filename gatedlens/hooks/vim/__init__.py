"""Vision Mamba, ViM (Zhu et al. 2024, arXiv 2401.09417): a Mamba that reads an image's patches from both ends.

b batch, l pos (patches row by row, the class token among them), d d_model, c channel (d_inner = expand * d_model),
n state, r dt_rank, K taps of the convolution.

    tokens = patches with the class token in their middle + pos_embed
    x, z   = in_proj(norm(resid))
    gated  = (SSM_fwd(x) SiLU(z) + SSM_bwd(x) SiLU(z)) / 2           resid = resid + out_proj(gated)
    logits = head(norm_f(resid)[class token])

SSM is Mamba's (`mamba.py`) from its convolution to its skip. The backward one runs from the last position to the first
with parameters of its own (bimamba "v2"), or only with an A of its own ("v1": it shares even the convolution's output,
and nothing is halved); "none" is Mamba. **Everything is in image token order**: position p is the same patch at
`mixer.fwd.hook_dt` and `mixer.bwd.hook_dt`; `mixer.bwd.hook_state` at p has consumed the tokens from the last to p.

Wraps `VisionMamba` (formats/vision_mamba.py), which holds a checkpoint of hustvl/Vim by its names, and the official class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatedlens.address.point import Point, block_rows
from gatedlens.compat.names.mamba import ALIASES
from gatedlens.compat.names.vim import VIEWS
from gatedlens.errors import CheckpointError
from gatedlens.formats.vision_mamba import (
    BACKWARD,
    FIELDS,
    TINY,
    Vim,
    check_supported,
    cls_place,
    divides,
    pair,
)
from gatedlens.hooks.mamba import MIXER_ROWS, RMSNORM, SelectiveScan
from gatedlens.model import fields
from gatedlens.model.base import Wrapped
from gatedlens.model.block import Block, Sub, SubRows, residual_rows
from gatedlens.model.hookpoint import rows_of
from gatedlens.model.image import IMAGENET_MEAN, IMAGENET_STD
from gatedlens.model.mixer import TokenMixing, written
from gatedlens.model.norm import NarrowNorm, Norm, norm_rows
from gatedlens.model.padding import Padding
from gatedlens.model.run import Run
from gatedlens.model.state import RecurrentState
from gatedlens.model.vision import HookedVisionModel, VisionConfig
from gatedlens.model.weights import several
from gatedlens.recurrence.factors import Factors
from gatedlens.recurrence.scanning import at_least_float32

PAPER = "Vim, arXiv 2401.09417"


# -- rows -----------------------------------------------------------------------------------------------------------


def _with(rows: tuple[Point, ...], equations: Mapping[str, str]) -> tuple[Point, ...]:
    """The same rows, some with the equation that they have here."""
    source = f"{PAPER}, alg. 1"
    return tuple(replace(r, equation=equations[r.leaf], source=source) if r.leaf in equations else r for r in rows)


FWD_ROWS = _with(
    MIXER_ROWS,
    {
        "hook_x": "mixer.x (a copy: edits reach this direction only)",
        "hook_gate_pre": "mixer.gate_pre (a copy: edits reach this direction only)",
        "hook_conv_taps": "conv1d.weight[tap] * x[pos - (tap.size - 1) + tap]",
        "hook_reset": "0: an image is one document",
        "hook_state_start": "state before the first position (zero)",
    },
)
_FROM_THE_END = {
    "hook_state_start": "state behind the last position (zero)",
    "hook_decay": "exp(dt * A_b) * (1 - reset)",
    "hook_state": "decay * state[pos + 1] + write",
}
BWD_ROWS = {
    "v1": _with(FWD_ROWS, _FROM_THE_END),
    "v2": _with(
        FWD_ROWS,
        {
            **_FROM_THE_END,
            "hook_conv_taps": "conv1d_b.weight[tap] * x[pos + (tap.size - 1) - tap]",
            "hook_conv": "sum over tap of conv_taps + conv1d_b.bias",
            "hook_dt_rank": "x_proj_b(u)[:dt_rank]",
            "hook_B": "x_proj_b(u)[dt_rank:dt_rank + state]",
            "hook_C": "x_proj_b(u)[dt_rank + state:]",
            "hook_dt_pre": "dt_proj_b(dt_rank)",
            "hook_y": "scan + D_b * u",
        },
    ),
}


def vim_rows(bimamba_type: str = "v2", divided: bool = True, layer_scale: bool = False) -> tuple[Point, ...]:
    """The rows of a block, in firing order, for each kind of mixer."""
    x = Point("hook_x", "batch pos channel", "in_proj(ln1.out)[:channel]", f"{PAPER}, alg. 1")
    z = Point("hook_gate_pre", "batch pos channel", "in_proj(ln1.out)[channel:]", f"{PAPER}, alg. 1")
    fwd, bwd = block_rows("fwd", FWD_ROWS), block_rows("bwd", BWD_ROWS.get(bimamba_type, ()))
    total = "mixer.fwd.gated + mixer.bwd.gated" if bwd else "mixer.fwd.gated"
    gated = Point("hook_gated", "batch pos channel", f"({total}) / 2" if divided else total, f"{PAPER}, alg. 1")
    mixer, ln1 = block_rows("mixer", (x, z, *fwd, *bwd, gated)), norm_rows("ln1", "mixer_in", RMSNORM)
    rows = residual_rows(SubRows("mixer", mixer, "out_proj(gated)", ln1))
    return _with(rows, {"hook_mixer_out": "gamma * out_proj(mixer.gated)" if layer_scale else "out_proj(mixer.gated)"})


BLOCK_ROWS = vim_rows()


# -- the mixer ------------------------------------------------------------------------------------------------------


class Renamed:
    """`Renamed(mixer, {"D": "D_b"}).D` is `mixer.D_b`, read when asked; a name that is not listed is itself."""

    def __init__(self, module: nn.Module, names: Mapping[str, str]):
        self.module = module
        self.names = names

    def __getattr__(self, name: str) -> Any:
        if name in ("module", "names") or name.startswith("__"):  # a half-made copy (deepcopy, pickle) asks for these
            raise AttributeError(name)
        return getattr(self.module, self.names.get(name, name))


class Forward(SelectiveScan):
    """fwd: Mamba's conv, selection, scan, skip and gate, from the first position to the last."""

    def forward(  # type: ignore[override]  # the projection is one for both directions
        self, x: Float[Tensor, "batch pos channel"], z: Float[Tensor, "batch pos channel"], run: Run
    ) -> Float[Tensor, "batch pos channel"]:
        return self.walk({"x": self.hook_x(run.padding.zero(x)), "gate_pre": self.hook_gate_pre(z)}, run)


class Backward(Forward):
    """bwd of v2: the same from the last position to the first; the convolution too sees what is later in the image."""

    def along(self, x: Tensor) -> Tensor:
        return x.flip(1)


class SharedBackward(Backward):
    """bwd of v1: only the scan runs from the end; what enters it is what enters the forward scan."""

    def along_conv(self, x: Float[Tensor, "batch pos ..."]) -> Float[Tensor, "batch pos ..."]:
        return x

    def factors(self, cached: Callable[[str], Tensor], padding: Padding, state: RecurrentState | None) -> Factors:
        """As of any direction; in the order of its scan the conv looks ahead."""
        return replace(super().factors(cached, padding, state), ahead=True)


class ViMMixer(TokenMixing):
    """out = out_proj(scale * (fwd(x, z) + bwd(x, z))), x and z = in_proj(n). Vim, alg. 1; scale as the config says."""

    def __init__(self, weights: Any, rows: tuple[Point, ...], layer: int, bimamba_type: str, scale: float):
        super().__init__(weights, rows, layer)
        self.scale = scale
        self.fwd = Forward(weights, rows_of("fwd", rows), layer)
        backward = {"v1": SharedBackward, "v2": Backward}.get(bimamba_type)
        self.bwd = None
        if backward is not None:
            self.bwd = backward(Renamed(weights, BACKWARD[bimamba_type]), rows_of("bwd", rows), layer)

    @property
    def directions(self) -> dict[str, SelectiveScan]:
        """The scans by name: fwd, and bwd where there is one."""
        return {"fwd": self.fwd} if self.bwd is None else {"fwd": self.fwd, "bwd": self.bwd}

    @property
    def scans(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(self.directions)

    @property
    def attention_points(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(f"{name}.{point}" for name, scan in self.directions.items() for point in scan.attention_points)

    def branches(
        self, cached: Callable[[str], Tensor], padding: Padding, state: RecurrentState | None
    ) -> tuple[Factors, ...]:
        """A = scale * (A_fwd + P A_bwd P), P the reversal: HA (arXiv 2403.01590), sec. 3.3."""

        def branch(name: str, scan: SelectiveScan) -> Factors:
            factors = scan.factors(lambda point: cached(f"{name}.{point}"), padding, state)
            return replace(factors, reverse=name == "bwd", scale=self.scale)

        return tuple(branch(name, scan) for name, scan in self.directions.items())

    def output_weights(self) -> tuple[Float[Tensor, "d_model channel"], Float[Tensor, " d_model"] | None]:
        w = self.weights
        weight, bias = w.out_proj.weight, w.out_proj.bias
        if w.init_layer_scale is None:
            return weight, bias
        return weight * w.gamma.unsqueeze(1), None if bias is None else bias * w.gamma

    def named_weights(self) -> dict[str, Tensor]:
        w, channels = self.weights, self.weights.A_log.shape[0]
        return {**several(w.in_proj.weight, w.in_proj.bias, {"in": channels, "gate": channels}), **written(self)}

    def forward(self, n: Float[Tensor, "batch pos d_model"], run: Run) -> Float[Tensor, "batch pos d_model"]:
        w = self.weights
        x, z = F.linear(n, w.in_proj.weight, w.in_proj.bias).chunk(2, dim=-1)
        x = self.hook_x(x)
        z = self.hook_gate_pre(z)
        gated = self.fwd(x, z, run)
        if self.bwd is not None:
            gated = gated + self.bwd(x, z, run)
        gated = self.hook_gated(gated * self.scale)
        out = F.linear(gated, w.out_proj.weight, w.out_proj.bias)
        return out if w.init_layer_scale is None else out * w.gamma


# -- the model ------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class ViMConfig(VisionConfig):
    """cfg of a ViM: the sizes of its mixers, and what any vision model says."""

    d_inner: int
    d_state: int
    d_conv: int
    dt_rank: int
    expand: float = 2
    bimamba_type: str = "v2"
    divide_out: bool = True
    layer_scale: bool = False
    residual_in_fp32: bool = True

    @property
    def sizes(self) -> dict[str, int]:
        own = {"channel": self.d_inner, "state": self.d_state, "tap": self.d_conv, "dt_rank": self.dt_rank}
        return {**super().sizes, **own}


class HookedViM(HookedVisionModel):
    """`gl.from_pretrained("vim_t_midclstok_76p1acc.pth")`: Vision Mamba with every intermediate a hook point.

    model(images) -> logits [batch, class]; `images` are [batch, channels, height, width] as `preprocess` makes them, or
    PIL images. The forward is the evaluation's: drop_rate and drop_path_rate do nothing, in training neither.
    """

    title = "Vision Mamba"
    paper = (
        "Zhu et al., Vision Mamba: Efficient Visual Representation Learning with Bidirectional SSM (arXiv 2401.09417)"
    )
    reference = ("vim_tiny", {"d_model": 192, "channel": 384, "state": 16, "tap": 4, "dt_rank": 12, "patch": 196})
    recurrence: ClassVar = {
        "decay": "fwd: exp(dt * A), bwd: exp(dt * A_b), [channel, state]; bwd runs from the last position to the first",
        "write": "dt * B * u, [channel, state], of each direction",
        "read": "C, [state], of each direction",
        "skip": "D * u, D_b * u",
        "conv": "depthwise conv over x, with bias: causal in fwd, anti-causal in bwd (v1: causal in both)",
        "activation before the scan": "SiLU: u = sigmoid(c) * c",
        "gate": "SiLU(gate_pre), the same in both directions; their sum is halved (v2 with if_divide_out)",
    }
    attention_words: ClassVar = {
        "A": "scale * (A_fwd + P A_bwd P): P turns positions round, scale = 1/2 for v2 with if_divide_out, else 1",
        "x": "fwd.x, bwd.x",
        "o": "scale * (fwd.gated + bwd.gated)",
        "gate": "fwd.gate, bwd.gate",
        "scan": "S[i, j] as in Mamba, from dt, B, C and reset of each direction, positions in the order of its scan",
        "skip": "D, D_b",
        "act": "sigmoid(conv) of each direction",
        "conv": "M[i, j] = conv1d.weight[K - 1 - (i - j)], conv1d_b.weight in bwd, positions in the order of the scan",
        "r": "scale * (gate * (S + D) * act * conv1d.bias), summed over directions",
    }
    wraps = ("VisionMamba",)
    layout = Vim()
    small = TINY
    block_points = BLOCK_ROWS
    first_points = (
        Point("hook_patch_embed", "batch patch d_model", "patch_embed.proj(image), row by row", f"{PAPER}, eq. 3"),
        Point(
            "hook_embed",
            "batch pos d_model",
            "patch_embed with the class token in its place + pos_embed",
            f"{PAPER}, eq. 3",
        ),
    )
    last_points = (
        Point(
            "hook_features",
            "batch d_model",
            "ln_final.out at the class token (the mean of two; without one: of all, or the last)",
            f"{PAPER}, alg. 1",
        ),
        Point("hook_logits", "batch class", "head(features)", f"{PAPER}, alg. 1"),
    )
    aliases = ALIASES
    views = VIEWS
    cfg: ViMConfig

    # -- what an architecture gives ------------------------------------------------------------------------------

    @classmethod
    def describe(cls, wrapped: Wrapped, model_name: str) -> ViMConfig:
        """The cfg of a VisionMamba, ours or the official: sizes from its parameters, the rest from its attributes."""
        told = vars(wrapped)
        fields.check(told.get("config", {}), FIELDS, f"{model_name}'s config")
        fields.check(told, FIELDS, f"{model_name}'s attributes")
        check_supported(told, model_name)
        if len(wrapped.layers) == 0:
            raise CheckpointError(f"{model_name} has no layers.")
        patch, first = wrapped.patch_embed, wrapped.layers[0].mixer
        d_inner, d_state = first.A_log.shape
        channels = patch.proj.weight.shape[1]
        config = told.get("config", {})
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,) * channels, (0.5,) * channels)
        cfg = ViMConfig(
            model_name=model_name,
            architecture="vim",
            n_layers=len(wrapped.layers),
            d_model=wrapped.norm_f.weight.shape[0],
            d_vocab=wrapped.head.weight.shape[0],
            normalization_type="RMS" if getattr(wrapped.norm_f, "bias", None) is None else "LN",
            eps=float(wrapped.norm_f.eps),
            dtype=first.in_proj.weight.dtype,
            device=str(first.in_proj.weight.device),
            positional_embedding_type="standard" if wrapped.if_abs_pos_embed else "none",
            original_architecture=type(wrapped).__name__,
            d_inner=d_inner,
            d_state=d_state,
            d_conv=first.conv1d.weight.shape[-1],
            dt_rank=first.dt_proj.weight.shape[1],
            num_classes=wrapped.head.weight.shape[0],
            expand=d_inner / wrapped.norm_f.weight.shape[0],
            bimamba_type=first.bimamba_type,
            divide_out=divides(first),
            layer_scale=first.init_layer_scale is not None,
            cls=cls_place(told),
            pool=wrapped.final_pool_type,
            image_size=pair(patch.img_size),
            patch_size=pair(patch.patch_size),
            stride=pair(patch.proj.stride),
            n_channels=channels,
            image_mean=tuple(config.get("image_mean", mean)),
            image_std=tuple(config.get("image_std", std)),
            residual_in_fp32=bool(wrapped.residual_in_fp32),
        )
        return replace(cfg, n_ctx=cfg.grid.length)

    @classmethod
    def kinds(cls) -> dict[str, tuple[Point, ...]]:
        return {"bimamba v2": vim_rows(), "bimamba v1": vim_rows("v1", False), "bimamba none": vim_rows("none", False)}

    @classmethod
    def snippet(cls) -> str:
        """`HookedViM.snippet()`: code that reads one point of a vision model, for the catalogue."""
        return (
            "import torch\n\n"
            "logits, cache = model.run_with_cache(torch.zeros(1, *model.image_shape))\n"
            'dt = cache["blocks.0.mixer.bwd.hook_dt"]  # batch pos channel: position p is the same patch as in fwd\n'
            "print(model.grid.fold(dt.mean(-1)))  # a map of the image: [batch, row, column]"
        )

    def rows_for(self, layer: int) -> tuple[Point, ...]:
        return vim_rows(self.cfg.bimamba_type, self.cfg.divide_out, self.cfg.layer_scale)

    def make_block(self, layer: int) -> Block:
        w, cfg, rows = self.wrapped.layers[layer], self.cfg, self.rows_for(layer)
        scale = 0.5 if divides(w.mixer) else 1.0
        # The norm reads the residual stream at its full width: the official kernel fuses addition and norm.
        ln1 = NarrowNorm(w.norm, rows_of("ln1", rows), cfg.eps, centred=cfg.normalization_type == "LN")
        mixer = ViMMixer(w.mixer, rows_of("mixer", rows), layer, cfg.bimamba_type, scale)
        return Block(w, rows, Sub("mixer", mixer, ln1))

    def make_final_norm(self, rows: tuple[Point, ...]) -> Norm:
        return Norm(self.wrapped.norm_f, rows, self.cfg.eps, centred=self.cfg.normalization_type == "LN")

    # -- how an image enters and a class leaves ------------------------------------------------------------------

    @property
    def stem(self) -> Any:
        return self.wrapped.patch_embed

    @property
    def patch_embedding(self) -> Any:
        return self.wrapped.patch_embed.proj

    @property
    def unembedding(self) -> Any:
        return self.wrapped.head

    @property
    def position_embedding(self) -> Float[Tensor, "1 pos d_model"] | None:
        return self.wrapped.pos_embed if self.wrapped.if_abs_pos_embed else None

    def class_tokens(self) -> tuple[Float[Tensor, "1 1 d_model"], ...]:
        w, cls = self.wrapped, self.cfg.cls
        if cls == "none":
            return ()
        return (w.cls_token_head, w.cls_token_tail) if cls == "double" else (w.cls_token,)

    def stream(self, embedded: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return at_least_float32(embedded) if self.cfg.residual_in_fp32 else embedded


HOOKED = HookedViM

"""Vision Mamba's checkpoints: the parameters of hustvl/Vim by their official names, its constructor's arguments, its variants.

    wrapped = VisionMamba(**json.load(open("config.json")))            # the official constructor's arguments
    wrapped = VisionMamba(**variant_config("vim_small"))               # 25,796,584 parameters
    wrapped.load_state_dict(torch.load(...)["model"])
    wrapped.save_pretrained("folder")                                  # config.json and model.safetensors

`VisionMamba` has no forward of its own: `HookedViM` (hooks/vim) is the forward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatedlens.errors import CheckpointError, did_you_mean
from gatedlens.formats.mamba_ssm import SSM_FIELDS, layer_parameters, with_eps
from gatedlens.model import fields
from gatedlens.model.checkpoint import depth, save_checkpoint, shape_of
from gatedlens.model.fields import EPS, FLAG, NUMBER, PAIR, POSITIVE, SIZE, TEXT, layers_of, listed, one_of, table
from gatedlens.model.layout import Layout
from gatedlens.model.tiny import Tiny, around, fresh

BACKWARD = {  # what the backward direction calls Mamba's parameters
    "v1": {"A_log": "A_b_log"},
    "v2": {"conv1d": "conv1d_b", "x_proj": "x_proj_b", "dt_proj": "dt_proj_b", "A_log": "A_b_log", "D": "D_b"},
}
FIELDS = {  # the constructor's arguments that say what is built and how it runs
    "img_size": PAIR,
    "patch_size": PAIR,
    "stride": SIZE,
    "depth": layers_of(9),
    "embed_dim": SIZE,
    "d_state": SIZE,
    "channels": SIZE,
    "num_classes": SIZE,
    "ssm_cfg": table(**SSM_FIELDS).or_null(),
    "norm_epsilon": EPS,
    "rms_norm": FLAG,
    "residual_in_fp32": FLAG,
    "if_bidirectional": FLAG,
    "final_pool_type": TEXT,
    "if_abs_pos_embed": FLAG,
    "if_rope": FLAG,
    "flip_img_sequences_ratio": NUMBER,
    "if_bimamba": FLAG,
    "bimamba_type": one_of("v1", "v2", "none"),
    "if_cls_token": FLAG,
    "if_divide_out": FLAG.or_null(),
    "if_devide_out": FLAG,
    "init_layer_scale": NUMBER.or_null(),
    "use_double_cls_token": FLAG,
    "use_middle_cls_token": FLAG,
    "use_end_cls_token": FLAG,
    "image_mean": listed(NUMBER, low=1),
    "image_std": listed(POSITIVE, low=1),
}


def pair(size: Any) -> tuple[int, int]:
    """(height, width) of a number or a pair."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def check_supported(told: Mapping[str, Any], name: str) -> None:
    """CheckpointError for what the official class can do and this forward cannot, by its official name."""
    reasons = {
        "if_rope": (told.get("if_rope"), "rotary position embeddings between the layers"),
        "if_bidirectional": (told.get("if_bidirectional"), "pairs of layers, one of them on the reversed image"),
        "flip_img_sequences_ratio": (told.get("flip_img_sequences_ratio", -1) > 0, "images reversed at random"),
        "final_pool_type": (told["final_pool_type"] not in ("none", "mean"), "every position has features of its own"),
    }
    for option, (asked, what) in reasons.items():
        if asked:
            raise CheckpointError(
                f"{name} has {option}={told[option]!r} ({what}), which gatedlens does not support. Supported are "
                "bimamba_type v2, v1 and none, any place of the class token, or the mean or last position without one."
            )


def cls_place(told: Mapping[str, Any]) -> str:
    """Where the class token stands, in the order in which the official forward asks."""
    if not told["if_cls_token"]:
        return "none"
    if told["use_double_cls_token"]:
        return "double"
    if told["use_middle_cls_token"]:
        return "middle"
    return "tail" if told.get("use_end_cls_token") else "head"


class PatchEmbed(nn.Module):
    """The parameters that turn an image into patches."""

    def __init__(self, img_size: Any, patch_size: Any, stride: int, channels: int, embed_dim: int):
        super().__init__()
        self.img_size, self.patch_size = pair(img_size), pair(patch_size)
        if any(image < patch for image, patch in zip(self.img_size, self.patch_size, strict=True)):
            raise CheckpointError(f"img_size={img_size} is smaller than patch_size={patch_size}.")
        self.grid_size = tuple((i - p) // stride + 1 for i, p in zip(self.img_size, self.patch_size, strict=True))
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(channels, embed_dim, kernel_size=self.patch_size, stride=stride)


class VisionMamba(nn.Module):
    """Parameters in hustvl/Vim's layout and names, without its CUDA extensions: `VisionMamba(**config.json)`.

    The arguments are the official constructor's, and so are the attributes; those that only training or speed know
    (drop_path_rate, fused_add_norm, ...) are kept in `config` and do nothing. `if_devide_out`, as HiddenMambaAttn
    spells it, is heard where `if_divide_out` is not given. `use_end_cls_token` is Audio Mamba's: the class token last.
    `image_mean` and `image_std` say how `preprocess` normalises.
    """

    def __init__(
        self,
        img_size: Any = 224,
        patch_size: Any = 16,
        stride: int = 16,
        depth: int = 24,
        embed_dim: int = 192,
        d_state: int = 16,
        channels: int = 3,
        num_classes: int = 1000,
        ssm_cfg: dict[str, Any] | None = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = True,
        residual_in_fp32: bool = True,
        if_bidirectional: bool = False,
        final_pool_type: str = "none",
        if_abs_pos_embed: bool = True,
        if_rope: bool = False,
        flip_img_sequences_ratio: float = -1.0,
        if_bimamba: bool = False,
        bimamba_type: str = "v2",
        if_cls_token: bool = True,
        if_divide_out: bool | None = None,
        if_devide_out: bool = True,
        init_layer_scale: float | None = None,
        use_double_cls_token: bool = False,
        use_middle_cls_token: bool = True,
        use_end_cls_token: bool = False,
        **others: Any,
    ):
        given = {k: v for k, v in locals().items() if k not in ("self", "others", "__class__")}
        fields.check({**given, **others}, FIELDS, "The config")
        super().__init__()
        self.config = {**{k: v for k, v in given.items() if v is not None}, **others}
        self.residual_in_fp32 = residual_in_fp32
        self.if_bidirectional = if_bidirectional
        self.final_pool_type = final_pool_type
        self.if_abs_pos_embed = if_abs_pos_embed
        self.if_rope = if_rope
        self.flip_img_sequences_ratio = flip_img_sequences_ratio
        self.if_cls_token = if_cls_token
        self.use_double_cls_token = use_double_cls_token
        self.use_middle_cls_token = use_middle_cls_token
        self.use_end_cls_token = use_end_cls_token
        check_supported(vars(self), "This config")
        if use_end_cls_token and (use_middle_cls_token or use_double_cls_token):
            raise CheckpointError("use_end_cls_token=True: set use_middle_cls_token and use_double_cls_token to False.")
        kind = "v1" if if_bimamba else bimamba_type
        for name in ("image_mean", "image_std"):
            if name in others and len(others[name]) != channels:
                raise CheckpointError(
                    f"{name} is {others[name]!r:.80}; expected are {channels} numbers, one a channel."
                )

        self.patch_embed = PatchEmbed(img_size, patch_size, stride, channels, embed_dim)
        names = () if not if_cls_token else ("_head", "_tail") if use_double_cls_token else ("",)
        for name in names:
            self.register_parameter(f"cls_token{name}", nn.Parameter(torch.zeros(1, 1, embed_dim)))
        if if_abs_pos_embed:
            self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + len(names), embed_dim))
        self.head = nn.Linear(embed_dim, num_classes)
        norm = nn.RMSNorm if rms_norm else nn.LayerNorm
        divided = if_devide_out if if_divide_out is None else if_divide_out
        ssm = {**(ssm_cfg or {}), "d_state": (ssm_cfg or {}).get("d_state", d_state)}
        self.layers = nn.ModuleList(
            _vim_layer(embed_dim, with_eps(norm, norm_epsilon), ssm, kind, divided, init_layer_scale)
            for _ in range(depth)
        )
        self.norm_f = norm(embed_dim, eps=norm_epsilon)
        self._initialise(depth)

    @torch.no_grad()
    def _initialise(self, depth: int) -> None:
        """As the official model starts: small positions and class tokens, output projections scaled by depth."""
        for name, p in self.named_parameters():
            if "pos_embed" in name or "cls_token" in name or name == "head.weight":
                nn.init.trunc_normal_(p, std=0.02)
            elif name == "patch_embed.proj.weight":
                nn.init.trunc_normal_(p, std=p[0].numel() ** -0.5)
            elif name in ("patch_embed.proj.bias", "head.bias"):
                nn.init.zeros_(p)
            elif name.endswith("out_proj.weight"):
                p.div_(math.sqrt(depth))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, which `gl.from_pretrained(folder)` reads."""
        save_checkpoint(folder, self.config, self)


def _vim_layer(
    d: int, norm: Any, ssm: dict[str, Any], kind: str, divided: bool, init_layer_scale: float | None
) -> nn.Module:
    """One layer: Mamba's, and the backward direction's parameters under their own names."""
    layer, other = layer_parameters(d, norm, **ssm), layer_parameters(d, norm, **ssm).mixer
    mixer: Any = layer.mixer
    for ours, theirs in BACKWARD.get(kind, {}).items():
        setattr(mixer, theirs, getattr(other, ours))
    mixer.bimamba_type, mixer.if_divide_out, mixer.init_layer_scale = kind, divided, init_layer_scale
    if init_layer_scale is not None:
        mixer.gamma = nn.Parameter(init_layer_scale * torch.ones(d))
    return layer


# -- variants -------------------------------------------------------------------------------------------------------


def _variant(embed_dim: int, stride: int = 16) -> dict[str, Any]:
    flags = {"bimamba_type": "v2", "if_cls_token": True, "if_divide_out": True, "use_middle_cls_token": True}
    sizes = {"img_size": 224, "patch_size": 16, "stride": stride, "depth": 24, "embed_dim": embed_dim}
    return {**sizes, **flags, "final_pool_type": "mean"}


SHORT = {
    "vim_tiny": _variant(192),
    "vim_tiny_stride8": _variant(192, 8),
    "vim_small": _variant(384),
    "vim_small_stride8": _variant(384, 8),
    "vim_base": _variant(768),
}
_TAIL = "bimambav2_final_pool_mean_abs_pos_embed_with"
OFFICIAL = {
    f"vim_tiny_patch16_224_{_TAIL}_midclstok_div2": "vim_tiny",
    f"vim_tiny_patch16_stride8_224_{_TAIL}_midclstok_div2": "vim_tiny_stride8",
    f"vim_small_patch16_224_{_TAIL}_midclstok_div2": "vim_small",
    f"vim_small_patch16_stride8_224_{_TAIL}_midclstok_div2": "vim_small_stride8",
    f"vim_base_patch16_224_{_TAIL}_middle_cls_token_div2": "vim_base",
}


def variant_config(name: str) -> dict[str, Any]:
    """The constructor's arguments of a variant by its short or its official name."""
    short = OFFICIAL.get(name, name)
    if short not in SHORT:
        raise CheckpointError(
            f"{name!r} is no variant of ViM that gatedlens knows.{did_you_mean(name, [*SHORT, *OFFICIAL])} It knows "
            f"{', '.join(SHORT)}; for another, write its config.json beside a model.safetensors and load the folder."
        )
    return dict(SHORT[short])


def config_from_shapes(state: Mapping[str, Tensor], variant: dict[str, Any], input_size: Any) -> dict[str, Any]:
    """The variant's arguments with the sizes that the tensors have; the image's size follows from the positions."""
    mixer = "layers.0.mixer."
    embed_dim, channels, _, patch_size = shape_of(state, "patch_embed.proj.weight", 4)
    inner, d_state = shape_of(state, f"{mixer}A_log", 2)
    dt_rank, d_conv = shape_of(state, f"{mixer}dt_proj.weight", 2)[1], shape_of(state, f"{mixer}conv1d.weight", 3)[-1]
    if input_size is not None and not SIZE.fits(input_size):
        raise CheckpointError(f"args.input_size is {input_size!r:.80}; expected is {SIZE.expected}.")
    kind = "v2" if f"{mixer}conv1d_b.weight" in state else "v1" if f"{mixer}A_b_log" in state else "none"
    config = {
        **variant,
        "patch_size": patch_size,
        "depth": depth(state, "layers."),
        "embed_dim": embed_dim,
        "d_state": d_state,
        "channels": channels,
        "num_classes": shape_of(state, "head.weight", 2)[0],
        "ssm_cfg": {"d_conv": d_conv, "expand": inner / embed_dim, "dt_rank": dt_rank},
        "rms_norm": "norm_f.bias" not in state,
        "bimamba_type": kind,
        "if_cls_token": any(key.startswith("cls_token") for key in state),
        "use_double_cls_token": "cls_token_head" in state,
        "init_layer_scale": 1.0 if f"{mixer}gamma" in state else None,
    }
    config["stride"] = max(1, patch_size * variant["stride"] // variant["patch_size"])
    config["img_size"] = input_size or variant["img_size"]
    _check_positions(state, config)
    return config


def _check_positions(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """CheckpointError unless an image of this size has as many patches as the file has positions."""
    size, patch, stride = config["img_size"], config["patch_size"], config["stride"]
    have = shape_of(state, "pos_embed", 3)[1] - sum(key.startswith("cls_token") for key in state)
    want = ((size - patch) // stride + 1) ** 2
    if have != want:
        raise CheckpointError(
            f"The file has positions for {have} patches; patches of {patch}, one every {stride} pixels, of a {size} x "
            f"{size} image are {want}. Pass the right variant=... (with or without _stride8), or write a config.json "
            "beside a model.safetensors and load the folder."
        )


def divides(mixer: Any) -> bool:
    """Whether a mixer halves the sum of its directions."""
    told = vars(mixer)
    return mixer.bimamba_type == "v2" and bool(told.get("if_divide_out", told.get("if_devide_out")))


class Vim(Layout):
    """`Vim()`: a config.json of the official constructor's arguments, or a training checkpoint, which names its variant."""

    fields = FIELDS

    def knows(self, config: Mapping[str, Any]) -> bool:
        return {"embed_dim", "depth", "patch_size"} <= set(config) and "model_type" not in config

    def empty(self, config: dict[str, Any]) -> nn.Module:
        return VisionMamba(**config)

    def config_of_file(
        self, state: Mapping[str, Tensor], told: Mapping[str, Any], variant: str | None
    ) -> dict[str, Any] | None:
        """Sizes from the shapes; what shapes do not tell from `variant`, or from the name that training left behind."""
        if "patch_embed.proj.weight" not in state or "layers.0.mixer.A_log" not in state:
            return None
        name = variant or told.get("model")
        if name is None:
            raise CheckpointError(
                "The file does not say which ViM it holds (its `args.model` is missing), and shapes do not tell where "
                f"the class token stands: pass variant=..., one of {', '.join(SHORT)}."
            )
        return config_from_shapes(state, variant_config(str(name)), told.get("input_size"))


TINY = Tiny(  # images of 12 x 12, patches of 4
    "tiny-vim",
    lambda config: VisionMamba(**config),
    {
        "img_size": 12,
        "patch_size": 4,
        "stride": 4,
        "depth": 2,
        "embed_dim": 16,
        "d_state": 4,
        "num_classes": 5,
        "final_pool_type": "mean",
    },
    {r"conv1d(_b)?\.bias": fresh(0.3), r"conv1d|pos_embed|cls_token(_tail)?$": fresh(0.5), "_log": around(0.3)},
)

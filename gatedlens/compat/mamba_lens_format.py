"""MambaLens's formats: its configuration, its names of the parameters, and how it draws new ones.

    cfg = convert_original_config_to_hooked_mamba_config(json.load(open("config.json")))
    state = convert_original_state_dict_to_hooked_state_dict(state_dict)       # mamba-ssm's names to MambaLens's
    convert_hooked_state_dict_to_original_state_dict(cfg, state)               # and back

MambaLens takes mamba-ssm's in_proj apart into in_proj (x) and skip_proj (the gate), x_proj into W_delta_1, W_B and W_C, and
calls dt_proj W_delta_2, D W_D, norm_f norm.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from gatedlens.errors import InputError
from gatedlens.formats.mamba_ssm import Weights
from gatedlens.hooks import mamba


@dataclass
class MambaInitCfg:
    """How `HookedMamba(cfg, initialize_params=True)` draws its parameters; mamba-ssm's words and defaults."""

    initializer_range: float = 0.02
    rescale_prenorm_residual: bool = True
    n_residuals_per_layer: int = 1
    dt_init: str = "random"
    dt_scale: float = 1.0
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4


@dataclass
class MambaCfg:
    """`MambaCfg(d_model=1024, n_layers=48, vocab_size=50277)`; `n_layer` and `initializer_config` are heard too."""

    d_model: int
    n_layers: int = 0
    vocab_size: int = 0
    d_state: int = 16
    expand: int = 2
    dt_rank: int | str = "auto"
    d_conv: int = 4
    pad_vocab_size_multiple: int = 8
    conv_bias: bool = True
    bias: bool = False
    device: Any = None
    initializer_cfg: MambaInitCfg = field(default_factory=MambaInitCfg)
    n_layer: int = 0
    initializer_config: MambaInitCfg | None = None

    def __post_init__(self) -> None:
        self.n_layers = self.n_layer = self.n_layers or self.n_layer
        self.initializer_cfg = self.initializer_config or self.initializer_cfg
        self.initializer_config = self.initializer_cfg
        if self.n_layers < 1 or self.vocab_size < 1:
            raise InputError(f"MambaCfg needs n_layers and vocab_size; got {self.n_layers} and {self.vocab_size}.")


SSM = ("d_state", "d_conv", "expand", "dt_rank", "conv_bias", "bias")


def convert_original_config_to_hooked_mamba_config(
    cfg: MambaCfg | Mapping[str, Any], device: torch.device | str | None = None
) -> MambaCfg:
    """`convert_original_config_to_hooked_mamba_config(cfg)`: mamba-ssm's config.json (a dict) as a MambaCfg.

    InputError for a dict without d_model or n_layer, and for sizes that are missing.
    """
    if isinstance(cfg, MambaCfg):
        return cfg
    lacking = [name for name in ("d_model", "n_layer") if name not in cfg]
    if lacking:
        raise InputError(f"This configuration has no {lacking[0]}; it has: {', '.join(cfg) or 'nothing'}.")
    ssm = {**(cfg.get("ssm_cfg") or {}), **(cfg.get("ssm_config") or {})}
    known = {name: ssm[name] for name in SSM if name in ssm}
    vocab = {name: cfg[name] for name in ("vocab_size", "pad_vocab_size_multiple") if name in cfg}
    init = MambaInitCfg(**(cfg.get("initializer_cfg") or {}))
    return MambaCfg(
        d_model=cfg["d_model"], n_layers=cfg["n_layer"], device=device, initializer_cfg=init, **vocab, **known
    )


def convert_hooked_mamba_config_to_original_config(hooked_mamba_cfg: MambaCfg | mamba.MambaConfig) -> dict[str, Any]:
    """`convert_hooked_mamba_config_to_original_config(cfg)`: a MambaCfg, or the cfg of a model, as mamba-ssm's config.json."""
    cfg: Any = hooked_mamba_cfg
    if isinstance(cfg, MambaCfg):
        ssm = {name: getattr(cfg, name) for name in SSM}
        vocab, multiple = cfg.vocab_size, cfg.pad_vocab_size_multiple
    else:
        ssm = {"d_state": cfg.d_state, "d_conv": cfg.d_conv, "expand": cfg.expand, "dt_rank": cfg.dt_rank}
        ssm |= {"conv_bias": cfg.use_conv_bias, "bias": cfg.use_bias}
        vocab, multiple = cfg.d_vocab, 1
    sizes = {"d_model": cfg.d_model, "n_layer": cfg.n_layers, "vocab_size": vocab, "pad_vocab_size_multiple": multiple}
    return {**sizes, "ssm_cfg": ssm}


# -- parameters by MambaLens's names ----------------------------------------------------------------------------------

RENAMED = (
    (r"backbone\.embeddings?\.", "embedding."),
    (r"backbone\.norm_f\.", "norm."),
    (r"backbone\.layers\.(\d+)\.(mixer\.)?", r"blocks.\1."),
    (r"\.dt_proj\.", ".W_delta_2."),
    (r"\.D$", ".W_D"),
)


# A configuration, or in its place the tensors. For editors: another kind gets the error of `_state`.
if TYPE_CHECKING:
    Cfg: TypeAlias = MambaCfg | mamba.MambaConfig | Mapping[str, Any] | None
else:
    Cfg = Any


def _state(cfg: Cfg, state_dict: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
    """The tensors, whether they came alone or behind a configuration."""
    state = cfg if state_dict is None else state_dict
    if not isinstance(state, Mapping):
        raise InputError(
            f"Give the tensors by name, (state_dict) or (cfg, state_dict); this is a {type(state).__name__}."
        )
    return state


def convert_original_state_dict_to_hooked_state_dict(
    cfg: Cfg = None, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """`convert_original_state_dict_to_hooked_state_dict(cfg, state_dict)`: mamba-ssm's (or transformers') tensors by
    MambaLens's names, with in_proj and x_proj taken apart.

    `(state_dict)` and `(cfg, state_dict)` are both understood; the sizes are read off the tensors. InputError without tensors.
    """
    state = _state(cfg, state_dict)
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key
        for pattern, theirs in RENAMED:
            name = re.sub(pattern, theirs, name)
        if name.endswith("in_proj.weight"):
            parts = dict(zip(("in_proj", "skip_proj"), value.chunk(2), strict=True))
            out |= {name.replace("in_proj", part): tensor for part, tensor in parts.items()}
        elif name.endswith("x_proj.weight"):
            n_state = state[key.replace("x_proj.weight", "A_log")].shape[1]
            sizes = [len(value) - 2 * n_state, n_state, n_state]
            parts = dict(zip(("W_delta_1", "W_B", "W_C"), value.split(sizes), strict=True))
            out |= {name.replace("x_proj", part): tensor for part, tensor in parts.items()}
        else:
            out[name] = value
    return out


def convert_hooked_state_dict_to_original_state_dict(
    cfg: Cfg = None, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """`convert_hooked_state_dict_to_original_state_dict(cfg, state_dict)`: the other way round, from MambaLens's names to
    mamba-ssm's.
    """
    state = _state(cfg, state_dict)
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        name = re.sub(r"^blocks\.(\d+)\.norm\.", r"backbone.layers.\1.norm.", key)
        name = re.sub(r"^blocks\.(\d+)\.", r"backbone.layers.\1.mixer.", name)
        name = re.sub(r"^(embedding|norm)\.", lambda m: f"backbone.{'norm_f' if m[1] == 'norm' else m[1]}.", name)
        name = name.replace(".W_delta_2.", ".dt_proj.").replace(".W_D", ".D")
        if ".in_proj." in name:
            value = torch.cat([value, state[key.replace("in_proj", "skip_proj")]])
        elif ".W_delta_1." in name:
            value = torch.cat([value, *(state[key.replace("W_delta_1", part)] for part in ("W_B", "W_C"))])
            name = name.replace("W_delta_1", "x_proj")
        elif re.search(r"\.(skip_proj|W_B|W_C)\.", name):
            continue
        out[name] = value
    return out


def new_weights(cfg: MambaCfg, initialize: bool) -> Weights:
    """Parameters of these sizes, drawn as mamba-ssm draws them if `initialize`."""
    init = cfg.initializer_cfg
    ssm = {name: getattr(cfg, name) for name in SSM}
    ssm |= {"dt_min": init.dt_min, "dt_max": init.dt_max, "dt_init_floor": init.dt_init_floor}
    sizes = {"d_model": cfg.d_model, "n_layer": cfg.n_layers, "vocab_size": cfg.vocab_size, "ssm_cfg": ssm}
    made: Any = Weights({**sizes, "pad_vocab_size_multiple": cfg.pad_vocab_size_multiple})
    if initialize:
        nn.init.normal_(made.backbone.embedding.weight, std=init.initializer_range)
        for layer in made.backbone.layers:
            std = layer.mixer.dt_proj.weight.shape[1] ** -0.5 * init.dt_scale
            if init.dt_init == "constant":
                nn.init.constant_(layer.mixer.dt_proj.weight, std)
            else:
                nn.init.uniform_(layer.mixer.dt_proj.weight, -std, std)
            if init.rescale_prenorm_residual:
                nn.init.kaiming_uniform_(layer.mixer.out_proj.weight, a=math.sqrt(5))
                layer.mixer.out_proj.weight.data /= math.sqrt(init.n_residuals_per_layer * cfg.n_layers)
    return made if cfg.device is None else made.to(cfg.device)

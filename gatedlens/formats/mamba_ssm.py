"""Mamba's checkpoints in mamba-ssm's layout: what config.json may say, and the parameters by their names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from gatedlens.errors import CheckpointError
from gatedlens.formats.transformers_config import norm_eps
from gatedlens.model import fields
from gatedlens.model.fields import (
    COUNT,
    EPS,
    FLAG,
    INTEGER,
    NUMBER,
    POSITIVE,
    SIZE,
    TEXT,
    layers_of,
    listed,
    one_of,
    table,
)
from gatedlens.model.layout import Layout
from gatedlens.model.tiny import Tiny, around, fresh

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
            raise CheckpointError(f"ssm_cfg.layer is {kind!r}; supported are 'Mamba1', 'Mamba2' and 'Mamba3'.")
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


class MambaSsm(Layout):
    """`MambaSsm()`: mamba-ssm's config.json (d_model, n_layer, vocab_size, ssm_cfg, and no model_type), unless it says Mamba2 or
    Mamba3."""

    fields = ORIGINAL_FIELDS

    def knows(self, config: Mapping[str, Any]) -> bool:
        ssm = config.get("ssm_cfg")
        if isinstance(ssm, Mapping) and ssm.get("layer") in ("Mamba2", "Mamba3"):
            return False
        return {"d_model", "n_layer", "vocab_size"} <= set(config)

    def empty(self, config: dict[str, Any]) -> nn.Module:
        return Weights(config)


TINY = Tiny(
    "tiny-mamba",
    Weights,
    {"d_model": 16, "n_layer": 2, "vocab_size": 40, "ssm_cfg": {"d_state": 4, "d_conv": 4}},
    {"embed": fresh(0.5), "A_log": around(0.3), "norm": None},
)

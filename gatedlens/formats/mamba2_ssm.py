"""Mamba-2's checkpoints in mamba-ssm's layout: what config.json may say, what a mixer says of itself, the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from gatedlens.errors import CheckpointError
from gatedlens.formats.mamba_ssm import STACK_FIELDS, StackWeights
from gatedlens.formats.transformers_config import LIMIT, read_limit
from gatedlens.model import fields
from gatedlens.model.fields import FLAG, POSITIVE, SIZE, layers_of, one_of, table
from gatedlens.model.layout import Layout
from gatedlens.model.norm import eps_of
from gatedlens.model.tiny import Tiny, fresh

SSM_FIELDS = {
    "layer": one_of("Mamba2"),
    "d_state": SIZE,
    "d_conv": SIZE,
    "expand": POSITIVE,
    "headdim": SIZE,
    "d_ssm": SIZE.or_null(),
    "ngroups": SIZE,
    "D_has_hdim": FLAG,
    "rmsnorm": FLAG,
    "norm_before_gate": FLAG,
    "dt_limit": LIMIT,
    "bias": FLAG,
    "conv_bias": FLAG,
    "chunk_size": SIZE,
}
ORIGINAL_FIELDS = {**STACK_FIELDS, "n_layer": layers_of(8), "ssm_cfg": table(**SSM_FIELDS)}


def told(mixer: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What shapes do not tell of a mixer: its groups, the limits of dt, where its norm is and the norm's eps.

    transformers keeps it on the mixer by its own names, mamba-ssm by others, a checkpoint's config in ssm_cfg.
    """
    own, ssm = vars(mixer), dict(given.get("ssm_cfg") or {})
    norm = mixer._modules.get("norm")
    norm = None if norm is None or "weight" not in norm._parameters else norm  # FalconH1 has an identity in its place
    groups = own.get("n_groups", own.get("ngroups", ssm.get("ngroups", given.get("n_groups", 1))))
    limit = own.get("time_step_limit", own.get("dt_limit", ssm.get("dt_limit", given.get("time_step_limit"))))
    of_norm = {} if norm is None else vars(norm)  # where FalconH1 keeps it
    first = own.get("norm_before_gate", of_norm.get("norm_before_gate", ssm.get("norm_before_gate", False)))
    eps = 1e-5 if norm is None else eps_of(norm, float(given.get("layer_norm_epsilon", 1e-5)))
    where = "none" if norm is None else "before the gate" if first else "after the gate"
    return {
        "n_groups": groups,
        "dt_limit": read_limit(limit) if limit is not None else (0.0, math.inf),
        "norm": where,
        "eps": eps,
    }


class Mamba2Weights(StackWeights):
    """Parameters in mamba-ssm's layout and names, without mamba-ssm: `Mamba2Weights(config.json).load_state_dict(...)`.

    config: `d_model, n_layer, vocab_size`, and `ssm_cfg {layer "Mamba2", d_state 128, d_conv 4, expand 2, headdim 64, ngroups 1,
    D_has_hdim False, rmsnorm True, norm_before_gate False, dt_limit [0, inf], bias False, conv_bias True}`; optionally `rms_norm`
    True (False: LayerNorm), `residual_in_fp32` True, `pad_vocab_size_multiple` 8, `tie_embeddings` True.
    """

    def __init__(self, config: dict[str, Any]):
        fields.check(config, ORIGINAL_FIELDS, "The config", required=("d_model", "n_layer", "vocab_size", "ssm_cfg"))
        ssm = {name: value for name, value in config["ssm_cfg"].items() if name != "layer"}
        super().__init__(config, layer_parameters, ssm)


def says_hybrid(config: Mapping[str, Any]) -> bool:
    """Whether such a config asks for more than Mamba-2: attention, MLPs, or channels beside the heads."""
    ssm, d_model = config.get("ssm_cfg") or {}, config.get("d_model", 0)
    narrow = ssm.get("d_ssm") not in (None, int(ssm.get("expand", 2) * d_model))
    return bool(config.get("attn_layer_idx") or config.get("d_intermediate") or narrow)


def layer_parameters(
    d: int,
    norm: Callable[[int], nn.Module],
    d_state: int = 128,
    d_conv: int = 4,
    expand: int | float = 2,
    headdim: int = 64,
    d_ssm: int | None = None,
    ngroups: int = 1,
    D_has_hdim: bool = False,
    rmsnorm: bool = True,
    norm_before_gate: bool = False,
    dt_limit: Any = None,
    bias: bool = False,
    conv_bias: bool = True,
    **unsupported: Any,
) -> nn.Module:
    """One layer as mamba-ssm initialises it: A_log = log of 1 to 16, D = 1, softplus(dt_bias) log-uniform in dt."""
    harmless = {"chunk_size", "dt_min", "dt_max", "dt_init_floor", "A_init_range", "use_mem_eff_path", "conv_init"}
    if unknown := set(unsupported) - harmless:
        raise CheckpointError(f"ssm_cfg asks for {', '.join(sorted(unknown))}, which gatedlens does not support.")
    whole = int(expand * d)
    inner = whole if d_ssm is None else d_ssm
    if inner > whole:
        raise CheckpointError(f"ssm_cfg.d_ssm is {d_ssm}, more than the {whole} channels of expand * d_model.")
    if inner % headdim or (inner // headdim) % ngroups:
        raise CheckpointError(
            f"ssm_cfg: {inner} channels cannot be cut into heads of {headdim} in {ngroups} groups evenly."
        )
    heads = inner // headdim
    layer, mixer = nn.Module(), nn.Module()
    layer.norm, layer.mixer = norm(d), mixer
    through_conv = inner + 2 * ngroups * d_state
    mixer.in_proj = nn.Linear(d, 2 * (whole - inner) + inner + through_conv + heads, bias=bias)
    mixer.conv1d = nn.Conv1d(
        through_conv, through_conv, d_conv, groups=through_conv, bias=conv_bias, padding=d_conv - 1
    )
    dt = torch.exp(torch.linspace(math.log(0.001), math.log(0.1), heads)).clamp(min=1e-4)
    mixer.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
    mixer.A_log = nn.Parameter(torch.log(torch.linspace(1.0, 16.0, heads)))
    mixer.D = nn.Parameter(torch.ones(inner if D_has_hdim else heads))
    if rmsnorm:
        mixer.norm = nn.RMSNorm(inner, eps=1e-5)
    mixer.out_proj = nn.Linear(whole, d, bias=bias)
    return layer


class Mamba2Ssm(Layout):
    """`Mamba2Ssm()`: mamba-ssm's config.json whose ssm_cfg says "layer": "Mamba2"."""

    fields = ORIGINAL_FIELDS

    def knows(self, config: Mapping[str, Any]) -> bool:
        ssm = config.get("ssm_cfg")
        named = isinstance(ssm, Mapping) and ssm.get("layer") == "Mamba2"
        return named and {"d_model", "n_layer", "vocab_size"} <= set(config) and not says_hybrid(config)

    def empty(self, config: dict[str, Any]) -> nn.Module:
        return Mamba2Weights(config)


_HEADS = {"layer": "Mamba2", "d_state": 4, "d_conv": 4, "headdim": 8, "ngroups": 2}
TINY = Tiny(
    "tiny-mamba2",
    Mamba2Weights,
    {"d_model": 16, "n_layer": 2, "vocab_size": 40, "ssm_cfg": _HEADS},
    {"embed": fresh(0.5)},
)

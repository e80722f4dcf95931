"""Mamba-3's checkpoints in mamba-ssm's layout: what config.json may say, what a mixer says of itself, the parameters.

**Two releases compute A of the same parameters in two ways.** mamba-ssm up to 2.3.2.post1 takes softplus(A_pre), and so does
flash-linear-attention; mamba-ssm's source from June 2026 on takes 1 + x above 0 and 1 / (1 - x) below, a "heavy tail". A module
is told by the code that it comes from. Of config.json: MambaLMHeadModel accepts "layer": "Mamba3" only in source with the heavy
tail, so that is what such a file means; a model that was trained otherwise says so, "A_activation": "softplus" in ssm_cfg.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from gatedlens.errors import CheckpointError
from gatedlens.formats.mamba_ssm import STACK_FIELDS, StackWeights
from gatedlens.formats.mamba_ssm_hybrid import MULTIPLE
from gatedlens.model import fields
from gatedlens.model.fields import FLAG, POSITIVE, SHARE, SIZE, layers_of, one_of, table
from gatedlens.model.layout import Layout
from gatedlens.model.tiny import Tiny, fresh

HEAVY_TAIL, SOFTPLUS = "heavy_tail", "softplus"
SSM_FIELDS = {
    "layer": one_of("Mamba3"),
    "d_state": SIZE,
    "expand": POSITIVE,
    "headdim": SIZE,
    "ngroups": SIZE,
    "rope_fraction": one_of(0.5, 1.0, 1),
    "A_floor": SHARE,
    "A_activation": one_of(HEAVY_TAIL, SOFTPLUS),  # no word of mamba-ssm's
    "is_outproj_norm": FLAG,
    "is_mimo": FLAG,
    "mimo_rank": SIZE.or_null(),
    **dict.fromkeys(("dt_min", "dt_max", "dt_init_floor"), POSITIVE),
    "chunk_size": SIZE,
    "fuse_pregate_headwise_norm": FLAG,
}
ORIGINAL_FIELDS = {**STACK_FIELDS, "n_layer": layers_of(10), "ssm_cfg": table(**SSM_FIELDS)}


def told(mixer: Any, given: Mapping[str, Any], model_name: str) -> dict[str, Any]:
    """What shapes do not tell of a mixer: its groups, the least -A, and how A is made of what is projected."""
    own, ssm = vars(mixer), dict(given.get("ssm_cfg") or {})
    floor = own.get("A_floor", ssm.get("A_floor", given.get("A_floor", 1e-4)))
    groups = own.get("num_bc_heads", own.get("n_groups", ssm.get("ngroups", given.get("n_groups", 1))))
    return {"n_groups": groups, "A_floor": float(floor), "A_activation": activation_of(mixer, ssm, model_name)}


def activation_of(mixer: Any, ssm: Mapping[str, Any], model_name: str) -> str:
    """`activation_of(mixer, config["ssm_cfg"], "mine")`: "heavy_tail" or "softplus": what the config says, or else the code that
    the mixer's class comes from. CheckpointError for a class of a stranger's, which may mean either."""
    if "A_activation" in ssm:
        return str(ssm["A_activation"])
    cls = type(mixer)
    if cls.__module__.startswith("torch."):  # parameters alone
        return HEAVY_TAIL
    if "heavy_tail_activation" in vars(sys.modules.get(cls.__module__, nn)):
        return HEAVY_TAIL
    if cls.__module__.startswith("mamba_ssm.") or (
        cls.__module__.startswith("fla.") and any("_compute_a" in vars(base) for base in cls.__mro__)
    ):
        return SOFTPLUS
    raise CheckpointError(
        f"{model_name} has mixers of {cls.__module__}.{cls.__name__}, which do not tell how A is made of what in_proj gives: "
        "by softplus, as in mamba-ssm 2.3.2, or by the heavy tail (1 + x above 0, else 1 / (1 - x)), as in its later source. Say "
        f"it in the config: ssm_cfg['A_activation'] = '{SOFTPLUS}' or '{HEAVY_TAIL}'."
        + (
            " (fla before July 2026 made A a constant above 0, by mistake.)"
            if cls.__module__.startswith("fla.")
            else ""
        )
    )


class Mamba3Weights(StackWeights):
    """Parameters in mamba-ssm's layout and names, without mamba-ssm: `Mamba3Weights(config.json).load_state_dict(...)`.

    config: `d_model, n_layer, vocab_size`, and `ssm_cfg {layer "Mamba3", d_state 128, expand 2, headdim 64, ngroups 1,
    rope_fraction 0.5, A_floor 1e-4, A_activation "heavy_tail", is_outproj_norm False, is_mimo False, mimo_rank 4}`; optionally
    `d_intermediate` 0, `rms_norm` True (False: LayerNorm), `residual_in_fp32` True, `pad_vocab_size_multiple` 8,
    `tie_embeddings` True.
    """

    def __init__(self, config: dict[str, Any]):
        fields.check(config, ORIGINAL_FIELDS, "The config", required=("d_model", "n_layer", "vocab_size", "ssm_cfg"))
        if config.get("attn_layer_idx"):
            raise CheckpointError("attn_layer_idx: gatedlens opens Mamba-3 without layers of attention between.")
        ssm = {name: value for name, value in config["ssm_cfg"].items() if name != "layer"}
        super().__init__(config, layer_parameters, {**ssm, "d_mlp": config.get("d_intermediate", 0)})


def layer_parameters(
    d: int,
    norm: Callable[[int], nn.Module],
    d_state: int = 128,
    expand: int | float = 2,
    headdim: int = 64,
    ngroups: int = 1,
    rope_fraction: float = 0.5,
    is_outproj_norm: bool = False,
    is_mimo: bool = False,
    mimo_rank: int | None = 4,
    d_mlp: int = 0,
    **harmless: Any,
) -> nn.Module:
    """One layer as mamba-ssm initialises it: biases and D 1, softplus(dt_bias) log-uniform in dt."""
    inner, angles = int(expand * d), int(d_state * rope_fraction) // 2
    if inner % headdim or (inner // headdim) % ngroups:
        raise CheckpointError(
            f"ssm_cfg: {inner} channels cannot be cut into heads of {headdim} in {ngroups} groups evenly."
        )
    if angles == 0 or d_state % 2:
        raise CheckpointError(f"ssm_cfg: of {d_state} states a share of {rope_fraction} makes no whole pairs to turn.")
    heads, ranks = inner // headdim, (mimo_rank or 4) if is_mimo else 1
    layer, mixer = nn.Module(), nn.Module()
    layer.norm, layer.mixer = norm(d), mixer
    mixer.in_proj = nn.Linear(d, 2 * inner + 2 * ranks * ngroups * d_state + 3 * heads + angles, bias=False)
    dt = torch.exp(torch.linspace(math.log(0.001), math.log(0.1), heads)).clamp(min=1e-4)
    mixer.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
    mixer.B_bias, mixer.C_bias = (nn.Parameter(torch.ones(heads, ranks, d_state)) for _ in range(2))
    mixer.B_norm, mixer.C_norm = (nn.RMSNorm(d_state, eps=1e-5) for _ in range(2))
    if is_mimo:
        mixer.mimo_x, mixer.mimo_o = (nn.Parameter(torch.ones(heads, ranks, headdim) / ranks) for _ in range(2))
        mixer.mimo_z = nn.Parameter(torch.ones(heads, ranks, headdim))
    mixer.D = nn.Parameter(torch.ones(heads))
    if is_outproj_norm:
        mixer.norm = nn.RMSNorm(inner, eps=1e-5)
    mixer.out_proj = nn.Linear(inner, d, bias=False)
    if d_mlp:
        width = math.ceil(d_mlp / MULTIPLE) * MULTIPLE
        layer.norm2, layer.mlp = norm(d), nn.Module()
        layer.mlp.fc1, layer.mlp.fc2 = nn.Linear(d, 2 * width, bias=False), nn.Linear(width, d, bias=False)
    return layer


def says_mamba3(config: Mapping[str, Any]) -> bool:
    """Whether a config.json of mamba-ssm asks for Mamba-3."""
    ssm = config.get("ssm_cfg")
    return isinstance(ssm, Mapping) and ssm.get("layer") == "Mamba3"


class Mamba3Ssm(Layout):
    """`Mamba3Ssm()`: mamba-ssm's config.json whose ssm_cfg says "layer": "Mamba3"."""

    fields = ORIGINAL_FIELDS

    def knows(self, config: Mapping[str, Any]) -> bool:
        return says_mamba3(config) and {"d_model", "n_layer", "vocab_size"} <= set(config)

    def empty(self, config: dict[str, Any]) -> nn.Module:
        return Mamba3Weights(config)


TINY = Tiny(
    "tiny-mamba3",
    Mamba3Weights,
    {
        "d_model": 16,
        "n_layer": 2,
        "vocab_size": 40,
        "ssm_cfg": {"layer": "Mamba3", "d_state": 4, "headdim": 8, "ngroups": 2},
    },
    {"embed": fresh(0.5)},
)

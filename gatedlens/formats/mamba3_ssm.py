"""Mamba-3's checkpoints in mamba-ssm's layout and in flash-linear-attention's: what config.json may say, what a mixer says of
itself, the parameters.

**Two releases compute A of the same parameters in two ways.** mamba-ssm up to 2.3.2.post1 takes softplus(A_pre), and so does
flash-linear-attention; mamba-ssm's source from June 2026 on takes 1 + x above 0 and 1 / (1 - x) below, a "heavy tail". A module
is told by the code that it comes from. Of config.json: MambaLMHeadModel accepts "layer": "Mamba3" only in source with the heavy
tail, so that is what such a file means; a model that was trained otherwise says so, "A_activation": "softplus" in ssm_cfg. A
config.json of fla means softplus since fla 0.5.2; in 0.5.1 a slip made A a constant above 0, so such a file has to say it.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gatedlens.errors import CheckpointError
from gatedlens.formats.mamba_ssm import STACK_FIELDS, StackWeights
from gatedlens.formats.mamba_ssm_hybrid import MULTIPLE
from gatedlens.formats.transformers_config import norm_eps
from gatedlens.model import fields
from gatedlens.model.fields import EPS, FLAG, POSITIVE, SHARE, SIZE, layers_of, one_of, table
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
FLA_SLIP = "(fla 0.5.1 made A a constant above 0, by a slip that 0.5.2 has not; no A_activation says that.)"
FLA_WORDS = {  # fla's words in those of mamba-ssm, and what fla takes where a config.json does not say it
    "hidden_size": ("d_model", 2048),
    "num_hidden_layers": ("n_layer", 48),
    "vocab_size": ("vocab_size", 32000),
    "norm_eps": ("norm_epsilon", 1e-5),
    "residual_in_fp32": ("residual_in_fp32", True),
    "tie_word_embeddings": ("tie_embeddings", False),
}
FLA_SSM_WORDS = {"state_size": "d_state", "head_dim": "headdim", "n_groups": "ngroups"}
FLA_FIELDS = {
    "hidden_size": SIZE,
    "num_hidden_layers": layers_of(10),
    "norm_eps": EPS,
    "tie_word_embeddings": FLAG,
    "use_bias": FLAG,
    "hidden_act": one_of("silu", "swish"),
    **{word: SSM_FIELDS[ours] for word, ours in FLA_SSM_WORDS.items()},
    **{word: field for word, field in SSM_FIELDS.items() if word not in ("layer", *FLA_SSM_WORDS.values())},
}
ORIGINAL_FIELDS = {**FLA_FIELDS, **STACK_FIELDS, "n_layer": layers_of(10), "ssm_cfg": table(**SSM_FIELDS)}


def in_mamba_ssms_words(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`in_mamba_ssms_words(config.json)`: fla's config in mamba-ssm's words; any other as it is."""
    if config.get("model_type") != "mamba3":
        return config
    ssm = {FLA_SSM_WORDS.get(word, word): value for word, value in config.items() if word in FLA_FIELDS}
    ssm = {word: value for word, value in ssm.items() if word in SSM_FIELDS}
    known = {ours: config.get(word, otherwise) for word, (ours, otherwise) in FLA_WORDS.items()}
    return {**known, "pad_vocab_size_multiple": 1, "ssm_cfg": {"layer": "Mamba3", **ssm}}


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
        own = config.get("model_type") != "mamba3"
        if not own and "A_activation" not in config:
            raise CheckpointError(
                "The config is flash-linear-attention's, and two of its releases mean two things by it: in 0.5.2 and later A is "
                f'made by softplus; say "A_activation": "{SOFTPLUS}" in config.json if it was. {FLA_SLIP}'
            )
        if config.get("use_bias"):
            raise CheckpointError(
                "use_bias: gatedlens reads no biases of in_proj and out_proj from a folder of Mamba-3."
            )
        config = dict(in_mamba_ssms_words(config))
        fields.check(config, ORIGINAL_FIELDS, "The config", required=("d_model", "n_layer", "vocab_size", "ssm_cfg"))
        if config.get("attn_layer_idx"):
            raise CheckpointError("attn_layer_idx: gatedlens opens Mamba-3 without layers of attention between.")
        ssm = {name: value for name, value in config["ssm_cfg"].items() if name != "layer"}
        ssm |= {"norm_eps": 1e-5 if own else norm_eps(config)}
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
    norm_eps: float = 1e-5,
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
    mixer.B_norm, mixer.C_norm = (nn.RMSNorm(d_state, eps=norm_eps) for _ in range(2))
    if is_mimo:
        mixer.mimo_x, mixer.mimo_o = (nn.Parameter(torch.ones(heads, ranks, headdim) / ranks) for _ in range(2))
        mixer.mimo_z = nn.Parameter(torch.ones(heads, ranks, headdim))
    mixer.D = nn.Parameter(torch.ones(heads))
    if is_outproj_norm:
        mixer.norm = nn.RMSNorm(inner, eps=norm_eps)
    mixer.out_proj = nn.Linear(inner, d, bias=False)
    if d_mlp:
        width = math.ceil(d_mlp / MULTIPLE) * MULTIPLE
        layer.norm2, layer.mlp = norm(d), nn.Module()
        layer.mlp.fc1, layer.mlp.fc2 = nn.Linear(d, 2 * width, bias=False), nn.Linear(width, d, bias=False)
    return layer


def says_mamba3(config: Mapping[str, Any]) -> bool:
    """Whether a config.json of mamba-ssm, or of fla, asks for Mamba-3."""
    ssm = in_mamba_ssms_words(config).get("ssm_cfg")
    return isinstance(ssm, Mapping) and ssm.get("layer") == "Mamba3"


class Mamba3Ssm(Layout):
    """`Mamba3Ssm()`: mamba-ssm's config.json whose ssm_cfg says "layer": "Mamba3", and fla's whose model_type is "mamba3"."""

    fields = ORIGINAL_FIELDS

    def knows(self, config: Mapping[str, Any]) -> bool:
        return says_mamba3(config) and {"d_model", "n_layer", "vocab_size"} <= set(in_mamba_ssms_words(config))

    def empty(self, config: dict[str, Any]) -> nn.Module:
        return Mamba3Weights(config)

    def rename(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {re.sub(r"^backbone\.embeddings\.", "backbone.embedding.", name): x for name, x in state.items()}


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

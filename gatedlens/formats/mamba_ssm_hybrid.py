"""mamba-ssm's own hybrids around Mamba-2: what their config.json may say, and the parameters by their names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatedlens.errors import CheckpointError
from gatedlens.formats.mamba2_ssm import SSM_FIELDS, layer_parameters, says_hybrid
from gatedlens.formats.mamba_ssm import STACK_FIELDS, with_eps
from gatedlens.formats.transformers_config import norm_eps
from gatedlens.model import fields
from gatedlens.model.fields import COUNT, FLAG, INTEGER, POSITIVE, SIZE, layers_of, table
from gatedlens.model.layout import Layout
from gatedlens.model.tiny import Tiny, fresh

ATTENTION = {  # attn_cfg, with mamba-ssm's defaults
    "causal": False,
    "num_heads_kv": None,
    "head_dim": None,
    "d_conv": 0,
    "mlp_dim": 0,
    "qkv_proj_bias": True,
    "out_proj_bias": True,
    "softmax_scale": None,
    "rotary_emb_dim": 0,
    "rotary_emb_base": 10000.0,
    "rotary_emb_interleaved": False,
}
ATTENTION_FIELDS = {
    "causal": FLAG,
    "num_heads": SIZE,
    "num_heads_kv": SIZE.or_null(),
    "head_dim": SIZE.or_null(),
    "d_conv": COUNT,
    "mlp_dim": COUNT,
    "qkv_proj_bias": FLAG,
    "out_proj_bias": FLAG,
    "softmax_scale": POSITIVE.or_null(),
    "rotary_emb_dim": INTEGER,
    "rotary_emb_base": POSITIVE,
    "rotary_emb_interleaved": FLAG,
}
FIELDS = {
    **STACK_FIELDS,
    "n_layer": layers_of(3),
    "ssm_cfg": table(**SSM_FIELDS),
    "attn_cfg": table(**ATTENTION_FIELDS).or_null(),
}
MULTIPLE = 128  # of which mamba-ssm makes an MLP's width


def attention_of(given: Mapping[str, Any], own: Mapping[str, Any], model_name: str) -> dict[str, Any]:
    """What a config's attn_cfg, or else an attention of mamba-ssm itself (`own`), says of the layers of attention.

    CheckpointError for what cannot be run.
    """
    said = {**ATTENTION, **(given.get("attn_cfg") or {})}
    said |= {name: own[name] for name in said if name in own}
    if "num_heads" not in said:
        raise CheckpointError(f"{model_name} has layers of attention, and its attn_cfg says no num_heads.")
    refused = {
        "causal": (not said["causal"], "an attention that looks ahead predicts nothing (mamba-ssm's default is False)"),
        "mlp_dim": (said["mlp_dim"], "an MLP inside an attention is not supported; d_intermediate is"),
        "rotary_emb_interleaved": (
            said["rotary_emb_dim"] and said["rotary_emb_interleaved"],
            "neighbours turned in pairs are not supported",
        ),
    }
    for name, (wrong, why) in refused.items():
        if wrong:
            raise CheckpointError(f"{model_name} has attn_cfg.{name}={said[name]!r}: {why}.")
    return said


class Rotary:
    """The frequencies of a rotary embedding, as mamba-ssm's: base^(-2 j / dim) in float32, at hand in the dtype of the
    attention's own weights where that is wider."""

    def __init__(self, mixer: Any, dim: int, base: float):
        self.mixer, self.dim, self.base = mixer, dim, base

    @property
    def inv_freq(self) -> Float[Tensor, " pair"]:
        """One a pair."""
        found = 1.0 / self.base ** (torch.arange(0, self.dim, 2).float() / self.dim)
        weight = self.mixer.in_proj.weight
        return found.to(weight.device, torch.promote_types(weight.dtype, torch.float32))


class Mamba2HybridWeights(nn.Module):
    """Parameters in mamba-ssm's layout and names, without mamba-ssm: `Mamba2HybridWeights(config.json).load_state_dict(...)`.

    config: as `Mamba2Weights` takes it, and `attn_layer_idx`, `attn_cfg {num_heads, causal True, ...}`, `d_intermediate`, and in
    ssm_cfg `d_ssm`.
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        fields.check(config, FIELDS, "The config", required=("d_model", "n_layer", "vocab_size", "ssm_cfg"))
        self.config = dict(config)
        d, multiple, n = config["d_model"], config.get("pad_vocab_size_multiple", 8), config["n_layer"]
        attends, ssm = config.get("attn_layer_idx") or [], dict(config["ssm_cfg"])
        if ssm.pop("layer", "Mamba1") != "Mamba2":
            raise CheckpointError("Of mamba-ssm's hybrids those around Mamba-2 are supported: ssm_cfg.layer 'Mamba2'.")
        if wrong := [layer for layer in attends if not 0 <= layer < n]:
            raise CheckpointError(f"attn_layer_idx names layer {wrong[0]}; there are {n}.")
        vocab = math.ceil(config["vocab_size"] / multiple) * multiple
        norm = with_eps(nn.RMSNorm if config.get("rms_norm", True) else nn.LayerNorm, norm_eps(config))
        self.backbone = nn.Module()
        self.backbone.embedding = nn.Embedding(vocab, d)
        self.backbone.layers = nn.ModuleList(
            _attention(d, norm, attention_of(config, {}, "The config"))
            if layer in attends
            else layer_parameters(d, norm, **ssm)
            for layer in range(n)
        )
        for layer in self.backbone.layers if config.get("d_intermediate") else ():
            width = math.ceil(config["d_intermediate"] / MULTIPLE) * MULTIPLE
            layer.norm2, layer.mlp = norm(d), nn.Module()
            layer.mlp.fc1, layer.mlp.fc2 = nn.Linear(d, 2 * width, bias=False), nn.Linear(width, d, bias=False)
        self.backbone.norm_f = norm(d)
        self.lm_head = nn.Linear(d, vocab, bias=False)
        if config.get("tie_embeddings", True):
            self.lm_head.weight = self.backbone.embedding.weight


def _attention(d: int, norm: Callable[[int], nn.Module], said: Mapping[str, Any]) -> nn.Module:
    """A layer of attention: one projection of q, k and v, their conv if there is one, and the projection of what comes out."""
    layer, mixer, heads = nn.Module(), nn.Module(), said["num_heads"]
    shared, width = said["num_heads_kv"] or heads, said["head_dim"] or d // heads
    if heads % shared:
        raise CheckpointError(f"attn_cfg: {heads} heads cannot share {shared} heads of keys evenly.")
    layer.norm, layer.mixer = norm(d), mixer
    through = (heads + 2 * shared) * width
    mixer.in_proj = nn.Linear(d, through, bias=said["qkv_proj_bias"])
    if said["d_conv"] > 0:
        taps = said["d_conv"]
        mixer.conv1d = nn.Conv1d(through, through, taps, groups=through, padding=taps - 1)
    mixer.out_proj = nn.Linear(heads * width, d, bias=said["out_proj_bias"])
    return layer


class MambaSsmHybrid(Layout):
    """`MambaSsmHybrid()`: mamba-ssm's config.json with layers of attention, MLPs or channels beside the heads of Mamba-2."""

    fields = FIELDS

    def knows(self, config: Mapping[str, Any]) -> bool:
        ssm = config.get("ssm_cfg")
        named = isinstance(ssm, Mapping) and ssm.get("layer") == "Mamba2"
        return named and {"d_model", "n_layer", "vocab_size"} <= set(config) and says_hybrid(config)

    def empty(self, config: dict[str, Any]) -> nn.Module:
        return Mamba2HybridWeights(config)


# A Mamba-2, then an attention, each with an MLP.
TINY = Tiny(
    "tiny-mamba_ssm_hybrid",
    Mamba2HybridWeights,
    {
        "d_model": 16,
        "n_layer": 2,
        "vocab_size": 40,
        "d_intermediate": 6,
        "attn_layer_idx": [1],
        "attn_cfg": {
            "causal": True,
            "num_heads": 4,
            "num_heads_kv": 2,
            "head_dim": 4,
            "rotary_emb_dim": 2,
            "qkv_proj_bias": False,
            "out_proj_bias": False,
        },
        "ssm_cfg": {"layer": "Mamba2", "d_state": 4, "headdim": 8, "ngroups": 2, "D_has_hdim": True},
    },
    {"embed": fresh(0.5)},
)

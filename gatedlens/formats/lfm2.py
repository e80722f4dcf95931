"""LFM2's models of transformers: what their configs may say, and a small one."""

from __future__ import annotations

from typing import Any

from torch import nn

from gatedlens.model import fields
from gatedlens.model.fields import COUNT, EPS, FLAG, POSITIVE, SIZE, layers_of, listed, one_of, table
from gatedlens.model.tiny import Tiny, fresh

FIELDS = {
    **fields.TRANSFORMERS,
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": layers_of(7),
    "num_attention_heads": SIZE,
    "num_key_value_heads": SIZE.or_null(),
    "norm_eps": EPS,
    "rope_parameters": table(rope_theta=POSITIVE).or_null(),
    "conv_bias": FLAG,
    "conv_L_cache": SIZE,
    "full_attn_idxs": listed(COUNT).or_null(),
    "layer_types": listed(one_of("conv", "full_attention"), 1).or_null(),
    # LFM2-MoE
    "moe_intermediate_size": SIZE,
    "num_dense_layers": COUNT,
    "num_experts": SIZE,
    "num_experts_per_tok": SIZE,
    "use_expert_bias": FLAG,
    "routed_scaling_factor": POSITIVE,
    "norm_topk_prob": FLAG,
}


def new_model(**config: Any) -> nn.Module:
    """An Lfm2ForCausalLM of this config, without special tokens."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    special = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    model: nn.Module = Lfm2ForCausalLM(Lfm2Config(**(special | config)))
    return model


# A short conv, then an attention, each with an MLP.
TINY = Tiny(
    "tiny-lfm2",
    lambda config: new_model(**config),
    {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "layer_types": ["conv", "full_attention"],
        "vocab_size": 40,
        "intermediate_size": 6,
        "block_auto_adjust_ff_dim": False,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "conv_L_cache": 3,
    },
    {"embed_tokens": fresh(0.3)},
)

"""OLMo-hybrid's model of transformers: what its config may say, and a small one."""

from __future__ import annotations

from typing import Any

from torch import nn

from gatedlens.formats.qwen3_next import slow
from gatedlens.formats.transformers_config import LAYER_KINDS
from gatedlens.model import fields
from gatedlens.model.fields import EPS, FLAG, SIZE, TEXT, THETA, layers_of, one_of, table
from gatedlens.model.tiny import Tiny, fresh

FIELDS = {
    **fields.TRANSFORMERS,
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": layers_of(11),
    "num_attention_heads": SIZE,
    "num_key_value_heads": SIZE.or_null(),
    "hidden_act": one_of("silu", "swish"),
    "rms_norm_eps": EPS,
    "rope_parameters": table(rope_type=TEXT, rope_theta=THETA.or_null()).or_null(),
    "attention_bias": FLAG,
    "layer_types": LAYER_KINDS.or_null(),
    "linear_num_key_heads": SIZE.or_null(),
    "linear_num_value_heads": SIZE.or_null(),
    "linear_key_head_dim": SIZE.or_null(),
    "linear_value_head_dim": SIZE.or_null(),
    "linear_conv_kernel_dim": SIZE,
    "linear_allow_neg_eigval": FLAG,
    "tie_word_embeddings": FLAG,
}


def new_model(**config: Any) -> nn.Module:
    """An OlmoHybridForCausalLM of this config, without special tokens."""
    from transformers import OlmoHybridConfig, OlmoHybridForCausalLM

    special = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    model: nn.Module = OlmoHybridForCausalLM(OlmoHybridConfig(**(special | config)))
    return model


def smooth(**config: Any) -> nn.Module:
    """The same, the eps of the norms behind the scans far above 0, as in Qwen3-Next's small model. (No config says this eps.)"""
    model: Any = new_model(**config)
    for layer in model.model.layers:
        if "linear_attn" in layer._modules:
            layer.linear_attn.o_norm.variance_epsilon = 0.5
    return model


# A delta net and an attention. Its logits change smoothly, as integrals and differences of them ask.
TINY = Tiny(
    "tiny-olmo_hybrid",
    lambda config: smooth(**config),
    {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "vocab_size": 40,
        "intermediate_size": 10,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 3,
        "linear_value_head_dim": 5,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 0.1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    {"embed_tokens": fresh(1.0), "A_log": slow},
)

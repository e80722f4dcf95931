"""MiniMax's model of transformers: what its config may say, and a small one."""

from __future__ import annotations

from typing import Any

from torch import nn

from gatedlens.formats.qwen3_next import by_last_axis
from gatedlens.formats.transformers_config import LAYER_KINDS
from gatedlens.model import fields
from gatedlens.model.fields import EPS, NOT_NEGATIVE, NUMBER, SIZE, TEXT, THETA, layers_of, table
from gatedlens.model.tiny import Tiny, fresh

FIELDS = {
    **fields.TRANSFORMERS,
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": layers_of(9),
    "num_attention_heads": SIZE,
    "num_key_value_heads": SIZE.or_null(),
    "head_dim": SIZE.or_null(),
    "hidden_act": TEXT,
    "rms_norm_eps": EPS,
    "sliding_window": SIZE.or_null(),
    "rope_theta": THETA,
    "rope_parameters": table(rope_type=TEXT, rope_theta=THETA).or_null(),
    "layer_types": LAYER_KINDS.or_null(),
    "block_size": SIZE,
    "num_local_experts": SIZE,
    "num_experts_per_tok": SIZE,
    "router_jitter_noise": NOT_NEGATIVE,
    "full_attn_alpha_factor": NUMBER,
    "full_attn_beta_factor": NUMBER,
    "linear_attn_alpha_factor": NUMBER,
    "linear_attn_beta_factor": NUMBER,
    "mlp_alpha_factor": NUMBER,
    "mlp_beta_factor": NUMBER,
}


def new_model(**config: Any) -> nn.Module:
    """A MiniMaxForCausalLM of this config, without special tokens."""
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    special = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    model: nn.Module = MiniMaxForCausalLM(MiniMaxConfig(**(special | config)))
    return model


def smooth(**config: Any) -> nn.Module:
    """The same, the eps of the norms behind the scans far above 0, as in Qwen3-Next's small model. (No config says this eps.)"""
    model: Any = new_model(**config)
    for layer in model.model.layers:
        if "qkv_proj" in layer.self_attn._modules:
            layer.self_attn.norm.variance_epsilon = 0.5
    return model


# A lightning attention and an attention. Its logits change smoothly, as integrals and differences of them ask: each token goes to
# all experts.
TINY = Tiny(
    "tiny-minimax",
    lambda config: smooth(**config),
    {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "vocab_size": 40,
        "intermediate_size": 5,
        "layer_types": ["linear_attention", "full_attention"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "rms_norm_eps": 0.1,
        "block_size": 4,
        "num_local_experts": 2,
        "num_experts_per_tok": 2,
        "linear_attn_alpha_factor": 1.3,
        "linear_attn_beta_factor": 0.7,
        "full_attn_alpha_factor": 0.9,
        "full_attn_beta_factor": 1.1,
        "mlp_alpha_factor": 1.2,
        "mlp_beta_factor": 0.8,
    },
    {"embed_tokens": fresh(1.0), r"experts\.(gate_up|down)_proj": by_last_axis},
)

"""Bailing hybrid's model of transformers: a small one."""

from __future__ import annotations

from typing import Any

from torch import nn

from gatedlens.formats.qwen3_next import by_last_axis, slow
from gatedlens.model.tiny import Tiny, fresh


def new_model(**config: Any) -> nn.Module:
    """A BailingHybridForCausalLM of this config, without special tokens."""
    from transformers import BailingHybridConfig, BailingHybridForCausalLM

    special = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    model: nn.Module = BailingHybridForCausalLM(BailingHybridConfig(**(special | config)))
    return model


# As Kimi Linear's: a delta net with an MLP, an attention with experts, whose logits change smoothly.
TINY = Tiny(
    "tiny-bailing_hybrid",
    lambda config: new_model(**config),
    {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "vocab_size": 40,
        "intermediate_size": 10,
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 4,
        "rms_norm_eps": 0.1,
        "kv_lora_rank": 6,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 2,
        "v_head_dim": 5,
        "num_experts": 2,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 4,
    },
    {"embed_tokens": fresh(0.3), r"experts\.(gate_up|down)_proj": by_last_axis, "A_log": slow},
)

"""Qwen4Exp's model of transformers: what its config may say, and a small one."""

from __future__ import annotations

from typing import Any

from torch import nn

from gatedlens.formats.qwen3_next import by_last_axis, slow
from gatedlens.formats.transformers_config import QWEN_LANGUAGE
from gatedlens.model import fields
from gatedlens.model.fields import COUNT, INTEGER, SIZE, layers_of, listed, one_of, table
from gatedlens.model.tiny import Tiny, fresh

KINDS = listed(one_of("linear_attention", "indexed_attention", "full_attention"), low=1)
_LANGUAGE = {  # of the language model
    **QWEN_LANGUAGE,
    "num_hidden_layers": layers_of(24),
    "output_gate_type": one_of("silu", "sigmoid").or_null(),
    "layer_types": KINDS.or_null(),
    "num_experts": SIZE,
    "hc_count": SIZE,
    "hc_lowrank": SIZE,
    "indexer_n_heads": SIZE.or_null(),
    "indexer_kv_heads": SIZE.or_null(),
    "indexer_head_dim": SIZE.or_null(),
    "indexer_budget": SIZE.or_null(),
    "indexer_compress_ratio": SIZE.or_null(),
    "ple_layer_ids": listed(COUNT).or_null(),
    "ple_embed_dim": SIZE.or_null(),
    "ple_conv_kernel_size": SIZE,
    "ngram_size": SIZE,
    "heads_per_ngram": SIZE,
    "ngram_vocab_size_base": SIZE,
    "make_ngram_vocab_size_divisible_by": SIZE,
    "split_ngram_parts": SIZE,
    "seed": INTEGER,
}
FIELDS = {
    **fields.TRANSFORMERS,
    **_LANGUAGE,
    "text_config": table(**_LANGUAGE),
}  # the table: inside a model of images and text


def new_model(**config: Any) -> nn.Module:
    """A Qwen4ExpForCausalLM of this config, without special tokens."""
    from transformers import Qwen4ExpForCausalLM, Qwen4ExpTextConfig

    special = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    model: nn.Module = Qwen4ExpForCausalLM(Qwen4ExpTextConfig(**(special | config)))
    return model


# A delta net and an attention, both with experts, on two copies of the stream. Its logits change smoothly, as integrals and
# differences of them ask: each token goes to all experts, the indexer's budget is more than a prompt, and eps is far above 0.
TINY = Tiny(
    "tiny-qwen4_exp",
    lambda config: new_model(**config),
    {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "vocab_size": 40,
        "layer_types": ["linear_attention", "indexed_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 3,
        "linear_value_head_dim": 4,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0],
        },
        "rms_norm_eps": 0.1,
        "num_experts": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 4,
        "shared_expert_intermediate_size": 4,
        "hc_count": 2,
        "hc_lowrank": 3,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 6,
        "indexer_budget": 128,
        "indexer_compress_ratio": 2,
    },
    {"embed_tokens": fresh(0.5), r"experts\.(gate_up|down)_proj": by_last_axis, "A_log": slow},
)  # fmt: skip

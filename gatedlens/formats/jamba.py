"""Jamba's models of transformers: what their configs may say, and a small one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gatedlens.formats.qwen3_next import by_last_axis
from gatedlens.model import fields
from gatedlens.model.fields import COUNT, EPS, FLAG, POSITIVE, SIZE, layers_of, one_of
from gatedlens.model.tiny import Tiny, fresh

FIELDS = {
    **fields.TRANSFORMERS,
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": layers_of(8),
    "num_attention_heads": SIZE,
    "num_key_value_heads": SIZE.or_null(),
    "hidden_act": one_of("silu", "swish"),
    "rms_norm_eps": EPS,
    "attn_layer_period": SIZE,
    "attn_layer_offset": COUNT,
    "expert_layer_period": SIZE,
    "expert_layer_offset": COUNT,
    "num_experts": SIZE,
    "num_experts_per_tok": SIZE,
    "mamba_d_state": SIZE,
    "mamba_d_conv": SIZE,
    "mamba_expand": POSITIVE,
    "mamba_dt_rank": SIZE | one_of("auto"),
    "mamba_conv_bias": FLAG,
    "mamba_proj_bias": FLAG,
}


def new_model(**config: Any) -> nn.Module:
    """A JambaForCausalLM of this config, without special tokens."""
    from transformers import JambaConfig, JambaForCausalLM

    special = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    model: nn.Module = JambaForCausalLM(JambaConfig(**(special | config)))
    return model


def steps(start: Tensor, noise: Tensor) -> Tensor:
    """dt_proj's bias with time steps around 0.2, as a trained model has them."""
    return -1.5 + 0.5 * noise


# A Mamba with an MLP, an attention with experts; each token goes to all experts, so that the logits change smoothly.
TINY = Tiny(
    "tiny-jamba",
    lambda config: new_model(**config),
    {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "vocab_size": 40,
        "intermediate_size": 5,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 2,
        "num_experts_per_tok": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "mamba_d_state": 4,
        "mamba_dt_rank": 3,
    },
    {"embed_tokens": fresh(0.3), r"experts\.(gate_up|down)_proj": by_last_axis, r"dt_proj\.bias": steps},
)

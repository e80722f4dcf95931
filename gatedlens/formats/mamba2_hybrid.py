"""The hybrids of transformers around Mamba-2: what their configs may say, and a small one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gatedlens.formats.qwen3_next import by_last_axis
from gatedlens.formats.transformers_config import LIMIT
from gatedlens.model import fields
from gatedlens.model.fields import COUNT, EPS, FLAG, NUMBER, POSITIVE, SIZE, THETA, layers_of, listed, one_of, table
from gatedlens.model.tiny import Tiny, fresh

ACT = one_of("silu", "swish")
LAYER = one_of("linear_attention", "full_attention", "moe", "mlp", "hybrid", "mamba", "attention")
FIELDS = {
    **fields.TRANSFORMERS,
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": layers_of(4),
    "num_attention_heads": SIZE,
    "num_key_value_heads": SIZE.or_null(),
    "head_dim": SIZE.or_null(),
    "hidden_act": ACT | one_of("gelu"),
    "rms_norm_eps": EPS,
    "rope_parameters": table(rope_theta=THETA).or_null(),
    "attention_bias": FLAG,
    "mlp_bias": FLAG,
    "time_step_limit": LIMIT.or_null(),
    # Bamba, Granite-4-H, Falcon-H1
    "attn_layer_indices": listed(COUNT).or_null(),
    "layer_types": listed(LAYER).or_null(),
    "mamba_n_heads": SIZE,
    "mamba_d_head": SIZE | one_of("auto"),
    "mamba_n_groups": SIZE,
    "mamba_d_state": SIZE,
    "mamba_d_conv": SIZE,
    "mamba_expand": POSITIVE,
    "mamba_d_ssm": SIZE.or_null(),
    "mamba_conv_bias": FLAG,
    "mamba_proj_bias": FLAG,
    "mamba_rms_norm": FLAG,
    "mamba_norm_before_gate": FLAG,
    "projectors_bias": FLAG,
    "num_local_experts": COUNT,
    "num_experts_per_tok": COUNT,
    "shared_intermediate_size": SIZE,
    "position_embedding_type": one_of("rope", "nope").or_null(),
    "embedding_multiplier": NUMBER,
    "residual_multiplier": NUMBER,
    "attention_multiplier": NUMBER,
    "logits_scaling": POSITIVE,
    "lm_head_multiplier": NUMBER,
    "mlp_multipliers": listed(NUMBER, 2).or_null(),
    "ssm_multipliers": listed(NUMBER, 5).or_null(),
    "key_multiplier": NUMBER,
    "attention_in_multiplier": NUMBER,
    "attention_out_multiplier": NUMBER,
    "ssm_in_multiplier": NUMBER,
    "ssm_out_multiplier": NUMBER,
    # Zamba2
    "attention_head_dim": SIZE,
    "attention_hidden_size": SIZE,
    "n_mamba_heads": SIZE,
    "mamba_ngroups": SIZE,
    "num_mem_blocks": SIZE,
    "use_shared_attention_adapter": FLAG,
    "adapter_rank": SIZE,
    "use_mem_rope": FLAG,
    "add_bias_linear": FLAG,
    # Nemotron-H
    "layers_block_type": replace(listed(LAYER, 1).or_null(), layer_tensors=2),
    "mamba_num_heads": SIZE,
    "mamba_head_dim": SIZE,
    "mamba_hidden_act": ACT,
    "mlp_hidden_act": one_of("relu2"),
    "ssm_state_size": SIZE,
    "n_groups": SIZE,
    "conv_kernel": SIZE,
    "time_step_min": NUMBER,
    "layer_norm_epsilon": EPS,
    "use_bias": FLAG,
    "use_conv_bias": FLAG,
    "n_routed_experts": SIZE,
    "moe_intermediate_size": SIZE,
    "moe_shared_expert_intermediate_size": SIZE,
    "moe_latent_size": SIZE.or_null(),
    "n_group": SIZE,
    "topk_group": SIZE,
    "norm_topk_prob": FLAG,
    "routed_scaling_factor": POSITIVE,
}


def new_granite(**config: Any) -> nn.Module:
    """A GraniteMoeHybridForCausalLM of this config, without special tokens."""
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    special = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    model: nn.Module = GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(**(special | config)))
    return model


def steps(start: Tensor, noise: Tensor) -> Tensor:
    """dt_bias with time steps around 0.1 to 1, as a trained model has them."""
    return torch.linspace(-2.0, 0.5, len(noise)) + 0.3 * noise


# A Mamba-2 and an attention, each with experts; each token goes to all experts, so that the logits change smoothly.
TINY = Tiny(
    "tiny-mamba2_hybrid",
    lambda config: new_granite(**config),
    {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "vocab_size": 40,
        "intermediate_size": 4,
        "shared_intermediate_size": 6,
        "num_local_experts": 2,
        "num_experts_per_tok": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "mamba_n_heads": 4,
        "mamba_d_state": 3,
        "mamba_n_groups": 2,
        "embedding_multiplier": 1.5,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.4,
        "logits_scaling": 2.0,
        "position_embedding_type": "rope",
    },
    {"embed_tokens": fresh(0.3), r"experts\.(gate_up|down)_proj": by_last_axis, "dt_bias": steps},
)

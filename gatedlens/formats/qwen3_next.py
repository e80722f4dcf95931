"""Qwen3-Next's and Qwen3.5's models of transformers: a small one of each."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gatedlens.model.tiny import Tiny, fresh


def new_model(**config: Any) -> nn.Module:
    """A Qwen3NextForCausalLM of this config, without special tokens."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    special = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    model: nn.Module = Qwen3NextForCausalLM(Qwen3NextConfig(**(special | config)))
    return model


def by_last_axis(start: Tensor, noise: Tensor) -> Tensor:
    """Noise of variance 1 / (how many numbers an output is summed over): the experts' matrices are stacked."""
    return noise * noise.shape[-1] ** -0.5


def slow(start: Tensor, noise: Tensor) -> Tensor:
    """log A around -1: a step keeps about half of the state."""
    return -1 + 0.3 * noise


# A delta net with an MLP, an attention with experts. Its logits change smoothly, as integrals and differences of them ask: each
# token goes to all experts, and eps is far above 0 (the first scan of a row is q . k times u, normed: with no eps it jumps where
# q . k changes its sign).
TINY = Tiny(
    "tiny-qwen3_next",
    lambda config: new_model(**config),
    {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "vocab_size": 40,
        "intermediate_size": 10,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 3,
        "linear_value_head_dim": 5,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "mlp_only_layers": [0],
        "rms_norm_eps": 0.1,
        "num_experts": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 4,
        "shared_expert_intermediate_size": 4,
    },
    {"embed_tokens": fresh(0.3), r"experts\.(gate_up|down)_proj": by_last_axis, "A_log": slow},
)

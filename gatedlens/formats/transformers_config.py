"""Configs of transformers: what each may say of an architecture, and how a config of any maker is read by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gatedlens.model import fields
from gatedlens.model.fields import (
    COUNT,
    EPS,
    FLAG,
    INTEGER,
    NOT_NEGATIVE,
    NUMBER,
    POSITIVE,
    SHARE,
    SIZE,
    TEXT,
    THETA,
    Field,
    layers_of,
    listed,
    one_of,
    table,
)

MAMBA = {
    **fields.TRANSFORMERS,
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "num_hidden_layers": layers_of(9),
    "state_size": SIZE,
    "conv_kernel": SIZE,
    "expand": POSITIVE,
    "time_step_rank": SIZE | one_of("auto"),
    "layer_norm_epsilon": EPS,
    "mixer_rms_eps": EPS,
    "hidden_act": TEXT,
    "residual_in_fp32": FLAG,
    "use_bias": FLAG,
    "use_conv_bias": FLAG,
}


def _limit(v: Any) -> bool:
    """Two numbers, low and high; transformers writes infinity as an object, mamba-ssm as Infinity."""
    return isinstance(v, list | tuple) and len(v) == 2 and read_limit(v) is not None


def read_limit(v: Any) -> tuple[float, float] | None:
    """(low, high) of a time_step_limit or dt_limit."""
    numbers: list[Any] = [x.get("__float__") if isinstance(x, Mapping) else x for x in v]
    try:
        low, high = (float(x) for x in numbers if not isinstance(x, bool))
    except (TypeError, ValueError):
        return None
    return (low, high) if 0 <= low <= high else None


LIMIT = Field("two numbers, 0 <= low <= high (high may be infinite)", _limit)


MAMBA2 = {
    **fields.TRANSFORMERS,
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "num_hidden_layers": layers_of(9),
    "state_size": SIZE,
    "conv_kernel": SIZE,
    "expand": POSITIVE,
    "num_heads": SIZE,
    "head_dim": SIZE,
    "n_groups": SIZE,
    "time_step_rank": SIZE | one_of("auto"),
    "time_step_limit": LIMIT,
    "layer_norm_epsilon": EPS,
    "hidden_act": TEXT,
    "residual_in_fp32": FLAG,
    "use_bias": FLAG,
    "use_conv_bias": FLAG,
    "chunk_size": SIZE,
}
KINDS = listed(one_of("recurrent", "attention"), low=1)
RECURRENT_GEMMA = {
    **fields.TRANSFORMERS,
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": layers_of(11),
    "num_attention_heads": SIZE,
    "num_key_value_heads": SIZE.or_null(),
    "head_dim": SIZE,
    "lru_width": SIZE.or_null(),
    "conv1d_width": SIZE,
    "block_types": KINDS,
    "attention_window_size": SIZE,
    "attention_bias": FLAG,
    "logits_soft_cap": NOT_NEGATIVE.or_null(),
    "rms_norm_eps": EPS,
    "hidden_activation": TEXT,
    "rope_theta": THETA,
    "partial_rotary_factor": SHARE,
    "rope_parameters": table(rope_type=TEXT, rope_theta=THETA, partial_rotary_factor=SHARE).or_null(),
}
LAYER_KINDS = listed(one_of("linear_attention", "full_attention"), low=1)
QWEN_LANGUAGE = {  # of the language models of every Qwen with gated delta nets
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "num_attention_heads": SIZE,
    "num_key_value_heads": SIZE,
    "head_dim": SIZE,
    "hidden_act": TEXT,
    "full_attention_interval": SIZE,
    "linear_conv_kernel_dim": SIZE,
    "linear_key_head_dim": SIZE,
    "linear_value_head_dim": SIZE,
    "linear_num_key_heads": SIZE,
    "linear_num_value_heads": SIZE,
    "rms_norm_eps": EPS,
    "attention_bias": FLAG,
    "rope_theta": THETA,
    "partial_rotary_factor": SHARE,
    "rope_parameters": table(rope_type=TEXT, rope_theta=THETA, partial_rotary_factor=SHARE).or_null(),
    "num_experts_per_tok": SIZE,
    "norm_topk_prob": FLAG,
    "moe_intermediate_size": SIZE,
    "shared_expert_intermediate_size": SIZE,
    "tie_word_embeddings": FLAG,
}
_QWEN = {  # of the language models of Qwen3-Next and Qwen3.5
    **QWEN_LANGUAGE,
    "intermediate_size": SIZE.or_null(),
    "num_hidden_layers": layers_of(11),
    "layer_types": LAYER_KINDS.or_null(),
    "decoder_sparse_step": SIZE,
    "mlp_only_layers": listed(COUNT).or_null(),
    "num_experts": COUNT,
}
QWEN3_NEXT = {
    **fields.TRANSFORMERS,
    **_QWEN,
    "text_config": table(**_QWEN),
}  # the table: inside a model of images and text
KIMI_LINEAR = {
    **fields.TRANSFORMERS,
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": layers_of(20),
    "num_attention_heads": SIZE,
    "num_key_value_heads": SIZE,
    "q_lora_rank": SIZE.or_null(),
    "kv_lora_rank": SIZE,
    "qk_nope_head_dim": SIZE,
    "qk_rope_head_dim": SIZE,
    "v_head_dim": SIZE,
    "linear_head_dim": SIZE,
    "linear_num_heads": SIZE,
    "linear_conv_kernel_dim": SIZE,
    "layer_types": listed(one_of("linear_attention", "full_attention"), low=1),
    "mlp_layer_types": listed(one_of("dense", "sparse"), low=1),
    "hidden_act": TEXT,
    "rms_norm_eps": EPS,
    "attention_bias": FLAG,
    "num_experts": SIZE,
    "num_experts_per_token": SIZE,
    "num_shared_experts": SIZE,
    "num_expert_group": SIZE,
    "topk_group": SIZE,
    "moe_intermediate_size": SIZE,
    "moe_renormalize": FLAG,
    "routed_scaling_factor": POSITIVE,
}
BAILING_HYBRID = {
    **{name: field for name, field in KIMI_LINEAR.items() if not name.startswith("linear_")},
    "num_key_value_heads": SIZE.or_null(),
    "head_dim": SIZE,
    "short_conv_kernel_size": SIZE,
    "layer_group_size": SIZE,
    "first_k_dense_replace": COUNT,
    "num_mtp_layers": COUNT,
    "num_nextn_predict_layers": COUNT,
    "kda_safe_gate": FLAG,
    "kda_lower_bound": NUMBER,
    "layer_types": listed(one_of("linear_attention", "full_attention"), low=1).or_null(),
    "mlp_layer_types": listed(one_of("dense", "sparse"), low=1).or_null(),
    "rope_theta": POSITIVE,
    "rope_parameters": table(rope_type=TEXT, rope_theta=POSITIVE).or_null(),
    "num_experts_per_tok": SIZE,
    "n_shared_experts": SIZE,
    "n_group": SIZE,
    "norm_topk_prob": FLAG,
}
RWKV = {
    **fields.TRANSFORMERS,
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "num_hidden_layers": layers_of(18),
    "attention_hidden_size": SIZE.or_null(),
    "intermediate_size": SIZE.or_null(),
    "context_length": SIZE,
    "layer_norm_epsilon": EPS,
    "rescale_every": INTEGER,
}


def is_hf(config: Any) -> bool:
    """Whether this is a transformers config (mamba-ssm's is a dataclass, a checkpoint's a dict)."""
    return any(base.__name__ in ("PretrainedConfig", "PreTrainedConfig") for base in type(config).__mro__)


def config_of(wrapped: Any) -> Mapping[str, Any]:
    """The config of a wrapped model by name, whoever made it."""
    config = wrapped.config
    if isinstance(config, Mapping):
        return config
    given: Mapping[str, Any] = config.to_dict() if is_hf(config) else vars(config)
    return given


def norm_eps(config: Mapping[str, Any]) -> float:
    """The eps of the norms by a config of transformers or of mamba-ssm."""
    return float(config.get("layer_norm_epsilon", config.get("norm_epsilon", 1e-5)))

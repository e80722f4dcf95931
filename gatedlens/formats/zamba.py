"""The first Zamba of transformers: what its config may say, and a small one."""

from __future__ import annotations

from typing import Any

from torch import nn

from gatedlens.formats.jamba import steps
from gatedlens.model import fields
from gatedlens.model.fields import COUNT, EPS, FLAG, POSITIVE, SIZE, layers_of, listed, one_of
from gatedlens.model.tiny import Tiny, around, fresh

FIELDS = {
    **fields.TRANSFORMERS,
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": layers_of(9),
    "num_attention_heads": SIZE,
    "num_key_value_heads": SIZE.or_null(),
    "attention_hidden_size": SIZE.or_null(),
    "attention_head_dim": SIZE.or_null(),
    "hidden_act": one_of("gelu"),
    "hidden_mamba_act": one_of("silu", "swish"),
    "rms_norm_eps": EPS,
    "attn_layer_period": SIZE,
    "attn_layer_offset": COUNT,
    "layers_block_type": listed(one_of("linear_attention", "hybrid", "mamba"), 1).or_null(),
    "n_mamba_heads": SIZE,
    "mamba_d_state": SIZE,
    "mamba_d_conv": SIZE,
    "mamba_expand": POSITIVE,
    "mamba_dt_rank": SIZE | one_of("auto"),
    "mamba_conv_bias": FLAG,
    "mamba_proj_bias": FLAG,
}


def new_model(**config: Any) -> nn.Module:
    """A ZambaForCausalLM of this config, without special tokens."""
    from transformers import ZambaConfig, ZambaForCausalLM

    special = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    model: nn.Module = ZambaForCausalLM(ZambaConfig(**(special | config)))
    return model


# Two layers of a Mamba, each of two heads, which select apart. (Layers behind a shared block mix tokens twice: see tests/hooks.)
TINY = Tiny(
    "tiny-zamba",
    lambda config: new_model(**config),
    {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "layers_block_type": ["linear_attention", "linear_attention"],
        "vocab_size": 40,
        "intermediate_size": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "n_mamba_heads": 2,
        "mamba_d_state": 4,
        "mamba_dt_rank": 3,
    },
    {"embed_tokens": fresh(0.3), "dt_proj_bias": steps, "(x|dt)_proj_weight": fresh(0.4), "A_log": around(0.3)},
)

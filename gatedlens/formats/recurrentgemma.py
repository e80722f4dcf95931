"""Griffin's checkpoints in recurrentgemma's layout (Google's): its arguments, and its parameters by transformers' names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from gatedlens.errors import CheckpointError
from gatedlens.formats.transformers_config import KINDS
from gatedlens.model import fields
from gatedlens.model.fields import COUNT, FLAG, NOT_NEGATIVE, SIZE
from gatedlens.model.layout import Layout
from gatedlens.model.tiny import Tiny, around, fresh

FIELDS = {
    "vocab_size": SIZE,
    "width": SIZE,
    "mlp_expanded_width": SIZE,
    "num_heads": SIZE,
    "lru_width": SIZE.or_null(),
    "block_types": replace(KINDS, layer_tensors=11),
    "embeddings_scale_by_sqrt_dim": FLAG,
    "attention_window_size": COUNT,
    "logits_soft_cap": NOT_NEGATIVE.or_null(),
}


def new_model(scaled: bool = True, **config: Any) -> Any:
    """A RecurrentGemmaForCausalLM of this config, without special tokens."""
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    special = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    # The default variance (0.01) leaves a small random model all but silent.
    model = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**(special | {"w_init_variance_scale": 1.0} | config)))
    if not scaled:
        model.model.normalizer.fill_(1.0)
    return model


RENAMES = {
    "blocks.": "model.layers.",
    "recurrent_block": "temporal_block",
    "attention_block": "temporal_block",
    "norm.scale": "norm.weight",
    "proj_final": "o_proj",
    "proj_q": "q_proj",
    "proj_k": "k_proj",
    "proj_v": "v_proj",
    "a_param": "recurrent_param",
    "input_gate.w": "input_gate_weight",
    "input_gate.b": "input_gate_bias",
    "a_gate.w": "recurrent_gate_weight",
    "a_gate.b": "recurrent_gate_bias",
    "conv_1d.w": "conv_1d.weight",
    "conv_1d.b": "conv_1d.bias",
    "ffw_down": "down_proj",
    "embedder.input_embedding": "model.embed_tokens.weight",
    "final_norm": "model.final_norm",
}
AXES = {
    "ffw_up.w": "2 d_model d_mlp",
    "ffw_up.b": "2 1 1 d_mlp",
    "conv_1d.w": "tap channel",
}  # of what changes its shape


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """recurrentgemma's parameters under transformers' names: `blocks.0.recurrent_block.conv_1d.w` [tap, channel] is
    `model.layers.0.temporal_block.conv_1d.weight` [channel, 1, tap], and so on."""
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        new = name
        for theirs, ours in RENAMES.items():
            new = new.replace(theirs, ours)
        axes = next((axes for end, axes in AXES.items() if name.endswith(end)), None)
        if axes is not None and (value.ndim != len(axes.split()) or ("2" in axes and value.shape[0] != 2)):
            raise CheckpointError(f"{name} has shape {list(value.shape)}; expected is [{axes.replace(' ', ', ')}].")
        if "ffw_up." in name and axes is not None:  # the gate, then what it gates
            gate, up = value.transpose(1, 2) if name.endswith("w") else value.flatten(1)
            stem, kind = new.rpartition("ffw_up")[0], "weight" if name.endswith("w") else "bias"
            found = {f"{stem}gate_proj.{kind}": gate.contiguous(), f"{stem}up_proj.{kind}": up.contiguous()}
        else:
            found = {new: value.t().unsqueeze(1).contiguous() if name.endswith("conv_1d.w") else value}
        if twice := set(found) & set(out):
            raise CheckpointError(f"{name} is one of two tensors that are {', '.join(sorted(twice))} here.")
        out |= found
    return out


class RecurrentGemma(Layout):
    """`RecurrentGemma()`: the arguments of recurrentgemma's GriffinConfig."""

    fields = FIELDS

    def knows(self, config: Mapping[str, Any]) -> bool:
        return {"width", "mlp_expanded_width", "num_heads", "block_types"} <= set(config) and "model_type" not in config

    def empty(self, config: dict[str, Any]) -> nn.Module:
        fields.check(config, FIELDS, "The config", required=("vocab_size",))
        wrapped: nn.Module = new_model(
            vocab_size=config["vocab_size"],
            hidden_size=config["width"],
            intermediate_size=2 * config["mlp_expanded_width"],
            num_attention_heads=config["num_heads"],
            num_key_value_heads=1,
            num_hidden_layers=len(config["block_types"]),
            lru_width=config.get("lru_width"),
            block_types=config["block_types"],
            attention_window_size=config.get("attention_window_size", 2048) + 1,  # theirs leaves out the own token
            logits_soft_cap=config.get("logits_soft_cap") or 0.0,
            scaled=config.get("embeddings_scale_by_sqrt_dim", True),
        )
        return wrapped

    def rename(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return renamed(state)


TINY = Tiny(  # blocks R R A; the matrices around transformers' own
    "tiny-griffin",
    lambda config: new_model(**config),
    {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "vocab_size": 40,
        "intermediate_size": 48,
        "lru_width": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "attention_window_size": 8,
    },
    {"embed_tokens": fresh(0.3), r"(proj|linear_\w+|conv_1d)\.weight|gate_(weight|bias)": around(0.1)},
)

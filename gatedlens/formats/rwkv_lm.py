"""RWKV-4's checkpoints in RWKV-LM's layout: its arguments, the names of its tensors, and what marks a later version."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gatedlens.errors import CheckpointError
from gatedlens.model import fields
from gatedlens.model.checkpoint import depth, shape_of
from gatedlens.model.fields import COUNT, INTEGER, SIZE, layers_of
from gatedlens.model.layout import Layout
from gatedlens.model.tiny import Tiny, by_fan_in, fresh

FIELDS = {
    "vocab_size": SIZE,
    "n_embd": SIZE,
    "n_layer": layers_of(18),
    "dim_att": COUNT.or_null(),  # 0: as RWKV-LM has it by default
    "dim_ffn": COUNT.or_null(),
    "ctx_len": SIZE,
    "rescale_layer": INTEGER,
}
MARKS = {"6": ("att.time_maa_",), "5": ("att.ln_x.", "att.time_faaaa", "att.gate.")}


def check_version(names: Iterable[str]) -> None:
    """CheckpointError for the tensors of a later RWKV, by names that RWKV-4 does not have."""
    for version, marks in MARKS.items():
        found = next((name for name in names if any(mark in name for mark in marks)), None)
        if found is not None:
            raise CheckpointError(
                f"This is RWKV-{version} (it has {found}), and no RWKV-4. Of later versions gatedlens reads RWKV-5.2, RWKV-6 and "
                "RWKV-7, from a .pth alone or a folder whose config names its model_type."
            )


def new_model(config: Mapping[str, Any]) -> nn.Module:
    """A RwkvForCausalLM without values: its own initialisation is slow, draws random numbers and divides by n_layer - 1."""
    from transformers import RwkvConfig, RwkvForCausalLM

    with torch.device("meta"):
        model: Any = RwkvForCausalLM(RwkvConfig(**config))
    model.to_empty(device=torch.get_default_device()).tie_weights()  # meta, for who asks for shapes alone
    module: nn.Module = model.eval()
    return module


NAMES = {"att": "attention", "ffn": "feed_forward", "ln0": "pre_ln", "emb": "embeddings"}
MIXES = {"time_mix_k": "time_mix_key", "time_mix_v": "time_mix_value", "time_mix_r": "time_mix_receptance"}


def renamed_key(name: str) -> str:
    """`renamed_key("blocks.0.att.time_mix_k")`: "rwkv.blocks.0.attention.time_mix_key"."""
    words = [NAMES.get(word, MIXES.get(word, word)) for word in name.split(".")]
    return ".".join(words if words[0] == "head" else ["rwkv", *words])


class RwkvLm(Layout):
    """`RwkvLm()`: RWKV-LM's arguments (n_embd, n_layer, vocab_size, and no model_type), or its .pth alone."""

    fields = FIELDS

    def knows(self, config: Mapping[str, Any]) -> bool:
        return {"n_embd", "n_layer", "vocab_size"} <= set(config) and "model_type" not in config

    def config_of_file(
        self, state: Mapping[str, Tensor], told: Mapping[str, Any], variant: str | None
    ) -> dict[str, Any] | None:
        """The arguments behind an official RWKV-4 .pth, read off its shapes; None if it is not one."""
        if "emb.weight" not in state or not any(name.startswith("blocks.") and ".att." in name for name in state):
            return None
        if "blocks.0.att.r_k" in state or "blocks.0.att.time_faaaa" in state:
            return None  # RWKV-7's: see rwkv7_fla.py; RWKV-5's or RWKV-6's: see rwkv6_lm.py
        check_version(state)
        vocab_size, width = shape_of(state, "emb.weight", 2)
        return {
            "vocab_size": vocab_size,
            "n_embd": width,
            "n_layer": depth(state, "blocks."),
            "dim_att": shape_of(state, "blocks.0.att.key.weight", 2)[0],
            "dim_ffn": shape_of(state, "blocks.0.ffn.key.weight", 2)[0],
        }

    def rename(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """`blocks.0.att.time_mix_k` is `rwkv.blocks.0.attention.time_mix_key`: official names to transformers'."""
        check_version(state)
        out: dict[str, Tensor] = {}
        for name, tensor in state.items():
            if renamed_key(name) in out:
                raise CheckpointError(f"{name} is one of two tensors that are {renamed_key(name)} here.")
            out[renamed_key(name)] = tensor
        return out

    def empty(self, config: dict[str, Any]) -> nn.Module:
        """transformers' model for official arguments; `rescale_layer` is RWKV-LM's 6 unless given (0 for none)."""
        if config.get("version", 4) not in (4, "4"):
            raise CheckpointError(f"The config says RWKV version {config['version']!r}; gatedlens supports RWKV-4.")
        fields.check(config, FIELDS, "The config")
        return new_model(
            {
                "vocab_size": config["vocab_size"],
                "hidden_size": config["n_embd"],
                "num_hidden_layers": config["n_layer"],
                "attention_hidden_size": config.get("dim_att") or None,
                "intermediate_size": config.get("dim_ffn") or None,
                "context_length": config.get("ctx_len", 1024),
                "rescale_every": config.get("rescale_layer", 6),
            }
        )


TINY = Tiny(  # halved after each layer; transformers' own values are nearly silent (zero matrices, constant time_first)
    "tiny-rwkv",
    new_model,
    {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "rescale_every": 1},
    {
        "time_decay": lambda start, noise: torch.linspace(-4, 1, noise.numel()) + 0.1 * noise,
        "time_mix": lambda start, noise: torch.sigmoid(noise),
        "bias": fresh(0.2),
        "ln": lambda start, noise: 1 + 0.2 * noise,
        "time_first|embeddings": fresh(1.0),
        "": by_fan_in(1.5),
    },
)

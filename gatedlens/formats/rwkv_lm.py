"""RWKV-4's checkpoints in RWKV-LM's layout: its arguments, the names of its tensors, and what marks a later version."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from gatedlens.errors import CheckpointError
from gatedlens.model.fields import COUNT, INTEGER, SIZE, layers_of

FIELDS = {
    "vocab_size": SIZE,
    "n_embd": SIZE,
    "n_layer": layers_of(18),
    "dim_att": COUNT.or_null(),  # 0: as RWKV-LM has it by default
    "dim_ffn": COUNT.or_null(),
    "ctx_len": SIZE,
    "rescale_layer": INTEGER,
}
MARKS = {"7": ("att.x_r", "att.r_k"), "6": ("att.time_maa_",), "5": ("att.ln_x.", "att.time_faaaa", "att.gate.")}


def check_version(names: Iterable[str]) -> None:
    """CheckpointError for the tensors of a later RWKV, by names that RWKV-4 does not have."""
    for version, marks in MARKS.items():
        found = next((name for name in names if any(mark in name for mark in marks)), None)
        if found is not None:
            raise CheckpointError(f"This is RWKV-{version} (it has {found}); gatedlens supports RWKV-4.")


def uninitialised(kind: Any, config: Any) -> nn.Module:
    """A model without values: transformers' initialisation is slow, draws random numbers and divides by n_layer - 1."""
    with torch.device("meta"):
        model = kind(config)
    model.to_empty(device=torch.get_default_device()).tie_weights()  # meta, for who asks for shapes alone
    return model.eval()


NAMES = {"att": "attention", "ffn": "feed_forward", "ln0": "pre_ln", "emb": "embeddings"}
MIXES = {"time_mix_k": "time_mix_key", "time_mix_v": "time_mix_value", "time_mix_r": "time_mix_receptance"}


def renamed_key(name: str) -> str:
    words = [NAMES.get(word, MIXES.get(word, word)) for word in name.split(".")]
    return ".".join(words if words[0] == "head" else ["rwkv", *words])

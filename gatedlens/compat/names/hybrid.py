"""What TransformerLens calls the points of hybrids of transformers."""

from __future__ import annotations

from gatedlens.address.point import block_aliases
from gatedlens.compat.names.transformer_lens import BLOCK, DT, MIXER, STATE

ALIASES = block_aliases(
    "TransformerLens",
    ("attn.hook_in", "ln1_attn.hook_out"),  # where attention stands beside a mixer; else
    ("attn.hook_in", "ln1.hook_out"),
    ("attn.hook_out", "hook_attn_out"),
    ("attn.hook_out", "hook_mixer_out"),
    *BLOCK,
    ("mlp.hook_in", "ln2.hook_out"),
    ("mlp.hook_out", "hook_mlp_out"),
    *MIXER,
    DT,
    *STATE,
)

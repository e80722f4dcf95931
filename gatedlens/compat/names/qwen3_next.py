"""What TransformerLens calls Qwen3-Next's points."""

from __future__ import annotations

from gatedlens.address.point import block_aliases
from gatedlens.compat.names.transformer_lens import BLOCK, DT, MIXER, STATE

ALIASES = block_aliases(
    "TransformerLens",
    *BLOCK,
    ("attn.hook_in", "ln1.hook_out"),
    ("attn.hook_out", "hook_mixer_out"),
    ("mlp.hook_in", "ln2.hook_out"),
    ("mlp.hook_out", "hook_mlp_out"),
    *MIXER,
    DT,
    *STATE,
)

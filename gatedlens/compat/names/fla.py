"""What TransformerLens would call the points of flash-linear-attention's models, by its names for recurrent mixers."""

from __future__ import annotations

from gatedlens.address.point import block_aliases
from gatedlens.compat.names.transformer_lens import BLOCK, MIXER, STATE

ALIASES = block_aliases(
    "TransformerLens",
    *BLOCK,
    ("attn.hook_in", "ln1.hook_out"),
    ("attn.hook_out", "hook_mixer_out"),
    ("mlp.hook_in", "ln2.hook_out"),
    ("mlp.hook_out", "hook_mlp_out"),
    *MIXER,
    *STATE,
)

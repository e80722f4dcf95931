"""What RWKV-LM and TransformerLens call RWKV-5's and RWKV-6's points."""

from __future__ import annotations

from gatedlens.address.point import block_aliases
from gatedlens.compat.names.transformer_lens import BLOCK

ALIASES = (
    *block_aliases(
        "RWKV-LM",
        ("mixer.hook_v", "mixer.hook_x"),
        ("mixer.hook_w", "mixer.hook_log_decay"),
        ("mixer.hook_g", "mixer.hook_gate"),
    ),
    *block_aliases(
        "TransformerLens",
        *BLOCK,
        ("mlp.hook_pre", "mlp.hook_k"),
        ("mlp.hook_post", "mlp.hook_k_act"),
    ),
)

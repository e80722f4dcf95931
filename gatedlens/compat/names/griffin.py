"""What TransformerLens calls Griffin's points."""

from __future__ import annotations

from gatedlens.address.point import block_aliases

ALIASES = block_aliases(
    "TransformerLens",
    ("hook_in", "hook_resid_pre"),
    ("hook_out", "hook_resid_post"),
    ("hook_attn_out", "hook_mixer_out"),
    ("attn.hook_in", "ln1.hook_out"),
    ("attn.hook_out", "hook_mixer_out"),
    ("mlp.hook_in", "ln2.hook_out"),
    ("mlp.hook_out", "hook_mlp_out"),
    ("mixer.hook_in", "ln1.hook_out"),
    ("mixer.hook_out", "hook_mixer_out"),
    ("mixer.hook_ssm_out", "hook_mixer_out"),
    ("mixer.hook_ssm_write", "mixer.hook_write"),
    ("mixer.hook_ssm_state", "mixer.hook_state"),
    ("mixer.out_proj.hook_in", "mixer.hook_gated"),
)

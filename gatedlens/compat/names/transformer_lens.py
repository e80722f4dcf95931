"""What TransformerLens calls the points that its SSM bridges have in common: (its name, ours), relative to a block."""

from __future__ import annotations

BLOCK = (
    ("hook_in", "hook_resid_pre"),
    ("hook_out", "hook_resid_post"),
    ("hook_attn_out", "hook_mixer_out"),
)
NORM = (
    ("norm.hook_out", "ln1.hook_out"),
    ("norm.hook_scale", "ln1.hook_scale"),
    ("norm.hook_normalized", "ln1.hook_normalized"),
)
MIXER = (
    ("mixer.hook_in", "ln1.hook_out"),
    ("mixer.hook_out", "hook_mixer_out"),
    ("mixer.hook_ssm_out", "hook_mixer_out"),
)
DT = ("mixer.hook_ssm_dt", "mixer.hook_dt")
STATE = (
    ("mixer.hook_ssm_write", "mixer.hook_write"),
    ("mixer.hook_ssm_state", "mixer.hook_state"),
    ("mixer.out_proj.hook_in", "mixer.hook_gated"),
)

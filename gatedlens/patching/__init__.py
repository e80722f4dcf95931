"""Activation patching: put what the clean run had into the corrupted run, one place at a time, and measure.

    _, clean_cache = model.run_with_cache(clean)
    found = gl.patching.get_act_patch_resid_pre(model, corrupted, clean_cache, metric, normalised=True)   # layer pos
    found.top(3); found.plot(); found.save("resid-pre.json")
    gl.patching.sweep(model, corrupted, clean_cache, metric, "blocks.*.mixer.hook_dt", ("layer", "channel"))

TransformerLens's functions with its arguments and direction, on any hook point and any of its axes, in batches, running
only what a patch can change. Each gives a Result, which stands where TransformerLens's tensor did.
"""

from gatedlens.patching.measuring import Options
from gatedlens.patching.sweeping import carried, copied, sweep
from gatedlens.patching.transformer_lens import (
    generic_activation_patch,
    get_act_patch_attn_head_all_pos_every,
    get_act_patch_attn_head_by_pos_every,
    get_act_patch_attn_head_out_all_pos,
    get_act_patch_attn_head_out_by_pos,
    get_act_patch_attn_out,
    get_act_patch_block_every,
    get_act_patch_by_channel_group,
    get_act_patch_by_tap,
    get_act_patch_conv,
    get_act_patch_gate,
    get_act_patch_gated_head_all_pos,
    get_act_patch_gated_head_by_pos,
    get_act_patch_mixer_out,
    get_act_patch_mlp_out,
    get_act_patch_resid_mid,
    get_act_patch_resid_post,
    get_act_patch_resid_pre,
    get_act_patch_scan,
    get_act_patch_scan_head_all_pos,
    get_act_patch_scan_head_by_pos,
    get_act_patch_state,
    get_act_patch_state_head_all_pos,
    get_act_patch_state_head_by_pos,
    get_act_patch_y_head_all_pos,
    get_act_patch_y_head_by_pos,
)
from gatedlens.runs.cells import Cell, Plan, Put
from gatedlens.runs.stopping import Interrupted, NotSaved

__all__ = [
    "Cell",
    "Interrupted",
    "NotSaved",
    "Options",
    "Plan",
    "Put",
    "carried",
    "copied",
    "generic_activation_patch",
    "get_act_patch_attn_head_all_pos_every",
    "get_act_patch_attn_head_by_pos_every",
    "get_act_patch_attn_head_out_all_pos",
    "get_act_patch_attn_head_out_by_pos",
    "get_act_patch_attn_out",
    "get_act_patch_block_every",
    "get_act_patch_by_channel_group",
    "get_act_patch_by_tap",
    "get_act_patch_conv",
    "get_act_patch_gate",
    "get_act_patch_gated_head_all_pos",
    "get_act_patch_gated_head_by_pos",
    "get_act_patch_mixer_out",
    "get_act_patch_mlp_out",
    "get_act_patch_resid_mid",
    "get_act_patch_resid_post",
    "get_act_patch_resid_pre",
    "get_act_patch_scan",
    "get_act_patch_scan_head_all_pos",
    "get_act_patch_scan_head_by_pos",
    "get_act_patch_state",
    "get_act_patch_state_head_all_pos",
    "get_act_patch_state_head_by_pos",
    "get_act_patch_y_head_all_pos",
    "get_act_patch_y_head_by_pos",
    "sweep",
]

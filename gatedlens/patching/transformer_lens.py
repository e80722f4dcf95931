"""The family of get_act_patch_*: TransformerLens's functions for our points, each a row of data for `sweep`.

    get_act_patch_gate(model, corrupted_tokens, clean_cache, metric)       # layer pos
    get_act_patch_by_tap(model, corrupted_tokens, clean_cache, metric)     # layer tap
    get_act_patch_resid_pre(..., normalised=True, results="sweep.json")    # options of every sweep: `Options`

Arguments and direction are TransformerLens's: what the clean run had is put into the corrupted one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gatedlens.options import checked
from gatedlens.patching.sweeping import Edits, carried, copied, sweep
from gatedlens.result.result import Result


@dataclass(frozen=True)
class Kind:
    """`get_act_patch_gate = Kind("blocks.*.mixer.*hook_gate")`: a kind of sweep, called as TransformerLens's are.

    points, axes and edits are those of `sweep`. The layers on the axis are those that have the point.
    """

    points: str
    axes: tuple[str, ...] = ("layer", "pos")
    edits: Edits = copied

    def __call__(
        self, model: Any, corrupted_tokens: Any, clean_cache: Any, patching_metric: Any, **options: Any
    ) -> Result:
        options = {"axes": self.axes, "edits": self.edits, **options}
        return sweep(model, corrupted_tokens, clean_cache, patching_metric, self.points, **options)


get_act_patch_resid_pre = Kind("blocks.*.hook_resid_pre")
get_act_patch_resid_mid = Kind("blocks.*.hook_resid_mid")  # between mixer and MLP, where there is one
get_act_patch_resid_post = Kind("blocks.*.hook_resid_post")
get_act_patch_mixer_out = Kind("blocks.*.hook_mixer_out")
get_act_patch_attn_out = get_act_patch_mixer_out  # TransformerLens's word for what the token mixing writes
get_act_patch_mlp_out = Kind("blocks.*.hook_mlp_out")
get_act_patch_conv = Kind("blocks.*.mixer.*hook_conv")
get_act_patch_gate = Kind("blocks.*.mixer.*hook_gate")
get_act_patch_scan = Kind("blocks.*.mixer.*hook_scan")
get_act_patch_state = Kind("blocks.*.mixer.*hook_state", edits=carried)  # what later positions go on from


@checked
def get_act_patch_by_tap(
    model: Any,
    corrupted_tokens: Any,
    clean_cache: Any,
    patching_metric: Any,
    axes: Sequence[str] = ("layer", "tap"),
    **options: Any,
) -> Result:
    """What each tap of the convolution contributes (tap -1, the last, reads the token itself); its clean cache needs
    the lazy hook_conv_taps. axes may hold "pos" and "channel" too."""
    points = "blocks.*.mixer.*hook_conv_taps"
    return sweep(model, corrupted_tokens, clean_cache, patching_metric, points, axes, **options)


@checked
def get_act_patch_by_channel_group(
    model: Any,
    corrupted_tokens: Any,
    clean_cache: Any,
    patching_metric: Any,
    n_groups: int = 8,
    points: str = "blocks.*.mixer.hook_gated",
    axes: Sequence[str] = ("layer", "channel"),
    **options: Any,
) -> Result:
    """Channels in `n_groups` equal groups, all positions at once: of what the output projection reads, or of `points`.

    `groups={"channel": {"slow": [...], "fast": [...]}}` takes groups of your own; axes may hold "pos" too.
    """
    groups = options.pop("groups", {"channel": n_groups})
    return sweep(model, corrupted_tokens, clean_cache, patching_metric, points, axes, groups=groups, **options)


def get_act_patch_block_every(
    model: Any, corrupted_tokens: Any, clean_cache: Any, patching_metric: Any, **options: Any
) -> Result:
    """[point layer pos]: the residual stream before each block, what its mixer writes, and its MLP where it has one."""
    words = ("hook_resid_pre", "hook_mixer_out", "hook_mlp_out")
    points = [f"blocks.*.{word}" for word in words if f"blocks.0.{word}" in model.names]
    return sweep(model, corrupted_tokens, clean_cache, patching_metric, points, **options)

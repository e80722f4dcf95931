"""TransformerLens's patching functions for our points: the family of get_act_patch_*, and generic_activation_patch.

    get_act_patch_gate(model, corrupted_tokens, clean_cache, metric)       # layer pos
    get_act_patch_by_tap(model, corrupted_tokens, clean_cache, metric)     # layer tap
    get_act_patch_attn_head_out_all_pos(model, corrupted_tokens, clean_cache, metric)      # layer head
    get_act_patch_resid_pre(..., normalised=True, results="sweep.json")    # options of every sweep: `Options`
    generic_activation_patch(model, corrupted_tokens, clean_cache, metric, patch_setter, "resid_pre", ("layer", "pos"))

Arguments and direction are TransformerLens's: what the clean run had is put into the corrupted one. Each of the family is a row
of data for `sweep`, which knows the position that it patches and starts its runs there. In generic_activation_patch a setter of
the user's decides what is patched, so its runs start at the patched layer and at the first position: it is slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, overload

from gatedlens.errors import InputError, PointError, did_you_mean
from gatedlens.foreign import DataFrame
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Input
from gatedlens.options import checked, taking
from gatedlens.patching.measuring import Options, measure_cells
from gatedlens.patching.sweeping import Edits, carried, copied, sweep
from gatedlens.result.result import Result
from gatedlens.runs import inputs
from gatedlens.runs.baseline import Baseline
from gatedlens.runs.cells import Call, Cell, Plan
from gatedlens.runs.meter import Metrics
from gatedlens.runs.pair import Cached, Clean

HEADS, POSITIONS = ("head", "head_index"), ("pos", "src_pos", "dest_pos")  # TransformerLens's words for axes


@overload
def generic_activation_patch(
    model: HookedModel,
    corrupted_tokens: Input,
    clean_cache: Cached,
    patching_metric: Metrics,
    patch_setter: Callable[..., Any],
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index_df: DataFrame | None = None,
    return_index_df: Literal[False] = False,
    **options: Any,
) -> Result: ...
@overload
def generic_activation_patch(
    model: HookedModel,
    corrupted_tokens: Input,
    clean_cache: Cached,
    patching_metric: Metrics,
    patch_setter: Callable[..., Any],
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index_df: DataFrame | None = None,
    *,
    return_index_df: Literal[True],
    **options: Any,
) -> tuple[Result, DataFrame]: ...
@taking(Options)
@checked
def generic_activation_patch(
    model: HookedModel,
    corrupted_tokens: Input,
    clean_cache: Cached,
    patching_metric: Metrics,
    patch_setter: Callable[..., Any],
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index_df: DataFrame | None = None,
    return_index_df: bool = False,
    **options: Any,
) -> Result | tuple[Result, DataFrame]:
    """`generic_activation_patch(model, tokens, clean_cache, metric, patch_setter, "resid_pre", ("layer", "pos"))`: a Result.

    The metric of each index, `patch_setter(corrupted_activation, index, clean_activation)` doing the patch.

    activation_name: a point's word ("resid_pre", "gate") or its name within the block ("mixer.hook_gate"); the first
    entry of an index is its layer. index_axis_names: every combination along these axes ("layer" first, then pos, head,
    src_pos, dest_pos or any axis of the point); or index_df, a data frame with one index a row: the Result then has the
    one axis "patch". The setter gets both activations with each row's real positions in front, so that position k of a
    padded batch is each row's own. options: those of every sweep, `Options`. Returns a Result, with return_index_df a
    pair with the data frame.

    InputError for both or neither of index_axis_names and index_df, and an index whose first axis is not the layer; PointError
    for a point or an axis that does not exist; HookError for a setter that returns no tensor of the activation's shape.
    """
    chosen = Options.of(options)
    if (index_axis_names is None) == (index_df is None):
        raise InputError("generic_activation_patch takes index_axis_names or index_df: give one of them, not both.")
    run = chosen.baseline(model, corrupted_tokens)
    clean = Clean(clean_cache, run)
    names = list(index_df.columns) if index_df is not None else list(index_axis_names or ())
    if not names or names[0] != "layer":
        raise InputError(f"The first axis of an index is the layer; these are {names}.")
    if index_df is None:
        sizes = [_size(run, activation_name, axis) for axis in names]
        indices = [list(index) for index in product(*map(range, sizes))]
    else:
        sizes, indices = [len(index_df)], [[int(i) for i in row] for row in index_df.to_numpy().tolist()]
    cells = []
    for place, index in enumerate(indices):
        point = _point(model, activation_name, index[0])
        where = tuple(index) if index_df is None else (place,)
        cells.append(Cell(where, (Call(point, patch_setter, index, clean[point]),)))
    if index_df is None:
        axes = tuple(names)
        labels = {axis: inputs.labels(model, run.batch) for axis in names if axis in POSITIONS}
    else:
        axes = ("patch",)
        labels = {"patch": [", ".join(f"{a} {i}" for a, i in zip(names, index, strict=True)) for index in indices]}
    plan = Plan(axes, labels, tuple(sizes), tuple(cells), f"Patching {activation_name}, clean into corrupted")
    facts = {"model": model.cfg.model_name, "points": activation_name, "batch": run.rows}
    found = measure_cells(run, clean, plan, patching_metric, chosen, facts)
    return (found, _frame(names, indices) if index_df is None else index_df) if return_index_df else found


def _frame(names: list[str], indices: list[list[int]]) -> DataFrame:
    import pandas

    return pandas.DataFrame(indices, columns=names)


def _point(model: HookedModel, name: str, layer: int) -> str:
    if "." in name:
        return str(model.names.find(f"blocks.{layer}.{name}").name)
    return str(model.names.short(name, layer).name)


def _size(run: Baseline, name: str, axis: str) -> int:
    """How many entries an index axis has."""
    cfg, point = run.model.cfg, run.model.names[_point(run.model, name, 0)]
    if axis == "layer":
        return int(cfg.n_layers)
    if axis in POSITIONS:
        return run.longest
    part = "head" if axis in HEADS else axis
    if part == "head" and not point.reaches(part, cfg.sizes):
        raise run.model.names.lacking(_point(run.model, name, 0), part, cfg.sizes)
    if not point.reaches(part, cfg.sizes) or part not in cfg.sizes:
        known = ["layer", *POSITIONS, *HEADS, *(dim for dim in point.dims if dim in cfg.sizes)]
        raise PointError(
            f"{point.name} has no axis {axis!r}; an index may have {', '.join(known)}.{did_you_mean(axis, known)}"
        )
    return int(cfg.sizes[part])


@dataclass(frozen=True)
class Kind:
    """`get_act_patch_gate = Kind("blocks.*.mixer.*hook_gate")`: a kind of sweep, called as TransformerLens's are.

    points, axes and edits are those of `sweep`. The layers on the axis are those that have the point.
    """

    points: str
    axes: tuple[str, ...] = ("layer", "pos")
    edits: Edits = copied

    @taking(Options)
    def __call__(
        self, model: HookedModel, corrupted_tokens: Input, clean_cache: Cached, patching_metric: Metrics, **options: Any
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

# By head, as TransformerLens's get_act_patch_attn_head_*: all positions of a head at once, or each by itself.
ALL_POS, BY_POS = ("layer", "head"), ("layer", "pos", "head")
get_act_patch_scan_head_all_pos = Kind("blocks.*.mixer.*hook_scan", ALL_POS)
get_act_patch_scan_head_by_pos = Kind("blocks.*.mixer.*hook_scan", BY_POS)
get_act_patch_y_head_all_pos = Kind("blocks.*.mixer.*hook_y", ALL_POS)
get_act_patch_y_head_by_pos = Kind("blocks.*.mixer.*hook_y", BY_POS)
get_act_patch_gated_head_all_pos = Kind("blocks.*.mixer.hook_gated", ALL_POS)
get_act_patch_gated_head_by_pos = Kind("blocks.*.mixer.hook_gated", BY_POS)
get_act_patch_state_head_all_pos = Kind("blocks.*.mixer.*hook_state", ALL_POS, carried)
get_act_patch_state_head_by_pos = Kind("blocks.*.mixer.*hook_state", BY_POS, carried)

# What a head takes in, how long it keeps it, what it reads, what lets it through and what it gives to the output projection;
# of an attention its query, its pattern and what it gives.
OF_A_HEAD = ("hook_u", "hook_dt", "hook_scan", "hook_gate", "hook_gated", "hook_q", "hook_pattern", "hook_z")


@taking(Options)
@checked
def get_act_patch_attn_head_out_all_pos(
    model: HookedModel, corrupted_tokens: Input, clean_cache: Cached, patching_metric: Metrics, **options: Any
) -> Result:
    """`get_act_patch_attn_head_out_all_pos(model, corrupted_tokens, clean_cache, metric)`: a Result [layer, head].

    What each head gives to its layer's output projection, all positions at once: hook_gated of Mamba-2, hook_z of an attention
    layer. Layers without heads are not on the axis. options and errors: as of `gl.patching.sweep`; PointError too for a model
    without heads.
    """
    return sweep(
        model,
        corrupted_tokens,
        clean_cache,
        patching_metric,
        _head_outputs(model),
        options.pop("axes", ALL_POS),
        **options,
    )


@taking(Options)
@checked
def get_act_patch_attn_head_out_by_pos(
    model: HookedModel, corrupted_tokens: Input, clean_cache: Cached, patching_metric: Metrics, **options: Any
) -> Result:
    """`get_act_patch_attn_head_out_by_pos(model, corrupted_tokens, clean_cache, metric)`: a Result [layer, pos, head].

    As `get_act_patch_attn_head_out_all_pos`, each position by itself.
    """
    options = {"axes": BY_POS, **options}
    return get_act_patch_attn_head_out_all_pos(model, corrupted_tokens, clean_cache, patching_metric, **options)


@taking(Options)
@checked
def get_act_patch_attn_head_all_pos_every(
    model: HookedModel, corrupted_tokens: Input, clean_cache: Cached, patching_metric: Metrics, **options: Any
) -> Result:
    """`get_act_patch_attn_head_all_pos_every(model, corrupted_tokens, clean_cache, metric)`: a Result [point, layer, head].

    The points of a head: of Mamba-2 what it takes in (u), how fast it forgets (dt), what it reads (scan), its gate and what it
    gives (gated); of an attention layer q, pattern and z. Not a number where a layer lacks the point. options and errors: as of
    `get_act_patch_attn_head_out_all_pos`.
    """
    words = dict.fromkeys(name.rpartition(".")[0] for name in _head_outputs(model))
    sizes, rows = model.cfg.sizes, model.names.points
    points = [f"{part}.{leaf}" for part in words for leaf in OF_A_HEAD if f"{part}.{leaf}" in rows]
    points = [name for name in points if rows[name].reaches("head", sizes)]
    return sweep(model, corrupted_tokens, clean_cache, patching_metric, points, options.pop("axes", ALL_POS), **options)


@taking(Options)
@checked
def get_act_patch_attn_head_by_pos_every(
    model: HookedModel, corrupted_tokens: Input, clean_cache: Cached, patching_metric: Metrics, **options: Any
) -> Result:
    """`get_act_patch_attn_head_by_pos_every(model, corrupted_tokens, clean_cache, metric)`: a Result [point, layer, pos, head].

    As `get_act_patch_attn_head_all_pos_every`, each position by itself.
    """
    options = {"axes": BY_POS, **options}
    return get_act_patch_attn_head_all_pos_every(model, corrupted_tokens, clean_cache, patching_metric, **options)


def _head_outputs(model: HookedModel) -> list[str]:
    """The output points of the layers that have heads, by their full names."""
    names = [mixer.output_name for mixer in model.mixers.values()]
    found = [name for name in names if model.names.points[name].reaches("head", model.cfg.sizes)]
    if not found:
        raise model.names.lacking(names[0], "head", model.cfg.sizes)
    return found


@taking(Options)
@checked
def get_act_patch_by_tap(
    model: HookedModel,
    corrupted_tokens: Input,
    clean_cache: Cached,
    patching_metric: Metrics,
    axes: Sequence[str] = ("layer", "tap"),
    **options: Any,
) -> Result:
    """`get_act_patch_by_tap(model, corrupted_tokens, clean_cache, metric)`: what each tap of the convolution contributes.

    A Result [layer, tap]; tap -1, the last, reads the token itself. axes may hold "pos" and "channel" too. options: see
    `Options`. PointError for a clean cache without hook_conv_taps, which is lazy: name it when you cache the clean run.
    """
    points = "blocks.*.mixer.*hook_conv_taps"
    return sweep(model, corrupted_tokens, clean_cache, patching_metric, points, axes, **options)


@taking(Options)
@checked
def get_act_patch_by_channel_group(
    model: HookedModel,
    corrupted_tokens: Input,
    clean_cache: Cached,
    patching_metric: Metrics,
    n_groups: int = 8,
    points: str = "blocks.*.mixer.hook_gated",
    axes: Sequence[str] = ("layer", "channel"),
    **options: Any,
) -> Result:
    """`get_act_patch_by_channel_group(model, corrupted_tokens, clean_cache, metric, n_groups=8)`: channels in equal groups.

    A Result [layer, channel], all positions at once: of what the output projection reads, or of `points`.
    `groups={"channel": {"slow": [...], "fast": [...]}}` takes groups of your own; axes may hold "pos" too. options: see
    `Options`. InputError for more groups than channels; PointError for points that do not exist or lack an axis.
    """
    groups = options.pop("groups", {"channel": n_groups})
    return sweep(model, corrupted_tokens, clean_cache, patching_metric, points, axes, groups=groups, **options)


@taking(Options)
@checked
def get_act_patch_block_every(
    model: HookedModel, corrupted_tokens: Input, clean_cache: Cached, patching_metric: Metrics, **options: Any
) -> Result:
    """`get_act_patch_block_every(model, corrupted_tokens, clean_cache, metric)`: a Result [point, layer, pos].

    The points are the residual stream before each block, what its mixer writes, and what its MLP writes where it has one.
    options and errors: as of `gl.patching.sweep`.
    """
    words = ("hook_resid_pre", "hook_mixer_out", "hook_mlp_out")
    points = [f"blocks.*.{word}" for word in words if f"blocks.0.{word}" in model.names]
    return sweep(model, corrupted_tokens, clean_cache, patching_metric, points, **options)

"""generic_activation_patch: TransformerLens's function of that name, with its signature and direction, run in batches.

    generic_activation_patch(model, corrupted_tokens, clean_cache, metric, patch_setter, "resid_pre", ("layer", "pos"))

The setter decides what is patched, so runs start at the patched layer and at the first position; `sweep` and the family
know which position they patch and are faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from gatedlens.errors import InputError, PointError, did_you_mean
from gatedlens.options import checked
from gatedlens.patching.measuring import Options, measure_cells
from gatedlens.runs import inputs
from gatedlens.runs.baseline import Baseline
from gatedlens.runs.cells import Call, Cell, Plan
from gatedlens.runs.pair import Clean

HEADS, POSITIONS = ("head", "head_index"), ("pos", "src_pos", "dest_pos")  # TransformerLens's words for axes


@checked
def generic_activation_patch(
    model: Any,
    corrupted_tokens: Any,
    clean_cache: Any,
    patching_metric: Any,
    patch_setter: Callable[..., Any],
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index_df: Any = None,
    return_index_df: bool = False,
    **options: Any,
) -> Any:
    """The metric of each index, `patch_setter(corrupted_activation, index, clean_activation)` doing the patch.

    activation_name: a point's word ("resid_pre", "gate") or its name within the block ("mixer.hook_gate"); the first
    entry of an index is its layer. index_axis_names: every combination along these axes ("layer" first, then pos, head,
    src_pos, dest_pos or any axis of the point); or index_df, a data frame with one index a row: the Result then has the
    one axis "patch". The setter gets both activations with each row's real positions in front, so that position k of a
    padded batch is each row's own. options: those of every sweep, `Options`. Returns a Result, with return_index_df a
    pair with the data frame.
    """
    chosen = Options.of(options)
    if (index_axis_names is None) == (index_df is None):
        raise InputError("generic_activation_patch takes index_axis_names or index_df: give one of them, not both.")
    run = Baseline(model, corrupted_tokens, chosen.attention_mask)
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


def _frame(names: list[str], indices: list[list[int]]) -> Any:
    import pandas

    return pandas.DataFrame(indices, columns=names)


def _point(model: Any, name: str, layer: int) -> str:
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
    if axis in HEADS:
        return int(cfg.n_heads)
    if axis not in point.dims or axis not in cfg.sizes:
        known = ["layer", *POSITIONS, *HEADS, *(dim for dim in point.dims if dim in cfg.sizes)]
        raise PointError(
            f"{point.name} has no axis {axis!r}; an index may have {', '.join(known)}.{did_you_mean(axis, known)}"
        )
    return int(cfg.sizes[axis])

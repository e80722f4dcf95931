"""causal_trace: the cells of a causal trace, and how a cell's value is read. `tracing/__init__.py` shows its use.

effect[l, p] = metric(corrupted, with `point` of layers l - w // 2 .. l + ceil(w / 2) - 1 at p as in the clean run)
               - metric(corrupted)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor

from gatedlens.address import positions as address
from gatedlens.address.entries import Index, Where
from gatedlens.address.positions import columns as columns_of
from gatedlens.address.positions import listed, one_a_row
from gatedlens.errors import InputError, PointError
from gatedlens.metrics import Logits, Metric
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Batch, Input
from gatedlens.model.padding import Padding
from gatedlens.options import checked
from gatedlens.result.result import Result
from gatedlens.runs import inputs
from gatedlens.runs.baseline import EMBED, Baseline
from gatedlens.runs.cells import Cell, Plan, PutByRow, may_start_within
from gatedlens.runs.engine import Earlier, Effort, Question, answer
from gatedlens.runs.meter import Meter
from gatedlens.tracing.corruption import Corruption, marked_by

# Which positions a trace restores: those of `gatedlens.address.positions`, or a mapping of labels to them.
if TYPE_CHECKING:
    Positions: TypeAlias = address.Positions | Mapping[str, address.Positions]
else:
    Positions = Any


@checked
@torch.no_grad()
def causal_trace(
    model: HookedModel,
    clean: Input,
    metric: Metric,
    *,
    subject: address.Positions = None,
    corrupt: Input = "noise",
    point: str = "resid_post",
    window: int = 1,
    positions: Positions = None,
    noise: int | float = 3.0,
    samples: int = 10,
    seed: int = 0,
    attention_mask: Tensor | None = None,
    max_rows: int = 64,
    progress: bool = True,
    results: Earlier = None,
    max_bytes: int | None = None,
    **index: Index,
) -> Result:
    """`gl.tracing.causal_trace(model, prompt, metric, subject=range(1, 5)).plot()`: the indirect effect, a Result [layer, pos].

    effect[l, p] = metric(corrupted, with `point` of layers l - w // 2 .. l + ceil(w / 2) - 1 at p as in the clean run)
                   - metric(corrupted)

    the mean over noise samples and rows, w the window; windows end where the model does.

    clean: text(s), ids, a pair (ids, mask), images. metric: logits -> one number a row. corrupt: "noise", or the
    counterfactual input, of the same shape. subject: the positions that are noised (see `gatedlens.address.positions`): the same
    in all rows, a tensor [batch] for one a row, a mask [batch, pos], ...; a counterfactual's are those where it differs.
    point: what is restored: a point of a block ("mixer.hook_scan") or its short name; layers that lack it are left
    out. window: so many layers at once. positions: which to restore (all), each by itself (a row that lacks it takes no
    part in it), or a mapping of labels to a position, or to one a row: {"key": key_pos, "last": -1}. noise: its standard
    deviation, as a multiple of the embeddings'; samples: draws of it, the same for all cells. attention_mask: of inputs
    that are no pairs. max_rows: rows in one forward at most (memory), max_bytes: about how many bytes. results: as in
    every sweep, `gl.patching.Options`: a path to which results are written as they come, or an interrupted Result. index:
    some entries of the point, head=2 say; the others are left as they are. Facts of the result: `clean` and `corrupted` (the
    metric), `total_effect`, what was corrupted and how.

    InputError for noise without a subject, a counterfactual with one or of another shape, and numbers below 1; PointError for
    a point that no layer has or that has no positions, and for an axis that it lacks. Meng et al. 2022 (arXiv 2202.05262);
    for Mamba Sharma, Atkinson and Bau 2024 (arXiv 2404.03646).
    """
    _check_numbers(window, samples, max_rows, noise)
    batch = inputs.ready(model, clean, attention_mask=attention_mask)
    layers = _points(model, point)
    where = _entries(model, list(layers.values()), index)
    out, cache = model.run_with_cache(batch, names_filter=[EMBED, *layers.values()])
    real = inputs.real(model, batch)
    if isinstance(corrupt, str) and corrupt == "noise":
        marked = marked_by(subject, real)
        corruption = Corruption.noise(batch, cache[EMBED], marked, noise, samples, seed)
    else:
        if subject is not None:
            raise InputError(
                "subject goes with noise: a counterfactual's subject is where it differs from the clean input."
            )
        other = inputs.ready(model, corrupt, attention_mask=attention_mask)
        corruption = Corruption.counterfactual(model, batch, cache[EMBED], other)
    columns = _columns(positions, real)
    names = [
        _name(label, mask, real, inputs.labels(model, batch), corruption.marked) for label, mask in columns.items()
    ]
    padding = Padding.of(batch.mask)
    edits = {layer: _restoring(model, name, cache[name], padding, where) for layer, name in layers.items()}
    windows = [_window(layer, window, list(layers)) for layer in layers]
    cells = [
        Cell((row, column), tuple(edits[one](mask) for one in chosen))
        for row, chosen in enumerate(windows)
        for column, mask in enumerate(columns.values())
    ]
    entries = "".join(f", {axis}={given}" for axis, given in index.items())
    what = f"{point} restored{entries}" + (f", {window} layers at once" if window > 1 else "")
    labels: dict[str, list[Any]] = {"layer": list(layers), "pos": names}
    plan = Plan(("layer", "pos"), labels, (len(windows), len(columns)), tuple(cells), f"Causal trace: {what}")

    meter = Meter(metric, "none", len(batch.value))
    good = float(meter(Logits.of(out, batch.mask), "In the clean run").mean())
    runs = _runs(model, corruption, max_rows)
    changing = set().union(*(run.prepare(cells) for run in runs))
    bad = torch.cat([meter(run.logits, "In the corrupted run") for run in runs], dim=1)
    there = torch.stack([mask.any(1) for mask in columns.values()]).to(bad)  # place, batch

    def effect(cell: Cell, value: Tensor) -> Tensor:
        """The mean over samples, and over the rows that have the position."""
        weights = there[cell.place[1]]
        by_row = (value - bad).reshape(-1, len(batch.value)).mean(0)
        return (by_row * weights).sum() / weights.sum()

    low = float(bad.mean())
    facts = {
        "model": model.cfg.model_name, "point": point, "window": window, "clean": good, "corrupted": low,
        "total_effect": good - low, **corruption.facts, **({"entries": entries[2:]} if entries else {}),
    }  # fmt: skip
    question = Question(plan, meter, effect, value=f"indirect effect on the {meter.said}", verb="restored", facts=facts)
    return answer(question, runs, changing, bad, Effort(results, max_bytes, max_rows, progress))


def _runs(model: HookedModel, corruption: Corruption, max_rows: int) -> list[Baseline]:
    """The corrupted runs: as many samples of the noise in one as `max_rows` allow."""
    batch, added = corruption.batch, corruption.added
    if added is None:
        return [Baseline(model, batch)]
    # Hooks of the user's own may depend on the rows of the batch: then each sample is a run by itself.
    size = 1 if model.is_hooked() else max(1, max_rows // len(batch.value))
    found = []
    for noise in added.split(size):
        mask = None if batch.mask is None else torch.cat([batch.mask] * len(noise))
        repeated = Batch(torch.cat([batch.value] * len(noise)), mask)
        found.append(Baseline(model, repeated, noise=noise.flatten(0, 1)))
    return found


def _entries(model: HookedModel, names: Sequence[str], index: Mapping[str, Index]) -> Where:
    """Which entries of the points are restored, checked."""
    for axis in ("batch", "pos"):
        if axis in index:
            raise InputError(f"{axis}={index[axis]!r}: a trace says by positions= which are restored, in every row.")
    where = Where(tuple(names), index)
    where.points(model)
    return where


def _restoring(
    model: HookedModel, name: str, clean: Tensor, padding: Padding, where: Where
) -> Callable[[Tensor], PutByRow]:
    """What puts the clean values of a point back at some positions of the input."""
    point, sizes = model.names.points[name], model.cfg.sizes
    dims = point.dims
    some = where.entries(clean.shape, point, clean.device, name, sizes=sizes) if where.index else None
    source = padding.by_number(clean, dims)
    at, local = dims.index("pos"), may_start_within(dims, model.cfg.sizes)
    return lambda mask: PutByRow(name, at, padding.pack(mask), source, local, some)


def _check_numbers(window: Any, samples: Any, max_rows: Any, noise: int | float) -> None:
    for name, value in (("window", window), ("samples", samples), ("max_rows", max_rows)):
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{name}={value}: it is at least 1, a whole number.")
    if noise <= 0:
        raise InputError(f"noise={noise}: it is more than 0, a multiple of the embeddings' standard deviation.")


def _points(model: HookedModel, point: str) -> dict[int, str]:
    """The point of each layer that has it."""
    found, missing = {}, None
    for layer in range(model.cfg.n_layers):
        try:
            full = f"blocks.{layer}.{point}"
            one = model.names.find(full) if "hook_" in point else model.names.short(point, layer)
        except PointError as error:
            missing = error
            continue
        row = None if one.view is not None else model.names.points[one.name]
        if row is None or "pos" not in row.dims:
            raise PointError(f"{point} cannot be restored: it has no positions of its own.")
        found[layer] = one.name
    if not found:
        assert missing is not None
        raise missing
    return found


def _window(layer: int, window: int, layers: list[int]) -> list[int]:
    """The layers restored together around one: Meng et al. 2022, with what lies outside the model left out."""
    return [one for one in range(layer - window // 2, layer - (-window // 2)) if one in layers]


def _columns(positions: Positions, real: Tensor) -> dict[Any, Bool[Tensor, "batch pos"]]:
    """The position of each row for each column of the result, by its number or label."""
    if not isinstance(positions, Mapping):
        return columns_of(positions, "positions", real)
    if not positions:
        raise InputError("positions is empty: name at least one position to restore.")
    length = real.shape[1]
    return {
        str(label): torch.nn.functional.one_hot(one_a_row(given, f"positions {label!r}", real), length).bool()
        for label, given in positions.items()
    }


def _name(label: Any, mask: Tensor, real: Tensor, labels: list[Any], marked: Tensor) -> str:
    """What a column is called: its label, or what stands there; with a * if it is the subject in every row."""
    if not isinstance(label, str):
        numbers = {number for row in listed(mask, real) for number in row}
        label = labels[numbers.pop()] if len(numbers) == 1 else label
    return str(label) + "*" * bool(marked[mask].all())

"""Causal tracing: corrupt the subject, put clean states back one at a time, and see where the prediction returns.

    metric = gl.metrics.probability(model.to_single_token(" Rome"))
    trace = gl.tracing.causal_trace(model, "The Colosseum is in the city of", metric, subject=range(1, 5))
    trace.plot()                                              # layer x pos, subject tokens marked with *
    gl.tracing.causal_trace(model, prompt, metric, subject=[3], window=5, point="mixer.hook_scan")
    gl.tracing.causal_trace(model, prompt, metric, corrupt=other_prompt)      # a counterfactual instead of noise

    effect[l, p] = metric(corrupted, with `point` of layers l - w // 2 .. l + ceil(w / 2) - 1 at p as in the clean run)
                   - metric(corrupted)

the indirect effect, mean over noise samples and rows; windows end where the model does. Meng et al. 2022 (arXiv
2202.05262); for Mamba Sharma, Atkinson and Bau 2024 (arXiv 2404.03646). Many restorations run in one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from gatedlens import inputs
from gatedlens.corruption import EMBED, Corruption, marked_by
from gatedlens.errors import InputError, PointError
from gatedlens.hooking import Batch
from gatedlens.hookpoint import HookPoint
from gatedlens.metrics import Logits, Metric, per_row
from gatedlens.positions import columns as columns_of
from gatedlens.positions import listed, one_a_row
from gatedlens.result import Result

Positions = Any  # see `causal_trace`


@torch.no_grad()
def causal_trace(
    model: Any,
    clean: Any,
    metric: Metric,
    *,
    subject: Any = None,
    corrupt: Any = "noise",
    point: str = "resid_post",
    window: int = 1,
    positions: Positions = None,
    noise: int | float = 3.0,
    samples: int = 10,
    seed: int = 0,
    attention_mask: Tensor | None = None,
    max_rows: int = 64,
    progress: bool = True,
) -> Result:
    """The indirect effect of every (layer, position), a Result layer x pos; see the head of this file.

    clean: text(s), ids, a pair (ids, mask), images. metric: logits -> one number a row. corrupt: "noise", or the
    counterfactual input, of the same shape. subject: the positions that are noised (see `positions.py`): the same in
    all rows, a tensor [batch] for one a row, a mask [batch, pos], ...; a counterfactual's are those where it differs.
    point: what is restored: a point of a block ("mixer.hook_scan") or its short name; layers that lack it are left
    out. window: so many layers at once. positions: which to restore (all), each by itself (a row that lacks it takes no
    part in it), or a mapping of labels to a position, or to one a row: {"key": key_pos, "last": -1}. noise: its standard
    deviation, as a multiple of the embeddings'; samples: draws of it, the same for all cells. attention_mask: of inputs
    that are no pairs. max_rows: rows in one forward at most (memory). Facts of the result: `clean` and `corrupted` (the
    metric), `total_effect`, what was corrupted and how.
    """
    _check_numbers(window, samples, max_rows, noise)
    batch = inputs.ready(model, clean, attention_mask=attention_mask)
    layers = _points(model, point)
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
    runs = Runs(model, metric, corruption, {layer: cache[name] for layer, name in layers.items()}, layers)
    columns = _columns(positions, real)
    names = [
        _name(label, mask, real, inputs.labels(model, batch), corruption.marked) for label, mask in columns.items()
    ]
    places = [mask.long().argmax(1) for mask in columns.values()]  # of a row without it the first, which does not count
    windows = [_window(layer, window, list(layers)) for layer in layers]
    cells = [(chosen, place) for chosen in windows for place in places]

    good, bad = per_row(metric, Logits.of(out, batch.mask)), runs.corrupted(max_rows)  # [batch], [sample, batch]
    effects = runs.restored(cells, max_rows, progress) - bad  # cell, sample, batch
    there = torch.stack([mask.any(1) for mask in columns.values()])  # place, batch
    effects = effects.reshape(len(windows), len(places), *effects.shape[1:]).mean(2)
    weights = there.to(effects)
    values = (effects * weights).sum(-1) / weights.sum(-1)  # the mean over the rows that have the position
    facts = {
        "model": model.cfg.model_name, "point": point, "window": window, "clean": float(good.mean()),
        "corrupted": float(bad.mean()), "total_effect": float(good.mean() - bad.mean()), **corruption.facts,
    }  # fmt: skip
    what = f"{point} restored" + (f", {window} layers at once" if window > 1 else "")
    labels: dict[str, list[Any]] = {"layer": list(layers), "pos": names}
    return Result(values, ("layer", "pos"), labels, f"Causal trace: {what}", "indirect effect", facts)


@dataclass(frozen=True, eq=False)
class Runs:
    """Corrupted forwards with something restored, many in one batch. A unit is a whole batch of rows: (cell, sample)."""

    model: Any
    metric: Metric
    corruption: Corruption
    clean: Mapping[int, Tensor]  # what is restored, by layer
    names: Mapping[int, str]

    def corrupted(self, max_rows: int) -> Float[Tensor, "sample batch"]:
        """The metric with nothing restored."""
        return self.restored([((), torch.zeros(0, dtype=torch.long))], max_rows, False)[0]

    def restored(
        self, cells: Sequence[tuple[Sequence[int], Int[Tensor, " some"]]], max_rows: int, progress: bool
    ) -> Float[Tensor, "cell sample batch"]:
        """The metric of every (layers, position of each row)."""
        samples = self.corruption.samples
        units = [(cell, sample) for cell in cells for sample in range(samples)]
        # Hooks of the user's own may depend on the rows of the batch: then each unit is a run by itself.
        size = 1 if self.model.is_hooked() else max(1, max_rows // len(self.corruption.batch.value))
        starts = tqdm(range(0, len(units), size), disable=not progress, desc="causal trace", unit="batch")
        values = [value for start in starts for value in self._together(units[start : start + size])]
        return torch.stack(values).reshape(len(cells), samples, -1)

    def _together(self, units: Sequence[Any]) -> Iterator[Tensor]:
        """The metric of some units [batch] each, by one forward."""
        batch, n = self.corruption.batch, len(units)
        mask = None if batch.mask is None else torch.cat([batch.mask] * n)
        repeated = Batch(torch.cat([batch.value] * n), mask)
        hooks: list[tuple[str, Callable[..., Tensor]]] = []
        if self.corruption.added is not None:
            added = torch.cat([self.corruption.added[sample] for _, sample in units])
            hooks.append((EMBED, lambda x, hook: x + added))
        chosen = sorted({layer for (layers, _), _ in units for layer in layers})
        hooks += [(self.names[layer], self._restore(layer, units)) for layer in chosen]
        with self.model.hooks(hooks):
            logits = self.model(repeated)
        for part in logits.chunk(n):
            yield per_row(self.metric, Logits.of(part, batch.mask))

    def _restore(self, layer: int, units: Sequence[Any]) -> Callable[..., Tensor]:
        """A hook that puts the clean values of a layer back, at each unit's position in each of its rows."""
        clean = self.clean[layer]
        rows = len(clean)
        here = [(unit, at) for unit, ((layers, at), _) in enumerate(units) if layer in layers]
        row = torch.cat([unit * rows + torch.arange(rows) for unit, _ in here]).to(clean.device)
        pos = torch.cat([at for _, at in here]).to(clean.device)

        def restore(x: Tensor, hook: HookPoint) -> Tensor:
            x.movedim(hook.pos_dim or 1, 1)[row, pos] = clean.movedim(hook.pos_dim or 1, 1)[row % rows, pos]
            return x

        return restore


def _check_numbers(window: Any, samples: Any, max_rows: Any, noise: int | float) -> None:
    for name, value in (("window", window), ("samples", samples), ("max_rows", max_rows)):
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{name}={value}: it is at least 1, a whole number.")
    if noise <= 0:
        raise InputError(f"noise={noise}: it is more than 0, a multiple of the embeddings' standard deviation.")


def _points(model: Any, point: str) -> dict[int, str]:
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

"""The engine of every sweep: runs a plan's cells, many to a batch, and measures each.

    found = measure_cells(corrupted, clean, plan, metric, options)      # a Result

Cells are taken in bands of neighbouring positions: a band's runs start at its first position, and those that enter the
model at one block share a batch. The metric is called once a cell, with that cell's logits alone, so a metric that
compares with per-row answers works as it does outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from gatedlens.errors import InputError, did_you_mean
from gatedlens.metrics import measure
from gatedlens.result import Result
from gatedlens.runs.baseline import Baseline
from gatedlens.runs.cells import Cell, Plan
from gatedlens.runs.ledger import Store
from gatedlens.runs.pair import Clean

ON_CPU, ON_ACCELERATOR = 8 << 20, 1 << 30  # bytes of a batch's activations; a CPU is fastest while they fit its caches


HELD = 31 << 20  # bytes; just under the 32 MiB up to which glibc learns


def hold_memory() -> None:
    """Have glibc keep what is freed, up to 64 MiB, for the next batch, instead of handing it back and faulting it in anew.

    It learns its thresholds from the largest block that was freed, so one block, never touched, is enough. A quarter of a
    sweep's time went into page faults.
    """
    torch.empty(HELD, dtype=torch.uint8)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a sweep: `results` holds what was measured so far (the rest is NaN); pass it on to continue."""

    def __init__(self, message: str, results: Result):
        super().__init__(message)
        self.results = results


@dataclass(frozen=True)
class Options:
    """What every sweep can be told.

    reduce: "mean" over the rows of a batch, "none" (an axis "batch" is kept; the metric gives a number a row), or
    "scalar" (the metric gives one number). normalised: (value - corrupted) / (clean - corrupted), 1 where a patch
    restores the clean run and 0 where it does nothing. results: an earlier, interrupted Result to complete, or a path
    to which results are written, also when something goes wrong, and from which they are taken up. attention_mask:
    that of the corrupted run. max_bytes: about how much a batch's activations may take (None: 8 MiB on a CPU, where
    more is slower, and 1 GiB on an accelerator); one patch at least goes at a time.
    """

    reduce: str = "mean"
    normalised: bool = False
    results: Result | str | Path | None = None
    attention_mask: Tensor | None = None
    max_bytes: int | None = None
    progress: bool = True
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = ("mean", "none", "scalar")
        if self.reduce not in known:
            raise InputError(
                f"reduce={self.reduce!r}: it is 'mean', 'none' or 'scalar'.{did_you_mean(self.reduce, known)}"
            )
        if self.max_bytes is not None and self.max_bytes < 1:
            raise InputError(f"max_bytes={self.max_bytes}: give a number of bytes, 1 or more.")
        if isinstance(self.results, str | Path) and not Path(self.results).parent.is_dir():
            raise InputError(f"results={str(self.results)!r}: there is no folder {str(Path(self.results).parent)!r}.")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """`Options.of({"reduce": "none"})`; InputError for an option that does not exist."""
        known = [one.name for one in fields(cls) if one.name != "facts"]
        for name in given:
            if name not in known:
                raise InputError(
                    f"A sweep has no option {name!r}; it has {', '.join(known)}.{did_you_mean(name, known)}"
                )
        return cls(**given)

    def told(self, facts: Mapping[str, Any]) -> Options:
        """The same options, with facts for the Result."""
        return replace(self, facts=facts)


Metric = Callable[[Tensor], Any] | Mapping[str, Callable[[Tensor], Any]]


class Meter:
    """Metrics by name, called on one cell's logits: [metric, rows], rows 1 unless each row's number is kept."""

    def __init__(self, metric: Any, reduce: str):
        self.named = isinstance(metric, Mapping)
        self.metrics: dict[str, Any] = dict(metric) if isinstance(metric, Mapping) else {"metric": metric}
        self.reduce = reduce
        if not self.metrics or not all(map(callable, self.metrics.values())):
            raise InputError(
                f"The metric is {metric!r}; it is a function of logits, or a dict of such functions by name."
            )

    def __call__(self, logits: Tensor, where: str) -> Tensor:
        try:
            return torch.stack([self._value(metric, logits) for metric in self.metrics.values()])
        except InputError as error:
            raise InputError(f"{where}: {error}") from error

    def _value(self, metric: Any, logits: Tensor) -> Tensor:
        value = measure(metric, logits).detach()
        if self.reduce == "scalar" and value.ndim:
            raise InputError(
                f"The metric returned {list(value.shape)}; with reduce='scalar' it must return one scalar."
            )
        if self.reduce != "none":
            return value.mean().reshape(1)
        if value.ndim == 0 and len(logits) > 1:
            raise InputError(
                f"The metric returned one number for {len(logits)} rows; reduce='none' keeps one for each: leave out its mean."
            )
        return value.reshape(-1)


@torch.no_grad()
def measure_cells(corrupted: Baseline, clean: Clean, plan: Plan, metric: Any, options: Options) -> Result:
    """Every cell's number, laid out on the plan's axes (a "metric" axis in front for a dict of metrics, "batch" at the
    end where rows are kept)."""
    meter = Meter(metric, options.reduce)
    hold_memory()
    changing = corrupted.prepare(plan.cells)
    low = meter(corrupted.logits, "In the corrupted run")
    high = None if (logits := clean.logits()) is None else meter(logits, "In the clean run")
    names = list(meter.metrics) if meter.named else None
    store = Store(plan, low, high, names, options.reduce == "none", options.normalised, options.facts)
    path = Path(options.results) if isinstance(options.results, str | Path) else None
    earlier = Result.load(path) if path is not None and path.exists() else options.results
    if isinstance(earlier, Result):
        store.fill(earlier)
    for place in {cell.place for cell in plan.cells} - {cell.place for cell in changing}:
        store.put(place, low)
    todo = [cell for cell in changing if not store.has(cell.place)]
    with tqdm(total=len(todo), desc=plan.title, disable=not options.progress) as bar:
        try:
            for batch in batches(corrupted, todo, options.max_bytes):
                logits = corrupted.run(batch)
                for cell, own in zip(batch, logits, strict=True):
                    store.put(cell.place, meter(corrupted.whole(own), f"With {plan.say(cell)} patched"))
                    bar.update()
        except KeyboardInterrupt as stop:
            raise Interrupted(_how_to_go_on(store, path), store.result()) from stop
        finally:
            if path is not None:
                store.result().save(path)
    return store.result()


def _how_to_go_on(store: Store, path: Path | None) -> str:
    done, total = store.measured(), len(store.plan.cells)
    if path is not None:
        return f"{done} of {total} cells were measured and saved; the same call with results={str(path)!r} goes on."
    return (
        f"{done} of {total} cells were measured: `except gl.patching.Interrupted as stop`, then results=stop.results."
    )


# -- which cells go together ----------------------------------------------------------------------------------------


def batches(corrupted: Baseline, cells: Sequence[Cell], max_bytes: int | None) -> Iterator[list[Cell]]:
    """The cells, batch by batch; before each the runs are advanced to the position at which it starts."""
    size = Sizes(corrupted, cells, max_bytes)
    ordered = sorted(cells, key=lambda cell: (cell.first, corrupted.entry(cell)))
    for start, band in bands(corrupted, ordered, size):
        corrupted.advance(start)
        for _, group in groupby(sorted(band, key=corrupted.entry), key=corrupted.entry):
            same, n = list(group), size.cells(start)
            yield from (same[i : i + n] for i in range(0, len(same), n))


def bands(corrupted: Baseline, ordered: Sequence[Cell], size: Sizes) -> Iterator[tuple[int, list[Cell]]]:
    """(start, cells) of neighbouring positions: as wide as a batch of those that enter at one block allows."""
    start, most = 0, 0
    band: list[Cell] = []
    for first, group in groupby(ordered, key=lambda cell: cell.first):
        here = list(group)
        here_most = max(sum(1 for _ in same) for _, same in groupby(here, key=corrupted.entry))
        at = corrupted.earliest(first)
        if band and (at > start and most + here_most > size.cells(start)):
            yield start, band
            band, most = [], 0
        start, band, most = (start if band else at), [*band, *here], most + here_most
    if band:
        yield start, band


class Sizes:
    """How many cells go into one batch: from the bytes that one position of one row takes in the widest block."""

    def __init__(self, corrupted: Baseline, cells: Sequence[Cell], max_bytes: int | None):
        model = corrupted.model
        heard = {edit.name for cell in cells for edit in cell.edits}
        sizes = {**model.cfg.sizes, "batch": 1, "pos": 1, "key_pos": corrupted.length}
        elements: dict[str, int] = {}
        for name, point in model.names.points.items():
            place = ".".join(name.split(".")[:2]) if name.startswith("blocks.") else name
            if not point.lazy or name in heard:
                elements[place] = elements.get(place, 0) + point.elements(sizes)
        width = torch.empty((), dtype=model.cfg.dtype).element_size()
        self.per_position = corrupted.rows * max(width, 4) * max(elements.values())
        self.length, self.alone = corrupted.length, corrupted.alone
        self.limit = max_bytes or (ON_CPU if corrupted.batch.value.device.type == "cpu" else ON_ACCELERATOR)

    def cells(self, start: int) -> int:
        """How many cells a batch holds whose runs start at this position."""
        return 1 if self.alone else max(1, self.limit // (self.per_position * (self.length - start)))

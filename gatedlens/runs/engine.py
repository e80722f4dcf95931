"""The engine of every sweep: runs cells, many to a batch, and measures each.

    question = Question(plan, meter, score, facts=facts)
    found = answer(question, [corrupted], changing, low, Effort(results="sweep.json"))      # a Result

Patching, knockout, tracing, path and edge patching and the curve of a circuit are data for it: the cells of a plan (what each
edits, where it may start) and how a cell's value is read. Cells are taken in bands of neighbouring positions: a band's runs
start at its first position, and each joins its batch at the block where it enters the model. What was measured is kept batch by
batch.

`fill` is the one loop over batches, with its progress bar and what a stop does. Gradients, which need backward passes and no
batches of cells, go through it too (`gradients.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from gatedlens.errors import InputError
from gatedlens.model.base import HookedModel
from gatedlens.result.result import Result
from gatedlens.runs import inputs
from gatedlens.runs.baseline import Baseline
from gatedlens.runs.cells import Cell, Plan
from gatedlens.runs.fingerprints import fingerprint
from gatedlens.runs.identity import Digest
from gatedlens.runs.ledger import AGAIN, Ledger
from gatedlens.runs.meter import Meter
from gatedlens.runs.stopping import Interrupted, NotSaved, stoppable

ON_CPU, ON_ACCELERATOR = 64 << 20, 1 << 30  # bytes of a batch's activations; more was slower on a CPU
# As many bytes of activations are computed in the time that calls take however little they run; at most a part of a batch.
CALL_ON_CPU, CALL_ON_ACCELERATOR, CALL_PART = 1 << 20, 128 << 20, 1 / 8
HELD = 31 << 20  # bytes; just under the 32 MiB up to which glibc learns


def hold_memory() -> None:
    """Have glibc keep what is freed, up to 64 MiB, for the next batch, instead of handing it back and faulting it in anew.

    It learns its thresholds from the largest block that was freed, so one block, never touched, is enough. A quarter of a
    sweep's time went into page faults.
    """
    torch.empty(HELD, dtype=torch.uint8)


@dataclass(frozen=True)
class Effort:
    """How a sweep runs; none of it changes a number.

    results: an earlier, interrupted Result to complete, or a path to which results are written as they come, and from
    which they are taken up. max_bytes: about how much a batch's activations may take (None: 64 MiB on a CPU, where more is
    slower, and 1 GiB on an accelerator); max_rows: how many rows a batch may have; one cell at least goes at a time.
    """

    results: Result | str | Path | None = None
    max_bytes: int | None = None
    max_rows: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        for name, unit in (("max_bytes", "bytes"), ("max_rows", "rows")):
            given = getattr(self, name)
            if given is not None and given < 1:
                raise InputError(f"{name}={given}: give a number of {unit}, 1 or more.")
        if self.results is None or isinstance(self.results, Result):
            return
        if not isinstance(self.results, str | Path):
            raise InputError(f"results={self.results!r}: give a path, or the Result of an interrupted sweep.")
        path = Path(self.results)
        if not path.parent.is_dir():
            raise InputError(f"results={str(path)!r}: there is no folder {str(path.parent)!r}.")
        if path.is_dir():
            raise InputError(f"results={str(path)!r} is a folder: name a file in it.")


Earlier = Result | str | Path | None  # what `results=` takes
Score = Callable[[Cell, Tensor], Tensor]


@dataclass(frozen=True)
class Question:
    """What is asked of each cell of a plan.

    score: (cell, the metric's numbers [metric rows]) -> what the result holds at the cell's place. value: what a number of
    the result is; unit: what 1 of it is in the metric's own units. verb: what a cell is ("patched"). facts: for the Result.
    said: what else decides the numbers and is not in the cells. by_row: whether rows are an axis, "batch", of the result.
    """

    plan: Plan
    meter: Meter
    score: Score
    value: str
    verb: str
    facts: Mapping[str, Any]
    said: Mapping[str, Any] = field(default_factory=dict)
    unit: float = 1.0
    by_row: bool = False

    def blank(self, low: Float[Tensor, "metric rows"]) -> Result:
        """The Result before anything was measured."""
        names, plan = self.meter.names, self.plan
        axes = (*(("metric",) if names else ()), *plan.axes, *(("batch",) if self.by_row else ()))
        shape = (*((len(names),) if names else ()), *plan.sizes, *((low.shape[1],) if self.by_row else ()))
        labels = {**plan.labels, **({"metric": names} if names else {})}
        values = low.new_full(shape, torch.nan)
        return Result(values, axes, labels, plan.title, self.value, self.facts)


@torch.no_grad()
def answer(
    question: Question, runs: Sequence[Baseline], changing: set[int], low: Float[Tensor, "metric rows"], effort: Effort
) -> Result:
    """Every cell's number, on the plan's axes.

    runs: samples of the run that is edited, one for most; each cell is measured in all of them, and its numbers stand side
    by side. changing: the numbers of the cells that change anything; of the others `low` is known, the metric of the runs
    as they are, whose dtype and device the result gets.
    """
    hold_memory()
    cells = question.plan.cells
    for run in runs:
        run.read_only(question.meter.reads(inputs.real(run.model, run.given)), cells)
    changing = {i for i in changing if runs[0].is_read(cells[i])}
    ledger = Ledger(question.blank(low), len(cells), effort.results, lambda: identity(question, runs))
    todo = []
    for i, cell in enumerate(cells):
        if i not in changing:
            ledger.put(cell.place, question.score(cell, low))
        elif not ledger.take_up(cell.place):
            todo.append(cell)
    sizes = Sizes(runs[0], cells, effort)
    _check_again(question, ledger, runs, [cells[i] for i in sorted(changing)], low)

    def scores(batch: Sequence[Cell]) -> Iterator[Tensor]:
        numbers = measured(runs, batch, question)
        return (question.score(cell, value) for cell, value in zip(batch, numbers, strict=True))

    fill(ledger, batches(runs, todo, sizes), scores, len(todo), effort)
    return ledger.result()


def fill(
    ledger: Ledger,
    batches: Iterable[Sequence[Cell]],
    scores: Callable[[Sequence[Cell]], Iterable[Tensor]],
    n_cells: int,
    effort: Effort,
) -> None:
    """Put the score of each cell into the ledger, and save it batch by batch.

    scores: a batch -> one tensor a cell, in order. n_cells: how many cells the batches hold together, for the progress bar.
    Interrupted on Ctrl-C and SIGTERM, NotSaved where the file cannot be written.
    """
    with tqdm(total=n_cells, desc=ledger.blank.title, disable=not effort.progress) as bar, _kept(ledger):
        for batch in batches:
            for cell, value in zip(batch, scores(batch), strict=True):
                ledger.put(cell.place, value)
                bar.update()
            ledger.save()


@contextmanager
def _kept(ledger: Ledger) -> Iterator[None]:
    """Whatever ends the block, what was measured is in the file; Ctrl-C and SIGTERM say how to go on."""
    with stoppable():
        try:
            ledger.save()  # a file that cannot be written is found out at once
            yield
        except KeyboardInterrupt as stop:
            ledger.save()
            raise Interrupted(ledger.how_to_go_on(), ledger.resumable()) from stop
        except NotSaved:
            raise
        except Exception:
            ledger.save()
            raise


def measured(
    runs: Sequence[Baseline], cells: Sequence[Cell], question: Question
) -> Iterator[Float[Tensor, "metric rows"]]:
    """The metric's numbers of each cell of a batch."""

    def numbers(run: Baseline) -> Iterator[Tensor]:
        for cell, logits in zip(cells, run.run(cells), strict=True):
            yield question.meter(run.whole(logits), f"With {question.plan.say(cell)} {question.verb}")

    *others, last = runs
    before = [list(numbers(run)) for run in others]  # one sample's logits at a time
    for i, own in enumerate(numbers(last)):
        yield torch.cat([*(sample[i] for sample in before), own], dim=1) if before else own


# -- what the numbers are of ----------------------------------------------------------------------------------------


def identity(question: Question, runs: Sequence[Baseline]) -> dict[str, Any]:
    """Everything that decides the numbers of a question."""
    given = [(one.given.value, one.given.mask, one.noise, one.options) for one in runs]
    cells = [(cell.place, cell) for cell in question.plan.cells]
    said = {"metrics' names": question.meter.names, "reduce": question.meter.reduce, **question.said}
    return identity_of(runs[0].model, given, cells, question.meter.metrics, said)


def identity_of(
    model: HookedModel, given: Any, cells: Any, metrics: Sequence[Any], said: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that decides the numbers, as JSON holds it; by the names that a refusal gives it.

    given: the inputs, with all that goes into their forwards. cells: what each edits. metrics: functions. said: what else.
    """
    config = {name: str(one) for name, one in asdict(model.cfg).items() if name not in ("device", "tokenizer_name")}
    read, what = Digest().add(given), Digest().add(cells)
    hooked = {name: point for name, point in model.hook_dict.items() if point.hooked() and not point.only_saved()}
    users = [handle.user_hook for point in hooked.values() for handle in (*point.fwd_hooks, *point.bwd_hooks)]
    code = [what.code, Digest().add([metrics, users]).code]
    return {
        "model's parameters (checksum)": fingerprint(model),
        "model's config (checksum)": Digest().add(config).data,
        "input (checksum)": f"{read.data}{read.tensors}",
        "cells (checksum)": what.data,
        "values put in (checksum)": what.tensors,
        "hooked points": list(hooked),
        **said,
        "code": None if None in code else "".join(map(str, code)),
    }


def _check_again(
    question: Question, ledger: Ledger, runs: Sequence[Baseline], cells: Sequence[Cell], low: Tensor
) -> None:
    """Where functions may have changed since the earlier sweep: measure one of its cells again, the farthest from doing
    nothing. InputError if its value is another one, by more than rounding."""
    known = [cell for cell in cells if cell.place in ledger.done and cell.tells]
    if not known or ledger.surely_the_same():
        return

    def distance(cell: Cell) -> float:
        return float(
            (ledger.at(cell.place) - question.score(cell, low).to(ledger.values).flatten()).abs().nan_to_num().max()
        )

    cell = max(known, key=distance)
    then = ledger.at(cell.place)
    now = question.score(cell, next(measured(runs, [cell], question))).to(then).flatten()
    eps = torch.finfo(runs[0].model.cfg.dtype).eps
    size = torch.stack([then.abs(), now.abs()]).max() * question.unit + low.abs().max()
    rounding = eps**0.5 * size + min(128 * eps, 0.05) * runs[0].logits.abs().max()
    if bool(((then - now).abs() * question.unit > rounding).any()):
        raise another_sweep(f"with {question.plan.say(cell)} {question.verb}", then, now)


def another_sweep(where: str, then: Tensor, now: Tensor) -> InputError:
    """The error for an earlier sweep one of whose numbers, measured again, is another one."""
    return InputError(
        f"results is of another sweep: {where} it is {then.tolist()}, and measured again it is {now.tolist()}: the metric, "
        f"or another function that takes part, does something else. {AGAIN}"
    )


# -- which cells go together ----------------------------------------------------------------------------------------


def batches(runs: Sequence[Baseline], cells: Sequence[Cell], size: Sizes) -> Iterator[list[Cell]]:
    """The cells, batch by batch; before each the runs are advanced to the position at which it starts."""
    one = runs[0]

    def kind(cell: Cell) -> tuple[int, int]:
        """Cells of one kind share a batch: those that join it at their entry, wherever that is, or of one entry only."""
        entry, behind = one.entry(cell), cell.behind(one)
        return (entry, behind) if entry == -1 or behind > entry else (0, 0)

    for start, band in bands(one, sorted(cells, key=lambda cell: cell.first), size):
        for run in runs:
            run.advance(start)
        for _, group in groupby(sorted(band, key=lambda cell: (kind(cell), one.entry(cell))), key=kind):
            same, n = list(group), size.cells(start)
            yield from (same[i : i + n] for i in range(0, len(same), n))


def bands(run: Baseline, ordered: Sequence[Cell], size: Sizes) -> Iterator[tuple[int, list[Cell]]]:
    """(start, cells) of neighbouring positions.

    To start anew costs calls; to go on costs positions that later cells run in vain. A band ends where the next position would
    cost more than the ones in it did on average, which makes that average the least.
    """
    n_layers = run.model.cfg.n_layers
    start, spent, positions = 0, 0.0, 0
    band: list[Cell] = []
    for first, group in groupby(ordered, key=lambda cell: cell.first):
        here, at = list(group), run.earliest(first)
        in_vain = (at - start) * sum(n_layers - max(run.entry(cell), 0) for cell in here)
        if band and in_vain * positions > spent:
            yield start, band
            band = []
        if not band:
            start, spent, positions, in_vain = at, size.call * n_layers, 0, 0
        band, spent, positions = [*band, *here], spent + in_vain, positions + 1
    if band:
        yield start, band


class Sizes:
    """How many cells go into one batch: from the bytes that one position of one row takes in the widest block."""

    def __init__(self, run: Baseline, cells: Sequence[Cell], effort: Effort):
        model = run.model
        heard = {edit.name for cell in cells for edit in cell.edits}
        sizes = {**model.cfg.sizes, "batch": 1, "pos": 1, "key_pos": run.length}
        elements: dict[str, int] = {}
        for name, point in model.names.points.items():
            place = ".".join(name.split(".")[:2]) if name.startswith("blocks.") else name
            if not point.lazy or name in heard:
                elements[place] = elements.get(place, 0) + point.elements(sizes)
        width = run.rows * max(torch.empty((), dtype=model.cfg.dtype).element_size(), 4)
        behind = 0 if run.read is None or any(run.entry(cell) == -1 for cell in cells) else elements.pop("hook_logits")
        self.per_position, self.at_end = width * max(elements.values()), width * behind
        self.length, self.alone = run.length, run.alone
        on_cpu = run.batch.value.device.type == "cpu"
        self.limit = effort.max_bytes or (ON_CPU if on_cpu else ON_ACCELERATOR)
        self.most = None if effort.max_rows is None else effort.max_rows // run.rows
        call = min(CALL_ON_CPU if on_cpu else CALL_ON_ACCELERATOR, CALL_PART * self.limit)
        self.call = call / self.per_position  # in positions of a cell

    def cells(self, start: int) -> int:
        """How many cells a batch holds whose runs start at this position."""
        fitting = self.limit // max(self.per_position * (self.length - start), self.at_end)
        return 1 if self.alone else max(1, fitting if self.most is None else min(fitting, self.most))

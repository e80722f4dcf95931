"""Cells: what a sweep does, as data. A cell is one edited run, an edit is what it does at one point.

    Put("blocks.3.mixer.hook_gate", dims, {"pos": slice(5, 6)}, clean)     the clean values at position 5
    PutByRow("blocks.3.mixer.hook_gate", 1, where, clean)                  those of each row's own positions
    Add("blocks.3.hook_mixer_in", own, said)                               what the run has there, and something more
    Call("blocks.3.hook_resid_pre", setter, [3, 5], clean)                 whatever TransformerLens's patch_setter does
    Cell((3, 5), (edit, ...))                                              where its number stands in the result

Positions are real ones: each row's are in front, padding is behind them (`Baseline`). Each edit changes the rows of its own
cell in a batch of many. `first` is the earliest position that it touches: in a
causal model nothing before it changes. A run that starts at position `start` has positions from there on only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gatedlens.errors import HookError

if TYPE_CHECKING:
    from gatedlens.runs.baseline import Baseline

Index = slice | list[int]
NAMED = ("layer", "point", "src", "sender", "receiver", "edges")  # axes of which an entry is called by its label


def layer_of(name: str) -> int | None:
    """3 for `blocks.3.mixer.hook_gate`; None for a point outside the blocks."""
    return int(name.split(".")[1]) if name.startswith("blocks.") else None


def may_start_within(dims: Sequence[str], sizes: Mapping[str, int]) -> bool:
    """Whether a run may start behind the first position and still have such a point as the whole run has it.

    Not where an axis grows with the positions that were run (key_pos): it would show where the run started.
    """
    return all(dim in ("batch", "pos") or dim in sizes for dim in dims)


def key(dims: Sequence[str], index: Mapping[str, Index], start: int = 0) -> tuple[Any, ...]:
    """The index of the entries at `index` of a tensor with these dims, whose positions begin at `start`."""
    chosen: list[Any] = [index.get(dim, slice(None)) for dim in dims]
    if start and "pos" in index:
        chosen[dims.index("pos")] = _shift(index["pos"], -start)
    lists = [i for i, one in enumerate(chosen) if isinstance(one, list)]
    for place, i in enumerate(lists):  # lists of several axes mean their product
        chosen[i] = torch.tensor(chosen[i]).reshape([-1 if k == place else 1 for k in range(len(lists))])
    return tuple(chosen)


def _shift(index: Index, by: int) -> Index:
    if isinstance(index, slice):
        return slice(index.start + by, index.stop + by)
    return [i + by for i in index]


def beginning(index: Mapping[str, Index]) -> int:
    """The first position that an index names; 0 if it names none."""
    at = index.get("pos", slice(0, 1))
    return at.start if isinstance(at, slice) else min(at)


@dataclass(frozen=True)
class Put:
    """`Put("blocks.3.mixer.hook_gate", dims, {"pos": slice(5, 6)}, clean)`: the entries `index` (by axis) of a point get
    `source`'s, or zeros where there is none (None)."""

    name: str
    dims: tuple[str, ...]
    index: Mapping[str, Index]
    source: Tensor | None
    local: bool = True  # whether a run may start at its first position

    @property
    def first(self) -> int:
        return beginning(self.index) if self.local else 0

    def _value(self, rows: Tensor) -> Tensor:
        here = key(self.dims, self.index)
        return (
            torch.zeros((), dtype=rows.dtype, device=rows.device) if self.source is None else self.source[here].to(rows)
        )

    def apply(self, rows: Tensor, start: int) -> None:
        """`put.apply(rows, start=0)`: edit what the point holds in one cell's rows, in place; positions begin at `start`."""
        value = self._value(rows)
        if start and self.source is not None and "pos" not in self.index and "pos" in self.dims:
            value = value.narrow(self.dims.index("pos"), start, rows.shape[self.dims.index("pos")])
        rows[key(self.dims, self.index, start)] = value

    def changes(self, rows: Tensor) -> bool:
        """`put.changes(rows)`: whether it changes anything of what the point holds in the unedited run."""
        here = rows[key(self.dims, self.index)]
        return not torch.equal(here, self._value(rows).expand_as(here))


@dataclass(frozen=True)
class Call:
    """TransformerLens's `patch_setter(activation, index, clean_activation)`: it may touch anything."""

    name: str
    setter: Callable[..., Tensor]
    index: Sequence[Any]
    clean: Tensor
    first: int = 0

    def apply(self, rows: Tensor, start: int) -> None:
        out = self.setter(rows, self.index, self.clean)
        if out is None or out is rows:
            return
        if not isinstance(out, Tensor) or out.shape != rows.shape:
            said = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise HookError(f"The patch setter returned {said} at {self.name}; the activation is {list(rows.shape)}.")
        rows.copy_(out)

    def changes(self, rows: Tensor) -> bool:
        edited = rows.clone()
        self.apply(edited, 0)
        return not torch.equal(edited, rows)


@dataclass(frozen=True)
class PutByRow:
    """The entries at the positions `where` of each row get `source`'s. Runs of several samples repeat the rows of both.

    dim: which axis of the point the positions are. local: whether a run may start at the first of them. some: of which entries, a
    mask that broadcasts to the point, the same for all rows and positions (None: of all).
    """

    name: str
    dim: int
    where: Bool[Tensor, "batch pos"]
    source: Tensor
    local: bool = True
    some: Tensor | None = None

    @property
    def first(self) -> int:
        return int(self.where.any(0).nonzero()[0]) if self.local else 0

    def _here(self, rows: Tensor, start: int) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """The rows with positions in front, the index of what is edited there, and its value, with what it has of the rows."""
        own, pos = self.where.to(self.source.device).nonzero(as_tuple=True)
        value = self.source.movedim(self.dim, 1)[own, pos].to(rows)
        samples = len(rows) // len(self.where)
        row = torch.cat([own + sample * len(self.where) for sample in range(samples)])
        here = (row.to(rows.device), (pos - start).repeat(samples).to(rows.device))
        moved, value = rows.movedim(self.dim, 1), torch.cat([value] * samples)
        if self.some is not None:
            value = torch.where(self.some.movedim(self.dim, 1)[0, 0].to(rows.device), value, moved[here])
        return moved, here, value

    def apply(self, rows: Tensor, start: int) -> None:
        moved, here, value = self._here(rows, start)
        moved[here] = value

    def changes(self, rows: Tensor) -> bool:
        moved, here, value = self._here(rows, 0)
        return not torch.equal(moved[here], value)


@dataclass(frozen=True)
class Add:
    """The point [batch pos d_model] gets what it holds in the run (`own`) and `said`, whatever else has reached it."""

    name: str
    own: Float[Tensor, "batch pos d_model"]
    said: Float[Tensor, "batch pos d_model"]

    @property
    def first(self) -> int:
        touched = self.said.flatten(2).any(2).any(0).nonzero()
        return int(touched[0]) if len(touched) else 0

    def apply(self, rows: Tensor, start: int) -> None:
        rows.copy_((self.own + self.said)[:, start:])

    def changes(self, rows: Tensor) -> bool:
        return bool(self.said.any())


Edit = Put | PutByRow | Add | Call
# Each has `name`, `first`, `apply(rows, start)` in place, and `changes(rows)`, which is asked of the whole, unedited run.


@dataclass(frozen=True)
class Cell:
    """One edited run: its `edits`, and the `place` of its number among the result's axes."""

    place: tuple[int, ...]
    edits: tuple[Edit, ...]

    @functools.cached_property
    def first(self) -> int:
        """Before this position nothing changes, in a causal model."""
        return min(edit.first for edit in self.edits)

    @property
    def tells(self) -> bool:
        """Whether its number depends on the metric at all; an earlier sweep's metric is recognised by such a cell."""
        return True

    def entry(self, run: Baseline) -> int:
        """`cell.entry(run)`: the block before which nothing changes; -1: what comes before the first block changes too."""
        return min(run.entry_of(edit.name) for edit in self.edits)

    def behind(self, run: Baseline) -> int:
        """`cell.behind(run)`: the block up to which runs have all their positions; from there on, those from the start on."""
        return self.entry(run)

    def beyond(self, run: Baseline) -> bool:
        """`cell.beyond(run)`: whether it touches what follows the blocks, where runs may have only what a metric reads."""
        last = run.model.cfg.n_layers
        return any(layer_of(edit.name) is None and run.entry_of(edit.name) == last for edit in self.edits)

    def hooks(self, cells: Sequence[Cell], run: Baseline) -> list[tuple[str, Any]]:
        """`cell.hooks(cells, run)`: [(name, hook)] that do what `cells` of this kind do, run in one batch.

        A hook may get the rows of the first cells alone: those that have entered before its block.
        """
        edits = by_name(cells)

        def apply(x: Tensor, hook: Any) -> Tensor:
            turned = run.by_number(x, hook.point.dims)
            for i, edit in edits[hook.name]:
                rows = turned[i * run.rows : (i + 1) * run.rows]
                if len(rows):  # a cell that enters behind this point has none yet
                    edit.apply(rows, run.start)
            return run.by_place(turned, hook.point.dims)

        return [(name, apply) for name in edits]


def by_name(cells: Iterable[Cell]) -> dict[str, list[tuple[int, Edit]]]:
    """For each point, which cells (by number) do what there."""
    found: dict[str, list[tuple[int, Edit]]] = {}
    for i, cell in enumerate(cells):
        for edit in cell.edits:
            found.setdefault(edit.name, []).append((i, edit))
    return found


@dataclass(frozen=True)
class Plan:
    """All cells of a sweep, with the axes that they are laid out on."""

    axes: tuple[str, ...]
    labels: Mapping[str, Sequence[Any]]
    sizes: tuple[int, ...]
    cells: tuple[Cell, ...]
    title: str

    def say(self, cell: Cell) -> str:
        """`plan.say(cell)`: "layer 3, pos 5", a cell as a person would name it."""
        names = (
            f"{axis} {self.labels[axis][i] if axis in NAMED and axis in self.labels else i}"
            for axis, i in zip(self.axes, cell.place, strict=True)
        )
        return ", ".join(names)

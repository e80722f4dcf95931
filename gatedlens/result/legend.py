"""Legend: what stands along the axes of a labelled tensor, and what of it is left when entries are picked.

    Legend.of("Implicit attention, layer 1", "batch dst src", (1, 5, 5), words=A.words)
    legend.picked(0)                   # axes dst src, of row 0: their labels are that row's tokens
    legend.labels                      # {"dst": [...], "src": [...]}

Positions of a batch are called by the tokens of a row, so they have labels once a row is chosen, or where there is but one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

POSITIONS = ("dst", "src", "pos")  # axes that are called by tokens


@dataclass(frozen=True)
class Legend:
    """`places` are the entries of each axis that are left, by their numbers in the whole; `said` what they are called, for
    axes that are no positions; `words` the tokens of a row of the batch; `row` the row that was chosen."""

    title: str
    axes: tuple[str, ...]
    places: tuple[Sequence[int], ...]
    said: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    words: Callable[[int], Sequence[str]] | None = None
    row: int | None = None

    @classmethod
    def of(
        cls,
        title: str,
        axes: str,
        shape: Sequence[int],
        said: Mapping[str, Sequence[Any]] | None = None,
        words: Callable[[int], Sequence[str]] | None = None,
    ) -> Legend | None:
        """Of a whole tensor; None where the axes are not those of its shape."""
        names = tuple(axes.split())
        return cls(title, names, tuple(map(range, shape)), said or {}, words) if len(names) == len(shape) else None

    @property
    def labels(self) -> dict[str, list[Any]]:
        """What stands along each axis, where it has names."""
        row = self.row
        if row is None and "batch" in self.axes:
            rows = self.places[self.axes.index("batch")]
            row = rows[0] if len(rows) == 1 else None
        found = {}
        for axis, places in zip(self.axes, self.places, strict=True):
            names = self.words(row) if axis in POSITIONS and self.words and row is not None else self.said.get(axis)
            if names is not None:
                found[axis] = [names[i] for i in places]
            elif list(places) != list(range(len(places))):
                found[axis] = list(places)
        return found

    def picked(self, index: Any) -> Legend | None:
        """The legend behind `tensor[index]`; None where the index is no number, slice or list an axis."""
        given = list(index) if isinstance(index, tuple) else [index]
        for at, one in enumerate(given):
            if one is Ellipsis:
                given[at : at + 1] = [slice(None)] * (len(self.axes) - len(given) + 1)
                break
        if len(given) > len(self.axes) or any(one is None for one in given):
            return None
        given += [slice(None)] * (len(self.axes) - len(given))
        out, axes, places, lists, numbers = self, [], [], 0, 0
        for axis, own, one in zip(self.axes, self.places, given, strict=True):
            if isinstance(one, slice):
                axes.append(axis)
                places.append(own[one])
                continue
            asked = torch.as_tensor(one, dtype=torch.long if isinstance(one, list) and not one else None)
            lists, numbers = lists + (asked.ndim > 0), numbers + (asked.ndim == 0)
            if (
                asked.ndim > 1 or lists > 1 or (lists and numbers)
            ):  # a list beside a number may move its axis to the front
                return None
            chosen = torch.arange(len(own))[asked.cpu()]
            if chosen.ndim == 0:
                out = out._without(axis, own[int(chosen)], len(own))
                continue
            axes.append(axis)
            places.append([own[i] for i in chosen.tolist()])
        return replace(out, axes=tuple(axes), places=tuple(places))

    def _without(self, axis: str, place: int, size: int) -> Legend:
        """One entry of an axis is meant: the title says which, unless there is but one."""
        if axis == "batch":
            return replace(self, title=self.title + (f", row {place}" if size > 1 else ""), row=place)
        names, own = self.labels.get(axis), self.places[self.axes.index(axis)]
        called = place if names is None else names[list(own).index(place)]
        return replace(self, title=self.title + (f", {axis} {called}" if size > 1 else ""))

"""Answer: what a command has found: data for --json, and what a person is shown.

    Answer({"layer": 0}, ["layer 0:", table("token value", [["whale", "0.21"]])])

Lines are printed as they are; tables fit the terminal, also where the output goes through a pipe. A cell is a word or a number.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gatedlens.markup import number

if TYPE_CHECKING:
    from rich.table import Table

UNKNOWN = 100  # columns, where nothing says how wide the terminal is


@dataclass(frozen=True)
class Answer:
    """data: what --json prints; shown: lines and rich's tables for a person; failed: whether the exit status is 1."""

    data: Mapping[str, Any]
    shown: Sequence[Any] = ()
    failed: bool = False
    files: Sequence[str] = field(default=())  # that were written, told at the end

    def show(self) -> None:
        """Print what a person is shown."""
        from rich.console import Console

        console = Console(width=width(), highlight=False, markup=False, emoji=False)
        for one in (*self.shown, *self.files):
            console.print(one, soft_wrap=isinstance(one, str))


def width() -> int:
    """The columns of the terminal; of a pipe those of the terminal at its end, if there is one."""
    told = os.environ.get("COLUMNS", "")
    if told.isdigit() and int(told) > 0:
        return int(told)
    for stream in (sys.__stdout__, sys.__stderr__, sys.__stdin__):
        with suppress(OSError, ValueError, AttributeError):
            columns = os.get_terminal_size(stream.fileno()).columns  # type: ignore[union-attr]
            if columns:
                return columns
    return UNKNOWN


def table(columns: str, rows: Iterable[Sequence[Any]], title: str = "") -> Table:
    """`table("token position value", rows)`: floats with 4 figures, numbers to the right."""
    from rich import box
    from rich.table import Table

    listed = [list(row) for row in rows]
    found = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD)
    for place, name in enumerate(columns.split()):
        numbers = all(isinstance(row[place], int | float) for row in listed)
        found.add_column(name.replace("_", " "), justify="right" if numbers else "left", overflow="fold")
    for row in listed:
        found.add_row(*(number(cell, sign="+") if isinstance(cell, float) else str(cell) for cell in row))
    return found


def cells(tops: Iterable[Mapping[str, Any]], axes: Sequence[str]) -> list[list[Any]]:
    """`cells(result.top(5), result.axes)`: a row of a table for each: where it is, and its value; a token with its place."""

    def where(cell: Mapping[str, Any], axis: str) -> Any:
        said = cell.get(f"{axis}_label", cell[axis])
        return f"{said!r} at {cell[axis]}" if axis in ("pos", "src") and isinstance(said, str) else said

    return [[*(where(cell, axis) for axis in axes), cell["value"]] for cell in tops]

"""HookTable: the hook points of a model as a table that prints, renders in a notebook, and turns into data."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from gatedlens.address.point import Point
from gatedlens.errors import PointError, did_you_mean, in_bytes

if TYPE_CHECKING:  # pandas and rich are imported where a table is shown
    from pandas import DataFrame
    from rich.table import Table
else:
    DataFrame = Table = Any

COLUMNS = ("name", "axes", "shape", "equation", "source", "lazy", "bytes_per_token")


class HookTable:
    """`model.hook_table()`: iterate it for dicts, print it, show it, or `to_dataframe()` it.

    `bytes_per_token` counts one position of one row in the model's dtype (decay, write and state: at least float32);
    None for a point without a position axis.
    """

    def __init__(self, title: str, points: Mapping[str, Point], sizes: Mapping[str, int], itemsize: int):
        self.title = title
        self.rows = [_row(name, point, sizes, itemsize) for name, point in points.items()]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> dict[str, Any]:
        """The row of one point by its full name."""
        found = next((row for row in self.rows if row["name"] == name), None)
        if found is None:
            known = [row["name"] for row in self.rows]
            raise PointError(f"{name!r} is no row of this table.{did_you_mean(str(name), known)}")
        return found

    def to_dataframe(self) -> DataFrame:
        """`model.hook_table().to_dataframe()`: a pandas DataFrame, one row a point."""
        import pandas

        return pandas.DataFrame(self.rows, columns=list(COLUMNS))

    def __rich__(self) -> Table:
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=self.title, title_justify="left")
        for column in ("name", "axes", "shape", "equation", "bytes/token"):
            table.add_column(column, overflow="fold", no_wrap=column == "name")
        for row in self.rows:
            name = f"{row['name']} (lazy)" if row["lazy"] else row["name"]
            cells = (name, row["axes"], _shape(row["shape"]), row["equation"], _size(row["bytes_per_token"]))
            table.add_row(*map(escape, cells))
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=140)
        with console.capture() as capture:
            console.print(self.__rich__())
        return capture.get()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = "".join(f"<th style='text-align:left'>{c}</th>" for c in COLUMNS)
        body = ""
        for row in self.rows:
            cells = {**row, "shape": _shape(row["shape"]), "bytes_per_token": _size(row["bytes_per_token"])}
            body += "<tr>" + "".join(f"<td style='text-align:left'>{html.escape(str(cells[c]))}</td>" for c in COLUMNS)
            body += "</tr>"
        return f"<table><caption>{html.escape(self.title)}</caption><tr>{head}</tr>{body}</table>"


def _row(name: str, point: Point, sizes: Mapping[str, int], itemsize: int) -> dict[str, Any]:
    wide = max(itemsize, 4) if point.lazy and "state" in point.dims else itemsize
    known = {"key_pos": 1, **sizes}
    per_token = wide * point.elements(known, batch=1, pos=1) if "pos" in point.dims else None
    return {
        "name": name,
        "axes": point.axes,
        "shape": point.shape(sizes),
        "equation": point.equation,
        "source": point.source,
        "lazy": point.lazy,
        "bytes_per_token": per_token,
    }


def _shape(shape: tuple[int | str, ...]) -> str:
    return "[" + ", ".join(str(s) for s in shape) + "]"


def _size(n: int | None) -> str:
    return "-" if n is None else in_bytes(n)

"""ScoreTable: methods down, numbers across, each with its interval.

    table["lrp", "positive accuracy"]          # Estimate(value, low, high)
    print(table); table.to_dataframe(); table.to_dict(); table.markdown(); table.save("table.json")

In a notebook it shows itself. The best of each column stands out; intervals are 95 %, bootstrap over samples.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gatedlens.errors import InputError, did_you_mean
from gatedlens.foreign import DataFrame, Table
from gatedlens.result.bootstrap import Estimate


class ScoreTable:
    """rows: method -> column -> Estimate; better: column -> "up" or "down"."""

    def __init__(self, title: str, rows: Mapping[str, Mapping[str, Estimate]], better: Mapping[str, str]):
        self.title = title
        self.rows = {method: dict(columns) for method, columns in rows.items()}
        self.better = dict(better)

    @property
    def columns(self) -> list[str]:
        return list(self.better)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, where: tuple[str, str]) -> Estimate:
        method, column = where
        for word, known in ((method, self.rows), (column, self.better)):
            if word not in known:
                raise InputError(f"There is no {word!r} in this table.{did_you_mean(word, known)}")
        return self.rows[method][column]

    def best(self, column: str) -> str:
        """`table.best("AUAC")`: the method with the best number."""
        sign = 1 if self.better[column] == "up" else -1
        known = {method: row[column].value for method, row in self.rows.items() if column in row}
        return max(known, key=lambda method: sign * known[method])

    def heads(self) -> dict[str, str]:
        """`table.heads()`: each column with an arrow to where it is better."""
        return {column: f"{column} {'↑' if better == 'up' else '↓'}" for column, better in self.better.items()}

    # -- as something else ---------------------------------------------------------------------------------------

    def to_dataframe(self) -> DataFrame:
        """`table.to_dataframe()`: a pandas DataFrame: one row a method and column, with value, low and high."""
        import pandas

        return pandas.DataFrame(self._cells())

    def _cells(self) -> list[dict[str, Any]]:
        return [
            {"method": method, "metric": column, "better": self.better[column], **found._asdict()}
            for method, row in self.rows.items()
            for column, found in row.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """`table.to_dict()`: as JSON holds it; an end of an interval that does not exist is None."""
        return {"title": self.title, "cells": nan_as_none(self._cells())}

    def save(self, path: str | Path) -> Path:
        """`table.save("table.json")`: write JSON, and return the path."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        return Path(path)

    def brief(self) -> Table:
        """`table.brief()`: for `rich`, without intervals: narrow enough for a terminal."""
        return self._rich(intervals=False)

    def _shown(self, bold: tuple[str, str], intervals: bool = True) -> list[list[str]]:
        """Rows of cells; the best of each column between the two strings of `bold`."""
        best = {
            column: self.best(column) for column in self.columns if any(column in row for row in self.rows.values())
        }
        out = []
        for method, row in self.rows.items():
            cells = [method]
            for column in self.columns:
                text = cell(row[column], intervals) if column in row else "-"
                cells.append(f"{bold[0]}{text}{bold[1]}" if best.get(column) == method else text)
            out.append(cells)
        return out

    def markdown(self) -> str:
        """`table.markdown()`: a Markdown table, each number with its interval, the best of a column bold."""
        heads = ["method", *self.heads().values()]
        lines = [heads, ["---"] * len(heads), *self._shown(("**", "**"))]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def _repr_html_(self) -> str:
        head = "".join(
            f"<th style='text-align:left;padding:2px 8px'>{html.escape(h)}</th>"
            for h in ["method", *self.heads().values()]
        )
        body = ""
        for cells in self._shown(("<b>", "</b>")):
            first, rest = html.escape(cells[0]), cells[1:]
            body += "<tr>" + "".join(f"<td style='padding:2px 8px'>{c}</td>" for c in (first, *rest)) + "</tr>"
        return (
            f"<table><caption style='text-align:left'>{html.escape(self.title)}</caption><tr>{head}</tr>{body}</table>"
        )

    def __rich__(self) -> Any:
        return self._rich(intervals=True)

    def _rich(self, intervals: bool) -> Any:
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=self.title, title_justify="left")
        table.add_column("method", overflow="fold")
        for head in self.heads().values():
            table.add_column(head, justify="right")
        for cells in self._shown(("\0", "\1"), intervals):
            table.add_row(*(escape(c).replace("\0", "[bold]").replace("\1", "[/]") for c in cells))
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=60 + 28 * len(self.columns))
        with console.capture() as capture:
            console.print(self.__rich__())
        return capture.get()

    __repr__ = __str__


def cell(found: Estimate, intervals: bool = True) -> str:
    """`0.173 [0.151, 0.196]`, three figures each."""
    ends = "" if math.isnan(found.low) or not intervals else f" [{found.low:.3g}, {found.high:.3g}]"
    return f"{found.value:.3g}{ends}"


def nan_as_none(value: Any) -> Any:
    """Lists and dicts with None for NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: nan_as_none(one) for key, one in value.items()}
    if isinstance(value, list):
        return [nan_as_none(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value

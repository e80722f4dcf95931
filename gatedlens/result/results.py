"""Results: a dict of Results by name, where one call gives several.

found = gl.circuits.attribution_patch(model, clean, corrupted, metric)
found["mixer.hook_gate"]                     # a Result
found.top(5)                                 # the strongest cells of all: {"name": "mixer.hook_gate", "layer": 1, ...}
found.to_dataframe(); found.plot()           # of all; the strongest cell of each
found.save("found.json"); gl.Results.load("found.json")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gatedlens.errors import PointError, did_you_mean
from gatedlens.files import Fields, read_json, write_json
from gatedlens.foreign import Axes, DataFrame, Figure
from gatedlens.markup import card, picture, table
from gatedlens.options import checked
from gatedlens.result.result import Result
from gatedlens.result.rounding import figures

FORMAT = 1  # of the JSON
STRONGEST = 8  # rows of a notebook's table


class Results(dict[str, Result]):
    """A dict like any other."""

    def __missing__(self, name: str) -> Result:
        raise PointError(
            f"There is no result of {name!r}.{did_you_mean(str(name), self)} They are of {', '.join(self)}."
        )

    @checked
    def top(self, n: int = 10, signed: bool = False) -> list[dict[str, Any]]:
        """`found.top(5)`: the strongest cells of all, as in `Result.top`, each with the `name` of its result."""
        cells = [{"name": name, **cell} for name, one in self.items() for cell in one.top(n, signed)]

        def size(cell: dict[str, Any]) -> float:
            far = cell["value"] - self[cell["name"]].baseline
            return -float(figures(torch.tensor(far if signed else abs(far))))

        return sorted(cells, key=size)[:n]

    def strongest(self) -> Result:
        """`found.strongest().plot()`: the strongest cell of each, a Result with one axis, name."""
        best = [(one.top(1) or [{"value": torch.nan}])[0]["value"] for one in self.values()]
        first = next(iter(self.values()))
        title = f"{first.title.partition(':')[0]}: the strongest cell of each"
        return Result(torch.tensor(best, dtype=torch.float64), ("name",), {"name": list(self)}, title, first.value)

    def to_dataframe(self) -> DataFrame:
        """`found.to_dataframe()`: a pandas DataFrame: those of all results below one another, behind a column name."""
        import pandas

        frames = []
        for name, one in self.items():
            frame = one.to_dataframe()
            frame.insert(0, "name", name)
            frames.append(frame)
        return pandas.concat(frames, ignore_index=True) if frames else pandas.DataFrame()

    @checked
    def plot(self, ax: Axes | None = None, backend: str = "matplotlib") -> Figure:
        """`found.plot()`: a matplotlib Figure: the strongest cell of each; `found[name].plot()` draws one."""
        return self.strongest().plot(ax, backend)

    @checked
    def save(self, path: str | Path) -> Path:
        """`found.save("found.json")`: write JSON, and return the path."""
        return write_json(path, {"format": FORMAT, "results": {name: one.to_dict() for name, one in self.items()}})

    @classmethod
    @checked
    def load(cls, path: str | Path) -> Results:
        """`Results.load("found.json")`: what `save` wrote; InputError for any other file."""
        told = Fields(read_json(path, "results"), "results", path)
        told.format(FORMAT)
        return cls({n: Result.from_dict(one, f"{path}, {n!r},") for n, one in told.fields("results").items()})

    def __repr__(self) -> str:
        return f"Results({len(self)}: {', '.join(list(self)[:3])}{', ...' * (len(self) > 3)})"

    def _repr_html_(self) -> str:
        cells = self.top(STRONGEST)
        rows = [
            (cell["name"], ", ".join(f"{k} {v}" for k, v in cell.items() if k not in ("name", "value")), cell["value"])
            for cell in cells
        ]
        drawn = picture(self.plot) if self else ""
        return card(f"Results: {len(self)}", {}, table(["name", "cell", "value"], rows), drawn)

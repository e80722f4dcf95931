"""Result: numbers on named axes, with labels for what stands along them.

    result.values                      # a tensor [layer, pos]
    result.axes, result.labels         # ("layer", "pos"), {"layer": [0, 1], "pos": ["<bos>", "D", ...]}
    result.at(layer=1)["pos"]          # a Result with the axis gone; labels by axis name
    result.top(5)                      # the strongest cells, as {"layer": 1, "pos": 7, "pos_label": "3", "value": 0.98}
    result.plot(); result.to_dataframe(); result.save("result.json"); Result.load("result.json")

What sweeps, knockouts, traces and attributions give back. It also stands wherever a tensor does: `result[0, 3]`,
`result - 1`, `result.max()`, `torch.allclose(result, other)`, `torch.as_tensor(result)` see `values` (`tensorlike.py`).
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from gatedlens.errors import InputError, did_you_mean
from gatedlens.files import Fields, is_number, read_json, write_json, write_whole
from gatedlens.foreign import Axes, DataFrame, Figure
from gatedlens.markup import card, picture, table
from gatedlens.options import checked, is_whole
from gatedlens.result.rounding import figures
from gatedlens.result.tensorlike import Tensorlike

FORMAT = 1  # of the JSON
STRONGEST, SHOWN = 5, 100_000  # cells in a notebook's table, and of a result that shows its picture there
R = TypeVar("R", bound="Result")


@dataclass(frozen=True, eq=False)
class Result(Tensorlike):
    """`Result(values, ("layer", "pos"), title="...", value="normalised logit difference")`.

    labels: for an axis, what stands along it (numbers where none are given). title: what was done. value: what a number
    is, with its unit. facts: whatever else makes the numbers readable later (model, baselines, options), JSON-able; a
    "baseline" among them is what a number would be if nothing had been done, and what sizes and colours are measured from.
    """

    values: Tensor
    axes: tuple[str, ...]
    labels: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    title: str = ""
    value: str = "value"
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.values.ndim != len(self.axes):
            raise InputError(
                f"values have shape {list(self.values.shape)} and the axes are {self.axes}: one name a dim."
            )
        for axis, labels in self.labels.items():
            if len(labels) != self.size(axis):
                raise InputError(f"{len(labels)} labels for the {self.size(axis)} entries of axis {axis!r}.")

    # -- a tensor ------------------------------------------------------------------------------------------------

    def __getitem__(self, index: Any) -> Any:
        """`result["pos"]`: the labels of an axis; any other index is one into `values`."""
        if isinstance(index, str):
            size = self.size(index)
            return list(self.labels.get(index, range(size)))
        return self.values[index]

    # -- by name -------------------------------------------------------------------------------------------------

    @checked
    def dim(self, axis: str) -> int:
        """`result.dim("layer")`: which dim of `values` an axis is."""
        if axis not in self.axes:
            raise InputError(f"This result has no axis {axis!r}; its axes are {', '.join(self.axes)}.")
        return self.axes.index(axis)

    @checked
    def size(self, axis: str) -> int:
        """`result.size("layer")`: how many entries an axis has."""
        return self.values.shape[self.dim(axis)]

    @checked
    def place(self, axis: str, label: object) -> int:
        """`result.place("layer", 3)`: the index of a label; a number that is no label is an index, negative ones from the
        end.

        Where every label is a number, as on the axis of layers, it must be one of them: layer 2 is never the third of
        the layers 0, 1 and 3.
        """
        labels = self[axis]
        if labels.count(label) == 1:
            return labels.index(label)
        least = -len(labels)
        most = 0 if all(isinstance(one, int) for one in labels) else len(labels)
        if isinstance(label, int) and least <= label < most:
            return label % len(labels)
        why = "stands there more than once: give its index" if label in labels else "is not there"
        hint = did_you_mean(str(label), map(str, labels)) if label not in labels else ""
        raise InputError(f"{axis}={label!r} {why}; the axis holds {labels[:12]}{' ...' * (len(labels) > 12)}.{hint}")

    def at(self, **where: Any) -> Result:
        """`result.at(layer=3, pos="D")`: one entry of some axes, which are gone afterwards."""
        out = self
        for axis, label in where.items():
            values = out.values.select(out.dim(axis), out.place(axis, label))
            out = out._without(axis, values)
        return out

    def mean_over(self, *axes: str) -> Result:
        """`result.mean_over("batch")`: the mean along some axes, which are gone afterwards."""
        out = self
        for axis in axes:
            out = out._without(axis, out.values.mean(out.dim(axis)))
        return out

    def some(self, **where: slice | Sequence[int]) -> Result:
        """`result.some(pos=slice(-40, None), layer=[3, 4])`: some entries of axes, by their numbers, which stay axes."""
        out = self
        for axis, chosen in where.items():
            every = range(out.size(axis))
            if not isinstance(chosen, slice) and not all(is_whole(i) and -len(every) <= i < len(every) for i in chosen):
                raise InputError(
                    f"some({axis}={chosen!r}): entries are numbers from 0 to {len(every) - 1}, or a slice."
                )
            kept = list(every[chosen]) if isinstance(chosen, slice) else [every[i] for i in chosen]
            values = out.values.index_select(out.dim(axis), torch.tensor(kept, dtype=torch.long, device=out.device))
            labels = out[axis]
            out = replace(out, values=values, labels={**out.labels, axis: [labels[i] for i in kept]})
        return out

    def _titled(self, title: str) -> Result:
        return replace(self, title=title)

    def _without(self, axis: str, values: Tensor) -> Result:
        labels = {name: given for name, given in self.labels.items() if name != axis}
        return replace(self, values=values, axes=tuple(a for a in self.axes if a != axis), labels=labels)

    @property
    def baseline(self) -> float:
        """What a number would be if nothing had been done."""
        return float(self.facts.get("baseline", 0.0))

    @checked
    def top(self, n: int = 10, signed: bool = False) -> list[dict[str, Any]]:
        """`result.top(3)`: the `n` cells that are farthest from the baseline (0 if there is none; or, `signed`, above it),
        best first; NaN (not
        measured) is left out. What agrees in five figures, as what differs by rounding does, stands in the order of the cells.
        """
        flat = self.values.detach().double().flatten() - self.baseline
        size = figures(flat if signed else flat.abs())
        best = size.nan_to_num(-torch.inf, torch.inf, -torch.inf).argsort(descending=True, stable=True)
        return [self._cell(int(i)) for i in best[~flat[best].isnan()][:n]]

    def _cell(self, flat: int) -> dict[str, Any]:
        cell: dict[str, Any] = {}
        for axis, i in zip(self.axes, torch.unravel_index(torch.tensor(flat), self.values.shape), strict=True):
            label = self[axis][int(i)]
            cell[axis] = int(i)
            if label != int(i):
                cell[f"{axis}_label"] = label
        return {**cell, "value": float(self.values.flatten()[flat])}

    # -- as something else ---------------------------------------------------------------------------------------

    def to_dataframe(self) -> DataFrame:
        """`result.to_dataframe()`: a pandas DataFrame: one row a cell, a column an axis (and one for its labels), and
        `value`.
        """
        import pandas

        return pandas.DataFrame([self._cell(i) for i in range(self.values.numel())])

    def to_dict(self) -> dict[str, Any]:
        """`result.to_dict()`: all of it as JSON holds it; NaN (not measured) becomes None."""
        return {
            "format": FORMAT,
            "title": self.title,
            "value": self.value,
            "axes": list(self.axes),
            "labels": {axis: list(labels) for axis, labels in self.labels.items()},
            "shape": list(self.values.shape),
            "values": [None if v != v else v for v in self.values.detach().double().flatten().tolist()],
            "facts": dict(self.facts),
        }

    @classmethod
    @checked
    def from_dict(cls: type[R], data: object, where: str | Path = "This") -> R:
        """`Result.from_dict(data)`: the Result of a `to_dict()`; its values are float64. InputError names the field that
        is not as it should be.
        """
        fields = Fields(data, "result", where)
        fields.format(FORMAT)
        shape, numbers, axes = fields.sizes("shape"), fields.numbers("values"), fields.words("axes")
        fields.check(len(numbers) == math.prod(shape), "values", f"{math.prod(shape)} numbers, for the shape {shape}")
        fields.check(len(axes) == len(shape), "axes", f"a name for each of the {len(shape)} dims of the shape {shape}")
        labels = fields.fields("labels")
        for axis, size in labels.items():
            fits = axis in axes and isinstance(size, list) and len(size) == shape[axes.index(axis)]
            fields.check(fits, "labels", f"for some of the axes {axes} as many labels as the shape {shape} has entries")
        facts = fields.fields("facts")
        fields.check(is_number(facts.get("baseline", 0.0)), "facts", "a number as its baseline")
        values = torch.tensor([torch.nan if v is None else v for v in numbers], dtype=torch.float64).reshape(shape)
        return cls(values, tuple(axes), dict(labels), fields.word("title"), fields.word("value"), dict(facts))

    @checked
    def save(self, path: str | Path) -> Path:
        """`result.save("sweep.json")`: write it, and return the path: `.json` (all of it, what `load` reads) or `.csv`
        (its cells, as `to_dataframe`).
        """
        suffix = Path(path).suffix.lower()
        if suffix not in ("", ".json", ".csv"):
            raise InputError(
                f"save({str(path)!r}): a result is written as .json (what `load` reads) or .csv, not {suffix}."
            )
        return self._write_cells(Path(path)) if suffix == ".csv" else write_json(path, self.to_dict())

    def _write_cells(self, path: Path) -> Path:
        columns = [name for axis in self.axes for name in ((axis, f"{axis}_label") if axis in self.labels else (axis,))]
        text = io.StringIO(newline="")
        rows = csv.DictWriter(text, [*columns, "value"])
        rows.writeheader()
        for i in range(self.values.numel()):
            cell = self._cell(i)
            rows.writerow(
                {
                    **{name: cell.get(name, cell.get(name.removesuffix("_label"))) for name in columns},
                    "value": cell["value"],
                }
            )
        write_whole(path, text.getvalue().encode())
        return path

    @classmethod
    @checked
    def load(cls: type[R], path: str | Path) -> R:
        """`Result.load("sweep.json")`: what `save` wrote as JSON; InputError for any other file."""
        return cls.from_dict(read_json(path, "result"), path)

    def plot(self, ax: Axes | None = None, backend: str = "matplotlib", **some: slice | Sequence[int]) -> Figure:
        """`result.plot(pos=slice(-40, None))`: a matplotlib Figure: bars for one axis, a heat map for two, one heat map an entry
        of the first for three. some: entries of axes, as in `some`. backend: "plotly" for a figure to hover over.
        """
        from gatedlens.plot import results

        return results.result(self.some(**some), ax, backend)

    def _repr_html_(self) -> str:
        return card(self.title or type(self).__name__, self._said(), self._table(), self._picture())

    def _said(self) -> dict[str, object]:
        """What stands below its title."""
        sizes = " x ".join(f"{axis} {size}" for axis, size in zip(self.axes, self.values.shape, strict=True))
        about = {key: said for key, said in self.facts.items() if key in ("model", "clean", "corrupted", "baseline")}
        return {"": f"{self.value} [{sizes or 'one number'}]", **about}

    def _table(self) -> str:
        """Its strongest cells."""
        if not self.axes:
            return table([self.value], [[float(self.values)]])
        ranks = self.facts.get("scale") == "log"  # of which the smallest are the best
        cells = replace(self, values=-self.values).top(STRONGEST, signed=True) if ranks else self.top(STRONGEST)
        alike = {axis for axis in self.axes if len({*map(str, self[axis])}) < self.size(axis)}

        def called(cell: Mapping[str, Any], axis: str) -> object:
            label = cell.get(f"{axis}_label", cell[axis])
            return f"{label} ({cell[axis]})" if axis in alike else label

        rows = [
            [*(called(cell, axis) for axis in self.axes), -cell["value"] if ranks else cell["value"]] for cell in cells
        ]
        return table([*self.axes, self.value], rows)

    def _picture(self) -> str:
        return picture(self.plot) if 1 <= len(self.axes) <= 3 and 0 < self.values.numel() <= SHOWN else ""

    def __repr__(self) -> str:
        axes = ", ".join(f"{axis} {size}" for axis, size in zip(self.axes, self.values.shape, strict=True))
        best = "; ".join(
            ", ".join(f"{key}={cell[key]!r}" for key in cell if key != "value") + f": {cell['value']:.4g}"
            for cell in self.top(3)
        )
        return f"Result({self.title!r}, {self.value}, [{axes}]; strongest {best})"

"""Bundle: several numbers of the same cells, each a tensor under its name; what profiles give back.

    found = gl.profiles.of_layer(A)
    found.half_life, found.sharpness               # tensors [batch], which know their axes
    found.results()["half_life"]                   # the same as Results: plots, JSON, data frames
    found.to_dataframe()                           # a row a cell, a column a number
    found.save("profile.json"); gl.profiles.Profile.load("profile.json"); found.plot("distance")

A bundle is a named tuple of labelled tensors (see `labelled_tensor.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from gatedlens.errors import InputError, did_you_mean
from gatedlens.files import Fields, read_json, write_json
from gatedlens.foreign import DataFrame, Figure
from gatedlens.markup import card, picture, table
from gatedlens.options import checked
from gatedlens.result.labelled_tensor import LabelledTensor, label_of, with_label
from gatedlens.result.legend import Legend
from gatedlens.result.result import Result

FORMAT = 1  # of the JSON
SHOWN = 2000  # cells of a field that shows its picture
B = TypeVar("B", bound="Bundle")


class Bundle:
    """What a named tuple of tensors is more than that. `last`: the axis that a field has behind those of the others, by field."""

    __slots__ = ()
    last: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def fields(cls) -> tuple[str, ...]:
        """`Profile.fields()`: the names of its tensors."""
        found: tuple[str, ...] = cls._fields  # type: ignore[attr-defined]
        return found

    def named(
        self: B,
        title: str,
        axes: str,
        said: Mapping[str, Sequence[Any]] | None = None,
        words: Callable[[int], Sequence[str]] | None = None,
    ) -> B:
        """`Profile(...).named("Profile, layer 3", "batch head", {"head": [0, 2]})`: the same, whose tensors know their axes."""
        fields = []
        for name, tensor in self._tensors().items():
            own = f"{axes} {self.last.get(name, '')}"
            plain = tensor.as_subclass(Tensor)
            legend = Legend.of(title, own, plain.shape, said, words)
            fields.append(with_label(plain, name.replace("_", " "), legend))
        return type(self)(*fields)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.fields()}

    def results(self) -> dict[str, Result]:
        """`profile.results()["half_life"]`: each field as a Result."""
        return {
            name: tensor.result() if isinstance(tensor, LabelledTensor) else _unnamed(name, tensor)
            for name, tensor in self._tensors().items()
        }

    def to_dataframe(self) -> DataFrame:
        """`profile.to_dataframe()`: a pandas DataFrame: a row a cell, a column an axis and a number.

        Of a field with an axis more than the others `results()[field].to_dataframe()` is one.
        """
        import pandas

        columns, rows = self._rows()
        return pandas.DataFrame(rows, columns=columns)

    def _rows(self) -> tuple[list[str], list[list[Any]]]:
        """The columns, and a row a cell, of the fields that are on the axes of most."""
        found = {name: one for name, one in self.results().items() if name not in self.last}
        first = next(iter(found.values()))
        labels = [first[axis] for axis in first.axes]
        cells = itertools.product(*labels)
        numbers = zip(*(one.values.detach().double().cpu().flatten().tolist() for one in found.values()), strict=True)
        return [*first.axes, *found], [[*cell, *values] for cell, values in zip(cells, numbers, strict=True)]

    @checked
    def plot(self, field: str | None = None) -> Figure:
        """`profile.plot("half_life")`: the figure of a field, as of any Result; None: of the first. InputError for one that is
        none.
        """
        name = self.fields()[0] if field is None else field
        if name not in self.fields():
            raise InputError(
                f"{name!r} is no field; they are {', '.join(self.fields())}.{did_you_mean(name, self.fields())}"
            )
        return self.results()[name].plot()

    @checked
    def save(self, path: str | Path) -> Path:
        """`profile.save("profile.json")`: write JSON, and return the path."""
        fields = {name: one.to_dict() for name, one in self.results().items()}
        return write_json(path, {"format": FORMAT, "kind": type(self).__name__, "fields": fields})

    @classmethod
    @checked
    def load(cls: type[B], path: str | Path) -> B:
        """`Profile.load("profile.json")`: what `save` wrote; its numbers are float64. InputError for any other file."""
        told = Fields(read_json(path, cls.__name__), cls.__name__, path)
        told.format(FORMAT)
        told.check(told.word("kind") == cls.__name__, "kind", repr(cls.__name__))
        fields = told.fields("fields")
        told.check(set(fields) == set(cls.fields()), "fields", f"the fields {', '.join(cls.fields())}")
        found = []
        for name in cls.fields():
            one = Result.from_dict(fields[name], f"{path}, field {name!r},")
            legend = Legend(one.title, one.axes, tuple(range(n) for n in one.values.shape), dict(one.labels))
            found.append(with_label(one.values, one.value, legend))
        return cls(*found)

    def __repr__(self) -> str:
        first = self.results()[self.fields()[-1]]
        sizes = ", ".join(f"{axis} {size}" for axis, size in zip(first.axes, first.values.shape, strict=True))
        return f"{type(self).__name__}({', '.join(self.fields())}: [{sizes}])"

    def _repr_html_(self) -> str:
        columns, rows = self._rows()
        first = self.results()[self.fields()[0]]
        small = 1 <= len(first.axes) <= 3 and 0 < first.values.numel() <= SHOWN
        drawn = picture(first.plot) if small else ""
        return card(first.title or type(self).__name__, {}, table(columns, rows), drawn)


def _unnamed(name: str, tensor: Tensor) -> Result:
    return Result(tensor, tuple(f"dim {i}" for i in range(tensor.ndim)), value=label_of(tensor) or name)

"""Ledger: the numbers of a sweep while it runs, in memory and in a file, and what they were measured on.

    ledger = Ledger(blank, n_cells, "sweep.json", identity)
    ledger.put((3, 5), value); ledger.save()           # the file is whole at any moment: the old one or the new
    ledger.result()                                    # a Result, NaN where nothing was measured yet

A file (or a Result) of an earlier, interrupted sweep is taken up if it is of the same one: `identity` is compared. What
it says is kept among the facts, as "run".
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from gatedlens.errors import InputError
from gatedlens.files import as_json, write_whole
from gatedlens.result.result import Result
from gatedlens.runs.stopping import NotSaved

AGAIN = "Give another path, or results=None to begin anew."


class Ledger:
    """blank: the Result with NaN for values, "metric" its first axis if it has one. results: a path to write to and take
    up, a Result to take up, or None. identity: everything that decides the numbers; asked for only if somebody may
    compare it, since it takes a moment."""

    def __init__(
        self, blank: Result, n_cells: int, results: Result | str | Path | None, identity: Callable[[], dict[str, Any]]
    ):
        self.blank = blank
        self.values = blank.values
        self.n_cells = n_cells
        self.done: set[tuple[int, ...]] = set()
        self.path = Path(results) if isinstance(results, str | Path) else None
        self._identity = identity
        self._run: dict[str, Any] | None = None
        self._saved = -1  # how many cells the file holds; it is written at once
        earlier = results if isinstance(results, Result) else None
        if self.path is not None and self.path.exists():
            earlier = Result.load(self.path)
        if earlier is not None:
            self._check(earlier)
        self.earlier = earlier

    # -- numbers -------------------------------------------------------------------------------------------------

    def _index(self, place: tuple[int, ...]) -> tuple[Any, ...]:
        return (slice(None), *place) if self.blank.axes[:1] == ("metric",) else place

    def put(self, place: tuple[int, ...], value: Tensor) -> None:
        """value: [metric rows], where the axes hold them."""
        index = self._index(place)
        self.values[index] = value.reshape(self.values[index].shape).to(self.values)
        self.done.add(place)

    def at(self, place: tuple[int, ...]) -> Tensor:
        """The numbers of a cell, in a row."""
        return self.values[self._index(place)].flatten()

    def take_up(self, place: tuple[int, ...]) -> bool:
        """Put what the earlier sweep measured there; whether it did."""
        if self.earlier is None:
            return False
        value = self.earlier.values[self._index(place)]
        if bool(value.isnan().any()):
            return False
        self.put(place, value)
        return True

    def result(self) -> Result:
        facts = {**self.blank.facts, "cells": self.n_cells, "measured": len(self.done)}
        if self._run is not None:
            facts["run"] = self._run
        return replace(self.blank, values=self.values.clone(), facts=facts)

    def resumable(self) -> Result:
        """The result so far, with what it was measured on."""
        assert self.run is not None
        return self.result()

    # -- what they were measured on ------------------------------------------------------------------------------

    @property
    def run(self) -> dict[str, Any]:
        if self._run is None:
            self._run = self._identity()
        return self._run

    def _check(self, earlier: Result) -> None:
        """InputError unless it is of the same sweep, up to functions, of which nobody can always say whether they are."""
        if not isinstance(earlier.facts.get("run"), Mapping):
            raise InputError(
                f"results ({earlier.title!r}) does not say what it was measured on, as an interrupted sweep's do: it "
                f"cannot be gone on with. {AGAIN}"
            )
        then, now = _said(earlier), _said(replace(self.blank, facts={**self.blank.facts, "run": self.run}))
        for name in now:
            if not _same(then.get(name), now[name]):
                raise InputError(
                    f"results is of another sweep: its {name} is {_short(then.get(name))}, this one's is "
                    f"{_short(now[name])}. {AGAIN}"
                )

    def surely_the_same(self) -> bool:
        """Whether the earlier sweep's functions are known to be this one's."""
        code = self.run["code"]
        return self.earlier is not None and code is not None and self.earlier.facts["run"].get("code") == code

    # -- the file ------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the file, if there is one and it lacks something; NotSaved if it cannot be."""
        if self.path is None or self._saved == len(self.done):
            return
        found = self.resumable()
        text = as_json(self.path, found.to_dict(), None if len(self.done) < self.n_cells else 1)
        try:
            write_whole(self.path, text.encode())
        except OSError as error:
            raise NotSaved(
                f"results={str(self.path)!r} cannot be written: {error.strerror or error}. What was there is as it was; "
                f"`results` of this error holds the {len(self.done)} of {self.n_cells} cells that were measured.",
                found,
            ) from error
        self._saved = len(self.done)

    def how_to_go_on(self) -> str:
        told = f"{len(self.done)} of {self.n_cells} cells were measured"
        if self.path is not None:
            return f"{told} and saved; the same call with results={str(self.path)!r} goes on."
        return f"{told}: `except gl.patching.Interrupted as stop`, then results=stop.results."


def _said(result: Result) -> dict[str, Any]:
    """What is compared, by the name that a refusal gives it, as JSON holds it."""
    labels = {f"axis {axis}": result[axis] for axis in result.axes}
    facts = {name: given for name, given in result.facts.items() if name not in ("cells", "measured", "run")}
    run = {name: given for name, given in result.facts["run"].items() if name != "code"}
    told = {"title": result.title, "axes": result.axes, "shape": list(result.shape), **labels, **facts, **run}
    plain: dict[str, Any] = json.loads(json.dumps(told))
    return plain


def _same(a: Any, b: Any) -> bool:
    """Equal; numbers to rounding, of batches of another size."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6) or (a != a and b != b)
    return bool(a == b)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"

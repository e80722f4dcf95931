"""Evaluation: what was measured of some methods on the samples of a data set, as tables, curves and JSON.

    found = gl.evaluation.evaluate(model, "digits", ["lrp", "rollout"], limit=100, out="out")
    print(found.table()); found.curve("lrp", "positive", "probability").plot(); found.save("results.json")

Areas of curves are trapezoids; intervals are 95 %, bootstrap over samples. How it is made: `run.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gatedlens.errors import InputError, did_you_mean
from gatedlens.evaluation.curves import Curve
from gatedlens.evaluation.data.sample import Samples
from gatedlens.evaluation.overlap import Segmentation
from gatedlens.evaluation.protocol import PROTOCOLS, as_curve, difference
from gatedlens.evaluation.records import Records
from gatedlens.evaluation.table import ScoreTable, nan_as_none
from gatedlens.result.bootstrap import Estimate, estimate

MEASURED = {"positive": ("accuracy", "probability"), "negative": ("accuracy", "probability"), "activation": ("probability",),
            "pruning": ("squared_error",), "deletion": ("probability",), "insertion": ("probability",)}  # fmt: skip
TRUTH = {"rank": "down", "mass": "up", "hit": "up"}
SEGMENTATION = ("pixel accuracy", "mAP", "mIoU")
COUNTS = ("correct", "labelled", "intersection", "union", "average_precision")


@dataclass(frozen=True)
class Evaluation:
    """The records of some samples and methods; `run` says what was run, `names` which samples by their indices."""

    run: Mapping[str, Any]
    methods: tuple[str, ...]
    names: Mapping[int, str]
    records: Records
    samples: Samples

    def rows(self, method: str) -> list[dict[str, Any]]:
        """`found.rows("lrp")`: the records of a method, in the order of the samples."""
        if method not in self.methods:
            raise InputError(
                f"{method!r} was not evaluated; these were: {', '.join(self.methods)}.{did_you_mean(method, self.methods)}"
            )
        return [self.records[name, method] for name in self.names.values()]

    @property
    def shown(self) -> list[int]:
        """The indices of the samples whose scores were kept, of every method."""
        return [i for i, name in self.names.items() if all("scores" in self.records[name, m] for m in self.methods)]

    @property
    def protocols(self) -> list[str]:
        return list(self.rows(self.methods[0])[0]["curves"])

    def curve(self, method: str, protocol: str, measure: str | None = None) -> Curve:
        """`found.curve("lrp", "positive")`: the Curve of a method; `measure`: the protocol's own if None."""
        if protocol not in self.protocols:
            raise InputError(
                f"{protocol!r} was not measured; these were: {', '.join(self.protocols)}.{did_you_mean(protocol, self.protocols)}"
            )
        row = PROTOCOLS[protocol]
        measure = row.measure if measure is None else measure
        if measure not in MEASURED[protocol]:
            raise InputError(f"{protocol} has {' and '.join(MEASURED[protocol])}, not {measure!r}.")
        values = torch.tensor([one["curves"][protocol][measure] for one in self.rows(method)], dtype=torch.float64)
        facts = {"model": self.run["model"], "nothing": self.rows(method)[0]["nothing"][protocol], "method": method}
        return as_curve(values, row, measure, **facts)

    def segmentation(self, method: str) -> Segmentation | None:
        """`found.segmentation("lrp")`: the Segmentation over the samples that have masks; None if none has."""
        rows = [row for row in self.rows(method) if "segmentation" in row]
        if not rows:
            return None
        columns = {
            name: torch.tensor([row["segmentation"][name] for row in rows], dtype=torch.float64) for name in COUNTS
        }
        return Segmentation(**columns)

    def table(self) -> ScoreTable:
        """`found.table()`: every method, every number: areas of curves (trapezoid), segmentation, truth."""
        rows = {method: self._estimates(method) for method in self.methods}
        ways = {f"{p} {m}".replace("_", " "): PROTOCOLS[p].better for p in self.protocols for m in MEASURED[p]}
        if "insertion" in self.protocols:
            ways["insertion - deletion"] = "up"
        ways |= {**dict.fromkeys(SEGMENTATION, "up"), **TRUTH}
        better = {column: way for column, way in ways.items() if column in rows[self.methods[0]]}
        return ScoreTable(f"{self.run['model']} on {self.run['data']}, {len(self.names)} samples", rows, better)

    def _estimates(self, method: str) -> dict[str, Estimate]:
        rows = [row for row in self.rows(method) if "truth" in row]
        out = {f"{p} {m}".replace("_", " "): self.curve(method, p, m).area for p in self.protocols for m in MEASURED[p]}
        if "insertion" in self.protocols:
            out["insertion - deletion"] = difference(
                self.curve(method, "insertion"), self.curve(method, "deletion")
            ).area
        found = self.segmentation(method)
        out |= {} if found is None else found.estimates()
        if rows:
            out |= {name: estimate(torch.tensor([row["truth"][name] for row in rows])) for name in TRUTH}
        return out

    def to_dict(self) -> dict[str, Any]:
        """`found.to_dict()`: the run, the table and the mean curves, as JSON holds them."""
        both = [(p, m) for p in self.protocols for m in MEASURED[p]]
        curves = {
            method: {f"{p} {m}": [step._asdict() for step in self.curve(method, p, m).steps()] for p, m in both}
            for method in self.methods
        }
        shares = {p: list(PROTOCOLS[p].shares) for p in self.protocols}
        return nan_as_none(
            {
                "run": dict(self.run),
                "samples": list(self.names.values()),
                "shares": shares,
                "table": self.table().to_dict(),
                "curves": curves,
            }
        )

    def save(self, path: str | Path) -> Path:
        """`found.save("results.json")`: write JSON, and return the path."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        return Path(path)

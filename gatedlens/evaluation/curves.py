"""Curve: what is left of the answer as more and more is taken away (or put back), sample by sample.

    curve = gl.evaluation.perturbation(model, images, scores, labels)
    curve.values                        # sample share
    curve.average, curve.area           # over shares: mean, trapezoid; each value, low, high (95 %, bootstrap)
    curve.averages, curve.areas         # the same, sample by sample
    curve.plot(); curve.to_dataframe(); curve.save("curve.json"); Curve.load("curve.json")

area is the trapezoid over the shares as they are: of 10 to 90 % it is 0.8 at most, of 0 to 100 % it is 1 at most for an
accuracy or a probability. `Curve.joined([curve, ...])` puts the samples of several batches together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gatedlens.errors import InputError
from gatedlens.foreign import Axes, Figure
from gatedlens.result.bootstrap import Estimate, estimate
from gatedlens.result.result import Result

AXES = ("sample", "share")


@dataclass(frozen=True, eq=False, repr=False)
class Curve(Result):
    """A Result on the axes "sample share"; facts hold protocol, measure, better ("up" or "down"), nothing and model."""

    @property
    def shares(self) -> list[float]:
        return [float(share) for share in self["share"]]

    @property
    def better(self) -> str:
        """Which way a better explanation moves the curve: "up" or "down"."""
        return str(self.facts["better"])

    @property
    def averages(self) -> Float[Tensor, " sample"]:
        return self.values.mean(1)

    @property
    def areas(self) -> Float[Tensor, " sample"]:
        return torch.trapezoid(self.values, torch.tensor(self.shares, dtype=self.values.dtype), dim=1)

    @property
    def average(self) -> Estimate:
        return estimate(self.averages)

    @property
    def area(self) -> Estimate:
        return estimate(self.areas)

    def steps(self) -> list[Estimate]:
        """`curve.steps()`: the mean over samples at each share."""
        return [estimate(column) for column in self.values.T]

    @staticmethod
    def joined(curves: Sequence[Curve]) -> Curve:
        """`Curve.joined(curves)`: one curve of the samples of several, which were measured alike."""
        if not curves:
            raise InputError("There is no curve to join.")
        first = curves[0]
        if any(one.shares != first.shares or one.facts != first.facts for one in curves):
            raise InputError("These curves were not measured alike: their shares or facts differ.")
        labels = {"share": first["share"]}
        return replace(first, values=torch.cat([one.values for one in curves]), labels=labels)

    def plot(self, ax: Axes | None = None, backend: str = "matplotlib", **some: slice | Sequence[int]) -> Figure:
        """`curve.plot()`: the mean over samples, with its interval as a band. Returns the matplotlib Figure."""
        if self.axes != AXES or some or backend != "matplotlib":
            return super().plot(ax, backend, **some)
        from gatedlens.plot.drawing import plain
        from gatedlens.plot.sheet import sheet

        ax = sheet(5.0, 4.4) if ax is None else ax
        steps, said = self.steps(), self.title.replace("$", r"\$")  # a legend is the caller's, its math text may be on
        ax.plot(self.shares, [step.value for step in steps], marker=".", label=said)
        ax.fill_between(self.shares, [step.low for step in steps], [step.high for step in steps], alpha=0.2)
        plain(ax.set_xlabel("share"), ax.set_ylabel(self.value), ax.set_title(self.title))
        figure: Any = ax.figure
        return figure

    def __repr__(self) -> str:
        return (
            f"Curve({self.title!r}, {self.value}, {len(self.values)} samples, area {self.area}, better {self.better})"
        )

"""Fitting: the linear maps that scikit-learn fits, and how well one does on rows that it has not seen.

    kind       classes                                       numbers
    linear     logistic regression                           least squares
    ridge      least squares of +-1, penalty |w|^2           least squares, penalty |w|^2
    sparse     logistic regression, penalty |w|_1            least squares, penalty |w|_1

Each number is first divided by its standard deviation, which the weights then take in. Held-out scores are the accuracy, of
numbers R^2 = 1 - (what is left) / (variance), with 95 % intervals by the bootstrap over rows.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gatedlens.errors import InputError, did_you_mean
from gatedlens.files import optional
from gatedlens.probes.samples import Samples
from gatedlens.result.bootstrap import Estimate, estimate

KINDS = ("linear", "ridge", "sparse")


class Linear(NamedTuple):
    """A map of vectors [.., d] to `weight x + bias` [.., out]."""

    weight: Float[Tensor, "out d"]
    bias: Float[Tensor, " out"]

    def __call__(self, x: Float[Tensor, "*any d"]) -> Float[Tensor, "*any out"]:
        return x @ self.weight.to(x).mT + self.bias.to(x)


@dataclass(frozen=True)
class Recipe:
    """How a probe is fitted; `penalty` is what the weights' size costs (of logistic regression 1 / C)."""

    kind: str
    penalty: float
    held_out: float
    seed: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(
                f"kind={self.kind!r}: it is {', '.join(map(repr, KINDS))}.{did_you_mean(self.kind, KINDS)}"
            )
        if not 0 < self.penalty < float("inf"):
            raise InputError(f"penalty={self.penalty}: it is more than 0, and finite.")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed={self.seed}: give 0 to {2**32 - 1}.")
        if not 0 < self.held_out < 1:
            raise InputError(
                f"held_out={self.held_out}: it is the share of rows to test on, more than 0 and less than 1."
            )

    def fit(self, x: Float[Tensor, "entry d"], y: Int[Tensor, " entry"] | Float[Tensor, " entry"]) -> Linear:
        """`recipe.fit(x, y)`: the map; y whole numbers from 0 on are classes."""
        wide = x.double()
        if not bool(wide.isfinite().all()):
            off = int((~wide.isfinite()).any(1).sum())
            raise InputError(
                f"{off} of {len(wide)} vectors hold numbers that are not finite: no probe is fitted to them."
            )
        mean, scale = wide.mean(0), wide.std(0, correction=0)
        scale = torch.where(scale > 1e-12 * (1 + mean.abs()), scale, 1.0)
        model = self._estimator(not y.is_floating_point())
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message=".*(max_iter|converge).*"
            )  # its score says whether it is good enough
            model.fit(((wide - mean) / scale).cpu().numpy(), y.cpu().numpy())
        weight = torch.as_tensor(numpy.atleast_2d(model.coef_)).to(scale) / scale
        bias = torch.as_tensor(numpy.atleast_1d(model.intercept_)).to(scale) - weight @ mean
        return Linear(weight, bias)

    def _estimator(self, classes: bool) -> Any:
        linear = optional("sklearn.linear_model", "probes")
        if not classes:
            return {
                "linear": lambda: linear.LinearRegression(),
                "ridge": lambda: linear.Ridge(alpha=self.penalty),
                "sparse": lambda: linear.Lasso(alpha=self.penalty, random_state=self.seed),
            }[self.kind]()
        if self.kind == "ridge":
            return linear.RidgeClassifier(alpha=self.penalty)
        options: dict[str, Any] = {"C": 1 / self.penalty, "max_iter": 1000, "random_state": self.seed}
        if self.kind == "sparse":
            options |= {"solver": "saga", "l1_ratio": 1.0, "tol": 1e-3}
            # Before 1.8 the share of |w|_1 counts under this penalty alone; later the word is gone.
            said = inspect.signature(linear.LogisticRegression).parameters.get("penalty")
            options |= {"penalty": "elasticnet"} if said is not None and said.default == "l2" else {}
        return linear.LogisticRegression(**options)

    def split(self, samples: Samples, y: Tensor) -> Bool[Tensor, " entry"]:
        """`recipe.split(samples, y)`: True at the entries that are held out: whole rows, of every class its share."""
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(samples.rows, generator=generator)
        first = torch.zeros(samples.rows, dtype=torch.long)
        if not y.is_floating_point():
            first[samples.row.flip(0)] = y.flip(0)  # the label of each row's first entry
        there = torch.zeros(samples.rows, dtype=torch.bool)
        there[samples.row] = True
        test = torch.zeros(samples.rows, dtype=torch.bool)
        for one in first[there].unique():
            mine = order[((first == one) & there)[order]]
            test[mine[: round(len(mine) * self.held_out)]] = True
        held = test[samples.row]
        if not bool(held.any()) or bool(held.all()):
            raise InputError(
                f"held_out={self.held_out} of {int(there.sum())} rows leaves {int((~held).sum())} entries to fit to and "
                f"{int(held.sum())} to test on: give more rows."
            )
        return held


def as_numbers(labels: Sequence[Any]) -> tuple[Int[Tensor, " entry"] | Float[Tensor, " entry"], list[Any] | None]:
    """`as_numbers(["a", "b", "a"])`: ([0, 1, 0], ["a", "b"]); of floats ([0.5, ...], None), which a regression is of.

    InputError for a single class, and for numbers that are all the same or not finite.
    """
    if labels and all(isinstance(one, float) for one in labels):
        y = torch.tensor(labels, dtype=torch.float64)
        if not bool(y.isfinite().all()):
            raise InputError("Some labels are no finite numbers.")
        if bool((y == y[0]).all()):
            raise InputError(f"All labels are {labels[0]}: there is nothing to predict.")
        return y, None
    classes = sorted(set(labels), key=lambda one: (type(one).__name__, one))
    if len(classes) < 2:
        raise InputError(
            f"All labels are {classes[0]!r}: a probe tells two classes apart at least." if classes else "No labels."
        )
    number = {one: i for i, one in enumerate(classes)}
    return torch.tensor([number[one] for one in labels]), classes


def predicted(linear: Linear, x: Float[Tensor, "entry d"], classes: bool) -> Tensor:
    """`predicted(linear, x, True)`: the number of the class of each vector; of a regression its number."""
    out = linear(x.double())
    if not classes:
        return out[:, 0]
    return (out[:, 0] > 0).long() if out.shape[1] == 1 else out.argmax(1)


def held_out_score(linear: Linear, samples: Samples, y: Tensor, held: Bool[Tensor, " entry"]) -> Estimate:
    """`held_out_score(linear, samples, y, held)`: the accuracy, or R^2, with its interval over rows."""
    own, row, want = (
        predicted(linear, samples.x[held.to(samples.x.device)], not y.is_floating_point()).cpu(),
        samples.row[held],
        y[held],
    )
    numbers = row.unique(return_inverse=True)[1]

    def by_row(columns: Float[Tensor, "entry column"]) -> Float[Tensor, "row column"]:
        return torch.zeros(int(numbers.max()) + 1, columns.shape[1], dtype=torch.float64).index_add_(
            0, numbers, columns
        )

    one = torch.ones(len(want), dtype=torch.float64)
    if not y.is_floating_point():
        return estimate(by_row(torch.stack([(own == want).double(), one], 1)), lambda mean: mean[..., 0] / mean[..., 1])
    columns = by_row(torch.stack([(own - want).square(), want, want.square(), one], 1))

    def r2(mean: Tensor) -> Tensor:
        left, first, second, n = mean.unbind(-1)
        return 1 - left / (second - first.square() / n)

    return estimate(columns, r2)

"""Two runs: the input beside a reference, through a model under the rules of secants (`gatedlens.secant`).

    runs = TwoRuns.of(question, baseline=None, keep="read", steps=1)
    runs.relevance("blocks.2.hook_resid_pre")        # (a - a') M of every entry: sums to number(x) - number(x')
    with runs.on(model):                             # as `Rules.on`: values as they are, gradients under the rules
        logits = model(tokens, state=state)

The reference is what the baseline puts in at every position, while what is kept stays as it is. With several steps the way
between the two is cut into so many equal parts, each with a secant of its own: a run more for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy
import torch
from jaxtyping import Float
from torch import Tensor

from gatedlens import fused
from gatedlens.attribution.empty_input import Baseline, Keep, baseline_of, kept_places
from gatedlens.attribution.question import Question
from gatedlens.errors import InputError
from gatedlens.metrics import Logits, per_row
from gatedlens.model.base import HookedModel
from gatedlens.model.hookpoint import Capture
from gatedlens.recurrence.autocast import exact
from gatedlens.secant import RULES, Contrast, difference

NODES = 16  # of the integral that stands for the secant of a metric of the user's: the model itself has none


@dataclass(frozen=True)
class TwoRuns:
    """See the head of this file. `nodes`: the features of every run, the reference first and the input last."""

    question: Question
    nodes: tuple[Float[Tensor, "batch place d_model"], ...]
    said: str  # what the baseline is, in words
    rules: Mapping[str, Any]

    @staticmethod
    def of(
        question: Question,
        baseline: Baseline = None,
        keep: Keep = "read",
        steps: int = 1,
        rules: Mapping[str, Any] = RULES,
    ) -> TwoRuns:
        """`TwoRuns.of(question)`: options as in `secant`; rules: a table of your own (`gatedlens/secant/rules.py`)."""
        if steps < 1:
            raise InputError(f"steps={steps}: give at least 1.")
        x = question.features
        start, said = baseline_of(question, baseline)
        start = torch.where(kept_places(question, keep).unsqueeze(-1), x, start)
        between = (torch.lerp(start, x, step / steps) for step in range(1, steps))
        return TwoRuns(question, (start, *between, x), said, rules)

    @contextmanager
    def on(self, model: HookedModel) -> Iterator[Any]:
        """`with runs.on(model): ...`: what enters a forward is the contrast of all runs; values stay those of the input."""

        def enter(x: Tensor, hook: Any) -> Tensor:
            live = [node.to(x).clone().requires_grad_(torch.is_grad_enabled()) for node in self.nodes[1:]]
            return Contrast.of(live[-1], (self.nodes[0].to(x), *live[:-1]), self.rules)

        with fused.off(), model.hooks([(self.question.entrance, enter)]):
            yield model

    def traced(self, *names: str) -> Traced:
        """`runs.traced("blocks.1.hook_mixer_out")`: one forward of all runs, with what some points held."""
        values: dict[str, Tensor] = {}
        model, batch = self.question.model, self.question.batch
        with torch.enable_grad(), self.on(model), model.hooks([(name, Capture(values)) for name in names]):
            logits = model(batch)
        return Traced(self.question, logits, values)

    def relevance(self, *names: str) -> dict[str, Tensor]:
        """`runs.relevance("blocks.0.hook_resid_pre")`: by name, how much of number(x) - number(x') passes each entry."""
        return self.traced(*names).relevance()


@dataclass(frozen=True)
class Traced:
    """One forward of all runs: its logits, and what was noted at some points, by name."""

    question: Question
    logits: Tensor
    values: Mapping[str, Tensor]

    @property
    def measured(self) -> list[Float[Tensor, " batch"]]:
        """The number that is explained in every run, the reference's first."""
        with torch.no_grad():
            return [self._number(logits) for logits in _plain(self.logits)]

    def seeds(self) -> list[Tensor]:
        """Of every step d number / d logits: of a logit as it is, of a metric of the user's its mean on the straight line."""
        runs, found = _plain(self.logits), []
        for before, after in pairwise(runs):
            nodes, weights = numpy.polynomial.legendre.leggauss(1 if self.question.target.custom is None else NODES)
            total = torch.zeros_like(after)
            for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
                at = torch.lerp(before, after, float(node)).requires_grad_()
                with torch.enable_grad():
                    number = self._number(at).sum()
                if not number.requires_grad:
                    raise InputError(
                        "The metric does not depend on the input: it has no gradient. Does it detach, or count?"
                    )
                total += float(weight) * torch.autograd.grad(number, at)[0].as_subclass(Tensor)
            found.append(total)
        return found

    def gradients(self, outputs: list[Tensor], seeds: list[Tensor], *names: str) -> dict[str, list[Tensor]]:
        """Of every step the gradient at some points of what `outputs` are, weighed by `seeds`; the graph stays. A point that is
        the same in every run (it stands before the entrance, or no token is in it) gets none."""
        moving = [name for name in names if isinstance(self.values[name], Contrast) and self.values[name].requires_grad]
        flat = [run for name in moving for run in _runs(self.values[name])[1:]]
        with exact(outputs[-1]), torch._C.DisableTorchFunctionSubclass():
            found = torch.autograd.grad(outputs, flat, seeds, allow_unused=True, retain_graph=True)
            each = iter(torch.zeros_like(run) if g is None else g for run, g in zip(flat, found, strict=True))
        return {name: [next(each) for _ in seeds] for name in moving}

    def flows(self, *names: str) -> dict[str, list[Tensor]]:
        """Of every step M at some points: what a difference there is worth in the number."""
        return self.gradients(list(_runs(self.logits)[1:]), self.seeds(), *names)

    def relevance(self) -> dict[str, Tensor]:
        """(a - a') M at every noted point."""
        flows = self.flows(*self.values)
        return {name: self.between(name, flows.get(name, [])) for name in self.values}

    def between(self, name: str, flows: list[Tensor]) -> Tensor:
        """(a - a') M of given flows at a point, summed over steps."""
        value = self.values[name]
        if not isinstance(value, Contrast) or not flows:
            return torch.zeros_like(_plain(value)[-1])
        terms = [step * flow for step, flow in zip(difference(value), flows, strict=True)]
        return terms[0] if len(terms) == 1 else torch.stack(terms).sum(0)

    def _number(self, logits: Tensor) -> Float[Tensor, " batch"]:
        return per_row(self.question.target.metric, Logits.of(logits, self.question.batch.mask))


def _runs(x: Tensor) -> tuple[Tensor, ...]:
    return x.runs if isinstance(x, Contrast) else (x, x)


def _plain(x: Tensor) -> tuple[Tensor, ...]:
    return x.plain if isinstance(x, Contrast) else (x.detach(), x.detach())

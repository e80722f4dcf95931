"""Gradients of a metric at points, handed to listeners as the backward pass goes by.

    listen(pair, metric, {"blocks.0.hook_mixer_in": listener})           # listener(gradient) is called once
    hook = on_the_way(pair)(0.3)                                         # an input between corrupted (0) and clean (1)
    hook = between(pair)                                                 # both inputs at once: secants for gradients
    found = collected(pair, metric, blank, scores, facts, effort)        # many backward passes, which stop and go on

No gradient is kept, none of a parameter is computed, and nothing is left on the model: whoever listens adds up what it
needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from gatedlens.errors import InputError, did_you_mean
from gatedlens.metrics import Metric, name_of, per_row
from gatedlens.model.hookpoint import Saver
from gatedlens.recurrence.autocast import exact
from gatedlens.result.result import Result
from gatedlens.runs.baseline import EMBED
from gatedlens.runs.cells import Cell
from gatedlens.runs.engine import Effort, another_sweep, fill, identity_of
from gatedlens.runs.ledger import Ledger
from gatedlens.runs.pair import Pair
from gatedlens.secant import RULES, Contrast

Listener = Callable[[Tensor], None]


def approximate_rise(metric: Metric) -> str:
    """What a difference times a gradient is."""
    return f"approximate rise of the {name_of(metric)}"


class Passing(Function):
    """The identity; backward hands the gradient that passes to a listener.

    Every one hangs on `anchor`, a number of no effect: a backward pass to the anchor goes through all of them, and through
    nothing from which no listener can be reached (parameters, say).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, listener: Listener) -> Tensor:
        ctx.listener = listener
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.listener(grads[0])
        return grads[0], None, None


class _Listen(Saver):
    """The hook of one listener. A Saver, though it returns something: it edits nothing, so nothing need be copied."""

    def __init__(self, anchor: Tensor, listener: Listener):
        self.anchor = anchor
        self.listener = listener

    def __call__(self, tensor: Tensor, hook: Any) -> Any:
        return Passing.apply(tensor, self.anchor, self.listener)


def check_allowed() -> None:
    """`check_allowed()`: InputError under torch.inference_mode, whose tensors never have a gradient."""
    if torch.is_inference_mode_enabled():
        raise InputError(
            "Gradients are needed, and torch.inference_mode forbids them: leave it for this call (torch.no_grad is fine)."
        )


@contextmanager
def needed() -> Iterator[None]:
    """`with needed(): ...`: gradients are on, whatever they were before."""
    check_allowed()
    with torch.enable_grad():
        yield


def check_has_one(value: Tensor) -> None:
    """`check_has_one(metric(logits))`: InputError for a metric without a gradient."""
    if not value.requires_grad:
        raise InputError(
            "The metric has no gradient: it does not depend on the logits, or goes through argmax, a comparison, "
            "detach() or item(). A logit difference, a log probability or a KL divergence has one."
        )


def listen(pair: Pair, metric: Metric, listeners: Mapping[str, Listener], hooks: Sequence[Any] = ()) -> Tensor:
    """One forward of the corrupted input, under `hooks`, and one backward; the metric of that run, [batch].

    The metric is summed over rows, and rows do not see each other: each gradient is that of its own row's metric.
    """
    with needed():
        anchor = torch.zeros((), requires_grad=True, device=pair.corrupted.value.device)
        listening = [(name, _Listen(anchor, listener)) for name, listener in listeners.items()]
        value = per_row(metric, pair.run(pair.corrupted, [*hooks, *listening]))
        check_has_one(value)
        with exact(anchor):
            torch.autograd.grad(value.sum(), anchor, allow_unused=True)
    return value.detach()


def on_the_way(pair: Pair) -> Callable[[float], tuple[str, Callable[..., Tensor]]]:
    """share -> the hook that moves the corrupted input's embedding this share of the way to the clean one's.

    Gradients averaged over shares are integrated along the straight line between the inputs (Hanna et al. 2024, arXiv
    2403.17806). The shares are midpoints of equal parts of the line (`steps_of`), where the paper takes their ends: the error
    of the mean falls with steps^2.
    """
    way = pair.differences([EMBED])[EMBED]
    return lambda share: (EMBED, lambda x, hook: x + share * way)


def between(pair: Pair) -> tuple[str, Callable[..., Tensor]]:
    """The hook that lets a forward of the corrupted input be one of the clean one, with the corrupted beside it, under the rules
    of secants (`gatedlens.secant`): every gradient is the secant between both runs."""
    way = pair.differences([EMBED])[EMBED]
    return EMBED, lambda x, hook: Contrast.of(x + way, (x.detach(),), RULES)


RULE = ("gradient", "secant")


def by_secants(rule: str) -> bool:
    """Whether `rule=` asks for secants; InputError for a rule that there is not."""
    if rule not in RULE:
        raise InputError(f"rule={rule!r}: it is {', '.join(map(repr, RULE))}.{did_you_mean(str(rule), RULE)}")
    return rule == "secant"


def collected(
    pair: Pair,
    metric: Metric,
    blank: Result,
    scores: Callable[[int], Tensor],
    said: Mapping[str, Any],
    effort: Effort,
) -> Result:
    """`scores(i)` for every i of the first axis of `blank`, by backward passes: kept one by one, and gone on with, as the cells
    of a sweep are.

    blank: the Result with NaN for values; scores must be numbers, a NaN stands for what was not measured yet. said: what
    decides the scores beside the model, the inputs, the metric and the hooks. InputError for an earlier Result of another run.
    """
    given = [(one.value, one.mask) for one in (pair.clean, pair.corrupted)]
    ledger = Ledger(
        blank,
        len(blank.values),
        effort.results,
        lambda: identity_of(pair.model, [given, dict(pair.options)], [], [metric], said),
    )
    cells = [Cell((i,), ()) for i in range(len(blank.values))]
    todo = [cell for cell in cells if not ledger.take_up(cell.place)]
    if ledger.done and not ledger.surely_the_same():
        _check_again(ledger, scores, torch.finfo(pair.model.cfg.dtype).eps ** 0.5)
    fill(ledger, ([cell] for cell in todo), lambda batch: (scores(cell.place[0]) for cell in batch), len(todo), effort)
    return ledger.result()


def _check_again(ledger: Ledger, scores: Callable[[int], Tensor], rounding: float) -> None:
    """Where the metric may have changed since the earlier run: make the backward passes with the largest score again.

    rounding: what may differ, as a share of the largest score. A score is a sum whose terms may cancel, so one that is small
    can be off by much of itself.
    """
    place = max(ledger.done, key=lambda place: float(ledger.at(place).abs().max()))
    then = ledger.at(place)
    now = scores(place[0]).flatten().to(then)
    off = (then - now).abs()
    if bool((off > rounding * torch.stack([then, now]).abs().max()).any()):
        one = int(off.argmax())
        raise another_sweep(f"at {ledger.blank.axes[0]} {place[0]}, entry {one},", then[one], now[one])

"""Sensitivity: the gradient of a metric at points, handed to listeners as the backward pass goes by.

    listen(pair, metric, {"blocks.0.hook_mixer_in": listener})           # listener(gradient) is called once
    along_input(pair, metric, listeners, steps=5)                        # once a step: inputs from corrupted to clean

No gradient is kept, none of a parameter is computed, and nothing is left on the model: whoever listens adds up what it
needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function
from tqdm.auto import tqdm

from gatedlens.errors import InputError
from gatedlens.metrics import Metric, per_row
from gatedlens.model.hookpoint import Saver
from gatedlens.recurrence.autocast import exact
from gatedlens.runs.pair import Pair, steps_of

EMBED = "hook_embed"  # where an input enters, in every architecture
Listener = Callable[[Tensor], None]


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


def listen(pair: Pair, metric: Metric, listeners: Mapping[str, Listener], hooks: Sequence[Any] = ()) -> Tensor:
    """One forward of the corrupted input, under `hooks`, and one backward; the metric of that run, [batch].

    The metric is summed over rows, and rows do not see each other: each gradient is that of its own row's metric.
    """
    if torch.is_inference_mode_enabled():
        raise InputError(
            "Gradients are needed and torch.inference_mode is on: leave it for this call (no_grad may stay)."
        )
    with torch.enable_grad():
        anchor = torch.zeros((), requires_grad=True, device=pair.corrupted.value.device)
        ears = [(name, _Listen(anchor, listener)) for name, listener in listeners.items()]
        value = per_row(metric, pair.run(pair.corrupted, [*hooks, *ears]))
        if not value.requires_grad:
            raise InputError(
                "The metric has no gradient: it does not depend on the logits, or goes through argmax, a comparison, "
                "detach() or item(). A logit difference, a log probability or a KL divergence has one."
            )
        with exact(anchor):
            torch.autograd.grad(value.sum(), anchor, allow_unused=True)
    return value.detach()


def along_input(
    pair: Pair, metric: Metric, listeners: Mapping[str, Listener], steps: int, progress: bool = True
) -> None:
    """`listen` at `steps` inputs whose embeddings lie on the straight line from corrupted to clean (Hanna et al. 2024).

    At the midpoints of equal parts of the line, where the paper takes their ends: the error of the mean falls with
    steps^2.
    """
    shares = steps_of(steps)
    way = pair.differences([EMBED])[EMBED]
    for share in tqdm(shares, disable=not progress, desc="integrated gradients", unit="step"):
        listen(pair, metric, listeners, [(EMBED, lambda x, hook, share=share: x + share * way)])

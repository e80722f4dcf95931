"""Training an initial state: the state that makes a frozen model do a task.

    trained = gl.states.optimise(model, prompts, gl.metrics.log_probability(answers), steps=200)

    S_0 <- S_0 - lr Adam(d loss / d S_0) ,   loss = -mean of the metric over rows, or the mean loss of the next token

Every row begins with the same S_0, which is all that is trained: what a prompt in front could have left there, and more. As a
fine-tune of a model it is as small as a state (state tuning of RWKV; Galim et al. 2024, arXiv 2410.09016, of Mamba).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from gatedlens.address.layers import Layers
from gatedlens.errors import InputError
from gatedlens.metrics import AtPosition, Logits, Metric, measure, name_of
from gatedlens.model.batch import Input
from gatedlens.model.language import HookedLanguageModel
from gatedlens.model.path import PathMixer
from gatedlens.model.state import RecurrentState
from gatedlens.options import checked
from gatedlens.runs import inputs
from gatedlens.runs.fingerprints import checksum
from gatedlens.runs.fitting import Checkpoint, Descent, descend, model_said, which_batch
from gatedlens.runs.gradients import check_has_one
from gatedlens.runs.identity import Digest
from gatedlens.states.surgery import layered_keys
from gatedlens.states.trained_state import TrainedState

# For editors and type checkers: whoever passes something else gets the errors of the functions below.
if TYPE_CHECKING:
    Start: TypeAlias = Input | RecurrentState | None
    Measures: TypeAlias = Metric | Sequence[Metric] | None
else:
    Start = Measures = Any


@checked
def optimise(
    model: HookedLanguageModel,
    batches: str | Tensor | Sequence[Input],
    metric: Measures = None,
    start: Start = None,
    layers: Layers = None,
    parts: str | Sequence[str] = "scan",
    steps: int = 200,
    lr: int | float = 0.01,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> TrainedState:
    """`trained = gl.states.optimise(model, prompts, gl.metrics.log_probability(answers))`: a TrainedState.

    batches: a list of inputs (texts, lists of texts, ids [batch, pos], pairs (ids, mask)); each step reads one, in an order drawn
    by `seed`; one tensor, or one text, is one batch. metric: what is made larger: a metric of logits, or a list of one a batch;
    None: the likelihood of the batches' own tokens. start: the state to begin from: a RecurrentState of one row, an input that
    is read first, or None for the empty one. layers, parts: what of it is trained, as in `gl.states.splice`. lr: of Adam.
    checkpoint: a file that is written as it goes, from which an interrupted fit (or a longer one) goes on.

    The model is left as it is. Twice the same call gives twice the same numbers. InputError for no batch, another number of
    metrics, a start of several rows, a part or layer that is not there, a loss that is no number or does not depend on the state,
    and a checkpoint of another fit.
    """
    given = [batches] if isinstance(batches, str | Tensor) else list(batches)
    if not given:
        raise InputError("optimise() was given no batch.")
    metrics: list[Any] = list(metric) if isinstance(metric, list | tuple) else [metric] * len(given)
    if len(metrics) != len(given):
        raise InputError(
            f"There are {len(metrics)} metrics for {len(given)} batches: give one for all, or one a batch."
        )
    state = _begun(model, start)
    chosen = layered_keys(state, model, layers, parts)
    keys = [key for key, carried in chosen.items() if state[key].is_floating_point() and not carried.divides]
    if not keys:
        raise InputError(f"parts={parts!r}: nothing of it holds numbers that can be trained.")
    said = _said(model, given, state, keys, metrics, float(lr), seed)
    parameters = {key: state[key].clone() for key in keys}

    def loss_at(step: int) -> Tensor:
        place = which_batch(step, len(given), seed)
        return _loss(model, given[place], metrics[place], _with(state, parameters)).reshape(1)

    losses = descend(parameters, loss_at, Descent(steps, float(lr), progress), Checkpoint(checkpoint, said), "state")
    trained = _with(state, {key: one.detach() for key, one in parameters.items()})
    facts = {**said, "trained": keys, "steps": steps, "losses": losses}
    return TrainedState(trained.to("cpu"), facts)


@torch.no_grad()
def _begun(model: HookedLanguageModel, start: Start) -> RecurrentState:
    """The state to begin from, one row."""
    if start is None:
        one = torch.zeros(1, 1, dtype=torch.long, device=model.W_U.device)
        _, left = model(one, return_type=None, return_state=True)
        return _empty(model, left)
    given: RecurrentState = (
        start if isinstance(start, RecurrentState) else model(start, return_type=None, return_state=True)[1]
    )
    model.check_state(given)
    if given.batch_size != 1:
        raise InputError(
            f"start holds {given.batch_size} rows: a trained state is one for all rows. Take start.rows([0])."
        )
    return given.clone()


def _empty(model: HookedLanguageModel, left: RecurrentState) -> RecurrentState:
    """A state in which nothing was read: zeros, and no position in a window.

    Where a recurrence forgets at position 0 whatever it holds (Griffin's), one token counts as read: else all would be in vain.
    """
    mixers = [one for block in model.blocks for one in block.mixers]
    seen = int(any(isinstance(one, PathMixer) and "reset" in one.selection for one in mixers))
    tensors: dict[str, Tensor] = {}
    for key, tensor in left.tensors.items():
        axes = model.carried[key.rpartition(".")[2]].axes.split()
        kept = tensor.narrow(axes.index("key_pos"), 0, 0) if "key_pos" in axes[: tensor.ndim] else tensor
        tensors[key] = torch.full_like(kept, seen if axes == ["batch"] else 0)  # a number a row is a position
    return RecurrentState(tensors, torch.full_like(left.seen, seen), left.model_name)


def _with(state: RecurrentState, parameters: dict[str, Tensor]) -> RecurrentState:
    return RecurrentState({**state.tensors, **parameters}, state.seen, state.model_name)


def _loss(model: HookedLanguageModel, given: Input, metric: Metric | None, state: RecurrentState) -> Tensor:
    """What is made smaller: the loss of the next token, or minus the mean of the metric."""
    batch = inputs.ready(model, given, state=state)
    rows = state.rows([0] * len(batch.value))
    if metric is None:
        loss: Tensor = model(batch, return_type="loss", state=rows)
    else:
        loss = -measure(metric, Logits.of(model(batch, state=rows), batch.mask)).mean()
    check_has_one(loss)
    return loss


def _said(
    model: HookedLanguageModel,
    given: Sequence[Input],
    state: RecurrentState,
    keys: Sequence[str],
    metrics: Sequence[Callable[..., Any] | None],
    lr: float,
    seed: int,
) -> dict[str, Any]:
    """All that decides the numbers, as JSON holds it."""
    total = 0
    for one in given:
        total = inputs.checksum(inputs.ready(model, one, state=state), total)
    for tensor in state.tensors.values():
        total = checksum(tensor, total)
    names = sorted({"likelihood of its tokens" if one is None else name_of(one) for one in metrics})
    what = {"metric": ", ".join(names), "tensors": list(keys), "lr": lr, "seed": seed}
    held = Digest().add([_asked(one) for one in metrics])
    what["metric (checksum)"] = f"{held.data}{held.tensors}"
    return {**model_said(model), **what, "input and start (checksum)": total}


def _asked(metric: Callable[..., Any] | None) -> list[Any]:
    """What a metric of ours asks for: its positions, and the tokens that its function holds; of yours only the name is known."""
    if not isinstance(metric, AtPosition):
        return []
    return [metric.reads, *(cell.cell_contents for cell in getattr(metric.of, "__closure__", None) or ())]

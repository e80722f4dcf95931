"""Fitting: a loop of steps that is seeded, shows how far it is, and goes on after a stop.

    kept = Checkpoint(path, {"model (checksum)": ..., "seed": 0})    # the file that a fit goes on from; path None: none
    losses = descend({"weight": weight}, loss_at, Descent(steps=200, lr=1e-3), kept, "tuned lens")
    which_batch(step, n, seed)                                       # batches in a drawn order, all of them before any twice

A fit is of one question, its model and options: a file of another is refused, and the error names what differs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from gatedlens.errors import InputError
from gatedlens.files import Fields, is_number
from gatedlens.model.base import HookedModel
from gatedlens.recurrence.autocast import exact
from gatedlens.result.result import Result
from gatedlens.runs.fingerprints import fingerprint
from gatedlens.runs.gradients import check_allowed, needed
from gatedlens.runs.saved import check_tensors, read_saved, write_saved
from gatedlens.runs.stopping import Interrupted, stoppable

KIND = "fit under way"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam
EVERY = 30.0  # seconds between two writings of a file


@dataclass(frozen=True)
class Descent:
    """How many steps of Adam (Kingma and Ba 2015, arXiv 1412.6980), of which rate."""

    steps: int
    lr: float
    progress: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps={self.steps}: give at least 1.")
        if not self.lr > 0:
            raise InputError(f"lr={self.lr}: a rate of learning above 0.")


# -- the file of a fit that is under way ------------------------------------------------------------------------------


class Checkpoint:
    """`Checkpoint("fit.safetensors", said)`: what a fit goes on from. `said`: all that decides its numbers, as JSON holds it."""

    def __init__(self, path: str | Path | None, said: Mapping[str, Any]):
        self.path = None if path is None else Path(path)
        self.said: dict[str, Any] = json.loads(json.dumps(dict(said)))
        self._written = time.monotonic()
        if self.path is not None and (self.path.is_dir() or not self.path.parent.is_dir()):
            raise InputError(f"checkpoint={str(path)!r}: name a file in a folder that there is.")

    def take_up(self, like: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Fields] | None:
        """What an earlier fit of the same question left: its tensors, which are as `like`, and how far it was; None where there
        is no file. CheckpointError for one that is damaged."""
        if self.path is None or not self.path.exists():
            return None
        tensors, fields = read_saved(self.path, KIND)
        said = fields.fields("said")
        for name in dict.fromkeys([*self.said, *said]):
            if said.get(name) != self.said.get(name):
                raise InputError(
                    f"checkpoint={str(self.path)!r} is of another fit: its {name} is {said.get(name)!r} and here it is "
                    f"{self.said.get(name)!r}. Give another file, or delete this one."
                )
        check_tensors(self.path, KIND, tensors, like)
        return tensors, Fields(fields.fields("far"), KIND, self.path, fields.error)

    def save(self, tensors: Mapping[str, Tensor], far: Mapping[str, Any]) -> None:
        """Write it, all or nothing; a fit that has not begun leaves no file."""
        if self.path is not None and any(far.values()):
            write_saved(self.path, KIND, tensors, {"said": self.said, "far": dict(far)})
            self._written = time.monotonic()

    def due(self) -> bool:
        """Whether it is time to write it again."""
        return self.path is not None and time.monotonic() - self._written > EVERY

    @contextmanager
    def kept(self, tensors: Callable[[], tuple[Mapping[str, Tensor], Mapping[str, Any]]]) -> Iterator[None]:
        """Whatever ends the block, what `tensors()` gives then is in the file; Ctrl-C and SIGTERM say how to go on."""
        with stoppable():
            try:
                yield
            except KeyboardInterrupt as stop:
                self.save(*tensors())
                how = "Nothing is kept: give checkpoint=... to be able to go on."
                if self.path is not None:
                    how = f"Call it again with checkpoint={str(self.path)!r}, and it goes on from there."
                raise Interrupted(f"The fit was stopped. {how}", Result(torch.zeros(0), ("step",))) from stop
            except Exception:
                self.save(*tensors())
                raise
        self.save(*tensors())


# -- whose fit it is --------------------------------------------------------------------------------------------------


def model_said(model: HookedModel) -> dict[str, Any]:
    """By what a fit knows its model again: its name, its sizes and a checksum of its parameters."""
    cfg = model.cfg
    sizes = {"layers": cfg.n_layers, "d_model": cfg.d_model, "outputs": cfg.d_vocab_out}
    return {"model": cfg.model_name, **sizes, "parameters (checksum)": fingerprint(model)}


def check_model(model: HookedModel, facts: Mapping[str, Any], what: str, otherwise: str = "") -> None:
    """InputError unless `model` is the one that something was fitted to; `otherwise`: what can be done then."""
    here = model_said(model)
    for name, mine in here.items():
        if facts.get(name) != mine:
            raise InputError(
                f"This {what} was fitted to {facts.get('model')}, and this is {here['model']}: its {name} is {mine!r} in place "
                f"of {facts.get(name)!r}. Fit one to this model.{otherwise}"
            )


# -- descent ----------------------------------------------------------------------------------------------------------


def which_batch(step: int, n: int, seed: int) -> int:
    """Which of `n` batches a step reads: they come in an order that is drawn anew for each round."""
    round_, place = divmod(step, n)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + round_)
    return int(torch.randperm(n, generator=generator)[place])


def descend(
    parameters: Mapping[str, Tensor],
    loss_at: Callable[[int], Tensor],
    descent: Descent,
    checkpoint: Checkpoint,
    title: str,
) -> list[list[float]]:
    """Adam on parameters (which are changed where they stand) and the losses of every step.

    loss_at: step -> the losses [some], whose sum is made smaller, with a gradient. Adam divides each entry's gradient by its own
    size, so losses of different parameters do not disturb one another. InputError where a loss is no number any more.
    """
    check_allowed()
    names = list(parameters)
    some = [parameters[name].requires_grad_() for name in names]
    adam = torch.optim.Adam(some, lr=descent.lr)
    losses: list[list[float]] = []
    like = {f"{name}/{word}": one for name, one in parameters.items() for word in MOMENTS}
    earlier = checkpoint.take_up({**parameters, **like})
    if earlier is not None:
        losses = _resumed(parameters, adam, *earlier)
        if len(losses) > descent.steps:
            raise InputError(
                f"checkpoint={str(checkpoint.path)!r} has done {len(losses)} steps; steps={descent.steps} is less."
            )

    def now() -> tuple[dict[str, Tensor], dict[str, Any]]:
        held: dict[str, Tensor] = dict(parameters)
        for name, one in zip(names, some, strict=True):
            held |= {f"{name}/{word}": adam.state[one][word] for word in MOMENTS if adam.state[one]}
        return held, {"losses": losses}

    bar = tqdm(total=descent.steps, initial=len(losses), desc=title, disable=not descent.progress, unit="step")
    with bar, checkpoint.kept(now), needed():
        for step in range(len(losses), descent.steps):
            found = loss_at(step)
            told = found.detach().double().reshape(-1).tolist()
            if not bool(found.isfinite().all()):
                raise InputError(f"The {title}'s loss is {told} at step {step}: try a smaller lr than {descent.lr}.")
            adam.zero_grad()
            with exact(found):
                gradients = torch.autograd.grad(found.sum(), some)
            for one, gradient in zip(some, gradients, strict=True):
                one.grad = gradient
            adam.step()
            losses.append(told)
            bar.update()
            if checkpoint.due():
                checkpoint.save(*now())
    for one in some:
        one.requires_grad_(False).grad = None
    return losses


def _resumed(
    parameters: Mapping[str, Tensor], adam: torch.optim.Adam, tensors: Mapping[str, Tensor], far: Fields
) -> list[list[float]]:
    """Parameters and moments as they were, and the losses until then."""
    losses: list[list[float]] = far.get("losses", "the losses of its steps, at least one", _are_losses)
    with torch.no_grad():
        for name, one in parameters.items():
            one.copy_(tensors[name])
            moments = {word: tensors[f"{name}/{word}"].to(one) for word in MOMENTS}
            adam.state[one] = {"step": torch.tensor(float(len(losses))), **moments}
    return losses


def _are_losses(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, list) and one and all(map(is_number, one)) for one in value)
    )


def course(losses: Sequence[Sequence[float]], labels: Sequence[Any], axis: str, title: str, value: str) -> Result:
    """The losses as a Result [step, axis]."""
    values = torch.tensor([list(one) for one in losses], dtype=torch.float64).reshape(len(losses), len(labels))
    return Result(values, ("step", axis), {axis: list(labels)}, title, value)

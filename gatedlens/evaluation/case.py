"""Case: inputs whose places (pixels or tokens) can be taken away, and what the model then answers.

    case = Case.of(model, images, labels)
    ranks = case.ranks(scores, most_first=True)          # batch place: the place of each in the order
    case.logits(values, rows)                            # of changed inputs, values [row, channel, place]

A place is a pixel, or a token. `free` places can be taken away; padding, the BOS token and the position that the prediction
is read from stay (`keep=` for others: several methods say nothing of that position, and without it there is no question).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from gatedlens.errors import InputError
from gatedlens.evaluation import removal
from gatedlens.evaluation.removal import Nothing
from gatedlens.metrics import at_position
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Batch, Input
from gatedlens.options import tensor_of
from gatedlens.result.result import Result
from gatedlens.result.rounding import order

# What `scores` and `labels` may be. For type checkers: whoever passes something else gets an InputError.
if TYPE_CHECKING:
    Scores: TypeAlias = Result | Tensor | numpy.ndarray[Any, Any] | Sequence[Any]
    Labels: TypeAlias = int | Sequence[int] | Tensor | None
else:
    Scores = Labels = Any


@dataclass(frozen=True)
class Case:
    """See the head of this file. values: the inputs, flat; nothing: what a place holds once it is taken away; labels:
    the right answers (those of the clean run if none were given); among: the only answers that count; clean: logits."""

    model: HookedModel
    batch: Batch
    values: Shaped[Tensor, "batch channel place"]
    nothing: Shaped[Tensor, "#batch channel place"]
    said: str
    free: Bool[Tensor, "batch place"]
    among: Int[Tensor, "batch choice"] | None
    clean: Float[Tensor, "batch answer"]
    labels: Int[Tensor, " batch"]

    @staticmethod
    def of(
        model: HookedModel,
        input: Input,
        labels: Labels = None,
        *,
        nothing: Nothing = None,
        keep: Tensor | None = None,
        among: Labels = None,
        attention_mask: Tensor | None = None,
    ) -> Case:
        """Everything checked, and one clean run. labels: an id, or one a row; with `among` [batch, choice] (the ids of
        the answers to choose from) the index of the right one."""
        if not isinstance(model, HookedModel):
            raise InputError(f"An evaluation takes a gatedlens model, not {type(model).__name__}: `gl.wrap(model)`.")
        batch, _ = model.prepare(input, attention_mask=attention_mask)
        value = batch.value
        if model.grid is None:
            token, said = removal.of_tokens(model, nothing)
            flat, empty = value.unsqueeze(1), torch.full_like(value[:1], token).unsqueeze(1)
        else:
            pixels, said = removal.of_pixels(model, value, nothing)
            flat, empty = value.flatten(2), pixels.flatten(2)
        free = _free(model, batch, flat.shape[-1], keep)
        chosen = None if among is None else _choices(model, among, len(flat))
        with torch.no_grad():
            clean = _answers(model, batch, chosen)
        return Case(model, batch, flat, empty, said, free, chosen, clean, _labels(labels, clean))

    def logits(
        self, values: Shaped[Tensor, "row channel place"], rows: Int[Tensor, " row"]
    ) -> Float[Tensor, "row answer"]:
        """What the model answers to changed inputs of some rows of the batch, in float64.

        An input in which nothing changed gets the clean answer itself: in another batch it would differ by rounding.
        """
        answers = self.clean[rows]
        changed = (values != self.values[rows]).flatten(1).any(1)
        if bool(changed.any()):
            values, rows = values[changed], rows[changed]
            mask = None if self.batch.mask is None else self.batch.mask[rows]
            batch = Batch(values.reshape(len(rows), *self.batch.value.shape[1:]), mask)
            answers[changed] = _answers(self.model, batch, None if self.among is None else self.among[rows])
        return answers

    def counts(self, shares: tuple[float, ...]) -> Int[Tensor, "batch share"]:
        """How many places each share is: of pixels rounded down, of tokens up, as the papers' code does."""
        exact = self.free.sum(1, keepdim=True).double().cpu() * torch.tensor(shares, dtype=torch.float64)
        near = exact.round()
        exact = torch.where((exact - near).abs() < 1e-6, near, exact)  # 0.7 * 10 is 7
        return (exact.ceil() if self.model.grid is None else exact.floor()).long().to(self.free.device)

    def ranks(self, scores: Scores, most_first: bool, absolute: bool = False) -> Int[Tensor, "batch place"]:
        """The place of each in the order of its scores (or of their sizes), compared in steps of a 130,000th of the largest
        that is free; of equal ones the first comes first. What is not free comes last."""
        flat = self.spread(scores)
        flat = flat.abs() if absolute else flat
        found = order(flat if most_first else -flat, self.free)
        return torch.empty_like(found).scatter_(
            1, found, torch.arange(flat.shape[1], device=flat.device).expand_as(found)
        )

    def spread(self, scores: Scores) -> Float[Tensor, "batch place"]:
        """Scores as one number a place; a map of patches is scaled up to pixels (bilinear)."""
        given = numbers_of(scores).to(self.free.device)
        shape, rows = tuple(given.shape), len(self.free)
        size = self.batch.value.shape[-2:] if self.model.grid is not None else None
        wanted = "[batch, pos]" if size is None else "[batch, row, column]"
        if (
            given.ndim != (2 if size is None else 3)
            or shape[0] != rows
            or (size is None and shape[1] != self.free.shape[1])
        ):
            raise InputError(
                f"The scores have shape {list(shape)}; these inputs {list(self.batch.value.shape)} take scores {wanted}."
            )
        if not bool(given.isfinite().all()):
            raise InputError("The scores hold values that are not finite: they have no order.")
        return given if size is None else scaled(given, (size[0], size[1])).flatten(1)


def numbers_of(scores: Scores) -> Float[Tensor, ...]:
    """Scores as numbers in float64, where they are: an Attribution's values, or what `torch.as_tensor` reads.

    InputError for what is neither.
    """
    return tensor_of(scores.values if isinstance(scores, Result) else scores, "scores").detach().double()


def _answers(model: HookedModel, batch: Batch, among: Tensor | None) -> Float[Tensor, "batch answer"]:
    """The logits where the prediction is read from, in float64; those of the answers to choose from alone."""
    logits = model(batch)
    if logits.ndim == 3:
        logits = at_position(logits, model.reads_from(batch).argmax(1))
    return (logits if among is None else logits.gather(1, among)).double()


def scaled(maps: Float[Tensor, "batch row column"], size: tuple[int, int]) -> Float[Tensor, "batch height width"]:
    """Maps scaled to a size in pixels, bilinear, as the papers do; a map of that size stays as it is.

    A constant map stays constant to the last bit: its weighted means differ by rounding, and min-maxed that would be a map.
    """
    if tuple(maps.shape[1:]) == size:
        return maps
    wide = F.interpolate(maps.unsqueeze(1), size=size, mode="bilinear", align_corners=False).squeeze(1)
    constant = maps.amin((1, 2), keepdim=True) == maps.amax((1, 2), keepdim=True)
    return torch.where(constant, maps[:, :1, :1], wide)


def _free(model: HookedModel, batch: Batch, places: int, keep: Tensor | None) -> Bool[Tensor, "batch place"]:
    rows, device = len(batch.value), batch.value.device
    if keep is not None:
        kept = torch.as_tensor(keep, device=device)
        if kept.dtype != torch.bool or tuple(kept.shape) != (rows, places):
            raise InputError(
                f"keep is {kept.dtype} {list(kept.shape)}: give booleans [{rows}, {places}], True where a place stays."
            )
    elif model.grid is not None:
        return torch.ones(rows, places, dtype=torch.bool, device=device)
    else:
        kept = model.reads_from(batch) > 0
        bos = getattr(model.tokenizer, "bos_token_id", None)
        kept = kept if bos is None else kept | (batch.value == bos)
    free = ~kept if batch.mask is None or model.grid is not None else ~kept & batch.mask.bool()
    if not bool(free.any(1).all()):
        row = int((~free.any(1)).nonzero()[0])
        raise InputError(
            f"Row {row} has no place that can be taken away: all of it is kept (BOS, the last token, padding)."
        )
    return free


def _choices(model: HookedModel, among: Labels, rows: int) -> Int[Tensor, "batch choice"]:
    ids = torch.as_tensor(among, device=model.cfg.device).long()
    ids = ids.expand(rows, -1) if ids.ndim == 1 else ids
    if ids.ndim != 2 or len(ids) != rows or bool(((ids < 0) | (ids >= model.cfg.d_vocab)).any()):
        raise InputError(f"among={among!r}: give the ids of the answers, [choice] or [{rows}, choice].")
    return ids


def _labels(asked: Labels, clean: Float[Tensor, "batch answer"]) -> Int[Tensor, " batch"]:
    if asked is None:
        return clean.argmax(-1)
    ids = torch.as_tensor(asked, device=clean.device)
    rows, size = clean.shape
    if (
        ids.is_floating_point()
        or ids.dtype == torch.bool
        or ids.ndim > 1
        or (ids.ndim == 1 and len(ids) not in (1, rows))
    ):
        raise InputError(f"labels={asked!r}: give one id, or one for each of the {rows} rows.")
    if bool(((ids < 0) | (ids >= size)).any()):
        raise InputError(f"labels={asked!r} is out of range: there are the answers 0 to {size - 1}.")
    return ids.long().reshape(-1).expand(rows)

"""Segmentation: does the map lie on the object? Foreground is what is above the map's mean.

    found = gl.evaluation.segmentation(scores, masks)
    found.pixel_accuracy, found.mean_iou, found.mean_ap        # each value, low, high (95 %, bootstrap over images)

    R = (map - min) / (max - min), scaled to the mask's size (bilinear)     foreground: R > mean of R
    pixel accuracy   pixels that are right, over all pixels of all images
    mIoU             intersection over union of foreground and of background, each over all images; their mean
    mAP              average precision of the scores [1 - R, R] for [background, foreground] of an image; mean over images

As in Chefer et al. 2021 (arXiv 2012.09838) and HA (arXiv 2403.01590). Masks hold 1 for the object, 0 for the rest, -1 for
pixels that do not count. A constant map says nothing: no foreground, and R = 1/2 everywhere. What differs by less than a
130,000th of a map's largest is constant, and numbers of R that differ by rounding are equal.

A mask is in the frame of what the model read. `model.preprocess(image)` cuts the centre out of an image; its mask is cut alike by
`model.preprocess_mask(mask)`. One of another aspect ratio is refused; a mask of a whole square image has the right one, and
only you can tell that it was not cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gatedlens.attribution import Attribution
from gatedlens.errors import InputError
from gatedlens.evaluation.case import Scores, numbers_of, scaled
from gatedlens.result.bootstrap import Estimate, estimate
from gatedlens.result.rounding import STEP

VOID = -1
FINE = 2.0**-30  # of R, which is from 0 to 1: scaling a map rounds equal pixels some 1e-16 apart


# Masks [batch, height, width], one tensor or one an image. For type checkers: something else is an InputError.
if TYPE_CHECKING:
    Masks: TypeAlias = Tensor | Sequence[Any]
else:
    Masks = Any


@dataclass(frozen=True)
class Segmentation:
    """Pixel counts of each sample, from which the numbers of any samples follow; columns: background, foreground."""

    correct: Float[Tensor, " sample"]
    labelled: Float[Tensor, " sample"]
    intersection: Float[Tensor, "sample 2"]
    union: Float[Tensor, "sample 2"]
    average_precision: Float[Tensor, " sample"]

    @property
    def pixel_accuracy(self) -> Estimate:
        counts = torch.stack([self.correct, self.labelled], 1)
        return estimate(counts, lambda mean: mean[..., 0] / mean[..., 1])

    @property
    def mean_iou(self) -> Estimate:
        """A class that no image has and no map claims is left out."""
        counts = torch.stack([self.intersection, self.union], 2)
        return estimate(counts, lambda mean: (mean[..., 0] / mean[..., 1]).nanmean(-1))

    @property
    def mean_ap(self) -> Estimate:
        return estimate(self.average_precision)

    def estimates(self) -> dict[str, Estimate]:
        """`found.estimates()`: every number with its interval over the samples, by its name."""
        return {"pixel accuracy": self.pixel_accuracy, "mAP": self.mean_ap, "mIoU": self.mean_iou}


def segmentation(scores: Scores, masks: Masks) -> Segmentation:
    """`gl.evaluation.segmentation(scores, masks).mean_iou`: how well maps cut out objects.

    scores: an Attribution, or maps [batch, row, column]. masks: [batch, height, width] of 1, 0 and -1, or booleans, of the
    aspect ratio of the images (where there is no Attribution with its images: of the maps, to a cell).
    """
    maps = numbers_of(scores).cpu()
    truth = torch.as_tensor(masks).cpu()
    truth = truth.long() if truth.dtype == torch.bool else truth
    if maps.ndim != 3 or truth.ndim != 3 or len(maps) != len(truth) or len(maps) == 0:
        raise InputError(
            f"segmentation takes maps [batch, row, column] and masks [batch, height, width]; these have shapes "
            f"{list(maps.shape)} and {list(truth.shape)}."
        )
    if not bool(((truth == 0) | (truth == 1) | (truth == VOID)).all()):
        raise InputError(f"A mask holds 0, 1 and -1 (does not count); this one also {_strange(truth)}.")
    if not bool(maps.isfinite().all()):
        raise InputError("The scores hold values that are not finite.")
    _one_frame(scores, maps, (truth.shape[1], truth.shape[2]))
    R = normalised(scaled(maps, (truth.shape[1], truth.shape[2])))
    return _compared(R, truth.long())


def _one_frame(scores: Scores, maps: Float[Tensor, "batch row column"], mask: tuple[int, int]) -> None:
    """InputError for masks of another aspect ratio than what was scored: off by a pixel of the images; of maps whose images
    are not known by a cell, since patches may leave out a border of less than one."""
    images = scores.images if isinstance(scores, Attribution) else None
    height, width = maps.shape[1:] if images is None else images.shape[2:]
    off = (abs(mask[0] - mask[1] * height / width), abs(mask[1] - mask[0] * width / height))
    free = (1.0, 1.0) if images is not None else (max(1.0, mask[0] / height), max(1.0, mask[1] / width))
    if all(by >= most for by, most in zip(off, free, strict=True)):
        read = f"maps [{height}, {width}]" if images is None else f"images [{height}, {width}]"
        raise InputError(
            f"The masks are [{mask[0]}, {mask[1]}] and the {read}: of another aspect ratio, so a mask would be stretched over "
            "what the model did not see. Cut a mask as its image was cut, model.preprocess_mask(mask); of an image that was "
            "squeezed to the model's size, squeeze it as well."
        )


def normalised(maps: Float[Tensor, "batch row column"]) -> Float[Tensor, "batch row column"]:
    """Each map from 0 to 1; 1/2 where it is constant, but for rounding."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    constant = high - low <= STEP * torch.maximum(high.abs(), low.abs())
    return torch.where(constant, 0.5, (maps - low) / (high - low).masked_fill(constant, 1))


def foreground(R: Float[Tensor, "batch row column"]) -> Bool[Tensor, "batch row column"]:
    """What is above its map's mean, by more than rounding; nothing of a constant map, whose mean is 1/2 exactly."""
    return ((R - R.mean((1, 2), keepdim=True)) / FINE).round().gt(0)


def _compared(R: Float[Tensor, "batch row column"], truth: Int[Tensor, "batch row column"]) -> Segmentation:
    counted, guess = truth != VOID, foreground(R)
    if not bool(counted.flatten(1).any(1).all()):
        raise InputError(f"Mask {int((~counted.flatten(1).any(1)).nonzero()[0])} has no pixel that counts.")
    claims = torch.stack([~guess & counted, guess & counted], 1)
    holds = torch.stack([truth == 0, truth == 1], 1)
    ap = [average_precision(torch.stack([1 - r[c], r[c]]), torch.stack([t[c] == 0, t[c] == 1]))
          for r, t, c in zip(R, truth, counted, strict=True)]  # fmt: skip
    return Segmentation(
        correct=(claims & holds).sum((1, 2, 3)).double(),
        labelled=counted.sum((1, 2)).double(),
        intersection=(claims & holds).sum((2, 3)).double(),
        union=(claims | holds).sum((2, 3)).double(),
        average_precision=torch.tensor(ap, dtype=torch.float64),
    )


def average_precision(scores: Float[Tensor, "*any"], truth: Bool[Tensor, "*any"]) -> float:
    """sum over thresholds of (recall - recall before) * precision, equal scores (but for rounding) at one threshold."""
    scores = (scores.flatten() / FINE).round()
    order = scores.argsort(descending=True, stable=True)
    found, hits = scores[order], truth.flatten()[order].double().cumsum(0)
    last = torch.ones_like(found, dtype=torch.bool)
    last[:-1] = found[1:] != found[:-1]
    taken = torch.arange(1, len(found) + 1)[last]
    hits = hits[last]
    gained = hits.diff(prepend=hits.new_zeros(1)) / hits[-1].clamp(min=1)
    return float((gained * hits / taken).sum())


def _strange(truth: Tensor) -> str:
    values = [v for v in truth.unique().tolist() if v not in (0, 1, VOID)]
    return ", ".join(f"{v:g}" for v in values[:4])

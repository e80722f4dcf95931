"""Baseline: the features of "nothing there", which integrated gradients start from and occlusion puts in.

    baseline=None            the tokenizer's mask, unknown or padding token, or else the mean embedding; black for images
    baseline="<unk>", 3      a token, by its text or id            baseline="black", "mean", 0.5    pixels of an image
    baseline=tensor          an embedding [d_model]; for images an image [channels, height, width], as the model reads it

    keep="read"              the position that is read, and BOS, stay as they are, as they do where a test takes tokens away
    keep="nothing"           nothing does                              keep=tensor           booleans [batch, pos], True where
    it does

Of an image no place is kept: what is read is none of its patches.

"mean" is the mean colour that the model's input is normalised by, so 0; a number is what every pixel holds.

Beware of a zero embedding: an RMS norm gives the same for x and for x / 1000, so all that happens on the way from zero
happens in its first thousandth, and integrated gradients miss it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gatedlens.attribution.question import Question
from gatedlens.errors import InputError, did_you_mean
from gatedlens.model.base import HookedModel
from gatedlens.model.language import HookedLanguageModel
from gatedlens.result.rounding import moved

COLOURS = ("black", "mean")
NOTHING = ("mask_token_id", "unk_token_id", "pad_token_id")


# What `baseline=` takes. For type checkers: whoever passes something else gets an InputError.
if TYPE_CHECKING:
    Baseline: TypeAlias = int | str | float | Tensor | None
    Keep: TypeAlias = str | Tensor
else:
    Baseline = Keep = Any
KEEP = ("read", "nothing")


def baseline_of(question: Question, asked: Any) -> tuple[Float[Tensor, "batch place d_model"], str]:
    """(features, what they are in words). A place that holds the baseline already gets its own features, bit by bit."""
    if question.model.grid is None:
        one, said = _of_text(question, asked)
    else:
        pixels, said = pixels_of(question.model, question.batch.value[0], asked, "baseline")
        one = question.features_of(pixels.unsqueeze(0))
    one = one.to(question.features).expand_as(question.features)
    return torch.where(moved(question.features, one).unsqueeze(-1), one, question.features), said


def kept_places(question: Question, asked: Any) -> Bool[Tensor, "batch place"]:
    """Where an input stays as it is, by what `keep=` says."""
    places = question.features.shape[:2]
    if isinstance(asked, Tensor):
        if asked.dtype != torch.bool or asked.shape != places:
            raise InputError(
                f"keep is {asked.dtype} {list(asked.shape)}: give booleans {list(places)}, True where a place stays."
            )
        return asked.to(question.features.device)
    if asked not in KEEP:
        known = ", ".join(map(repr, KEEP))
        raise InputError(f"keep={asked!r}: it is {known}, or booleans.{did_you_mean(str(asked), KEEP)}")
    model, value = question.model, question.batch.value
    if asked == "nothing" or model.grid is not None:
        return torch.zeros(places, dtype=torch.bool, device=question.features.device)
    bos = getattr(model.tokenizer, "bos_token_id", None)
    return question.own if bos is None else question.own | (value == bos)


def keep_said(asked: Any) -> Any:
    """What was kept, as JSON holds it."""
    return asked.tolist() if isinstance(asked, Tensor) else asked


def _of_text(question: Question, asked: Any) -> tuple[Tensor, str]:
    """(the embedding of nothing, or of a token that stands for it, what it is in words)."""
    model, width = question.model, question.features.shape[-1]
    if isinstance(asked, Tensor) and asked.is_floating_point():
        if tuple(asked.shape) != (width,):
            raise InputError(f"baseline has shape {list(asked.shape)}; an embedding of this model is [{width}].")
        return asked, "an embedding"
    if asked is None:
        ids = (getattr(model.tokenizer, name, None) for name in NOTHING)
        asked = next((i for i in ids if i is not None and i < model.cfg.d_vocab), None)  # one that the model reads
        if asked is None:
            every = torch.arange(model.cfg.d_vocab, device=question.batch.value.device).unsqueeze(0)
            with torch.no_grad():
                return model.stream(model.embed(every))[0].mean(0), "the mean embedding"
    token = token_of(model, asked, "baseline")
    return question.features_of(torch.full_like(question.batch.value[:1, :1], token)), f"token {token}"


# -- what an option names, here and where an evaluation takes places away ---------------------------------------------


def token_of(model: HookedModel, asked: Any, what: str) -> int:
    """The id of a token that was named by its text or id; `what` is the option's name, for the errors."""
    token = model.to_single_token(asked) if isinstance(asked, str) and isinstance(model, HookedLanguageModel) else asked
    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < model.cfg.d_vocab:
        raise InputError(f"{what}={asked!r} is no token: give its text, or an id from 0 to {model.cfg.d_vocab - 1}.")
    return token


def pixels_of(
    model: HookedModel,
    image: Float[Tensor, "channels height width"],
    asked: Any,
    what: str,
    colours: tuple[str, ...] = COLOURS,
) -> tuple[Float[Tensor, "channels height width"], str]:
    """(an image that holds nothing, what it is in words), like `image`; None is black.

    colours: the words that the option `what` knows, for the errors; this knows those of COLOURS.
    """
    asked = "black" if asked is None else asked
    words = [repr(colour) for colour in colours]
    if isinstance(asked, Tensor) and asked.ndim > 0:
        if asked.shape != image.shape:
            raise InputError(f"{what} has shape {list(asked.shape)}; this model's images are {list(image.shape)}.")
        return asked.to(image), "an image"
    if isinstance(asked, str):
        if asked not in COLOURS:
            known = f"{', '.join(words[:-1])} or {words[-1]}"
            raise InputError(f"{what}={asked!r}: it is {known}.{did_you_mean(asked, colours)}")
        cfg: Any = model.cfg  # a vision model's
        mean, std = (image.new_tensor(given).reshape(-1, 1, 1) for given in (cfg.image_mean, cfg.image_std))
        return (-mean / std).expand_as(image) if asked == "black" else torch.zeros_like(image), f"{asked} pixels"
    if isinstance(asked, bool) or not isinstance(asked, int | float | Tensor):
        raise InputError(f"{what}={asked!r}: give {', '.join(words)}, a number for every pixel, or an image.")
    return torch.full_like(image, float(asked)), f"pixels of {float(asked):g}"

"""Nothing: what is put in the place of a pixel or a token that is taken away.

    nothing=None           black pixels; the bundled models' own word; else the tokenizer's mask, unknown or padding token
    nothing="<unk>", 3     a token, by its text or id
    nothing="black", "mean", "blur", 0.5          pixels: value 0 before normalisation, the mean colour, the image
                                                  itself blurred, or one number for all (as the model reads it)
    nothing=tensor         an image [channels, height, width], as the model reads it

"blur" is that of Petsiuk et al. 2018 (arXiv 1806.07421): a Gaussian of 11 x 11 pixels with a standard deviation of 5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from gatedlens.attribution.empty_input import NOTHING
from gatedlens.errors import InputError, did_you_mean
from gatedlens.model.base import HookedModel
from gatedlens.recurrence.autocast import exact

BUNDLED = {"-recall": "and", "-moby": " "}  # a word without content in the vocabulary of each task
COLOURS = ("black", "mean", "blur")
KERNEL, STD = 11, 5.0


# What `nothing=` takes. For type checkers: whoever passes something else gets an InputError.
if TYPE_CHECKING:
    Nothing: TypeAlias = int | str | float | Tensor | None
else:
    Nothing = Any


def of_tokens(model: HookedModel, asked: Any) -> tuple[int, str]:
    """(token id, what it is in words)."""
    if asked is None:
        name = str(model.cfg.model_name)
        asked = next((w for end, w in BUNDLED.items() if name.startswith("gatedlens/") and name.endswith(end)), None)
    if asked is None:
        asked = next((i for i in (getattr(model.tokenizer, name, None) for name in NOTHING) if i is not None), None)
    if asked is None:
        raise InputError(
            f"{model.cfg.model_name} has no mask, unknown or padding token to put in a token's place: pass nothing=, "
            "a token's text or id."
        )
    token = model.to_single_token(asked) if isinstance(asked, str) else asked
    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < model.cfg.d_vocab:
        raise InputError(f"nothing={asked!r} is no token: give its text, or an id from 0 to {model.cfg.d_vocab - 1}.")
    return token, f"token {asked!r}"


def of_pixels(
    model: HookedModel, images: Float[Tensor, "batch channels height width"], asked: Any
) -> tuple[Shaped[Tensor, "#batch channels height width"], str]:
    """(images that hold nothing, what they are in words)."""
    asked = "black" if asked is None else asked
    if isinstance(asked, Tensor) and asked.ndim > 0:
        if asked.shape != images.shape[1:]:
            raise InputError(
                f"nothing has shape {list(asked.shape)}; this model's images are {list(images.shape[1:])}."
            )
        return asked.to(images).unsqueeze(0), "an image"
    if isinstance(asked, str):
        if asked not in COLOURS:
            raise InputError(f"nothing={asked!r}: it is 'black', 'mean' or 'blur'.{did_you_mean(asked, COLOURS)}")
        if asked == "blur":
            return blurred(images), "the image, blurred"
        cfg: Any = model.cfg  # a vision model's
        mean, std = (images.new_tensor(t).reshape(1, -1, 1, 1) for t in (cfg.image_mean, cfg.image_std))
        colour = -mean / std if asked == "black" else torch.zeros_like(mean)
        return colour.expand_as(images[:1]), f"{asked} pixels"
    if isinstance(asked, bool) or not isinstance(asked, int | float | Tensor):
        raise InputError(f"nothing={asked!r}: give 'black', 'mean', 'blur', a number for every pixel, or an image.")
    return torch.full_like(images[:1], float(asked)), f"pixels of {float(asked):g}"


def blurred(images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
    """Each channel convolved with the Gaussian; beyond its edge an image goes on as its last pixels."""
    x = torch.arange(KERNEL, dtype=torch.float64) - KERNEL // 2
    line = torch.exp(-(x**2) / (2 * STD**2))
    line = (line / line.sum()).to(images)
    flat = images.flatten(0, 1).unsqueeze(1)
    half = KERNEL // 2
    wide = F.pad(flat, (half,) * 4, mode="replicate")
    with exact(wide):
        out = F.conv2d(F.conv2d(wide, line.reshape(1, 1, 1, -1)), line.reshape(1, 1, -1, 1))
    return out.reshape(images.shape)

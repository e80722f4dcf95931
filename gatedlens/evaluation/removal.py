"""Removal: what is put in the place of a pixel or a token that is taken away.

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

from gatedlens.attribution.empty_input import COLOURS, NOTHING, pixels_of, token_of
from gatedlens.errors import InputError
from gatedlens.model.base import HookedModel
from gatedlens.recurrence.autocast import exact

BUNDLED = {"-recall": "and", "-moby": " "}  # a word without content in the vocabulary of each task
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
    return token_of(model, asked, "nothing"), f"token {asked!r}"


def of_pixels(
    model: HookedModel, images: Float[Tensor, "batch channels height width"], asked: Any
) -> tuple[Shaped[Tensor, "#batch channels height width"], str]:
    """(images that hold nothing, what they are in words)."""
    if isinstance(asked, str) and asked == "blur":
        return blurred(images), "the image, blurred"
    one, said = pixels_of(model, images.new_empty(images.shape[1:]), asked, "nothing", (*COLOURS, "blur"))
    return one.unsqueeze(0), said


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

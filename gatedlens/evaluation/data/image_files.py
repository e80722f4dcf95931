"""Image files: how images become what a model reads.

    pixels(model, image)                                   # as the model's evaluation prepares it: resized, cropped
    squeezed(model, image, mask)                           # for segmentation: image and mask scaled to the model's size

Grey, palette, CMYK and RGBA images become RGB (as torchvision's loader does; transparency is dropped), of a model with one
channel grey ones. Segmentation crops nothing: the image is scaled to the model's size (bilinear), the mask likewise (nearest),
as in Chefer et al. 2021.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gatedlens.errors import InputError
from gatedlens.model.base import HookedModel

MODES = {1: "L", 3: "RGB"}


def _pillow() -> Any:
    try:
        import PIL.Image
    except ImportError as error:
        raise ImportError("Images need Pillow: pip install 'gatedlens[data]'.") from error
    return PIL.Image


def pixels(model: HookedModel, image: Any) -> Float[Tensor, "channels height width"]:
    """`model.preprocess`, for an image of any mode."""
    prepared: Tensor = model.preprocess(_moded(image, model.image_shape[0]))
    return prepared


def squeezed(
    model: HookedModel, image: Any, mask: Tensor
) -> tuple[Float[Tensor, "channels height width"], Int[Tensor, "height width"]]:
    """(image, mask), both at the model's size, and the image normalised as the model wants it."""
    channels, height, width = model.image_shape
    pillow = _pillow()
    if tuple(mask.shape) != (image.size[1], image.size[0]):
        raise InputError(
            f"The mask is {mask.shape[1]} x {mask.shape[0]} and the image {image.size[0]} x {image.size[1]}."
        )
    scaled = _moded(image, channels).resize((width, height), pillow.Resampling.BILINEAR)
    flat = pillow.fromarray((mask + 1).to(torch.uint8).numpy())  # void, background, object: 0, 1, 2
    small = torch.frombuffer(
        bytearray(flat.resize((width, height), pillow.Resampling.NEAREST).tobytes()), dtype=torch.uint8
    )
    raw = torch.frombuffer(bytearray(scaled.tobytes()), dtype=torch.uint8).reshape(height, width, channels)
    cfg: Any = model.cfg  # a vision model's
    mean, std = (torch.tensor(t).reshape(-1, 1, 1) for t in (cfg.image_mean, cfg.image_std))
    return (raw.permute(2, 0, 1).float() / 255 - mean) / std, small.reshape(height, width).long() - 1


def _moded(image: Any, channels: int) -> Any:
    if channels not in MODES:
        raise InputError(f"Images become those of 1 or 3 channels; this model reads {channels}: give tensors.")
    if image.mode[0] in "IF":  # I, I;16, F
        raise InputError(
            f"The image has mode {image.mode!r}: of more than 8 bits all above 255 would be cut off. Scale it."
        )
    return image if image.mode == MODES[channels] else image.convert(MODES[channels])

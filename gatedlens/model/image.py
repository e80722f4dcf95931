"""Grid: which position of the sequence is which patch of the image, and which is a class token.

model.grid.place(42)                 # (3, 0): row and column of the patch at position 42; None for a class token
model.grid.position(3, 0)            # 42
model.grid.cls                       # (98,): where the class token stands
model.grid.fold(relevance)           # [..., pos] -> [..., row, column], without the class tokens
model.grid.box(42)                   # (left, top, right, bottom) of its patch, in pixels
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from gatedlens.errors import InputError
from gatedlens.files import optional
from gatedlens.model.batch import Array

if TYPE_CHECKING:  # Pillow is imported where an image is read
    from PIL.Image import Image as Picture
else:
    Picture = Any

# Images as the official Vision Mamba evaluation prepares them: Pillow in, tensor out. torchvision is not needed.
#
#     pixels = preprocess(picture("cat.jpg"), size=(224, 224))        # channels height width
#     object = preprocess_mask(mask, size=(224, 224))                  # height width: what of its mask the model sees
#
# Resize the shorter side to int(size / 0.875) (bicubic), crop the centre, scale to [0, 1], normalise. Inputs of 32 pixels
# or fewer are not resized (the official rule for CIFAR): there the image must have the model's size.

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CROP_RATIO = 0.875
MODES = {3: ("RGB", "L"), 1: ("L",)}  # what an image may be, by the model's channels; L becomes RGB without loss


def preprocess(
    image: Picture,
    size: tuple[int, int] = (224, 224),
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Float[Tensor, "channels height width"]:
    """One PIL image for a model that reads `size` (height, width), normalised with `mean` and `std` of each channel."""
    from PIL import Image

    image = _framed(_moded(image, len(mean)), size, Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(*size, len(mean))
    scaled = pixels.permute(2, 0, 1).float() / 255
    return (scaled - torch.tensor(mean).reshape(-1, 1, 1)) / torch.tensor(std).reshape(-1, 1, 1)


def preprocess_mask(mask: Array, size: tuple[int, int] = (224, 224)) -> Int[Tensor, "height width"]:
    """A mask [height, width] of an image (1, 0 and -1, or booleans), resized (nearest) and cut as `preprocess` does it."""
    from PIL import Image

    given = torch.as_tensor(mask)
    if given.ndim != 2 or 0 in given.shape or not bool(((given == 0) | (given == 1) | (given == -1)).all()):
        raise InputError(
            f"A mask is [height, width] of 1 (the object), 0 and -1 (does not count), or booleans; this has shape "
            f"{list(given.shape)} and dtype {given.dtype}."
        )
    flat = Image.fromarray(
        (given.cpu().to(torch.int8) + 1).to(torch.uint8).numpy()
    )  # void, background, object: 0, 1, 2
    flat = _framed(flat, size, Image.Resampling.NEAREST)
    return torch.frombuffer(bytearray(flat.tobytes()), dtype=torch.uint8).reshape(*size).long() - 1


def _framed(image: Any, size: tuple[int, int], resampling: Any) -> Any:
    """What the model sees of an image, at its size."""
    height, width = size
    if height != width:
        raise InputError(f"preprocess makes square inputs; this model reads {height} x {width}: pass a tensor instead.")
    if height > 32:
        return _cropped(_resized(image, int(height / CROP_RATIO), resampling), height, width)
    if image.size != (width, height):
        raise InputError(
            f"The image is {image.size[0]} x {image.size[1]} and the model reads {width} x {height}. Inputs this small "
            f"are not resized by the official evaluation: do it yourself, `image.resize(({width}, {height}))`."
        )
    return image


def picture(path: str | Path) -> Picture:
    """`picture("cat.jpg")`: the PIL image of a file; InputError, with its name, for one that is missing, cut off, or no image."""
    pillow = optional("PIL.Image", "data")
    try:
        image = pillow.open(path)
        image.load()
    except FileNotFoundError as error:
        raise InputError(f"There is no file {path}.") from error
    except (IsADirectoryError, pillow.UnidentifiedImageError) as error:
        raise InputError(f"{path} is no image that Pillow can read: {error}.") from error
    except Exception as error:  # for damaged files Pillow's many readers raise whatever their formats' parsers do
        raise InputError(f"{path} is damaged: {error}.") from error
    return image


def _moded(image: Any, channels: int) -> Any:
    from PIL import Image

    if not isinstance(image, Image.Image):
        raise InputError(f"preprocess reads a PIL image, not a {type(image).__name__}: `Image.open(path)` makes one.")
    modes = MODES.get(channels)
    if modes is None:
        raise InputError(f"preprocess knows models of 1 or 3 channels; this one has {channels}: pass a tensor instead.")
    if image.mode not in modes:
        raise InputError(
            f"The image has mode {image.mode!r}; a model of {channels} channel{'s' if channels > 1 else ''} reads "
            f"{' or '.join(modes)}: `image.convert({modes[0]!r})` (what is transparent turns opaque)."
        )
    if 0 in image.size:
        raise InputError(f"The image is empty: {image.size[0]} x {image.size[1]}.")
    return image.convert(modes[0])


def _resized(image: Any, shorter: int, resampling: Any) -> Any:
    """The shorter side becomes `shorter`, the other keeps the aspect, rounded down as torchvision does."""
    width, height = image.size
    longer = int(shorter * max(width, height) / min(width, height))
    new = (shorter, longer) if width <= height else (longer, shorter)
    return image.resize(new, resampling)


def _cropped(image: Any, height: int, width: int) -> Any:
    """The centre of an image that is at least this large."""
    left, top = round((image.size[0] - width) / 2), round((image.size[1] - height) / 2)
    return image.crop((left, top, left + width, top + height))


@dataclass(frozen=True)
class Grid:
    """`rows` x `columns` patches, row by row, with class tokens at the positions `cls` (ascending) between them.

    patch: height and width of a patch in pixels; stride: pixels from one patch to the next (patches overlap where it is
    smaller).
    """

    rows: int
    columns: int
    cls: tuple[int, ...]
    patch: tuple[int, int]
    stride: tuple[int, int]

    @property
    def length(self) -> int:
        """How many positions there are, class tokens included."""
        return self.rows * self.columns + len(self.cls)

    @property
    def patches(self) -> tuple[int, ...]:
        """The positions of the patches: of (0, 0), (0, 1), ..."""
        return tuple(pos for pos in range(self.length) if pos not in self.cls)

    def place(self, pos: int) -> tuple[int, int] | None:
        """(row, column) of the patch at a position (negative ones count from the end); None for a class token."""
        if not -self.length <= pos < self.length:
            raise InputError(f"Position {pos} does not exist: this grid has positions 0 to {self.length - 1}.")
        pos %= self.length
        if pos in self.cls:
            return None
        row, column = divmod(pos - sum(at < pos for at in self.cls), self.columns)
        return row, column

    def position(self, row: int, column: int) -> int:
        """The position of the patch in that row and column (negative ones count from the end)."""
        if not (-self.rows <= row < self.rows and -self.columns <= column < self.columns):
            raise InputError(f"Patch ({row}, {column}) does not exist: the grid is {self.rows} x {self.columns}.")
        return self.patches[row % self.rows * self.columns + column % self.columns]

    def box(self, pos: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of the patch at a position, in pixels of the model's input."""
        place = self.place(pos)
        if place is None:
            raise InputError(f"Position {pos} is a class token: it has no place in the image.")
        top, left = place[0] * self.stride[0], place[1] * self.stride[1]
        return left, top, left + self.patch[1], top + self.patch[0]

    def fold(self, values: Shaped[Tensor, "*any pos"]) -> Shaped[Tensor, "*any row column"]:
        """Values of the positions as a map of the image: class tokens dropped, patches in rows and columns."""
        if values.shape[-1] != self.length:
            raise InputError(f"The last axis has {values.shape[-1]} entries; this grid has {self.length} positions.")
        return values[..., list(self.patches)].unflatten(-1, (self.rows, self.columns))

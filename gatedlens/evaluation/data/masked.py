"""Images of your own with masks: a folder that holds `images/` and `masks/`.

    MaskedImages("mine")                # mine/images/cat.jpg with mine/masks/cat.png, ...

Every pixel of a mask that is not 0 (of a palette: the first entry; of colours: black) is the object. There are no classes: what
is explained is what the model predicts.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from gatedlens.errors import InputError, did_you_mean
from gatedlens.evaluation.data.imagenet import SUFFIXES
from gatedlens.evaluation.data.sample import Sample, Samples
from gatedlens.model.image import picture

IMAGES, MASKS = "images", "masks"
GREY = ("P", "L", "1")  # modes whose pixels are one number


class MaskedImages(Samples):
    """Samples of a folder with `images/` and `masks/`, files of one name in both; read when asked for."""

    def __init__(self, path: str | Path):
        self.title = str(path)
        images, masks = (_by_name(Path(path) / folder) for folder in (IMAGES, MASKS))
        self.pairs = [(file, masks[name]) for name, file in images.items() if name in masks]
        for one, other, where in ((images, masks, MASKS), (masks, images, IMAGES)):
            lone = sorted(set(one) - set(other))
            if lone:
                hint = did_you_mean(lone[0], other)
                raise InputError(f"{path}/{where} has no {lone[0]}.*, which stands beside it as {one[lone[0]]}.{hint}")
        if not self.pairs:
            raise InputError(f"{Path(path) / IMAGES} holds no image ({', '.join(SUFFIXES)}).")

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, i: int) -> str:
        return self.pairs[i][0].name

    def read(self, i: int) -> Sample:
        image, mask = self.pairs[i]
        return Sample(self.name(i), picture(image), mask=_object(mask))


def _by_name(folder: Path) -> dict[str, Path]:
    """The image files by their names without suffix; InputError for a folder that is not there, and for two of one name."""
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}.")
    found: dict[str, Path] = {}
    for file in sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES):
        if file.stem in found:
            raise InputError(f"{folder} holds {found[file.stem].name} and {file.name}: names tell images apart.")
        found[file.stem] = file
    return found


def _object(file: Path) -> Int[Tensor, "height width"]:
    """1 where a mask's pixel is not 0."""
    mask = picture(file)
    if mask.mode not in GREY:
        mask = mask.convert("RGB").point(lambda value: 255 if value else 0).convert("L")
    width, height = mask.size
    raw = mask.convert("L") if mask.mode == "1" else mask
    pixels = torch.frombuffer(bytearray(raw.tobytes()), dtype=torch.uint8).reshape(height, width)
    return (pixels != 0).long()

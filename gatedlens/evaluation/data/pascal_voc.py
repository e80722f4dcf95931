"""Pascal VOC as it is unpacked: JPEGImages, SegmentationClass, ImageSets/Segmentation.

    VOC("VOCdevkit/VOC2012")            # the images of ImageSets/Segmentation/val.txt (or trainval, train)

The object is every pixel of any class; 0 is background, 255 (borders) does not count. VOC's classes are not those of an
ImageNet model, so samples have no label: what is explained is what the model predicts.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from gatedlens.errors import InputError
from gatedlens.evaluation.data.sample import Sample, Samples, listed
from gatedlens.evaluation.overlap import VOID
from gatedlens.model.image import picture

LISTS = ("val.txt", "trainval.txt", "train.txt")
BORDER = 255


class VOC(Samples):
    """Samples of a VOC folder, or of a VOCdevkit that holds one."""

    def __init__(self, path: str | Path):
        self.title, self.root = str(path), Path(path)
        inside = sorted(p.parent for p in self.root.glob("VOC*/JPEGImages"))
        self.root = inside[-1] if inside and not (self.root / "JPEGImages").is_dir() else self.root
        lists = [self.root / "ImageSets" / "Segmentation" / name for name in LISTS]
        found = next((file for file in lists if file.is_file()), None)
        if found is None:
            raise InputError(f"There is no {lists[0]}: which images of {self.root} are segmented is not known.")
        self.names = listed(found)
        if not self.names:
            raise InputError(f"{found} names no image.")

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        return self.names[i]

    def read(self, i: int) -> Sample:
        name = self.names[i]
        return Sample(name, picture(self.root / "JPEGImages" / f"{name}.jpg"), mask=self._mask(name))

    def _mask(self, name: str) -> Int[Tensor, "height width"]:
        file = self.root / "SegmentationClass" / f"{name}.png"
        if not file.is_file():
            raise InputError(f"There is no mask {file}, though the list of segmented images names {name}.")
        image = picture(file)
        if image.mode not in ("P", "L"):
            raise InputError(f"{file} has mode {image.mode!r}; a mask's pixels are class numbers (mode 'P').")
        classes = (
            torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(image.size[1], image.size[0]).long()
        )
        return torch.where(classes == BORDER, VOID, (classes > 0).long())

"""ImageNet-Segmentation as it is downloaded: `gtsegs_ijcv.mat`, 4,276 images with masks (Guillaumin, Küttel, Ferrari 2014).

    SegmentedImages("gtsegs_ijcv.mat")

A file of MATLAB 7.3 is HDF5, read with h5py (pip install 'gatedlens[data]'). MATLAB stores columns first, so arrays come out
with their axes reversed; cells are references to objects:

    value/img [n, 1]   -> uint8 [channel, width, height]
    value/gt  [n, 1]   -> a cell [1, 1] -> uint8 [width, height], 1 on the object
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatedlens.errors import InputError
from gatedlens.evaluation.data.sample import Sample, Samples


class SegmentedImages(Samples):
    """Samples of one .mat file, which stays open; an image is read when it is asked for."""

    def __init__(self, path: str | Path):
        try:
            import h5py  # type: ignore[import-untyped]
        except ImportError as error:
            raise ImportError("A .mat file of MATLAB 7.3 needs h5py: pip install 'gatedlens[data]'.") from error
        self.title = str(path)
        if not Path(path).is_file():
            raise InputError(f"There is no file {path}.")
        try:
            self.file = h5py.File(path, "r")
        except OSError as error:
            raise InputError(f"{path} is damaged, or no MATLAB 7.3 file (HDF5): {error}.") from error
        cells = ("value/img", "value/gt")
        missing = [name for name in cells if len(getattr(self.file.get(name), "shape", ())) != 2]
        if missing:
            held = ", ".join(self.file) or "nothing"
            raise InputError(f"{path} has no {' and no '.join(missing)} (it holds {held}): is it gtsegs_ijcv.mat?")
        counts = [len(self.file[name]) for name in cells]
        if counts[0] != counts[1]:
            raise InputError(f"{path} is damaged: {counts[0]} images and {counts[1]} masks.")

    def __len__(self) -> int:
        return len(self.file["value/img"])

    def name(self, i: int) -> str:
        return f"image {i}"

    def read(self, i: int) -> Sample:
        try:
            image = self._array(self.file[self.file["value/img"][i, 0]])
            mask = self._array(self.file[self.file[self.file["value/gt"][i, 0]][0, 0]])
        except (OSError, KeyError, ValueError, TypeError, IndexError, AttributeError, RuntimeError) as error:  # h5py's
            raise InputError(f"{self.title}, {self.name(i)} is damaged: {type(error).__name__}: {error}.") from error
        image = image.movedim(0, -1) if image.ndim == 3 else image
        if image.ndim not in (2, 3) or mask.ndim != 2 or image.shape[:2] != mask.shape:
            raise InputError(
                f"{self.title}, {self.name(i)} is damaged: the image has shape {list(image.shape)}, its mask {list(mask.shape)}."
            )
        if image.dtype != torch.uint8 or (image.ndim == 3 and image.shape[2] != 3):
            kind = f"{image.dtype} {list(image.transpose(0, 1).shape)}".removeprefix("torch.")
            raise InputError(f"{self.title}, {self.name(i)} is {kind}; an image is uint8, of 3 colours or grey.")
        return Sample(self.name(i), _pil(image.transpose(0, 1)), mask=(mask.T != 0).long())

    @staticmethod
    def _array(found: Any) -> Tensor:
        return torch.from_numpy(found[()])


def _pil(image: Tensor) -> Any:
    from PIL import Image

    return Image.fromarray(image.contiguous().numpy()).convert("RGB")

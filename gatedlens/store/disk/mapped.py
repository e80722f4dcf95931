"""Mapped: the files of a store as bytes, each mapped when it is first read; a batch's checksum is compared once.

files = Mapped(folder)
raw = files.batch("tensors/blocks.0.mixer.hook_state-00000.safetensors", extent, 3)      # uint8 [length]
whole = files["activations/data-00000.arrow"]                                            # uint8 [bytes of the file]
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from gatedlens.errors import StoreError
from gatedlens.store.disk.files import explained_reading
from gatedlens.store.disk.journal import AGAIN, Extent


class Mapped:
    """`mapped[name]` and `mapped.batch(name, extent, number)`; StoreError for what is not there or not what was written."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, Tensor] = {}
        self._whole: set[tuple[str, int]] = set()  # (file, offset) of the batches whose checksum was compared

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # mapped files do not travel to the workers of a DataLoader

    def __getitem__(self, name: str) -> UInt8[Tensor, " byte"]:
        if name not in self._files:
            path = self.folder / name
            with explained_reading(path):
                size = path.stat().st_size
                path.open("rb").close()  # a folder, or a file of somebody else: said by its name
            if not size:
                raise StoreError(f"{path} is damaged: it is empty. {AGAIN}")
            self._files[name] = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        return self._files[name]

    def batch(self, name: str, extent: Extent, number: int) -> UInt8[Tensor, " byte"]:
        """The bytes of batch `number`; when they are first read their checksum is compared with the journal's."""
        file, end = self[name], extent.offset + extent.length
        if end > len(file):
            raise StoreError(
                f"{self.folder / name} is damaged: batch {number} ends at byte {end}, and the file has {len(file)}. {AGAIN}"
            )
        raw = file[extent.offset : end]
        if (name, extent.offset) not in self._whole:
            found = zlib.crc32(raw.numpy().data)
            if found != extent.crc32:
                raise StoreError(
                    f"{self.folder / name} is damaged: the checksum of batch {number} (bytes {extent.offset} to {end}) is "
                    f"{found}, expected {extent.crc32}. {AGAIN}"
                )
            self._whole.add((name, extent.offset))
        return raw

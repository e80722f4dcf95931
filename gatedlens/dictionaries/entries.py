"""Entries: what a dictionary is trained on, of a store, a tensor, or tensors by point."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gatedlens.errors import InputError, PointError


@dataclass(frozen=True)
class Entries:
    """`gather(numbers)`: {point: [entry, ...]}; `n` of them."""

    n: int
    gather: Callable[[Sequence[int]], Mapping[str, Tensor]]
    points: tuple[str, ...]
    out_points: tuple[str, ...]
    model: str | None = None

    @staticmethod
    def of(data: Any, points: tuple[str, ...], out_points: tuple[str, ...]) -> Entries:
        """Of a store, a tensor, or tensors by point."""
        names = list(dict.fromkeys((*points, *out_points)))
        if isinstance(data, Tensor):
            if len(names) > 1:
                raise InputError(f"One tensor was given for {', '.join(names)}: give {{point: tensor}}.")
            data = {names[0]: data}
        if isinstance(data, Mapping):
            return _in_memory(data, names, points, out_points)
        found = data.dataset(names)
        if not len(found):
            raise InputError(f"{data!r} holds no entry.")
        theirs = [layout.name for layout in found.layouts]
        own = dict(zip(names, theirs, strict=True))
        return Entries(
            len(found),
            found.gather,
            tuple(own[name] for name in points),
            tuple(own[name] for name in out_points),
            data.manifest["model"]["name"],
        )

    def pair(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """x [entry d_in] and y [entry d_out]."""
        held = self.gather(numbers)
        flat = {
            name: tensor.flatten(1).to(torch.promote_types(tensor.dtype, torch.float32))
            for name, tensor in held.items()
        }
        x = torch.cat([flat[name] for name in self.points], dim=1)
        same = self.points == self.out_points
        return x, x if same else torch.cat([flat[name] for name in self.out_points], dim=1)

    def widths(self, points: tuple[str, ...]) -> list[int]:
        """How wide each point is."""
        held = self.gather([0])
        return [held[name][0].numel() for name in points]

    def digest(self) -> int:
        """A checksum of 64 entries from all over: whether these are the ones of an earlier call."""
        some = sorted({i * (self.n - 1) // 63 for i in range(64)})
        return zlib.crc32(torch.cat(self.pair(some), dim=1).contiguous().numpy().tobytes())


def _in_memory(
    data: Mapping[str, Tensor], names: list[str], points: tuple[str, ...], out_points: tuple[str, ...]
) -> Entries:
    lacking = [name for name in names if name not in data]
    if lacking:
        raise PointError(f"{', '.join(lacking)} is not among the tensors: they are of {', '.join(data)}.")
    for name in names:
        if data[name].ndim == 0:
            raise InputError(f"The entries of {name} are one number; they are [..., d_in].")
    flat = {name: data[name].detach().reshape(-1, data[name].shape[-1]) for name in names}
    lengths = {name: len(tensor) for name, tensor in flat.items()}
    if len(set(lengths.values())) > 1 or not min(lengths.values()):
        raise InputError(f"As many entries are needed at each point, and at least one; there are {lengths}.")
    n = lengths[names[0]]
    return Entries(n, lambda numbers: {name: t[list(numbers)].cpu() for name, t in flat.items()}, points, out_points)

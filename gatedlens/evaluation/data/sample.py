"""Samples: one input of a data set with what is known about it, the sets that hold them, which of them are drawn, and lists
of names in text files.

    samples = gl.evaluation.open_samples("digits")          # or a path: see `opening.py`
    len(samples), samples[0], samples.title

A set of samples has a `title` and reads each one from the disk when it is asked for. The input is a PIL image, an image
tensor as a model reads it, token ids, or a `Prompt`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatedlens.errors import InputError


@dataclass(frozen=True)
class Prompt:
    """A text between what stays: tokens of `text` can be taken away, those of `before` and `after` are kept.

    choices: the answers to choose from, each counted by its first token; the sample's label is the index of the right one.
    """

    text: str
    before: str = ""
    after: str = ""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """name: which one it is, in the words of its set. label: the right class or token (or index of a Prompt's choices).

    mask: [height, width] of 1 (the object), 0 and -1 (does not count). truth: positions of the tokens that hold the answer.
    classes: how many classes the label is one of, where that is known.
    """

    name: str
    input: Any
    label: int | None = None
    mask: Tensor | None = None
    truth: tuple[int, ...] = ()
    classes: int | None = None


class Samples:
    """What every set shares; one that reads files gives `title`, `__len__`, `name(i)` and `read(i)`."""

    title: str

    def __len__(self) -> int:
        raise NotImplementedError

    def name(self, i: int) -> str:
        """`samples.name(3)`: which one sample `i` is, without reading it."""
        raise NotImplementedError

    def read(self, i: int) -> Sample:
        """`samples.read(3)`: the Sample of that number, read from where it lies; `samples[3]` is the same."""
        raise NotImplementedError

    def __getitem__(self, i: int) -> Sample:
        if not -len(self) <= i < len(self):
            raise IndexError(f"{self.title} has samples 0 to {len(self) - 1}; {i} is none of them.")
        return self.read(i % len(self))

    def __iter__(self) -> Iterator[Sample]:
        return (self.read(i) for i in range(len(self)))


class Listed(Samples):
    """Samples that are there already: `Listed("mine", [Sample("a", image, 3), ...])`."""

    def __init__(self, title: str, samples: Sequence[Sample]):
        self.title = title
        self.samples = list(samples)

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, i: int) -> str:
        return self.samples[i].name

    def read(self, i: int) -> Sample:
        return self.samples[i]


def chosen(samples: Samples, limit: int | None, seed: int) -> list[int]:
    """The indices of `limit` samples drawn from the seed, ascending; all if None."""
    if len(samples) == 0:
        raise InputError(f"{samples.title} holds no sample.")
    if limit is None or limit >= len(samples):
        return list(range(len(samples)))
    if limit < 1:
        raise InputError(f"limit={limit}: give at least 1.")
    if not -(2**63) <= seed < 2**64:
        raise InputError(f"seed={seed}: it is a number of 64 bits.")
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
    return sorted(order[:limit].tolist())


def listed(path: Path) -> list[str]:
    """`listed(Path("ImageSets/Segmentation/val.txt"))`: the first word of each line of a list of images or classes.

    Empty lines are passed over; InputError for a file that is no text.
    """
    try:
        return [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is damaged, or no text: {error}.") from error

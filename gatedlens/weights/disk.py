"""Weights on the disk: parameters that are windows on the files they came from, read as they are used and let go afterwards.

    put_on_disk(model, folder)          # each parameter a window on its file; what is in none is written to `folder` first
    with reading(modules): ...          # at the end what these modules have read leaves the memory

A window is a tensor over a mapping of a file: its numbers are read when somebody looks at them, by the page, and letting go of
them costs nothing but reading them again. So a model larger than the memory runs block by block, and whatever reads a weight
beside a forward finds it. Windows are for reading: their parameters take no gradient. One that is edited in place all the
same (under torch.no_grad()) keeps its numbers, in memory.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from gatedlens.errors import CheckpointError

MARK = "_windows"  # among a module's attributes: what of it is on the disk
SMALL = 2**16  # bytes; a tensor that is in no file and smaller than this stays in memory
MAPS = Path(
    "/proc/self/smaps"
)  # which file is mapped where; elsewhere than on Linux every tensor is written to the folder
DROP = "MADV_DONTNEED"
FETCH = "MADV_WILLNEED"
PAGE = mmap.PAGESIZE


class File:
    """A file that is mapped once, for as long as a window on it lives."""

    def __init__(self, path: Path):
        with path.open("rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def window(self, offset: int, like: Tensor) -> Tensor:
        """A tensor of the dtype and shape of `like`, whose numbers stand at `offset`."""
        return torch.frombuffer(self.map, dtype=like.dtype, count=like.numel(), offset=offset).view(like.shape)


@dataclass
class Window:
    """What stands for one tensor: where in which file, and how often it had been edited when it was made."""

    tensor: Tensor
    file: File
    offset: int
    version: int

    def advise(self, advice: str) -> None:
        """Tell the system what is to become of the pages that are this window's alone."""
        if advice not in vars(mmap) or (advice == DROP and self.tensor._version != self.version):
            return
        begin, end = self.offset, self.offset + self.tensor.numel() * self.tensor.itemsize
        begin, end = -(-begin // PAGE) * PAGE, end // PAGE * PAGE
        if begin < end:
            self.file.map.madvise(getattr(mmap, advice), begin, end - begin)


class Windows:
    """Those of one module. A copy of the module has its numbers in memory."""

    def __init__(self, made: Iterable[Window] = (), folder: Any = None):
        self.made = list(made)
        self.folder = folder  # a temporary one lives as long as this does

    def __deepcopy__(self, memo: dict[int, Any]) -> Windows:
        return Windows()

    def __reduce__(self) -> tuple[Any, ...]:
        return Windows, ()


def is_on_disk(model: nn.Module) -> bool:
    """Whether `put_on_disk` was asked for this model."""
    return MARK in vars(model)


@contextmanager
def reading(modules: Iterable[nn.Module]) -> Iterator[None]:
    """`with reading(block.modules()): ...`: their own weights are fetched now, and leave the memory at the end."""
    windows = [window for module in modules if MARK in vars(module) for window in vars(module)[MARK].made]
    for window in windows:
        window.advise(FETCH)
    try:
        yield
    finally:
        for window in windows:
            window.advise(DROP)


def check_frozen(model: nn.Module) -> None:
    """CheckpointError for a parameter on the disk of which a gradient is asked."""
    for path, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False) if MARK in vars(module) else ():
            if p.requires_grad and any(window.tensor is p for window in vars(module)[MARK].made):
                raise CheckpointError(
                    f"{path}.{name} requires a gradient, and its numbers are on the disk (offload='disk'): only activations have "
                    "gradients there, and adapters on top. Load the model into memory to train its weights."
                )


def put_on_disk(model: nn.Module, folder: str | Path | None = None) -> None:
    """`put_on_disk(model, "scratch")`: make every parameter and buffer of a model in main memory a window on a file.

    What is mapped from a file already stays in that file. The rest is written to `folder` (None: a temporary one, which goes
    when the model does), tensor by tensor, each leaving the memory as soon as it is written.
    """
    tensors: dict[int, tuple[Tensor, list[nn.Module]]] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and type(tensor) in (nn.Parameter, Tensor) and tensor.device.type == "cpu":
                tensors.setdefault(id(tensor), (tensor, []))[1].append(module)
    spans = _spans()
    where = {key: _place(tensor, spans) for key, (tensor, _) in tensors.items()}
    spilled = {
        key: tensor for key, (tensor, _) in tensors.items() if where[key] is None and tensor.nbytes >= SMALL
    }  # fmt: skip
    temporary = tempfile.TemporaryDirectory(prefix="gatedlens-") if spilled and folder is None else None
    chosen = folder if temporary is None else temporary.name
    if spilled and chosen is not None:
        path = Path(chosen) / "weights.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            where |= {key: (path, _spill(tensor, file)) for key, tensor in spilled.items()}
    files = {place[0]: File(place[0]) for place in where.values() if place is not None}
    for key, (tensor, modules) in tensors.items():
        place = where[key]
        if place is None:
            continue
        tensor.requires_grad_(False)
        tensor.data = files[place[0]].window(place[1], tensor)
        window = Window(tensor, files[place[0]], place[1], tensor._version)
        for module in modules:
            vars(module).setdefault(MARK, Windows()).made.append(window)
    vars(model).setdefault(MARK, Windows()).folder = temporary


def _spill(tensor: Tensor, file: BinaryIO) -> int:
    """Write a tensor at the end of a file; where it stands there. Its numbers leave the memory."""
    file.write(b"\0" * (-file.tell() % PAGE))
    offset, flat = file.tell(), tensor.detach().contiguous().view(-1)
    file.write(flat.view(torch.uint8).numpy().data)
    file.flush()
    tensor.data = torch.empty((), dtype=tensor.dtype).expand(tensor.shape)  # the shape without the numbers
    return offset


class Span(NamedTuple):
    """A part of the memory that shows a file, as it is on the disk."""

    low: int
    high: int
    offset: int
    path: Path


def _spans() -> list[Span]:
    """The files that are mapped, without those of which a page has been written to."""
    found: list[Span] = []
    for line in MAPS.read_text(errors="replace").splitlines() if MAPS.exists() else ():
        words = line.split(maxsplit=5)
        if "-" in words[0]:
            low, high = (int(bound, 16) for bound in words[0].split("-"))
            found.append(Span(low, high, int(words[2], 16), Path(words[5] if len(words) == 6 else "")))
        elif words[0] == "Anonymous:" and words[1] != "0":
            found.pop()
    return [span for span in found if span.path.is_absolute() and span.path.is_file()]


def _place(tensor: Tensor, spans: list[Span]) -> tuple[Path, int] | None:
    """(file, offset) of a tensor that shows a file; None for any other."""
    begin = tensor.data_ptr()
    span = next((span for span in spans if span.low <= begin and begin + tensor.nbytes <= span.high), None)
    if span is None or not tensor.numel() or not tensor.is_contiguous():
        return None
    offset = span.offset + begin - span.low
    return (span.path, offset) if offset % tensor.itemsize == 0 else None

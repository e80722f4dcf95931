"""Identity: a checksum of everything that decides the numbers, so that nobody goes on with another sweep's.

    digest = Digest().add(cells)
    digest.data            # of its numbers, words and places
    digest.tensors         # of its tensors
    digest.code            # of its functions and what they hold; None where one cannot be seen into

Functions of one `code` do the same. Those of another may do so too (one is the other with a timer), so `code` refuses
nothing by itself: where it differs the engine measures a cell again and compares.
"""

from __future__ import annotations

import dis
import functools
import types
import zlib
from collections.abc import Mapping, Set
from dataclasses import fields, is_dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from gatedlens.runs.fingerprints import checksum

PLAIN = (type(None), bool, int, float, complex, str, bytes, slice, range, torch.dtype, torch.device, numpy.generic)
STORING = ("STORE_ATTR", "STORE_DEREF", "STORE_GLOBAL")  # what a function itself changes (a count of its calls)


class Digest:
    """`data`, `tensors` and `code`, crc32 in hex, of all that was added, in order."""

    def __init__(self) -> None:
        self._data = self._sum = self._code = 0
        self._known = True
        self._tensors: dict[int, tuple[int, Tensor]] = {}  # by id, with the tensor itself, so that the id stays its own
        self._read: dict[int, Any] = {}  # functions, likewise

    @property
    def data(self) -> str:
        return f"{self._data:08x}"

    @property
    def tensors(self) -> str:
        return f"{self._sum:08x}"

    @property
    def code(self) -> str | None:
        return f"{self._code:08x}" if self._known else None

    def add(self, value: Any) -> Digest:
        """Anything: plain values, tensors, functions, containers and dataclasses of these."""
        self._data = self._of(value, self._data)
        return self

    def _of(self, value: Any, total: int) -> int:
        """crc32 of a value behind what came before; a function leaves its name here and goes into `code`."""
        if isinstance(value, PLAIN):
            return zlib.crc32(f"{type(value).__name__} {value!r};".encode(), total)
        if isinstance(value, Tensor):
            known = self._tensors.get(id(value))
            if known is None:
                known = self._tensors[id(value)] = checksum(value), value
            self._sum = zlib.crc32(f"{known[0]};".encode(), self._sum)
            return total
        if isinstance(value, numpy.ndarray):
            return self._of([str(value.dtype), value.shape, value.tobytes()], total)
        if isinstance(value, types.ModuleType):
            return self._of(value.__name__, total)
        if isinstance(value, type):
            return self._of(f"{value.__module__} {value.__qualname__}", total)
        parts = _parts(value)
        if parts is None:
            self._function(value)
            return total
        total = zlib.crc32(f"{type(value).__qualname__} {len(parts)};".encode(), total)
        for part in parts:
            total = self._of(part, total)
        return total

    # -- functions -----------------------------------------------------------------------------------------------

    def _held(self, value: Any) -> None:
        """What belongs to a function: its tensors too."""
        before, self._sum = self._sum, 0
        self._code = self._of(value, self._code)
        self._code = zlib.crc32(f"{self._sum};".encode(), self._code)
        self._sum = before

    def _function(self, value: Any) -> None:
        """What a function does, as far as it can be read."""
        if id(value) in self._read:
            return  # it was read before, or calls itself
        self._read[id(value)] = value
        if isinstance(value, functools.partial):
            self._held([value.args, value.keywords, value.func])
        elif isinstance(value, types.MethodType):
            self._held([value.__self__, value.__func__])
        elif isinstance(value, types.BuiltinFunctionType):
            self._held(f"{value.__module__} {value.__qualname__}")
        elif isinstance(value, types.FunctionType):
            self._written(value)
        else:
            self._instance(value)

    def _instance(self, value: Any) -> None:
        """Something with a __call__ of its own, and what it holds; a module is more than can be read."""
        call, held = getattr(type(value), "__call__", None), getattr(value, "__dict__", None)  # noqa: B004
        if not isinstance(call, types.FunctionType) or held is None or isinstance(value, nn.Module):
            self._known = False
            return
        changed = self._instructions(call.__code__)
        self._held([type(value), {name: one for name, one in held.items() if name not in changed}, call])

    def _written(self, function: types.FunctionType) -> None:
        """A function in Python: its instructions, its defaults, and what it finds outside itself."""
        changed = self._instructions(function.__code__)
        self._held([function.__defaults__, function.__kwdefaults__])
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if name not in changed:
                self._held(_content(cell))
        for name in function.__code__.co_names:
            if name in function.__globals__ and name not in changed:
                found = function.__globals__[name]
                foreign = isinstance(found, types.FunctionType) and found.__module__ != function.__module__
                self._held(f"{found.__module__} {found.__qualname__}" if foreign else found)

    def _instructions(self, code: types.CodeType) -> set[str]:
        """Take the instructions in; the names that they store into."""
        self._held([code.co_code, code.co_names])
        changed = {str(one.argval) for one in dis.get_instructions(code) if one.opname in STORING}
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                changed |= self._instructions(constant)
            else:
                self._held(constant)
        return changed


def _parts(value: Any) -> list[Any] | None:
    """What a container or a dataclass is made of; None of anything else."""
    if is_dataclass(value):
        return [(one.name, getattr(value, one.name)) for one in fields(value)]
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, Set):
        return sorted(value, key=repr)
    return list(value) if isinstance(value, list | tuple) else None


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None

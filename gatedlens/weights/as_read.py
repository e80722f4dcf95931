"""A model as it is read: the vendor's modules as the open forward is to read them, whatever they make of their weights.

    as_read = AsRead(model)
    as_read.whole.layers[0].in_proj.weight     # dequantised, or merged with its adapter, at each read
    with as_read.held(): ...                   # each weight is made once in here

A view is the vendor's own module under another class: the attributes are the same objects, so that what is written to one is
written to the other. Only the modules that a reader reads have another class than their own, and those above them; a
model without any is its own view. No weight is kept, but while a block runs.
"""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from gatedlens.recurrence.transforms import transformed
from gatedlens.weights.adapters import swapped
from gatedlens.weights.reader import Reader
from gatedlens.weights.readers import reader_of


class AsRead:
    """The views of one model, each made once. `whole` is that of the model itself."""

    def __init__(self, model: nn.Module):
        self.model = bare(model)
        self._made: dict[int, nn.Module] = {}
        self._classes: dict[tuple[type, type, Reader | None], type] = {}
        self._raw: dict[int, nn.Module] = {}  # what a view shows, by the attributes that both have
        self._held: dict[int, dict[tuple[int, str, bool], Tensor | None]] = {}  # by thread

    @cached_property
    def _readers(self) -> dict[int, Reader | None]:
        """The reader of each module that one reads, by its id; None for a module that has one of these beneath."""
        found: dict[int, Reader | None] = {}

        def find(module: nn.Module) -> bool:
            reader = reader_of(module)
            within = (
                [] if reader is not None else [find(child) for child in module._modules.values() if child is not None]
            )
            if reader is None and not any(within):
                return swapped(module) is not None
            found[id(module)] = reader
            return True

        find(self.model)
        return found

    @property
    def whole(self) -> Any:
        """The view of the model itself."""
        return self.of(self.model)

    @property
    def plain(self) -> bool:
        """Whether every weight is what its parameter holds."""
        return not self._readers

    def of(self, module: nn.Module) -> nn.Module:
        """The view of a module of the model: itself, where nothing in it is read otherwise."""
        stand_in = swapped(module)
        if stand_in is not None:
            return self.of(stand_in)
        return self._view(module, *self._told(module)) if id(module) in self._readers else module

    def _told(self, module: nn.Module) -> tuple[Reader | None, type]:
        """What reads a module, and the class that it stands for."""
        reader = self._readers[id(module)]
        return reader, (None if reader is None else reader.kind(module)) or type(module)

    def _view(self, module: nn.Module, reader: Reader | None, stands_for: type) -> nn.Module:
        if id(module) not in self._made:
            view: nn.Module = object.__new__(self._class(type(module), stands_for, reader))
            view.__dict__ = module.__dict__  # the same attributes, not equal ones
            self._made[id(module)], self._raw[id(vars(module))] = view, module
        return self._made[id(module)]

    def _class(self, own: type, stands_for: type, reader: Reader | None) -> type:
        """The class of a view: a module's own, its children views; or torch's, its weight read."""
        key = (own, stands_for, reader)
        if key not in self._classes:
            space: dict[str, Any] = {"as_read": self, "__module__": own.__module__}
            if reader is not None:
                space |= {name: _read(name) for name in reader.names}
                space["extra_repr"] = lambda view: f"read from {type(bare(view)).__name__}"
            base = own if stands_for is nn.Module else stands_for
            self._classes[key] = type(own.__name__, (Shown, base), space)
        return self._classes[key]

    def shown(self, view: nn.Module) -> nn.Module:
        """The vendor's module that a view shows."""
        return self._raw[id(view.__dict__)]

    # -- reading ------------------------------------------------------------------------------------------------------

    def read(self, view: nn.Module, name: str) -> Tensor | None:
        """The attribute `name` of a view that a reader reads."""
        module = self.shown(view)
        held = self._held.get(threading.get_ident())
        if held is None or transformed():  # a weight of torch.func's must not outlive its transform
            return self._read(module, name)
        key = (id(module), name, torch.is_grad_enabled())
        if key not in held:
            held[key] = self._read(module, name)
        return held[key]

    def _read(self, module: nn.Module, name: str) -> Tensor | None:
        reader = self._readers[id(module)]
        assert reader is not None
        found = reader.read(module, name, self._weight_of)
        return found if found is None or found.requires_grad else found.to(self.dtype)

    def _weight_of(self, module: nn.Module) -> Tensor:
        """The weight of a module inside a read one."""
        reader = reader_of(module)
        return module.weight if reader is None else reader.weight(module, self._weight_of).to(self.dtype)  # type: ignore

    @property
    def dtype(self) -> torch.dtype:
        """That of the model's first parameter which is read as it is (the embedding): into it weights are dequantised."""
        return next((p.dtype for p in self._plain(self.model)), torch.float32)

    def _plain(self, module: nn.Module) -> Iterator[Tensor]:
        reader = self._readers.get(id(module))
        if reader is not None:
            inner = reader.inner(module)
            if inner is module or reader_of(inner) is not None:
                return
            module = inner
        yield from (p for p in module._parameters.values() if p is not None and p.dtype.is_floating_point)
        for child in module._modules.values():
            if child is not None:
                yield from self._plain(child)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Each weight that this thread reads in here is made once, and let go at the end."""
        me = threading.get_ident()
        if self.plain or me in self._held:
            yield
            return
        self._held[me] = {}
        try:
            yield
        finally:
            del self._held[me]

    def told(self) -> str:
        """What is dequantised, in words: how many matrices, of which format, into which dtype; empty if nothing is."""
        formats: Counter[str] = Counter()
        for module in self.model.modules():
            reader = reader_of(module)
            if reader is not None and reader.told(module):
                formats[reader.told(module)] += 1
        counted = ", ".join(f"{count} of {words}" for words, count in formats.items())
        kinds = "matrix is" if sum(formats.values()) == 1 else "matrices are"
        into = str(self.dtype).removeprefix("torch.")
        return f"{sum(formats.values())} {kinds} dequantised as read, into {into}: {counted}" if formats else ""

    # -- copies --------------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[Any, Any]) -> AsRead:
        if id(self) not in memo:
            memo[id(self)] = AsRead(self.model)  # known before the model is copied, which may refer to its own views
            memo[id(self)].model = copy.deepcopy(self.model, memo)
        return memo[id(self)]

    def view_of_copy(self, view: nn.Module, memo: dict[Any, Any]) -> nn.Module:
        """The view of a copy of what `view` shows, which may be under way."""
        as_read, module = copy.deepcopy(self, memo), self.shown(view)
        return as_read._view(copy.deepcopy(module, memo), *self._told(module))

    def __reduce__(self) -> tuple[Any, ...]:
        return AsRead, (self.model,)


class Shown:
    """What a view has beside the attributes of the module that it shows."""

    as_read: ClassVar[AsRead]

    @property
    def _modules(self) -> dict[str, nn.Module | None]:
        own = self.__dict__["_modules"]
        return {name: None if child is None else self.as_read.of(child) for name, child in own.items()}

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__
        for held in ("_parameters", "_buffers"):
            if name in own[held]:
                return own[held][name]
        if name in own["_modules"]:
            return None if own["_modules"][name] is None else self.as_read.of(own["_modules"][name])
        module = self.as_read.shown(cast(nn.Module, self))
        reader = reader_of(module)
        if reader is not None and reader.inner(module) is not module:  # an embedding's padding_idx, say
            return getattr(reader.inner(module), name)
        raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}", name=name, obj=self)

    def __deepcopy__(self, memo: dict[Any, Any]) -> nn.Module:
        return self.as_read.view_of_copy(cast(nn.Module, self), memo)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _viewed, (self.as_read, self.as_read.shown(cast(nn.Module, self)))


def _viewed(views: AsRead, module: nn.Module) -> nn.Module:
    return views.of(module)


def _read(name: str) -> property:
    """The attribute `name` of a view, read by its reader."""
    return property(lambda self: self.as_read.read(self, name))


def bare(module: nn.Module) -> nn.Module:
    """`bare(model.wrapped)`: the vendor's module itself, of a view; any other as it is."""
    return module.as_read.shown(module) if isinstance(module, Shown) else module

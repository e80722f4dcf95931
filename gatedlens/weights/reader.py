"""A reader: how the weight of one kind of module is read, where its parameters do not hold it as floats.

    class Mine(Reader):
        def fits(self, module): ...                  # whether it reads this module
        def weight(self, module, weight_of): ...     # the matrix, as the forward is to read it

Readers are data for `AsRead`; those that gatedlens knows are in `quantised.py` and `adapters.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

WeightOf = Callable[[nn.Module], Tensor]  # reads the weight of a module, whatever kind it is
PLAIN: tuple[type[nn.Module], ...] = (nn.Linear, nn.Embedding)  # what a read module may stand for


class Reader(ABC):
    """How one kind of module is read. `told(module)` is what a log line calls it; an adapter's is empty."""

    names: ClassVar[tuple[str, ...]] = ("weight", "bias")  # the attributes that are read by it

    @abstractmethod
    def fits(self, module: nn.Module) -> bool:
        """Whether `module` is of this kind."""

    @abstractmethod
    def weight(self, module: nn.Module, weight_of: WeightOf) -> Tensor:
        """The weight, as floats. `weight_of` reads a module inside, which may be of another kind."""

    def bias(self, module: nn.Module, weight_of: WeightOf) -> Tensor | None:
        """The bias; None without."""
        return module._parameters.get("bias")

    def inner(self, module: nn.Module) -> nn.Module:
        """The module that holds what `module` lacks: its sizes, an embedding's padding_idx."""
        return module

    def kind(self, module: nn.Module) -> type[nn.Module] | None:
        """The class of torch's that it stands for; None: none, and `why_not` says more."""
        inner = self.inner(module)
        return next((kind for kind in PLAIN if isinstance(inner, kind)), None)

    def why_not(self, module: nn.Module) -> str:
        """Why this very module cannot be read; an empty text if it can."""
        return ""

    def told(self, module: nn.Module) -> str:
        """Its format in words: "bitsandbytes 4 bit (nf4)"."""
        return ""

    def read(self, module: nn.Module, name: str, weight_of: WeightOf) -> Tensor | None:
        """The attribute `name` of `module`."""
        return self.bias(module, weight_of) if name == "bias" else self.weight(module, weight_of)


def held_weight(module: nn.Module) -> Tensor | None:
    """The parameter or buffer that stands under the name `weight`."""
    found = module._parameters.get("weight")
    return module._buffers.get("weight") if found is None else found


def as_floats(weight: Tensor) -> Tensor:
    """A weight that is not quantised yet (it becomes so when it is moved), as it is."""
    return weight.detach() if weight.dtype.is_floating_point else weight.to(torch.float32)

"""Adapters of peft, merged as they are read: W' = W + sum over active adapters of s B A, gradients in A and B.

    LoRA        W + s B A                                   Hu et al. 2021, arXiv 2106.09685
    DoRA        m (W + s B A) / norm of its rows            Liu et al. 2024, arXiv 2402.09353, eq. 5; the norm is held, as in peft

W itself may be quantised (QLoRA). A dropout in front of A is no part of a matrix, so a model that trains with one is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gatedlens.errors import CheckpointError
from gatedlens.weights.reader import Reader, WeightOf

PEFT = "peft."  # how the modules of its classes begin
DORA = "DoraLinearVariant"


class Lora(Reader):
    """peft's LoraLayer over a Linear or an Embedding."""

    def fits(self, module: nn.Module) -> bool:
        return {"base_layer", "lora_A", "lora_B"} <= module._modules.keys() and type(module).__module__.startswith(PEFT)

    def inner(self, module: nn.Module) -> nn.Module:
        return module._modules["base_layer"]  # type: ignore[return-value]

    def why_not(self, module: nn.Module) -> str:
        layer: Any = module
        if self.kind(module) is None:
            return f"it adapts a {type(self.inner(module)).__name__}, and a Linear or an Embedding is merged on read"
        if vars(layer).get("fan_in_fan_out"):
            return "its base layer is laid out the other way round (fan_in_fan_out)"
        variants = {name: type(variant).__name__ for name, variant in vars(layer).get("lora_variant", {}).items()}
        other = next((f"{kind} ({name})" for name, kind in variants.items() if kind != DORA), None)
        return "" if other is None else f"it is a {other}; plain LoRA and DoRA of a Linear are merged on read"

    def weight(self, module: nn.Module, weight_of: WeightOf) -> Tensor:
        W = weight_of(self.inner(module))
        merged = W
        for name in _active(module):
            merged = merged + self._change(module, name, W).to(W.dtype)
        return merged

    def _change(self, module: Any, name: str, W: Tensor) -> Tensor:
        """What one adapter adds to W."""
        scale = module.scaling[name]
        if self.kind(module) is nn.Embedding:
            return scale * (module.lora_embedding_B[name] @ module.lora_embedding_A[name]).T
        A, B = module.lora_A[name].weight, module.lora_B[name].weight
        if vars(module).get("lora_variant", {}).get(name) is None:
            return scale * (B @ A)
        adapted = W.to(A.dtype) + scale * (B @ A)
        norm = torch.linalg.norm(adapted.detach(), dim=1)
        return (module.lora_magnitude_vector[name].weight / norm).unsqueeze(1) * adapted - W.to(A.dtype)

    def bias(self, module: nn.Module, weight_of: WeightOf) -> Tensor | None:
        layer: Any = module
        own = self.inner(module)._parameters.get("bias")
        if self.kind(module) is nn.Embedding:
            return own
        for name in _active(module):
            added = layer.lora_B[name].bias
            if added is not None:
                own = layer.scaling[name] * added if own is None else own + (layer.scaling[name] * added).to(own.dtype)
        return own


def _active(module: Any) -> list[str]:
    """The adapters that are on and not merged into the base already; CheckpointError where dropout would be lost."""
    if module.disable_adapters or module.merged:
        return []
    names = [name for name in module.active_adapters if name in module.lora_A or name in module.lora_embedding_A]
    dropped = [
        name for name in names if isinstance(module.lora_dropout[name], nn.Dropout) and module.lora_dropout[name].p
    ]
    if dropped and module.training:
        raise CheckpointError(
            f"The adapter {dropped[0]!r} has lora_dropout={module.lora_dropout[dropped[0]].p} and the model trains: an adapter "
            "is merged as it is read, and a merged matrix has no dropout in front of A. Call model.eval(), or give the adapter "
            "lora_dropout=0."
        )
    return names


def swapped(module: nn.Module) -> nn.Module | None:
    """What stands in for a module that peft trains whole (`modules_to_save`): its copy where one is on, else the original; None
    for any other module."""
    if not {"original_module", "modules_to_save"} <= module._modules.keys():
        return None
    layer: Any = module
    names = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.modules_to_save]
    return layer.modules_to_save[names[0]] if names else layer.original_module


def is_peft(module: nn.Module) -> bool:
    """Whether peft put this module into a model."""
    return type(module).__module__.startswith(PEFT)

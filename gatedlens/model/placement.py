"""Placement: models whose weights accelerate spread over devices, or left in main memory or on the disk.

    model = gl.from_pretrained("state-spaces/mamba-2.8b-hf", device_map="auto")      # any checkpoint, ViM's as well
    model = gl.wrap(accelerate.dispatch_model(hf_model, device_map))
    model = gl.from_pretrained("path/to/folder", offload="disk")                     # without accelerate: see weights/disk.py

accelerate moves weights and activations in hooks around the vendor's forward, which ours replaces. So ours asks for the
same: before a block runs, the hooks of its modules bring the weights that are not on a device (`pre_forward`), the residual
stream goes to where they are, and afterwards the weights leave again (`post_forward`). What reads weights beside a forward
(an implicit attention, W_U) does so under `with at_hand(module):`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gatedlens.errors import CheckpointError
from gatedlens.files import optional
from gatedlens.weights import disk


def is_placed(wrapped: nn.Module) -> bool:
    """Whether this model's weights are not all where they are used: accelerate has placed them, or they are on the disk."""
    return "hf_device_map" in wrapped.__dict__ or disk.is_on_disk(wrapped)


def check_frozen(wrapped: nn.Module) -> None:
    """CheckpointError for a gradient of what is on the disk."""
    if disk.is_on_disk(wrapped):
        disk.check_frozen(wrapped)


def _hook(module: nn.Module) -> Any:
    return module.__dict__.get("_hf_hook")


@contextmanager
def at_hand(module: nn.Module | Sequence[nn.Module]) -> Iterator[None]:
    """`with at_hand(model.wrapped): ...`: every weight under `module` is on the device where it is used.

    Of a list of modules, their own weights alone and not what is beneath them.
    """
    parts = list(module.modules() if isinstance(module, nn.Module) else module)
    with ExitStack() as leaving:
        leaving.enter_context(disk.reading(parts))
        for part in parts:
            hook = _hook(part)
            if hook is not None and any(p.is_meta for p in part.parameters()):  # what is at hand already stays
                hook.pre_forward(part)
                leaving.callback(hook.post_forward, part, None)
        yield


def device_of(module: nn.Module | Sequence[nn.Module]) -> torch.device:
    """Where the weights of `module` (of a list: their own) are used; CheckpointError if they are nowhere."""
    parts = list(module.modules()) if isinstance(module, nn.Module) else list(module)
    first = next(p for part in parts for p in part.parameters(recurse=False))
    if not first.is_meta:
        return first.device
    for part in parts:
        given = getattr(_hook(part), "execution_device", None)
        if given is not None:
            return torch.device(given)
    raise CheckpointError(
        "The model's weights are on the meta device: they have shapes and no numbers. Load them (from_pretrained), or let "
        "accelerate place them (device_map=...)."
    )


def call(module: nn.Module | Sequence[nn.Module], function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)` with the weights under `module` at hand and the inputs where they are."""
    with at_hand(module):
        device = device_of(module)
        return function(*(_moved(value, device) for value in inputs))


def spread(wrapped: nn.Module, device_map: Any, max_memory: Any = None, offload_folder: Any = None) -> nn.Module:
    """`spread(wrapped, "auto")`: a module whose forward is ours alone, placed by accelerate as transformers places its own.

    device_map: "auto", a device, or {part: device}. A layer stays in one place.
    """
    accelerate = optional("accelerate", "scale")
    whole = sorted(
        {type(layer).__name__ for part in wrapped.children() if isinstance(part, nn.ModuleList) for layer in part}
    )
    if device_map == "auto":
        memory = accelerate.utils.get_balanced_memory(wrapped, max_memory, no_split_module_classes=whole)
        device_map = accelerate.infer_auto_device_map(wrapped, max_memory=memory, no_split_module_classes=whole)
    elif not isinstance(device_map, Mapping):
        try:
            device_map = {"": str(torch.device(device_map))}
        except RuntimeError as error:
            raise CheckpointError(f"device_map={device_map!r}: it is 'auto', a device, or {{part: device}}.") from error
    return accelerate.dispatch_model(wrapped, dict(device_map), offload_dir=offload_folder)


def _moved(value: Any, device: torch.device) -> Any:
    """A tensor, or a dataclass of tensors (what a call carries), on `device`; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _moved(getattr(value, f.name), device) for f in fields(value) if f.init})
    return value

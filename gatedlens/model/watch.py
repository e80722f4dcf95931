"""Watch: whether the modules that a hooked forward reads are still the ones that it was made for.

    watch = Watch(wrapped)
    watch.unchanged()                  # at every call: some tenths of a microsecond a module
    watch.check(wrapped, norms)        # where something has changed: CheckpointError for what cannot stand in for it

The hooked forward reads the weights of the wrapped model's modules and calls none of them. Whatever replaces a module, or
edits a number of it or of its config, is seen here; what a module of another class would compute would be lost, so it is
refused. Parametrised weights (torch.nn.utils.parametrize) are computed as they are read; those of pruning and of the older
weight_norm and spectral_norm by their own hooks (`recomputing`), as before a vendor's forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import itemgetter
from typing import Any, NamedTuple

from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from gatedlens.errors import CheckpointError
from gatedlens.model.config import FLOATS, dtype_name
from gatedlens.weights import reader_of, why_not_read

PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)  # the leaves whose weights are read
NORMS = (nn.RMSNorm, nn.LayerNorm)  # whose mathematics is known, whatever norm they stand for
RECOMPUTING = (WeightNorm, SpectralNorm, BasePruningMethod)  # the hooks that make a weight out of other parameters
SURROUNDING = ("_hf_hook", "__nnsight__", "_torchdynamo_orig_callable")  # marks of accelerate, nnsight, torch.compile
AGAIN = "Wrap it again: gl.wrap(model.wrapped)."
MERGE = "Merge the adapter (merge_and_unload) or load the model without quantisation first."


class Seen(NamedTuple):
    """What a module or a config was like: its class, the number of its attributes, and what the plain ones `said`."""

    owner: Any
    kind: type
    attributes: Mapping[str, Any]
    size: int
    read: Callable[[Any], Any]
    said: Any

    @staticmethod
    def of(owner: Any) -> Seen:
        attributes = owner if isinstance(owner, dict) else vars(owner)
        told = [name for name, value in attributes.items() if name == "_modules" or _is_told(name, value)]
        read: Callable[[Any], Any] = itemgetter(*told) if told else len
        return Seen(owner, type(owner), attributes, len(attributes), read, _copied(read(attributes)))


class Watch:
    """`unchanged()` compares a wrapped model with what it was like when this was made."""

    def __init__(self, wrapped: nn.Module):
        modules = dict(wrapped.named_modules())
        configs = {id(config): config for module in modules.values() if (config := _config(module)) is not None}
        self.kinds = {path: _stands_for(module) for path, module in _outside(wrapped)}
        self.seen = [Seen.of(owner) for owner in (*modules.values(), *configs.values())]
        own = [module._parameters for module in modules.values()]
        self.shapes = [(parameters, [p.shape for p in parameters.values() if p is not None]) for parameters in own]
        self.recomputing = list(_recomputing(modules.values()))

    def __getstate__(self) -> dict[str, Any]:
        return {"kinds": self.kinds}  # a copy of the model has modules of its own, which nobody has seen yet

    def unchanged(self) -> bool:
        """Whether every module is the one that it was, of the same class, sizes and numbers."""
        if "seen" not in self.__dict__:
            return False
        for owner, kind, attributes, size, read, said in self.seen:
            if type(owner) is not kind or len(attributes) != size or read(attributes) != said:
                return False
        return all(
            [p.shape for p in parameters.values() if p is not None] == shapes for parameters, shapes in self.shapes
        )

    def check(self, wrapped: nn.Module, norms: Mapping[int, tuple[type, ...]]) -> None:
        """CheckpointError where a module computes something else than the one that was in its place.

        norms: the classes of torch's that a norm, by its id, may be of: those whose mathematics our own is.
        """
        for path, module in _outside(wrapped):
            before = self.kinds.get(path)
            if before is None or _stands_for(module).forward is before.forward:
                continue
            if type(module) not in norms.get(id(module), ()):
                raise CheckpointError(
                    f"{path} of the wrapped model is a {type(module).__name__}; it was a {before.__name__} when it was "
                    f"wrapped. gatedlens reads weights alone, so what another class computes would be lost. {MERGE}"
                )


def check_plain(wrapped: nn.Module) -> None:
    """CheckpointError for adapted, quantised or patched layers that no reader reads: what they do beside their weights would be
    lost."""
    for path, module in _outside(wrapped):
        why = why_not_read(module)
        if why:
            raise CheckpointError(f"{path} is a {type(module).__name__} that gatedlens cannot read: {why}. {MERGE}")
        if reader_of(module) is not None:
            continue
        if _is_own(module) or (path and _is_patched(module)):
            raise CheckpointError(
                f"{path} is a {type(module).__name__}, whose forward is its own; gatedlens reads its weight alone. {MERGE}"
            )
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dtype not in FLOATS:
                floats, where = ", ".join(map(dtype_name, FLOATS)), f"{path}.{name}" if path else name
                raise CheckpointError(
                    f"{where} is {dtype_name(parameter.dtype)}; expected are floats ({floats}). {MERGE}"
                )


def _stands_for(module: nn.Module) -> type[nn.Module]:
    """The class of a module; of one that a reader reads, that of torch's which it is read as."""
    reader = reader_of(module)
    return (None if reader is None else reader.kind(module)) or type(module)


def _outside(wrapped: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules by path, without those inside one that a reader reads."""
    yield path, wrapped
    if reader_of(wrapped) is None:
        for name, child in wrapped._modules.items():
            if child is not None:
                yield from _outside(child, f"{path}.{name}" if path else name)


def _is_own(module: nn.Module) -> bool:
    """Whether the class of `module` makes more of its weight than torch's class does, or has none that is a tensor."""
    packed = "qweight" in {**module._buffers, **module._parameters}  # as GPTQ and AWQ keep weights
    if packed or "base_layer" in module._modules or callable(getattr(type(module), "weight", None)):
        return True
    return isinstance(module, PLAIN) and all(type(module).forward is not kind.forward for kind in PLAIN)


def _is_patched(module: nn.Module) -> bool:
    """Whether somebody gave this very module another forward, which does more than to surround or compile its own."""
    own = vars(module)
    return "forward" in own and not any(
        mark in own or mark in getattr(own["forward"], "__dict__", ()) for mark in SURROUNDING
    )


def _config(module: nn.Module) -> Any:
    config = vars(module).get("config")
    return config if isinstance(config, dict) or getattr(config, "__dict__", None) is not None else None


def _is_told(name: str, value: Any) -> bool:
    """Whether an attribute is a number, a word or a list of these that the module, or its config, goes by."""
    return not name.startswith("_") and name != "training" and _is_plain(value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, bool | int | float | str)


def _copied(value: Any) -> Any:
    """`value` with lists and dicts of its own, so that edits in place are seen."""
    if isinstance(value, list | tuple):
        return type(value)(map(_copied, value))
    return {key: _copied(each) for key, each in value.items()} if isinstance(value, dict) else value


def _recomputing(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, Any]]:
    for module in modules:
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, RECOMPUTING):
                yield module, hook

"""Fit: whether a checkpoint's tensors are those of a module, and a module that holds these very tensors.

check(source, missing(module, held), set(held) - set(wanted), misshapen(wanted, held))     # CheckpointError unless all is there
holding(module, tensors)                                                                   # not copies of them
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from gatedlens.errors import CheckpointError


def check(source: str, missing: Any, extra: Any, mismatched: Any = ()) -> None:
    """Raise unless a checkpoint held exactly what its config asks for."""
    problems = []
    for what, keys in (("is missing", missing), ("has unknown", extra), ("has misshapen", mismatched)):
        keys = sorted(str(k) for k in keys)
        if keys:
            problems.append(f"{what} {len(keys)} weights: {', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''}")
    if problems:
        raise CheckpointError(f"The checkpoint {source} {'; it '.join(problems)}. It does not fit its config.json.")


def missing(module: nn.Module, held: Iterable[str]) -> set[str]:
    """The names of `module` that are not held, nor tied to one that is."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    known = {id(parameters[name]) for name in held if name in parameters}
    absent = set(module.state_dict()) - set(held)
    return {name for name in absent if name not in parameters or id(parameters[name]) not in known}


def misshapen(wanted: Mapping[str, Tensor], held: Mapping[str, Any]) -> list[str]:
    """The tensors whose shape is another than that of the same name in `wanted`, with both."""
    return [f"{k} {list(held[k])} for {list(v.shape)}" for k, v in wanted.items() if k in held and held[k] != v.shape]


def holding(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module without memory, made to hold these very tensors; those that it ties are one parameter still."""
    before = dict(module.named_parameters(remove_duplicate=False))
    module.load_state_dict(tensors, strict=False, assign=True)
    made = {
        id(before[name]): p
        for name, p in module.named_parameters(remove_duplicate=False)
        if name in tensors and name in before
    }
    for name, old in before.items():
        if name not in tensors:
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, made[id(old)])
    return module

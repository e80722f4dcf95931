"""Options: what a user passes, held against the function's own annotations before anything runs.

@checked
def generate(model, input, max_new_tokens: int = 10, temperature: float = 1.0): ...

generate(model, text, max_new_tokens="ten")   # InputError: generate(max_new_tokens='ten'): expected a whole number.

The annotation is the one place where a kind is said. What it says in words that are not in `KINDS` (shapes, our own
classes, what may be many things) is left to the function, which knows more of it.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from os import PathLike
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar

import torch
from torch import Tensor

from gatedlens.errors import InputError

P = ParamSpec("P")
R = TypeVar("R")
# What `device=` takes; for type checkers alone, since `device_of` says more of what is none.
if TYPE_CHECKING:
    Device: TypeAlias = torch.device | str | int | None
else:
    Device = Any


def is_whole(value: Any) -> bool:
    """Whether it is one whole number: an int, numpy's or a tensor of one too, and no bool."""
    if isinstance(value, bool):
        return False
    if getattr(value, "ndim", 0) or getattr(value, "dtype", None) == torch.bool:  # an array of one is no number
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def is_number(value: Any) -> bool:
    """Whether it measures: a real number that is no bool and not NaN."""
    return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)


def is_many(value: Any) -> bool:
    """Whether it can be walked through: no tensor or array of no axes, which only its type lets pass for a list."""
    try:
        iter(value)
    except TypeError:
        return False
    return True


def _is_a(kind: str) -> Callable[[Any], bool]:
    """Whether a value is of a class of this name, or of one beneath it: this file stands below every model."""
    return lambda value: kind in {each.__name__ for each in type(value).__mro__}


# What each word of an annotation asks of a value, and how an error says it.
KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "int": (is_whole, "a whole number"),
    "float": (is_number, "a number"),
    "bool": (lambda value: isinstance(value, bool), "True or False"),
    "str": (lambda value: isinstance(value, str), "text"),
    "None": (lambda value: value is None, "None"),
    "Path": (lambda value: isinstance(value, PathLike), "a path"),
    "slice": (lambda value: isinstance(value, slice), "a slice"),
    "range": (lambda value: isinstance(value, range), "a range"),
    "list": (lambda value: isinstance(value, list), "a list"),
    "tuple": (lambda value: isinstance(value, tuple), "a tuple"),
    "dict": (lambda value: isinstance(value, dict), "a dict"),
    "Sequence": (lambda value: isinstance(value, Sequence) and not isinstance(value, str), "a list"),
    "Iterable": (lambda value: is_many(value) and not isinstance(value, str), "a list"),
    "Mapping": (lambda value: isinstance(value, Mapping), "a dict"),
    "Callable": (callable, "a function"),
    "Tensor": (lambda value: isinstance(value, Tensor), "a tensor"),
    "Float": (lambda value: isinstance(value, Tensor), "a tensor"),
    "Int": (lambda value: isinstance(value, Tensor), "a tensor"),
    "Bool": (lambda value: isinstance(value, Tensor), "a tensor"),
    "Shaped": (lambda value: isinstance(value, Tensor), "a tensor"),
}
A_MODEL = "a gatedlens model (gl.from_pretrained(...), or gl.wrap(model) around one that you have)"
KINDS["HookedModel"] = (_is_a("HookedModel"), A_MODEL)
KINDS["ActivationCache"] = (_is_a("ActivationCache"), "a cache of run_with_cache")
KINDS["HookedLanguageModel"] = (_is_a("HookedLanguageModel"), f"{A_MODEL} that reads text")
# A text is a sequence of texts too: whether it is meant so, the function knows.
TEXTS = {"Sequence[str]": "Texts", "Iterable[str]": "Texts"}
KINDS["Texts"] = (is_many, "a list of texts")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """`@checked`: InputError, before the function runs, for an option that is not of the kind its annotation says."""
    parameters = inspect.signature(function).parameters.values()
    kinds = {parameter.name: kind for parameter in parameters if (kind := _kinds_of(parameter.annotation))}
    names = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_POSITIONAL]

    @functools.wraps(function)
    def asked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in (*zip(names, args, strict=False), *kwargs.items()):
            if name in kinds and not any(fits(value) for fits, _ in kinds[name]):
                expected = " or ".join(dict.fromkeys(said for _, said in kinds[name]))
                raise InputError(f"{function.__qualname__}({name}={_told(value)}): expected {expected}.")
        return function(*args, **kwargs)

    return asked


def taking(source: Callable[..., Any], only: Sequence[str] | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """`@taking(Options)`: `help()` and editors see, in place of `**options`, those that `source` takes by name.

    only: which of them, where `source` takes more than the function hands on. A function that takes one of the names itself keeps
    its own.
    """
    offered = {
        name: one.replace(kind=one.KEYWORD_ONLY)
        for name, one in inspect.signature(source).parameters.items()
        if one.default is not one.empty and one.kind is not one.VAR_KEYWORD and (only is None or name in only)
    }

    def tell(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        own = {name: one for name, one in signature.parameters.items() if one.kind is not one.VAR_KEYWORD}
        more = [one for name, one in offered.items() if name not in own]
        function.__signature__ = signature.replace(parameters=[*own.values(), *more])  # type: ignore[attr-defined]
        return function

    return tell


def tensor_of(value: Any, what: str, **options: Any) -> Tensor:
    """`tensor_of(value, "attention_mask")`: `torch.as_tensor(value)`; InputError that says what cannot be one."""
    try:
        return torch.as_tensor(value, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{what} is {_told(value)}: it cannot be read as numbers ({error}).") from error


def device_of(device: Device) -> torch.device | None:
    """`device_of("cuda:0")`: the device that a user named; None stays None; InputError where this machine lacks it."""
    try:
        return None if device is None else torch.empty(0, device=device).device
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise InputError(f"device={_told(device)} is not to be had here: {str(error).splitlines()[0]}") from error


def _kinds_of(annotation: Any) -> list[tuple[Callable[[Any], bool], str]]:
    """What the words of an annotation ask; nothing, if one of them is not known here."""
    words = [TEXTS.get(word.strip(), word.partition("[")[0].strip()) for word in _alternatives(str(annotation))]
    return [KINDS[word] for word in words] if all(word in KINDS for word in words) else []


def _alternatives(annotation: str) -> list[str]:
    """`int | list[int | str]` as `int`, `list[int | str]`: split at the bars that stand in no brackets."""
    parts, depth = [""], 0
    for sign in annotation:
        depth += (sign == "[") - (sign == "]")
        if sign == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return parts


def _told(value: Any) -> str:
    """A value as an error shows it: a tensor by its dtype and shape, and not all of what is long."""
    if isinstance(value, torch.nn.Module):
        return f"a {type(value).__name__}"
    said = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) and value.ndim else repr(value)
    return said if len(said) <= 80 else f"{said[:77]}..."

"""Shapes and types, checked while the tests run: `install()` before gatedlens is imported.

Every function of gatedlens is checked by beartype; those whose annotations speak of axes by jaxtyping as well, which compares
the axes of all arguments with one another: at its first calls, and now and then later on. Jaxtyping's own import hook wraps
every function, whether it speaks of axes or not, and checks it at every call, and writes a checker anew for each function inside
another at each call of that one: that was more than half of the time of all tests.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections import Counter
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import beartype
from beartype.roar import BeartypeDecorHintException
from jaxtyping import AbstractArray, install_import_hook

BY_JAXTYPING = jaxtyping.jaxtyped
FIRST, EVERY = 100, 64  # calls of a function whose axes are checked
INNER = 3  # a function inside another is made anew at each call of that one: how many of them are checked


made: Counter[types.CodeType] = Counter()  # how often each function inside another was made


def speaks_of_axes(fn: Callable[..., Any]) -> bool:
    """Whether an annotation holds a jaxtyping array somewhere; one that cannot be read yet counts as such."""

    def axes_in(annotation: Any) -> bool:
        if inspect.isclass(annotation) and issubclass(annotation, AbstractArray):
            return True
        return any(axes_in(part) for part in typing.get_args(annotation))

    try:
        return any(axes_in(hint) for hint in typing.get_type_hints(fn).values())
    except (NameError, TypeError, AttributeError, SyntaxError):
        return True


def told_apart(wrapper: Any, fn: Any, said: dict[str, Any]) -> Any:
    """The wrapper, with annotations as they are written: beartype puts types in place of the texts that gatedlens reads."""
    wrapper.__annotations__, fn.__annotations__ = said, said
    return wrapper


def now_and_then(fn: Any, whole: Any) -> Any:
    """`fn`, in whose place `whole`, which checks it, is called at the first calls and now and then later on."""
    calls = 0

    @functools.wraps(fn)
    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return (whole if calls <= FIRST or calls % EVERY == 0 else fn)(*args, **kwargs)

    return called


def checked(*, typechecker: Any) -> Callable[[Any], Any]:
    """In place of `jaxtyping.jaxtyped`, as the import hook calls it on each function and class."""

    def decorate(fn: Any) -> Any:
        if not inspect.isfunction(fn):
            return BY_JAXTYPING(fn, typechecker=typechecker)
        if "<locals>" in fn.__qualname__:
            made[fn.__code__] += 1
            if made[fn.__code__] > INNER:
                return fn
        if speaks_of_axes(fn):
            return now_and_then(fn, BY_JAXTYPING(fn, typechecker=typechecker))
        said = dict(fn.__annotations__)
        try:
            return told_apart(beartype(fn), fn, said) if said else fn
        except (
            BeartypeDecorHintException
        ):  # of a ParamSpec, say, that beartype reads only where jaxtyping has read it first
            return BY_JAXTYPING(fn, typechecker=typechecker)

    return decorate


def install() -> None:
    """Check every module of gatedlens that is imported from now on."""
    jaxtyping.jaxtyped = checked
    install_import_hook("gatedlens", "beartype.beartype")

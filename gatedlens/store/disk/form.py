"""Form: what a value that was read from JSON must look like. The first place that does not is named.

    misfit({"rows": "8"}, {"rows": COUNT})              # "rows is '8', expected a whole number of at least 0"

A form is a Kind, {key: form} (other keys do not matter), [form] for a list of any length, or Maybe(form) where null may stand.

This compares a nested document as a whole (a manifest, a line of the journal), and tells by a path where in it something
does not fit. `files.Fields` does another thing: it hands out the fields of a flat file one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

LARGEST = 2**63  # what a file's size fits in


class Kind(NamedTuple):
    """A single value: what it is in words, and whether one is it."""

    words: str
    holds: Callable[[Any], bool]


class Maybe(NamedTuple):
    """The form, or null."""

    form: Any


def is_whole(value: Any, least: int = 0, most: int = LARGEST) -> bool:
    """Whether a value is a whole number; True and 1.0 are none."""
    return type(value) is int and least <= value < most


def one_of(words: Iterable[str]) -> Kind:
    known = tuple(words)
    return Kind(f"one of {', '.join(map(repr, known))}", lambda value: isinstance(value, str) and value in known)


TEXT = Kind("a text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
COUNT = Kind("a whole number of at least 0", is_whole)
CHECKSUM = Kind("a checksum, a whole number of 32 bits", lambda value: is_whole(value, most=2**32))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
TEXTS = Kind(
    "an object of texts", lambda value: isinstance(value, dict) and all(isinstance(v, str) for v in value.values())
)


def misfit(value: Any, form: Any, where: str = "it") -> str | None:
    """`where` is what, and what was expected there; None if the value has the form."""
    if isinstance(form, Maybe):
        return None if value is None else misfit(value, form.form, where)
    if isinstance(form, Kind):
        return None if form.holds(value) else f"{where} is {_shown(value)}, expected {form.words}"
    if isinstance(form, list):
        if not isinstance(value, list):
            return f"{where} is {_shown(value)}, expected a list"
        found = (misfit(one, form[0], f"{where}[{i}]") for i, one in enumerate(value))
        return next((said for said in found if said), None)
    if not isinstance(value, Mapping):
        return f"{where} is {_shown(value)}, expected an object with {', '.join(form)}"
    prefix = "" if where == "it" else f"{where}."
    for key, part in form.items():
        said = misfit(value[key], part, prefix + key) if key in value else f"{prefix}{key} is missing"
        if said:
            return said
    return None


def _shown(value: Any) -> str:
    told = "null" if value is None else repr(value)
    return told if len(told) <= 60 else f"{told[:57]}..."

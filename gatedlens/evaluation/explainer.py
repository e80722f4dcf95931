"""Explainer: an attribution method with options, by a name that says it all.

    explainer("lrp"), explainer("gradient_attention:factors=hidden,mode=official")
    explainer("gradient_attention:factors=scan+act")(model, tokens, target=7).scores

In a name, a number stands for itself, and several words of one option are joined by "+".
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gatedlens.attribution import METHODS, Attribution, method
from gatedlens.errors import InputError, did_you_mean

NEEDS_NOTHING = "baseline"  # the option of methods that put "nothing" somewhere


@dataclass(frozen=True)
class Explainer:
    """name: as it was given; method: one of `gl.attribution.METHODS`."""

    name: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, model: Any, input: Any, target: Any = None, **more: Any) -> Attribution:
        """The attribution; of `more` the method gets what it knows, but not what the name decided."""
        known = inspect.signature(METHODS[self.method]).parameters
        given = {key: value for key, value in more.items() if key in known}
        return METHODS[self.method](model, input, target, **{**given, **self.options})


def explainer(name: str) -> Explainer:
    """The Explainer of a name; InputError for a method or an option that there is not."""
    word, _, rest = name.partition(":")
    known = [key for key in inspect.signature(method(word)).parameters if key not in ("model", "input", "target")]
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals or key not in known:
            raise InputError(
                f"{name!r}: {word} has no option {key!r}; they are {', '.join(known)}.{did_you_mean(key, known)}"
            )
        options[key] = _value(value)
    return Explainer(name, word, options)


def _value(text: str) -> Any:
    if "+" in text.rstrip("+"):
        return tuple(_value(part) for part in text.split("+"))
    if text.endswith("+"):  # a sequence of one: "scan+"
        return (_value(text[:-1]),)
    words = {"True": True, "False": False, "None": None}
    if text in words:
        return words[text]
    try:
        return json.loads(text)  # a number
    except json.JSONDecodeError:
        return text

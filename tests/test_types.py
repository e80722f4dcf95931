"""Types of what a user reaches: an editor completes what a call returns, and a type checker knows what it takes."""

from __future__ import annotations

import inspect

import pytest

from tests.test_docstrings import REACHED


def untyped(function: object) -> list[str]:
    """What of a signature is Any, or says nothing: parameters by name, and "return"."""
    signature = inspect.signature(inspect.unwrap(function))
    handed_on = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)  # options of another function
    said = {
        n: p.annotation for n, p in signature.parameters.items() if n not in ("self", "cls") and p.kind not in handed_on
    }
    if not inspect.isclass(function):
        said["return"] = signature.return_annotation
    return [
        name for name, annotation in said.items() if annotation is inspect.Signature.empty or str(annotation) == "Any"
    ]


@pytest.mark.parametrize("said", [said for said, value in REACHED.items() if not inspect.isclass(value)])
def test_nothing_that_a_user_reaches_is_any(said):
    assert not untyped(REACHED[said])

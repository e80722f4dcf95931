"""Options are held against the annotations of the function that they are passed to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gatedlens as gl
from gatedlens.options import checked


@checked
def asked(
    model: Any,
    n: int = 1,
    share: float = 0.5,
    *,
    on: bool = False,
    word: str | None = None,
    layers: int | Sequence[int | str] | None = None,
    metric: Callable[..., Tensor] | None = None,
    index: int | slice | list[int] | Tensor = 0,
) -> tuple[Any, ...]:
    return model, n, share, on, word, layers, metric, index


def test_what_fits_goes_through_as_it_is():
    assert asked("m") == ("m", 1, 0.5, False, None, None, None, 0)
    given = {"on": True, "word": "x", "layers": [1, "a"], "metric": len, "index": slice(3)}
    assert asked(None, 3, 2, **given) == (None, 3, 2, *given.values())
    assert asked("m", np.int64(3), np.float32(0.5))[1] == 3
    assert asked("m", index=torch.tensor([1, 2]))[-1].tolist() == [1, 2]
    assert asked.__name__ == "asked" and asked.__doc__ is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n": "ten"}, r"asked\(n='ten'\): expected a whole number"),
        ({"n": True}, "expected a whole number"),
        ({"n": 1.0}, "expected a whole number"),
        ({"n": None}, "expected a whole number"),
        ({"share": float("nan")}, "expected a number"),
        ({"share": "half"}, "expected a number"),
        ({"on": 1}, "expected True or False"),
        ({"word": 3}, "expected text or None"),
        ({"layers": "all"}, "expected a whole number or a list or None"),
        ({"metric": 3}, "expected a function or None"),
        ({"index": "0"}, "expected a whole number or a slice or a list or a tensor"),
        ({"n": torch.zeros(2, 3)}, r"asked\(n=torch.float32 \[2, 3\]\)"),
        ({"n": "x" * 1000}, r"n='x{76}\.\.\."),
    ],
)
def test_what_does_not_fit_is_named(given, message):
    with pytest.raises(gl.InputError, match=message):
        asked("m", **given)


def test_positional_options_are_checked_too_and_python_s_own_errors_stay():
    with pytest.raises(gl.InputError, match=r"share='x'"):
        asked("m", 1, "x")
    with pytest.raises(TypeError, match="unexpected keyword"):
        asked("m", wrong=1)

"""Backends: what draws a picture: matplotlib, or plotly where a person wants to hover."""

from __future__ import annotations

from gatedlens.errors import InputError, did_you_mean
from gatedlens.foreign import Axes

MATPLOTLIB, PLOTLY = BACKENDS = ("matplotlib", "plotly")


def plotly(backend: str, ax: Axes | None) -> bool:
    """Whether plotly is asked for; InputError for a backend that is none, and for plotly on an `ax`, which is matplotlib's."""
    if backend not in BACKENDS:
        raise InputError(
            f"backend={backend!r}: it is {' or '.join(map(repr, BACKENDS))}.{did_you_mean(backend, BACKENDS)}"
        )
    if backend == PLOTLY and ax is not None:
        raise InputError("backend='plotly' makes a figure of its own: ax is one of matplotlib's.")
    return backend == PLOTLY

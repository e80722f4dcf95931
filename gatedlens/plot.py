"""Plots: matplotlib figures by default, HTML where a person would want to hover.

    gl.plot.heatmap(attention.mean()[0], tokens=model.to_str_tokens(text))     # a matplotlib Figure
    gl.plot.layers({0: A0, 1: A1}, tokens)                                      # one panel a layer
    gl.plot.text(scores, tokens)                                                # coloured tokens, shows in a notebook

matplotlib is an extra (`pip install gatedlens[plot]`) and is imported when a figure is asked for.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatedlens.errors import InputError

MAX_LABELS = 80  # token labels an axis can hold and stay legible


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'gatedlens[plot]'.") from error
    return plt


def label(token: str) -> str:
    """A token as it can stand in a plot: white space made visible."""
    shown = token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
    return shown if shown else "∅"


def _matrix(matrix: Any, tokens: Sequence[str] | None) -> Tensor:
    """A [dst, src] matrix on the CPU, checked against its labels."""
    data = torch.as_tensor(matrix).detach().float().cpu()
    if data.ndim != 2:
        raise InputError(
            f"A heat map shows one [dst, src] matrix; this has shape {list(data.shape)}. Pick a row of the batch."
        )
    if tokens is not None and len(tokens) != data.shape[0]:
        raise InputError(f"{len(tokens)} token labels for a matrix of {data.shape[0]} positions.")
    return data


def heatmap(
    matrix: Any,
    tokens: Sequence[str] | None = None,
    title: str = "Implicit attention",
    value: str = "attention (mean over channels)",
    ax: Any = None,
) -> Any:
    """`gl.plot.heatmap(A.mean()[0], tokens)`: a [dst, src] matrix with token labels; signed values are centred on white.

    Returns the matplotlib Figure (that of `ax` if given).
    """
    data = _matrix(matrix, tokens)
    if ax is None:
        size = min(4 + 0.16 * len(data), 14)
        _, ax = _pyplot().subplots(figsize=(size + 1, size), layout="constrained")
    bound = max(float(data.abs().max()), 1e-12)
    signed = bool((data < 0).any())
    image = ax.imshow(data, cmap="RdBu_r" if signed else "Blues", vmin=-bound if signed else 0, vmax=bound)
    ax.set_title(title)
    ax.set_xlabel("source token")
    ax.set_ylabel("destination token")
    if tokens is not None and len(tokens) <= MAX_LABELS:
        names = [label(token) for token in tokens]
        small = 9 if len(names) <= 32 else 7 if len(names) <= 56 else 5
        ax.set_xticks(range(len(names)), names, rotation=90, fontsize=small, family="monospace")
        ax.set_yticks(range(len(names)), names, fontsize=small, family="monospace")
    ax.figure.colorbar(image, ax=ax, label=value, shrink=0.8)
    return ax.figure


def layers(
    matrices: Mapping[Any, Any],
    tokens: Sequence[str] | None = None,
    title: str = "Implicit attention by layer",
    **style: Any,
) -> Any:
    """`gl.plot.layers({0: A0, 1: A1}, tokens)`: one heat map a layer, side by side. Returns the matplotlib Figure."""
    plt = _pyplot()
    if not matrices:
        raise InputError("There is no layer to plot: the mapping is empty.")
    size = min(4 + 0.13 * len(next(iter(matrices.values()))), 9)
    columns = min(len(matrices), 4)
    rows = -(-len(matrices) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(size * columns, (size - 0.6) * rows), squeeze=False, layout="constrained"
    )
    for ax in axes.flat[len(matrices) :]:
        ax.remove()
    for ax, (name, matrix) in zip(axes.flat, matrices.items(), strict=False):
        heatmap(matrix, tokens, title=f"layer {name}" if isinstance(name, int) else str(name), ax=ax, **style)
    figure.suptitle(title)
    return figure


def panels(rows: int, columns: int, size: float = 5.0) -> tuple[Any, Any]:
    """(figure, axes [rows, columns]): an empty figure of square panels, for the `ax` of the others."""
    return _pyplot().subplots(
        rows, columns, figsize=(size * columns, (size - 0.6) * rows), squeeze=False, layout="constrained"
    )


def image(pixels: Any, heat: Any = None, title: str = "", value: str = "relevance", ax: Any = None) -> Any:
    """`gl.plot.image(image[0], heat=rows_by_columns)`: an image [channel height width], under a map of its patches.

    Values are stretched to the image's own range. Returns the matplotlib Figure.
    """
    data = torch.as_tensor(pixels).detach().float().cpu()
    if data.ndim != 3:
        raise InputError(f"An image is [channel, height, width]; this has shape {list(data.shape)}.")
    if ax is None:
        _, ax = _pyplot().subplots(layout="constrained")
    data = (data - data.min()) / (data.max() - data.min()).clamp(min=1e-12)
    height, width = data.shape[1:]
    box = (-0.5, width - 0.5, height - 0.5, -0.5)
    ax.imshow(data[0] if len(data) == 1 else data.permute(1, 2, 0), cmap="gray", extent=box)
    if heat is not None:
        heat = torch.as_tensor(heat).detach().float().cpu()
        shown = ax.imshow(heat, cmap="inferno", alpha=0.55, extent=box, interpolation="nearest")
        ax.figure.colorbar(shown, ax=ax, label=value, shrink=0.8)
    ax.set_title(title)
    ax.set_xticks([])
    ax.set_yticks([])
    return ax.figure


class Html:
    """A piece of HTML that a notebook shows and `save` writes as a page of its own."""

    def __init__(self, body: str, title: str = "gatedlens"):
        self.body = body
        self.title = title

    def _repr_html_(self) -> str:
        return self.body

    def page(self) -> str:
        head = f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(self.title)}</title></head>"
        return f"{head}<body style='font-family:system-ui,sans-serif;max-width:70em;margin:2em auto'>{self.body}</body></html>"

    def save(self, path: str | Path) -> Path:
        """Write a self-contained page and return its path."""
        Path(path).write_text(self.page(), encoding="utf-8")
        return Path(path)


def colour(share: float) -> str:
    """A background for a value in [-1, 1]: red above zero, blue below."""
    r, g, b = (214, 40, 40) if share > 0 else (29, 78, 216)
    return f"rgba({r},{g},{b},{min(abs(share), 1):.3f})"


def text(scores: Any, tokens: Sequence[str], title: str = "Scores by token") -> Html:
    """`gl.plot.text(A.mean()[0, -1], tokens)`: the text with each token coloured by its score; hover for the number."""
    data = torch.as_tensor(scores).detach().float().cpu()
    if data.ndim != 1 or len(data) != len(tokens):
        raise InputError(f"text() colours {len(tokens)} tokens by as many scores; these have shape {list(data.shape)}.")
    bound = max(float(data.abs().max()), 1e-12)
    spans = "".join(
        f"<span title='{html.escape(repr(token), quote=True)} at {i}: {value:.4g}' "
        f"style='background:{colour(value / bound)};padding:1px 0'>{html.escape(label(token))}</span>"
        for i, (token, value) in enumerate(zip(tokens, data.tolist(), strict=True))
    )
    heading = f"<p style='margin:.3em 0'><b>{html.escape(title)}</b></p>"
    return Html(f"{heading}<p style='font-family:monospace;line-height:1.8;overflow-wrap:anywhere'>{spans}</p>", title)

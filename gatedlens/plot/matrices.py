"""The pictures of matrices and of activations; `help(gl.plot)` shows each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gatedlens.address.key import Key
from gatedlens.attention.layer import ImplicitAttention
from gatedlens.attention.stack import AttentionStack
from gatedlens.errors import InputError
from gatedlens.foreign import Axes, Figure
from gatedlens.model.cache import ActivationCache
from gatedlens.options import checked
from gatedlens.plot.drawing import (
    MAX_LABELS,
    UNSAID,
    Matrices,
    Matrix,
    colour_bar,
    farthest,
    label,
    label_axis,
    labels_of,
    numbers_of,
    panels,
    plain,
    pyplot,
)
from gatedlens.result.labelled_tensor import label_of


def _matrix(matrix: Any, tokens: Sequence[str] | None) -> Tensor:
    """A [dst, src] matrix on the CPU, checked against its labels."""
    data = numbers_of(matrix, "heatmap()").detach().float().cpu()
    data = data[0] if data.ndim == 3 and len(data) == 1 else data
    if data.ndim != 2 or not data.numel():
        raise InputError(
            f"A heat map shows one [dst, src] matrix; this has shape {list(data.shape)}. Pick a row of the batch."
        )
    if tokens is not None and set(data.shape) != {len(tokens)}:
        where = f"{data.shape[0]}" if data.shape[0] == data.shape[1] else f"{data.shape[0]} and {data.shape[1]}"
        raise InputError(f"{len(tokens)} token labels for a matrix of {where} positions.")
    return data


@checked
def heatmap(
    matrix: Matrix,
    tokens: Sequence[str] | None = None,
    title: str = "Implicit attention",
    value: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """`gl.plot.heatmap(A.mean()[0], tokens)`: a [dst, src] matrix with token labels; signed values are centred on white.

    matrix: an ImplicitAttention is drawn as its mean over channels, with its own tokens (give a matrix for another row of
    a batch). value: what a number is; None: what the view says it is (`A.abs_mean()` another than `A.mean()`).
    Returns the matplotlib Figure (that of `ax` if given).
    """
    tokens = labels_of(matrix) if tokens is None and isinstance(matrix, ImplicitAttention) else tokens
    data = _matrix(matrix, tokens)
    if ax is None:
        size = min(4 + 0.16 * len(data), 14)
        _, ax = pyplot().subplots(figsize=(size + 1, size), layout="constrained")
    bound, signed = farthest(data), bool((data < 0).any())
    image = ax.imshow(data, cmap="RdBu_r" if signed else "Blues", vmin=-bound if signed else 0, vmax=bound)
    plain(ax.set_title(title), ax.set_xlabel("source token"), ax.set_ylabel("destination token"))
    if tokens is not None and len(tokens) <= MAX_LABELS:
        names = [label(token) for token in tokens]
        small = 9 if len(names) <= 32 else 7 if len(names) <= 56 else 5
        label_axis(ax.set_xticks, names, rotation=90, fontsize=small, family="monospace")
        label_axis(ax.set_yticks, names, fontsize=small, family="monospace")
    colour_bar(image, ax, value or label_of(data) or UNSAID)
    figure: Any = ax.figure
    return figure


@checked
def layers(
    matrices: Matrices,
    tokens: Sequence[str] | None = None,
    title: str = "Implicit attention by layer",
    **style: Any,
) -> Figure:
    """`gl.plot.layers({0: A0, 1: A1}, tokens)`: one heat map a layer, side by side. Returns the matplotlib Figure.

    matrices: a matrix by layer (or by any name), or a stack, each layer of which is drawn as its mean over channels.
    """
    if isinstance(matrices, AttentionStack):
        tokens = labels_of(matrices) if tokens is None else tokens
        matrices = dict(zip(matrices.names, matrices, strict=True))
    elif isinstance(matrices, ImplicitAttention):
        matrices = {matrices.layer: matrices}
    if not isinstance(matrices, Mapping):
        raise InputError(
            f"layers() takes a stack or a matrix by layer, {{0: A0, 1: A1}}, not a {type(matrices).__name__}: "
            "dict(zip(stack.names, stack.mean()[:, 0]))."
        )
    if not matrices:
        raise InputError("There is no layer to plot: the mapping is empty.")
    first = next(iter(matrices.values()))
    tokens = labels_of(first) if tokens is None and isinstance(first, ImplicitAttention) else tokens
    drawn = {
        f"layer {name}" if isinstance(name, int) else str(name): _matrix(matrix, tokens)
        for name, matrix in matrices.items()
    }
    return _grid(drawn, tokens, title, style)


@checked
def heads(
    matrices: Matrix,
    tokens: Sequence[str] | None = None,
    title: str | None = None,
    names: Sequence[int] | None = None,
    **style: Any,
) -> Figure:
    """`gl.plot.heads(A)`: one heat map a head, side by side, each on a scale of its own. Returns the matplotlib Figure.

    matrices: an ImplicitAttention, of which each head's mean over its channels is drawn with its own tokens; or numbers
    [head, dst, src], such as `A.abs_mean(heads=[0, 3])[0]`. names: the heads' numbers (None: 0, 1, ...). InputError for numbers
    of another shape, PointError for a layer without heads.
    """
    said = "Implicit attention by head"
    if isinstance(matrices, ImplicitAttention):
        tokens = labels_of(matrices) if tokens is None else tokens
        said = f"{said}, layer {matrices.layer}"
        matrices = matrices.mean(heads=slice(None) if names is None else list(names))
    data = numbers_of(matrices, "heads()")
    data = data[0] if data.ndim == 4 and len(data) == 1 else data
    if data.ndim != 3 or not data.numel():
        raise InputError(
            f"heads() draws a matrix a head, [head, dst, src]; this has shape {list(data.shape)}. Pick a row of the batch: "
            "A.mean(heads=slice(None))[0]."
        )
    numbers = range(len(data)) if names is None else names
    if len(numbers) != len(data):
        raise InputError(f"{len(numbers)} names for the matrices of {len(data)} heads.")
    drawn = {f"head {name}": _matrix(matrix, tokens) for name, matrix in zip(numbers, data, strict=True)}
    style.setdefault("value", label_of(data))
    return _grid(drawn, tokens, said if title is None else title, style)


def _grid(drawn: Mapping[str, Tensor], tokens: Sequence[str] | None, title: str, style: Mapping[str, Any]) -> Figure:
    """One heat map a matrix, under its name, at most four side by side."""
    size = min(4 + 0.13 * len(next(iter(drawn.values()))), 9)
    columns = min(len(drawn), 4)
    rows = -(-len(drawn) // columns)
    figure, axes = panels(rows, columns, size)
    for ax in axes.flat[len(drawn) :]:
        ax.remove()
    for ax, (name, matrix) in zip(axes.flat, drawn.items(), strict=False):
        heatmap(matrix, tokens, title=name, ax=ax, **style)
    plain(figure.suptitle(title))
    return figure


@checked
def activation(
    cache: ActivationCache, key: Key, tokens: Sequence[str] | None = None, row: int = 0, ax: Axes | None = None
) -> Figure:
    """`gl.plot.activation(cache, ("dt", 3), tokens)`: a cached activation of one row of the batch, as a heat map.

    Titles come from the point's own row: its name, its equation, its axes. Of an activation with more than two axes
    behind batch the mean over the last ones is shown, which the colour bar says. Returns the matplotlib Figure.
    """
    name = cache.find(key).name
    point, values = cache.model.names[name], cache[key]
    if not cache.has_batch_dim:
        values = values.unsqueeze(0)
    axes = point.dims[1:]
    if len(axes) < 2:
        raise InputError(f"{name} has the axes {point.axes}: a heat map needs two besides batch.")
    data = values[row].detach().float().cpu()
    data = data.flatten(2).mean(-1) if len(axes) > 2 else data
    if axes[0] == "pos" and tokens is not None and len(tokens) != len(data):
        raise InputError(f"{len(tokens)} token labels for {len(data)} positions of {name}.")
    if ax is None:
        _, ax = pyplot().subplots(figsize=(8, min(3 + 0.12 * len(data), 12)), layout="constrained")
    bound, signed = farthest(data), bool((data < 0).any())
    shown = ax.imshow(
        data, aspect="auto", cmap="RdBu_r" if signed else "Blues", vmin=-bound if signed else 0, vmax=bound
    )
    plain(ax.set_title(f"{name} = {point.equation}", fontsize=9), ax.set_ylabel(axes[0]), ax.set_xlabel(axes[1]))
    if axes[0] == "pos" and tokens is not None and len(tokens) <= MAX_LABELS:
        label_axis(ax.set_yticks, [label(token) for token in tokens], fontsize=7, family="monospace")
    what = f"mean over {' and '.join(axes[2:])}" if len(axes) > 2 else point.leaf.removeprefix("hook_")
    colour_bar(shown, ax, what)
    figure: Any = ax.figure
    return figure

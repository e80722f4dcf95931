"""The pictures of matrices and of activations; `help(gl.plot)` shows each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gatedlens.address.key import Key
from gatedlens.attention.layer import ImplicitAttention
from gatedlens.attention.stack import AttentionStack
from gatedlens.errors import InputError
from gatedlens.foreign import Axes, Figure
from gatedlens.model.cache import ActivationCache
from gatedlens.options import checked
from gatedlens.plot.backends import plotly
from gatedlens.plot.drawing import (
    UNSAID,
    Matrices,
    Matrix,
    colour_bar,
    farthest,
    inches,
    label,
    label_axis,
    labels_of,
    numbers_of,
    plain,
    words_of,
    wrapped,
)
from gatedlens.plot.sheet import grid, room, sheet
from gatedlens.result.labelled_tensor import LabelledTensor, label_of

OWN_SCALES = "Each panel has a colour scale of its own: colours do not compare between panels."
FEW, SOME, MANY = (
    4,
    9,
    24,
)  # panels: so few each have their labels and a bar that says what a number is; others are small
SIDES = ((2.0, 3.7), (1.8, 2.5), (1.5, 1.6))  # inches of a panel, at least and at most: of some, of many, of more
Some = slice | Sequence[int]


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


def _some(data: Tensor, tokens: Sequence[str] | None, pos: Some | None) -> tuple[Tensor, list[str] | None]:
    """The rows and columns of some positions, and their labels, which without tokens are their numbers."""
    if pos is None:
        return data, None if tokens is None else list(tokens)
    if data.shape[0] != data.shape[1]:
        raise InputError(f"pos={pos!r}: this matrix is {list(data.shape)}, so its axes have no positions in common.")
    every = range(len(data))
    kept = list(every[pos]) if isinstance(pos, slice) else [every[i] for i in pos if -len(data) <= i < len(data)]
    if not kept or (not isinstance(pos, slice) and len(kept) < len(pos)):
        raise InputError(f"pos={pos!r}: there are {len(data)} positions, 0 to {len(data) - 1}.")
    names = [str(i) for i in kept] if tokens is None else [tokens[i] for i in kept]
    return data[kept][:, kept], names


def _title(matrix: Any, otherwise: str) -> str:
    """What a matrix says it is of."""
    return (matrix.title if isinstance(matrix, LabelledTensor) else "") or otherwise


@checked
def heatmap(
    matrix: Matrix,
    tokens: Sequence[str] | None = None,
    title: str | None = None,
    value: str | None = None,
    ax: Axes | None = None,
    pos: Some | None = None,
    backend: str = "matplotlib",
) -> Figure:
    """`gl.plot.heatmap(A.mean()[0], pos=slice(-40, None))`: a [dst, src] matrix with token labels; signed values are centred on
    white.

    matrix: an ImplicitAttention is drawn as its mean over channels (give a matrix for another row of a batch). tokens, title,
    value (what a number is): None for what the view itself says (`A.abs_mean()` another than `A.mean()`). pos: some positions
    of both axes, a slice or a list. Where more labels than fit stand on an axis every k-th is shown, by its number. Returns the
    matplotlib Figure (that of `ax` if given), or with backend="plotly" plotly's, to hover over.
    """
    tokens = words_of(matrix) if tokens is None else tokens
    data = _matrix(matrix, tokens)
    said = value or label_of(data) or UNSAID
    title = _title(data, "Implicit attention") if title is None else title
    data, tokens = _some(data, tokens, pos)
    if plotly(backend, ax):
        from gatedlens.plot.interactive import heat

        return heat(data, tokens, tokens, ("destination token", "source token"), title, said)
    if ax is None:
        height, width = (room(n, 0.16, 2.6, 11.0) for n in data.shape)
        ax = sheet(width + 2.2, height + 1.4)
    image = _image(ax, data, tokens, farthest(data))
    plain(ax.set_title(wrapped(title, int(inches(ax, "x") * 10))))
    plain(ax.set_xlabel("source token"), ax.set_ylabel("destination token"))
    colour_bar(image, ax, said, inches(ax, "y"), 0.8)
    figure: Any = ax.figure
    return figure


def _image(ax: Any, data: Tensor, tokens: Sequence[str] | None, bound: float, sides: str = "xy") -> Any:
    """The colours of a matrix, with labels on some sides."""
    signed = bool((data < 0).any())
    image = ax.imshow(data, cmap="RdBu_r" if signed else "Blues", vmin=-bound if signed else 0, vmax=bound)
    for side, size in zip("yx", data.shape, strict=True):
        if side not in sides:
            (ax.set_xticks if side == "x" else ax.set_yticks)([])
        elif tokens is not None:
            # The cells are square, so the larger of both axes is as long as there is room.
            label_axis(ax, side, tokens, min(inches(ax, "x"), inches(ax, "y")) * size / max(data.shape))
    return image


@checked
def layers(
    matrices: Matrices,
    tokens: Sequence[str] | None = None,
    title: str | None = None,
    value: str | None = None,
    pos: Some | None = None,
    one_scale: bool = False,
) -> Figure:
    """`gl.plot.layers({0: A0, 1: A1}, tokens)`: one heat map a layer, side by side. Returns the matplotlib Figure.

    matrices: a matrix by layer (or by any name), or a stack, each layer of which is drawn as its mean over channels. one_scale:
    all layers on one colour scale; else each has its own, which the picture says. The rest as in `heatmap`.
    """
    if isinstance(matrices, AttentionStack):
        tokens = labels_of(matrices) if tokens is None else tokens
        matrices = dict(zip(matrices.names, matrices, strict=True))
    elif isinstance(matrices, ImplicitAttention):
        matrices = {matrices.layer: matrices}
    elif isinstance(matrices, LabelledTensor) and matrices.axes[:1] == ("layer",):
        matrices = dict(zip(matrices.labels["layer"], matrices, strict=True))
    if not isinstance(matrices, Mapping):
        raise InputError(
            f"layers() takes a stack or a matrix by layer, {{0: A0, 1: A1}}, not a {type(matrices).__name__}: "
            "dict(zip(stack.names, stack.mean()[:, 0]))."
        )
    if not matrices:
        raise InputError("There is no layer to plot: the mapping is empty.")
    tokens = words_of(next(iter(matrices.values()))) if tokens is None else tokens
    drawn = {
        f"layer {name}" if isinstance(name, int) else str(name): _matrix(matrix, tokens)
        for name, matrix in matrices.items()
    }
    return _grid(drawn, tokens, "Implicit attention by layer" if title is None else title, value, pos, one_scale)


@checked
def heads(
    matrices: Matrix,
    tokens: Sequence[str] | None = None,
    title: str | None = None,
    names: Sequence[int] | None = None,
    value: str | None = None,
    pos: Some | None = None,
    one_scale: bool = False,
) -> Figure:
    """`gl.plot.heads(A)`: one heat map a head, side by side. Returns the matplotlib Figure.

    matrices: an ImplicitAttention, of which each head's mean over its channels is drawn with its own tokens; or numbers
    [head, dst, src], such as `A.abs_mean(heads=[0, 3])[0]`. names: the heads' numbers (None: what the view says, or 0, 1, ...).
    The rest as in `layers`. InputError for numbers of another shape, PointError for a layer without heads.
    """
    said = "Implicit attention by head"
    if isinstance(matrices, ImplicitAttention):
        said = f"{said}, layer {matrices.layer}"
        matrices = matrices.mean(heads=slice(None) if names is None else list(names))
    data = numbers_of(matrices, "heads()")
    data = data[0] if data.ndim == 4 and len(data) == 1 else data
    if data.ndim != 3 or not data.numel():
        raise InputError(
            f"heads() draws a matrix a head, [head, dst, src]; this has shape {list(data.shape)}. Pick a row of the batch: "
            "A.mean(heads=slice(None))[0]."
        )
    carried = data.labels.get("head") if isinstance(data, LabelledTensor) else None
    numbers: Sequence[Any] = names if names is not None else carried or range(len(data))
    if len(numbers) != len(data):
        raise InputError(f"{len(numbers)} names for the matrices of {len(data)} heads.")
    tokens = words_of(data) if tokens is None else tokens
    drawn = {f"head {name}": _matrix(matrix, tokens) for name, matrix in zip(numbers, data, strict=True)}
    value = label_of(data) if value is None else value
    return _grid(drawn, tokens, said if title is None else title, value, pos, one_scale)


def _grid(
    drawn: Mapping[str, Tensor],
    tokens: Sequence[str] | None,
    title: str,
    value: str | None,
    pos: Some | None,
    one_scale: bool,
) -> Figure:
    """One heat map a matrix, under its name; of many panels only those at the rim have labels."""
    cut = {name: _some(data, tokens, pos) for name, data in drawn.items()}
    count, n = len(cut), max(len(data) for data, _ in cut.values())
    side = room(n, 0.14, 2.4, 5.2) if count <= FEW else room(n, 0.12, *SIDES[(count > SOME) + (count > MANY)])
    figure, axes = grid(count, side + (1.6 if count <= FEW else 0.8), side + (1.1 if count <= FEW else 0.45))
    top = max(farthest(data) for data, _ in cut.values())
    images, unlike = [], one_scale and any(bool((data < 0).any()) for data, _ in cut.values())
    for i, row in enumerate(axes):
        for j, ax in enumerate(row):
            name, (data, names) = list(cut.items())[i * len(axes[0]) + j]
            below = i + 1 < len(axes) and j < len(axes[i + 1])
            sides = "xy" if count <= FEW else ("y" if j == 0 else "") + ("" if below else "x")
            shown = torch.where(data == 0, 0.0, data)
            image = _image(ax, shown, names, top if one_scale else farthest(shown), sides)
            if unlike:
                image.set(cmap="RdBu_r", clim=(-top, top))
            plain(ax.set_title(name, fontsize=10 if count <= MANY else 9))
            if count <= FEW:
                plain(ax.set_xlabel("source token"), ax.set_ylabel("destination token"))
            if not one_scale:
                colour_bar(image, ax, (value or label_of(data) or UNSAID) if count <= FEW else "", side, 0.8)
            images.append(image)
    said = value or next((label_of(data) for data, _ in cut.values()), None) or UNSAID
    if one_scale:
        colour_bar(images[0], [ax for row in axes for ax in row], said, figure.get_size_inches()[1], 0.8)
    else:
        what = "" if count <= FEW else f"{said}. Down: destination token, across: source token. "
        plain(
            figure.supxlabel(
                wrapped(what + OWN_SCALES * (count > 1), int(12 * figure.get_size_inches()[0])), fontsize=9
            )
        )
    plain(figure.suptitle(wrapped(title, int(9 * figure.get_size_inches()[0]))))
    return figure


@checked
def activation(
    cache: ActivationCache,
    key: Key,
    tokens: Sequence[str] | None = None,
    row: int = 0,
    ax: Axes | None = None,
    pos: Some | None = None,
) -> Figure:
    """`gl.plot.activation(cache, ("dt", 3), tokens)`: a cached activation of one row of the batch, as a heat map.

    Titles come from the point's own row: its name, its equation, its axes. Of an activation with more than two axes
    behind batch the mean over the last ones is shown, which the colour bar says. pos: some positions, a slice or a list. Returns
    the matplotlib Figure (that of `ax` if given).
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
    names = list(range(len(data))) if axes[0] != "pos" or tokens is None else list(tokens)
    if pos is not None:
        if axes[0] != "pos":
            raise InputError(f"pos={pos!r}: the first axis of {name} is {axes[0]}.")
        kept = torch.arange(len(data))[pos if isinstance(pos, slice) else list(pos)].tolist()
        data, names = data[kept], [names[i] for i in kept]
    if not data.numel():
        raise InputError(f"There is nothing of {name} to plot: it has shape {list(data.shape)}.")
    if ax is None:
        height, width = room(len(data), 0.16, 2.2, 13.0), room(data.shape[1], 0.03, 4.5, 11.0)
        ax = sheet(width + 2.4, height + 1.2)
    bound, signed = farthest(data), bool((data < 0).any())
    shown = ax.imshow(
        data, aspect="auto", cmap="RdBu_r" if signed else "Blues", vmin=-bound if signed else 0, vmax=bound
    )
    title = wrapped(f"{name} = {point.equation}", int(inches(ax, "x") * 12))
    plain(ax.set_title(title, fontsize=9), ax.set_ylabel(axes[0]), ax.set_xlabel(axes[1]))
    if axes[0] == "pos" and (tokens is not None or pos is not None):
        label_axis(ax, "y", [label(token) for token in names])
    what = f"mean over {' and '.join(axes[2:])}" if len(axes) > 2 else point.leaf.removeprefix("hook_")
    colour_bar(shown, ax, what, inches(ax, "y"))
    figure: Any = ax.figure
    return figure

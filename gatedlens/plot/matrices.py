"""The pictures of matrices, images, activations and texts; `help(gl.plot)` shows each.

matplotlib is an extra and imported when a figure is asked for. Its math text is off: a `$` in a token or a title is a `$`.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from gatedlens.address.key import Key
from gatedlens.attention.contributions import Contributions
from gatedlens.attention.layer import ImplicitAttention
from gatedlens.attention.stack import AttentionStack
from gatedlens.errors import InputError
from gatedlens.foreign import Axes, Figure, Image
from gatedlens.model.cache import ActivationCache
from gatedlens.model.image import Grid
from gatedlens.options import checked
from gatedlens.result.labelled_tensor import label_of

BODY = "font-family:system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em"
UNSAID = "attention"  # what a number is where neither the caller nor the view says it
MAX_LABELS = 80  # token labels an axis can hold and stay legible


# What is drawn: numbers, or an attention, whose mean is meant. For type checkers: something else is an InputError.
if TYPE_CHECKING:
    Matrix: TypeAlias = Tensor | Sequence[Any] | ImplicitAttention | Contributions
    Matrices: TypeAlias = AttentionStack | Mapping[Any, Matrix] | Sequence[Matrix] | ImplicitAttention | Tensor
    Pixels: TypeAlias = Tensor | Sequence[Any] | Image
else:
    Matrix = Matrices = Pixels = Any


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'gatedlens[plot]'.") from error
    return plt


def label(token: object) -> str:
    """`gl.plot.label(token)`: a token as it can stand in a plot: white space made visible, and what has no sign of its own
    by its code.
    """
    shown = str(token).replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
    shown = "".join(ascii(c)[1:-1] if unicodedata.category(c) in ("Cc", "Cs") else c for c in shown)
    return shown if shown else "∅"


def plain(*texts: Any) -> None:
    """Math text off, in texts of matplotlib: every sign stands for itself."""
    for one in texts:
        one.set(parse_math=False, usetex=False)


@checked
def label_axis(ticks: Any, names: Sequence[str], places: Sequence[int] | None = None, **style: Any) -> None:
    """`label_axis(ax.set_xticks, names)`: a label at each place (0, 1, ...), every sign of it for itself."""
    ticks(range(len(names)) if places is None else places, names, parse_math=False, usetex=False, **style)


def colour_bar(shown: Any, ax: Any, value: str, shrink: float = 0.8) -> None:
    """The bar of a picture, which says what a number is."""
    bar = ax.figure.colorbar(shown, ax=ax, shrink=shrink)
    bar.set_label(value, parse_math=False, usetex=False)


@checked
def farthest(values: Tensor) -> float:
    """How far the farthest number is from 0; what is no number counts for nothing."""
    finite = values[values.isfinite()]
    return max(float(finite.abs().max()), 1e-12) if finite.numel() else 1.0


@checked
def labels_of(attention: ImplicitAttention | AttentionStack, row: int = 0) -> list[str]:
    """`gl.plot.labels_of(attention)`: the tokens that an attention is of as strings, where there are any; else the
    positions' numbers.
    """
    source = attention.cache if isinstance(attention, AttentionStack) else attention
    tokens, model = source.tokens, source.model
    if tokens is None or tokens.ndim != 2:
        one = attention[attention.layers[0]] if isinstance(attention, AttentionStack) else attention
        return [str(position) for position in range(one.shape[1])]
    if model.tokenizer is None:
        return [str(token) for token in tokens[row].tolist()]
    return list(model.to_str_tokens(tokens[row]))


def _numbers(values: Any, who: str) -> Tensor:
    """What is to be drawn as a tensor, with the label it carries."""
    if isinstance(values, AttentionStack):
        raise InputError(f"{who} draws one matrix, and this is a stack of {len(values)} layers: gl.plot.layers(stack).")
    if isinstance(values, Contributions):
        raise InputError(f"{who} draws numbers: take contributions.norms()[0], or contributions.along(direction)[0].")
    if isinstance(values, ImplicitAttention):
        return values.mean()
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{who} draws numbers, not a {type(values).__name__}: {error}.") from error


def _matrix(matrix: Any, tokens: Sequence[str] | None) -> Tensor:
    """A [dst, src] matrix on the CPU, checked against its labels."""
    data = _numbers(matrix, "heatmap()").detach().float().cpu()
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
        _, ax = _pyplot().subplots(figsize=(size + 1, size), layout="constrained")
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
        matrices = {attention.layer: attention for attention in matrices}
    elif isinstance(matrices, ImplicitAttention):
        matrices = {matrices.layer: matrices}
    if not isinstance(matrices, Mapping):
        raise InputError(
            f"layers() takes a stack or a matrix by layer, {{0: A0, 1: A1}}, not a {type(matrices).__name__}: "
            "dict(zip(stack.layers, stack.mean()[:, 0]))."
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
    data = _numbers(matrices, "heads()")
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
def panels(rows: int, columns: int, size: float = 5.0) -> tuple[Any, Any]:
    """`figure, axes = gl.plot.panels(2, 3)`: (figure, axes [rows, columns]): an empty figure of square panels, for the
    `ax` of the others.
    """
    return _pyplot().subplots(
        rows, columns, figsize=(size * columns, (size - 0.6) * rows), squeeze=False, layout="constrained"
    )


@checked
def image(pixels: Pixels, title: str = "", ax: Axes | None = None) -> Figure:
    """`gl.plot.image(images[0])`: an image [channel height width] as a model reads it, stretched to its own range.

    Returns the matplotlib Figure (that of `ax` if given).
    """
    data = _numbers(pixels, "image()").detach().float().cpu()
    if data.ndim != 3 or len(data) not in (1, 3) or not data.numel():
        raise InputError(f"An image is [1 or 3 channels, height, width]; this has shape {list(data.shape)}.")
    data = visible(data)
    if ax is None:
        _, ax = _pyplot().subplots(layout="constrained")
    ax.imshow(data[0] if len(data) == 1 else data.permute(1, 2, 0), cmap="gray")
    plain(ax.set_title(title))
    ax.set_axis_off()
    figure: Any = ax.figure
    return figure


@checked
def over_image(
    row: Matrix,
    image: Pixels,
    grid: Grid,
    title: str = "Implicit attention over the image",
    value: str | None = None,
    alpha: float = 0.55,
    ax: Axes | None = None,
) -> Figure:
    """`gl.plot.over_image(A.mean()[0, model.grid.cls[0]], images[0], model.grid)`: a row as a map over its image.

    row: one number a position ([pos]: class tokens are left out) or a patch ([row, column]). image: the tensor
    [channels, height, width] that the model read (each stretched to what can be shown), or an image of that size.
    value: what a number is; None: what the view says it is. Signed values are centred on white. Returns the matplotlib
    Figure (that of `ax` if given).
    """
    shown, data = _picture(image, grid), _map(row, grid)
    if ax is None:
        _, ax = _pyplot().subplots(figsize=(5.5, 4.5), layout="constrained")
    bound, signed = farthest(data), bool((data < 0).any())
    # A patch that overlaps its neighbours stands for the pixels around its centre.
    top, left = ((patch - stride) / 2 - 0.5 for patch, stride in zip(grid.patch, grid.stride, strict=True))
    extent = (left, left + grid.columns * grid.stride[1], top + grid.rows * grid.stride[0], top)
    ax.imshow(shown, cmap="gray")
    colours = ax.imshow(
        data,
        cmap="RdBu_r" if signed else "inferno",
        vmin=-bound if signed else 0,
        vmax=bound,
        alpha=alpha,
        extent=extent,
        interpolation="nearest",
    )
    ax.set_xlim(-0.5, shown.shape[1] - 0.5)
    ax.set_ylim(shown.shape[0] - 0.5, -0.5)
    plain(ax.set_title(title))
    ax.set_axis_off()
    colour_bar(colours, ax, value or label_of(row) or UNSAID)
    figure: Any = ax.figure
    return figure


def _map(row: Any, grid: Grid) -> Tensor:
    """[row, column] of a row of attention."""
    data = _numbers(row, "over_image()").detach().float().cpu()
    patches = grid.rows * grid.columns
    if tuple(data.shape) == (grid.rows, grid.columns):
        return data
    if data.ndim == 1 and len(data) == grid.length:
        return grid.fold(data)
    if data.ndim == 1 and len(data) == patches:
        return data.unflatten(0, (grid.rows, grid.columns))
    raise InputError(
        f"over_image() shows one number a position [{grid.length}], or a patch [{grid.rows}, {grid.columns}]; this has "
        f"shape {list(data.shape)}. Pick a row of the batch and a destination: A.mean()[0, i]."
    )


def _picture(image: Any, grid: Grid) -> Tensor:
    """[height, width(, 3)] in 0..1 of an image that has the size that the grid was laid over."""
    if isinstance(image, Tensor):
        pixels = image.detach().float().cpu()
        pixels = pixels.movedim(0, -1) if pixels.ndim == 3 else pixels
    else:
        import numpy

        pixels = torch.from_numpy(numpy.asarray(image).copy()).float()
    least = [(n - 1) * s + p for n, s, p in zip((grid.rows, grid.columns), grid.stride, grid.patch, strict=True)]
    fits = pixels.ndim in (2, 3) and all(
        a <= b < a + s for a, b, s in zip(least, pixels.shape, grid.stride, strict=False)
    )
    if not fits or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3)):
        raise InputError(
            f"over_image() draws on the image that the model read, [1 or 3, {least[0]}, {least[1]}]; this has shape "
            f"{list(image.shape if isinstance(image, Tensor) else pixels.shape)}. `model.preprocess(pil_image)` makes one."
        )
    pixels = pixels.squeeze(-1) if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    return visible(pixels)


@checked
def visible(pixels: Tensor) -> Tensor:
    """The numbers of an image stretched to 0..1; what is no number is 0."""
    finite = pixels[pixels.isfinite()]
    low, high = (finite.min(), finite.max()) if finite.numel() else (0.0, 1.0)
    return ((pixels - low) / max(float(high - low), 1e-12)).nan_to_num(0, 0, 0)


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
        _, ax = _pyplot().subplots(figsize=(8, min(3 + 0.12 * len(data), 12)), layout="constrained")
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


class Html:
    """A piece of HTML that a notebook shows and `save` writes as a page of its own."""

    def __init__(self, body: str, title: str = "gatedlens"):
        self.body = body
        self.title = title

    def _repr_html_(self) -> str:
        return self.body

    def page(self) -> str:
        """`html.page()`: the whole page as text, self-contained."""
        head = f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(self.title)}</title></head>"
        return f"{head}<body style='{BODY}'>{self.body}</body></html>"

    @checked
    def save(self, path: str | Path) -> Path:
        """`html.save("page.html")`: write a self-contained page and return its path."""
        Path(path).write_text(self.page(), encoding="utf-8", errors="xmlcharrefreplace")
        return Path(path)


def colour(share: float) -> str:
    """A background for a value in [-1, 1]: red above zero, blue below, none for what is no number."""
    share = share if share == share else 0.0
    r, g, b = (214, 40, 40) if share > 0 else (29, 78, 216)
    return f"rgba({r},{g},{b},{min(abs(share), 1):.3f})"


@checked
def text(scores: Matrix, tokens: Sequence[str], title: str = "Scores by token") -> Html:
    """`gl.plot.text(A.mean()[0, -1], tokens)`: the text with each token coloured by its score; hover for the number."""
    data = _numbers(scores, "text()").detach().float().cpu()
    if data.ndim != 1 or len(data) != len(tokens):
        raise InputError(f"text() colours {len(tokens)} tokens by as many scores; these have shape {list(data.shape)}.")
    bound = farthest(data)
    spans = "".join(
        f"<span title='{html.escape(repr(token), quote=True)} at {i}: {value:.4g}' "
        f"style='background:{colour(value / bound)};padding:1px 0'>{html.escape(label(token))}</span>"
        for i, (token, value) in enumerate(zip(tokens, data.tolist(), strict=True))
    )
    heading = f"<p style='margin:.3em 0'><b>{html.escape(title)}</b></p>"
    return Html(f"{heading}<p style='font-family:monospace;line-height:1.8;overflow-wrap:anywhere'>{spans}</p>", title)

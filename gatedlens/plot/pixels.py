"""The pictures of images: one as a model reads it, and a row of attention as a map over it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gatedlens.errors import InputError
from gatedlens.foreign import Axes, Figure
from gatedlens.model.image import Grid
from gatedlens.options import checked
from gatedlens.plot.drawing import UNSAID, Matrix, Pixels, colour_bar, farthest, inches, numbers_of, plain, wrapped
from gatedlens.plot.sheet import sheet
from gatedlens.result.labelled_tensor import label_of


@checked
def image(pixels: Pixels, title: str = "", ax: Axes | None = None) -> Figure:
    """`gl.plot.image(images[0])`: an image [channel height width] as a model reads it, stretched to its own range.

    Returns the matplotlib Figure (that of `ax` if given).
    """
    data = numbers_of(pixels, "image()").detach().float().cpu()
    if data.ndim != 3 or len(data) not in (1, 3) or not data.numel():
        raise InputError(f"An image is [1 or 3 channels, height, width]; this has shape {list(data.shape)}.")
    data = visible(data)
    if ax is None:
        ax = sheet(4.8, 4.8)
    ax.imshow(data[0] if len(data) == 1 else data.permute(1, 2, 0), cmap="gray")
    plain(ax.set_title(wrapped(title, int(inches(ax, "x") * 11))))
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
        ax = sheet(5.5, 4.5)
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
    plain(ax.set_title(wrapped(title, int(inches(ax, "x") * 11))))
    ax.set_axis_off()
    colour_bar(colours, ax, value or label_of(row) or UNSAID, inches(ax, "y"), 0.8)
    figure: Any = ax.figure
    return figure


def _map(row: Any, grid: Grid) -> Tensor:
    """[row, column] of a row of attention."""
    data = numbers_of(row, "over_image()").detach().float().cpu()
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

"""One layer's implicit attention of one input, drawn and saved: what `gatedlens attention` does.

    show(Source("gatedlens/mamba-moby"), text="It was the whiteness", layer=1, reduce="abs_mean", out="figures")

Writes the numbers (safetensors), and a picture: a matrix as a heat map, a row as the coloured text (a page) or as a map
over the image.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gatedlens import plot
from gatedlens.address.layers import layer_of
from gatedlens.attention.layer import MEAN, ImplicitAttention
from gatedlens.attention.stack import implicit_attention
from gatedlens.cli.demo import default_text
from gatedlens.cli.outfolder import out_folder
from gatedlens.cli.source import Source
from gatedlens.errors import InputError, did_you_mean
from gatedlens.model.base import HookedModel
from gatedlens.model.image import picture
from gatedlens.model.language import HookedLanguageModel
from gatedlens.result.labelled_tensor import with_label
from gatedlens.result.rounding import order

REDUCTIONS = ("mean", "abs_mean", "row")


@dataclass(frozen=True)
class LayerReport:
    """What was shown; `tops` are (label, position, value) that `position` attends to most, strongest first; `error` is
    the relative error of attention and remainder against the layer's output."""

    model: str
    input: str
    layer: int
    reduce: str
    position: int
    shape: tuple[int, ...]
    error: float
    tops: list[tuple[str, int, float]]
    files: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def show(
    source: Source,
    text: str | None = None,
    image: str | Path | None = None,
    layer: int = -1,
    reduce: str = "mean",
    position: int | None = None,
    out: str | Path = "out",
) -> LayerReport:
    """`show(Source("gatedlens/mamba-moby"), layer=1)`: everything that `gatedlens attention` shows, as a LayerReport.

    reduce: "mean" or "abs_mean" over channels, the [dst, src] matrix; "row": the mean's row of `position` alone (None:
    the last token, or the image's first class token).
    """
    if reduce not in REDUCTIONS:
        raise InputError(f"--reduce {reduce}: it is {' or '.join(REDUCTIONS)}.{did_you_mean(reduce, REDUCTIONS)}")
    model, model_name = source.open(), source.name
    input, labels, said = read(model, text, image)
    layer = layer_of(model, layer, ("--layer {!r}", "--layer {}:"))
    folder = out_folder(out)
    attention = implicit_attention(model, input, layer=layer)
    if position is None:
        position = -1 if isinstance(model, HookedLanguageModel) or not model.grid.cls else model.grid.cls[0]
    row = with_label(
        attention.at(attention.place(position, "position")).mean(1)[0], MEAN
    )  # an InputError if there is no such position
    values = row if reduce == "row" else (attention.mean() if reduce == "mean" else attention.abs_mean())[0]
    own = row if reduce == "row" else values[position]
    best = order(own.abs())[:5].tolist()

    stem = folder / f"{Path(model_name).name}-layer{attention.layer}-{reduce}"
    numbers = Path(f"{stem}.safetensors")
    save_file({"attention": values.contiguous().cpu()}, numbers)
    picture = _draw(stem, values, labels, model, input, attention, reduce)
    return LayerReport(
        model_name,
        said,
        attention.layer,
        reduce,
        position % len(own),
        tuple(values.shape),
        attention.check().relative,
        [(labels[j], j, own[j].item()) for j in best],
        [str(picture), str(numbers)],
    )


def read(model: HookedModel, text: str | None, image: str | Path | None) -> tuple[Any, list[str], str]:
    """(what the model reads, a label for each position, the input as a person would name it)."""
    name = model.cfg.model_name
    if isinstance(model, HookedLanguageModel):
        if image is not None:
            raise InputError(f"--image {image}: {name} reads text. Pass --text.")
        text = default_text(name) if text is None else text
        return text, model.to_str_tokens(text), text
    if text is not None or image is None:
        raise InputError(
            f"{name} reads images: pass --image with the path of one{'' if text is None else ', no --text'}."
        )
    assert model.grid is not None
    places = [model.grid.place(pos) for pos in range(model.grid.length)]
    labels = ["cls" if place is None else f"{place[0]},{place[1]}" for place in places]
    if not Path(image).exists():
        raise InputError(f"--image {image}: there is no such file.")
    return model.preprocess(picture(image)).unsqueeze(0), labels, str(image)


def _draw(
    stem: Path,
    values: Tensor,
    labels: list[str],
    model: HookedModel,
    input: Any,
    attention: ImplicitAttention,
    reduce: str,
) -> Path:
    """The picture's path."""
    title = f"{model.cfg.model_name}, layer {attention.layer}"
    if reduce != "row":
        figure = plot.heatmap(values, labels, title=title)
    elif isinstance(model, HookedLanguageModel):
        return plot.text(values, labels, title=title).save(f"{stem}.html")
    else:
        assert model.grid is not None
        figure = plot.over_image(values, input[0], model.grid, title=title)
    figure.savefig(f"{stem}.png", dpi=110)
    return Path(f"{stem}.png")

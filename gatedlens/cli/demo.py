"""The demo: the main job from end to end on a bundled model, in a few seconds and without network.

Cache every gate, conv and scan intermediate of a text; derive each layer's implicit attention from the cache; check that
attention and remainder are the layer's output; show what the last position attends to; write a picture and a page.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gatedlens import plot
from gatedlens.address.layers import layer_of
from gatedlens.attention.stack import implicit_attention
from gatedlens.cli.outfolder import out_folder
from gatedlens.cli.source import Source
from gatedlens.data import digits
from gatedlens.errors import InputError
from gatedlens.hooks.vim import HookedViM
from gatedlens.loading import BUNDLED, from_pretrained
from gatedlens.model.language import HookedLanguageModel
from gatedlens.plot.drawing import plain
from gatedlens.plot.page import attention_page
from gatedlens.result.labelled_tensor import label_of
from gatedlens.result.rounding import order
from gatedlens.tasks import VOCABULARY, recall

PICTURED = {  # the layer that recalls
    "gatedlens/mamba-recall": 1,
    "gatedlens/mamba2-recall": 0,
    "gatedlens/griffin-recall": 0,
    "gatedlens/rwkv-recall": 1,
    "gatedlens/rwkv7-recall": 0,
    "gatedlens/gdn-recall": 0,
}
HYBRID = {"gatedlens/hybrid-recall": 1}  # of an architecture that is in the picture: the layer of attention
DIGITS = "gatedlens/vim-digits"
PASSAGE = slice(381_274, 381_319)  # a sentence of the held-out part of the book


def default_text(model_name: str) -> str:
    """What a bundled model is shown when no text is given: a prompt of its task, or a passage of the book."""
    report = BUNDLED / model_name.rpartition("/")[2] / "training.json"
    if report.exists() and json.loads(report.read_text())["task"] == "recall":
        return " ".join(VOCABULARY[i] for i in recall(1, seed=3).tokens[0, 1:].tolist())
    return (BUNDLED / "data" / "moby-dick.txt").read_text(encoding="utf-8")[PASSAGE]


def _mixing(name: str) -> bool:
    """The points of the token mixers, lazy ones included."""
    return ".mixer." in name or ".attn." in name


@dataclass(frozen=True)
class Report:
    """What the demo found; `tops` are (token, position, attention) of the last position, strongest first."""

    model: str
    text: str
    layer: int
    n_cached: int
    cached_bytes: int
    errors: dict[int, float]
    tops: list[tuple[str, int, float]]
    next_tokens: list[tuple[str, float]]
    figure: Path
    page: Path

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "figure": str(self.figure), "page": str(self.page)}


@torch.no_grad()
def run(source: Source, text: str | None = None, layer: int = -1, out: str | Path = "out") -> Report:
    """`run(Source("gatedlens/mamba-moby"))`: everything that `gatedlens demo` shows, as a Report."""
    model, model_name = source.open(), source.name
    text = default_text(model_name) if text is None else text
    if not isinstance(model, HookedLanguageModel):
        raise InputError(
            f"{model_name} reads images, and the demo reads a text: gatedlens attention --image draws one."
        )
    tokens = model.to_str_tokens(text)
    layer = layer_of(model, layer, ("--layer {!r}", "--layer {}:"))
    folder = out_folder(out)

    n_layers = model.cfg.n_layers
    logits, cache = model.run_with_cache(text, names_filter=_mixing)
    attention = {i: implicit_attention(cache, layer=i) for i in range(n_layers)}
    errors = {i: A.check().relative for i, A in attention.items()}
    maps = {i: A.abs_mean()[0] for i, A in attention.items()}

    row = maps[layer][-1]
    best = order(row)[:5].tolist()
    tops = [(tokens[j], j, float(row[j])) for j in best]
    likely = logits[0, -1].softmax(-1).topk(min(5, logits.shape[-1]))
    following = [
        (model.to_string([i]), p) for p, i in zip(likely.values.tolist(), likely.indices.tolist(), strict=True)
    ]

    stem = model_name.rpartition("/")[2]
    title = f"Implicit attention of {model_name}"
    figure_path = folder / f"{stem}.png"
    plot.layers(maps, tokens, title=title).savefig(figure_path, dpi=110)
    signed = {f"layer {i}": A.mean()[0] for i, A in attention.items()}
    absolute = {f"layer {i} (absolute)": m for i, m in maps.items()}
    notes = [
        f"attention and remainder give layer {i}'s output to a relative error of {e:.1e}" for i, e in errors.items()
    ]
    page = attention_page({**absolute, **signed}, tokens, title, first=f"layer {layer} (absolute)", notes=notes)
    page_path = page.save(folder / f"{stem}.html")
    size = sum(t.numel() * t.element_size() for t in cache.values())
    return Report(model_name, text, layer, len(cache), size, errors, tops, following, figure_path, page_path)


@dataclass(frozen=True)
class Comparison:
    """The architectures side by side. recalled: model -> (its answer, what holds the right one, the source that its layer
    reads most, relative error of the reconstruction); digit: (label, prediction, probability, error)."""

    prompt: str
    recalled: dict[str, tuple[str, str, str, float]]
    digit: tuple[int, int, float, float]
    figure: Path

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "figure": str(self.figure)}


@torch.no_grad()
def compare(out: str | Path = "out", seed: int = 3, digit: int = 4) -> Comparison:
    """`gatedlens.cli.demo.compare()`: one prompt through Mamba, Mamba-2, Griffin, RWKV, RWKV-7 and Qwen3-Next's gated delta
    nets, with attention and without, one handwritten digit through Vision Mamba, and one figure with an implicit attention
    map of each of these seven."""
    folder = out_folder(out)
    figure, axes = plot.panels(3, 3, size=5.2)
    batch = recall(1, seed=seed)
    recalled, tokens = {}, [VOCABULARY[i] for i in batch.tokens[0].tolist()]
    for place, (name, layer) in enumerate({**PICTURED, **HYBRID}.items()):
        model = from_pretrained(name)
        A = implicit_attention(model, batch.tokens, layer=layer)
        attended = A.abs_mean()[0]
        if name in PICTURED:
            title = f"{model.title}: layer {layer} of {name.partition('/')[2]}"
            plot.heatmap(attended, tokens, title=title, ax=axes[place // 3][place % 3])
        answer = VOCABULARY[int(model(batch.tokens)[0, -1].argmax())]
        strongest = tokens[int(attended[-1].argmax())]
        recalled[name] = (answer, tokens[int(batch.answer_pos)], strongest, A.check().relative)

    images, labels = digits()["test"]
    image, label = images[digit : digit + 1], int(labels[digit])
    vim = from_pretrained(DIGITS)
    assert isinstance(vim, HookedViM)
    A = implicit_attention(vim, image, layer=-1)
    probabilities = vim(image)[0].softmax(-1)
    guess = int(probabilities.argmax())
    attended = A.abs_mean()[0]
    grid = vim.grid
    read = attended[list(grid.cls)].mean(0) if grid.cls else attended.mean(0)  # what the logits read
    plot.image(
        image[0], title=f"a handwritten {label}, read as {guess} ({float(probabilities[guess]):.0%})", ax=axes[2][0]
    )
    places = ["cls" if (at := grid.place(p)) is None else f"{at[0]},{at[1]}" for p in range(grid.length)]
    title = f"{vim.title}: layer {vim.cfg.n_layers - 1} of {DIGITS.partition('/')[2]}"
    plot.heatmap(attended, places, title=title, ax=axes[2][1])
    where = "where the class token looks" if grid.cls else "where the positions look"
    plot.over_image(read, image[0], grid, title=where, value=label_of(attended), ax=axes[2][2])
    path = folder / "seven-architectures.png"
    plain(figure.suptitle(f"Implicit attention, seven architectures. Prompt: {' '.join(tokens[1:])}"))
    figure.savefig(path, dpi=100)
    return Comparison(
        " ".join(tokens[1:]), recalled, (label, guess, float(probabilities[guess]), A.check().relative), path
    )

"""Ablations from the command line: what `gatedlens ablate` does.

    ablate(Source("gatedlens/mamba-recall"))                              # whole components of every layer
    ablate(Source("gatedlens/mamba-recall"), point="mixer_out", how="mean", axes="layer,pos")

How an answer suffers where something is taken away: one run a cell, the change of its log probability (or of the logit
difference, with --wrong).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from gatedlens import ablation, metrics
from gatedlens.cli.answer import Answer, cells, table
from gatedlens.cli.demo import default_text
from gatedlens.cli.outfolder import out_folder, written
from gatedlens.cli.patch import points_of
from gatedlens.cli.prompts import likeliest, single
from gatedlens.cli.source import Source
from gatedlens.errors import InputError, PointError, did_you_mean
from gatedlens.model.base import HookedModel
from gatedlens.model.intervention import Intervention
from gatedlens.result.result import Result
from gatedlens.runs import inputs

COMPONENTS: dict[str, Callable[[int], Intervention]] = {
    "layer": ablation.remove_layer,
    "scan": lambda layer: ablation.no_scan(layer),
    "skip": lambda layer: ablation.no_skip(layer),
    "conv": lambda layer: ablation.identity_conv(layer),
    "gate": lambda layer: ablation.open_gate(layer),
    "erase": lambda layer: ablation.no_erase(layer),
}
HOW = ("zero", "mean", "noise")


@torch.no_grad()
def ablate(
    source: Source, text: str | None = None, answer: str | None = None, wrong: str | None = None, point: str | None = None,
    how: str = "zero", axes: str = "layer", top: int = 10, out: str = "out",
) -> Answer:  # fmt: skip
    """What each ablation does to log p(answer) at the last position, or to logit[answer] - logit[wrong].

    point: None takes whole components away, each in each layer (one that a layer lacks has no number); else a point's word, name
    or glob, by layer, or by layer and pos. how: zero; mean: the mean of the point over this text; noise of its size.
    """
    if how not in HOW:
        raise InputError(f"--how {how}: it is {' or '.join(HOW)}.{did_you_mean(how, HOW)}")
    if axes not in ("layer", "layer,pos") or (point is None and axes != "layer"):
        raise InputError(f"--axes {axes}: it is layer, or of a --point layer,pos.")
    if point is None and how != "zero":
        raise InputError(f"--how {how} is for a --point; a component is taken away as it is.")
    model = source.open_language("ablate")
    text = default_text(source.name) if text is None else text
    right = likeliest(model, text) if answer is None else single(model, answer, "--answer")
    other = None if wrong is None else single(model, wrong, "--wrong")
    metric = metrics.log_probability(right) if other is None else metrics.logit_difference(right, other)
    folder, batch = out_folder(out), inputs.ready(model, text)
    plain = float(metric(model(batch)))
    every = _of_components(model) if point is None else _of_points(model, text, point, how, "pos" in axes)
    found = _measured(model, batch, metric, plain, list(every), source.name, text, point)
    said, value = model.to_string([right]), "log p(answer)" if other is None else "logit difference"
    tops = found.top(top)
    rows = cells(tops, found.axes)
    return Answer(
        {
            "model": source.name, "text": text, "answer": said, "wrong": wrong, "point": point, "how": how, "metric": value,
            "whole": plain, "axes": list(found.axes), "shape": list(found.shape), "values": found.values.tolist(), "tops": tops,
        },
        [
            f"{source.name} reads {text!r}",
            f"{value} of {said!r}{f' - {wrong!r}' if wrong is not None else ''} is {plain:+.4f}; it changes most without:",
            table(" ".join([*found.axes, "change"]), rows),
        ],
        files=written(folder, source.name, f"ablate-{point or 'components'}", found),
    )  # fmt: skip


Cell = tuple[tuple[Any, ...], Intervention]


def _of_components(model: HookedModel) -> Iterator[Cell]:
    for name, make in COMPONENTS.items():
        for layer in range(model.cfg.n_layers):
            step = make(layer)
            try:
                step.hooks(model)
            except PointError:  # this layer has no such component
                continue
            yield (name, layer), step


def _of_points(model: HookedModel, text: str, point: str, how: str, by_pos: bool) -> Iterator[Cell]:
    glob, _ = points_of(model, point)
    cache = model.run_with_cache(text, names_filter=glob)[1]
    length = len(model.to_str_tokens(text))
    for name in cache.cache_dict:
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else name
        for place in range(length) if by_pos else (None,):
            where: dict[str, Any] = {} if place is None else {"pos": place}
            if how == "mean":
                step = ablation.mean(name, cache, over=("batch", "pos"), **where)
            elif how == "noise":
                step = ablation.noise(name, float(cache[name].float().std()), **where)
            else:
                step = ablation.zero(name, **where)
            yield (layer, place) if by_pos else (layer,), step


def _measured(
    model: HookedModel,
    batch: Any,
    metric: Any,
    plain: float,
    cells: list[Cell],
    name: str,
    text: str,
    point: str | None,
) -> Result:
    """A Result of every cell; NaN where there is none."""
    axes = ("component", "layer") if point is None else ("layer", "pos")[: len(cells[0][0])] if cells else ("layer",)
    labels: dict[str, list[Any]] = {
        axis: list(dict.fromkeys(key[i] for key, _ in cells)) for i, axis in enumerate(axes)
    }
    values = torch.full([len(labels[axis]) for axis in axes], torch.nan, dtype=torch.float64)
    for key, step in cells:
        with step.on(model):
            change = float(metric(model(batch))) - plain
        values[tuple(labels[axis].index(one) for axis, one in zip(axes, key, strict=True))] = change
    if "pos" in labels:
        labels["pos"] = model.to_str_tokens(text)
    title = f"{name}: without {'each component' if point is None else point}"
    return Result(values, axes, labels, title, "change", {"model": name, "text": text, "whole": plain})

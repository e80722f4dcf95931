"""Grafting: the weights of one model in the place of another's, in some layers and parts, while a block lasts.

    with gl.comparing.graft(base, layers=[2, 3], parts="mixer").on(tuned): ...
    gl.comparing.graft_sweep(tuned, base, tokens, metric).plot()

    W := W + share (W_other - W) ,   share=1: the other's; between 0 and 1 on the way to them

The difference of a fine-tune's weights and its base's is an intervention like any other: where is what the tuning has done?
Nothing is written into a weight: a parameter is given other memory, and its own again at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from gatedlens.address.layers import Layers, layers_of
from gatedlens.errors import InputError, did_you_mean
from gatedlens.metrics import Logits, Metric, measure, name_of
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Input
from gatedlens.model.hookpoint import Part
from gatedlens.options import checked
from gatedlens.result.result import Result
from gatedlens.runs import inputs


@dataclass(frozen=True, eq=False, repr=False)
class Graft:
    """`graft(other, layers=3)`: which weights of which model; `on(model)` puts them in."""

    other: HookedModel
    layers: Layers
    parts: tuple[str, ...] | None
    share: float
    ends: bool = False  # what stands before and behind the layers, in their place

    def __repr__(self) -> str:
        what = "ends" if self.ends else f"layers {self.layers}"
        return f"Graft({self.other.cfg.model_name}, {what}, parts {self.parts or 'all'}, share {self.share})"

    def parameters(self, model: HookedModel) -> dict[str, nn.Parameter]:
        """`graft.parameters(model)`: those of the wrapped model that are exchanged, by their names there.

        InputError for a model that is built in another way, and for layers and parts that it lacks.
        """
        ours, theirs = (dict(one.wrapped.named_parameters()) for one in (model, self.other))
        unlike = [name for name in {**ours, **theirs} if name not in ours or name not in theirs]
        unlike += [name for name in ours if name in theirs and ours[name].shape != theirs[name].shape]
        if unlike:
            raise InputError(
                f"{model.cfg.model_name} and {self.other.cfg.model_name} are not built alike, so no weight of one has a place in "
                f"the other: {unlike[0]} is the first of {len(unlike)} that differ."
            )
        away = [name for name, one in (*ours.items(), *theirs.items()) if one.is_meta]
        if away:
            raise InputError(f"{away[0]} is not in memory (its model runs from the disk), so it cannot be exchanged.")
        wanted = {id(one) for part in self._chosen(model) for one in part}
        return {name: one for name, one in ours.items() if id(one) in wanted}

    def _chosen(self, model: HookedModel) -> list[list[nn.Parameter]]:
        if self.ends:
            ends = ends_of(model)
            return [ends[name] for name in self._known(ends, self.parts)]
        found = []
        for layer in layers_of(model, self.layers):
            own = parts_of(model, layer)
            found += [own[name] for name in self._known(own, self.parts) if name in own]
        if not found:
            raise InputError(f"parts={self.parts!r}: no layer that is meant has such a part.")
        return found

    def _known(self, has: dict[str, list[nn.Parameter]], parts: Sequence[str] | None) -> list[str]:
        every = [*has] if self.ends else list(dict.fromkeys([*has, *_every_part(self.other)]))
        for part in parts or ():
            if part not in every:
                raise InputError(
                    f"parts={part!r} is no part of {self.other.cfg.model_name}; they are {', '.join(every)}."
                    f"{did_you_mean(part, every)}"
                )
        return list(has) if parts is None else list(parts)

    @contextmanager
    def on(self, model: HookedModel) -> Iterator[HookedModel]:
        """`with graft.on(model): ...`: the weights are the other's while the block lasts; afterwards they are what they were."""
        chosen, theirs = self.parameters(model), dict(self.other.wrapped.named_parameters())
        before = {name: one.data for name, one in chosen.items()}
        try:
            for name, one in chosen.items():
                one.data = self._mixed(before[name], theirs[name].data)
            yield model
        finally:
            for name, one in chosen.items():
                one.data = before[name]

    def _mixed(self, own: Tensor, other: Tensor) -> Tensor:
        """own + share (other - own)."""
        other = other.to(own)
        return other if self.share == 1 else torch.lerp(own, other, self.share)


@checked
def graft(
    other: HookedModel, layers: Layers = None, parts: str | Sequence[str] | None = None, share: int | float = 1.0
) -> Graft:
    """`with gl.comparing.graft(base, layers=3, parts="mixer").on(tuned): ...`: the base's weights in the fine-tune's layer 3.

    layers: None for all of them. parts: "mixer", "mlp", "ln1", ... as they stand in a block (None: all); or "embed", "ln_final",
    "unembed", "outside", of the model as a whole, with `layers` left out. share: how far it goes, 1 all the way.

    Where it is put on a model: InputError for one that is built in another way, and for a layer or a part that it lacks.
    """
    chosen = None if parts is None else (parts,) if isinstance(parts, str) else tuple(parts)
    if chosen == ():
        raise InputError(f"parts={parts!r} names no part.")
    outside = [part for part in chosen or () if part in ends_of(other)]
    if outside and len(outside) < len(chosen or ()):
        raise InputError(f"parts={list(chosen or ())}: {', '.join(outside)} is no part of a layer; graft it by itself.")
    if outside and layers is not None:
        raise InputError(f"layers={layers!r}: {', '.join(outside)} belongs to no layer; leave `layers` out.")
    return Graft(other, layers, chosen, float(share), bool(outside))


@checked
@torch.no_grad()
def graft_sweep(
    model: HookedModel,
    other: HookedModel,
    input: Input,
    metric: Metric,
    by_part: bool = False,
    layers: Layers = None,
    share: int | float = 1.0,
    progress: bool = True,
) -> Result:
    """`gl.comparing.graft_sweep(tuned, base, tokens, metric).plot()`: the metric with each layer's weights exchanged.

    A Result [layer]; by_part: [layer, part], a part at a time (NaN where a layer has no such part). metric: its mean over rows is
    taken. facts["baseline"] is the metric of `model` as it is, from which pictures measure; facts["all"] is the other model's.
    Errors as of `graft`.
    """
    batch = inputs.ready(model, input)

    def asked(one: HookedModel) -> float:
        return float(measure(metric, Logits.of(one(batch), batch.mask)).mean())

    chosen = layers_of(model, layers)
    parts = _every_part(model) if by_part else [None]
    values = torch.full((len(chosen), len(parts)), torch.nan, dtype=torch.float64)
    cells = [
        (i, j)
        for i, layer in enumerate(chosen)
        for j, part in enumerate(parts)
        if part in (None, *parts_of(model, layer))
    ]
    for i, j in tqdm(cells, desc="grafting", disable=not progress, unit="cell"):
        with graft(other, chosen[i], parts[j], share).on(model):
            values[i, j] = asked(model)
    facts = {
        "model": model.cfg.model_name,
        "other": other.cfg.model_name,
        "share": float(share),
        "baseline": asked(model),
    }
    facts["all"] = asked(other)
    same = other.cfg.model_name == model.cfg.model_name
    title = f"{'Another checkpoint' if same else other.cfg.model_name}'s weights in {model.cfg.model_name}"
    if by_part:
        return Result(values, ("layer", "part"), {"layer": list(chosen), "part": parts}, title, name_of(metric), facts)
    return Result(values[:, 0], ("layer",), {"layer": list(chosen)}, title, name_of(metric), facts)


def parts_of(model: HookedModel, layer: int) -> dict[str, list[nn.Parameter]]:
    """The parameters of each part of a block by its name there; what no part has to itself is "rest"."""
    block = model.blocks[layer]
    found: dict[str, list[nn.Parameter]] = {}
    mine = {id(one): one for one in block.weights.parameters()}
    named = [
        (name, part)
        for name, part in block.named_children()
        if isinstance(part, Part) and part.weights is not block.weights
    ]
    for name, part in named:
        own = [one for one in part.weights.parameters() if id(one) in mine]
        for one in own:
            del mine[id(one)]
        if own:
            found[name] = own
    if mine:
        found["rest"] = list(mine.values())
    return found


def _every_part(model: HookedModel) -> list[str]:
    return list(dict.fromkeys(name for layer in range(model.cfg.n_layers) for name in parts_of(model, layer)))


def ends_of(model: HookedModel) -> dict[str, list[nn.Parameter]]:
    """The parameters before and behind the layers; a tied embedding is the unembedding too.

    "outside": what is none of them and in no layer: an image's positions, numbers that all layers share.
    """
    modules = {"ln_final": model.ln_final.weights, **{name: one for name, (one, _) in model.ends().items()}}
    words = {"embedding": "embed", "unembedding": "unembed"}
    found = {words.get(name, name): list(one.parameters()) for name, one in modules.items()}
    known = {id(one) for block in model.blocks for one in block.weights.parameters()}
    known |= {id(one) for part in found.values() for one in part}
    outside = [one for one in model.wrapped.parameters() if id(one) not in known]
    return {**found, "outside": outside} if outside else found

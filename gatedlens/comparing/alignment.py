"""One analysis of several models, as one Result with an axis `model`.

    found = gl.comparing.side_by_side(analysis, {"mamba": a, "rwkv": b}, align="depth")
    gl.comparing.difference(found, "mamba", "rwkv").plot()

    align="layer"    layer 3 beside layer 3: for two checkpoints of one model. What a model lacks is NaN
    align="depth"    at the same share of the depth, layer / (n_layers - 1): for models of unequal depth. The deepest one's layers
                     stand on the axis, and of each other model the nearest of its own

Any other axis is put together by its labels, or by numbers where every model has as many entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from gatedlens.errors import InputError, did_you_mean
from gatedlens.model.base import HookedModel
from gatedlens.options import checked
from gatedlens.result.labelled_tensor import LabelledTensor
from gatedlens.result.result import Result

MODEL, LAYER = "model", "layer"
ALIGN = (LAYER, "depth")


@checked
def side_by_side(
    analysis: Callable[[HookedModel], Result | LabelledTensor], models: Mapping[str, HookedModel], align: str = "layer"
) -> Result:
    """`gl.comparing.side_by_side(lambda m: gl.lens.logit_lens(m, text).top(), {"base": a, "tuned": b})`: a Result, model first.

    analysis: a function of a model that gives a Result: a lens, a sweep, `gl.circuits.eap(...).scores`, how well probes do; or a
    number of a profile, `.profiles().half_life`. It runs on each model in turn. align: how the axis `layer` is put together, see
    the head of the file.

    InputError for fewer than two models, for an analysis that gives no Result, and for Results whose axes cannot be put together.
    """
    if len(models) < 2:
        raise InputError(f"side_by_side() compares two models or more by name; there are {len(models)}.")
    for name, model in models.items():
        if not isinstance(model, HookedModel):
            raise InputError(f"models[{name!r}] is {type(model).__name__}; it must be a gatedlens model.")
    if align not in ALIGN:
        raise InputError(f"align={align!r}: it is {' or '.join(map(repr, ALIGN))}.{did_you_mean(align, ALIGN)}")
    found = {name: _asked(analysis, name, model) for name, model in models.items()}
    first = next(iter(found.values()))
    for name, one in found.items():
        if one.axes != first.axes:
            raise InputError(f"The analysis gives the axes {first.axes} of one model and {one.axes} of {name!r}.")
    labels: dict[str, Sequence[Any]] = {}
    for axis in first.axes:
        if axis == LAYER and align == "depth":
            found, labels[axis] = _by_depth(found, {name: model.cfg.n_layers for name, model in models.items()})
        else:
            found, labels[axis] = _by_label(found, axis)
    values = torch.stack([one.values.detach().cpu().to(_widest(found)) for one in found.values()])
    facts = {"models": {name: model.cfg.model_name for name, model in models.items()}, "align": align}
    facts |= {
        name: said for name, said in first.facts.items() if all(one.facts.get(name) == said for one in found.values())
    }
    titles = dict.fromkeys(one.title for one in found.values())
    return Result(values, (MODEL, *first.axes), {MODEL: list(found), **labels}, " / ".join(titles), first.value, facts)


@checked
def difference(found: Result, of: str, minus: str) -> Result:
    """`gl.comparing.difference(found, "tuned", "base").plot()`: what the first has more than the second, the axis `model` gone.

    NaN where one of them lacks the entry. InputError for a Result without that axis, and for a model that is not on it.
    """
    one, other = found.at(**{MODEL: of}), found.at(**{MODEL: minus})
    facts = {name: said for name, said in found.facts.items() if name != "baseline"}
    said = f"{one.title}: {of} - {minus}"
    return replace(one, values=one.values - other.values, title=said, value=f"difference of {found.value}", facts=facts)


def _asked(analysis: Callable[[HookedModel], Result | LabelledTensor], name: str, model: HookedModel) -> Result:
    found = analysis(model)
    if isinstance(found, LabelledTensor):
        found = found.result()
    if not isinstance(found, Result):
        raise InputError(
            f"The analysis gives a {type(found).__name__} of {name!r}; it must be a Result (of a circuit its `scores`; "
            "numbers of your own as gl.Result(values, axes))."
        )
    return found


def _widest(found: Mapping[str, Result]) -> torch.dtype:
    dtype = torch.float32
    for one in found.values():
        dtype = torch.promote_types(dtype, one.values.dtype)
    return dtype


def _by_label(found: Mapping[str, Result], axis: str) -> tuple[dict[str, Result], list[Any]]:
    """Every label that any of them has, in order; numbers where labels differ and sizes do not."""
    own = {name: one[axis] for name, one in found.items()}
    first = next(iter(own.values()))
    if all(labels == first for labels in own.values()):
        return dict(found), first
    if all(len(set(map(str, labels))) == len(labels) for labels in own.values()):
        union = list(dict.fromkeys(label for labels in own.values() for label in labels))
        if axis == LAYER:
            union.sort(key=lambda label: label if isinstance(label, int) else -1)
        places = {
            name: [labels.index(label) if label in labels else None for label in union] for name, labels in own.items()
        }
        return {name: _taken(one, axis, places[name], union) for name, one in found.items()}, union
    if len({len(labels) for labels in own.values()}) == 1:
        return dict(found), list(range(len(first)))
    raise InputError(
        f"The axis {axis!r} has {', '.join(str(len(labels)) for labels in own.values())} entries, and some labels stand there "
        f"more than once, so they cannot be put side by side: take some by .some({axis}=...) in the analysis."
    )


def _by_depth(found: Mapping[str, Result], n_layers: Mapping[str, int]) -> tuple[dict[str, Result], list[Any]]:
    """Of each the nearest layer to each of the deepest's; what is no number (the embedding) by its name."""
    deepest = max(found, key=lambda name: n_layers[name])
    shares = {name: [_share(label, n_layers[name]) for label in one[LAYER]] for name, one in found.items()}
    grid = shares[deepest]
    places = {name: [_nearest(share, own) for share in grid] for name, own in shares.items()}
    labels = [share if isinstance(share, str) else round(share, 3) for share in grid]
    return {name: _taken(one, LAYER, places[name], labels) for name, one in found.items()}, labels


def _share(label: Any, n_layers: int) -> float | str:
    return label / max(n_layers - 1, 1) if isinstance(label, int) else str(label)


def _nearest(share: float | str, own: Sequence[float | str]) -> int | None:
    if isinstance(share, str):
        return own.index(share) if share in own else None
    numbers = [i for i, one in enumerate(own) if not isinstance(one, str)]
    return min(numbers, key=lambda i: abs(float(own[i]) - share)) if numbers else None


def _taken(one: Result, axis: str, places: Sequence[int | None], labels: Sequence[Any]) -> Result:
    """The entries of an axis at these places; NaN for None."""
    dim = one.dim(axis)
    index = torch.tensor([0 if place is None else place for place in places], device=one.values.device)
    values = one.values.to(torch.promote_types(one.values.dtype, torch.float32)).index_select(dim, index)
    lacking = torch.tensor([place is None for place in places], device=values.device)
    values = values.masked_fill(lacking.reshape([-1 if d == dim else 1 for d in range(values.ndim)]), torch.nan)
    return replace(one, values=values, labels={**one.labels, axis: list(labels)})

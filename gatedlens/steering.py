"""Steering vectors: the mean difference of two sets of inputs at a point, added back while the model runs.

    anger = gl.steering.vector(model, ["I hate you", ...], ["I love you", ...], "blocks.6.hook_resid_post")
    with anger.on(model, scale=4):                       # every position of the prompt and every new token
        model.generate("I think that you", max_new_tokens=20)
    anger.on(model, scale=4, pos=slice(-1, None))        # from the prompt's last position on
    anger.on(model, scale=4, head=2)                     # in one head alone, of a point that has heads
    anger.on(model, scale=4, pos=-1)                     # at the prompt's last position, once (a tensor: one a row)
    anger * 4, -anger, anger + fear                      # vectors again
    anger.save("anger.safetensors"); SteeringVector.load("anger.safetensors"); anger.cosine(other)

A vector of states (`mixer.hook_state`) is added to what is written, `mixer.hook_write`: state_t = decay_t state_{t-1} +
write_t + v. So it is in the state after position t, decays and propagates as the state does, and a RecurrentState carries
it into all that is generated later. (An edit at hook_state itself would reach one readout only.) Most often you want it
once, `pos=-1`: without pos it is added again at every step.

Contrastive activation addition: Turner et al. 2023; Rimsky et al. 2024. Positions are counted among real tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from safetensors.torch import save_file
from torch import Tensor

from gatedlens.address.entries import Index, Where
from gatedlens.address.names import Name
from gatedlens.address.positions import Positions, mask_of, one_a_row
from gatedlens.errors import CheckpointError, InputError, PointError
from gatedlens.files import Fields, read_tensors
from gatedlens.markup import card
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Input
from gatedlens.model.hookpoint import HookPoint
from gatedlens.model.intervention import Intervention, edit
from gatedlens.options import checked, is_number
from gatedlens.runs import inputs

__all__ = ["SteeringVector", "vector"]

STATE = ".hook_state"
WRITE = ".hook_write"


@checked
@torch.no_grad()
def vector(
    model: HookedModel, positive: Input, negative: Input, name: Name, pos: int | None = -1, **index: Index
) -> SteeringVector:
    """`gl.steering.vector(model, ["I hate you"], ["I love you"], "blocks.6.hook_resid_post")`: a SteeringVector.

    vector = mean over `positive` - mean over `negative` of what stands at the point `name`; it has the axes of the point but for
    batch and pos. positive, negative: a text or a list of texts, ids, pairs (ids, mask), images. pos: which position of each row,
    counted among its real ones (-1: the last); None: the mean of all of them. index: some entries of the point, head=2 or
    channel=[3, 5] say; the vector is 0 at the others.

    PointError for a point that does not exist or has no positions; InputError for a position that a row lacks,
    and for an index that is out of range. Turner et al. 2023
    (Activation addition, arXiv 2308.10248); Rimsky et al. 2024 (Contrastive activation addition, arXiv 2312.06681).
    """
    found = model.names.find(name)
    point = None if found.view is not None else model.names.points[found.name]
    if point is None or "pos" not in point.dims:
        axes = "it is a view" if point is None else f"its axes are {point.axes}"
        raise PointError(f"{name} cannot be steered: a vector is added at positions, and {axes}.")
    where = _where(found.name, index)
    where.points(model)
    with_means = [_mean(model, given, found.name, pos) for given in (positive, negative)]
    facts = {"model": model.cfg.model_name, "pos": pos, "positive": with_means[0][1], "negative": with_means[1][1]}
    difference, at = with_means[0][0] - with_means[1][0], point.dims.index("pos")
    shape = list(difference.unsqueeze(0).unsqueeze(at).shape)
    chosen = where.entries(shape, point, difference.device, found.name, sizes=model.cfg.sizes).squeeze(at).squeeze(0)
    return SteeringVector(found.name, torch.where(chosen, difference, 0.0), facts)


def _where(name: str, index: Mapping[str, Index]) -> Where:
    """Some entries of a vector's point, whose positions are said by `pos`."""
    if "batch" in index:
        raise InputError(f"batch={index['batch']!r}: a vector has no rows; leave it out.")
    return Where((name,), index)


def _mean(model: HookedModel, given: Input, name: str, pos: int | None) -> tuple[Tensor, int]:
    """The mean activation of some inputs, and of how many rows."""
    batch = inputs.ready(model, given)
    _, cache = model.run_with_cache(batch, names_filter=name)
    real, at = inputs.real(model, batch), model.hook_dict[name].pos_dim
    assert at is not None
    x = cache[name].movedim(at, 1)
    if pos is None:
        kept = x.masked_fill(~real.reshape(*real.shape, *[1] * (x.ndim - 2)), 0)
        rows = kept.sum(1) / real.sum(1).reshape(-1, *[1] * (x.ndim - 2))
    else:
        rows = x[torch.arange(len(x), device=x.device), one_a_row(pos, "pos", real).to(x.device)]
    return rows.mean(0), len(rows)


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """`vector` has the axes of the point `name` but for batch and pos; `facts` say where it came from."""

    name: str
    vector: Tensor
    facts: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"SteeringVector({self.name}, {list(self.vector.shape)}, norm {self.norm:.4g})"

    def _repr_html_(self) -> str:
        facts = {"shape": list(self.vector.shape), "norm": self.norm, **self.facts}
        return card(f"SteeringVector: {self.name}", facts)

    # -- as a vector ---------------------------------------------------------------------------------------------

    def __mul__(self, factor: int | float) -> SteeringVector:
        """`anger * 4`: the same direction, so many times as long."""
        if not is_number(factor):
            return NotImplemented
        return replace(self, vector=self.vector * factor)

    __rmul__ = __mul__

    def __truediv__(self, factor: int | float) -> SteeringVector:
        """`anger / 2`"""
        return self * (1 / factor) if is_number(factor) else NotImplemented

    def __neg__(self) -> SteeringVector:
        """`-anger`: the other way."""
        return self * -1

    def __add__(self, other: SteeringVector) -> SteeringVector:
        """`anger + fear`, of the same point. InputError for vectors of two points, or of two shapes."""
        if not isinstance(other, SteeringVector):
            return NotImplemented
        if (self.name, self.vector.shape) != (other.name, other.vector.shape):
            raise InputError(
                f"{self!r} and {other!r} are of two points: they cannot be one vector. Steer with both: "
                "`a.intervention() + b.intervention()`."
            )
        facts = {key: said for key, said in self.facts.items() if other.facts.get(key) == said}
        return replace(self, vector=self.vector + other.vector.to(self.vector), facts=facts)

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        """`anger - fear`"""
        return self + -other if isinstance(other, SteeringVector) else NotImplemented

    @property
    def norm(self) -> float:
        """Its Euclidean length."""
        return float(self.vector.norm())

    @checked
    def normalised(self, norm: int | float = 1.0) -> SteeringVector:
        """`anger.normalised(norm=1.0)`: the same direction with this Euclidean length. InputError for a vector of zeros."""
        if self.norm == 0:
            raise InputError("The vector is zero: both sets of inputs have the same mean, so it has no direction.")
        return replace(self, vector=self.vector * (norm / self.norm))

    def cosine(self, other: SteeringVector | Tensor) -> float:
        """`anger.cosine(other)`: the cosine of the angle to another vector, -1 to 1. InputError if its shape is another one."""
        theirs = other.vector if isinstance(other, SteeringVector) else other
        if theirs.shape != self.vector.shape:
            raise InputError(
                f"cosine: this vector has shape {list(self.vector.shape)}, the other {list(theirs.shape)}."
            )
        a, b = self.vector.double().flatten(), theirs.double().flatten().to(self.vector.device)
        return float(a @ b / (a.norm() * b.norm()).clamp(min=torch.finfo(a.dtype).tiny))

    # -- on a model ----------------------------------------------------------------------------------------------

    @property
    def target(self) -> str:
        """The point that it is added to: its own, or hook_write for a state."""
        return self.name.removesuffix(STATE) + WRITE if self.name.endswith(STATE) else self.name

    @checked
    def intervention(self, scale: int | float = 1.0, **index: Index) -> Intervention:
        """`(anger.intervention(scale=4, pos=-1) + other).on(model)`: the steering as an Intervention.

        `scale` times the vector is added at every position of every call, or at `pos=...` of each call: while generating, each
        step is a call. index: any axis of the point `target`. Errors: as of `gl.ablation.zero`; InputError for a vector whose
        shape does not fit.
        """
        return edit(self.target, lambda x, point: x + self._shaped(x, point, scale), **index)

    @checked
    @contextmanager
    def on(
        self, model: HookedModel, scale: int | float = 1.0, pos: Positions = None, **index: Index
    ) -> Iterator[HookedModel]:
        """`with anger.on(model, scale=4, pos=-1): ...`: `scale` times the vector is added while the block lasts.

        pos counts the real positions of a prompt: None is all of them and all new tokens; a slice without an end goes on
        through all new tokens too; a number, a list or a slice with an end is in the prompt alone. A call that goes on from
        a state is new tokens, unless it is the first of the block. index: only these entries, head=2 say, of the point `target`.

        PointError for a model without the point, or an axis that it lacks; InputError for a vector of another model's size, an
        index out of range, and while the model runs for positions that do not exist.
        """
        self._check(model)
        calls, where = Calls(model), _where(self.target, index)
        where.points(model)
        with calls.watched(), model.hooks([(self.target, self._hook(calls, scale, pos, where))]):
            yield model

    def _hook(self, calls: Calls, scale: int | float, pos: Positions, entries: Where) -> Callable[..., Tensor]:
        def add(x: Tensor, hook: HookPoint) -> Tensor:
            assert hook.pos_dim is not None
            where = calls.chosen(pos).to(x.device)
            shape = [len(where), *[where.shape[1] if d == hook.pos_dim else 1 for d in range(1, x.ndim)]]
            some = entries.entries(x.shape, hook.point, x.device, hook.name or "", sizes=calls.model.cfg.sizes)
            return torch.where(where.reshape(shape) & some, x + self._shaped(x, hook, scale), x)

        return add

    def _shaped(self, x: Tensor, hook: HookPoint, scale: int | float) -> Tensor:
        """scale * vector, with a batch and a pos axis of size 1."""
        at = hook.pos_dim or 1
        shaped = self.vector.unsqueeze(0).unsqueeze(at)
        if any(have not in (want, 1) for have, want in zip(shaped.shape, x.shape, strict=True)):
            raise InputError(f"The vector has shape {list(self.vector.shape)}; {hook.name} is {list(x.shape)}.")
        return (scale * shaped).to(x)

    def _check(self, model: HookedModel) -> None:
        point = model.names[self.name]
        wanted = [
            size
            for dim, size in zip(point.dims, point.shape(model.cfg.sizes), strict=True)
            if dim not in ("batch", "pos")
        ]
        have = list(self.vector.shape)
        if len(have) != len(wanted) or any(isinstance(w, int) and w != h for w, h in zip(wanted, have, strict=True)):
            raise InputError(
                f"The vector of {self.name} has shape {have}; {model.cfg.model_name} wants {wanted} there: it is from "
                f"another model ({self.facts.get('model', 'unnamed')})."
            )

    # -- on disk -------------------------------------------------------------------------------------------------

    @checked
    def save(self, path: str | Path) -> Path:
        """`anger.save("anger.safetensors")`: write the vector, its point and facts as safetensors; returns the path."""
        meta = {"gatedlens": "steering", "name": self.name, "facts": json.dumps(self.facts)}
        save_file({"vector": self.vector.detach().cpu().contiguous()}, str(path), meta)
        return Path(path)

    @staticmethod
    def load(path: str | Path) -> SteeringVector:
        """`SteeringVector.load("anger.safetensors")`: what `save` wrote. CheckpointError for a file that holds none."""
        tensors, meta = read_tensors(path)
        if meta.get("gatedlens") != "steering" or "vector" not in tensors:
            raise CheckpointError(f"{path} is no saved SteeringVector: it holds {', '.join(list(tensors)[:5])}.")
        fields = Fields(meta, "SteeringVector", path, CheckpointError)
        name = fields.get("name", "the name of a hook point", lambda v: v != "")
        facts = fields.get("facts", "JSON of what it was made from", _is_json_object)
        if not tensors["vector"].is_floating_point():
            raise CheckpointError(f"{path} is no saved SteeringVector: its vector holds {tensors['vector'].dtype}.")
        return SteeringVector(name, tensors["vector"], json.loads(facts))


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


class Calls:
    """The calls of a model while it is watched: which positions are real, and whether a call goes on from a state."""

    def __init__(self, model: HookedModel):
        self.model = model
        self.count = 0
        self.goes_on = False
        self.real: Bool[Tensor, "batch pos"] = torch.ones(0, 0, dtype=torch.bool)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """`with calls.watched(): ...`: the input of every call of the model is looked at while the block lasts."""
        handle = self.model.register_forward_pre_hook(self._look, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _look(
        self, model: HookedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Note the call, and hand on its input made ready, so that text is read once."""
        batch, rest = model.prepare(*args, **kwargs)
        self.real = inputs.real(model, batch)
        self.goes_on = self.count > 0 and rest.get("state") is not None
        self.count += 1
        return (batch,), rest

    def chosen(self, pos: Positions) -> Bool[Tensor, "batch pos"]:
        """`calls.chosen(slice(-1, None))`: True at the positions of this call that `pos` means; see `SteeringVector.on`."""
        if pos is None:
            return self.real
        if self.goes_on:
            on = pos == "*" if isinstance(pos, str) else isinstance(pos, slice) and pos.stop is None
            return self.real if on else torch.zeros_like(self.real)
        return mask_of(pos, "pos", self.real)

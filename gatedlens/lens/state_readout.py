"""The state lens: what a state would say if a prompt of yours read it: its own state, or another prompt's.

    lens = gl.lens.state_lens(model, "Ishmael went to sea.", "He was a sailor named", pos=-1)
    lens.plot(), lens.words(), lens.probability(" Ishmael")      # as of a LogitLens, layer by position of the reader
    lens.attribution(right, wrong)                               # batch x layer: what it gives to the reader's logit
    lens.shares(right, wrong, layers=2)                          # the same by the state's own axes: head value key, ...

    said_l[t] = out_l(scan := S read_l[t]) - out_l(scan := 0)      with everything else at reader's position t as it is

S is the state of the source after `pos`, read_l[t] what the reader reads by (C, r, q, ...), out_l the rest of the mixer's path:
gate, norm with its scale held, output projection. So it is linear in S wherever the readout is: a sum over heads, keys and
values. What the mixer writes with an empty state (the skip, the token's own bonus, biases) is `rest`: with the reader's own state
at its own position, said + rest is the mixer's output there. Where a position reads the state of the one before (RWKV-4, -6), its
own state is that one's. Of RWKV-4's pair (numerator, denominator) the readout is a quotient, which is not linear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from gatedlens.address.entries import Index, Where
from gatedlens.address.layers import Layers, layers_of, scans_of
from gatedlens.address.positions import Positions, one_a_row
from gatedlens.errors import InputError, PointError
from gatedlens.lens.early_logits import LogitLens
from gatedlens.lens.logit_shares import Reading, Tokens, held_at_last
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Batch, Input
from gatedlens.model.cache import ActivationCache
from gatedlens.model.hookpoint import Capture, Saver
from gatedlens.model.state import RecurrentState
from gatedlens.options import checked
from gatedlens.result.result import Result
from gatedlens.runs import inputs

# For editors and type checkers: whoever passes something else gets the error of `prepare`.
if TYPE_CHECKING:
    Source: TypeAlias = Input | ActivationCache | RecurrentState
else:
    Source = Any
STATE = "hook_state"
ROUNDING = 1e-3  # of what a lens says, above which its shares do not add up


@dataclass(frozen=True)
class Readout:
    """One scan of a layer: its points begin with `stem`; `written` is where the mixer's output stands."""

    layer: int
    stem: str
    written: str
    mixer: Any

    @property
    def state(self) -> str:
        """The full name of its state's point."""
        return f"{self.stem}{STATE}"

    @property
    def component(self) -> str:
        """What `logit_attribution` calls what its mixer writes."""
        return f"{self.layer}_{self.written.rpartition('hook_')[2]}"


@checked
@torch.no_grad()
def state_lens(
    model: HookedModel,
    source: Source,
    reader: Input,
    pos: Positions = -1,
    layers: Layers = None,
    scan: str | None = None,
    **index: Index,
) -> StateLens:
    """`gl.lens.state_lens(model, "Ishmael went to sea.", "He was a sailor named", pos=-1)`: a StateLens, layer by position.

    source: text, ids, a pair (ids, mask), images; a cache that holds hook_state; or a RecurrentState. pos: after which of the
    source's positions its state is taken, one for all rows or one a row (a RecurrentState has one). One row of the source goes
    for all of the reader, and the other way round. layers: None for every layer with a recurrence. scan: "fwd" or "bwd" where a
    layer has both. index: some entries of the state, `head=2`, `channel=[0, 3]`; the others are read as 0.

    PointError for a layer without a recurrence, an axis that the state lacks, and a cache without its states; InputError for
    numbers of rows that do not go together, and a position that a row lacks.
    """
    for axis in ("batch", "pos"):
        if axis in index:
            raise InputError(
                f"{axis}={index[axis]!r}: a state lens reads every row at every position of the reader; leave it out."
            )
    readouts = _readouts(model, layers, scan)
    states = _some(model, _states(model, source, pos, readouts), index)
    batch, states = _rows(inputs.ready(model, reader), states)
    names = _needed(model, readouts)
    _, cache = model.run_with_cache(batch, names_filter=names)
    lens = StateLens(model, batch, (), (), readouts=tuple(readouts), states=states, cache=cache)
    empty = {name: torch.zeros_like(state) for name, state in states.items()}
    rest, found = lens._run(empty), lens._run(states)
    depths = tuple(found)
    said = tuple(found[layer] - rest[layer] for layer in depths)
    return StateLens(model, batch, said, depths, "state lens", tuple(readouts), states, cache, tuple(rest.values()))


@dataclass(frozen=True, eq=False, repr=False)
class StateLens(LogitLens):
    """A LogitLens of what the states say: `resid` is what they write into the reader's stream, layer by layer.

    states: by their points [batch, ...]. rest: what each layer's mixers write with an empty state. cache: the reader's own run.
    """

    readouts: tuple[Readout, ...] = ()
    states: Mapping[str, Tensor] = field(default_factory=dict)
    cache: Any = None
    rest: tuple[Float[Tensor, "batch pos d_model"], ...] = ()

    @checked
    @torch.no_grad()
    def attribution(self, right: Tokens, wrong: Tokens | None = None, at: Positions = None) -> Result:
        """`lens.attribution(right, wrong)`: what each layer's state gives to the reader's logit (difference), batch x layer.

        The reader's final scale is held, as in `logit_attribution`: with the reader's own state, this and what `rest` gives are
        its components `0_mixer_out`, ... at: where the logit is read (the last real position). Errors as there.
        """
        reading = Reading.of(self.model, self.cache, right, wrong, at, ())
        here = {one.layer: reading.at(one.component) for one in self.readouts}
        said = zip(self.layers, self.resid, strict=True)
        values = torch.stack([here[layer].of_stream(written) for layer, written in said], dim=1)
        off = 0.0
        return reading.titled(values, ("batch", "layer"), {"layer": self.layers}, "State lens: share of a logit", off)

    @checked
    def shares(self, right: Tokens, wrong: Tokens | None = None, at: Positions = None, layer: int = -1) -> Result:
        """`lens.shares(right, wrong, layer=2)`: of what a layer's state gives to the logit the share of each of its entries.

        batch x the state's axes: head value state, or channel state, ... It sums to `attribution`; the fact `error` says how
        exactly. InputError for a readout that is not linear in its state (RWKV-4), and for a layer that reads two states.
        """
        mine = [one for one in self.readouts if one.layer == self.layers[self._depth(layer)]]
        if len(mine) > 1:
            raise InputError(f"Layer {mine[0].layer} reads {len(mine)} states: choose one by scan='fwd' or 'bwd'.")
        (readout,) = mine
        with torch.no_grad():
            reading = Reading.of(self.model, self.cache, right, wrong, at, ()).at(readout.component)
            total = reading.of_stream(self.resid[self._depth(layer)])
        state = self.states[readout.state].detach().clone().requires_grad_()
        with torch.enable_grad():
            said = self._run({**self.states, readout.state: state})[readout.layer]
            (gradient,) = torch.autograd.grad((said.double() * reading.direction).sum(), state)
        values = (gradient * state).detach().double()
        off = (values.flatten(1).sum(1) - total).abs().max().item()
        if off > ROUNDING * max(float(total.abs().max()), float(values.abs().sum((*range(1, values.ndim),)).max())):
            raise InputError(
                f"The readout of layer {readout.layer} of {self.model.title} is not linear in its state, so no share is one "
                f"entry's (they are {off:.3g} off). `state_lens(..., channel=...)` reads some entries alone."
            )
        axes = tuple(dim for dim in self.model.names.points[readout.state].dims if dim != "pos")
        return reading.titled(values, axes, {}, f"State lens: share of a logit, layer {readout.layer}", off)

    def _run(self, states: Mapping[str, Tensor]) -> dict[int, Float[Tensor, "batch pos d_model"]]:
        """What the mixers of each layer write where every position reads these states, all else being the reader's own."""
        values: dict[str, Tensor] = {}
        hooks: list[tuple[str, Callable[..., Any]]] = []
        for name, state in states.items():
            hooks += [(name, _everywhere(state)), (f"{name}_start", _in_place(state))]
        hooks += [(name, _held(self.cache[name])) for name in _held_names(self.model)]
        hooks += [(one.written, Capture(values)) for one in self.readouts]
        with self.model.hooks(hooks):
            self.model(self.batch, return_type=None)
        found: dict[int, Tensor] = {}
        for name, layer in dict.fromkeys((one.written, one.layer) for one in self.readouts):
            found[layer] = found[layer] + values[name] if layer in found else values[name]
        return found

    def _predicted(self) -> Float[Tensor, "batch pos d_vocab"]:
        last = self.cache["resid_post", -1]
        found: Tensor = self.model.unembed(self.model.ln_final(last))
        return found


def _readouts(model: HookedModel, layers: Layers, scan: str | None) -> list[Readout]:
    """The scans that are meant; a layer that has none only if nobody named it."""
    found: list[Readout] = []
    for layer in layers_of(model, layers):
        block, before = model.blocks[layer], len(found)
        for mixer in block.writers:
            stems = [f"blocks.{layer}.{mixer.place}.{one + '.' if one else ''}" for one in scans_of(mixer, scan)]
            written = f"blocks.{layer}.{block.written(mixer.place)}"
            found += [Readout(layer, stem, written, mixer) for stem in stems if f"{stem}{STATE}" in model.names.points]
        if len(found) == before and layers is not None:
            raise PointError(
                f"Layer {layer} of {model.cfg.model_name} has no recurrence, so no state that a lens could read."
            )
    if not found:
        raise PointError(
            f"No layer of {model.cfg.model_name} has a recurrence, so there is no state that a lens could read."
        )
    return found


@dataclass
class At(Saver):
    """A hook that keeps what it hears at one position of each row: [batch, ...]."""

    place: Tensor
    values: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, tensor: Tensor, hook: Any) -> None:
        rows = torch.arange(len(tensor), device=tensor.device)
        self.values[str(hook.name)] = tensor[rows, self.place.to(tensor.device)].clone()


def _states(model: HookedModel, source: Source, pos: Positions, readouts: list[Readout]) -> dict[str, Tensor]:
    """The state of each scan, [batch, ...]."""
    if isinstance(source, RecurrentState):
        model.check_state(source)
        return {one.state: one.mixer.state_of(source) for one in readouts}
    if isinstance(source, ActivationCache):
        lacking = [one.state for one in readouts if one.state not in source.cache_dict]
        if lacking:
            raise PointError(f"The source holds no {lacking[0]}: run_with_cache(..., names_filter='*.hook_state').")
        _, batch = inputs.cached(model, source, [])
        place = one_a_row(pos, "pos", inputs.real(model, batch))
        found = {one.state: source[one.state] for one in readouts}
        return {name: x[torch.arange(len(x), device=x.device), place.to(x.device)] for name, x in found.items()}
    batch = inputs.ready(model, source)
    at = At(one_a_row(pos, "pos", inputs.real(model, batch)))
    with model.hooks([(one.state, at) for one in readouts]):
        model(batch, return_type=None)
    return at.values


def _some(model: HookedModel, states: dict[str, Tensor], index: Mapping[str, Index]) -> dict[str, Tensor]:
    """The states, 0 where an index says that they are not read."""
    where, sizes = Where(tuple(states), index), model.cfg.sizes
    where.points(model)
    found: dict[str, Tensor] = {}
    for name, state in states.items():
        shape = (len(state), 1, *state.shape[1:])
        mask = where.entries(shape, model.names.points[name], state.device, name, sizes=sizes).squeeze(1)
        found[name] = torch.where(mask, state, 0)
    return found


def _rows(batch: Batch, states: dict[str, Tensor]) -> tuple[Batch, dict[str, Tensor]]:
    """Reader and states with as many rows: one of either goes for all of the other."""
    given, rows = len(batch.value), len(next(iter(states.values())))
    if given == rows or rows == 1:
        return batch, {name: state.expand(given, *state.shape[1:]) for name, state in states.items()}
    if given != 1:
        raise InputError(
            f"The source has {rows} rows and the reader {given}: one row of either goes for all of the other."
        )
    mask = None if batch.mask is None else batch.mask.expand(rows, -1)
    return Batch(batch.value.expand(rows, *batch.value.shape[1:]), mask, batch.is_resid), states


def _held_names(model: HookedModel) -> list[str]:
    """What stays the reader's own: every norm's scale in the blocks, and the stream that each layer leaves."""
    ends = (".hook_scale", ".hook_resid_post")
    return [name for name in model.names.points if name.startswith("blocks.") and name.endswith(ends)]


def _needed(model: HookedModel, readouts: list[Readout]) -> list[str]:
    written = [one.written for one in readouts]
    return [*dict.fromkeys([*_held_names(model), *written, "blocks.0.hook_resid_pre", *held_at_last(model)])]


def _everywhere(state: Tensor) -> Callable[..., Tensor]:
    return lambda x, hook: state.to(x).unsqueeze(1).expand_as(x)


def _in_place(state: Tensor) -> Callable[..., Tensor]:
    return lambda x, hook: state.to(x).expand_as(x)


def _held(own: Tensor) -> Callable[..., Tensor]:
    return lambda x, hook: own.to(x)

"""Patching, splicing, swapping and reading states; `help(gl.states)` shows each.

decay[t] := 0,  erase[t] := 0 (of a delta rule),  write[t] := the new state       (so state_t is that, and later positions follow)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from gatedlens.address.entries import Index, Where
from gatedlens.address.layers import Layers, layers_of
from gatedlens.address.names import Names, Point
from gatedlens.address.positions import Positions
from gatedlens.errors import InputError, did_you_mean
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Input
from gatedlens.model.intervention import Intervention
from gatedlens.model.language import HookedLanguageModel
from gatedlens.model.state import Carried, RecurrentState
from gatedlens.options import checked
from gatedlens.states.state_patch import Source, StatePatch

# For editors and type checkers: whoever passes something else gets the error of `_check_kind`.
if TYPE_CHECKING:
    State: TypeAlias = RecurrentState
else:
    State = Any

# -- in the middle of a run -----------------------------------------------------------------------------------------


@checked
def patch(
    source: Source,
    pos: Positions,
    layers: Layers = None,
    source_pos: Positions = None,
    scan: str | None = None,
    **index: Index,
) -> Intervention:
    """`gl.states.patch(cache_of_a, pos=7, layers=2, channel=[0, 3])`: the state after position 7 becomes that of the other run.

    decay[7] := 0 (a delta rule's erase too) and write[7] := the new state; later positions follow from it. Returns an
    Intervention: `.on(model)`, `a + b`.

    source: an ActivationCache that holds hook_state, read at `source_pos` (default `pos`); a RecurrentState; or a tensor
    [batch, channel] (state) as hook_state has it at one position; one row goes for all. pos, source_pos: one position for
    every row, or a tensor [batch]. layers: None for every layer with a recurrence. index: some `channel`, or `state`; the
    others keep their own. scan: "fwd" or "bwd" where a layer has both; "after" is meant in the direction of the scan.

    The readout at the position itself is of the new state too (RWKV's reads the one before). The conv and shift windows stay
    as they are, and so does an attention layer's: `splice` moves those, between calls. RWKV's state is the pair (numerator,
    denominator), absolute, in float64; a RecurrentState's pair, relative to a maximum, is turned into it.

    Where it is put on a model: PointError for a layer without a recurrence, a source that does not hold its state, or an axis
    that the state lacks; InputError for a `batch` or `pos` in index and for a cache without all positions or its batch axis.
    While the model runs: InputError for a state of another shape and for positions that do not exist.
    """
    return Intervention((StatePatch(source, pos, layers, source_pos, scan, index),))


# -- between two calls ----------------------------------------------------------------------------------------------


@checked
def splice(
    model: HookedModel,
    into: State,
    source: State,
    layers: Layers = None,
    parts: str | Sequence[str] | None = None,
    **index: Index,
) -> RecurrentState:
    """`gl.states.splice(model, b, a, layers=[2], parts="scan", channel=slow)`: a new state, b's with these entries of a.

    layers, parts: None for all. index: some `channel` (`d_model` of a shift, `kv_head` of a window). One row of the source goes
    for all; rows of one state among themselves: `splice(model, s, s.rows([1, 0]), layers=2)`. With everything taken it is a's.

    A window's keys were rotated for the positions at which they stood, so it moves only between runs that have come as far.

    InputError for what is no RecurrentState of this model, for another number of rows, a part or layer that is not there, and a
    window that may not move; PointError for an axis that a tensor lacks.
    """
    _check_kind(into, source, model)
    source = source.rows([0] * into.batch_size) if source.batch_size == 1 else source
    if source.batch_size != into.batch_size:
        raise InputError(
            f"The source state holds {source.batch_size} rows and the other {into.batch_size}: use .rows([...])."
        )
    chosen = layered_keys(into, model, layers, parts)
    layered = {key for key in into if _carried(model, key).part}
    if set(chosen) == layered and not index:
        return source.clone()
    out = into.clone()
    tensors = {key: _point(model, key, source[key]) for key in chosen}
    for key, carried in chosen.items():
        new = source[key]
        if carried.part == "window":
            _check_window(into, source, key)
        if index:
            where, sizes = Where((), index), model.cfg.sizes
            where.check(key, Names(tensors, model=f"this state of {model.cfg.model_name}"), sizes)
            new = torch.where(where.entries(new.shape, tensors[key], new.device, sizes=sizes), new, into[key])
        out.tensors[key] = new.clone()
    return out


@checked
def swap(
    model: HookedModel,
    a: State,
    b: State,
    layers: Layers = None,
    parts: str | Sequence[str] | None = None,
    **index: Index,
) -> tuple[RecurrentState, RecurrentState]:
    """`a, b = gl.states.swap(model, a, b, layers=2, parts="scan")`: the two states with these tensors (entries) exchanged.

    The states that were given stay as they are. Parameters and errors: as of `gl.states.splice`.
    """
    return splice(model, a, b, layers, parts, **index), splice(model, b, a, layers, parts, **index)


def _point(model: HookedModel, key: str, tensor: Tensor) -> Point:
    """A tensor of the state as the point that an index speaks of."""
    return Point(key, " ".join(_carried(model, key).axes.split()[: tensor.ndim]), "", "")


def _carried(model: HookedModel, key: str) -> Carried:
    return model.carried[key.rpartition(".")[2]]


def _check_kind(into: Any, source: Any, model: HookedModel) -> None:
    for what, state in (("first", into), ("second", source)):
        if not isinstance(state, RecurrentState):
            raise InputError(
                f"The {what} state is {type(state).__name__}; it must be a RecurrentState (return_state=True)."
            )
    if set(into) != set(source) or any(key.rpartition(".")[2] not in model.carried for key in into):
        raise InputError(
            f"These are states of different models ({into.model_name or 'unnamed'}: {len(into)} tensors, "
            f"{source.model_name or 'unnamed'}: {len(source)}), or not of {model.cfg.model_name}."
        )
    for key in into:
        ours, theirs = (list(state[key].shape[1:]) for state in (into, source))
        if ours != theirs and _carried(model, key).part != "window":  # a window is as long as what it has seen
            raise InputError(
                f"These are states of different models ({into.model_name or 'unnamed'}, {source.model_name or 'unnamed'}): "
                f"{key} is [batch, {', '.join(map(str, ours))}] in one and [batch, {', '.join(map(str, theirs))}] in the other."
            )


def layered_keys(
    state: RecurrentState, model: HookedModel, layers: Layers, parts: str | Sequence[str] | None
) -> dict[str, Carried]:
    """The tensors that are meant; a layer that was named must have one."""
    known = sorted({_carried(model, key).part for key in state} - {""})
    wanted = known if parts is None else [parts] if isinstance(parts, str) else list(parts)
    for part in wanted:
        if part not in known:
            raise InputError(
                f"{part!r} is no part of this model's state; they are {', '.join(known)}.{did_you_mean(part, known)}"
            )
    found: dict[str, Carried] = {}
    for layer in layers_of(model, layers):
        names = {key: _carried(model, key) for key in state if key.split(".")[1] == str(layer)}
        mine = {key: carried for key, carried in names.items() if carried.part in wanted}
        if not mine and layers is not None:
            has = ", ".join(sorted({carried.part for carried in names.values()} - {""}))
            raise InputError(f"Layer {layer} carries no {' or '.join(wanted)}; it carries {has}.")
        found |= mine
    return found


def _check_window(into: RecurrentState, source: RecurrentState, key: str) -> None:
    if into[key].shape != source[key].shape or not torch.equal(into.seen, source.seen.to(into.seen.device)):
        raise InputError(
            f"{key} belongs to an attention window, whose keys were rotated for their positions: it moves only between runs "
            f"that have seen as many tokens ({into.seen.tolist()} and {source.seen.tolist()} here). Choose other parts or layers."
        )


@checked
@torch.no_grad()
def read_through(
    model: HookedLanguageModel,
    source: Input | RecurrentState,
    reader: Input,
    at: int,
    layers: Layers = None,
    parts: str | Sequence[str] | None = None,
    **index: Index,
) -> Float[Tensor, "batch pos d_vocab"]:
    """`gl.states.read_through(model, "Ishmael went to sea.", "He was a sailor named", at=1, layers=[2])`: logits of reader[at:].

    The reader prompt is run to position `at`; there its state gets, in these layers, parts and channels, what the source
    holds at its end, and the rest of the prompt is read from that. All layers and parts: the suffix as if it went on from
    the source. source: text, tokens or a RecurrentState. A single row, of either, goes for all rows of the other. It is
    Patchscopes (Ghandeharioun et al. 2024, arXiv 2401.06102) for states: the reader says what of the source a state holds.

    InputError for a reader whose rows differ in length, for an `at` with no token before or behind it, and as of `splice`.
    """
    batch, _ = model.prepare(reader)
    if batch.mask is not None:
        raise InputError(
            "The reader's rows differ in length, so `at` is no one place in them: give rows of one length."
        )
    tokens, length = batch.value, batch.value.shape[1]
    if not 1 <= at < length:
        raise InputError(
            f"at={at}: give 1 to {length - 1}; the reader has {length} tokens, some read before `at` and some after."
        )
    given = source if isinstance(source, RecurrentState) else model(source, return_type=None, return_state=True)[1]
    if len(tokens) == 1:
        tokens = tokens.expand(given.batch_size, -1)
    _, own = model(tokens[:, :at], return_type=None, return_state=True)
    return model(tokens[:, at:], state=splice(model, own, given, layers, parts, **index))

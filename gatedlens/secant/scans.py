"""The secant of a recurrence is a recurrence: of D, with the means of both runs in it.

    Dh_t    = mean(decay_t) Dh_{t-1} + mean(h_{t-1}) D decay_t + D write_t
    D y_t   = mean(read_t) Dh_t + mean(h_t) D read_t
    delta   the same, less mean(found_t) D erase_t + mean(erase_t) D found_t,  found_t = h_{t-1} . probe_t
                                                    D found_t = mean(probe_t) Dh_{t-1} + mean(h_{t-1}) D probe_t

Backward it runs from the end, as the gradient of a scan does. States are large, so a long scan keeps those at the beginnings of
blocks alone, of both runs, and makes each block anew: its terms, in torch's operations, have rules of their own.

b batch, l pos, h head, v value, k key (or [b, l, c, n] of channels). The literal truth is the same code on `literal.march`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function

from gatedlens.errors import InputError
from gatedlens.recurrence import doubling
from gatedlens.recurrence.autocast import exact, is_on
from gatedlens.recurrence.channels import vectors
from gatedlens.recurrence.chunk_secant import Forward, Laid, backward, forward
from gatedlens.recurrence.chunks import chunk_size, inside, laid_out
from gatedlens.recurrence.delta_states import states_of_delta_rule
from gatedlens.recurrence.scanning import linear_scan, readout, scan
from gatedlens.secant import channel_scan
from gatedlens.secant.contrast import Call, Contrast, Rule
from gatedlens.secant.products import mean_of

BLOCK = 1 << 18  # numbers of a block's states, of one run
SHORTEST = 8  # positions
BY_KEY = 16  # positions of a chunk where keys decay each at its own pace: pairs of positions cost most there

# Of some positions of every sequence, and the state before.
Body = Callable[[Sequence[Any], Tensor], tuple[Tensor, Tensor]]
# (of the start, of each sequence) by those positions of this run and of the one before (None: the same), the starts of both, and
# what the scan and the last state get.
Flow = Callable[[Any, Any, tuple[Tensor, Tensor], Tensor, Tensor], tuple[Tensor, list[Any]]]


def _arguments(call: Call) -> tuple[Any, ...]:
    args, kwargs = torch.utils._pytree.tree_unflatten(call.leaves, call.form)
    return (*args, *kwargs.values())


def _runs(x: Any, number: int) -> tuple[Tensor, ...]:
    """A tensor of every run; what is the same in all of them is held."""
    return x.runs if isinstance(x, Contrast) else (x.detach(),) * number


# -- every state ------------------------------------------------------------------------------------------------------


class States(Function):
    """Every state with the gradient of the rule: `decay`, `start` and `states` are means of two runs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, means: tuple[Tensor, Tensor, Tensor], *live: Tensor) -> Tensor:
        ctx.save_for_backward(*means)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        decay, start, states = ctx.saved_tensors
        # From the end, position t meets the decay of t + 1.
        ahead = torch.cat([decay[:, 1:], torch.ones_like(decay[:, :1])], dim=1)
        g = linear_scan(ahead.flip(1), grads[0].flip(1)).flip(1)
        of_decay = None
        if ctx.needs_input_grad[2]:
            of_decay = g * torch.cat([start.unsqueeze(1), states[:, :-1]], dim=1)
        return None, None, of_decay, g, decay[:, 0] * g[:, 0]


def every_state(call: Call) -> Contrast:
    """linear_scan(decay, write, initial)"""
    decay, write, initial, *_ = (*_arguments(call), None)
    with torch._C._EnableTorchFunction():
        shape = torch.broadcast_shapes(decay.shape, write.shape)
        decay, write = decay.expand(shape), write.expand(shape)
    decays, writes = _runs(decay, call.number), _runs(write, call.number)
    starts = _runs(torch.zeros_like(writes[0][:, 0]) if initial is None else initial, call.number)
    starts = tuple(start.expand(shape[:1] + shape[2:]) for start in starts)
    with torch.no_grad():
        values = [linear_scan(*given) for given in zip(decays, writes, starts, strict=True)]
    outs = [values[0]]
    for run in range(1, call.number):
        means = tuple(mean_of(x, run) for x in (decays, starts, tuple(values)))
        outs.append(States.apply(values[run], means, decays[run], writes[run], starts[run]))
    return call.together(outs)


class DeltaStates(Function):
    """Every state of a delta rule with the gradient of the rule; `found` is the mean of what the probes find."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, means: tuple[Tensor, ...], *live: Tensor) -> Tensor:
        ctx.save_for_backward(*means)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        decay, erase, probe, start, states, found = ctx.saved_tensors

        def behind(x: Tensor, filled: float) -> Tensor:
            """From the end, and a position later: what stands between the state of t and that of t + 1."""
            return torch.cat([x[:, 1:], torch.full_like(x[:, :1], filled)], dim=1).flip(1)

        # The adjoint of S' = S decay - (S probe) erase is a delta rule too, which finds by erase and erases by probe.
        if erase.shape[-2] == 1:
            adjoint = (
                behind(decay, 1.0),
                grads[0].flip(1),
                behind(probe.unsqueeze(-2), 0.0),
                behind(erase.squeeze(-2), 0.0),
            )
            g = states_of_delta_rule(*adjoint, torch.zeros_like(start)).flip(1)  # [b, l, h, v, k]
        else:
            g = _by_value(decay, erase, probe, grads[0])
        before = torch.cat([start.unsqueeze(1), states[:, :-1]], dim=1)
        of_found = -(g * erase).sum(-1, keepdim=True)  # [b, l, h, v, 1]
        of_probe = (before.mT @ of_found).squeeze(-1)
        of_erase = -(found * g).sum_to_size(erase.shape)
        of_decay = (g * before).sum_to_size(decay.shape)
        of_start = g[:, 0] * decay[:, 0] + of_found[:, 0] * probe[:, 0].unsqueeze(-2)
        return None, None, of_decay, g, of_erase, of_probe, of_start


def _by_value(decay: Tensor, erase: Tensor, probe: Tensor, grad: Tensor) -> Tensor:
    """The adjoint where a hook gave each value an erase of its own: a position at a time."""
    found = [grad[:, -1]]
    for t in reversed(range(1, grad.shape[1])):
        g = found[-1]
        found.append(
            grad[:, t - 1] + g * decay[:, t] - (g * erase[:, t]).sum(-1, keepdim=True) * probe[:, t].unsqueeze(-2)
        )
    return torch.stack(found[::-1], dim=1)


def every_state_of_delta_rule(call: Call) -> Contrast:
    """states_of_delta_rule(decay, write, erase, probe, state)"""
    given = _arguments(call)
    each = [_runs(x, call.number) for x in given]
    with torch.no_grad():
        values = [states_of_delta_rule(*run) for run in zip(*each, strict=True)]
        found = [
            torch.cat([start.unsqueeze(1), states[:, :-1]], dim=1) @ probe.unsqueeze(-1)
            for states, probe, start in zip(values, each[3], each[4], strict=True)
        ]
    outs = [values[0]]
    for run in range(1, call.number):
        means = [mean_of(x, run) for x in (each[0], each[2], each[3], each[4], tuple(values), tuple(found))]
        outs.append(DeltaStates.apply(values[run], tuple(means), *(x[run] for x in each)))
    return call.together(outs)


# -- blocks -----------------------------------------------------------------------------------------------------------


class Blocked(NamedTuple):
    """What the backward of a recurrence needs beside its live tensors: see `by_blocks`."""

    flow: Flow
    parts: list[slice]
    now: list[Tensor]  # the sequences of this run
    before: list[Tensor | None]  # those of the run before; None where they are the same in both
    starts: list[tuple[Tensor, Tensor]]  # the states before each block: of this run, and of the one before


class Blocks(Function):
    """(scan, last) of one run with the gradient of the rule, made block by block from the end."""

    @staticmethod
    def forward(ctx: Any, held: Blocked, out: Tensor, last: Tensor, start: Tensor, *live: Tensor) -> Any:
        ctx.held = held
        return out.view_as(out), last.view_as(last)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        held: Blocked = ctx.held
        into: list[Any] = [
            None if before is None else torch.empty_like(now) for now, before in zip(held.now, held.before, strict=True)
        ]
        of_scan, of_state = grads
        for part, starts in zip(reversed(held.parts), reversed(held.starts), strict=True):
            now, before = ([None if x is None else x[:, part] for x in some] for some in (held.now, held.before))
            of_state, found = held.flow(now, before, starts, of_scan[:, part], of_state)
            for whole, piece in zip(into, found, strict=True):
                if whole is not None:
                    whole[:, part] = piece
        return None, None, None, of_state, *into


def by_rules(body: Body, rules: Mapping[str, Rule]) -> Flow:
    """The flow through a block of what `body` says in torch's operations, each of which has a rule."""

    def flow(now: Any, before: Any, starts: Any, of_scan: Tensor, of_state: Tensor) -> tuple[Tensor, list[Any]]:
        moving = [i for i, one in enumerate(before) if one is not None]
        with torch.enable_grad():
            leaves = [now[i].detach().requires_grad_() for i in moving]
            state = starts[0].detach().requires_grad_()
            given = list(now)
            for i, leaf in zip(moving, leaves, strict=True):
                given[i] = Contrast.of(leaf, (before[i],), rules)
            with torch._C._EnableTorchFunction():
                outs = body(given, Contrast.of(state, (starts[1],), rules))
            of_start, *pieces = torch.autograd.grad(
                outs, [state, *leaves], (of_scan, of_state), materialize_grads=True, allow_unused=True
            )
        found: list[Any] = [None] * len(now)
        for i, piece in zip(moving, pieces, strict=True):
            found[i] = piece
        return of_start, found

    return flow


def by_hand(rate: Tensor) -> Flow:
    """The flow through a block of Mamba's scan: `channel_scan.py`."""

    def flow(now: Any, before: Any, starts: Any, of_scan: Tensor, of_state: Tensor) -> tuple[Tensor, list[Any]]:
        then = [one if other is None else other for one, other in zip(now, before, strict=True)]
        of_start, found = channel_scan.of_block(now, then, rate, starts, of_scan, of_state)
        return of_start, [*found, *(None for _ in now[4:])]

    return flow


def by_blocks(
    call: Call, run_plain: Body, flow: Flow, sequences: Sequence[Any], initial: Any
) -> tuple[Contrast, Contrast]:
    """(scan, last state) of a recurrence: `run_plain` computes the values of some positions, `flow` takes what they get of what
    comes from behind to what the sequences and the start get."""
    number, size = call.number, initial.numel()
    length = sequences[0].shape[1]
    step = max(SHORTEST, BLOCK // max(size, 1))
    parts = [slice(first, min(first + step, length)) for first in range(0, length, step)]
    each = [_runs(x, number) for x in sequences]
    outs, lasts, starts = [], [], []
    begins = _runs(initial, number)
    with torch.no_grad():
        for run in range(number):
            state, mine, pieces = begins[run].detach(), [], []
            for part in parts:
                mine.append(state)
                piece, state = run_plain([x[run][:, part] for x in each], state)
                pieces.append(piece)
            outs.append(torch.cat(pieces, dim=1))
            lasts.append(state.clone())
            starts.append(mine)
    scans, ends = [outs[0]], [lasts[0]]
    for run in range(1, number):
        before = [
            x[run - 1].detach() if isinstance(s, Contrast) else None for s, x in zip(sequences, each, strict=True)
        ]
        now = [x[run].detach() for x in each]
        held = Blocked(flow, parts, now, before, list(zip(starts[run], starts[run - 1], strict=True)))
        found = Blocks.apply(held, outs[run], lasts[run], begins[run], *(x[run] for x in each))
        scans.append(found[0])
        ends.append(found[1])
    return call.together(scans), call.together(ends)


def of_steps(call: Call) -> tuple[Contrast, Contrast]:
    """scan(terms, sequences, constants, initial)"""
    terms, sequences, constants, initial = _arguments(call)
    if any(isinstance(x, Contrast) for x in constants):
        raise InputError(
            "Secant relevance: the constants of a scan are the same in every run; give what differs by position."
        )
    constants = [x.detach() for x in constants]

    def run_plain(given: Sequence[Any], state: Tensor) -> tuple[Tensor, Tensor]:
        return scan(terms, given, constants, state)

    def body(given: Sequence[Any], state: Tensor) -> tuple[Tensor, Tensor]:
        decay, write, read = terms(*given, *constants)
        states = linear_scan(decay, write, state)
        return readout(states, read), states[:, -1]

    # Fresh documents begin at one place in both runs; on accelerators positions run side by side, which the hand does not.
    plain = terms is vectors and not any(isinstance(x, Contrast) for x in sequences[4:])
    hand = plain and not doubling.pays(initial) and not is_on(initial)
    flow = by_hand(*constants) if hand else by_rules(body, call.rules)
    return by_blocks(call, run_plain, flow, list(sequences), initial)


# -- heads with matrix states -------------------------------------------------------------------------------------------


class Chunks(Function):
    """(scan, last) of one run with the gradient of the rule, chunk by chunk: `chunk_secant.py`."""

    @staticmethod
    def forward(
        ctx: Any, size: int, same: bool, now: Forward, then: Forward, held: tuple[Laid, Laid], start: Tensor, *live: Any
    ) -> Any:
        ctx.sizes, ctx.held, ctx.starts = (size, same), held, (now.starts, then.starts)
        return now.scan.view_as(now.scan), now.last.view_as(now.last)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (size, same), (now, then), (of_out, of_last) = ctx.sizes, ctx.held, grads
        with exact(of_out):
            found = backward(size, same, now, then, ctx.starts, of_out, of_last)
        return None, None, None, None, None, found[-1], *found[:-1]


def of_heads(call: Call) -> tuple[Contrast, Contrast]:
    """chunked(terms, u, initial)"""
    terms, u, initial = _arguments(call)[:3]
    number, size = call.number, min(chunk_size(terms), BY_KEY) if terms.by_key else chunk_size(terms)
    with torch._C._EnableTorchFunction():
        same, (log, key, read, erase, probe) = laid_out(terms)
        share = 1 if key.shape[2] == terms.heads else terms.share
        laid = (log, key, terms.value(u), read, erase, probe)
        start = inside(initial, share)
    each: list[Any] = [(None,) * number if x is None else _runs(x, number) for x in laid]
    starts = _runs(start, number)
    held: list[Any] = [
        tuple(None if x[run] is None else x[run].detach().contiguous() for x in each) for run in range(number)
    ]
    with torch.no_grad(), exact(starts[0]):
        runs = [forward(size, same, laid, start.detach()) for laid, start in zip(held, starts, strict=True)]
    scans, ends = [runs[0].scan], [runs[0].last]
    for run in range(1, number):
        live = [x[run] for x in each]
        found = Chunks.apply(size, same, runs[run], runs[run - 1], (held[run], held[run - 1]), starts[run], *live)
        scans.append(found[0])
        ends.append(found[1])
    with torch._C._EnableTorchFunction():
        last = call.together(ends).unflatten(-1, (share, -1)).permute(0, 1, 3, 4, 2).flatten(1, 2)
    return call.together(scans), last

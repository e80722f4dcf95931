"""The one recurrence that every gated-linear model is made of. It knows no model.

    state_t = decay_t * state_{t-1} + write_t            scan_t = sum over state of read_t * state_t

b batch, l pos, c channel, n state. decay, write, state: [b, l, c, n] (or [b, l, c] with no state axis); read: [b, l, n],
or None where the state itself is read. An architecture gives `terms(*sequences, *constants) -> (decay, write, read)`,
which works on any slice of positions; `scan` then runs it segment by segment without ever holding the states of more
than one segment, forward and backward.

Decays and states are at least float32: `at_least_float32`. For torch.compile the loops over positions are operators
(`gatedlens::linear_scan`, `gatedlens::scan`): one node each in its graph, which would otherwise hold every position.
vmap and grad of torch.func see through `LinearScan`; for forward mode the loop is laid out in torch's own operations.
On accelerators positions run side by side, by doubling (doubling.py), in segments as long as memory allows.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.autograd.function import Function
from torch.overrides import handle_torch_function

from gatedlens.errors import InputError
from gatedlens.recurrence import doubling
from gatedlens.recurrence.autocast import is_on
from gatedlens.recurrence.matrix_vector import times
from gatedlens.recurrence.transforms import forward_mode, gradients, has_old_axis, overridden, transformed

StepTerms = Callable[..., tuple[Tensor, Tensor, Tensor | None]]  # of any slice of positions: decay, write, read
# The gradients of a block's start, and of what is needed of its sequences and constants, from those of its scan and last state.
BlockGradients = Callable[
    [Sequence[Tensor], Sequence[bool], Tensor, Tensor, Tensor], tuple[Tensor, list[Tensor | None]]
]


@dataclass(frozen=True)
class ByHand:
    """`vectors = ByHand(terms, gradients_of)`: terms whose gradient over a block of positions somebody wrote; other terms' are
    found by autograd."""

    terms: StepTerms
    gradients_of: BlockGradients

    def __call__(self, *given: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.terms(*given)


# Numbers in one segment's decay: 1.5 MiB of float32, so that decay and write stay in the cache.
SEGMENT_ELEMENTS = 3 << 17
# The fewest steps that a segment should have. Rows of a large batch are taken in groups that allow it.
SEGMENT_STEPS = 6
# With gradients found by autograd each segment costs some bookkeeping: take longer ones.
SEGMENT_ELEMENTS_GRAD = 1 << 20


def at_least_float32(x: Shaped[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """float64 stays, everything else becomes float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def scan_in_place(decay: Tensor, states: Tensor, state: Tensor | None) -> Tensor:
    """Turn writes into states, in place: states[:, t] <- decay[:, t] * states[:, t-1] + states[:, t]."""
    # A loop over positions, vectorised over batch, channel and state: each step is one fused multiply-add on numbers that are
    # in the cache already. A parallel scan would do more arithmetic, twice as much at the least.
    steps, decays = states.unbind(1), decay.unbind(1)
    for step, a in zip(steps, decays, strict=True):
        if state is not None:
            torch.addcmul(step, a, state, out=step)
        state = step
    return states


def scan_back_in_place(decay: Tensor, grad: Tensor) -> Tensor:
    """Turn the gradients of states into those of writes, in place: grad[:, t] += decay[:, t+1] * grad[:, t+1], from the end."""
    steps, decays = grad.unbind(1), decay.unbind(1)
    for t in range(len(steps) - 2, -1, -1):
        torch.addcmul(steps[t], decays[t + 1], steps[t + 1], out=steps[t])
    return grad


def _every_state(decay: Tensor, write: Tensor, state: Tensor) -> Tensor:
    """Every state, by the way that the device likes. `write` may be overwritten."""
    if not doubling.pays(write):
        return scan_in_place(decay, write, state)
    out = torch.empty_like(write)
    for part in _segments(write.shape[1], write[:, 0].numel(), doubling.ELEMENTS):
        out[:, part] = doubling.doubled(decay[:, part], write[:, part], state)
        state = out[:, part.stop - 1]
    return out


class LinearScan(Function):
    """states = LinearScan.apply(decay, write, initial): every state; differentiable any number of times.

    Its backward is a scan too, from the end: g_t = grad_t + decay_{t+1} * g_{t+1}; then d write_t = g_t and
    d decay_t = g_t * state_{t-1}.
    """

    @staticmethod
    def forward(decay: Tensor, write: Tensor, initial: Tensor) -> Tensor:
        if has_old_axis(decay, write, initial):
            # Autograd's own vmap runs an operator once for each of the inputs that it has batched.
            return _linear_scan(decay, write, initial)
        return _every_state(decay, write.clone(), initial)  # in the layout of write

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        decay, _, initial = inputs
        ctx.save_for_backward(decay, initial, output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        decay, initial, states = ctx.saved_tensors
        if torch.is_grad_enabled() or transformed() or has_old_axis(*grads):
            return _scan_backward(linear_scan, decay, initial, states, grads[0])
        return _scan_backward_here(decay, initial, states, grads[0].clone())

    @staticmethod
    def vmap(info: Any, in_dims: Any, decay: Tensor, write: Tensor, initial: Tensor) -> tuple[Tensor, int]:
        """The hidden axis stands behind pos, where the loop over positions does not notice it."""

        def behind(x: Tensor, dim: int | None, place: int) -> Tensor:
            if dim is None:
                return x.unsqueeze(place).expand(*x.shape[:place], info.batch_size, *x.shape[place:])
            return x.movedim(dim, place)

        given = zip((decay, write, initial), in_dims, (2, 2, 1), strict=True)
        return LinearScan.apply(*(behind(*one) for one in given)), 2


def linear_scan(
    decay: Float[Tensor, "#batch #pos *#rest"],
    write: Float[Tensor, "#batch #pos *#rest"],
    initial: Float[Tensor, "#batch ..."] | None = None,
) -> Float[Tensor, "batch pos *rest"]:
    """state_t = decay_t * state_{t-1} + write_t, all states, from `initial` (zero when None); shapes may broadcast."""
    if overridden(decay, write, initial):
        return handle_torch_function(linear_scan, (decay, write, initial), decay, write, initial)
    if initial is None:
        initial = torch.zeros_like(write[:, 0])
    if not decay.shape == write.shape == (len(initial), write.shape[1], *initial.shape[1:]):
        decay, write, initial = _broadcast(decay, write, initial)
    if torch.compiler.is_compiling():
        return _linear_scan(decay, write, initial)
    if forward_mode():
        return (doubling.doubled if doubling.pays(write) else _unrolled)(decay, write, initial)
    return LinearScan.apply(decay, write, initial)


def _unrolled(decay: Tensor, write: Tensor, state: Tensor) -> Tensor:
    """The recurrence as it stands above, an operation a position: slow, and right under any derivative."""
    states = []
    for a, w in zip(decay.unbind(1), write.unbind(1), strict=True):
        state = torch.addcmul(w, a, state)
        states.append(state)
    return torch.stack(states, dim=1)


def _broadcast(decay: Tensor, write: Tensor, initial: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All three in the shape that they broadcast to, so that each gets a gradient of its own shape."""
    try:
        decay, write, start = torch.broadcast_tensors(decay, write, initial.unsqueeze(1))
    except RuntimeError as error:
        shapes = ", ".join(str(list(x.shape)) for x in (decay, write, initial))
        raise InputError(
            f"linear_scan takes decay and write [batch, pos, ...] and initial [batch, ...]; {shapes} do not fit together."
        ) from error
    return decay, write, start[:, 0]


@torch.library.custom_op(
    "gatedlens::linear_scan", mutates_args=(), schema="(Tensor decay, Tensor write, Tensor initial) -> Tensor"
)
def _linear_scan(decay: Tensor, write: Tensor, initial: Tensor) -> Tensor:
    return _every_state(decay, write.clone(), initial)


@_linear_scan.register_fake
def _(decay: Tensor, write: Tensor, initial: Tensor) -> Tensor:
    return torch.empty_like(write)


def _linear_scan_setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    decay, _, initial = inputs
    ctx.save_for_backward(decay, initial, output)


def _linear_scan_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    decay, initial, states = ctx.saved_tensors
    return _scan_backward(_linear_scan, decay, initial, states, grad)


_linear_scan.register_autograd(_linear_scan_backward, setup_context=_linear_scan_setup)


def _scan_backward(run: Any, decay: Tensor, initial: Tensor, states: Tensor, grad: Tensor) -> Any:
    """g_t = grad_t + decay_{t+1} g_{t+1}, run from the end; the gradients of decay, write and initial."""
    # From the end, position t meets the decay of t + 1; behind the last position there is none, and 1 times 0 is 0.
    ahead = torch.cat([decay[:, 1:], torch.ones_like(decay[:, :1])], dim=1)
    g = run(ahead.flip(1), grad.flip(1), torch.zeros_like(initial)).flip(1)
    before = torch.cat([initial.unsqueeze(1), states[:, :-1]], dim=1)
    return g * before, g, decay[:, 0] * g[:, 0]


def _scan_backward_here(decay: Tensor, initial: Tensor, states: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same where nobody differentiates it again, in the place of `grad`: a loop from the end, and no copy turned round."""
    if doubling.pays(decay):
        return _scan_backward(linear_scan, decay, initial, states, grad)
    scan_back_in_place(decay, grad)
    along = torch.empty_like(grad)
    torch.mul(grad[:, 1:], states[:, :-1], out=along[:, 1:])
    torch.mul(grad[:, 0], initial, out=along[:, 0])
    return along, grad, decay[:, 0] * grad[:, 0]


def readout(states: Float[Tensor, ...], read: Float[Tensor, "... state"] | None) -> Float[Tensor, ...]:
    """scan_t[c] = sum_n read_t[n] * state_t[c, n]; the state itself when `read` is None.

    A read of as many axes as the states is one of each channel: sum_n read_t[c, n] * state_t[c, n].
    """
    if read is None:
        return states
    apart = read.ndim == states.ndim
    if apart or is_on(states):  # autocast leaves products and sums as they are, in backward too
        return (states * (read if apart else read.unsqueeze(-2)).to(states.dtype)).sum(-1)
    return times(states, read.to(states.dtype))


def _readout_backward(states: Tensor, read: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradients of states (in memory of their own, laid out as the states are) and of `read`."""
    if read is None:
        return grad.clone(), None
    if read.ndim == states.ndim:
        return grad.unsqueeze(-1) * read.to(states.dtype), (grad.unsqueeze(-1) * states).to(read.dtype)
    of_states = (grad.unsqueeze(-2) * read.to(states.dtype).unsqueeze(-1)).mT
    if is_on(states):
        return of_states, (grad.unsqueeze(-1) * states).sum(-2).to(read.dtype)
    return of_states, times(states.mT, grad).to(read.dtype)


def _whole_scan(
    terms: StepTerms, sequences: Sequence[Tensor], constants: Sequence[Tensor], initial: Tensor
) -> tuple[Tensor, Tensor]:
    decay, write, read = terms(*sequences, *constants)
    states = linear_scan(decay, write, initial)
    return readout(states, read), states[:, -1]


def budget(like: Tensor, cache: int) -> int:
    """How many numbers a segment's decay may have on the device of `like`; `cache`: on a processor."""
    return doubling.ELEMENTS if doubling.pays(like) else cache


def _segments(length: int, per_step: int, budget: int) -> list[slice]:
    # At least 4 positions, however large a step is: below that the cost is that of starting segments.
    size = max(4, min(length, budget // max(per_step, 1)))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


class SegmentedScan(Function):
    """scan, last = SegmentedScan.apply(terms, n, initial, *sequences[:n], *constants).

    Forward keeps the state at each segment's start; backward rebuilds one segment at a time from there. Memory is one
    segment plus [segments, b, c, n].
    """

    @staticmethod
    def forward(ctx: Any, terms: StepTerms, n: int, initial: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        sequences, constants = tensors[:n], tensors[n:]
        slices = _segments(sequences[0].shape[1], initial.numel(), budget(initial, _cache(terms)))
        scans, starts, state = [], [], initial
        for part in slices:
            starts.append(state)
            decay, write, read = terms(*(s[:, part] for s in sequences), *constants)
            states = _every_state(decay, write, state)
            scans.append(states if read is None else readout(states, read))
            state = states[:, -1].clone()  # a view would keep the whole segment alive
        ctx.terms, ctx.n, ctx.slices = terms, n, slices
        ctx.save_for_backward(*tensors, *starts)
        return scans[0] if len(scans) == 1 else torch.cat(scans, dim=1), state

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        saved = ctx.saved_tensors  # once: torch.utils.checkpoint recomputes them for one reader
        tensors, starts = saved[: -len(ctx.slices)], saved[-len(ctx.slices) :]
        if torch.is_grad_enabled() or transformed() or has_old_axis(*grads):
            # The loop below detaches each segment, so no second derivative passes it, and writes into buffers, which lack an
            # axis that a transform or a batch of gradients hides. These go through the whole sequence in one segment.

            def run(initial: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
                return _whole_scan(ctx.terms, tensors[: ctx.n], tensors[ctx.n :], initial)

            return None, None, *gradients(run, (starts[0], *tensors), grads)
        grad_scan, grad_state = grads
        needed = ctx.needs_input_grad[3:]
        terms = ctx.terms
        by_hand = isinstance(terms, ByHand) and not doubling.pays(grad_state) and not is_on(grad_state)
        gradients_of = terms.gradients_of if by_hand else partial(_gradients_of, terms)
        # Each segment writes its part of one tensor, so that no second copy of a whole sequence is ever there.
        given: list[Any] = [
            (torch.empty_like if i < ctx.n else torch.zeros_like)(t) if need else None
            for i, (t, need) in enumerate(zip(tensors, needed, strict=True))
        ]
        for part, start in zip(reversed(ctx.slices), reversed(starts), strict=True):
            # The segment is computed again from its start: its states are needed now, and were not kept.
            here = [t[:, part] if i < ctx.n else t for i, t in enumerate(tensors)]
            grad_state, found = gradients_of(here, needed, start, grad_scan[:, part], grad_state)
            for i, piece in enumerate(found):
                if piece is None:
                    continue
                if i < ctx.n:
                    given[i][:, part] = piece
                else:
                    given[i] += piece
        return None, None, grad_state, *given


def _gradients_of(
    terms: StepTerms,
    given: Sequence[Tensor],
    needed: Sequence[bool],
    start: Tensor,
    of_scan: Tensor,
    of_state: Tensor,
) -> tuple[Tensor, list[Tensor | None]]:
    """The gradients of a block's start, and of what is needed of its sequences and constants, whatever its terms are."""
    with torch.enable_grad():
        live = [t.detach().requires_grad_(need) for t, need in zip(given, needed, strict=True)]
        decay, write, read = terms(*live)
    states = _every_state(decay.detach(), write.detach(), start)
    grad, of_read = _readout_backward(states, read, of_scan)
    grad[:, -1] += of_state
    of_decay, of_write, of_start = _scan_backward_here(decay.detach(), start, states, grad)
    ways = [(decay, of_decay), (write, of_write), (read, of_read)]
    wanted = [t for t in live if t.requires_grad]
    if not wanted:  # the start alone has a gradient
        return of_start, [None for _ in live]
    outs, flows = zip(*((out, flow) for out, flow in ways if out is not None and out.requires_grad), strict=True)
    found = iter(torch.autograd.grad(outs, wanted, flows, materialize_grads=True))
    return of_start, [next(found) if need else None for need in needed]


def scan(
    terms: StepTerms,
    sequences: Sequence[Shaped[Tensor, "batch pos ..."]],
    constants: Sequence[Shaped[Tensor, ...]],
    initial: Float[Tensor, "batch ..."],
) -> tuple[Float[Tensor, "batch pos ..."], Float[Tensor, "batch ..."]]:
    """`y, last = scan(terms, (dt, B, C, u), (A,), state)`: the readout at every position and the last state.

    sequences: [b, l, ...] tensors that `terms` slices along pos; constants: the rest of its arguments. Every state is
    exact, none is kept: memory is O(b c n) beyond inputs and output without gradients.
    """
    tensors = (initial, *sequences, *constants)
    if overridden(*tensors):
        return handle_torch_function(scan, tensors, terms, sequences, constants, initial)
    if torch.compiler.is_compiling():
        return _compiled(terms, sequences, constants, initial)
    if transformed():
        return _whole_scan(terms, sequences, constants, initial)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _with_gradients(terms, sequences, constants, initial)
    return _segmented(terms, sequences, constants, initial)


def _with_gradients(
    terms: StepTerms, sequences: Sequence[Tensor], constants: Sequence[Tensor], initial: Tensor
) -> tuple[Tensor, Tensor]:
    """A large batch in groups of rows: each segment's state is kept, and segments of few positions would be many."""
    rows = _rows(initial, _cache(terms))
    if rows >= len(initial):
        return SegmentedScan.apply(terms, len(sequences), initial, *sequences, *constants)
    split = zip(*(one.split(rows) for one in (initial, *sequences)), strict=True)
    parts = [SegmentedScan.apply(terms, len(sequences), start, *some, *constants) for start, *some in split]
    return torch.cat([out for out, _ in parts]), torch.cat([last for _, last in parts])


def _cache(terms: StepTerms) -> int:
    """How many numbers a segment's decay has on a processor where gradients are wanted."""
    return SEGMENT_ELEMENTS if isinstance(terms, ByHand) else SEGMENT_ELEMENTS_GRAD


def _rows(initial: Tensor, cache: int) -> int:
    """How many rows to take together, so that a segment has SEGMENT_STEPS at least."""
    return max(1, budget(initial, cache) // (SEGMENT_STEPS * max(initial[0].numel(), 1)))


def _segmented(
    terms: StepTerms, sequences: Sequence[Tensor], constants: Sequence[Tensor], initial: Tensor
) -> tuple[Tensor, Tensor]:
    """Without gradients: one segment's states at a time, of so many rows that they stay in the cache."""
    # A large batch in groups: a segment of all rows would be a position or two long, and leave the cache at each.
    out, lasts, rows = None, [], _rows(initial, SEGMENT_ELEMENTS)
    length = sequences[0].shape[1]
    for some in (slice(first, first + rows) for first in range(0, max(len(initial), 1), rows)):
        state = initial[some]
        for part in _segments(length, state.numel(), budget(initial, SEGMENT_ELEMENTS)):
            decay, write, read = terms(*(s[some, part] for s in sequences), *constants)
            states = _every_state(decay, write, state)
            y = readout(states, read)
            if out is None:  # only now its dtype and last axes are known: they are those of `terms`
                out = y.new_empty(len(initial), length, *y.shape[2:])
            out[some, part] = y
            state = states[:, -1].clone()
        lasts.append(state)
    assert out is not None
    return out, lasts[0] if len(lasts) == 1 else torch.cat(lasts)


def _compiled(
    terms: StepTerms, sequences: Sequence[Tensor], constants: Sequence[Tensor], initial: Tensor
) -> tuple[Tensor, Tensor]:
    """What torch.compile sees: one operator without gradients; with them decay and write whole, around another."""
    tensors = (initial, *sequences, *constants)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        out, last = _whole_scan(terms, sequences, constants, initial)
        return out, last.clone()
    # An operator takes tensors, numbers and text, but no function: `terms` goes by name.
    named = terms.terms if isinstance(terms, ByHand) else terms
    return _scan(f"{named.__module__}:{named.__name__}", initial, list(sequences), list(constants))


@torch.library.custom_op(
    "gatedlens::scan",
    mutates_args=(),
    schema="(str terms, Tensor initial, Tensor[] sequences, Tensor[] constants) -> (Tensor, Tensor)",
)
def _scan(terms: str, initial: Tensor, sequences: list[Tensor], constants: list[Tensor]) -> tuple[Tensor, Tensor]:
    out, last = _segmented(pkgutil.resolve_name(terms), sequences, constants, initial)
    return out, last.clone()


@_scan.register_fake
def _(terms: str, initial: Tensor, sequences: list[Tensor], constants: list[Tensor]) -> tuple[Tensor, Tensor]:
    # One position is enough to know the shape and dtype of a readout.
    _, write, read = pkgutil.resolve_name(terms)(*(s[:, :1] for s in sequences), *constants)
    step = readout(write, read)
    return step.new_empty(step.shape[0], sequences[0].shape[1], *step.shape[2:]), torch.empty_like(initial)

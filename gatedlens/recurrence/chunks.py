"""The recurrence of heads with matrix states, chunk by chunk: forward, and a backward of its own.

    scan, last = chunked(terms, u, state)          # what `literal_scan` gives, in matrix products

Forward keeps the state before each chunk; backward goes through the chunks from the end and makes each anew. Nothing of size
[pos, head, value, key] is ever there. One chunk is chunk.py. Chunks are taken side by side, as many as a bound of memory
allows: all of them on an accelerator, where starting an operator costs more than its numbers do, and on a processor where
heads are small; one at a time where its numbers fill the processor's cache. Only the states between chunks are a loop then.

b batch, l pos, h head, g group, r heads of a group, v value, k key; states are [b, g, k, (r v)] in here, so that one product
serves all heads of a group, and [b, h, v, k] outside.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import Function
from torch.overrides import handle_torch_function

from gatedlens.recurrence import doubling
from gatedlens.recurrence.autocast import exact
from gatedlens.recurrence.chunk import GONE, Given, chunk_of
from gatedlens.recurrence.terms import Terms
from gatedlens.recurrence.transforms import forward_mode, gradients, has_old_axis, overridden, transformed

CHUNK = 64  # positions; their square is what a chunk costs beside its states
WIDE_CHUNK = 32  # for a delta rule with wide keys, whose triangular solve grows with the square of the chunk
WIDE = 96  # keys
SIDE_BY_SIDE = 1 << 18  # numbers of the largest tensor of chunks side by side on a processor: 1 MiB of float32
DELTA_SIDE_BY_SIDE = 1 << 15  # of a delta rule, whose chunks side by side cost a product of keys more each
FEW = 4  # so few chunks of a delta rule side by side are slower than one at a time


def chunk_size(terms: Terms) -> int:
    """How many positions a chunk has best."""
    return WIDE_CHUNK if terms.has_delta_rule and terms.key.shape[-1] >= WIDE else CHUNK


def chunks_at_once(terms: Terms, u: Float[Tensor, "batch pos head value"], chunk: int) -> int:
    """How many chunks are taken side by side best, by the device and the shape alone."""
    keys, values, width = terms.key.shape[-1], u.shape[-1], u.shape[0] * u.shape[2]
    largest = width * max(chunk * max(chunk, values, keys), keys * values)
    if doubling.pays(u):
        return max(1, doubling.ELEMENTS // max(largest, 1))
    number = (DELTA_SIDE_BY_SIDE if terms.has_delta_rule else SIDE_BY_SIDE) // max(largest, 1)
    return 1 if terms.has_delta_rule and number < FEW else max(1, number)


def chunked(
    terms: Terms,
    u: Float[Tensor, "batch pos head value"],
    initial: Float[Tensor, "batch head value key"],
    chunk: int | None = None,
    at_once: int | None = None,
) -> tuple[Float[Tensor, "batch pos head value"], Float[Tensor, "batch head value key"]]:
    """`scan, last = chunked(terms, u, state)`: the readout at every position and the last state.

    chunk: positions of a chunk; at_once: chunks side by side. None: what is best for the device and the shape.
    """
    if overridden(u, initial, *terms):
        return handle_torch_function(chunked, (u, initial, *terms), terms, u, initial)
    size = chunk_size(terms) if chunk is None else chunk
    number = chunks_at_once(terms, u, size) if at_once is None else at_once
    same, (log, key, read, erase, probe) = laid_out(terms)
    share = 1 if key.shape[2] == terms.heads else terms.share
    tensors = (log, key, terms.value(u), read, erase, probe, inside(initial, share))
    if torch.compiler.is_compiling():
        out, last, _ = _chunked(size, number, same, *tensors)
    else:
        with exact(u):
            if forward_mode():
                out, last = _plain(size, same, *tensors)
            elif transformed() or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
                out, last, _ = Chunked.apply(size, number, same, *tensors)
            else:
                out, last, _ = _forward(size, number, same, *tensors, keep=False)
    return out, last.unflatten(-1, (share, -1)).permute(0, 1, 3, 4, 2).flatten(1, 2)


def inside(state: Float[Tensor, "batch head value key"], share: int) -> Float[Tensor, "batch group key values"]:
    """A state as chunks take it: the heads of a group side by side, in memory of its own."""
    return state.unflatten(1, (-1, share)).permute(0, 1, 4, 2, 3).flatten(-2).contiguous()


def laid_out(terms: Terms) -> tuple[bool, tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]]:
    """Whether erase is the key itself, and (log decay, key, read, erase, probe) as chunks take them."""
    same = terms.erase is terms.key
    terms = terms.even()
    log, key, read = terms.log_decays(), terms.key, terms.read
    # Decays in the keys, and the system of a delta rule, are each head's own.
    if terms.has_delta_rule or log.shape[-1] > 1:
        key, read = terms.of_heads(key), terms.of_heads(read)
    return same, (log, key, read, None if same else terms.erase, terms.probes())


def cut(same: bool, part: slice, *terms: Tensor | None, number: int = 1) -> Given:
    """The terms of some positions, positions behind groups: `number` chunks side by side, in the axis of the batch."""
    log, key, value = terms[:3]
    assert log is not None and key is not None and value is not None
    groups = key.shape[2]
    if log.shape[-1] == 1:
        log = log.unflatten(2, (groups, -1)).squeeze(-1)
    together = value.unflatten(2, (groups, -1)).flatten(3)
    log, key, together, read, erase, probe = (
        None if x is None else _apart(x[:, part], number) for x in (log, key, together, *terms[3:])
    )
    assert log is not None and key is not None and together is not None and read is not None
    return Given(log, key, together, read, key if same else erase, probe, value.shape[2] // groups)


def _apart(x: Float[Tensor, "batch pos group *rest"], number: int) -> Float[Tensor, "chunks group some *rest"]:
    return (x if number == 1 else x.unflatten(1, (number, -1)).flatten(0, 1)).transpose(1, 2)


def _laid_back(x: Float[Tensor, "chunks group some _"], number: int, like: Tensor) -> Float[Tensor, "batch pos head _"]:
    """What chunks give, in the order and the shape of what `cut` took them from, `like`."""
    x = x.transpose(1, 2)
    return (x if number == 1 else x.unflatten(0, (-1, number)).flatten(1, 2)).reshape(like.shape)


def parts_of(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _spans(length: int, size: int, number: int) -> list[tuple[slice, int]]:
    """Positions of at most `number` whole chunks, and how many these are; a last chunk that is not whole stands alone."""
    whole = length // size
    spans = [(first, min(first + number, whole)) for first in range(0, whole, number)]
    found = [(slice(first * size, last * size), last - first) for first, last in spans]
    return [*found, (slice(whole * size, length), 1)] if length % size else found


def _plain(
    size: int, same: bool, log: Tensor, key: Tensor, value: Tensor, read: Tensor, erase: Any, probe: Any, state: Tensor
) -> tuple[Tensor, Tensor]:
    """In torch's own operations: differentiable any number of times, either way, under any transform."""
    outs = []
    for part, number in _spans(value.shape[1], size, value.shape[1]):
        chunk = chunk_of(cut(same, part, log, key, value, read, erase, probe, number=number))
        out, state, _ = chunk.side_by_side(number, state)
        outs.append(_laid_back(out, number, value[:, part]))
    return torch.cat(outs, dim=1), state


def _forward(
    size: int,
    number: int,
    same: bool,
    log: Tensor,
    key: Tensor,
    value: Tensor,
    read: Tensor,
    erase: Tensor | None,
    probe: Tensor | None,
    initial: Tensor,
    keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """(scan, last state, the state before each chunk)."""
    out = value.new_empty(value.shape)
    starts = initial.new_empty(-(-value.shape[1] // size) if keep else 0, *initial.shape)
    together = out.unflatten(2, (key.shape[2], -1)).flatten(3)  # a view
    state = initial.clone()
    for part, several in _spans(value.shape[1], size, number):
        chunk = chunk_of(cut(same, part, log, key, value, read, erase, probe, number=several))
        first = part.start // size
        if several == 1:
            if keep:
                starts[first] = state
            chunk.step_(state, together[:, part].transpose(1, 2))
            continue
        piece, state, before = chunk.side_by_side(several, state)
        if keep:
            starts[first : first + several] = before
        out[:, part] = _laid_back(piece, several, value[:, part])
    return out, state, starts


def _backward(
    size: int,
    number: int,
    same: bool,
    terms: tuple[Tensor | None, ...],
    starts: Tensor,
    of_out: Tensor,
    of_last: Tensor,
) -> list[Tensor | None]:
    """The gradients of the seven tensors: of each chunk from the last to the first."""
    found: list[Tensor | None] = [None if x is None else x.new_empty(x.shape) for x in terms]
    ahead = of_last.contiguous()
    of_out = of_out.contiguous().unflatten(2, (starts.shape[2], -1)).flatten(3)
    for part, several in reversed(_spans(of_out.shape[1], size, number)):
        given, out = cut(same, part, *terms, number=several), _apart(of_out[:, part], several)
        chunk, first = chunk_of(given, []), part.start // size
        if several == 1:
            grads = chunk.back(starts[first], out, ahead)
            ahead = grads.state
        else:
            behind, ahead = chunk.aheads(several, out, ahead)
            grads = chunk.back(starts[first : first + several].transpose(0, 1).flatten(0, 1), out, behind)
        # What is forgotten altogether stays so: exp is flat there, as far as numbers can tell.
        of_log = grads.log_decay * (given.log_decay > GONE)
        for whole, piece in zip(found, (of_log, *grads[1:6]), strict=True):
            if whole is not None and piece is not None:
                whole[:, part] = _laid_back(piece, several, whole[:, part])
    return [*found, ahead]


class Chunked(Function):
    """scan, last, starts = Chunked.apply(size, number, same, log, key, value, read, erase, probe, initial)."""

    @staticmethod
    def forward(size: int, number: int, same: bool, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
        if has_old_axis(*(t for t in tensors if t is not None)):
            return _chunked(size, number, same, *tensors)  # autograd's own vmap runs an operator once for each input
        return _forward(size, number, same, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.sizes = inputs[:3]
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)  # those of the starts would be zeros as large as they are
        ctx.save_for_backward(*inputs[3:], output[2])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        *tensors, starts = ctx.saved_tensors  # once: torch.utils.checkpoint recomputes them for one reader
        of_out = torch.zeros_like(tensors[2]) if grads[0] is None else grads[0]
        of_last = torch.zeros_like(tensors[6]) if grads[1] is None else grads[1]
        size, number, same = ctx.sizes
        with exact(of_out):
            if torch.is_grad_enabled() or transformed() or has_old_axis(of_out, of_last):
                return None, None, None, *_again(size, same, tuple(tensors), (of_out, of_last))
            return None, None, None, *_backward(size, number, same, tuple(tensors[:6]), starts, of_out, of_last)

    @staticmethod
    def vmap(info: Any, in_dims: Any, size: int, number: int, same: bool, *tensors: Any) -> Any:
        """The hidden axis joins the batch."""
        n = info.batch_size

        def joined(x: Tensor | None, dim: int | None) -> Tensor | None:
            if x is None:
                return None
            x = x.unsqueeze(0).expand(n, *x.shape) if dim is None else x.movedim(dim, 0)
            return x.flatten(0, 1)

        out, last, starts = Chunked.apply(size, number, same, *map(joined, tensors, in_dims[3:]))
        return (out.unflatten(0, (n, -1)), last.unflatten(0, (n, -1)), starts.unflatten(1, (n, -1))), (0, 0, 1)


def _again(size: int, same: bool, tensors: tuple[Tensor | None, ...], grads: tuple[Tensor, ...]) -> list[Tensor | None]:
    """The gradients by torch's own operations, so that they can be differentiated again."""
    there = [number for number, t in enumerate(tensors) if t is not None]

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        full: list[Any] = [None] * len(tensors)
        for number, tensor in zip(there, given, strict=True):
            full[number] = tensor
        return _plain(size, same, *full)

    found: list[Tensor | None] = [None] * len(tensors)
    given = tuple(t for t in tensors if t is not None)
    for number, grad in zip(there, gradients(run, given, grads), strict=True):
        found[number] = grad
    return found


# -- for torch.compile: one node of its graph, whatever the length -----------------------------------------------------


SCHEMA = (
    "(int size, int number, bool same, Tensor log, Tensor key, Tensor value, Tensor read, Tensor? erase, Tensor? probe, "
    "Tensor initial) -> (Tensor, Tensor, Tensor)"
)
BACK = (
    "(int size, int number, bool same, Tensor log, Tensor key, Tensor value, Tensor read, Tensor? erase, Tensor? probe, "
    "Tensor starts, Tensor of_out, Tensor of_last) -> Tensor[]"
)


@torch.library.custom_op("gatedlens::chunked_scan", mutates_args=(), schema=SCHEMA)
def _chunked(size: int, number: int, same: bool, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(size, number, same, *tensors)


@_chunked.register_fake
def _(size: int, number: int, same: bool, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
    value, initial = tensors[2], tensors[6]
    chunks = (value.shape[1] + size - 1) // size
    return value.new_empty(value.shape), torch.empty_like(initial), initial.new_empty(chunks, *initial.shape)


@torch.library.custom_op("gatedlens::chunked_scan_backward", mutates_args=(), schema=BACK)
def _chunked_backward(size: int, number: int, same: bool, *tensors: Any) -> list[Tensor]:
    return [x for x in _backward(size, number, same, tensors[:6], *tensors[6:]) if x is not None]


@_chunked_backward.register_fake
def _(size: int, number: int, same: bool, *tensors: Any) -> list[Tensor]:
    starts = tensors[6]
    return [*(x.new_empty(x.shape) for x in tensors[:6] if x is not None), torch.empty_like(starts[0])]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.sizes = inputs[:3]
    ctx.save_for_backward(*inputs[3:], output[2])


def _chunked_grad(ctx: Any, of_out: Tensor, of_last: Tensor, _: Any) -> Any:
    *tensors, starts = ctx.saved_tensors
    found = iter(_chunked_backward(*ctx.sizes, *tensors[:6], starts, of_out.contiguous(), of_last.contiguous()))
    return None, None, None, *(None if x is None else next(found) for x in tensors)


_chunked.register_autograd(_chunked_grad, setup_context=_setup)

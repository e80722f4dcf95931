"""The recurrence of heads with matrix states, chunk by chunk: forward, and a backward of its own.

    scan, last = chunked(terms, u, state)          # what `literal_scan` gives, in matrix products

Forward keeps the state before each chunk; backward goes through the chunks from the end and makes each anew. Nothing of size
[pos, head, value, key] is ever there. One chunk is chunk.py. b batch, l pos, h head, v value, k key; states are [b, h, k, v] in
here, so that rows and sources are multiplied from the left, and [b, h, v, k] outside.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import Function

from gatedlens.recurrence.chunk import GONE, Given, chunk_of
from gatedlens.recurrence.terms import Terms
from gatedlens.recurrence.transforms import forward_mode, gradients, has_old_axis, transformed

CHUNK = 64  # positions; their square is what a chunk costs beside its states
WIDE_CHUNK = 32  # for a delta rule with wide keys, whose triangular solve grows with the square of the chunk
WIDE = 96  # keys


def chunk_size(terms: Terms) -> int:
    """How many positions a chunk has best."""
    return WIDE_CHUNK if terms.has_delta_rule and terms.key.shape[-1] >= WIDE else CHUNK


def chunked(
    terms: Terms,
    u: Float[Tensor, "batch pos head value"],
    initial: Float[Tensor, "batch head value key"],
    chunk: int | None = None,
) -> tuple[Float[Tensor, "batch pos head value"], Float[Tensor, "batch head value key"]]:
    """`scan, last = chunked(terms, u, state)`: the readout at every position and the last state."""
    size = chunk_size(terms) if chunk is None else chunk
    same = terms.erase is terms.key
    log, key, read = terms.log_decays(), terms.key, terms.read
    if (
        terms.has_delta_rule or log.shape[-1] > 1
    ):  # decays in the keys, and the system of a delta rule, are each head's own
        key, read = terms.of_heads(key), terms.of_heads(read)
    erase = None if same else terms.erase
    tensors = (log, key, terms.value(u), read, erase, terms.probes(), initial.mT)
    if torch.compiler.is_compiling():
        out, last, _ = _chunked(size, same, *tensors)
    elif forward_mode():
        out, last = _plain(size, same, *tensors)
    elif transformed() or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        out, last, _ = Chunked.apply(size, same, *tensors)
    else:
        out, last, _ = _forward(size, same, *tensors, keep=False)
    return out, last.mT


def laid_out(terms: Terms) -> tuple[bool, tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]]:
    """Whether erase is the key itself, and (log decay, key, read, erase, probe) as chunks take them."""
    same = terms.erase is terms.key
    log, key, read = terms.log_decays(), terms.key, terms.read
    if (
        terms.has_delta_rule or log.shape[-1] > 1
    ):  # decays in the keys, and the system of a delta rule, are each head's own
        key, read = terms.of_heads(key), terms.of_heads(read)
    return same, (log, key, read, None if same else terms.erase, terms.probes())


def cut(same: bool, part: slice, *terms: Tensor | None) -> Given:
    """The terms of some positions, positions behind heads."""
    log, key, value, read, erase, probe = (None if x is None else x[:, part].transpose(1, 2) for x in terms)
    assert log is not None and key is not None and value is not None and read is not None
    return Given(log, key, value, read, key if same else erase, probe)


def parts_of(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _plain(
    size: int, same: bool, log: Tensor, key: Tensor, value: Tensor, read: Tensor, erase: Any, probe: Any, state: Tensor
) -> tuple[Tensor, Tensor]:
    """In torch's own operations: differentiable any number of times, either way, under any transform."""
    outs = []
    for part in parts_of(value.shape[1], size):
        out, state = chunk_of(cut(same, part, log, key, value, read, erase, probe)).step(state)
        outs.append(out.transpose(1, 2))
    return torch.cat(outs, dim=1), state


def _forward(
    size: int,
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
    parts = parts_of(value.shape[1], size)
    out = torch.empty_like(value)
    starts = initial.new_empty(len(parts) if keep else 0, *initial.shape)
    state = initial
    for number, part in enumerate(parts):
        if keep:
            starts[number] = state
        piece, state = chunk_of(cut(same, part, log, key, value, read, erase, probe)).step(state)
        out[:, part] = piece.transpose(1, 2)
    return out, state.clone() if state is initial else state, starts


def _backward(
    size: int, same: bool, terms: tuple[Tensor | None, ...], starts: Tensor, of_out: Tensor, of_last: Tensor
) -> list[Tensor | None]:
    """The gradients of the seven tensors: of each chunk from the last to the first."""
    found: list[Tensor | None] = [None if x is None else torch.empty_like(x) for x in terms]
    parts = parts_of(of_out.shape[1], size)
    ahead = of_last
    for number in reversed(range(len(parts))):
        part = parts[number]
        given = cut(same, part, *terms)
        grads = chunk_of(given, []).back(starts[number], of_out[:, part].transpose(1, 2), ahead)
        # What is forgotten altogether stays so: exp is flat there, as far as numbers can tell.
        of_log = grads.log_decay * (given.log_decay > GONE)
        for whole, piece in zip(found, (of_log, *grads[1:6]), strict=True):
            if whole is not None and piece is not None:
                whole[:, part] = piece.transpose(1, 2)
        ahead = grads.state
    return [*found, ahead]


class Chunked(Function):
    """scan, last, starts = Chunked.apply(size, same, log, key, value, read, erase, probe, initial)."""

    @staticmethod
    def forward(size: int, same: bool, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
        if has_old_axis(*(t for t in tensors if t is not None)):
            return _chunked(size, same, *tensors)  # autograd's own vmap runs an operator once for each input
        return _forward(size, same, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.size, ctx.same = inputs[:2]
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*inputs[2:], output[2])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        *tensors, starts = ctx.saved_tensors  # once: torch.utils.checkpoint recomputes them for one reader
        if torch.is_grad_enabled() or transformed() or has_old_axis(*grads[:2]):
            return None, None, *_again(ctx.size, ctx.same, tuple(tensors), grads[:2])
        of_out, of_last = grads[:2]
        return None, None, *_backward(ctx.size, ctx.same, tuple(tensors[:6]), starts, of_out, of_last)

    @staticmethod
    def vmap(info: Any, in_dims: Any, size: int, same: bool, *tensors: Any) -> Any:
        """The hidden axis joins the batch."""
        n = info.batch_size

        def joined(x: Tensor | None, dim: int | None) -> Tensor | None:
            if x is None:
                return None
            x = x.unsqueeze(0).expand(n, *x.shape) if dim is None else x.movedim(dim, 0)
            return x.flatten(0, 1)

        out, last, starts = Chunked.apply(size, same, *map(joined, tensors, in_dims[2:]))
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
    "(int size, bool same, Tensor log, Tensor key, Tensor value, Tensor read, Tensor? erase, Tensor? probe, "
    "Tensor initial) -> (Tensor, Tensor, Tensor)"
)
BACK = (
    "(int size, bool same, Tensor log, Tensor key, Tensor value, Tensor read, Tensor? erase, Tensor? probe, "
    "Tensor starts, Tensor of_out, Tensor of_last) -> Tensor[]"
)


@torch.library.custom_op("gatedlens::chunked_scan", mutates_args=(), schema=SCHEMA)
def _chunked(size: int, same: bool, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(size, same, *tensors)


@_chunked.register_fake
def _(size: int, same: bool, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
    value, initial = tensors[2], tensors[6]
    chunks = (value.shape[1] + size - 1) // size
    return torch.empty_like(value), torch.empty_like(initial), initial.new_empty(chunks, *initial.shape)


@torch.library.custom_op("gatedlens::chunked_scan_backward", mutates_args=(), schema=BACK)
def _chunked_backward(size: int, same: bool, *tensors: Any) -> list[Tensor]:
    return [x for x in _backward(size, same, tensors[:6], *tensors[6:]) if x is not None]


@_chunked_backward.register_fake
def _(size: int, same: bool, *tensors: Any) -> list[Tensor]:
    starts = tensors[6]
    return [*(torch.empty_like(x) for x in tensors[:6] if x is not None), torch.empty_like(starts[0])]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.size, ctx.same = inputs[:2]
    ctx.save_for_backward(*inputs[2:], output[2])


def _chunked_grad(ctx: Any, of_out: Tensor, of_last: Tensor, _: Any) -> Any:
    *tensors, starts = ctx.saved_tensors
    found = iter(_chunked_backward(ctx.size, ctx.same, *tensors[:6], starts, of_out.contiguous(), of_last.contiguous()))
    return None, None, *(None if x is None else next(found) for x in tensors)


_chunked.register_autograd(_chunked_grad, setup_context=_setup)

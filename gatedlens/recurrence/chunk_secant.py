"""The secant of a recurrence with matrix states between two runs, chunk by chunk: what stands in the place of its gradient.

    DS_t = DS_{t-1} mean(decay_t) + mean(S_{t-1}) D decay_t - D(found_t erase_t^T) + D(value_t key_t^T)     D(a b) by the means
    D scan_t = DS_t mean(read_t) + mean(S_t) D read_t             found_t = S_{t-1} probe_t

Let L_t be what DS_t is worth in the end. It runs from the end by the means of both runs, as an ordinary gradient would at them;
and
so do the shares of value, key and erase, which look at L alone. Those of read and probe look at the states, each run's by its own
decays: mean(S_t)^T dscan_t. Between both stands that of a decay, <L_t, mean(S_{t-1})>: a sum over pairs (i, j), j < t <= i, with
the means' decays from t to i and the run's own ones from j to t,

    <L_t, S_{t-1}> = sum over i >= t > j of E'(i, t) (dscan_i . value_j) (read'_i . key_j) E(t-1, j)       ' of the means

and the same with S_0 in the place of all that was written before the chunk, Z for all that reads behind it. With one decay a head
it is products of matrices; with one a key it goes by halves, as chunk.py and halving.py do, where each pair meets once.

`literal_secant` in the tests is the first two lines, word for word. Letters and shapes as in chunk.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatedlens.recurrence.chunk import (
    GONE,
    Chunk,
    HeadChunk,
    KeyChunk,
    State,
    _gathered,
    _plus,
    _times_spread,
    chunk_of,
    solve,
)
from gatedlens.recurrence.chunks import _apart as _side_by_side
from gatedlens.recurrence.chunks import _forward, _laid_back, _spans, cut
from gatedlens.recurrence.halving import _apart, _below
from gatedlens.recurrence.matrix_vector import times
from gatedlens.recurrence.scanning import linear_scan

SIDE_BY_SIDE = 1 << 18  # numbers of the largest tensor of chunks side by side

Laid = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]  # log decay, key, value, read, erase, probe


class Forward(NamedTuple):
    """One run: its scan, its last state, and the state before each chunk."""

    scan: Tensor
    last: Tensor
    starts: Tensor


def forward(size: int, same: bool, laid: Laid, initial: Tensor) -> Forward:
    """A run, as `chunks.chunked` computes it."""
    return Forward(*_forward(size, _at_once(size, laid), same, *laid, initial))


def _at_once(size: int, laid: Laid) -> int:
    key, value = laid[1], laid[2]
    widest = value.shape[0] * value.shape[2] * size * max(size, value.shape[-1], key.shape[-1])
    return max(1, SIDE_BY_SIDE // max(widest, 1))


def mean_of_runs(now: Laid, then: Laid) -> Laid:
    """The terms half the way between two runs: the mean of what each is, of a decay and not of its logarithm."""
    log = torch.logaddexp(now[0], then[0]) - math.log(2)
    rest = (None if a is None or b is None else (a + b) / 2 for a, b in zip(now[1:], then[1:], strict=True))
    return log, *rest  # type: ignore[return-value]


def backward(
    size: int,
    same: bool,
    now: Laid,
    then: Laid,
    starts: tuple[Tensor, Tensor],
    of_out: Tensor,
    of_last: Tensor,
) -> list[Tensor | None]:
    """What the seven tensors (those of `Laid` and the state before) get: of each chunk from the last to the first."""
    mean, number = mean_of_runs(now, then), _at_once(size, now)
    found: list[Tensor | None] = [None if x is None else x.new_empty(x.shape) for x in now]
    ahead = of_last.contiguous()
    groups = starts[0].shape[2]
    of_out = of_out.contiguous().unflatten(2, (groups, -1)).flatten(3)
    for part, several in reversed(_spans(of_out.shape[1], size, number)):
        out, first = _side_by_side(of_out[:, part], several), part.start // size
        middle = chunk_of(cut(same, part, *mean, number=several), [])
        behind, ahead = middle.aheads(several, out, ahead)
        own = [chunk_of(cut(same, part, *laid, number=several), []) for laid in (now, then)]
        before = [start[first : first + several].transpose(0, 1).flatten(0, 1) for start in starts]
        for whole, piece in zip(found, _of_chunk(middle, own, before, out, behind), strict=True):
            if whole is not None and piece is not None:
                whole[:, part] = _laid_back(piece, several, whole[:, part])
    return [*found, ahead]


def _of_chunk(
    middle: Chunk, own: list[Chunk], before: list[State], out: Tensor, ahead: State
) -> tuple[Tensor | None, ...]:
    """What a chunk's terms get, of dscan (`out`) and Z (`ahead`)."""
    written = [chunk.inner(state) for chunk, state in zip(own, before, strict=True)]
    inner = [(a + b) / 2 for a, b in zip(*written, strict=True)]
    wanted = [
        middle.writes_back(ahead, kind) + middle.by_group(middle.matrices[kind].mT @ middle.by_head(out))
        for kind in range(len(inner))
    ]
    y, of_value = None, wanted[0]
    if middle.delta:
        y = solve(middle.strict[-1].mT, wanted[-1], upper=True)
        of_value = y if middle.same else wanted[0] - middle.strict[0].mT @ y
    of_sources = _of_sources(middle, out, inner, y, ahead)
    of_rows = [_of_rows(chunk, out, some, y, state) for chunk, some, state in zip(own, written, before, strict=True)]
    of_read, *of_probe = ((a + b) / 2 for a, b in zip(*of_rows, strict=True))
    of_decay = _sum(
        _of_decay(middle, chunk, out, some, y, state, ahead)
        for chunk, some, state in zip(own, written, before, strict=True)
    )
    of_erase = of_sources[1] if len(of_sources) > 1 else None
    return of_decay * _slope(*own) / 2, of_sources[0], of_value, of_read, of_erase, of_probe[0] if of_probe else None


def _slope(now: Chunk, then: Chunk) -> Tensor:
    """(decay - decay') / (log decay - log decay'), the logarithmic mean; where all is forgotten in both, 0."""
    log, other = now.given.log_decay, then.given.log_decay
    half = ((log - other) / 2).nan_to_num(0.0)
    ratio = torch.where(half == 0, 1.0, torch.tanh(half) / half).nan_to_num(0.0)
    return (log.exp() + other.exp()) / 2 * ratio * ((log > GONE) | (other > GONE))


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, terms)


# -- rows and sources ----------------------------------------------------------------------------------------------------


def _of_sources(chunk: Chunk, out: Tensor, inner: list[Tensor], y: Tensor | None, ahead: State) -> list[Tensor]:
    """L_t^T of what is written: of the keys, and of the erases where they are vectors of their own."""
    given, late = chunk.given, [chunk.late(u) @ ahead.mT for u in inner]
    if isinstance(chunk, HeadChunk):
        pairs = [(chunk.by_head(out) @ chunk.by_head(u).mT) * chunk.between for u in inner]
        found = [one + _gathered(pair, given.share).mT @ given.read for one, pair in zip(late, pairs, strict=True)]
        if y is not None:
            assert given.probe is not None
            found = [one - ((y @ u.mT) * chunk.before).mT @ given.probe for one, u in zip(found, inner, strict=True)]
        return found
    assert isinstance(chunk, KeyChunk) and chunk.meetings is not None
    matrices = _pairs_of(chunk, out, inner, y)
    sources = [chunk._grown(one).unsqueeze(-3) for one in late]
    for met in reversed(chunk.meetings):
        size = met.rows[0].shape[-2]
        sources = [
            _apart(
                source[..., :size, :] * met.right
                + _sum(_below(kinds[j], size).mT @ row for kinds, row in zip(matrices, met.rows, strict=True)),
                source[..., size:, :],
            )
            for j, source in enumerate(sources)
        ]
    found = [source.squeeze(-2)[..., : chunk.length, :] for source in sources]
    return [one + (out * u).sum(-1, keepdim=True) * given.read for one, u in zip(found, inner, strict=True)]


def _of_rows(chunk: Chunk, out: Tensor, inner: list[Tensor], y: Tensor | None, state: State) -> list[Tensor]:
    """S_t^T dscan_t of the reads, and -S_{t-1}^T y_t of the probes."""
    given = chunk.given
    if isinstance(chunk, HeadChunk):
        of_read = chunk.early(out) @ state.mT
        for u, source in zip(inner, chunk.sources, strict=True):
            pair = (chunk.by_head(out) @ chunk.by_head(u).mT) * chunk.between
            of_read = of_read + _gathered(pair, given.share) @ source
        if y is None:
            return [of_read]
        of_probe = -((y * chunk.since_before) @ state.mT)
        for u, source in zip(inner, chunk.sources, strict=True):
            of_probe = of_probe - ((y @ u.mT) * chunk.before) @ source
        return [of_read, of_probe]
    assert isinstance(chunk, KeyChunk) and chunk.meetings is not None
    matrices = _pairs_of(chunk, out, inner, y)
    rows = [row.unsqueeze(-3) for row in _seen_of_start(chunk, out, y, state)]
    for met in reversed(chunk.meetings):
        size = met.rows[0].shape[-2]
        rows = [
            _apart(
                row[..., :size, :],
                row[..., size:, :] * met.left
                + _sum(_below(kinds[j], size) @ source for j, source in enumerate(met.sources)),
            )
            for row, kinds in zip(rows, matrices, strict=True)
        ]
    rows = [row.squeeze(-2) for row in rows]
    rows[0] = rows[0] * chunk.by_position
    rows = [row[..., : chunk.length, :] for row in rows]
    for u, source in zip(inner, chunk.sources, strict=True):  # a position reads what it has just written
        rows[0] = rows[0] + (out * u).sum(-1, keepdim=True) * source
    return rows


def _pairs_of(chunk: KeyChunk, out: Tensor, inner: list[Tensor], y: Tensor | None) -> list[list[Tensor]]:
    """dscan_i . u_j, and -y_i . u_j: the decays left out, by [row kind][source kind]."""
    over = chunk.places - chunk.length

    def square(m: Tensor) -> Tensor:
        return F.pad(m, (0, over, 0, over)) if over else m

    found = [[square(out @ u.mT) for u in inner]]
    return found if y is None else [*found, [square(-(y @ u.mT)) for u in inner]]


def _seen_of_start(chunk: KeyChunk, out: Tensor, y: Tensor | None, state: State) -> list[Tensor]:
    """What the rows are worth of each key of S_0."""
    found = [chunk._grown(out @ state.mT)]
    return found if y is None else [*found, chunk._grown(-(y @ state.mT))]


# -- decays --------------------------------------------------------------------------------------------------------------


def _of_decay(
    middle: Chunk, own: Chunk, out: Tensor, inner: list[Tensor], y: Tensor | None, state: State, ahead: State
) -> Tensor:
    """<L_t, S_{t-1}> of a run: see the head of this file."""
    if isinstance(middle, HeadChunk) and isinstance(own, HeadChunk):
        return _of_one_decay(middle, own, out, inner, y, state, ahead)
    assert isinstance(middle, KeyChunk) and isinstance(own, KeyChunk)
    return _of_decays_by_key(middle, own, out, inner, y, state, ahead)


def _of_one_decay(
    middle: HeadChunk, own: HeadChunk, out: Tensor, inner: list[Tensor], y: Tensor | None, state: State, ahead: State
) -> Float[Tensor, "batch group pos heads"]:
    """Of heads that decay as one."""
    share = middle.given.share

    def of_heads(x: Float[Tensor, "batch group pos heads"]) -> Float[Tensor, "batch head pos"]:
        return x.mT.flatten(1, 2)

    earlier = F.pad(own.between[..., :-1, :], (0, 0, 1, 0))  # E(t-1, j)
    since = of_heads(F.pad(own.since[..., :-1, :], (0, 0, 1, 0), value=1.0))  # E(t-1, 0)
    until = of_heads(middle.until)  # E'(C, t)
    whole = (ahead * state).sum(-2).unflatten(-1, (share, -1)).sum(-1).flatten(1, 2).unsqueeze(-1)
    heads, read = middle.by_head(out), middle.given.read
    pairs = [
        _times_spread(heads @ own.by_head(u).mT, read @ source.mT, share)
        for u, source in zip(inner, own.sources, strict=True)
    ]
    together = middle.between.mT @ _plus(pairs)  # sum over i >= t of E'(i, t) W[i, j]
    seen = times(middle.between.mT, of_heads(own._summed(out * (read @ state))))
    if y is not None:
        probe = middle.given.probe
        assert probe is not None
        strict = [-(y @ u.mT) * (probe @ source.mT) for u, source in zip(inner, own.sources, strict=True)]
        together = together + middle.before.mT @ _plus(strict)
        seen = seen - times(middle.before.mT, (y * (probe @ state)).sum(-1))
    late = _plus([own._summed(u * (source @ ahead)) for u, source in zip(inner, own.sources, strict=True)])
    left = times(earlier, of_heads(late))
    found = (together * earlier).sum(-1) + since * seen + until * (left + since * whole)
    return found.unflatten(1, (-1, share)).mT


def _of_decays_by_key(
    middle: KeyChunk, own: KeyChunk, out: Tensor, inner: list[Tensor], y: Tensor | None, state: State, ahead: State
) -> Float[Tensor, "batch head pos key"]:
    """Of heads whose keys decay each at its own pace: pairs meet by halves; then t is in the block of i, or in that of j."""
    matrices = _pairs_of(own, out, inner, y)
    decay, mean = own.by_position, middle.by_position
    rows = [middle._grown(x) for x in (middle.given.read, middle.given.probe) if x is not None]
    sources = [own._grown(x) for x in own.sources]

    def of_sources(values: list[Tensor], some: list[Tensor], a: Tensor, after: Tensor) -> Tensor:
        """t beside the sources: E'(end, t) sum over j < t of E(t-1, j) source_j values_j."""
        w = _sum(source * value for source, value in zip(some, values, strict=True))
        return _behind(after) * _shifted(_scan(a, w))

    def of_rows(values: list[Tensor], some: list[Tensor], a: Tensor, before: Tensor) -> Tensor:
        """t beside the rows: E(t-1, start) sum over i >= t of E'(i, t) row_i values_i; a strict row i from t < i on."""
        w = some[0] * values[0]
        if len(some) > 1:
            w = w + F.pad((some[1] * values[1])[..., 1:, :], (0, 0, 0, 1))
        ahead_of = F.pad(a[..., 1:, :], (0, 0, 0, 1), value=1.0)
        return _shifted(torch.cumprod(before, -2), 1.0) * _scan(ahead_of.flip(-2), w.flip(-2)).flip(-2)

    late = [own._grown(u @ ahead.mT) for u in inner]
    found = of_sources(late, sources, decay, mean) + of_rows(_seen_of_start(own, out, y, state), rows, mean, decay)
    whole = (ahead * state).sum(-1).unsqueeze(-2)
    found = found + _behind(mean) * _shifted(torch.cumprod(decay, -2), 1.0) * whole
    assert middle.meetings is not None and own.meetings is not None
    for met, mine in zip(middle.meetings, own.meetings, strict=True):
        size = met.rows[0].shape[-2]

        def halves(x: Tensor, size: int = size) -> tuple[Tensor, Tensor]:
            apart = x.unflatten(-2, (-1, 2, size))
            return apart[..., 0, :, :], apart[..., 1, :, :]

        blocks = [[_below(m, size) for m in kinds] for kinds in matrices]
        (a, a_right), (mean_left, mean_right) = halves(decay), halves(mean)
        read_by = [
            _sum(kinds[j].mT @ row for kinds, row in zip(blocks, met.rows, strict=True)) for j in range(len(sources))
        ]
        seen = [_sum(block @ source for block, source in zip(kinds, mine.sources, strict=True)) for kinds in blocks]
        left = of_sources(read_by, [halves(x)[0] for x in sources], a, mean_left)
        right = of_rows(seen, [halves(x)[1] for x in rows], mean_right, a_right)
        found = found + torch.stack([left, right], -3).flatten(-4, -2)
    return found[..., : own.length, :]


def _scan(
    decay: Float[Tensor, "*some pos key"], write: Float[Tensor, "*some pos key"]
) -> Float[Tensor, "*some pos key"]:
    flat = (x.reshape(-1, *x.shape[-2:]) for x in (decay, write))
    return linear_scan(*flat).view(write.shape)


def _shifted(x: Float[Tensor, "*some pos key"], first: float = 0.0) -> Float[Tensor, "*some pos key"]:
    """What stands a position before."""
    return F.pad(x[..., :-1, :], (0, 0, 1, 0), value=first)


def _behind(decay: Float[Tensor, "*some pos key"]) -> Float[Tensor, "*some pos key"]:
    """The product of the decays behind each position."""
    return _shifted(torch.cumprod(decay.flip(-2), -2), 1.0).flip(-2)

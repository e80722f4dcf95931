"""One chunk of a recurrence with matrix states, as matrix products.

In a chunk of C positions, from the state S_0 before it, with E(i, j) = decay_{j+1} ... decay_i and w_i = probe_i . S_{i-1}:

    (I + T) w = p S_0 + M<(probe, key) value          T = M<(probe, erase)
    M(a, b)[i, j] = a_i . E(i, j) b_j  for j <= i     M<(a, b)[i, j] = a_i . E(i-1, j) b_j  for j < i     p_i = probe_i E(i-1, 0)
    scan = r S_0 + M(read, key) value - M(read, erase) w                                                  r_i = read_i E(i, 0)
    S_C  = E(C, 0) S_0 + k^T value - e^T w                                      k_j = key_j E(C, j), e_j = erase_j E(C, j)

Where erase is key itself, value and w go together: (I + T) (value - w) = value - p S_0, half the work. Backward, from Z, the
gradient of S_C, the same system is solved from the end: y_i = erase_i . dS_i has (I + T)^T y = e Z + M(read, erase)^T dscan.

S [b, h, key, value] here. Two kinds of decays: `HeadChunk` (one number a head and position) and `KeyChunk` (one a key). They
share all that stands in `Chunk` and differ in where the decays are multiplied in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatedlens.recurrence.halving import Meeting, climb, descend

GONE = -800.0  # a log decay that leaves nothing in any dtype (exp(-746) is 0 in float64), and is finite

State = Float[Tensor, "batch head key value"]


class Given(NamedTuple):
    """A chunk's terms, positions behind heads: log decays [b, h, C, k | 1], the rest [b, h, C, .] (key, read: [b, g, C, k])."""

    log_decay: Tensor
    key: Tensor
    value: Tensor
    read: Tensor
    erase: Tensor | None = None
    probe: Tensor | None = None


class Grads(NamedTuple):
    """The gradients of a chunk's terms, and of the state before it."""

    log_decay: Tensor
    key: Tensor
    value: Tensor
    read: Tensor
    erase: Tensor | None
    probe: Tensor | None
    state: Tensor


def chunk_of(given: Given, meetings: list[Meeting] | None = None) -> Chunk:
    """The chunk of the kind that its decays are. For its `back` give an empty list, which it fills with what it needs there."""
    return KeyChunk(given, meetings) if given.log_decay.shape[-1] > 1 else HeadChunk(given)


class Chunk(ABC):
    """All of a chunk that does not look at the state. Out of place, so that autograd can follow."""

    matrices: list[Tensor]  # M(read, key) and, where erase is a vector of its own, M(read, erase)
    strict: list[Tensor]  # M<(probe, key) and M<(probe, erase); nothing without a delta rule
    decay: Tensor  # E(C, 0): [b, h, k | 1]

    def __init__(self, given: Given):
        self.given = given
        self.length = given.value.shape[-2]
        self.delta = given.erase is not None
        self.same = given.erase is given.key  # what is erased is what is written: one system for both

    @property
    def sources(self) -> list[Tensor]:
        """What is written with: key, and erase where it is a vector of its own."""
        given = self.given
        return [given.key] if given.erase is None or self.same else [given.key, given.erase]

    @abstractmethod
    def reads(self, state: State, kind: int = 0) -> Tensor:
        """r S (kind 0) or p S (kind 1)."""

    @abstractmethod
    def plus_writes(self, state: State, value: Tensor, kind: int = 0) -> State:
        """S + k^T value (kind 0) or S + e^T value (kind 1)."""

    @abstractmethod
    def reads_back(self, value: Tensor, kind: int = 0) -> State:
        """r^T value, p^T value: the adjoint of `reads`."""

    @abstractmethod
    def writes_back(self, state: State, kind: int = 0) -> Tensor:
        """k Z, e Z: the adjoint of what `plus_writes` adds."""

    @abstractmethod
    def rows_from_start(self, kind: int = 0) -> Tensor:
        """r, or p: [b, h, C, k]."""

    @abstractmethod
    def sources_to_end(self, kind: int = 0) -> Tensor:
        """k, or e: [b, h, C, k]."""

    @abstractmethod
    def own_gradients(
        self, out: Tensor, inner: list[Tensor], y: Tensor | None, state: State, ahead: State
    ) -> tuple[Tensor, Tensor, list[Tensor], Tensor | None]:
        """The gradients of log decay, read, sources and probe, from dscan, what is written, y, S_0 and Z."""

    def inner(self, state: State) -> list[Tensor]:
        """What the sources write: [value - w] where erase is key, else [value] and, with a delta rule, [value, -w]."""
        value = self.given.value
        if not self.delta:
            return [value]
        if self.same:
            return [solve(self.strict[0], value - self.reads(state, 1))]
        return [value, -solve(self.strict[1], self.reads(state, 1) + self.strict[0] @ value)]

    def step(self, state: State) -> tuple[Tensor, State]:
        """(scan, S_C) from S_0."""
        out, new = self.reads(state), self.decay.unsqueeze(-1) * state
        for kind, written in enumerate(self.inner(state)):
            out = plus_product(out, self.matrices[kind], written)
            new = self.plus_writes(new, written, kind)
        return out, new

    def back(self, state: State, out: Tensor, ahead: State) -> Grads:
        """The gradients from dscan (`out`) and Z (`ahead`)."""
        inner = self.inner(state)
        wanted = [self.writes_back(ahead, kind) + self.matrices[kind].mT @ out for kind in range(len(inner))]
        before = self.decay.unsqueeze(-1) * ahead + self.reads_back(out)
        y = None
        of_value = wanted[0]
        if self.delta:
            y = solve(self.strict[-1].mT, wanted[-1], upper=True)
            of_value = y if self.same else wanted[0] - self.strict[0].mT @ y
            before = before - self.reads_back(y, 1)
        of_decay, of_read, of_sources, of_probe = self.own_gradients(out, inner, y, state, ahead)
        of_erase = of_sources[1] if len(of_sources) > 1 else None
        return Grads(of_decay, of_sources[0], of_value, of_read, of_erase, of_probe, before)


class KeyChunk(Chunk):
    """A decay for each key: multiplied into rows and sources, by halves (halving.py)."""

    def __init__(self, given: Given, meetings: list[Meeting] | None = None):
        super().__init__(given)
        self.meetings = meetings
        # The chunk in whole halves: positions past its end decay by 1 and are 0.
        self.places = 1 << max(0, self.length - 1).bit_length()
        rows = [given.read] if given.probe is None else [given.read, given.probe]
        self.by_position = torch.exp(self._grown(given.log_decay))
        grown = [self._grown(x) for x in rows], [self._grown(x) for x in self.sources]
        self.triangle = climb(self.by_position, *grown, meetings)
        self.matrices = [self._square(m) for m in self.triangle.matrices[0]]
        self.strict = [self._square(m) for m in self.triangle.matrices[1]] if self.delta else []
        self.rows = [x[..., : self.length, :] for x in self.triangle.rows]
        self.late = [x[..., : self.length, :] for x in self.triangle.sources]
        self.decay = self.triangle.decay

    def _grown(self, x: Tensor) -> Tensor:
        over = self.places - self.length
        return F.pad(x, (0, 0, 0, over)) if over else x

    def _square(self, matrix: Tensor) -> Tensor:
        return matrix[..., : self.length, : self.length]

    def reads(self, state: State, kind: int = 0) -> Tensor:
        return self.rows[kind] @ state

    def plus_writes(self, state: State, value: Tensor, kind: int = 0) -> State:
        return plus_product(state, self.late[kind].mT, value)

    def reads_back(self, value: Tensor, kind: int = 0) -> State:
        return self.rows[kind].mT @ value

    def writes_back(self, state: State, kind: int = 0) -> Tensor:
        return self.late[kind] @ state

    def rows_from_start(self, kind: int = 0) -> Tensor:
        return self.rows[kind]

    def sources_to_end(self, kind: int = 0) -> Tensor:
        return self.late[kind]

    def own_gradients(
        self, out: Tensor, inner: list[Tensor], y: Tensor | None, state: State, ahead: State
    ) -> tuple[Tensor, Tensor, list[Tensor], Tensor | None]:
        over = self.places - self.length
        assert self.meetings is not None  # `chunk_of(given, [])`

        def square(m: Tensor) -> Tensor:
            return F.pad(m, (0, over, 0, over)) if over else m

        matrices = [[square(out @ u.mT) for u in inner]]
        rows = [self._grown(out @ state.mT)]
        if y is not None:
            matrices.append([square(-(y @ u.mT)) for u in inner])
            rows.append(self._grown(-(y @ state.mT)))
        sources = [self._grown(u @ ahead.mT) for u in inner]
        whole = (ahead * state).sum(-1)
        found_rows, found, of_decay = descend(
            self.meetings, self.by_position, self._grown(self.given.read), matrices, rows, sources, whole
        )
        of_rows, of_sources = ([x[..., : self.length, :] for x in some] for some in (found_rows, found))
        # The diagonal: a position reads what it has just written, whatever the decays.
        own = [(out * u).sum(-1, keepdim=True) for u in inner]
        of_read = of_rows[0]
        for weight, source in zip(own, self.sources, strict=True):
            of_read = of_read + weight * source
        of_sources = [found + weight * self.given.read for found, weight in zip(of_sources, own, strict=True)]
        of_log = (of_decay * self.by_position)[..., : self.length, :]
        return of_log, of_read, of_sources, of_rows[1] if y is not None else None


class HeadChunk(Chunk):
    """One decay a head and position: it is multiplied in beside the values, so that the heads of a group share products."""

    def __init__(self, given: Given):
        super().__init__(given)
        key, read, value = given.key, given.read, given.value
        # Sums of logarithms in float64, where differences of long sums keep their digits.
        cum = given.log_decay.squeeze(-1).double().clamp(min=GONE).cumsum(-1)  # [b, h, C]
        seen = torch.ones(self.length, self.length, dtype=torch.bool, device=value.device).tril()
        ago = (cum.unsqueeze(-1) - cum.unsqueeze(-2)).to(value.dtype)
        self.between = torch.exp(ago.masked_fill(~seen, -torch.inf))  # E(i, j)
        self.since = torch.exp(cum).to(value.dtype).unsqueeze(-1)  # E(i, 0)
        self.until = torch.exp(cum[..., -1:] - cum).to(value.dtype).unsqueeze(-1)  # E(C, j)
        self.decay = self.since[..., -1, :]
        self.share = value.shape[1] // key.shape[1]  # heads of a group
        raw = [read @ source.mT for source in self.sources]
        self.matrices = [_spread(m, self.share) * self.between for m in raw]
        self.strict = []
        if given.probe is not None:
            # The row before: E(i-1, j), and nothing in the first.
            self.before = F.pad(self.between[..., :-1, :], (0, 0, 1, 0))
            self.since_before = F.pad(self.since[..., :-1, :], (0, 0, 1, 0), value=1.0)
            self.strict = [given.probe @ source.mT * self.before for source in self.sources]

    def _row(self, kind: int) -> tuple[Tensor, Tensor]:
        if kind == 0:
            return self.given.read, self.since
        assert self.given.probe is not None
        return self.given.probe, self.since_before

    def reads(self, state: State, kind: int = 0) -> Tensor:
        row, decay = self._row(kind)
        return shared(row, state) * decay

    def plus_writes(self, state: State, value: Tensor, kind: int = 0) -> State:
        late, source = value * self.until, self.sources[kind].mT
        return plus_product(state, source, late) if self.share == 1 else state + shared(source, late)

    def reads_back(self, value: Tensor, kind: int = 0) -> State:
        row, decay = self._row(kind)
        return shared(row.mT, value * decay)

    def writes_back(self, state: State, kind: int = 0) -> Tensor:
        return shared(self.sources[kind], state) * self.until

    def rows_from_start(self, kind: int = 0) -> Tensor:
        row, decay = self._row(kind)
        return _spread(row, self.share) * decay

    def sources_to_end(self, kind: int = 0) -> Tensor:
        return _spread(self.sources[kind], self.share) * self.until

    def own_gradients(
        self, out: Tensor, inner: list[Tensor], y: Tensor | None, state: State, ahead: State
    ) -> tuple[Tensor, Tensor, list[Tensor], Tensor | None]:
        given, groups = self.given, self.given.key.shape[1]
        # M and its gradient, entry by entry, weighed with the decays between: [b, h, C, C].
        pairs = [(out @ u.mT) * self.between for u in inner]
        of_read = shared_transposed(out * self.since, state, groups)
        of_sources = [shared_transposed(u * self.until, ahead, groups) for u in inner]
        # What a decay multiplies: rows that look at S_0 across it, sources that Z looks at, pairs, and S_0 on its way to S_C.
        rows = (out * self.reads(state)).sum(-1)
        late = _plus([(u * self.writes_back(ahead, kind)).sum(-1) for kind, u in enumerate(inner)])
        across = _plus(
            [pair * _spread(given.read @ s.mT, self.share) for pair, s in zip(pairs, self.sources, strict=True)]
        )
        for kind, (pair, source) in enumerate(zip(pairs, self.sources, strict=True)):
            together = _gathered(pair, self.share)
            of_read = of_read + together @ source
            of_sources[kind] = of_sources[kind] + together.mT @ given.read
        of_decay = _before(across).tril().sum(-2) + _from(rows) + _before(late)
        of_decay = of_decay + (self.decay.squeeze(-1) * (ahead * state).sum((-1, -2))).unsqueeze(-1)
        of_probe = None
        if y is not None:
            assert given.probe is not None
            strict = [(y @ u.mT) * self.before for u in inner]
            of_probe = -((y * self.since_before) @ state.mT)
            found = (given.probe * of_probe).sum(-1)
            across = _plus([pair * (given.probe @ s.mT) for pair, s in zip(strict, self.sources, strict=True)])
            for kind, (pair, source) in enumerate(zip(strict, self.sources, strict=True)):
                of_probe = of_probe - pair @ source
                of_sources[kind] = of_sources[kind] - pair.mT @ given.probe
            of_decay = of_decay - _before(across).tril(-1).sum(-2) + F.pad(_from(found)[..., 1:], (0, 1))
        return of_decay.unsqueeze(-1), of_read, of_sources, of_probe


def solve(lower: Tensor, right: Tensor, upper: bool = False) -> Tensor:
    """(I + T)^-1 right, T strictly below the diagonal (above it: `upper`)."""
    return torch.linalg.solve_triangular(lower, right, upper=upper, unitriangular=True)


def plus_product(
    total: Float[Tensor, "batch head m v"], x: Float[Tensor, "batch head m n"], y: Float[Tensor, "batch head n v"]
) -> Float[Tensor, "batch head m v"]:
    """total + x @ y, in one operation."""
    flat = torch.baddbmm(*(t.flatten(0, 1) for t in (total, x, y)))
    return flat.view_as(total)


def _plus(terms: list[Tensor]) -> Tensor:
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]


def _spread(x: Tensor, share: int) -> Tensor:
    """[b, g, ...] -> [b, h, ...]: what a group has for each of its heads."""
    return x if share == 1 else x.repeat_interleave(share, dim=1)


def _gathered(x: Tensor, share: int) -> Tensor:
    """[b, h, ...] -> [b, g, ...]: summed over the heads of a group."""
    return x if share == 1 else x.unflatten(1, (-1, share)).sum(2)


def _before(x: Tensor) -> Tensor:
    """The sum of all entries before each, along the last axis."""
    return F.pad(x.cumsum(-1)[..., :-1], (1, 0))


def _from(x: Tensor) -> Tensor:
    """The sum of each entry and all behind it."""
    return x.flip(-1).cumsum(-1).flip(-1)


def shared(x: Float[Tensor, "batch group m n"], y: Float[Tensor, "batch head n v"]) -> Float[Tensor, "batch head m v"]:
    """x @ y, the heads of a group side by side in one product."""
    share = y.shape[1] // x.shape[1]
    if share == 1:
        return x @ y
    side_by_side = y.unflatten(1, (-1, share)).movedim(2, 3).flatten(-2)  # [b, g, n, (r v)]
    return (x @ side_by_side).unflatten(-1, (share, -1)).movedim(3, 2).flatten(1, 2)


def shared_transposed(
    x: Float[Tensor, "batch head m v"], y: Float[Tensor, "batch head n v"], groups: int
) -> Float[Tensor, "batch group m n"]:
    """x @ y^T, summed over the heads of a group."""
    share = x.shape[1] // groups
    if share == 1:
        return x @ y.mT
    x, y = (t.unflatten(1, (-1, share)).movedim(2, 3).flatten(-2) for t in (x, y))
    return x @ y.mT

"""One chunk of a recurrence with matrix states, as matrix products; or many chunks side by side, in the axis of the batch.

In a chunk of C positions, from the state S_0 before it, with E(i, j) = decay_{j+1} ... decay_i and w_i = probe_i . S_{i-1}:

    (I + T) w = p S_0 + M<(probe, key) value          T = M<(probe, erase)
    M(a, b)[i, j] = a_i . E(i, j) b_j  for j <= i     M<(a, b)[i, j] = a_i . E(i-1, j) b_j  for j < i     p_i = probe_i E(i-1, 0)
    scan = r S_0 + M(read, key) value - M(read, erase) w                                                  r_i = read_i E(i, 0)
    S_C  = E(C, 0) S_0 + k^T value - e^T w                                      k_j = key_j E(C, j), e_j = erase_j E(C, j)

Where erase is key itself, value and w go together: (I + T) (value - w) = value - p S_0, half the work. Backward, from Z, the
gradient of S_C, the same system is solved from the end: y_i = erase_i . dS_i has (I + T)^T y = e Z + M(read, erase)^T dscan.

All of it is affine in S_0: -w = X - Y S_0 with (I + T) Y = p, so S_C = (E(C, 0) - e^T Y) S_0 + what the chunk leaves of itself.
The states between many chunks are a recurrence of such transitions, and all else is done for all of the chunks at once.

S [b, g, k, (r v)] here: the r heads that share the keys of a group g stand side by side, so that one product serves them all.
Two kinds of decays: `HeadChunk` (one number a head and position) and `KeyChunk` (one a key; r is 1). They share all that stands
in `Chunk` and differ in where the decays are multiplied in: beside the values, or into rows and sources.
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

State = Float[Tensor, "batch group key value"]  # value: of the heads of the group, side by side


class Given(NamedTuple):
    """A chunk's terms, positions behind groups: log decays [b, g, C, r] or [b, h, C, k], value [b, g, C, (r v)], the rest
    [b, g, C, k]. `share` is r, the heads of a group."""

    log_decay: Tensor
    key: Tensor
    value: Tensor
    read: Tensor
    erase: Tensor | None = None
    probe: Tensor | None = None
    share: int = 1


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
    return KeyChunk(given, meetings) if given.log_decay.shape[-1] > given.share else HeadChunk(given)


class Chunk(ABC):
    """All of a chunk that does not look at the state. Out of place, so that autograd can follow."""

    matrices: list[Tensor]  # M(read, key) and, where erase is a vector of its own, M(read, erase): [b, (g r), C, C]
    strict: list[Tensor]  # M<(probe, key) and M<(probe, erase); nothing without a delta rule
    rows: list[Tensor]  # what reads the state: of r and of p, [b, g, C, k]; `early` is still to come
    ends: list[Tensor]  # what is written with: of k and of e, [b, g, C, k]; `late` is still to come
    decay: Tensor  # E(C, 0): [b, g, r] or [b, h, k]

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

    # -- where the two kinds differ ------------------------------------------------------------------------------

    @abstractmethod
    def early(self, x: Tensor, kind: int = 0) -> Tensor:
        """The decays from the chunk's start to each position (kind 1: to the one before), where rows have them not."""

    @abstractmethod
    def late(self, x: Tensor) -> Tensor:
        """The decays from each position to the chunk's end, where sources have them not."""

    @property
    @abstractmethod
    def spread(self) -> Tensor:
        """E(C, 0), to be multiplied with a state: [b, g, 1, (r v)] or [b, h, k, 1]."""

    @abstractmethod
    def own_gradients(
        self, out: Tensor, inner: list[Tensor], y: Tensor | None, state: State, ahead: State, found: list[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor], Tensor | None]:
        """The gradients of log decay, read, sources and probe, from dscan, what is written, y, S_0, Z, and k Z, e Z."""

    # -- what is made of them ------------------------------------------------------------------------------------

    def reads(self, state: State, kind: int = 0) -> Tensor:
        """r S (kind 0) or p S (kind 1)."""
        return self.early(self.rows[kind] @ state, kind)

    def writes(self, value: Tensor, kind: int = 0) -> State:
        """k^T value (kind 0) or e^T value (kind 1)."""
        return self.ends[kind].mT @ self.late(value)

    def writes_back(self, state: State, kind: int = 0) -> Tensor:
        """k Z, e Z: the adjoint of `writes`."""
        return self.late(self.ends[kind] @ state)

    def by_head(self, x: Float[Tensor, "batch group pos value"]) -> Float[Tensor, "batch head pos one_value"]:
        """Values side by side as those of each head."""
        share = self.given.share
        return x if share == 1 else x.unflatten(-1, (share, -1)).movedim(3, 2).flatten(1, 2)

    def by_group(self, x: Float[Tensor, "batch head pos one_value"]) -> Float[Tensor, "batch group pos value"]:
        """The way back."""
        share = self.given.share
        return x if share == 1 else x.unflatten(1, (-1, share)).movedim(2, 3).flatten(-2)

    def inner(self, state: State) -> list[Tensor]:
        """What the sources write: [value - w] where erase is key, else [value] and, with a delta rule, [value, -w]."""
        value = self.given.value
        if not self.delta:
            return [value]
        if self.same:
            return [solve(self.strict[0], value - self.reads(state, 1))]
        return [value, -solve(self.strict[1], self.reads(state, 1) + self.strict[0] @ value)]

    def step_(self, state: State, out: Tensor) -> None:
        """The scan into `out`, and S_C in the place of S_0; no derivative follows it."""
        inner = self.inner(state)
        out.copy_(self.reads(state))
        state.mul_(self.spread)
        for kind, written in enumerate(inner):
            self.by_head(out).add_(self.matrices[kind] @ self.by_head(written))
            plus_product_(state, self.ends[kind].mT, self.late(written))

    def side_by_side(
        self, number: int, state: Float[Tensor, "row group key value"]
    ) -> tuple[Tensor, Tensor, Float[Tensor, "number row group key value"]]:
        """(scan, S behind the last, S before each) of `number` chunks a row, whose batch is (row chunk). In torch's own
        operations and out of place: right under any derivative."""
        inner, ends = [self.given.value], self.spread
        if not self.delta:
            left = self.writes(inner[0])
        else:
            # Both sides of the system at once: what is found of the values, and of the state.
            width, found = inner[0].shape[-1], self.rows_from_start(1)
            of_values = inner[0] if self.same else -self.strict[0] @ inner[0]
            X, Y = solve(self.strict[-1], torch.cat([of_values, found], -1)).split([width, found.shape[-1]], -1)
            inner = [X] if self.same else [inner[0], X]
            left = self.writes(X) if self.same else self.writes(inner[0]) + self.writes(X, 1)
            ends = self.transition(Y)
        starts = [state]
        for end, new in zip(_of_rows(ends, number), _of_rows(left, number), strict=True):
            starts.append(end @ starts[-1] + new if self.delta else torch.addcmul(new, end, starts[-1]))
        before = torch.stack(starts[:-1])
        flat = before.transpose(0, 1).flatten(0, 1)
        if self.delta:
            inner[-1] = inner[-1] - Y @ flat
        out = self.reads(flat)
        for kind, written in enumerate(inner):
            out = out + self.by_group(self.matrices[kind] @ self.by_head(written))
        return out, starts[-1], before

    def transition(self, found: Float[Tensor, "batch head pos key"]) -> Float[Tensor, "batch head key key"]:
        """What has become of S_0 itself behind a delta rule, of its Y: E(C, 0) - e^T Y."""
        kept = self.decay.expand(*self.decay.shape[:-1], found.shape[-1])
        return torch.diag_embed(kept) - self.sources_to_end(len(self.ends) - 1).mT @ found

    def aheads(
        self, number: int, out: Tensor, ahead: Float[Tensor, "row group key value"]
    ) -> tuple[Float[Tensor, "chunk group key value"], Float[Tensor, "row group key value"]]:
        """(the gradient of the state behind each of `number` chunks a row, that of the state before the first)."""
        before, ends = self.reads_back(out), self.spread
        if self.delta:
            y = solve(self.strict[-1].mT, self.matrices[-1].mT @ out, upper=True)
            before = before - self.reads_back(y, 1)
            ends = self.transition(solve(self.strict[-1], self.rows_from_start(1))).mT
        behind = [ahead]
        for end, new in reversed(list(zip(_of_rows(ends, number), _of_rows(before, number), strict=True))):
            behind.append(end @ behind[-1] + new if self.delta else torch.addcmul(new, end, behind[-1]))
        return torch.stack(behind[-2::-1], 1).flatten(0, 1), behind[-1]

    def reads_back(self, value: Tensor, kind: int = 0) -> State:
        """r^T value, p^T value: the adjoint of `reads`."""
        return self.rows[kind].mT @ self.early(value, kind)

    def rows_from_start(self, kind: int = 0) -> Float[Tensor, "batch head pos key"]:
        """r, or p, where every head has its own."""
        return self.early(self.rows[kind], kind)

    def sources_to_end(self, kind: int = 0) -> Float[Tensor, "batch head pos key"]:
        """k, or e, where every head has its own."""
        return self.late(self.ends[kind])

    def back(self, state: State, out: Tensor, ahead: State) -> Grads:
        """The gradients from dscan (`out`) and Z (`ahead`)."""
        inner = self.inner(state)
        found = [self.writes_back(ahead, kind) for kind in range(len(inner))]
        wanted = [seen + self.by_group(self.matrices[kind].mT @ self.by_head(out)) for kind, seen in enumerate(found)]
        before = self.spread * ahead
        plus_product_(before, self.rows[0].mT, self.early(out))
        y = None
        of_value = wanted[0]
        if self.delta:
            y = solve(self.strict[-1].mT, wanted[-1], upper=True)
            of_value = y if self.same else wanted[0] - self.strict[0].mT @ y
            plus_product_(before, self.rows[1].mT, self.early(-y, 1))
        of_decay, of_read, of_sources, of_probe = self.own_gradients(out, inner, y, state, ahead, found)
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
        self.ends = [x[..., : self.length, :] for x in self.triangle.sources]
        self.decay = self.triangle.decay

    def _grown(self, x: Tensor) -> Tensor:
        over = self.places - self.length
        return F.pad(x, (0, 0, 0, over)) if over else x

    def _square(self, matrix: Tensor) -> Tensor:
        return matrix[..., : self.length, : self.length]

    def early(self, x: Tensor, kind: int = 0) -> Tensor:
        return x

    def late(self, x: Tensor) -> Tensor:
        return x

    @property
    def spread(self) -> Tensor:
        return self.decay.unsqueeze(-1)

    def own_gradients(
        self, out: Tensor, inner: list[Tensor], y: Tensor | None, state: State, ahead: State, found: list[Tensor]
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
        found_rows, found_sources, of_decay = descend(
            self.meetings, self.by_position, self._grown(self.given.read), matrices, rows, sources, whole
        )
        of_rows, of_sources = ([x[..., : self.length, :] for x in some] for some in (found_rows, found_sources))
        # The diagonal: a position reads what it has just written, whatever the decays.
        own = [(out * u).sum(-1, keepdim=True) for u in inner]
        of_read = of_rows[0]
        for weight, source in zip(own, self.sources, strict=True):
            of_read = of_read + weight * source
        of_sources = [of_source + weight * self.given.read for of_source, weight in zip(of_sources, own, strict=True)]
        of_log = (of_decay * self.by_position)[..., : self.length, :]
        return of_log, of_read, of_sources, of_rows[1] if y is not None else None


class HeadChunk(Chunk):
    """One decay a head and position: it is multiplied in beside the values, so that the heads of a group share products."""

    def __init__(self, given: Given):
        super().__init__(given)
        dtype, self.rows, self.ends = given.value.dtype, [given.read], self.sources
        # Sums of logarithms in float64, where differences of long sums keep their digits.
        cum = given.log_decay.double().clamp(min=GONE).cumsum(-2)  # [b, g, C, r]
        # In memory of its own: the layout of a few numbers becomes that of all the matrices.
        self.between = _between(cum.mT.flatten(1, 2).contiguous(), dtype)  # E(i, j): [b, h, C, C]
        self.since = torch.exp(cum).to(dtype)  # E(i, 0): [b, g, C, r]
        self.until = torch.exp(cum[..., -1:, :] - cum).to(dtype)  # E(C, j)
        self.decay = self.since[..., -1, :]
        self.raw = [given.read @ source.mT for source in self.sources]  # [b, g, C, C]
        self.matrices = [self._weighed(m) for m in self.raw]
        self.strict = []
        if given.probe is not None:
            # The row before: E(i-1, j), and nothing in the first.
            self.before = F.pad(self.between[..., :-1, :], (0, 0, 1, 0))
            self.since_before = F.pad(self.since[..., :-1, :], (0, 0, 1, 0), value=1.0)
            self.strict = [given.probe @ source.mT * self.before for source in self.sources]
            self.rows = [given.read, given.probe]

    def _weighed(self, products: Float[Tensor, "batch group dst src"]) -> Float[Tensor, "batch head dst src"]:
        """What a group has in common, with the decays of each of its heads."""
        share = self.given.share
        if share == 1:
            return products * self.between
        return (self.between.unflatten(1, (-1, share)) * products.unsqueeze(2)).flatten(1, 2)

    def _times(self, x: Tensor, decay: Float[Tensor, "batch group pos heads"]) -> Tensor:
        """x [b, g, C, (r v)] * decay [b, g, C, r]"""
        share = self.given.share
        return x * decay if share == 1 else (x.unflatten(-1, (share, -1)) * decay.unsqueeze(-1)).flatten(-2)

    def early(self, x: Tensor, kind: int = 0) -> Tensor:
        return self._times(x, self.since if kind == 0 else self.since_before)

    def late(self, x: Tensor) -> Tensor:
        return self._times(x, self.until)

    @property
    def spread(self) -> Tensor:
        share = self.given.share
        if share == 1:
            return self.decay.unsqueeze(-1)
        width = self.given.value.shape[-1] // share
        return self.decay.unsqueeze(-1).expand(*self.decay.shape, width).flatten(-2).unsqueeze(-2)

    def _summed(self, x: Float[Tensor, "batch group pos value"]) -> Float[Tensor, "batch group pos heads"]:
        """The sum over the values of each head."""
        return x.unflatten(-1, (self.given.share, -1)).sum(-1)

    def own_gradients(
        self, out: Tensor, inner: list[Tensor], y: Tensor | None, state: State, ahead: State, found: list[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor], Tensor | None]:
        given, share = self.given, self.given.share
        # M and its gradient, entry by entry, weighed with the decays between: [b, h, C, C].
        heads = self.by_head(out)
        pairs = [(heads @ self.by_head(u).mT) * self.between for u in inner]
        weighed = self.early(out)
        of_read = weighed @ state.mT
        of_sources = [self.late(u) @ ahead.mT for u in inner]
        # What a decay multiplies: rows that look at S_0 across it, sources that Z looks at, pairs, and S_0 on its way to S_C.
        rows = self._summed(weighed * (given.read @ state))
        late = _plus([self._summed(u * seen) for u, seen in zip(inner, found, strict=True)])
        across = _plus([_times_spread(pair, raw, share) for pair, raw in zip(pairs, self.raw, strict=True)])
        for kind, (pair, source) in enumerate(zip(pairs, self.sources, strict=True)):
            together = _gathered(pair, share)
            of_read = of_read + together @ source
            of_sources[kind] = of_sources[kind] + together.mT @ given.read
        whole = (ahead * state).sum(-2).unflatten(-1, (share, -1)).sum(-1)  # [b, g, r]
        of_decay = _across(across).unflatten(1, (-1, share)).mT + _from(rows) + _before(late)
        of_decay = of_decay + (self.decay * whole).unsqueeze(-2)
        of_probe = None
        if y is not None:
            assert given.probe is not None
            strict = [(y @ u.mT) * self.before for u in inner]
            of_probe = -((y * self.since_before) @ state.mT)
            seen = (given.probe * of_probe).sum(-1, keepdim=True)
            across = _plus([pair * (given.probe @ s.mT) for pair, s in zip(strict, self.sources, strict=True)])
            for kind, (pair, source) in enumerate(zip(strict, self.sources, strict=True)):
                of_probe = of_probe - pair @ source
                of_sources[kind] = of_sources[kind] - pair.mT @ given.probe
            of_decay = of_decay - _across(across, -1).unsqueeze(-1) + F.pad(_from(seen)[..., 1:, :], (0, 0, 0, 1))
        return of_decay, of_read, of_sources, of_probe


def solve(lower: Tensor, right: Tensor, upper: bool = False) -> Tensor:
    """(I + T)^-1 right, T strictly below the diagonal (above it: `upper`)."""
    return torch.linalg.solve_triangular(lower, right, upper=upper, unitriangular=True)


def plus_product_(
    total: Float[Tensor, "batch head m v"], x: Float[Tensor, "batch head m n"], y: Float[Tensor, "batch head n v"]
) -> None:
    """total += x @ y, in one operation; `total` is contiguous."""
    total.view(-1, *total.shape[2:]).baddbmm_(x.flatten(0, 1), y.flatten(0, 1))


def _between(cum: Float[Tensor, "batch head pos"], dtype: torch.dtype) -> Float[Tensor, "batch head pos pos"]:
    """exp(cum_i - cum_j) for j <= i, else 0."""
    ago = (cum.unsqueeze(-1) - cum.unsqueeze(-2)).to(dtype)
    # Above the diagonal the difference is at least 0, and of no use.
    return torch.exp(ago.clamp(max=0)).tril() if torch.is_grad_enabled() else ago.clamp_(max=0).exp_().tril_()


def _of_rows(x: Float[Tensor, "batch ..."], number: int) -> tuple[Tensor, ...]:
    """[(row chunk), ...] -> of each chunk [row, ...]."""
    return x.unflatten(0, (-1, number)).unbind(1)


def _plus(terms: list[Tensor]) -> Tensor:
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]


def _gathered(x: Tensor, share: int) -> Tensor:
    """[b, h, ...] -> [b, g, ...]: summed over the heads of a group."""
    return x if share == 1 else x.unflatten(1, (-1, share)).sum(2)


def _times_spread(x: Float[Tensor, "batch head m n"], y: Float[Tensor, "batch group m n"], share: int) -> Tensor:
    """x of each head times what its group has."""
    return x * y if share == 1 else (x.unflatten(1, (-1, share)) * y.unsqueeze(2)).flatten(1, 2)


def _across(pairs: Float[Tensor, "batch head dst src"], diagonal: int = 0) -> Float[Tensor, "batch head pos"]:
    """At each position t the sum of the pairs (i, j) that its decay lies between: j < t <= i (diagonal -1: t < i)."""
    size = pairs.shape[-1]
    before = pairs.new_ones(size, size).triu(1)  # j < t
    return (pairs @ before).tril(diagonal).sum(-2)


def _before(x: Float[Tensor, "batch group pos heads"]) -> Tensor:
    """The sum of all entries before each position."""
    return F.pad(x.cumsum(-2)[..., :-1, :], (0, 0, 1, 0))


def _from(x: Float[Tensor, "batch group pos heads"]) -> Tensor:
    """The sum of each position's entry and all behind it."""
    return x.flip(-2).cumsum(-2).flip(-2)

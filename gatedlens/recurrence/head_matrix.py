"""HeadScan: the matrix of heads with matrix states, one for each head; no channel and no key axis on the whole of it.

    S[i, j] = read_i . E(i, j) key_j amount_j                    E(i, j) the product of the transitions of the steps j + 1 ... i
    a transition of a step is diag(decay) - erase probe^T        without a delta rule: its decay

    HeadScan.of(terms, width).summed(left, right, taps)          # sum over the channels of all heads

The matrix is made patch by patch (head_blocks.py), each of some rows, some sources and one head. b batch, l pos (i row, j
source), h head, v value, k key, K taps; a channel is (head value), and all channels of a head have the same matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gatedlens.errors import InputError
from gatedlens.recurrence.chunk import GONE
from gatedlens.recurrence.chunks import chunked
from gatedlens.recurrence.head_blocks import Patch, patches
from gatedlens.recurrence.matrix import ScanMatrix
from gatedlens.recurrence.terms import Terms
from gatedlens.recurrence.tiles import add_absolute, add_band, shifted


@dataclass(frozen=True)
class HeadScan(ScanMatrix):
    """`HeadScan.of(terms, 64)`: S of each head. `channels` are those that it is asked for, as numbers of (head value)."""

    terms: Terms
    width: int  # values of a head
    channels: Int[Tensor, " channel"]

    @classmethod
    def of(cls, terms: Terms, width: int) -> HeadScan:
        """The scan of all channels of heads that are `width` wide."""
        return cls(terms.even(), width, torch.arange(terms.heads * width, device=terms.key.device))

    @property
    def length(self) -> int:
        return self.terms.log_decay.shape[1]

    @property
    def heads(self) -> Int[Tensor, " channel"]:
        """The head of each channel."""
        return self.channels // self.width

    def select(self, channels: Tensor | slice | list[int]) -> HeadScan:
        """The scan of some channels."""
        return replace(self, channels=self.channels[channels])

    def recurrence(self) -> Terms:
        """The terms of all heads, whichever channels it is asked for."""
        return self.terms

    def rewritten(self, key: Float[Tensor, "group key"]) -> HeadScan:
        """The scan of terms whose every step writes a 1 at this key."""
        every = key.to(self.terms.key).expand(*self.terms.key.shape[:2], -1, -1)
        return replace(self, terms=self.terms._replace(key=every, amount=None).even())

    def undecayed(self, own: Bool[Tensor, "batch pos"]) -> HeadScan:
        """The decay of a step of `own` is put off to the next: rows of `own` lack it; it is meant for these rows alone.

        Under a delta rule what such a step takes from the state is its decay and its erase, and neither is in the row: it reads
        the state before it, and its own write. There is one such row in each of the batch.
        """
        if self.terms.has_delta_rule:
            return self.unstepped(own)
        total = self.terms.log_decays().double().clamp(min=GONE).cumsum(1)
        before = torch.cat([torch.zeros_like(total[:, :1]), total[:, :-1]], dim=1)
        moved = torch.where(own[..., None, None], before, total)
        steps = torch.diff(moved, dim=1, prepend=torch.zeros_like(moved[:, :1]))
        return replace(self, terms=self.terms._replace(log_decay=steps.to(self.terms.key), rate=None, fresh=None))

    def unstepped(self, own: Bool[Tensor, "batch own"], steps: int = 1) -> HeadScan:
        """`scan.unstepped(own)`: the scan whose steps `own` decay and erase nothing; of `steps` a position, all of its own."""
        if bool((own.sum(1) > 1).any()):
            raise InputError(
                "A delta rule without a row's own step: of one row in each of the batch, and there are several."
            )
        step, terms = own.repeat_interleave(steps, dim=1)[..., None, None], self.terms
        assert terms.erase is not None
        erase, log = terms.erase.masked_fill(step, 0), terms.log_decays().masked_fill(step, 0)
        free = terms._replace(log_decay=log, erase=erase, probe=terms.probes(), rate=None, fresh=None)
        return replace(self, terms=free)

    def unerased(self, src: Float[Tensor, "batch pos one"]) -> HeadScan:
        """Their erase is 0, and their decay and their write are as they were."""
        if self.terms.erase is None:
            return self
        return replace(self, terms=self.terms._replace(erase=self.terms.erase * (1 - src).unsqueeze(-1)))

    # -- as an operator ------------------------------------------------------------------------------------------

    def apply(
        self, u: Float[Tensor, "batch pos channel"], start: Float[Tensor, "batch channel key"] | None = None
    ) -> Float[Tensor, "batch pos channel"]:
        """S u (+ what the start state contributes), by the recurrence."""
        whole = self._every_channel(u, 2).unflatten(2, (-1, self.width))
        if start is None:
            state = u.new_zeros(u.shape[0], self.terms.heads, self.width, self.terms.key.shape[3])
        else:
            state = self._every_channel(start, 1).unflatten(1, (-1, self.width))
        return chunked(self.terms, whole, state)[0].flatten(2)[..., self.channels]

    def apply_transposed(self, g: Float[Tensor, "batch pos channel"]) -> Float[Tensor, "batch pos channel"]:
        """S^T g: a recurrence of the same form, from the end."""
        whole = self._every_channel(g, 2).unflatten(2, (-1, self.width))
        return self.terms.value(self._pulled_back(whole)).flatten(2)[..., self.channels]

    def _pulled_back(self, g: Float[Tensor, "batch pos head value"]) -> Float[Tensor, "batch pos head value"]:
        """The transpose, the amount left out: read and key change places, and so do erase and probe, a step later."""
        terms, backward = self.terms, _from_the_end(self.terms)
        state = g.new_zeros(g.shape[0], terms.heads, g.shape[3], terms.key.shape[3])
        return chunked(backward, g.flip(1), state)[0].flip(1)

    def _every_channel(self, x: Tensor, axis: int) -> Tensor:
        """`x` with all channels along `axis`, zeros where it has none."""
        total = self.terms.heads * self.width
        if len(self.channels) == total:
            return x
        shape = [*x.shape[:axis], total, *x.shape[axis + 1 :]]
        return x.new_zeros(shape).index_copy(axis, self.channels, x)

    def seen(self, i: Int[Tensor, " batch"]) -> Float[Tensor, "batch src channel"]:
        """S[i_b, :] for a row of its own in each batch element: the read of i, carried back to every source."""
        here = F.one_hot(i, self.length).to(self.terms.read.dtype)  # b l
        g = here[:, :, None, None].expand(-1, -1, self.terms.heads, 1).contiguous()
        return self.terms.value(self._pulled_back(g)).squeeze(-1)[..., self.heads]

    # -- the matrix ----------------------------------------------------------------------------------------------

    def by_head(self, heads: list[int]) -> Float[Tensor, "batch some dst src"]:
        """S of some heads."""
        length, terms = self.length, self.terms
        total = zeros((terms.key.shape[0], len(heads), length, length), *terms)
        for patch in patches(terms):
            for place, head in enumerate(heads):
                total[:, place, patch.rows, patch.sources] += patch.of(head)
        return total if terms.amount is None else total * terms.amount.mT[:, heads].unsqueeze(-2)

    def dense(self) -> Float[Tensor, "batch channel dst src"]:
        """S channel by channel."""
        heads, which = self.heads.unique(return_inverse=True)
        return self.by_head(heads.tolist())[:, which]

    def summed(
        self,
        left: Float[Tensor, "batch pos channel"],
        right: Float[Tensor, "batch pos channel"],
        taps: Float[Tensor, "channel tap"],
    ) -> Float[Tensor, "batch dst src"]:
        """sum_c left_i[c] * sum_k S[i, j + k] * right_{j + k}[c] * taps[c, K - 1 - k]: channels summed, conv included."""
        width, members = taps.shape[1], self._members()
        if self.terms.amount is not None:
            right = right * self.terms.amount[..., self.heads]
        total = zeros((left.shape[0], self.length, self.length + width - 1), left, right, taps, *self.terms)
        for patch in patches(self.terms):
            for head, mine in members:
                self._add(total, patch, patch.of(head), left[..., mine], right[..., mine], taps[mine])
        return total[..., width - 1 :]

    def absolute(
        self,
        left: Float[Tensor, "batch pos channel"],
        right: Float[Tensor, "batch pos channel"],
        taps: Float[Tensor, "channel tap"],
        skip: Float[Tensor, " channel"],
    ) -> Float[Tensor, "batch dst src"]:
        """sum_c |left_i[c] * sum_k (S + diag(skip_c))[i, j + k] * right_{j + k}[c] * taps[c, K - 1 - k]|, tile by tile; a
        head's matrix at a time."""
        written = right if self.terms.amount is None else right * self.terms.amount[..., self.heads]
        total = zeros((left.shape[0], self.length, self.length), left, right, taps, skip, *self.terms)
        near = zeros((left.shape[0], taps.shape[1], self.length), left, right, taps, skip, *self.terms)
        for head, mine in self._members():
            S = _of_one(self.terms, head)
            weights, bare = (shifted(x[..., mine], taps[mine]) for x in (written, right))
            add_absolute(total, S, left[..., mine].abs(), weights)
            add_band(near, S, left[..., mine], weights, bare * skip[mine])
        for k in range(min(taps.shape[1], self.length)):  # where diag(skip) is, whatever the tiles made of it
            total.diagonal(-k, -2, -1).copy_(near[:, k, k:])
        return total

    def own(self) -> Float[Tensor, "batch pos channel"]:
        """read_i . key_i (amount_i): a delta rule erases before it writes."""
        terms = self.terms
        met = (terms.of_heads(terms.read) * terms.of_heads(terms.key)).sum(-1, keepdim=True)
        return terms.value(met).squeeze(-1)[..., self.heads]

    @staticmethod
    def _add(total: Tensor, patch: Patch, S: Tensor, left: Tensor, right: Tensor, taps: Tensor) -> None:
        """Add a head's patch to `total`, whose columns begin K - 1 places before the first position."""
        rows, (first, last), width = left[:, patch.rows], (patch.sources.start, patch.sources.stop), taps.shape[1]
        for k in range(width):
            # What the channels make of the entry (i, j + k) before it is weighed with S: one product for all of the head.
            weights = rows @ (right[:, patch.sources] * taps[:, width - 1 - k]).mT
            begin = width - 1 - k
            total[:, patch.rows, first + begin : last + begin] += weights.mul_(S)

    def _members(self) -> list[tuple[int, Tensor | slice]]:
        """(head, where its channels stand among `channels`), heads ascending; a slice where they stand together."""
        heads = self.heads
        found: list[tuple[int, Tensor | slice]] = []
        for head in heads.unique().tolist():
            places = (heads == head).nonzero().flatten()
            first, count = int(places[0]), len(places)
            together = int(places[-1]) - first + 1 == count
            found.append((head, slice(first, first + count) if together else places))
        return found


def _of_one(terms: Terms, head: int) -> Float[Tensor, "batch dst src"]:
    """S of one head, the amounts left out: made of what that head alone has."""
    one = slice(head, head + 1)
    key, read = (
        x[:, :, slice(head // terms.sharing(x), head // terms.sharing(x) + 1)] for x in (terms.key, terms.read)
    )
    erase = None if terms.erase is None else terms.erase[:, :, one]
    alone = terms._replace(
        log_decay=terms.log_decay[:, :, one],
        key=key,
        read=read,
        amount=None,
        erase=key if terms.erase is terms.key else erase,
        probe=None if terms.probe is None else terms.probe[:, :, one],
        rate=None if terms.rate is None else terms.rate[one],
    )
    return HeadScan.of(alone, 1).by_head([0]).squeeze(1)


def zeros(shape: tuple[int, ...], *made_of: Tensor | None) -> Float[Tensor, ...]:
    """Zeros to be written into, with every axis that a transform hides in any of the tensors."""
    corners = [torch.zeros_like(x[(0,) * x.ndim]) for x in made_of if x is not None]
    return reduce(torch.add, corners).expand(shape).clone()


def _from_the_end(terms: Terms) -> Terms:
    """The terms of the transpose, in the order of the positions from the end.

    From the end a position meets the transition of the step behind it, transposed: diag(decay) - probe erase^T.
    """

    def behind(x: Tensor | None) -> Tensor | None:
        """What belongs to the step behind each position, from the end: the last position has none behind it."""
        return None if x is None else torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:].flip(1)], dim=1)

    log = behind(terms.log_decays())
    assert log is not None
    key, read = terms.read.flip(1), terms.key.flip(1)
    return Terms(log, key, read, erase=behind(terms.probes()), probe=behind(terms.erase))

"""SideBySide: several scans next to one another, each over channels of its own: what stands in a layer whose groups of channels
select apart, each by keys and reads that its channels share (Zamba's heads).

    SideBySide.of((DecayScan.of(first), DecayScan.of(second)))          # channels: those of the first, then those of the second

b batch, l pos (i row, j source), c channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gatedlens.recurrence.head_matrix import HeadScan
from gatedlens.recurrence.matrix import ScanMatrix
from gatedlens.recurrence.terms import Terms


@dataclass(frozen=True)
class SideBySide(ScanMatrix):
    """The scans `parts` of `sizes` channels; channel c is number `order[c]` of those of all parts in a row."""

    parts: tuple[ScanMatrix, ...]
    sizes: tuple[int, ...]
    order: Int[Tensor, " channel"]

    @classmethod
    def of(cls, parts: Sequence[ScanMatrix], sizes: Sequence[int], device: torch.device) -> SideBySide:
        """`SideBySide.of((first, second), (16, 16), u.device)`."""
        return cls(tuple(parts), tuple(sizes), torch.arange(sum(sizes), device=device))

    @property
    def length(self) -> int:
        return self.parts[0].length

    def select(self, channels: Tensor | slice | list[int]) -> SideBySide:
        """The scan of some channels."""
        places = self.order[channels]
        ends = torch.tensor(self.sizes, device=places.device).cumsum(0)
        part = torch.searchsorted(ends, places, right=True)
        local = places - (ends - torch.tensor(self.sizes, device=places.device))[part]
        behind = torch.sort(part, stable=True).indices
        chosen = [local[behind][part[behind] == number].tolist() for number in range(len(self.parts))]
        kept = [(scan.select(own), len(own)) for scan, own in zip(self.parts, chosen, strict=True) if own]
        return SideBySide(tuple(scan for scan, _ in kept), tuple(n for _, n in kept), behind.argsort())

    def _apart(self, x: Tensor, axis: int) -> Sequence[Tensor]:
        return x.index_select(axis, self.order.argsort()).split(self.sizes, axis)

    def _together(self, found: Sequence[Tensor], axis: int) -> Tensor:
        return torch.cat(list(found), axis).index_select(axis, self.order)

    def apply(
        self, u: Float[Tensor, "batch pos channel"], start: Float[Tensor, "batch channel state"] | None = None
    ) -> Float[Tensor, "batch pos channel"]:
        """S u (+ what the start state contributes)."""
        starts = [None] * len(self.parts) if start is None else self._apart(start, 1)
        given = zip(self.parts, self._apart(u, 2), starts, strict=True)
        return self._together([scan.apply(own, begin) for scan, own, begin in given], 2)

    def apply_transposed(self, g: Float[Tensor, "batch pos channel"]) -> Float[Tensor, "batch pos channel"]:
        """S^T g"""
        given = zip(self.parts, self._apart(g, 2), strict=True)
        return self._together([scan.apply_transposed(own) for scan, own in given], 2)

    def undecayed(self, own: Bool[Tensor, "batch pos"]) -> SideBySide:
        """As of each."""
        return replace(self, parts=tuple(scan.undecayed(own) for scan in self.parts))

    def seen(self, i: Int[Tensor, " batch"]) -> Float[Tensor, "batch src channel"]:
        """S[i_b, :] for a row of its own in each batch element; zeros behind it."""
        return self._together([scan.seen(i) for scan in self.parts], 2)

    def dense(self) -> Float[Tensor, "batch channel dst src"]:
        """S channel by channel."""
        return self._together([scan.dense() for scan in self.parts], 1)

    def own(self) -> Float[Tensor, "batch pos channel"] | None:
        """S[i, i] channel by channel; None where one of them cannot say."""
        found = [scan.own() for scan in self.parts]
        said = [one for one in found if one is not None]
        return self._together(said, 2) if len(said) == len(found) else None

    def contracted(
        self, left: Float[Tensor, "batch pos channel"], right: Float[Tensor, "batch pos channel"]
    ) -> Float[Tensor, "batch dst src"]:
        """sum_c left_i[c] * S[i, j][c] * right_j[c]"""
        given = zip(self.parts, self._apart(left, 2), self._apart(right, 2), strict=True)
        return reduce(torch.add, (scan.contracted(a, b) for scan, a, b in given))

    def summed(
        self,
        left: Float[Tensor, "batch pos channel"],
        right: Float[Tensor, "batch pos channel"],
        taps: Float[Tensor, "channel tap"],
    ) -> Float[Tensor, "batch dst src"]:
        """Channels summed, the conv included."""
        return reduce(torch.add, (scan.summed(*own) for scan, own in self._weighted(left, right, taps)))

    def folded(
        self,
        left: Float[Tensor, "batch pos channel"],
        right: Float[Tensor, "batch pos channel"],
        taps: Float[Tensor, "channel tap"],
    ) -> Float[Tensor, "batch channel dst src"]:
        """What `summed` sums, channel by channel."""
        return self._together([scan.folded(*own) for scan, own in self._weighted(left, right, taps)], 1)

    def _weighted(self, left: Tensor, right: Tensor, taps: Tensor) -> list[tuple[ScanMatrix, tuple[Tensor, ...]]]:
        given = zip(self._apart(left, 2), self._apart(right, 2), self._apart(taps, 0), strict=True)
        return list(zip(self.parts, given, strict=True))

    def rewritten(self, key: Float[Tensor, "group key"]) -> ScanMatrix:
        """Of the recurrence of all channels, each a head."""
        terms = self.recurrence()
        return super().rewritten(key) if terms is None else HeadScan.of(terms, 1).rewritten(key)

    def recurrence(self) -> Terms | None:
        """The recurrence of all channels, each a head with its own key and read."""
        found = [scan.recurrence() for scan in self.parts]
        terms = [one for one in found if one is not None]
        if len(terms) < len(found):
            return None

        def together(field: Callable[[Terms], Tensor | None], axis: int) -> Tensor | None:
            values = [value for value in map(field, terms) if value is not None]
            return self._together(values, axis) if len(values) == len(terms) else None

        log_decay = together(lambda one: one.log_decay, 2)
        key, read = (together(of, 2) for of in (lambda one: one.of_heads(one.key), lambda one: one.of_heads(one.read)))
        assert log_decay is not None and key is not None and read is not None
        amount, rate = together(lambda one: one.amount, 2), together(lambda one: one.rate, 0)
        return Terms(log_decay, key, read, amount, rate=rate, fresh=terms[0].fresh)

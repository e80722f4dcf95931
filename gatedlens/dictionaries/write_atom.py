"""WriteAtom: a rank-one piece of what a layer writes into its state, value key^T, put in, taken out or exchanged.

    atom = gl.dictionaries.WriteAtom.of(cache, layer=0, pos=4, head=2)              # what position 4 writes there
    other = gl.dictionaries.WriteAtom.of(cache, layer=0, pos=9, head=2)
    with atom.substituted(other, pos=4).on(model): ...       # position 4 writes the other's value at the other's key
    with atom.removed(pos=4).on(model): ...
    atom.scan(cache, pos=4, at=-1)          # batch channel: what it puts into the scan of the last position, before any run

The state carries it as it carries any write: it decays, and a delta rule erases of it. So what a later position reads of it is
known in closed form, with read, decays, erases and probes those of a run without the edit (they do not depend on the layer's
own writes):

    scan_at += amount (read_at . E(at, pos) key) value          E the product of the transitions of the steps pos + 1 ... at

exactly. `output` goes on through what follows in the layer, gates and norms held as they were: exact where no norm stands
behind the scan; `logits` goes on through the final norm, held as well, to the logits that it adds directly. b batch, h head, v
value, k key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gatedlens.address.layers import layer_of
from gatedlens.address.point import Point
from gatedlens.address.positions import Positions
from gatedlens.attention.layer import ImplicitAttention
from gatedlens.errors import CheckpointError, InputError, PointError
from gatedlens.markup import card
from gatedlens.model.base import HookedModel
from gatedlens.model.cache import ActivationCache
from gatedlens.model.intervention import Intervention, edit
from gatedlens.options import checked, is_number
from gatedlens.recurrence.factors import Factors
from gatedlens.recurrence.operator import branch_of
from gatedlens.runs.saved import read_saved, write_saved

__all__ = ["WriteAtom"]

# For editors: what is none gets an error that says more.
if TYPE_CHECKING:
    Atom: TypeAlias = "WriteAtom"
else:
    Atom = Any

WRITE, SAVED = "hook_write", "WriteAtom"


@dataclass(frozen=True, eq=False)
class WriteAtom:
    """`WriteAtom("blocks.0.mixer.hook_write", value, key, head=2)`: value key^T, added to what the layer writes.

    point: a `hook_write`. value: of a head [value]; where heads are channels [channel]. key: [key]; None where a state is one
    number a channel. head: which, where the write has heads. share: of a matrix that it was made of, how much of its squares
    it holds.
    """

    point: str
    value: Float[Tensor, " value"]
    key: Float[Tensor, " key"] | None = None
    head: int | None = None
    share: float = 1.0
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        head = "" if self.head is None else f" head {self.head}"
        sizes = f"value {len(self.value)}" + ("" if self.key is None else f" x key {len(self.key)}")
        return f"WriteAtom({self.point}{head}, {sizes}, norm {self.norm:.4g})"

    def _repr_html_(self) -> str:
        facts = {"head": self.head, "norm": self.norm, "share": self.share, **self.facts}
        return card(f"WriteAtom: {self.point}", {name: said for name, said in facts.items() if said is not None})

    @property
    def norm(self) -> float:
        """Its Frobenius norm, |value| |key|."""
        return float(self.value.norm() * (1.0 if self.key is None else self.key.norm()))

    @checked
    def __mul__(self, factor: int | float) -> WriteAtom:
        """`atom * -2`"""
        return replace(self, value=self.value * factor) if is_number(factor) else NotImplemented

    __rmul__ = __mul__

    # -- where atoms come from -----------------------------------------------------------------------------------

    @staticmethod
    @checked
    def of(cache: ActivationCache, layer: int, pos: int, head: int | None = None, row: int = 0) -> WriteAtom:
        """`WriteAtom.of(cache, layer=0, pos=4, head=2)`: what a position of a row writes into one head.

        That is of rank one in every layer with a state but RWKV-4's and those that take several steps a position, of which the
        nearest is given (`share` says how near). cache: with the layer's hook_write, which is lazy. PointError where it is not
        there.
        """
        index = layer_of(cache.model, layer)
        point = f"blocks.{index}.mixer.{WRITE}"
        batch = cache[point]
        mask = cache.mask
        real = torch.ones(batch.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        if not -len(real) <= row < len(real):
            raise InputError(f"row={row}: this cache has {len(real)} rows.")
        places = real[row].nonzero().flatten()
        if not -len(places) <= pos < len(places):
            raise InputError(f"pos={pos}: row {row} has {len(places)} positions.")
        written = batch[row, places[pos]]
        facts = {"model": cache.model.cfg.model_name, "pos": pos, "row": row}
        return WriteAtom.nearest(written if head is None else written[head], point, head)._told(facts)

    @staticmethod
    @checked
    def nearest(matrix: Float[Tensor, "*value_key"], point: str, head: int | None = None) -> WriteAtom:
        """`WriteAtom.nearest(matrix, "blocks.0.mixer.hook_write", head=2)`: the rank-one matrix nearest to one [value key].

        Of a decoder row of a dictionary of writes, say: `dictionary.W_dec[17].view(value, key)`. Eckart and Young 1936.
        """
        if matrix.ndim == 1:
            return WriteAtom(point, matrix, None, head)
        if matrix.ndim != 2:
            raise InputError(
                f"This write is {list(matrix.shape)}: say which head, head=0, since an atom is of one [value key]."
            )
        u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
        root, total = s[0].sqrt(), s.square().sum()
        share = float(s[0].square() / total) if total > 0 else 1.0
        return WriteAtom(point, (u[:, 0] * root).to(matrix), (v[0] * root).to(matrix), head, share)

    def _told(self, facts: Mapping[str, Any]) -> WriteAtom:
        return replace(self, facts={**self.facts, **facts})

    # -- as an edit ----------------------------------------------------------------------------------------------

    def _matrix(self, like: Tensor, point: Point) -> Tensor:
        """value key^T at its head, zeros at the others, as an activation of the point with axes of 1 for batch and pos."""
        one = self.value if self.key is None else torch.outer(self.value, self.key)
        shape = list(like.shape[2:])
        if self.head is None:
            if list(one.shape) != shape:
                raise InputError(f"This atom is {list(one.shape)}; {self.point} ({point.axes}) is {shape} a position.")
            return one.to(like).unsqueeze(0).unsqueeze(0)
        if "head" not in point.dims or list(one.shape) != shape[1:] or not -shape[0] <= self.head < shape[0]:
            raise InputError(
                f"This atom is {list(one.shape)} of head {self.head}; {self.point} ({point.axes}) is {shape} a position."
            )
        whole = like.new_zeros(1, 1, *shape)
        whole[0, 0, self.head] = one.to(like)
        return whole

    def _part(self, x: Tensor, point: Point) -> Float[Tensor, "batch pos"]:
        """How much of it each write holds: <write, value key^T> / |value key^T|^2."""
        mine = self._matrix(x, point)
        return (x * mine).flatten(2).sum(-1) / mine.square().sum().clamp(min=torch.finfo(x.dtype).tiny)

    def _edit(self, change: Any, pos: Positions) -> Intervention:
        """write += change(write)"""
        return edit(self.point, lambda x, point: x + change(x, point.point), **({} if pos is None else {"pos": pos}))

    @checked
    def added(self, pos: Positions = None, amount: int | float = 1.0) -> Intervention:
        """`with atom.added(pos=4, amount=2).on(model): ...`: so many times the atom is written besides; pos: None: everywhere."""
        return self._edit(lambda x, point: amount * self._matrix(x, point), pos)

    @checked
    def removed(self, pos: Positions = None) -> Intervention:
        """`with atom.removed(pos=4).on(model): ...`: what the writes hold of it (`coefficient`) is taken out."""
        return self._edit(lambda x, point: -_times(self._part(x, point), self._matrix(x, point)), pos)

    @checked
    def substituted(self, other: Atom, pos: Positions = None) -> Intervention:
        """`with atom.substituted(other, pos=4).on(model): ...`: as much of another atom as the writes hold of this one, in its
        place.

        InputError for an atom of another point.
        """
        if not isinstance(other, WriteAtom):
            raise InputError(f"{other!r:.80} is no atom: WriteAtom.of(cache, layer, pos, head) is one.")
        if other.point != self.point:
            raise InputError(f"{other!r} is of another point than {self!r}: it cannot stand in its place.")
        return self._edit(
            lambda x, point: _times(self._part(x, point), other._matrix(x, point) - self._matrix(x, point)), pos
        )

    def coefficient(self, cache: ActivationCache) -> Float[Tensor, "batch pos"]:
        """`atom.coefficient(cache)`: [batch, pos], how much of it each position writes: <write, atom> / |atom|^2."""
        return self._part(cache[self.point], cache.model.names.points[self.point])

    # -- what becomes of it --------------------------------------------------------------------------------------

    @checked
    def scan(
        self, cache: ActivationCache, pos: Positions, at: Positions = -1, amount: int | float = 1.0
    ) -> Float[Tensor, "batch channel"]:
        """`atom.scan(cache, pos=4, at=-1)`: [batch, channel], by how much hook_scan at a position changes if so many times the
        atom is added to the write of `pos`. Exact, in closed form.

        cache: of a run without the edit, with the layer's `attention_points` (every point that is not lazy will do). pos, at: one
        position, or one a row. InputError for a layer whose state is no sum of writes that decay (RWKV-4's; attention), and
        for one that scans both ways.
        """
        return self._reached(cache, pos, at, amount)[0]

    @checked
    def output(
        self, cache: ActivationCache, pos: Positions, at: Positions = -1, amount: int | float = 1.0
    ) -> Float[Tensor, "batch d_model"]:
        """`atom.output(cache, pos=4, at=-1)`: [batch, d_model], by how much what the mixer puts out at a position changes,
        gates and norms held: exact where no norm is behind the scan. The rest as in `scan`.
        """
        scan, attention, factors, place = self._reached(cache, pos, at, amount)
        rows = torch.arange(len(scan), device=scan.device)
        if factors.groups is not None:  # a norm behind takes the mean of each head off
            each = scan.unflatten(1, (factors.groups, -1))
            scan = (each - each.mean(-1, keepdim=True)).flatten(1)
        gated = branch_of(factors).gate[rows, place] * scan
        writing = attention.writing
        return writing.at(attention.place(at, "at"), gated @ writing.weight.to(gated).T)

    @checked
    def logits(
        self, cache: ActivationCache, pos: Positions, at: Positions = -1, amount: int | float = 1.0
    ) -> Float[Tensor, "batch d_vocab"]:
        """`atom.logits(cache, pos=4, at=-1)[:, token]`: [batch, d_vocab], what it adds to the logits of a position directly,
        past the layers behind; the final norm's scale held. In the last layer that is all it does, but for what the norms do.

        The rest as in `scan`; PointError for a cache without `ln_final.hook_scale`.
        """
        added, model = self.output(cache, pos, at, amount), cache.model
        attention = ImplicitAttention.of(cache, self._layer(model))
        place = attention.place(at, "at")
        rows = torch.arange(len(added), device=added.device)
        norm = model.ln_final
        scaled = norm.scaled(added, lambda name: cache[f"ln_final.{name}"][rows, place])
        gain = norm.gain_behind
        return (scaled if gain is None else scaled * gain.to(added)) @ model.W_U.to(added)

    def _layer(self, model: HookedModel) -> int:
        name = model.names.find(self.point).name
        if not name.endswith(f".mixer.{WRITE}"):
            raise PointError(f"{self.point}: what becomes of an atom is known of a mixer's own {WRITE}.")
        return int(name.split(".")[1])

    def _reached(
        self, cache: ActivationCache, pos: Positions, at: Positions, amount: float
    ) -> tuple[Float[Tensor, "batch channel"], ImplicitAttention, Factors, Int[Tensor, " batch"]]:
        """The change of the scan, the layer's attention and factors, and where among packed positions `at` is."""
        attention = ImplicitAttention.of(cache, self._layer(cache.model))
        scans = [one for one in attention.branches if one.scan is not None and not one.reverse]
        if len(scans) != len([one for one in attention.branches if one.scan is not None]):
            raise InputError(
                f"{self.point}: a layer that scans both ways has two states, and what reads an atom is not one of them."
            )
        factors, rank = scans[0], attention.padding.rank
        x, rows = factors.x, torch.arange(len(factors.x), device=factors.x.device)
        src, dst = (attention.place(given, name) for given, name in ((pos, "pos"), (at, "at")))
        src, dst = (place if rank is None else rank[rows, place] for place in (src, dst))
        key = x.new_ones(1, 1) if self.key is None else self.key.to(x).unsqueeze(0)
        assert factors.scan is not None
        found = factors.scan.rewritten(key).seen(dst)[rows, src]  # what `at` finds of a 1 at this key
        channels = x.shape[2]
        value = self.value.to(x)
        if self.head is not None:
            spread = x.new_zeros(channels // len(value), len(value))
            spread[self.head] = value
            value = spread.flatten()
        return amount * found * value, attention, factors, dst

    # -- on disk -------------------------------------------------------------------------------------------------

    @checked
    def save(self, path: str | Path) -> Path:
        """`atom.save("atom.safetensors")`: value and key as safetensors, all else in the header; returns the path."""
        tensors = {"value": self.value} if self.key is None else {"value": self.value, "key": self.key}
        said = {"point": self.point, "head": self.head, "share": self.share, "facts": dict(self.facts)}
        return write_saved(path, SAVED, tensors, said)

    @staticmethod
    def load(path: str | Path) -> WriteAtom:
        """`WriteAtom.load("atom.safetensors")`: what `save` wrote. CheckpointError for a file that holds none."""
        tensors, said = read_saved(path, SAVED)
        if "value" not in tensors:
            raise CheckpointError(f"{path} is no saved {SAVED}: it holds {', '.join(list(tensors)[:5])}.")
        head = said.get("head", "a number or null", lambda v: v is None or isinstance(v, int))
        share = said.get("share", "a number", lambda v: isinstance(v, float | int))
        return WriteAtom(said.word("point"), tensors["value"], tensors.get("key"), head, share, said.fields("facts"))


def _times(amounts: Float[Tensor, "batch pos"], matrix: Tensor) -> Tensor:
    """Each position's own multiple."""
    return amounts.reshape(*amounts.shape, *[1] * (matrix.ndim - 2)) * matrix

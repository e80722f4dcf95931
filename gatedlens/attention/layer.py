"""ImplicitAttention: one layer's operator; `help(gl.attention)` shows what it offers.

o = A x + r with A = diag(gate) (S + diag(skip)) diag(act) M: see `factors.py`. Nothing of size [state, pos, pos] is built: views
are sums over blocks of the scan's matrix, rows and columns one pass of it. i is a destination, j a source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from gatedlens.address.entries import Index, numbers
from gatedlens.address.layers import layer_of
from gatedlens.address.positions import Positions, one_a_row
from gatedlens.attention.checking import Check, off, views, worst
from gatedlens.attention.contributions import Contributions
from gatedlens.attention.limits import AT_ONCE, DENSE_LIMIT
from gatedlens.errors import InputError, PointError, did_you_mean
from gatedlens.model.cache import ActivationCache
from gatedlens.model.memory import afford
from gatedlens.model.mixer import TokenMixing
from gatedlens.model.padding import Padding
from gatedlens.model.writing import Writing
from gatedlens.options import checked, tensor_of
from gatedlens.recurrence.autocast import exact
from gatedlens.recurrence.factors import NAMES, Factors
from gatedlens.recurrence.operator import Branch, branch_of
from gatedlens.result.labelled_tensor import LabelledTensor, labelled, with_label
from gatedlens.result.legend import Legend

# For type checkers alone: an operator made of factors of one's own has no model, and most of it works without one.
if TYPE_CHECKING:
    from gatedlens.model.base import HookedModel
else:
    HookedModel = Any

INSTEAD = (
    "Ask for row(i), column(j) or `@ x`, which grow with the positions alone, for fewer positions, or raise max_bytes."
)
ABS_ELEMENTS = 1 << 23  # numbers of a dense piece behind abs_mean(): 32 MiB of float32
MEAN = "attention (mean over channels)"  # what the numbers of a view are, for the pictures of it
ABS_MEAN = "|attention| (mean over channels)"
OF_A_HEAD = "of a head"  # in place of "over channels", where heads are asked for
SHOWN = 128  # positions of an attention that shows its picture by itself
PAPERS = {"unified": ("gate", "scan", "act", "conv"), "hidden": ("scan",)}


@dataclass(frozen=True)
class ImplicitAttention:
    """The operator of one layer; see the head of this file. `parts` are the factors that are in it (all of them), `channels`
    the layer's channels that it is of (None: all), `which` of several mixers of the layer (None: the first)."""

    branches: tuple[Factors, ...]
    padding: Padding
    model: HookedModel
    layer: int
    tokens: Tensor | None = None
    parts: tuple[str, ...] = NAMES
    transposed: bool = False
    channels: tuple[int, ...] | None = None
    which: str | None = None
    by: Tensor | None = None  # what the mixer's output is multiplied by on its way to the stream: see `Writing`

    @classmethod
    def of(cls, cache: ActivationCache, layer: int, place: str | None = None) -> ImplicitAttention:
        """`ImplicitAttention.of(cache, 3)`: the operator of one layer, from a cache that holds its `attention_points`.

        place: of a layer that mixes tokens twice, which it is of ("attn"; None: the first).

        PointError for a point that the cache lacks; InputError for a layer that the model lacks, and for a cache that has no
        batch axis or keeps only some positions.
        """
        model: Any = cache.model
        index = layer_of(model, layer)
        if not cache.has_batch_dim:
            raise InputError("This cache was made with remove_batch_dim=True; implicit attention needs the batch axis.")
        if cache.sliced:
            raise InputError("This cache keeps only some positions (pos_slice); implicit attention needs all of them.")
        block = model.blocks[index]
        mixer = block.mixer_at(place)
        stem = f"blocks.{index}.{mixer.place}."
        missing = [name for name in (stem + one for one in mixer.attention_points) if name not in cache.cache_dict]
        if missing:
            raise PointError(
                f"Implicit attention of layer {index} needs points that this cache lacks: {', '.join(missing)}."
            )
        padding = replace(Padding.of(cache.mask), documents=cache.documents)
        there = all(f"blocks.{index}.{name}" in cache.cache_dict for name in block.held(mixer.place))
        with exact(cache[stem + mixer.attention_points[0]]):
            branches = mixer.branches(lambda name: cache[stem + name], padding, cache.state)
            by = block.held_by(mixer.place, lambda name: cache[f"blocks.{index}.{name}"]) if there else None
        return cls(branches, padding, model, index, cache.tokens, which=place, by=by)

    @property
    def mixer(self) -> TokenMixing:
        """What it is the operator of."""
        return self.model.blocks[self.layer].mixer_at(self.which)

    @property
    def writing(self) -> Writing:
        """What its mixer writes to the stream, of these channels (the bias is no channel's).

        PointError where the cache that it was made from lacks what stands between the two.
        """
        block, place = self.model.blocks[self.layer], self.mixer.place
        if self.by is None and block.held(place):
            lacking = ", ".join(f"blocks.{self.layer}.{name}" for name in block.held(place))
            raise PointError(
                f"What layer {self.layer} writes to the stream needs points that the cache lacks: {lacking}."
            )
        whole: Writing = block.writing(place, self.by)
        return (
            whole if self.channels is None else replace(whole, weight=whole.weight[:, list(self.channels)], bias=None)
        )

    # -- which factors -------------------------------------------------------------------------------------------

    @property
    def factors(self) -> Factors:
        """The factors of a layer that has one branch."""
        if len(self.branches) > 1:
            raise InputError(f"Layer {self.layer} has {len(self.branches)} branches: look at `.branches`.")
        return self.branches[0]

    def only(self, *parts: str) -> ImplicitAttention:
        """The operator of these factors alone: `only("scan")` is S. The others become the identity (the skip: zero)."""
        return replace(self, parts=tuple(name for name in NAMES if name in self._known(parts)))

    def without(self, *parts: str) -> ImplicitAttention:
        """`A.without("skip")`: the operator with these factors replaced by the identity (the skip, or the scan, by zero)."""
        return replace(self, parts=tuple(name for name in self.parts if name not in self._known(parts)))

    @checked
    def paper(self, which: str) -> ImplicitAttention:
        """`A.paper("unified")`: the matrices of the papers: "unified" is gate S act conv (UIA), "hidden" is S (HA). Both
        leave out the skip.
        """
        if which not in PAPERS:
            raise InputError(f"paper({which!r}): it is {' or '.join(map(repr, PAPERS))}.")
        return self.only(*PAPERS[which])

    def _known(self, parts: tuple[str, ...]) -> tuple[str, ...]:
        for part in parts:
            if part not in NAMES:
                raise InputError(f"{part!r} is no factor; they are {', '.join(NAMES)}.{did_you_mean(part, NAMES)}")
        return parts

    def __repr__(self) -> str:
        b, p, c = self.shape
        name = f"{self.model.cfg.model_name}, layer {self.layer}"
        return f"ImplicitAttention({name}: {' '.join(self.parts)}; batch {b}, pos {p}, channel {c})"

    def _repr_html_(self) -> str | None:
        batch, length, _ = self.shape
        view = self.mean() if batch == 1 and length <= SHOWN else None
        return view._repr_html_() if isinstance(view, LabelledTensor) else None

    @checked
    def words(self, row: int = 0) -> list[str]:
        """`A.words(row=0)`: the tokens that it is of, as strings, where there are any; else the positions' numbers."""
        return words_of(self.model, self.tokens, row, self.shape[1])

    @checked
    def legend(self, axes: str, shape: Sequence[int], **said: Sequence[Any]) -> Legend | None:
        """`A.legend("batch dst src", shape)`: what stands along the axes of a view; said: the names of other axes' entries."""
        some = "" if self.parts == NAMES else f": {' '.join(self.parts)}"
        several = self.model is not None and len(self.model.blocks[self.layer].mixing) > 1
        place = f" {self.which}" if several and self.which is not None else ""
        where = "" if self.model is None else f", layer {self.layer}{place}"
        return Legend.of(f"Implicit attention{where}{some}", axes, shape, said, self.words)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(batch, pos, channel)"""
        return tuple(self.branches[0].x.shape)  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        return self.branches[0].x.dtype

    # -- as an operator ------------------------------------------------------------------------------------------

    @property
    def T(self) -> ImplicitAttention:
        return replace(self, transposed=not self.transposed)

    def _sum(self, term: Callable[[Branch, Callable[[Tensor], Tensor]], Tensor]) -> Tensor:
        """The sum over branches of scale * term(branch, turn); `turn` puts positions (dim 1) into the scan's order or back."""
        with exact(self.branches[0].x):
            terms = [(f.scale, term(branch_of(f, self.parts), _flip if f.reverse else _keep)) for f in self.branches]
            return reduce(torch.add, (value if scale == 1 else scale * value for scale, value in terms))

    def __matmul__(self, x: Float[Tensor, "batch pos channel"]) -> Float[Tensor, "batch pos channel"]:
        """A @ x, or A.T @ g for the transpose: linear in pos."""
        if not isinstance(x, Tensor) or tuple(x.shape) != self.shape:
            this = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise InputError(f"The operator takes [batch, pos, channel] = {list(self.shape)}; this is {this}.")
        return self._apply(x.to(self.dtype), self.transposed)

    def _apply(self, x: Tensor, transposed: bool) -> Tensor:
        x = self.padding.pack(self.padding.zero(x))

        def term(branch: Branch, turn: Callable[[Tensor], Tensor]) -> Tensor:
            return turn(branch.backward(turn(x)) if transposed else branch.forward(turn(x)))

        return self.padding.spread(self._sum(term))

    @property
    def bias(self) -> Float[Tensor, "batch pos channel"]:
        """r: what the output holds besides A x: the conv bias, a carried state's conv tail and its scan state."""
        return self.padding.spread(self._sum(lambda branch, turn: turn(branch.bias())))

    def content(self) -> Float[Tensor, "batch pos channel"]:
        """`A.content()`: [batch, pos, channel], the x of A x + r as the run had it. Of branches with contents of their own,
        the steps of a DeltaProduct, it is the sum; `A.output()` is A x + r then, too.
        """
        return self.padding.spread(self._sum(lambda branch, turn: turn(branch.factors.x)))

    def output(self) -> Float[Tensor, "batch pos channel"]:
        """`A.output()`: [batch, pos, channel], A x + r: with all factors, the layer's output before its output projection."""
        return self.padding.spread(self._sum(lambda branch, turn: turn(branch.output())))

    @torch.no_grad()
    def check(self) -> Check:
        """`A.check()`: a Check: how exactly the operator of all factors reconstructs what the layer computed.

        Masked positions are left out. Also how exactly `row`, `column`, `.T`, `weighted` (so `mean`) and `dense` of this
        operator say what `@` does, on random inputs: `weighted` and `dense` for a few channels, where their matrices hold
        no more than 2^24 numbers.
        """
        o = self.padding.spread(self._sum(lambda branch, turn: turn(branch.factors.o)))
        return worst([off(replace(self, parts=NAMES).output(), o), *(off(*pair) for pair in views(self))])

    def contributions(self, heads: Index | None = None) -> Contributions:
        """`A.contributions()`: what each token writes into the residual stream through each other, in d_model: see
        `contributions.py`. `A.contributions(heads=2)`: through some heads alone; those of all heads sum to it, but for the
        output projection's bias.
        """
        return Contributions(self._of(heads))

    # -- heads ---------------------------------------------------------------------------------------------------

    @property
    def n_heads(self) -> int:
        """How many heads the channels are cut into; PointError for a layer without heads."""
        if self.channels is not None:
            raise InputError(f"{self!r} is of some channels: ask for heads of the layer's whole operator.")
        if self.model is None:
            raise InputError("An operator without a model does not know its heads: say its channels.")
        name, names, sizes = self.mixer.output_name, self.model.names, self.model.cfg.sizes
        heads = self.mixer.heads_axis
        if not names.points[name].reaches(heads, sizes):
            raise names.lacking(name, heads, sizes)
        return sizes[heads]

    def channels_of(self, heads: Index) -> list[int]:
        """`A.grouped([A.channels_of([0, 1]), A.channels_of(2)])`: the channels of some heads, head by head.

        heads: a number, a slice, a list or a mask. PointError for a layer without heads, InputError for one out of range.
        """
        total = self.n_heads
        width = self.shape[2] // total
        chosen = numbers("heads", heads, total, f"Layer {self.layer} of {self.model.cfg.model_name}")
        return [channel for head in chosen for channel in range(head * width, (head + 1) * width)]

    def _of(self, heads: Index | None) -> ImplicitAttention:
        """The operator of some heads; of all channels for None."""
        return self if heads is None else self.select(heads=heads)

    def _by_head(
        self, heads: Index, what: str, max_bytes: int | None, view: Callable[[ImplicitAttention], Tensor]
    ) -> Tensor:
        """A view of each head's operator, side by side: [batch head dst src]."""
        chosen = numbers("heads", heads, self.n_heads, f"Layer {self.layer} of {self.model.cfg.model_name}")
        self.afford(f"{what} of {len(chosen)} heads", 2 * len(chosen) + AT_ONCE, max_bytes)
        return torch.stack([view(self.select(heads=head)) for head in chosen], dim=1)

    # -- parts of the matrix -------------------------------------------------------------------------------------

    def row(self, i: Positions, heads: Index | None = None) -> Float[Tensor, "batch channel src"]:
        """A[i, :] for every channel: what position i reads from each place. `row(-1)`: of each row's last.

        i counts a row's real positions; one for all, or one a row (`positions.py`). The places are those of the input.
        heads: only their channels, head by head.
        """
        return self._of(heads).at(self.place(i, "row"))

    @checked
    def place(self, pos: Positions, what: str) -> Int[Tensor, " batch"]:
        """`A.place(-1, "pos")`: [batch], where in the input a position of each row is.

        pos: real positions, one for all rows or one a row; what: the parameter's name, for the errors.
        """
        mask, x = self.padding.mask, self.branches[0].x
        return one_a_row(pos, what, torch.ones(self.shape[:2], dtype=torch.bool) if mask is None else mask).to(x.device)

    @checked
    def at(self, place: Int[Tensor, " batch"]) -> Float[Tensor, "batch channel src"]:
        """`A.at(place)`: [batch, channel, src], A[i, :] of a place of each row in the input; zero where it is padding."""
        return rearrange(self._column(place) if self.transposed else self._row(place), "b p c -> b c p")

    def _row(self, place: Int[Tensor, " batch"]) -> Tensor:
        """A[i, :], read off the factors: [b, src, c]."""
        length, rows = self.shape[1], torch.arange(self.shape[0], device=place.device)
        rank, mask = self.padding.rank, self.padding.mask
        packed = place if rank is None else rank[rows, place]

        def term(branch: Branch, turn: Callable[[Tensor], Tensor]) -> Tensor:
            return turn(branch.row(packed if turn is _keep else length - 1 - packed))

        found = self.padding.spread(self._sum(term))
        return found if mask is None else found * mask[rows, place, None, None].to(found.dtype)

    def _column(self, place: Int[Tensor, " batch"]) -> Tensor:
        """A[:, j], by applying A: [b, dst, c]."""
        basis = torch.zeros(*self.shape, dtype=self.dtype, device=self.branches[0].x.device)
        basis[torch.arange(len(place), device=place.device), place] = 1
        return self._apply(basis, transposed=False)

    def column(self, j: Positions, heads: Index | None = None) -> Float[Tensor, "batch channel dst"]:
        """`A.column(0)`: [batch, channel, dst], A[:, j] for every channel: where position j's input goes; j and heads as in
        `row`.
        """
        return self._of(heads).T.at(self.place(j, "column"))

    @checked
    def afford(self, what: str, matrices: int, max_bytes: int | None, instead: str = INSTEAD) -> None:
        """`A.afford("mean", 2, max_bytes)`: TooLargeError if so many matrices [batch, dst, src] are more than `max_bytes`;
        None: whatever it takes.
        """
        batch, length, _ = self.shape
        size = matrices * batch * length * length * self.branches[0].x.element_size()
        afford(f"{what} at {length} positions", size, max_bytes, instead)

    @checked
    @labelled("attention (of one channel)", "batch channel dst src")
    def dense(
        self, channels: Index | None = None, max_bytes: int | None = DENSE_LIMIT, heads: Index | None = None
    ) -> Float[Tensor, "batch channel dst src"]:
        """`A.dense(channels=[0, 5])`: [batch, channel, dst, src], the matrix of each channel (of `channels`, all if None; or of
        the channels of some `heads`, head by head). Refuses more than `max_bytes`.
        """
        channels = self._either(channels, heads)
        chosen = _channels(channels, self.shape[2])
        instead = "Ask for mean(), row(i), `@ x`, or some channels=[...], or raise max_bytes."
        self.afford(f"dense() of {len(chosen)} channels", len(chosen), max_bytes, instead)
        whole = self.unpacked(self._sum(lambda branch, turn: _turn_both(branch.dense(chosen), turn)))
        return whole.mT if self.transposed else whole

    @checked
    def weighted(
        self, weights: Float[Tensor, " weight"], max_bytes: int | None = DENSE_LIMIT, heads: Index | None = None
    ) -> Float[Tensor, "batch *head dst src"]:
        """`A.weighted(weights)`: [batch, dst, src], sum over channels of weights[c] * A[c]: one matrix product per block,
        no channel apart. With heads (a number, slice, list or mask) [batch, head, dst, src]: the sum of each one's channels,
        the weights still those of all channels.

        Refuses what takes more than `max_bytes` on the way, as do all views that hold a matrix.
        """
        if tuple(weights.shape) != (self.shape[2],):
            raise InputError(f"weights have shape {list(weights.shape)}; there are {self.shape[2]} channels.")
        said = "attention (weighted over channels)"
        if heads is not None:

            def own(A: ImplicitAttention) -> Tensor:
                return A.weighted(weights[list(A.channels or ())], max_bytes=None)

            return self._of_heads(self._by_head(heads, "weighted()", max_bytes, own), said, heads)
        self.afford("weighted()", AT_ONCE, max_bytes)
        weights = weights.to(self.branches[0].x)
        total = self._sum(lambda branch, turn: _turn_both(branch.weighted(weights).unsqueeze(1), turn))
        total = self.unpacked(total).squeeze(1)
        return self._over_channels(total.mT if self.transposed else total, said)

    @checked
    def mean(
        self, max_bytes: int | None = DENSE_LIMIT, heads: Index | None = None
    ) -> Float[Tensor, "batch *head dst src"]:
        """`A.mean()`: [batch, dst, src], the mean over channels, signed. `A.mean(heads=slice(None))`: [batch, head, dst, src],
        over the channels of each head (a number, slice, list or mask says which).
        """
        if heads is not None:
            found = self._by_head(heads, "mean()", max_bytes, lambda A: A.mean(max_bytes=None))
            return self._of_heads(found, MEAN, heads)
        self.afford("mean()", AT_ONCE, max_bytes)
        channels = self.shape[2]
        total = self.weighted(self.branches[0].x.new_full((channels,), 1 / channels), max_bytes=None)
        return self._over_channels(total, MEAN)

    @checked
    def abs_mean(
        self, max_bytes: int | None = DENSE_LIMIT, heads: Index | None = None
    ) -> Float[Tensor, "batch *head dst src"]:
        """`A.abs_mean()`: [batch, dst, src], the mean over channels of absolute values, tile by tile where the channels of a
        head share a matrix, else channel chunk by channel chunk; with heads [batch, head, dst, src], as in `mean`.
        """
        if heads is not None:
            found = self._by_head(heads, "abs_mean()", max_bytes, lambda A: A.abs_mean(max_bytes=None))
            return self._of_heads(found, ABS_MEAN, heads)
        self.afford("abs_mean()", AT_ONCE, max_bytes)
        batch, length, channels = self.shape
        tiled = self._absolute()
        if tiled is not None:
            return self._over_channels(tiled / channels, ABS_MEAN)
        size = max(1, ABS_ELEMENTS // (batch * length * length))
        total = self.branches[0].x.new_zeros(batch, length, length)
        for start in range(0, channels, size):
            dense = self.dense(range(channels)[start : start + size], max_bytes=None)
            total = total + torch.linalg.vector_norm(dense, ord=1, dim=1)
        return self._over_channels(total / channels, ABS_MEAN)

    def _over_channels(self, view: Tensor, label: str) -> Tensor:
        """A view [batch dst src] under its label."""
        found: Tensor = with_label(view, label, self.legend("batch dst src", view.shape))
        return found

    def _of_heads(self, view: Tensor, label: str, heads: Index) -> Tensor:
        """A view [batch head dst src] under its label."""
        chosen = numbers("heads", heads, self.n_heads, "the layer")
        legend = self.legend("batch head dst src", view.shape, head=chosen)
        found: Tensor = with_label(view, f"{label[:-1]} {OF_A_HEAD})", legend)
        return found

    def _absolute(self) -> Float[Tensor, "batch dst src"] | None:
        """The sum over channels of absolute values; None where it takes each channel's matrix: several branches that mix, or a
        scan that cannot do it at once. What only passes by a scan beside it (RWKV-7's bonus) is on the diagonal.
        """
        branches = [branch_of(factors, self.parts) for factors in self.branches]
        mixing = [i for i, branch in enumerate(branches) if not branch.passes_by] or [0]
        if len(mixing) > 1 or (len(branches) > 1 and any(factors.reverse for factors in self.branches)):
            return None
        (place,) = mixing
        factors = self.branches[place]
        with exact(factors.x):
            total = branches[place].absolute()
            if total is None:
                return None
            total = abs(factors.scale) * total
            if len(branches) > 1:
                met = [branch.own() for branch in branches]
                scaled = [one.factors.scale * own for one, own in zip(branches, met, strict=True) if own is not None]
                if len(scaled) < len(branches):
                    return None
                together = torch.stack(scaled).sum(0)
                total.diagonal(0, -2, -1).add_((together.abs() - scaled[place].abs()).sum(-1))
        whole = self.unpacked(_turn_both(total.unsqueeze(1), _flip if factors.reverse else _keep)).squeeze(1)
        return whole.mT if self.transposed else whole

    def select(self, channels: Index | None = None, heads: Index | None = None) -> ImplicitAttention:
        """`A.select([0, 5])`: the operator of some channels; `A.select(heads=2)`: of those of some heads."""
        chosen = _channels(self._either(channels, heads), self.shape[2])
        known = range(self.shape[2]) if self.channels is None else self.channels
        branches = tuple(factors.select(chosen) for factors in self.branches)
        return replace(self, branches=branches, channels=tuple(known[c] for c in chosen))

    def _either(self, channels: Index | None, heads: Index | None) -> Index | None:
        """The channels that are meant, by themselves or by their heads."""
        if heads is None:
            return channels
        if channels is not None:
            raise InputError(
                f"channels={channels!r} and heads={heads!r} overlap: a head is some channels. Say one of them."
            )
        return self.channels_of(heads)

    @checked
    @labelled("attention (mean over a group of channels)", "batch group dst src")
    def grouped(
        self, groups: Sequence[Any], max_bytes: int | None = DENSE_LIMIT
    ) -> Float[Tensor, "batch group dst src"]:
        """The mean over each group of channels, signed: `A.grouped([[0, 3], slice(4, 8)])`; a group is named as in `dense`.

        Groups may overlap and need not cover all channels.
        """
        if len(groups) == 0:
            raise InputError("grouped() needs at least one group of channels: a sequence of indices, slices or lists.")
        for number, group in enumerate(groups):
            if not _channels(group, self.shape[2]):
                raise InputError(f"grouped(): group {number} is empty.")
        self.afford(f"grouped() of {len(groups)} groups", 2 * len(groups) + AT_ONCE, max_bytes)
        return torch.stack([self.select(group).mean(max_bytes=None) for group in groups], dim=1)

    def unpacked(self, x: Float[Tensor, "batch some dst src"]) -> Float[Tensor, "batch some dst src"]:
        """`A.unpacked(matrix)`: rows and columns of packed positions at their places in the input; masked ones are zero."""
        rank, mask = self.padding.rank, self.padding.mask
        if rank is None or mask is None:
            return x
        x = x.gather(2, rank[:, None, :, None].expand_as(x)).gather(3, rank[:, None, None, :].expand_as(x))
        return x * (mask[:, None, :, None] & mask[:, None, None, :]).to(x.dtype)


def words_of(model: Any, tokens: Tensor | None, row: int, length: int) -> list[str]:
    """The tokens of a row as strings; the positions' numbers where the input was none."""
    if tokens is None or tokens.ndim != 2:
        return [str(position) for position in range(length)]
    if model is None or model.tokenizer is None:
        return [str(token) for token in tokens[row].tolist()]
    return list(model.to_str_tokens(tokens[row]))


def points_of(block: Any, mixer: Any) -> list[str]:
    """The full names of the points that the attention of a mixer of a block is derived from, and what it writes to the stream."""
    inside = [f"{mixer.place}.{name}" for name in mixer.attention_points]
    return [f"blocks.{mixer.layer}.{name}" for name in (*inside, *block.held(mixer.place))]


def _keep(x: Tensor) -> Tensor:
    return x


def _flip(x: Tensor) -> Tensor:
    return x.flip(1)


def _turn_both(matrix: Tensor, turn: Callable[[Tensor], Tensor]) -> Tensor:
    """[b, c, dst, src] from the scan's order of positions to the tokens', or back."""
    return matrix if turn is _keep else matrix.flip(2, 3)


def _channels(channels: Any, total: int) -> list[int]:
    """The channel indices that a user named: an index, a slice, a sequence, or None for all."""
    if channels is None:
        return list(range(total))
    if isinstance(channels, slice):
        return list(range(total))[channels]
    picked = tensor_of(channels, "channels")
    if picked.dtype == torch.bool:
        if tuple(picked.shape) != (total,):
            raise InputError(f"A mask of channels has shape {list(picked.shape)}; there are {total} channels.")
        picked = picked.nonzero()
    chosen = picked.reshape(-1).tolist()
    for c in chosen:
        if not -total <= c < total:
            raise InputError(f"Channel {c} is out of range: there are {total} channels.")
    return [c % total for c in chosen]

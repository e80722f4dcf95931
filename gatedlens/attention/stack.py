"""The implicit attention of several layers of one run.

    stack = gl.implicit_attention(model, "The cat sat on the mat")     # every layer, one forward
    stack[3]                                # the ImplicitAttention of layer 3
    stack.mean(), stack.abs_mean()          # layer batch dst src
    stack.mean(heads=slice(None))           # layer batch head dst src
    stack.layer_mean()                      # batch dst src
    stack.rollout(start_layer=2)            # batch dst src: the layers chained through the residual stream
    stack.profiles(), stack.induction()     # how far, how sharply, whether by induction: layer batch
    stack.without("skip")[3], stack[2:5]    # other factors, fewer layers
    gl.plot.layers(dict(zip(stack.layers, stack.mean()[:, 0])), tokens)

A layer's operator is derived from the cache when it is asked for, and not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from gatedlens.address.entries import Index, numbers
from gatedlens.address.layers import START, Layers, layer_of, layers_of, mixing_of
from gatedlens.attention.checking import Check, worst
from gatedlens.attention.layer import SHOWN, ImplicitAttention, points_of, words_of
from gatedlens.attention.limits import AT_ONCE, DENSE_LIMIT
from gatedlens.attention.profiles import Profile, induction, induction_of_heads, of_heads, of_layer
from gatedlens.errors import InputError
from gatedlens.markup import card, picture, table
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Input
from gatedlens.model.cache import ActivationCache
from gatedlens.options import checked, is_whole
from gatedlens.recurrence.autocast import exact
from gatedlens.recurrence.factors import NAMES
from gatedlens.result.labelled_tensor import LabelledTensor, label_of, labelled, with_label
from gatedlens.result.legend import Legend
from gatedlens.result.result import Result

MOST_SHOWN = 24  # layers of a stack that shows its picture by itself
INSTEAD = (
    "Ask for fewer layers (`stack[2:5]`), for `stack[layer].row(i)` or `@ x`, for fewer positions, or raise max_bytes."
)


# What an attention is derived from. For type checkers: whoever passes something else gets an InputError.
if TYPE_CHECKING:
    Source: TypeAlias = ActivationCache | HookedModel
else:
    Source = Any


@dataclass(frozen=True)
class AttentionStack:
    """The operators of `layers` (ascending); `parts` are the factors that are in each (all of them), `heads` the heads whose
    channels they are of (None: all channels)."""

    cache: ActivationCache
    layers: tuple[int, ...]
    parts: tuple[str, ...] = NAMES
    heads: Index | None = None

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[ImplicitAttention]:
        return (self._operator(layer) for layer in self.layers)

    @overload
    def __getitem__(self, layer: int) -> ImplicitAttention: ...

    @overload
    def __getitem__(self, layer: slice | Sequence[int]) -> AttentionStack: ...

    def __getitem__(self, layer: Any) -> ImplicitAttention | AttentionStack:
        """`stack[3]`: layer 3 of the model (-1: its last); several, as `layers.py` reads them: the stack of these."""
        asked = layers_of(self.cache.model, layer)
        if is_whole(layer):
            return self._operator(self._known(asked[0]))
        # A pattern passes over layers that the stack does not hold; a number asks for one.
        if isinstance(layer, slice | str | None):
            asked = tuple(one for one in asked if one in self.layers)
        if not asked:
            raise InputError(f"stack[{layer!r}] holds no layer; this stack holds {self._held}.")
        return replace(self, layers=tuple(self._known(one) for one in asked))

    @property
    def _held(self) -> str:
        return f"the layers {', '.join(map(str, self.layers))}"

    def _known(self, layer: int) -> int:
        if layer not in self.layers:
            raise InputError(f"stack[{layer}]: this stack of {self.cache.model.cfg.model_name} holds {self._held}.")
        return layer

    def _operator(self, layer: int) -> ImplicitAttention:
        whole = ImplicitAttention.of(self.cache, layer).only(*self.parts)
        return whole if self.heads is None else whole.select(heads=self.heads)

    def __repr__(self) -> str:
        of = "" if self.heads is None else f", heads {self.heads}"
        return (
            f"AttentionStack({self.cache.model.cfg.model_name}, layers {list(self.layers)}{of}: {' '.join(self.parts)})"
        )

    def _repr_html_(self) -> str:
        batch, length, _ = self._operator(self.layers[0]).shape
        rows = [
            (one.layer, type(one.mixer).__name__, one.shape[2], " ".join(one.parts), len(one.branches)) for one in self
        ]
        facts = {"layers": len(self), "rows": batch, "positions": length}
        inner = table(["layer", "mixer", "channels", "factors", "branches"], rows, 6)
        view = self.mean(progress=False) if batch == 1 and length <= SHOWN and len(self) <= MOST_SHOWN else None
        drawn = "" if view is None else picture(lambda: _result(view[:, 0]).plot())
        return card(f"AttentionStack: {self.cache.model.cfg.model_name}", facts, inner, drawn)

    @checked
    def words(self, row: int = 0) -> list[str]:
        """`stack.words(row=0)`: the tokens that it is of, as strings, where there are any; else the positions' numbers."""
        tokens = self.cache.tokens
        length = 0 if tokens is not None and tokens.ndim == 2 else self._operator(self.layers[0]).shape[1]
        return words_of(self.cache.model, tokens, row, length)

    @checked
    def legend(self, axes: str, shape: Sequence[int], **said: Sequence[Any]) -> Legend | None:
        """`stack.legend("batch dst src", shape)`: what stands along a view's axes; said: as in `ImplicitAttention.legend`."""
        some = "" if self.parts == NAMES else f": {' '.join(self.parts)}"
        return Legend.of(f"Implicit attention{some}", axes, shape, {"layer": self.layers, **said}, self.words)

    # -- which factors -------------------------------------------------------------------------------------------

    def only(self, *parts: str) -> AttentionStack:
        """`stack.only("scan")`: every layer's operator with these factors alone; see `ImplicitAttention.only`."""
        return replace(self, parts=self._operator(self.layers[0]).only(*parts).parts)

    def without(self, *parts: str) -> AttentionStack:
        """`stack.without("skip")`: every layer's operator without these factors; see `ImplicitAttention.without`."""
        return replace(self, parts=self._operator(self.layers[0]).without(*parts).parts)

    @checked
    def paper(self, which: str) -> AttentionStack:
        """`stack.paper("unified")`: the matrices of the papers, "unified" or "hidden"; see `ImplicitAttention.paper`."""
        return replace(self, parts=self._operator(self.layers[0]).paper(which).parts)

    def select(self, heads: Index) -> AttentionStack:
        """`stack.select(heads=[0, 2])`: every layer's operator of the channels of these heads; see `ImplicitAttention.select`.

        PointError for a layer without heads; InputError for one out of range.
        """
        for layer in self.layers:
            self._operator(layer).channels_of(heads)
        return replace(self, heads=heads)

    # -- layer by layer ------------------------------------------------------------------------------------------

    @checked
    def each(
        self,
        matrix: Callable[[ImplicitAttention], Float[Tensor, "batch ..."]],
        what: str = "attention",
        progress: bool = True,
    ) -> Iterator[Tensor]:
        """`for matrix in stack.each(lambda A: A.mean()): ...`: the function of each layer's attention in turn, behind a
        progress bar unless `progress` is off.
        """
        for attention in tqdm(self, total=len(self), disable=not progress, desc=what, unit="layer"):
            yield matrix(attention)

    @checked
    def mean(
        self, progress: bool = True, max_bytes: int | None = DENSE_LIMIT, heads: Index | None = None
    ) -> Float[Tensor, "layer batch *head dst src"]:
        """`stack.mean()`: [layer, batch, dst, src], each layer's signed mean over channels; with heads, as in
        `ImplicitAttention.mean`, [layer, batch, head, dst, src]. Refuses what takes more than `max_bytes` on the way, as all here
        does.
        """
        return self._stacked("mean", progress, max_bytes, heads)

    @checked
    def abs_mean(
        self, progress: bool = True, max_bytes: int | None = DENSE_LIMIT, heads: Index | None = None
    ) -> Float[Tensor, "layer batch *head dst src"]:
        """`stack.abs_mean()`: [layer, batch, dst, src], each layer's mean over channels of absolute values; heads as in
        `mean`.
        """
        return self._stacked("abs_mean", progress, max_bytes, heads)

    def _stacked(self, view: str, progress: bool, max_bytes: int | None, heads: Index | None) -> Tensor:
        """A view of every layer, under what the view itself says it is."""
        first = self._operator(self.layers[0])
        chosen = [0] if heads is None else numbers("heads", heads, first.n_heads, repr(first))
        self._afford(f"{view}()", 2 * len(self) * len(chosen), max_bytes)

        def of(attention: ImplicitAttention) -> Tensor:
            return attention.mean(None, heads) if view == "mean" else attention.abs_mean(None, heads)

        found = list(self.each(of, view, progress))
        whole = torch.stack(found)
        axes = "layer batch dst src" if heads is None else "layer batch head dst src"
        legend = self.legend(axes, whole.shape, head=chosen)
        return with_label(whole, label_of(found[0]) or "attention", legend)

    @checked
    def layer_mean(
        self, absolute: bool = False, progress: bool = True, max_bytes: int | None = DENSE_LIMIT
    ) -> Float[Tensor, "batch dst src"]:
        """`stack.layer_mean()`: [batch, dst, src], the mean over layers of `mean()`, or of `abs_mean()`: HA's "raw
        attention" before its row is picked.
        """
        self._afford("layer_mean()", 2, max_bytes)
        total = reduce(torch.add, self.each(_abs_mean if absolute else _mean, "layer mean", progress))
        said = "|attention|" if absolute else "attention"
        legend = self.legend("batch dst src", total.shape)
        mean: Tensor = with_label(total / len(self), f"{said} (mean over channels and layers)", legend)
        return mean

    def check(self) -> Check:
        """`stack.check()`: the largest errors of `ImplicitAttention.check` over the layers."""
        return worst(attention.check() for attention in self)

    def _afford(self, what: str, matrices: int, max_bytes: int | None) -> None:
        """TooLargeError if a layer's matrix and `matrices` more of its size are too much."""
        if max_bytes is not None:
            self._operator(self.layers[0]).afford(
                f"{what} of {len(self)} layers", AT_ONCE + matrices, max_bytes, INSTEAD
            )

    @checked
    @labelled("rollout of the attention (mean over channels)", "batch dst src")
    def rollout(
        self, start_layer: int | None = None, progress: bool = True, max_bytes: int | None = DENSE_LIMIT
    ) -> Float[Tensor, "batch dst src"]:
        """`stack.rollout(start_layer=1)`: [batch, dst, src], (I + E_d A_last) ... (I + E_d A_start): signed, not
        normalised; I is the residual stream, E_d the channel mean.

        From `start_layer` (of the model; None: the stack's first) to the stack's last. Masked positions take no part:
        their rows and columns are zero. HA (arXiv 2403.01590), sec. 3.4, after Abnar and Zuidema 2020.
        """
        layers = self if start_layer is None else self[layer_of(self.cache.model, start_layer, START) :]
        layers._afford("rollout()", 4, max_bytes)
        total: Tensor | None = None
        for matrix in layers.each(_mean, "rollout", progress):
            step = matrix + self._identity(matrix)
            with exact(step):
                total = step if total is None else step @ total
        assert total is not None
        return total

    def _identity(self, like: Float[Tensor, "batch dst src"]) -> Float[Tensor, "batch dst src"]:
        """1 on the diagonal of real positions."""
        ones = like.new_ones(like.shape[:2])
        return torch.diag_embed(ones if self.cache.mask is None else self.cache.mask.to(like))

    # -- profiles ------------------------------------------------------------------------------------------------

    @checked
    def profiles(
        self, progress: bool = True, max_bytes: int | None = DENSE_LIMIT, heads: Index | None = None
    ) -> Profile:
        """`stack.profiles()`: how far and how sharply each layer looks: `profiles.of_layer` with a layer axis in front; with
        heads (`slice(None)` for all) `profiles.of_heads`, [layer, batch, head].
        """
        bar = tqdm(self, total=len(self), disable=not progress, desc="profiles", unit="layer")
        found = [of_layer(one, max_bytes) if heads is None else of_heads(one, heads, max_bytes) for one in bar]
        whole = Profile(*(torch.stack(values) for values in zip(*found, strict=True)))
        return whole.named(f"Profiles of {self.cache.model.cfg.model_name}", *self._axes(heads))

    def _axes(self, heads: Index | None) -> tuple[str, dict[str, Sequence[int]]]:
        """The axes of what is layer by layer a number a row, or one a head, and what stands along them."""
        if heads is None:
            return "layer batch", {"layer": self.layers}
        first = self._operator(self.layers[0])
        return "layer batch head", {"layer": self.layers, "head": numbers("heads", heads, first.n_heads, repr(first))}

    @checked
    def induction(
        self,
        tokens: Int[Tensor, "batch pos"] | None = None,
        progress: bool = True,
        max_bytes: int | None = DENSE_LIMIT,
        heads: Index | None = None,
    ) -> Float[Tensor, "layer batch *head"]:
        """`stack.induction()`: how much of each layer's attention goes to what followed earlier: `profiles.induction`; with heads
        `profiles.induction_of_heads`, [layer, batch, head].
        """

        def score(one: ImplicitAttention) -> Tensor:
            if heads is None:
                return induction(one, tokens, max_bytes).score
            return induction_of_heads(one, heads, tokens, max_bytes).score

        whole = torch.stack(list(self.each(score, "induction", progress)))
        axes, said = self._axes(heads)
        legend = Legend.of(f"Induction of {self.cache.model.cfg.model_name}", axes, whole.shape, said)
        return with_label(whole, "induction score", legend)


def _result(view: Tensor) -> Result:
    assert isinstance(view, LabelledTensor)
    return view.result()


def _mean(attention: ImplicitAttention) -> Tensor:
    return attention.mean(max_bytes=None)


def _abs_mean(attention: ImplicitAttention) -> Tensor:
    return attention.abs_mean(max_bytes=None)


@overload
def implicit_attention(
    source: Source, input: Input | None = None, *, layer: None = None, layers: Layers = None, **options: Any
) -> AttentionStack: ...


@overload
def implicit_attention(
    source: Source, input: Input | None = None, *, layer: Any, **options: Any
) -> ImplicitAttention: ...


def implicit_attention(
    source: Source,
    input: Input | None = None,
    *,
    layer: Layers = None,
    layers: Layers = None,
    place: str | None = None,
    **options: Any,
) -> ImplicitAttention | AttentionStack:
    """`gl.implicit_attention(model, "The cat sat on the mat", layer=3)`, or `gl.implicit_attention(cache, layer=3)`.

    With `layer` the ImplicitAttention of one layer; without it the AttentionStack of `layers` (see `layers.py`; None: all that
    mix tokens). place: of a layer that mixes tokens twice, side by side, which it is ("attn"; None: the first, "mixer").
    source: a HookedModel with its `input` (and any options of its forward, run once), or an
    ActivationCache that holds the points `model.blocks[layer].mixer.attention_points` (the default cache does).
    Gradients flow to the cached activations. The operator is that of the model's equations at these activations: hooks
    that edit *inside* the recurrence (decay, write, state, scan, y) make the layer's output differ from it, and
    `check()` says by how much.
    """
    given = isinstance(source, ActivationCache)
    if given and (input is not None or options):
        raise InputError("A cache needs no input: gl.implicit_attention(cache, layer=...).")
    if not given and not isinstance(source, HookedModel):
        raise InputError(f"implicit_attention takes a HookedModel or an ActivationCache, not {type(source).__name__}.")
    if not given and input is None:
        raise InputError("implicit_attention(model, ...) needs an input: text or token ids.")
    if layer is not None and layers is not None:
        raise InputError(f"layer={layer!r} and layers={layers!r}: give one layer, or several, or neither for all.")
    model: Any = source.model if given else source
    if place is not None and layer is None:
        raise InputError(f"place={place!r} says which mixer of one layer is meant: name it, layer=...")
    chosen = mixing_of(model, layers) if layer is None else (layer_of(model, layer),)
    if not given:
        needed = [name for index in chosen for name in points_of(model.blocks[index].mixer_at(place), index)]
        with torch.no_grad():
            _, source = model.run_with_cache(input, names_filter=needed, stop_at_layer=max(chosen) + 1, **options)
    if layer is not None:
        return ImplicitAttention.of(source, chosen[0], place)
    return AttentionStack(source, chosen)

"""The implicit attention of several layers of one run.

    stack = gl.implicit_attention(model, "The cat sat on the mat")     # every layer, one forward
    stack[3]                                # the ImplicitAttention of layer 3
    stack.mean(), stack.abs_mean()          # layer batch dst src
    stack.mean(heads=slice(None))           # layer batch head dst src
    stack.layer_mean()                      # batch dst src
    stack.rollout(start_layer=2)            # batch dst src: the layers chained through the residual stream
    stack.profiles(), stack.induction()     # how far, how sharply, whether by induction: layer batch
    stack.without("skip")[3], stack[2:5]    # other factors, fewer layers
    gl.plot.layers(dict(zip(stack.names, stack.mean()[:, 0])), tokens)

Where a layer mixes tokens more than once, side by side or one mixing before the other, each of its mixers has an operator of its
own, one behind the other on the axis `layer`: `stack.names` says which is which, `stack[3, "attn"]` is one of them, and a stack
of `layers=gl.layers.where(kind="attention")` holds those of that kind alone. A rollout chains them as the layer does.

An operator is derived from the cache when it is asked for, and not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from gatedlens.address.entries import Index, numbers
from gatedlens.address.layers import START, Layers, Mixers, Where, layer_of, layers_of, mixers_of
from gatedlens.attention.checking import Check, worst
from gatedlens.attention.layer import SHOWN, ImplicitAttention, points_of, words_of
from gatedlens.attention.limits import AT_ONCE, DENSE_LIMIT
from gatedlens.attention.profiles import Profile, induction, induction_of_heads, of_heads, of_layer
from gatedlens.errors import InputError
from gatedlens.markup import card, picture, table
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Input
from gatedlens.model.cache import ActivationCache
from gatedlens.model.language import OF_INPUT, HookedLanguageModel
from gatedlens.options import checked, is_whole, taking
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


class Step(NamedTuple):
    """What the mixers of one layer make of the stream in one step: those that write to it `beside` one another, and those that
    mix tokens `inside` for what these read, in the order in which they run."""

    beside: tuple[ImplicitAttention, ...]
    inside: tuple[ImplicitAttention, ...]


@dataclass(frozen=True)
class AttentionStack:
    """The operators of `mixers`, each a layer and the place in it where tokens are mixed, in running order; `parts` are the
    factors that are in each (all of them), `heads` the heads whose channels they are of (None: all channels)."""

    cache: ActivationCache
    mixers: tuple[tuple[int, str], ...]
    parts: tuple[str, ...] = NAMES
    heads: Index | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """The layer of each operator: (0, 1, 2), or (0, 0, 1, 1) where two stand in a layer."""
        return tuple(layer for layer, _ in self.mixers)

    @property
    def names(self) -> tuple[int | str, ...]:
        """What each operator is called: its layer's number; "3.mixer" and "3.attn" where several of a layer are in the stack."""
        layers = self.layers
        return tuple(layer if layers.count(layer) == 1 else f"{layer}.{place}" for layer, place in self.mixers)

    def __len__(self) -> int:
        return len(self.mixers)

    def __iter__(self) -> Iterator[ImplicitAttention]:
        return (self._operator(*one) for one in self.mixers)

    @overload
    def __getitem__(self, layer: int | tuple[int, str]) -> ImplicitAttention: ...

    @overload
    def __getitem__(self, layer: slice | list[int] | Where) -> AttentionStack: ...

    def __getitem__(self, layer: Any) -> ImplicitAttention | AttentionStack:
        """`stack[3]`: layer 3 of the model (-1: its last), of two in the stack the one that writes to the stream first;
        `stack[3, "attn"]`: that one; several, as `layers.py` reads them: the stack of these."""
        model = self.cache.model
        if isinstance(layer, tuple) and len(layer) == 2 and isinstance(layer[1], str):
            index = layer_of(model, layer[0])
            return self._operator(index, self._known(index, model.blocks[index].mixer_at(layer[1]).place))
        asked = layers_of(model, layer)
        if is_whole(layer):
            return self._operator(asked[0], self._known(asked[0]))
        # A pattern passes over layers that the stack does not hold; a number asks for one.
        if not isinstance(layer, slice | str | Where | Mixers | None):
            for one in asked:
                self._known(one)
        wanted = {(mixer.layer, mixer.place) for mixer in mixers_of(model, layer)}
        held = tuple(one for one in self.mixers if one in wanted)
        if not held:
            raise InputError(f"stack[{layer!r}] holds no layer; this stack holds {self._held}.")
        return replace(self, mixers=held)

    @property
    def _held(self) -> str:
        return f"the layers {', '.join(map(str, self.names))}"

    def _known(self, layer: int, place: str | None = None) -> str:
        """Where the mixer of a layer that is meant stands."""
        here = [at for number, at in self.mixers if number == layer]
        if not here or (place is not None and place not in here):
            said = f"{layer}" if place is None else f"{layer}, {place!r}"
            raise InputError(f"stack[{said}]: this stack of {self.cache.model.cfg.model_name} holds {self._held}.")
        if place is not None:
            return place
        written = [at for at in self.cache.model.blocks[layer].mixing.values() if at in here]
        return (written or here)[0]

    def _operator(self, layer: int, place: str) -> ImplicitAttention:
        whole = ImplicitAttention.of(self.cache, layer, place).only(*self.parts)
        return whole if self.heads is None else whole.select(heads=self.heads)

    @property
    def _first(self) -> ImplicitAttention:
        return self._operator(*self.mixers[0])

    def steps(self) -> Iterator[Step]:
        """`for beside, inside in stack.steps(): ...`: how the layers, in order, chain their operators; see `Step`."""
        for layer in dict.fromkeys(self.layers):
            block, here = self.cache.model.blocks[layer], [place for number, place in self.mixers if number == layer]
            left = [one for one in block.inner if one.mixer in here]
            for group in block.groups:
                beside = [way.place for way in group if way.place in here]
                mine = [
                    one.mixer for one in left if one.reader in {way.out.removeprefix("hook_")[:-4] for way in group}
                ]
                if beside or mine:
                    operators = ([self._operator(layer, place) for place in places] for places in (beside, mine))
                    yield Step(*map(tuple, operators))

    def __repr__(self) -> str:
        of = "" if self.heads is None else f", heads {self.heads}"
        layers = f"[{', '.join(map(str, self.names))}]"
        return f"AttentionStack({self.cache.model.cfg.model_name}, layers {layers}{of}: {' '.join(self.parts)})"

    def _repr_html_(self) -> str:
        batch, length, _ = self._first.shape
        rows = [
            (name, type(one.mixer).__name__, one.shape[2], " ".join(one.parts), len(one.branches))
            for name, one in zip(self.names, self, strict=True)
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
        length = 0 if tokens is not None and tokens.ndim == 2 else self._first.shape[1]
        return words_of(self.cache.model, tokens, row, length)

    @checked
    def legend(self, axes: str, shape: Sequence[int], **said: Sequence[Any]) -> Legend | None:
        """`stack.legend("batch dst src", shape)`: what stands along a view's axes; said: as in `ImplicitAttention.legend`."""
        some = "" if self.parts == NAMES else f": {' '.join(self.parts)}"
        return Legend.of(f"Implicit attention{some}", axes, shape, {"layer": self.names, **said}, self.words)

    # -- which factors -------------------------------------------------------------------------------------------

    def only(self, *parts: str) -> AttentionStack:
        """`stack.only("scan")`: every layer's operator with these factors alone; see `ImplicitAttention.only`."""
        return replace(self, parts=self._first.only(*parts).parts)

    def without(self, *parts: str) -> AttentionStack:
        """`stack.without("skip")`: every layer's operator without these factors; see `ImplicitAttention.without`."""
        return replace(self, parts=self._first.without(*parts).parts)

    @checked
    def paper(self, which: str) -> AttentionStack:
        """`stack.paper("unified")`: the matrices of the papers, "unified" or "hidden"; see `ImplicitAttention.paper`."""
        return replace(self, parts=self._first.paper(which).parts)

    def select(self, heads: Index) -> AttentionStack:
        """`stack.select(heads=[0, 2])`: every layer's operator of the channels of these heads; see `ImplicitAttention.select`.

        PointError for a layer without heads; InputError for one out of range.
        """
        for attention in replace(self, heads=None):
            attention.channels_of(heads)
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
        first = self._first
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
            self._first.afford(f"{what} of {len(self)} layers", AT_ONCE + matrices, max_bytes, INSTEAD)

    @checked
    @labelled("rollout of the attention (mean over channels)", "batch dst src")
    def rollout(
        self, start_layer: int | None = None, progress: bool = True, max_bytes: int | None = DENSE_LIMIT
    ) -> Float[Tensor, "batch dst src"]:
        """`stack.rollout(start_layer=1)`: [batch, dst, src], (I + E_d A_last) ... (I + E_d A_start): signed, not
        normalised; I is the residual stream, E_d the channel mean.

        Of two mixers side by side a layer brings both, I + E_d A_1 + E_d A_2; of one that mixes tokens for what another reads
        (Zamba2's shared attention) the step is I + E_d A_2 (I + E_d A_1), and I + E_d A_1 where A_2 is not in the stack.

        From `start_layer` (of the model; None: the stack's first) to the stack's last. Masked positions take no part:
        their rows and columns are zero. HA (arXiv 2403.01590), sec. 3.4, after Abnar and Zuidema 2020.
        """
        layers = self if start_layer is None else self[layer_of(self.cache.model, start_layer, START) :]
        layers._afford("rollout()", 4, max_bytes)
        total: Tensor | None = None
        for one in tqdm(list(layers.steps()), disable=not progress, desc="rollout", unit="layer"):
            brought = chained(one, _mean, torch.matmul)
            step = brought + self._identity(brought)
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

    def _axes(self, heads: Index | None) -> tuple[str, dict[str, Sequence[Any]]]:
        """The axes of what is layer by layer a number a row, or one a head, and what stands along them."""
        if heads is None:
            return "layer batch", {"layer": self.names}
        first = self._first
        return "layer batch head", {"layer": self.names, "head": numbers("heads", heads, first.n_heads, repr(first))}

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


def chained(
    step: Step, of: Callable[[ImplicitAttention], Tensor], through: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """What a step brings beside I: (sum beside of A) (I + A_inside) ..., `of` an operator its matrix, `through(a, b)` a b."""
    total = reduce(torch.add, map(of, step.beside)) if step.beside else None
    for one in reversed(step.inside):
        matrix = of(one)
        if total is None:
            total = matrix
            continue
        with exact(matrix):
            further = total + through(total, matrix)
        total = (
            further if step.beside else further + matrix
        )  # without one beside, what is inside counts as written itself
    assert total is not None
    return total


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


@taking(HookedLanguageModel.forward, only=OF_INPUT)
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
    mix tokens, of `gl.layers.where(kind=...)` those of the kind). place: of a layer that mixes tokens more than once, which it is
    ("attn", "shared.attn"; None: the first that writes to the stream, "mixer").
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
    alone = layer is not None
    chosen = (model.blocks[layer_of(model, layer)].mixer_at(place),) if alone else mixers_of(model, layers)
    if not given:
        needed = [name for mixer in chosen for name in points_of(model.blocks[mixer.layer], mixer)]
        last = max(mixer.layer for mixer in chosen)
        with torch.no_grad():
            _, source = model.run_with_cache(input, names_filter=needed, stop_at_layer=last + 1, **options)
    if alone:
        return ImplicitAttention.of(source, chosen[0].layer, place)
    return AttentionStack(source, tuple((mixer.layer, mixer.place) for mixer in chosen))

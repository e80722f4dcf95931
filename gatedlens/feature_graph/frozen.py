"""A frozen run: the forward of one prompt with what is not linear held as a run had it, cut at the sites.

    frozen = FrozenRun.of(model, tokens, dictionaries, mixers=False)
    x = frozen.run(frozen.leaves(1), 1)              # {point: activation}: those of the run, to rounding

held           the scale of every norm, and what only weighs (the shares by which a mixer mixes what it reads): `relevance_rules`
as A x + r     every mixer, by its implicit attention: gates, decays, convs, scans and patterns as the run had them
cut            at every site (sites.py) a leaf stands in the place of what is written there: nothing passes but what is told

So it is affine in the embedding and the leaves: one backward pass from what a target reads gives what every source adds to it,
and a run with all of them 0 what biases do. Nothing of size [channel, pos, pos] is built. One prompt, as many `rows` side by side
as targets are asked for at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gatedlens.attention.in_progress import underway, verify
from gatedlens.attention.layer import ImplicitAttention
from gatedlens.dictionaries import Dictionary
from gatedlens.dictionaries.reading import Reading
from gatedlens.feature_graph.node import ERROR
from gatedlens.feature_graph.places import Places
from gatedlens.feature_graph.sites import BEFORE, Site, of_dictionary, of_mixer
from gatedlens.model.cache import ActivationCache
from gatedlens.model.language import HookedLanguageModel
from gatedlens.recurrence.autocast import exact
from gatedlens.recurrence.scanning import at_least_float32
from gatedlens.runs.relevance_rules import Flow

Hooks = list[tuple[str, Callable[..., Any]]]


@dataclass(frozen=True)
class Operator:
    """A mixer held: its A and r, and the points that x is made of, which alone are those of the frozen run."""

    flow: Flow
    attention: ImplicitAttention
    reads: tuple[str, ...]

    def __call__(
        self, model: HookedLanguageModel, held: Mapping[str, Tensor], now: Mapping[str, Tensor]
    ) -> Float[Tensor, "rows pos channel"]:
        """A x + r, x of what stands at the points in `now`."""
        live = underway(model, self.flow.layer, {**held, **{name: now[name] for name in self.reads}}, self.flow.place)
        pairs = zip(self.attention.branches, live.branches, strict=True)
        return replace(self.attention, branches=tuple(replace(own, x=source.x) for own, source in pairs)).output()


@dataclass(frozen=True)
class FrozenRun:
    """`FrozenRun.of(model, tokens, dictionaries)`: see the head of this file. `cache` is of the one row `tokens` [1 pos]."""

    model: HookedLanguageModel
    tokens: Int[Tensor, "1 pos"]
    options: Mapping[str, Any]
    cache: ActivationCache
    logits: Float[Tensor, "1 pos d_vocab"]
    places: Places
    sites: tuple[Site, ...]
    _operators: dict[int, tuple[Operator, ...]] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(
        model: HookedLanguageModel,
        tokens: Int[Tensor, "1 pos"],
        dictionaries: Sequence[Dictionary] = (),
        mixers: bool = False,
        position_ids: Int[Tensor, "1 pos"] | None = None,
    ) -> FrozenRun:
        """`FrozenRun.of(model, tokens, dictionaries, mixers=True)`: of one prompt. mixers: their writes are nodes.

        InputError for a dictionary that does not fit: see `places.py`; and where a mixer's output is not its A x + r, for another
        hook edits inside.
        """
        places = Places.of(model, dictionaries, mixers)
        options: dict[str, Any] = {} if position_ids is None else {"position_ids": position_ids}
        with torch.no_grad():
            logits, cache = model.run_with_cache(tokens, names_filter=list(places.noted), **options)
        frozen = FrozenRun(model, tokens, options, cache, logits, places, tuple(_sites(places, cache)))
        for one in frozen.operators(1):
            verify(one.attention, one.attention.output(), cache[one.flow.output], "a feature graph")
        return frozen

    def words(self, tokens: Int[Tensor, " n"]) -> list[str]:
        """`frozen.words(tokens)`: tokens as text; their ids where the model has no tokenizer."""
        if self.model.tokenizer is None:
            return [str(token) for token in tokens.tolist()]
        return [str(word) for word in self.model.to_str_tokens(tokens)]

    # -- what is held --------------------------------------------------------------------------------------------

    def value(self, point: str) -> Float[Tensor, "pos width"]:
        """`frozen.value("ln_final.hook_out")`: what the run had at a point, flat."""
        return at_least_float32(self.cache[point][0].flatten(1))

    def held(self, rows: int) -> dict[str, Tensor]:
        """`frozen.held(4)`: what is held, by point, of so many rows."""
        return {name: value.expand(rows, *value.shape[1:]) for name, value in self.cache.cache_dict.items()}

    def operators(self, rows: int) -> tuple[Operator, ...]:
        """`frozen.operators(4)`: the mixers of so many rows, derived once."""
        if rows not in self._operators:
            cache = _of_rows(self.cache, self.held(rows), rows)
            with torch.no_grad():
                self._operators[rows] = tuple(
                    Operator(flow, ImplicitAttention.of(cache, flow.layer, flow.place), _content(self.cache, flow))
                    for flow in self.places.flows
                )
        return self._operators[rows]

    # -- a run ---------------------------------------------------------------------------------------------------

    @property
    def embedded(self) -> Float[Tensor, "pos d_model"]:
        """`frozen.embedded`: what the tokens write."""
        return self.value(self.places.entrance)

    def leaves(self, rows: int) -> dict[str, Float[Tensor, "rows pos width"]]:
        """`frozen.leaves(rows)`: what is written in the run, by point: what tokens write, and every site."""
        written = {self.places.entrance: self.embedded, **{site.point: site.leaf for site in self.sites}}
        return {name: value.expand(rows, *value.shape).clone() for name, value in written.items()}

    def nothing(self) -> dict[str, Float[Tensor, "1 pos width"]]:
        """`frozen.nothing()`: leaves of which biases alone are left."""
        empty = {name: torch.zeros_like(leaf) for name, leaf in self.leaves(1).items()}
        return empty | {site.point: site.bias.unsqueeze(0) for site in self.sites if site.bias is not None}

    def run(
        self,
        leaves: Mapping[str, Float[Tensor, "rows pos width"]],
        rows: int,
        more: Callable[[Site, Tensor], Tensor] | None = None,
    ) -> dict[str, Float[Tensor, "rows pos width"]]:
        """`frozen.run(leaves, rows)`: what targets read, by point, flat, with these leaves.

        more: what a site writes besides, of what is read there: `more(site, x)`.
        """
        now: dict[str, Tensor] = {}
        read: dict[str, Tensor] = {}
        with self.model.hooks(self._hooks(leaves, rows, now, read, more)):
            options = {name: value.expand(rows, -1) for name, value in self.options.items()}
            self.model(self.tokens.expand(rows, -1), return_type=None, **options)
        return read

    def _hooks(
        self,
        leaves: Mapping[str, Tensor],
        rows: int,
        now: dict[str, Tensor],
        read: dict[str, Tensor],
        more: Callable[[Site, Tensor], Tensor] | None,
    ) -> Hooks:
        """In the order in which they are put on: of two at a point the earlier one gives the other what it makes."""
        held, operators = self.held(rows), self.operators(rows)
        entrance = self.places.entrance
        hooks: Hooks = [(name, _standing(held[name])) for name in self.places.held]
        hooks.append((entrance, _standing(leaves[entrance])))
        hooks += [(one.flow.output, self._flowing(one, held, now)) for one in operators]
        for site in self.sites:
            hooks.append((site.point, _noting(read, BEFORE)))
            hooks.append((site.point, _writing(site, leaves[site.point], read, more)))
        hooks += [(name, _noting(read)) for name in self.places.read]
        hooks += [(name, _keeping(now)) for name in dict.fromkeys(n for one in operators for n in one.reads)]
        return hooks

    def _flowing(self, operator: Operator, held: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> Callable[..., Any]:
        def flowing(x: Tensor, hook: Any) -> Tensor:
            with exact(x):
                return operator(self.model, held, now).reshape(x.shape).to(x.dtype)

        return flowing


def _sites(places: Places, cache: ActivationCache) -> list[Site]:
    def value(point: str) -> Tensor:
        return cache[point][0].flatten(1)

    found = [
        of_dictionary(
            one.dictionary,
            one.point,
            one.out_point,
            one.layer,
            value(one.point),
            value(one.out_point),
            _parts(one.reading, cache[one.point]),
            _parts(one.writing, cache[one.out_point]),
        )
        for one in places.dictionaries
    ]
    found += [of_mixer(point, layer, value(point)) for point, layer in places.mixers.items()]
    found += [Site(point, layer, ERROR, at_least_float32(value(point))) for point, layer in places.whole.items()]
    return sorted(found, key=lambda site: places.order[site.point])


def _parts(reading: Reading, x: Tensor) -> Int[Tensor, "part width"]:
    """Which numbers of a point, flat, a dictionary takes as one vector."""
    one = x[:1, :1]
    taken = reading.take(torch.arange(one.numel(), device=x.device).reshape(one.shape))
    return taken.reshape(-1, taken.shape[-1])


def _content(cache: ActivationCache, flow: Flow) -> tuple[str, ...]:
    """The points that the content of a mixer is made of; all else in A is held."""
    names = (*flow.points, flow.output)
    with torch.enable_grad():
        leaves = {name: cache[name].detach().requires_grad_() for name in names}
        branches = ImplicitAttention.of(_of_rows(cache, leaves, 1), flow.layer, flow.place).branches
        total = torch.stack([branch.x.sum() for branch in branches]).sum()
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return tuple(name for name, gradient in zip(names, found, strict=True) if gradient is not None)


def _of_rows(cache: ActivationCache, values: dict[str, Tensor], rows: int) -> ActivationCache:
    """The cache of a prompt as if it had been run in so many rows."""
    tokens, documents = (None if one is None else one.expand(rows, -1) for one in (cache.tokens, cache.documents))
    return ActivationCache(values, cache.model, True, tokens, None, None, False, documents)


# -- the hooks ------------------------------------------------------------------------------------------------------


def _standing(value: Tensor) -> Callable[..., Tensor]:
    return lambda x, hook: value.reshape(x.shape).to(x.dtype)


def _noting(read: dict[str, Tensor], when: str = "") -> Callable[..., None]:
    def noting(x: Tensor, hook: Any) -> None:
        read[f"{hook.name}{when}"] = at_least_float32(x.flatten(2))

    return noting


def _keeping(now: dict[str, Tensor]) -> Callable[..., None]:
    def keeping(x: Tensor, hook: Any) -> None:
        now[str(hook.name)] = x

    return keeping


def _writing(
    site: Site, leaf: Tensor, read: Mapping[str, Tensor], more: Callable[[Site, Tensor], Tensor] | None
) -> Callable[..., Tensor]:
    def writing(x: Tensor, hook: Any) -> Tensor:
        value = leaf
        if site.nodes is not None:
            seen = read[site.nodes.reads.point]
            value = value if site.skip is None else value + seen @ site.skip
            value = value if more is None else value + more(site, seen)
        return value.reshape(x.shape).to(x.dtype)

    return writing

"""Examples: the texts at which a feature fires most, from a store or a batch, as a page that needs nothing else.

    found = gl.dictionaries.examples(model, sae, store)            # or tokens, texts
    found                                                          # in a notebook: the strongest features
    found.page([17, 23]).save("features.html")
    found[17][0]                                                   # an Example: where, how strongly, words and activations

Of each sample its strongest position is one example. Under each feature stand the share of positions at which it fires, the
tokens that fire it most on average, and, where the dictionary writes to the residual stream, those that its decoder row speaks
for and against: W_dec[feature] * gain @ W_U, each less the mean of all tokens.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gatedlens.dictionaries.dictionary import Dictionary
from gatedlens.dictionaries.reading import Reading
from gatedlens.dictionaries.splicing import Spliced
from gatedlens.errors import InputError, PointError
from gatedlens.markup import BORDER, number
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Batch, Input
from gatedlens.model.language import HookedLanguageModel
from gatedlens.options import checked, is_whole
from gatedlens.plot.coloured_text import Html, legend, style
from gatedlens.plot.drawing import label
from gatedlens.runs import inputs

if TYPE_CHECKING:  # a word: whatever reads samples by a name will do
    from gatedlens.store import Store

    Texts: TypeAlias = Store | Input
else:
    Texts = Any

__all__ = ["Example", "Examples", "examples"]

SHOWN = 8  # features in a notebook, tokens in a list
BARS = 20
ROWS = 64  # of a batch, run together
Read = Callable[[], tuple[Tensor, dict[str, Tensor], list[int]]]  # tokens, what is read by point, where samples begin


@dataclass(frozen=True)
class Example:
    """A feature at a place: its `value` at position `pos` of a sample; `words` and `activations` of what stands around it."""

    feature: int
    sample: int
    pos: int
    value: float
    words: tuple[str, ...]
    activations: tuple[float, ...]
    at: int  # which of the words

    def __repr__(self) -> str:
        said = " ".join(f"[{word}]" if i == self.at else word for i, word in enumerate(self.words))
        return f"Example(feature {self.feature}, {number(self.value)} at {self.pos} of sample {self.sample}: {said})"


@dataclass(frozen=True, eq=False)
class Examples:
    """`found[17]`: a feature's Examples, the strongest first; `rates` [feature]; `page()`."""

    dictionary: Dictionary
    held: dict[int, tuple[Example, ...]]
    rates: Float[Tensor, " feature"]
    bars: Int[Tensor, "feature bar"]  # how many positions fire at each twentieth of the largest value
    firing: dict[int, tuple[tuple[str, float], ...]]  # tokens at which it fires, with the mean value there
    writes: dict[int, tuple[tuple[str, ...], tuple[str, ...]]]  # tokens that its decoder row speaks for, and against
    model: str

    def __getitem__(self, feature: int) -> tuple[Example, ...]:
        if feature not in self.held:
            raise InputError(
                f"There are no examples of feature {feature}: it was not asked for, or there is none; there are "
                f"{', '.join(map(str, list(self.held)[:8]))}{' ...' * (len(self.held) > 8)}."
            )
        return self.held[feature]

    def __len__(self) -> int:
        return len(self.held)

    def __repr__(self) -> str:
        return f"Examples({len(self)} features of {self.dictionary!r})"

    def _repr_html_(self) -> str:
        return self.page(self._strongest(SHOWN)).body

    def _strongest(self, n: int) -> list[int]:
        best = {feature: found[0].value for feature, found in self.held.items() if found}
        return sorted(best, key=lambda feature: -best[feature])[:n]

    @checked
    def page(self, features: Sequence[int] | None = None, title: str | None = None) -> Html:
        """`found.page([17, 23]).save("features.html")`: a self-contained page of some features; None: all, the strongest first.

        A token's colour is its activation, red up to the feature's largest; hover for the number. InputError for a feature
        without examples.
        """
        chosen = (
            [*self._strongest(len(self)), *(f for f, e in self.held.items() if not e)] if features is None else features
        )
        of = ", ".join(self.dictionary.points)
        title = title or f"Features of {of}, {self.model}"
        body = f"<h1 style='font-size:1.4em'>{html.escape(title)}</h1><p>{html.escape(repr(self.dictionary))}</p>"
        return Html(body + "".join(self._section(feature) for feature in chosen), title)

    def _section(self, feature: int) -> str:
        found, rate = self[feature], float(self.rates[feature])
        head = f"<h2 style='font-size:1.1em;margin:1.2em 0 .2em'>feature {feature}</h2>"
        if not found:
            return f"{head}<p>It fires nowhere here.</p>"
        top = found[0].value
        said = [f"fires at {rate:.2%} of the positions, up to {number(top)}"]
        said.append("at " + ", ".join(f"{_code(word)} ({number(mean)})" for word, mean in self.firing[feature]))
        if feature in self.writes:
            up, down = self.writes[feature]
            said.append(f"writes for {', '.join(map(_code, up))}; against {', '.join(map(_code, down))}")
        lines = "".join(f"<div>{line}</div>" for line in said)
        rows = "".join(_row(example, top) for example in found)
        table = (
            f"<div style='overflow-x:auto'><table style='border-collapse:collapse;margin:.4em 0'>{rows}</table></div>"
        )
        return f"{head}{lines}{_bars(self.bars[feature].tolist(), top)}{table}{legend(0.0, top, 'activation')}"


def _code(word: str) -> str:
    return f"<code>{html.escape(label(word))}</code>"


def _row(example: Example, top: float) -> str:
    spans = ""
    for i, (word, value) in enumerate(zip(example.words, example.activations, strict=True)):
        hover = html.escape(f"{word!r}: {number(value)}", quote=True)
        mark = ";outline:2px solid currentColor" if i == example.at else ""
        spans += f"<span title='{hover}' style='{style(value / top)}{mark}'>{html.escape(label(word))}</span>"
    cell = "padding:2px 10px 2px 0;vertical-align:top;white-space:nowrap"
    where = f"sample {example.sample}, position {example.pos}"
    return (
        f"<tr><td style='{cell}'>{number(example.value)}</td>"
        f"<td style='font-family:monospace;line-height:1.9'>{spans}</td>"
        f"<td style='{cell};opacity:.7;padding-left:10px'>{where}</td></tr>"
    )


def _bars(counts: Sequence[int], top: float) -> str:
    """How often which values occur: a bar for each twentieth of the largest."""
    most = max(max(counts), 1)
    bars = "".join(
        f"<span title='{number(i * top / len(counts))} to {number((i + 1) * top / len(counts))}: {count}' "
        f"style='display:inline-block;width:.6em;height:{2.2 * count / most:.2f}em;background:rgba(214,40,40,.6)'></span>"
        for i, count in enumerate(counts)
    )
    ends = f"<small>0</small> {bars} <small>{number(top)}</small>"
    return f"<div style='margin:.3em 0;{BORDER};display:inline-block;padding:.2em .4em' title='values above 0'>{ends}</div>"


# -- finding them ---------------------------------------------------------------------------------------------------


@checked
@torch.no_grad()
def examples(
    model: HookedModel,
    dictionary: Dictionary,
    source: Texts,
    features: Sequence[int] | None = None,
    n: int = 6,
    around: int = 12,
) -> Examples:
    """`gl.dictionaries.examples(model, sae, store, [17, 23])`: Examples: the `n` samples at which each feature fires most.

    source: a store that holds what the dictionary reads, or texts, ids, (ids, mask) that are run. features: which; None: all.
    around: how many tokens before and behind the place stand in an example. Of a dictionary of heads a position's value is the
    largest of its heads.

    PointError for a store without the point; InputError for a dictionary that does not fit, a feature that it lacks, and a model
    that reads no tokens.
    """
    if not isinstance(model, HookedLanguageModel):
        raise InputError(f"{model.cfg.model_name} reads no tokens: examples are texts.")
    for name, value, least in (("n", n, 1), ("around", around, 0)):
        if value < least:
            raise InputError(f"{name}={value}: it is at least {least}.")
    one = Spliced.of(model, dictionary)
    chosen = list(range(dictionary.n_features)) if features is None else list(features)
    for feature in chosen:
        if not is_whole(feature) or not 0 <= feature < dictionary.n_features:
            raise InputError(
                f"feature {feature!r:.40}: the dictionary has {dictionary.n_features}, 0 to {dictionary.n_features - 1}."
            )
    samples = Samples(model, one, source)
    best, rates, top = _strongest(samples, dictionary, n)
    bars, firing = _where_it_fires(model, samples, chosen, top)
    held = _shown(model, samples, best, chosen, around)
    return Examples(dictionary, held, rates, bars, firing, _written(model, one, chosen), model.cfg.model_name)


class Chunk(NamedTuple):
    """Some samples one behind the other: tokens [entry], features [entry feature], and where each begins and the last ends."""

    first: int
    tokens: Tensor
    features: Tensor
    ends: list[int]

    def samples(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(its number, tokens [pos], features [pos feature]) of each."""
        for i, (begin, end) in enumerate(pairwise(self.ends)):
            yield self.first + i, self.tokens[begin:end], self.features[begin:end]


class Samples:
    """`for chunk in samples.chunks()`: all samples, some at a time; `wanted(first, n)` says which chunks are read at all."""

    def __init__(self, model: HookedModel, one: Spliced, source: Any):
        self.model, self.one = model, one
        self.store = None if isinstance(source, str | list | tuple | Tensor | Batch) else source
        if self.store is None:
            self.batch = inputs.ready(model, source)
            return
        lacking = [reading.name for reading in one.reads if reading.name not in self.store]
        if lacking:
            raise PointError(f"{', '.join(lacking)} is not in {self.store!r}: harvest it.")

    def chunks(self, wanted: Container[int] | None = None) -> Iterator[Chunk]:
        """All samples; of `wanted`, only the chunks that hold one of these."""
        parts = self._of_inputs if self.store is None else self._of_store
        for first, n, read in parts():
            if wanted is None or any(sample in wanted for sample in range(first, first + n)):
                tokens, values, ends = read()
                x = torch.cat([one.take(values[one.name].unsqueeze(0)) for one in self.one.reads], -1)
                f = self.one.dictionary.encode(x)[0]
                yield Chunk(first, tokens.cpu(), (f if f.ndim == 2 else f.flatten(1, -2).amax(1)).cpu(), ends)

    def _of_store(self) -> Iterator[tuple[int, int, Read]]:
        """A batch of the harvest at a time."""
        store: Any = self.store
        for batch, entry in enumerate(store.batches):

            def read(batch: int = batch) -> tuple[Tensor, dict[str, Tensor], list[int]]:
                tokens, ends = store.batch_of("token_ids", batch)
                return tokens, {one.name: store.batch_of(one.name, batch)[0] for one in self.one.reads}, ends

            yield store.first_row[batch], entry.rows, read

    def _of_inputs(self) -> Iterator[tuple[int, int, Read]]:
        """Some rows of the batch at a time."""
        names = [one.name for one in self.one.reads]
        for start in range(0, len(self.batch.value), ROWS):
            some = slice(start, start + ROWS)
            mask = None if self.batch.mask is None else self.batch.mask[some]
            part = Batch(self.batch.value[some], mask, self.batch.is_resid)

            def read(part: Batch = part) -> tuple[Tensor, dict[str, Tensor], list[int]]:
                real = inputs.real(self.model, part)
                _, cache = self.model.run_with_cache(part, names_filter=names)
                return (
                    part.value[real],
                    {name: cache[name][real] for name in names},
                    [0, *accumulate(real.sum(1).tolist())],
                )

            yield start, len(part.value), read


def _strongest(samples: Samples, dictionary: Dictionary, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """[rank feature 3]: value, sample and position of the strongest; the share of positions that fire; the largest values."""
    best = torch.full((n, dictionary.n_features, 3), -1.0, dtype=torch.float64)
    fired, count = torch.zeros(dictionary.n_features), 0
    for chunk in samples.chunks():
        mine = [best]
        for sample, _, f in chunk.samples():
            if len(f):
                value, pos = f.double().max(0)
                mine.append(torch.stack([value, torch.full_like(value, sample), pos.double()], -1).unsqueeze(0))
        both = torch.cat(mine)
        order = both[..., 0].argsort(dim=0, descending=True, stable=True)[:n]
        best = both.gather(0, order.unsqueeze(-1).expand(-1, -1, 3))
        fired, count = fired + (chunk.features > 0).sum(0), count + len(chunk.features)
    return best, fired / max(count, 1), best[0, :, 0].clamp(min=0)


def _where_it_fires(
    model: HookedModel, samples: Samples, chosen: Sequence[int], top: Tensor
) -> tuple[Tensor, dict[int, tuple[tuple[str, float], ...]]]:
    """How often each twentieth of the largest value occurs [feature bar], and the tokens at which each feature fires."""
    bars, high = torch.zeros(len(chosen), BARS, dtype=torch.long), top[list(chosen)].clamp(min=1e-30)
    sums = Sums.empty()
    for chunk in samples.chunks():
        some = chunk.features[:, list(chosen)].double()
        place, feature = some.nonzero().unbind(1)
        values = some[place, feature]
        bar = (BARS * values / high[feature]).long().clamp(max=BARS - 1)
        bars += torch.bincount(feature * BARS + bar, minlength=bars.numel()).view_as(bars)
        sums = sums.more(torch.stack([feature, chunk.tokens[place].long()], 1), values)
    all_bars = torch.zeros(len(top), BARS, dtype=torch.long)
    all_bars[list(chosen)] = bars
    firing = {}
    for at, which in enumerate(chosen):
        mine = sums.keys[:, 0] == at
        tokens, total, count = sums.keys[mine, 1], sums.total[mine], sums.count[mine]
        most = total.argsort(dim=0, descending=True, stable=True)[:SHOWN].tolist()
        firing[which] = tuple((inputs.word(model, int(tokens[i])), float(total[i] / count[i])) for i in most)
    return all_bars, firing


@dataclass(frozen=True)
class Sums:
    """Sums and counts of values by key; keys [key 2] are all different."""

    keys: Tensor
    total: Tensor
    count: Tensor

    @staticmethod
    def empty() -> Sums:
        nothing = torch.zeros(0, dtype=torch.float64)
        return Sums(torch.zeros(0, 2, dtype=torch.long), nothing, nothing)

    def more(self, keys: Tensor, values: Tensor) -> Sums:
        """With these values as well."""
        different, at = torch.cat([self.keys, keys]).unique(dim=0, return_inverse=True)
        nothing = torch.zeros(len(different), dtype=torch.float64)
        total = nothing.index_add(0, at, torch.cat([self.total, values]))
        return Sums(different, total, nothing.index_add(0, at, torch.cat([self.count, torch.ones_like(values)])))


def _shown(
    model: HookedModel, samples: Samples, best: Tensor, chosen: Sequence[int], around: int
) -> dict[int, tuple[Example, ...]]:
    """The Examples of each feature, each sample read once."""
    wanted: dict[int, list[tuple[int, int, int, float]]] = {}
    for feature in chosen:
        for rank, (value, sample, pos) in enumerate(best[:, feature].tolist()):
            if value > 0:
                wanted.setdefault(int(sample), []).append((feature, rank, int(pos), value))
    found: dict[int, dict[int, Example]] = {feature: {} for feature in chosen}
    for chunk in samples.chunks(wanted):
        for sample, tokens, f in chunk.samples():
            if sample not in wanted:
                continue
            words = [inputs.word(model, token) for token in tokens.tolist()]
            for feature, rank, pos, value in wanted[sample]:
                some = slice(max(0, pos - around), pos + around + 1)
                values = tuple(f[some, feature].tolist())
                found[feature][rank] = Example(
                    feature, sample, pos, value, tuple(words[some]), values, pos - some.start
                )
    return {feature: tuple(held[rank] for rank in sorted(held)) for feature, held in found.items()}


def _written(
    model: HookedLanguageModel, one: Spliced, chosen: Sequence[int]
) -> dict[int, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Which tokens each decoder row speaks for and against, where it is written to the residual stream."""
    place: Reading = one.writes[0]
    if place.vector != ("d_model",) or len(one.writes) > 1:
        return {}
    rows = one.dictionary.W_dec[list(chosen)].to(model.W_U)
    logits = model.ln_final.directions(rows) @ model.W_U
    logits = logits - logits.mean(-1, keepdim=True)
    k = min(SHOWN, logits.shape[-1] // 2)
    said = {}
    for feature, row in zip(chosen, logits, strict=True):
        ends = [
            tuple(inputs.word(model, token) for token in row.topk(k, largest=up).indices.tolist())
            for up in (True, False)
        ]
        said[feature] = (ends[0], ends[1])
    return said

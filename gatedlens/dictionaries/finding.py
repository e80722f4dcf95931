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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from gatedlens.dictionaries.dictionary import Dictionary
from gatedlens.dictionaries.example import Example
from gatedlens.dictionaries.found_examples import Examples
from gatedlens.dictionaries.reading import Reading
from gatedlens.dictionaries.samples import Samples
from gatedlens.dictionaries.splicing import Spliced
from gatedlens.errors import InputError
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Input
from gatedlens.model.language import HookedLanguageModel
from gatedlens.options import checked, is_whole
from gatedlens.runs import inputs

if TYPE_CHECKING:  # a word: whatever reads samples by a name will do
    from gatedlens.store import Store

    Texts: TypeAlias = Store | Input
else:
    Texts = Any

__all__ = ["examples"]

LISTED = 8  # tokens
BARS = 20


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
        most = total.argsort(dim=0, descending=True, stable=True)[:LISTED].tolist()
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
    k = min(LISTED, logits.shape[-1] // 2)
    said = {}
    for feature, row in zip(chosen, logits, strict=True):
        ends = [
            tuple(inputs.word(model, token) for token in row.topk(k, largest=up).indices.tolist())
            for up in (True, False)
        ]
        said[feature] = (ends[0], ends[1])
    return said

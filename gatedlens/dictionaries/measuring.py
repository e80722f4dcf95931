"""Measuring a dictionary: what it keeps of the activations, and what the model makes of its reconstruction.

    found = gl.dictionaries.measure(model, sae, tokens)                 # the loss of the next token
    found = gl.dictionaries.measure(model, sae, prompts, metric=gl.metrics.cross_entropy(answers))
    found.recovered, found.explained, found.l0, found.dead
    found.rates.plot()                                                 # a Result [feature]: at what share of positions each fires

With m the metric of the model as it is, of the reconstruction in place of what is written (the error ablated), of zeros
there, and of the mean over all positions there:

    recovered = (m_zero - m_reconstructed) / (m_zero - m_model)          over_mean: m_mean in place of m_zero
    explained = 1 - sum |y - reconstruction|^2 / sum |y - mean y|^2

Padding counts nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gatedlens.dictionaries.dictionary import Dictionary
from gatedlens.dictionaries.reading import Reading
from gatedlens.dictionaries.splicing import Spliced, splice
from gatedlens.errors import InputError
from gatedlens.markup import card, table
from gatedlens.metrics import Logits, Metric
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Batch, Input
from gatedlens.model.language import HookedLanguageModel
from gatedlens.options import checked
from gatedlens.result.result import Result
from gatedlens.runs import inputs

__all__ = ["Quality", "measure"]

Hooks = list[tuple[str, Callable[..., Any]]]


@dataclass(frozen=True, eq=False)
class Quality:
    """What `measure` found; `rates` a Result [feature], the share of positions at which each fires."""

    model: float
    reconstructed: float
    zero: float
    mean: float
    explained: float
    l0: float
    dead: float
    positions: int
    rates: Result

    @property
    def recovered(self) -> float:
        """Which share of what a zero ablation does to the metric the reconstruction avoids."""
        return _share(self.zero, self.reconstructed, self.model)

    @property
    def over_mean(self) -> float:
        """The same of what an ablation by the mean does."""
        return _share(self.mean, self.reconstructed, self.model)

    def to_dict(self) -> dict[str, float]:
        """`found.to_dict()`: every number by name, for a header or a table."""
        numbers = {name: value for name, value in asdict(self).items() if name != "rates"}
        return {**numbers, "recovered": self.recovered, "over_mean": self.over_mean}

    def __repr__(self) -> str:
        return (
            f"Quality(recovered {self.recovered:.1%}, explained {self.explained:.1%}, l0 {self.l0:.4g}, dead {self.dead:.1%}, "
            f"{self.positions} positions)"
        )

    def _repr_html_(self) -> str:
        facts = {"recovered": f"{self.recovered:.1%}", "explained": f"{self.explained:.1%}", "l0": self.l0}
        return card("Quality of a dictionary", facts, table(["", ""], [*self.to_dict().items()], 20))


def _share(low: float, here: float, high: float) -> float:
    return (low - here) / (low - high) if low != high else float("nan")


@checked
@torch.no_grad()
def measure(
    model: HookedModel,
    dictionary: Dictionary,
    input: Input,
    metric: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 32,
) -> Quality:
    """`gl.dictionaries.measure(model, sae, tokens)`: a Quality: loss recovered, variance explained, l0, dead features.

    input: texts, ids [row, pos], a pair (ids, mask), images. metric: logits -> one number a row, of which less is better; None
    for the loss of the next token, which a language model alone has. batch_size: how many rows run together; a metric is called
    with the logits of all of them.

    InputError for a dictionary that does not fit, and without a metric where there is no loss. Source: loss recovered: Bricken et
    al. 2023.
    """
    if metric is None and not isinstance(model, HookedLanguageModel):
        raise InputError(
            f"{model.cfg.model_name} has no loss of the next token: give a metric, logits -> one number a row."
        )
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}: give at least 1.")
    parts = list(_parts(inputs.ready(model, input), batch_size))
    with splice(model, dictionary) as (one,):
        sums = Sums.of(model, one, parts)
        alone = [(name, _zero) for name in one.errors]
        found = {
            "model": _metric(model, parts, metric, []),
            "reconstructed": _metric(model, parts, metric, alone),
            "zero": _metric(model, parts, metric, _constant(one, [torch.zeros_like(mean) for mean in sums.means])),
            "mean": _metric(model, parts, metric, _constant(one, sums.means)),
        }
    facts = {"model": model.cfg.model_name, "point": list(dictionary.points), "positions": sums.n}
    title = f"How often features of {one.where} fire"
    rates = Result(sums.fired / sums.n, ("feature",), title=title, value="share of positions", facts=facts)
    dead = float((sums.fired == 0).double().mean())
    l0 = float(sums.fired.sum() / sums.n)
    return Quality(**found, explained=sums.explained, l0=l0, dead=dead, positions=sums.n, rates=rates)


def _parts(batch: Batch, size: int) -> Iterator[Batch]:
    """The rows, so many at a time."""
    for start in range(0, len(batch.value), size):
        some = slice(start, start + size)
        yield Batch(batch.value[some], None if batch.mask is None else batch.mask[some], batch.is_resid)


def _zero(x: Tensor, hook: Any) -> Tensor:
    return torch.zeros_like(x)


def _constant(one: Spliced, values: Sequence[Tensor]) -> Hooks:
    """A vector at every position of what is written."""

    def put(reading: Reading, value: Tensor) -> Callable[..., Tensor]:
        return lambda y, hook: reading.put(y, value.to(y).expand_as(reading.take(y)))

    return [(reading.name, put(reading, value)) for reading, value in zip(one.writes, values, strict=True)]


def _metric(model: HookedModel, parts: Sequence[Batch], metric: Metric | None, hooks: Hooks) -> float:
    """The mean metric with some hooks on."""
    total, n, logits = 0.0, 0, []
    for part in parts:
        if metric is not None:
            logits.append(model.run_with_hooks(part, fwd_hooks=hooks))
            continue
        targets = int((inputs.real(model, part).sum(1) - 1).clamp(min=0).sum())
        if targets:
            total += float(model.run_with_hooks(part, "loss", fwd_hooks=hooks)) * targets
        n += targets
    if metric is None:
        if not n:
            raise InputError("A loss needs a row of at least two tokens.")
        return total / n
    masks = [inputs.real(model, part) for part in parts]
    whole = torch.cat(logits)
    return float(metric(Logits.of(whole, torch.cat(masks) if whole.ndim == 3 else None)).double().mean())


@dataclass
class Sums:
    """What is summed over the real positions: features that fire, squares of the error, moments of what is written."""

    n: int
    fired: Tensor
    lost: float
    total: float
    means: list[Tensor]

    @property
    def explained(self) -> float:
        """1 - lost / total; NaN where nothing varies."""
        return 1 - self.lost / self.total if self.total else float("nan")

    @staticmethod
    def of(model: HookedModel, one: Spliced, parts: Sequence[Batch]) -> Sums:
        """Squares are summed around each part's own mean, so that none is a difference of large numbers."""
        sums = [torch.zeros(width, dtype=torch.float64) for width in one.dictionary.d_outs]
        fired, lost, n = torch.zeros(one.dictionary.n_features, dtype=torch.float64), 0.0, 0
        held = []
        for part in parts:
            names = [one.features, *one.errors, *one.reconstructions]
            _, cache = model.run_with_cache(part, names_filter=names)
            real = inputs.real(model, part)
            f = _real(cache[one.features], one, real)
            fired, n = fired + (f > 0).double().sum(0).cpu(), n + len(f)
            errors = [_real(cache[name], one, real).double().cpu() for name in one.errors]
            ys = [
                _real(cache[r], one, real).double().cpu() + e for r, e in zip(one.reconstructions, errors, strict=True)
            ]
            lost += sum(float(e.square().sum()) for e in errors)
            sums = [total + y.sum(0) for total, y in zip(sums, ys, strict=True)]
            held.append([(len(y), y.mean(0), (y - y.mean(0)).square().sum(0)) for y in ys])
        means = [total / n for total in sums]
        total = sum(
            float((squares + count * (mean - whole).square()).sum())
            for part_ in held
            for (count, mean, squares), whole in zip(part_, means, strict=True)
        )
        return Sums(n, fired, lost, total, means)


def _real(x: Tensor, one: Spliced, real: Tensor) -> Tensor:
    """The vectors of real positions, [entry, width]; of a point without positions, all."""
    return x[real.to(x.device)].flatten(0, -2) if "pos" in one.reads[0].lead else x.flatten(0, -2)

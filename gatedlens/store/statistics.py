"""Statistics of a corpus: how they are summed batch by batch in a harvest with `reduce`, and read from its store.

    gl.store.harvest(model, texts, names, "out", reduce=["mean", "covariance", gl.store.sample(4096)])
    statistics = gl.store.open("out").statistics
    statistics["gated", 1]["mean"]                       # channel
    both = statistics.merge(gl.store.open("other").statistics)

A Reduction is three functions: `of` a batch of entries [n, ...], `merge` of two parts, `result`. A part is a dict of tensors,
so parts of batches, machines or corpora are put together in any way. Sums are never squared before they are centred (Chan,
Golub and LeVeque 1979; third and fourth moments: Pébay 2008, eq. 2.1): a mean of 1e6 with a deviation of 1 is no trouble.

n entries, mean, M2 = sum (x - mean)^2, M3, M4 likewise, C = sum (x - mean)(x - mean)^T; float64 throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from gatedlens.address.entries import Index
from gatedlens.address.key import Key
from gatedlens.errors import InputError, did_you_mean
from gatedlens.options import is_many
from gatedlens.store.disk.layout import Layout

Part = dict[str, Tensor]


@dataclass(frozen=True)
class Reduction:
    """`of(values, first)`, values [n, ...] with `first` entries before them; `merge(a, b)`; `result(part)`."""

    name: str
    of: Callable[[Tensor, int], Part]
    merge: Callable[[Part, Part], Part]
    result: Callable[[Part], Tensor]
    bytes: Callable[[int], int]  # of a part, from the numbers in an entry

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by name: functions do not travel to other machines."""
        return by_name, (self.name,)


# What `reduce=` takes. For editors: another kind gets the error of `chosen`.
if TYPE_CHECKING:
    Reductions: TypeAlias = str | Reduction | Sequence[str | Reduction] | None
else:
    Reductions = Any


# -- moments --------------------------------------------------------------------------------------------------------


def _moments(order: int) -> Callable[[Tensor, int], Part]:
    def of(values: Tensor, first: int) -> Part:
        x = values.double()
        mean = x.mean(0)
        centred = x - mean
        sums = {f"M{power}": centred.pow(power).sum(0) for power in range(2, order + 1)}
        return {"n": torch.tensor(float(len(x)), dtype=torch.float64), "mean": mean, **sums}

    return of


def _merge_moments(a: Part, b: Part) -> Part:
    """Pébay 2008, eq. 2.1, for powers 2 to 4: sums around the mean of both, from those around each one's own."""
    na, nb = a["n"], b["n"]
    n, delta = na + nb, b["mean"] - a["mean"]
    out = {"n": n, "mean": a["mean"] + delta * nb / n}
    if "M2" in a:
        out["M2"] = a["M2"] + b["M2"] + delta**2 * na * nb / n
    if "M3" in a:
        cross = delta**3 * na * nb * (na - nb) / n**2 + 3 * delta * (na * b["M2"] - nb * a["M2"]) / n
        out["M3"] = a["M3"] + b["M3"] + cross
    if "M4" in a:
        cross = delta**4 * na * nb * (na**2 - na * nb + nb**2) / n**3
        cross = cross + 6 * delta**2 * (na**2 * b["M2"] + nb**2 * a["M2"]) / n**2
        out["M4"] = a["M4"] + b["M4"] + cross + 4 * delta * (na * b["M3"] - nb * a["M3"]) / n
    return out


def _comoments(values: Tensor, first: int) -> Part:
    x = values.flatten(1).double()
    mean = x.mean(0)
    centred = x - mean
    return {"n": torch.tensor(float(len(x)), dtype=torch.float64), "mean": mean, "C": centred.T @ centred}


def _merge_comoments(a: Part, b: Part) -> Part:
    """As M2 of `_merge_moments`, for every pair of numbers in an entry."""
    na, nb = a["n"], b["n"]
    n, delta = na + nb, b["mean"] - a["mean"]
    return {
        "n": n,
        "mean": a["mean"] + delta * nb / n,
        "C": a["C"] + b["C"] + torch.outer(delta, delta) * (na * nb / n),
    }


def _second_moment(part: Part) -> Tensor:
    return part["C"] / part["n"] + torch.outer(part["mean"], part["mean"])


def _maximum(values: Tensor, first: int) -> Part:
    best = values.max(0)
    return {"max": best.values, "at": best.indices + first}


def _merge_maximum(a: Part, b: Part) -> Part:
    wins = b["max"] > a["max"]  # of equal ones that of `a`, which comes first, stays
    return {"max": torch.where(wins, b["max"], a["max"]), "at": torch.where(wins, b["at"], a["at"])}


# -- a sample -------------------------------------------------------------------------------------------------------


# splitmix64's constants (Steele, Lea and Flood 2014) as the signed numbers of the same bits: torch has no uint64 arithmetic.
def _scrambled(index: Tensor, seed: int) -> Tensor:
    """A random 63-bit number for each entry (splitmix64 of its place in the corpus): the same in every run."""
    x = (index + 1) * -0x61C8864680B583EB + seed * 0x2545F4914F6CDD1D % (1 << 63)
    x = _folded(x, 30) * -0x40A7B892E31B1A47
    x = _folded(x, 27) * -0x6B2FB644ECCEEE15
    return _folded(x, 31) & ((1 << 63) - 1)


def _folded(x: Tensor, by: int) -> Tensor:
    """x ^ (x >> by) of unsigned numbers: torch shifts the sign in."""
    return x ^ ((x >> by) & ((1 << (64 - by)) - 1))


def sample(size: int, seed: int = 0) -> Reduction:
    """`gl.store.sample(4096)`: that many entries, drawn evenly from the whole corpus without replacement.

    Each entry gets a random number from its place in the corpus, and the smallest `size` numbers stay: so a sample does
    not depend on the batch size or on interruptions. Corpora that will be merged need seeds of their own. InputError for a
    size below 1.
    """
    if not isinstance(size, int) or size < 1:
        raise InputError(f"sample({size!r}): a sample has at least 1 entry.")

    of, merge = partial(_sampled, size, seed), partial(_merge_samples, size)
    return Reduction(
        f"sample({size}, seed={seed})", of, merge, lambda part: part["values"], lambda d: size * (8 * d + 16)
    )


def _sampled(size: int, seed: int, values: Tensor, first: int) -> Part:
    at = torch.arange(first, first + len(values))
    return _smallest(size, {"key": _scrambled(at, seed), "at": at, "values": values})


def _merge_samples(size: int, a: Part, b: Part) -> Part:
    if bool(torch.isin(a["key"], b["key"]).any()):
        raise InputError("Two samples of one seed cannot be merged: their draws are the same. Give each its own seed.")
    return _smallest(size, {name: torch.cat([a[name], b[name]]) for name in a})


def _smallest(size: int, part: Part) -> Part:
    order = part["key"].argsort(stable=True)[:size]
    return {name: value[order] for name, value in part.items()}


def misfit(parts: Mapping[str, Part], wanted: Mapping[tuple[str, Reduction], Layout]) -> str | None:
    """Which field of some parts, {"point/reduction": {field: tensor}}, is not as it is made; None if all are."""
    for (name, reduction), layout in wanted.items():
        examples = [reduction.of(torch.zeros(n, *layout.shape, dtype=layout.dtype), 0) for n in (1, 2)]
        part = parts.get(f"{name}/{reduction.name}", {})
        for field, one in examples[0].items():
            # A sample has as many entries as it has: where one entry and two differ, any number is right.
            shape = [a if a == b else None for a, b in zip(one.shape, examples[1][field].shape, strict=True)]
            where, found = f"{name}/{reduction.name}/{field}", part.get(field)
            if found is None:
                return f"{where} is missing"
            fits = len(shape) == found.ndim and all(a in (None, b) for a, b in zip(shape, found.shape, strict=True))
            if found.dtype != one.dtype or not fits:
                return f"{where} is {found.dtype} {list(found.shape)}, expected {one.dtype} {shape}"
    strange = set(parts) - {f"{name}/{reduction.name}" for name, reduction in wanted}
    return f"{min(strange)} is no part of this store" if strange else None


# -- by name --------------------------------------------------------------------------------------------------------


def _each(d: int, fields: int) -> int:
    return 8 * d * fields + 8


REDUCTIONS = {
    one.name: one
    for one in (
        Reduction("mean", _moments(1), _merge_moments, lambda p: p["mean"], lambda d: _each(d, 1)),
        Reduction("variance", _moments(2), _merge_moments, lambda p: p["M2"] / p["n"], lambda d: _each(d, 2)),
        Reduction(
            "kurtosis", _moments(4), _merge_moments, lambda p: p["n"] * p["M4"] / p["M2"] ** 2, lambda d: _each(d, 4)
        ),  # Pearson's: 3 for a normal distribution
        Reduction("max", _maximum, _merge_maximum, lambda p: p["max"], lambda d: _each(d, 2)),
        Reduction("covariance", _comoments, _merge_comoments, lambda p: p["C"] / p["n"], lambda d: _each(d, d + 1)),
        Reduction("second_moment", _comoments, _merge_comoments, _second_moment, lambda d: _each(d, d + 1)),
        sample(1024),
    )
}


def chosen(reduce: Reductions) -> tuple[Reduction, ...]:
    """The reductions that `reduce` names: a name, a Reduction, or a list of these; none of None."""
    if reduce is None:
        return ()
    several: list[Any] = [reduce] if isinstance(reduce, str | Reduction) or not is_many(reduce) else list(reduce)
    if not several:
        raise InputError("reduce=[] names no statistic; pass None for the activations themselves.")
    return tuple(one if isinstance(one, Reduction) else by_name(one) for one in several)


def by_name(name: object) -> Reduction:
    """The reduction of this name; "sample" and "sample(4096, seed=1)" as well."""
    if isinstance(name, str) and name in REDUCTIONS:
        return REDUCTIONS[name]
    if isinstance(name, str) and name.startswith("sample"):
        words = name.removeprefix("sample").strip("()").replace("seed=", "").replace(",", " ").split()
        if all(word.isdigit() for word in words) and len(words) <= 2:
            return sample(*[int(word) for word in words] or [1024])
    known = [*(one for one in REDUCTIONS if not one.startswith("sample")), "sample"]
    raise InputError(f"reduce={name!r}: it is {', '.join(known)}, or a list of these.{did_you_mean(str(name), known)}")


PAIRS = ("covariance", "second_moment")  # of every number of an entry with every other


class Statistics:
    """`statistics["gated", 1]["mean"]`: {reduction: tensor} of a point, named as in a store; `merge` adds another corpus.

    Moments are float64. "kurtosis" is Pearson's, 3 for a normal distribution; "variance" and "covariance" divide by n.
    """

    def __init__(self, parts: dict[str, Part], find: Callable[[Any], Layout]):
        self.parts = parts
        self._find = find

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(key.partition("/")[0] for key in self.parts))

    def __getitem__(self, key: Any) -> dict[str, Tensor]:
        name = self._find(key).name
        found = {key.partition("/")[2]: part for key, part in self.parts.items() if key.partition("/")[0] == name}
        return {reduction: by_name(reduction).result(part) for reduction, part in found.items()}

    def select(self, key: Key, **index: Index) -> dict[str, Tensor]:
        """`statistics.select(("gated", 1), head=2)["covariance"]`: the statistics of some entries of a point, as in
        `Column.select`: of a covariance those entries by those entries. PointError for an axis that there is not.
        """
        layout = self._find(key)
        found, shape = {}, layout.shape
        for name, value in self[key].items():
            if name in PAIRS:  # [numbers, numbers], each side an entry laid flat
                n = layout.numbers
                value = layout.picked(value.reshape(n, *shape), index, ("entry",)).flatten(1)
                found[name] = layout.picked(value.T.reshape(-1, *shape), index, ("entry",)).flatten(1).T
            else:
                front = ("entry",) if value.ndim > len(shape) else ()  # a sample has entries
                found[name] = layout.picked(value, index, front)
        return found

    def by_head(self, key: Key) -> dict[str, Tensor]:
        """`statistics.by_head(("gated", 1))["covariance"]`: [head, value, value], the statistics of each head of a point.

        Each as in `select`, the heads that were harvested one behind the other. PointError for a point without heads.
        """
        layout = self._find(key)
        total = {**layout.sizes, **dict(zip(layout.entry_axes, layout.shape, strict=True))}.get("head", 1)
        each = [self.select(key, head=head) for head in layout.kept.get("head", range(total))]
        return {name: torch.stack([one[name] for one in each]) for name in each[0]}

    def merge(self, other: Statistics) -> Statistics:
        """`both = statistics.merge(other)`: the statistics of both corpora together.

        InputError unless both hold the same reductions of the same points, and samples of different seeds.
        """
        if set(self.parts) != set(other.parts):
            only = sorted(set(self.parts) ^ set(other.parts))
            raise InputError(f"These statistics do not fit together: only one of them holds {', '.join(only[:4])}.")
        merged = {key: by_name(key.partition("/")[2]).merge(part, other.parts[key]) for key, part in self.parts.items()}
        return Statistics(merged, self._find)

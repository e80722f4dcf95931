"""Statistics of a corpus, from a harvest with `reduce`.

statistics = gl.store.open("out").statistics
statistics["gated", 1]["mean"]                       # channel
both = statistics.merge(gl.store.open("other").statistics)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from gatedlens.errors import InputError
from gatedlens.store.disk.layout import Layout
from gatedlens.store.reductions import Part, by_name


class Statistics:
    """`statistics[name]`: {reduction: tensor} of a point, named as in a store; `merge` adds those of another corpus.

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

    def merge(self, other: Statistics) -> Statistics:
        """Of both corpora together; both must hold the same reductions of the same points."""
        if set(self.parts) != set(other.parts):
            only = sorted(set(self.parts) ^ set(other.parts))
            raise InputError(f"These statistics do not fit together: only one of them holds {', '.join(only[:4])}.")
        merged = {key: by_name(key.partition("/")[2]).merge(part, other.parts[key]) for key, part in self.parts.items()}
        return Statistics(merged, self._find)

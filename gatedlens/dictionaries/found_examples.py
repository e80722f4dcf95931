"""Examples: what `examples` finds, by feature; in a notebook the strongest, and a page that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from gatedlens.dictionaries.dictionary import Dictionary
from gatedlens.dictionaries.example import Example
from gatedlens.dictionaries.example_page import Shown, section
from gatedlens.errors import InputError
from gatedlens.options import checked
from gatedlens.plot.coloured_text import Html

SHOWN = 8  # features in a notebook


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
        return Html(body + "".join(section(one, self[one], self._told(one)) for one in chosen), title)

    def _told(self, feature: int) -> Shown:
        return Shown(
            float(self.rates[feature]),
            self.bars[feature].tolist(),
            self.firing.get(feature, ()),
            self.writes.get(feature),
        )

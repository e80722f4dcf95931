"""Attribution: a score for each token or patch, what it explains and how it came about.

    found = gl.attribution.gradient_attention(model, "The cat sat on the mat")
    found.scores                     # batch pos, or batch row column for images; 0 at padding
    found.method, found.target, found.layers, found.facts
    found.explained                  # batch: the logit (or logit difference, or metric) that is explained
    found.order(0), found.ranks      # positions of a row, most relevant first; the place of each in that order: `rounding.py`
    found.plot()                     # the text, coloured; for an image a map over it
    found.save("found.json"); Attribution.load("found.json"); found.top(5); found.to_dataframe()

It is a Result (see `result.py`), so it stands wherever a tensor does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gatedlens.errors import InputError
from gatedlens.files import Fields, is_number
from gatedlens.foreign import Axes, Figure
from gatedlens.model.image import Grid
from gatedlens.result.result import Result
from gatedlens.result.rounding import order

if TYPE_CHECKING:
    from gatedlens.plot import Html
else:
    Html = Any

R = TypeVar("R", bound="Attribution")
TEXT, IMAGE = ("batch", "pos"), ("batch", "row", "column")


@dataclass(frozen=True, eq=False, repr=False)
class Attribution(Result):
    """Scores on the axes "batch pos" or "batch row column"; `images` and `grid` are those of the model's input, for `plot`.

    facts hold method, target, layers, explained, tokens (of each row, as text) and real (which positions are no
    padding), and whatever the method adds. `images` and `grid` are not saved.
    """

    images: Tensor | None = None
    grid: Grid | None = None

    @property
    def scores(self) -> Tensor:
        return self.values

    @property
    def method(self) -> str:
        return str(self.facts["method"])

    @property
    def target(self) -> Any:
        """What is explained: an id a row, {"right": ..., "wrong": ...}, or the name of a metric."""
        return self.facts["target"]

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that took part."""
        return tuple(self.facts["layers"])

    @property
    def explained(self) -> Float[Tensor, " batch"]:
        """The number that is explained, one a row."""
        return torch.tensor(self.facts["explained"], dtype=torch.float64)

    @classmethod
    def from_dict(cls: type[R], data: object, where: str | Path = "This") -> R:
        """The Attribution of a `to_dict()`. InputError names the field that is not as it should be."""
        found = super().from_dict(data, where)
        shape = (found.shape[0], math.prod(found.shape[1:])) if found.axes else (1, 1)
        facts = Fields(found.facts, "attribution", f"{where}, field 'facts',")
        facts.word("method")
        facts.get("target", "what is explained", lambda v: v is not None)
        facts.get("layers", "a list of layer numbers", lambda v: _holds(v, int))
        facts.get(
            "explained",
            f"{shape[0]} numbers, one a row",
            lambda v: _listed(v, shape[0]) and all(map(is_number, v)),
        )
        every = f"for each of the {shape[0]} rows, {shape[1]}"
        facts.get("real", f"null or, {every} of true and false", lambda v: v is None or _holds(v, bool, *shape))
        if found.axes == TEXT:
            facts.get("tokens", f"{every} texts", lambda v: _holds(v, str, *shape))
        return found

    def order(self, row: int = 0) -> Int[Tensor, " some"]:
        """`found.order(row=0)`: positions (of an image: patches, row by row) of a row of the batch, most relevant first,
        without padding.

        Scores are compared in steps of a 130,000th of the row's largest, and equal ones stand in the order of positions:
        neither batch nor processor decides.
        """
        found, real = order(self.scores[row].flatten()), self.facts["real"]
        return found if real is None else found[torch.tensor(real[row], device=found.device)[found]]

    @property
    def ranks(self) -> Int[Tensor, "batch some"]:
        """The place of each position in its row's `order`: 0 for the most relevant; -1 for padding."""
        ranks = torch.full((len(self.scores), self.scores[0].numel()), -1)
        for row, places in enumerate(ranks):
            found = self.order(row).cpu()
            places[found] = torch.arange(len(found))
        return ranks

    def plot(  # type: ignore[override]
        self,
        ax: Axes | None = None,
        row: int = 0,
        pos: slice | Sequence[int] | None = None,
        backend: str = "html",
    ) -> Figure | Html:
        """`found.plot(row=0)`: the text with each token coloured by its score (`plot.Html`), or a map over the image (a
        Figure). pos: some positions of a text; backend: "plotly" for plotly's figure of one.
        """
        from gatedlens import plot

        if self.axes not in (TEXT, IMAGE):
            return super().plot(ax, "matplotlib" if backend == "html" else backend)
        if not -len(self.scores) <= row < len(self.scores):
            raise InputError(f"row={row}: this attribution has {len(self.scores)} rows.")
        title = f"{self.title} (row {row})" if len(self.scores) > 1 else self.title
        if self.axes == TEXT:
            tokens, real, scores = self.facts["tokens"][row], self.facts["real"], self.scores[row]
            if real is not None:
                scores = scores[torch.tensor(real[row], device=scores.device)]
                tokens = [token for token, kept in zip(tokens, real[row], strict=True) if kept]
            return plot.text(scores, tokens, title, pos, self.value, backend)
        if self.images is None or self.grid is None:
            raise InputError(
                "This attribution was loaded without its image: plot.over_image(scores[row], image, grid)."
            )
        return plot.over_image(self.scores[row], self.images[row], self.grid, title, self.value, ax=ax)

    def _picture(self) -> str:
        without = self.axes == IMAGE and (self.images is None or self.grid is None)
        return "" if without else super()._picture()

    def __repr__(self) -> str:
        sizes = ", ".join(f"{axis} {size}" for axis, size in zip(self.axes, self.values.shape, strict=True))
        return f"Attribution({self.method}, target {_short(self.target)}, layers {_short(list(self.layers))}; {sizes})"


def _listed(value: Any, size: int | None = None) -> bool:
    return isinstance(value, list) and size in (None, len(value))


def _holds(value: Any, kind: type, size: int | None = None, *inner: int) -> bool:
    """Whether it is a list of `size` things of a kind, or of lists of them."""
    return _listed(value, size) and all(_holds(one, kind, *inner) if inner else isinstance(one, kind) for one in value)


def _short(given: Any) -> str:
    """A list (or each of a dict's) of more than eight as its first six and how many there are."""
    if isinstance(given, dict):
        return ", ".join(f"{name} {_short(value)}" for name, value in given.items())
    if isinstance(given, list) and len(given) > 8:
        return f"[{', '.join(map(str, given[:6]))}, ...: {len(given)}]"
    return str(given)

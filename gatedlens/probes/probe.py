"""Probe: a linear map that reads a thing off an activation; what it reads can be taken away, with controls.

probe = gl.probes.fit(cache, labels, ("resid_post", 1), pos=-1)
probe.predict(x), probe.test(other_cache, other_labels)
with probe.ablate(pos=-1).on(model): ...                              # what it reads along, made the mean's
with probe.ablate(pos=-1, labels=labels, of="sink").on(model): ...     # in the rows of one class alone
with probe.remove_mean("sink", pos=-1).on(model): ...                 # the class's mean less the mean of all
probe.placebo(seed=1).ablate(pos=-1)                                   # as far, another way: a control
probe.save("probe.safetensors"); Probe.load("probe.safetensors")
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gatedlens.address.positions import Positions
from gatedlens.errors import InputError, did_you_mean
from gatedlens.markup import card, table
from gatedlens.model.base import HookedModel
from gatedlens.model.cache import ActivationCache
from gatedlens.model.intervention import Intervention
from gatedlens.options import checked, is_whole
from gatedlens.probes.fitting import Linear, held_out_score, predicted
from gatedlens.probes.samples import Labels, Samples, Source, labelled
from gatedlens.result.result import Result
from gatedlens.runs.movement import Movement, as_far
from gatedlens.runs.saved import check_tensors, frame_of, read_saved, write_saved
from gatedlens.runs.vectors import Frame, each_label, orthonormal

if TYPE_CHECKING:
    Label: TypeAlias = Hashable
else:
    Label = Any


@dataclass(frozen=True, eq=False)
class Probe:
    """`linear` maps vectors of `frame` to scores; `classes` are what is told apart (None: a regression), `mean` [d] the mean
    of the vectors that it was fitted to and `means` [class, d] those of classes. other: the directions of a placebo; None for
    a probe.
    """

    frame: Frame
    linear: Linear
    mean: Float[Tensor, " d"]
    means: Float[Tensor, "group d"]
    classes: list[Any] | None
    kind: str = "linear"
    pos: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    other: Float[Tensor, "rank d"] | None = None

    @property
    def name(self) -> str:
        return self.frame.name

    @property
    def weights(self) -> Float[Tensor, "out d"]:
        """In the activation's own units: one row of a binary probe or a regression, else one a class."""
        return self.linear.weight

    @property
    def directions(self) -> Float[Tensor, "rank d"]:
        """An orthonormal basis of what it reads along: the span of the weights, of classes less their mean."""
        rows = self.weights.double()
        return orthonormal(rows - rows.mean(0) if len(rows) > 1 else rows)

    @property
    def mean_directions(self) -> Float[Tensor, "rank d"]:
        """An orthonormal basis of what differs between classes on average: the span of their means, less the mean of these."""
        if self.classes is None:
            raise InputError("This probe is a regression: it has no classes whose means span anything.")
        return orthonormal(self.means - self.means.mean(0))

    def __repr__(self) -> str:
        what = "a regression" if self.classes is None else f"{len(self.classes)} classes"
        placebo = "placebo of " if self.other is not None else ""
        return f"Probe({placebo}{self.kind}, {self.frame.said}, {what}{self._score()})"

    def _score(self) -> str:
        measure = "R2" if self.classes is None else "accuracy"
        return f", {measure} {self.facts[measure]:.3g}" if measure in self.facts else ""

    def _repr_html_(self) -> str:
        shown = {name: said for name, said in self.facts.items() if not isinstance(said, list | dict)}
        parts = [] if self.classes is None else [table(["class"], [[one] for one in self.classes])]
        return card(f"Probe: {self.kind}, {self.frame.said}", shown, *parts)

    # -- reading -------------------------------------------------------------------------------------------------

    @checked
    def predict(self, x: Float[Tensor, "entry d"]) -> list[Any]:
        """`probe.predict(x)`: the class (number) of each vector. InputError for vectors of another width."""
        width = self.weights.shape[1]
        if x.ndim != 2 or x.shape[1] != width:
            raise InputError(
                f"These vectors are {list(x.shape)}; the probe of {self.frame.said} reads [entry, {width}]."
            )
        found = predicted(self.linear, x, self.classes is not None).tolist()
        return found if self.classes is None else [self.classes[one] for one in found]

    @checked
    def test(self, source: Source, labels: Labels, pos: Positions = None) -> Result:
        """`probe.test(other_cache, other_labels)`: a Result, measure: the accuracy (R2) there and the ends of its 95 % interval.

        source, labels: as of `gl.probes.fit`. pos: None for where it was fitted. InputError for a source of another model
        (`moved_to` says that it is meant), for labels that do not match, and for a class that the probe does not know;
        PointError for a source without its point."""
        where = self.pos if pos is None else pos
        axes = self.frame.axes if isinstance(source, ActivationCache) else None
        samples = Samples.of(source, self.name, where, axes, self.frame.index)
        self._check(samples.model, samples.x.shape[1])
        given = labelled(labels, samples)
        if self.classes is None:
            y = torch.tensor([float(one) for one in given], dtype=torch.float64)
        else:
            for one in set(given):
                self._number(one)
            y = torch.tensor([self._number(one) for one in given])
        found = held_out_score(self.linear, samples, y, torch.ones(len(y), dtype=torch.bool))
        measure = "R2" if self.classes is None else "accuracy"
        facts = {"model": samples.model, "point": self.name, "entries": len(y)}
        return Result(
            torch.tensor(tuple(found)), ("measure",), {"measure": [measure, "low", "high"]}, repr(self), measure, facts
        )

    def _number(self, label: Any) -> int:
        assert self.classes is not None
        if label not in self.classes:
            near = did_you_mean(str(label), map(str, self.classes))
            raise InputError(
                f"{label!r} is no class of this probe; they are {', '.join(map(repr, self.classes[:12]))}.{near}"
            )
        return self.classes.index(label)

    def _check(self, model: str, width: int) -> None:
        mine = self.facts.get("model", model)
        if width != self.weights.shape[1] or model != mine:
            raise InputError(
                f"This probe reads {self.frame.said} of {mine}, {self.weights.shape[1]} numbers; these are of {model}, "
                f"{width} numbers."
                + (" If it is meant for both, probe.moved_to(model)." if width == self.weights.shape[1] else "")
            )

    def moved_to(self, model: HookedModel) -> Probe:
        """`probe.moved_to(model)`: the same probe for another model (a fine-tuned one, say), whose vectors are as wide.

        PointError for a model without its point, InputError for one of another width.
        """
        if (width := self.frame.width(model)) != self.weights.shape[1]:
            self._check(model.cfg.model_name, width)
        return replace(self, facts={**self.facts, "model": model.cfg.model_name})

    # -- on a model ----------------------------------------------------------------------------------------------

    @checked
    def ablate(
        self,
        pos: Positions = None,
        to: Float[Tensor, " d"] | None = None,
        along: str = "weights",
        labels: Labels | None = None,
        of: Label = None,
        scale: int | float = 1.0,
    ) -> Intervention:
        """`probe.ablate(pos=-1, along="means", labels=labels, of="sink")`: x - scale P (x - to).

        along: what P projects onto: "weights", what the probe reads along (`directions`), or "means", what differs between the
        classes on average (`mean_directions`). Other numbers may say what the weights read, so the model may go on reading it;
        without the means' span no linear map tells the classes' means apart.

        pos: real positions (of a state one in each row); None: where it was fitted, if that is one position, else everywhere
        ("*"). to: None for the mean of what it was fitted to; zeros, or a class's mean (`probe.means[0]`). labels, of: only
        in rows whose label is `of`; labels [batch], or [batch, pos], which say the positions, too. InputError for a class
        that there is not, and while the model runs for labels of another number of rows.

        Source: Ravfogel et al. 2020 (Null it out, arXiv 2004.07667); Belrose et al. 2023 (LEACE, arXiv 2306.03819).
        """
        if along not in ("weights", "means"):
            raise InputError(f"along={along!r}: it is 'weights' or 'means'.{did_you_mean(along, ('weights', 'means'))}")
        basis = self.directions if along == "weights" else self.mean_directions
        toward = self.mean if to is None else to
        if tuple(toward.shape) != basis.shape[1:]:
            raise InputError(
                f"to has the shape {list(toward.shape)}; the probe of {self.frame.said} reads {basis.shape[1]} numbers."
            )

        def away(v: Tensor) -> Tensor:
            return (toward.to(v) - v) @ basis.to(v).mT @ basis.to(v)

        def elsewhere(v: Tensor) -> Tensor:
            assert self.other is not None
            other = self.other[: len(basis)].to(v)
            return (toward.to(v) - v) @ other.mT @ other

        move = away if self.other is None else lambda v: as_far(elsewhere(v), away(v))
        return self._moved(lambda v: scale * move(v), pos, labels, of)

    @checked
    def remove_mean(
        self, of: Label, pos: Positions = None, labels: Labels | None = None, scale: int | float = 1.0
    ) -> Intervention:
        """`probe.remove_mean("sink", pos=-1, labels=labels)`: x - scale (mean of the class - mean of all).

        of: the class. labels: only in its rows (None: in all). pos and errors: as of `ablate`; InputError for a regression.
        """
        if self.classes is None:
            raise InputError("This probe is a regression: it has no classes whose mean could be removed.")
        shift = self.mean - self.means[self._number(of)]
        if self.other is not None:
            shift = as_far(self.other[0], shift)
        return self._moved(lambda v: scale * shift.to(v).expand_as(v), pos, labels, of if labels is not None else None)

    def _moved(self, move: Callable[[Tensor], Tensor], pos: Positions, labels: Labels | None, of: Any) -> Intervention:
        rows: Tensor | None = None
        if labels is None and of is not None:
            raise InputError(f"of={of!r} says of which rows, by their labels: give labels, too.")
        if labels is not None:
            marked = rows_of_class(labels, of)
            if marked.ndim == 2 and pos is not None:
                raise InputError("labels are [batch, pos]: they say the positions, so leave pos out.")
            pos, rows = (marked, None) if marked.ndim == 2 else (pos, marked)
        pos = self.pos if pos is None else pos
        fitted = str(self.facts.get("model", "unnamed"))
        width = self.weights.shape[1]
        return Intervention((Movement(self.frame, lambda v, row, nth: move(v), width, pos, rows, fitted),))

    @checked
    def placebo(self, seed: int = 0) -> Probe:
        """`probe.placebo(seed=1).ablate(pos=-1)`: a control: its ablations move each vector exactly as far as the probe's
        own, along as many random directions. What it does too, the distance does, not what the probe reads.
        """
        generator = torch.Generator().manual_seed(seed)
        rank, d = self.directions.shape
        rank = rank if self.classes is None else max(rank, len(self.mean_directions))
        basis = torch.linalg.qr(torch.randn(d, rank, generator=generator, dtype=torch.float64)).Q.mT
        return replace(self, other=basis)

    # -- on disk -------------------------------------------------------------------------------------------------

    @checked
    def save(self, path: str | Path) -> Path:
        """`probe.save("probe.safetensors")`: write it, with its place, classes and scores; returns the path.

        InputError for classes that JSON cannot hold.
        """
        tensors = {"weight": self.linear.weight, "bias": self.linear.bias, "mean": self.mean, "means": self.means}
        tensors |= {} if self.other is None else {"other": self.other}
        said = {
            "frame": self.frame.to_dict(),
            "classes": self.classes,
            "kind": self.kind,
            "pos": self.pos,
            "facts": dict(self.facts),
        }
        return write_saved(path, "probe", tensors, said)

    @staticmethod
    def load(path: str | Path) -> Probe:
        """`Probe.load("probe.safetensors")`: what `save` wrote. CheckpointError for a file that holds none."""
        wanted = {"weight": "out d", "bias": "out", "mean": "d", "means": "group d"}
        tensors, fields = read_saved(path, "probe", wanted)
        if "other" in tensors:
            check_tensors(path, "probe", tensors, {"mean": "d", "other": "rank d"})
        (out, _), groups = tensors["weight"].shape, len(tensors["means"])
        expected = f"a list of {groups} classes, of which its {out} rows tell (null: a regression's, of one)"
        sizes = {(1, None): 1, (1, 2): 2, (out, out): out}
        classes = fields.get(
            "classes",
            expected,
            lambda v: (v is None or isinstance(v, list)) and sizes.get((out, None if v is None else len(v))) == groups,
        )
        pos = fields.get("pos", "a position, or null", lambda v: v is None or is_whole(v))
        linear = Linear(tensors["weight"], tensors["bias"])
        return Probe(
            frame_of(fields), linear, tensors["mean"], tensors["means"], classes, fields.word("kind"), pos,
            dict(fields.fields("facts")), tensors.get("other"),
        )  # fmt: skip


def rows_of_class(labels: Labels, of: Any) -> Bool[Tensor, "*place"]:
    """`rows_of_class(labels, "sink")`: True where the label is `of`; InputError where none is."""
    each = each_label(labels)
    marked = torch.tensor([one == of for one in each], dtype=torch.bool)
    marked = marked.reshape(labels.shape) if isinstance(labels, Tensor) else marked
    if not bool(marked.any()):
        known = sorted({str(one) for one in each})
        raise InputError(
            f"of={of!r}: no label is that; they are {', '.join(known[:12])}.{did_you_mean(str(of), known)}"
        )
    return marked


@checked
def matched_rows(labels: Labels, of: Label, seed: int = 0) -> Bool[Tensor, "*place"]:
    """`gl.probes.matched_rows(labels, "sink", seed=0)`: True at as many random others as there are of a class: a control of
    what is done to that class alone, `probe.ablate(labels=gl.probes.matched_rows(labels, "sink"), of=True)`.

    labels: [batch], or [batch, pos] for single tokens. InputError for a class that no label is, and where others are too few.
    """
    mine = rows_of_class(labels, of)
    others = (~mine).flatten().nonzero().flatten()
    n = int(mine.sum())
    if len(others) < n:
        raise InputError(f"{n} labels are {of!r} and {len(others)} are not: too few to draw as many from.")
    drawn = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[:n]]
    marked = torch.zeros(mine.numel(), dtype=torch.bool)
    marked[drawn] = True
    return marked.reshape(mine.shape)

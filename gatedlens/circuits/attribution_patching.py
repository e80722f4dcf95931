"""Attribution patching: what activation patching would find at every cell, from one forward and one backward.

    found = attribution_patch(model, clean, corrupted, metric, "blocks.*.hook_resid_pre")   # a Result: layer, pos
    found = attribution_patch(model, clean, corrupted, metric)["mixer.hook_gate"]           # of every point that is not lazy
    attribution_patch(model, clean, corrupted, metric, "blocks.*.mixer.hook_u", keep=("pos", "channel"))
    attribution_patch(model, clean, corrupted, metric, "blocks.*.mixer.hook_scan", keep=("head",))       # layer, head

    score = (clean - corrupted) * d metric / d activation ~ metric(patched) - metric(corrupted)

summed over the axes that are not kept (patching a cell patches all of it) and averaged over rows (a row that is too short
for a position counts with 0 there). The gradient is that
of the corrupted run; the variants with `ig` (integrated gradients) average it along a straight line.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import torch
from jaxtyping import Float
from torch import Tensor

from gatedlens import fused
from gatedlens.address.composite import turned
from gatedlens.address.names import NamesFilter, Point, is_placed, listed
from gatedlens.address.point import overlaps, refuse_overlap
from gatedlens.errors import InputError, PointError
from gatedlens.metrics import Metric, per_row
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Input
from gatedlens.model.hooking import CACHE_LIMIT
from gatedlens.model.language import OF_INPUT, HookedLanguageModel
from gatedlens.options import checked, taking
from gatedlens.recurrence.scanning import at_least_float32
from gatedlens.result.result import Result
from gatedlens.result.results import Results
from gatedlens.runs import inputs
from gatedlens.runs.cells import layer_of
from gatedlens.runs.engine import Earlier, Effort
from gatedlens.runs.gradients import Listener, approximate_rise, between, by_secants, collected, listen, on_the_way
from gatedlens.runs.pair import Pair, steps_of, subtracting

Names = (
    Callable[[str], bool] | Sequence[str] | None
)  # names that stand for several points: their Results come as a dict
BETWEEN = "Attribution patching, by secants between the two runs"
OVER_INPUT = "Attribution patching, integrated over the input"
OVER_ACTIVATION = "Attribution patching, integrated over the activation"


@overload
def attribution_patch(
    model: HookedModel,
    clean: Input,
    corrupted: Input,
    metric: Metric,
    names: str,
    keep: Sequence[str] = ("pos",),
    rule: str = ...,
    max_bytes: int | None = ...,
    **options: Any,
) -> Result: ...
@overload
def attribution_patch(
    model: HookedModel,
    clean: Input,
    corrupted: Input,
    metric: Metric,
    names: Names = None,
    keep: Sequence[str] = ("pos",),
    rule: str = ...,
    max_bytes: int | None = ...,
    **options: Any,
) -> Results: ...
@taking(HookedLanguageModel.forward, only=OF_INPUT)
@checked
def attribution_patch(
    model: HookedModel,
    clean: Input,
    corrupted: Input,
    metric: Metric,
    names: NamesFilter = None,
    keep: Sequence[str] = ("pos",),
    rule: str = "gradient",
    max_bytes: int | None = CACHE_LIMIT,
    **options: Any,
) -> Result | Results:
    """`attribution_patch(model, clean, corrupted, metric, "blocks.*.hook_resid_pre")`: a Result with axes layer, pos.

    clean, corrupted: texts, ids, pairs (ids, mask) or images, of one shape and padded alike. metric: logits -> one number a row.
    names: a name, alias or glob that stands for one point in one or more layers gives a Result; a list of these, a
    predicate, or None (every point that is not lazy) `Results`, a dict by the points' names in their blocks. Lazy points
    take part when named. keep: the axes that remain, where a point has them ("batch" too); the others are summed, rows
    averaged. max_bytes: refuse to hold more than this of the clean run; two runs' activations are never held, only their
    difference. rule: "gradient", that of the corrupted run; or "secant", the secant between both runs in its place (see
    `gatedlens.secant`): complete, and of a metric that is linear in the logits. options: the forward's, attention_mask say.

    PointError for a name that no point has, a view, or an axis that no point has; InputError for inputs that do not fit together,
    and for a metric without a gradient or whose gradient is NaN; TooLargeError where max_bytes do not suffice.

    Nanda 2023 (Attribution patching); Kramár et al. 2024 (AtP*, arXiv 2403.00745), sec. 2: the first-order term of
    metric(patched) - metric(corrupted). Where a patch does much it can be far off: on the three bundled recall models
    (hook_resid_pre and hook_mixer_out, 16 prompts with another value at the queried key, float64) the rank correlation
    with exact patching is 0.58 to 0.87 over the cells that move the logit difference by more than 0.1, and the linear
    correlation over all cells 0.70 to 0.85; in up to one prompt of ten the answer's own position is not the largest.
    Small effects it ranks well: over all cells 0.85 to 0.99.
    """
    secant, pair = by_secants(rule), Pair.of(model, clean, corrupted, options)
    points = _Points(model, names, keep, approximate_rise(metric))
    if secant:
        scores, found = _Scores(pair, points, pair.differences(points.names, max_bytes)), dict[str, Tensor]()
        with fused.off():
            listen(pair, metric, scores.listeners(points.names, found), [between(pair)])
        return points.results(scores.whole(found), BETWEEN, pair, {"rule": rule})
    base, store = pair.cached(pair.clean, points.names, max_bytes)
    scores, found = _Scores(pair, points, store), dict[str, Tensor]()
    value = listen(pair, metric, scores.listeners(points.names, found), subtracting(store))
    facts = _baselines(metric, base, value)
    return points.results(scores.whole(found), "Attribution patching", pair, facts)


@overload
def attribution_patch_ig(
    model: HookedModel,
    clean: Input,
    corrupted: Input,
    metric: Metric,
    names: str,
    keep: Sequence[str] = ("pos",),
    steps: int = 5,
    progress: bool = True,
    results: Earlier = None,
    max_bytes: int | None = ...,
    **options: Any,
) -> Result: ...
@overload
def attribution_patch_ig(
    model: HookedModel,
    clean: Input,
    corrupted: Input,
    metric: Metric,
    names: Names = None,
    keep: Sequence[str] = ("pos",),
    steps: int = 5,
    progress: bool = True,
    results: Earlier = None,
    max_bytes: int | None = ...,
    **options: Any,
) -> Results: ...
@taking(HookedLanguageModel.forward, only=OF_INPUT)
@checked
def attribution_patch_ig(
    model: HookedModel,
    clean: Input,
    corrupted: Input,
    metric: Metric,
    names: NamesFilter = None,
    keep: Sequence[str] = ("pos",),
    steps: int = 5,
    progress: bool = True,
    results: Earlier = None,
    max_bytes: int | None = CACHE_LIMIT,
    **options: Any,
) -> Result | Results:
    """`attribution_patch_ig(model, clean, corrupted, metric, "hook_embed", steps=5)`: gradients integrated over the input.

    As `attribution_patch`, the gradient a mean over `steps` runs whose embeddings lie between corrupted and clean: `steps`
    forwards and backwards for all points together. results: a path to which the steps are written as they come and from which an
    interrupted call goes on, or the Result that `gl.patching.Interrupted` holds (axes step, point, entry: a point's scores, laid
    flat). The rest, and the errors, are those of `attribution_patch`; InputError too if results is of another call.

    At `hook_embed` the scores sum to metric(clean) - metric(corrupted) as steps grow (completeness; Sundararajan et al. 2017).
    Hanna et al. 2024 (arXiv 2403.17806), sec. 3: EAP-IG, at activations instead of edges. Measured as above: 0.86 to 0.98 and
    0.97 to 0.99; but small effects are those of the corrupted run, and over all cells ranks agree to 0.56 to 0.74 only.
    """
    pair, points, shares = (
        Pair.of(model, clean, corrupted, options),
        _Points(model, names, keep, approximate_rise(metric)),
        steps_of(steps),
    )
    scores = _Scores(pair, points, pair.differences(points.names, max_bytes))
    hook = on_the_way(pair)

    def one(step: int) -> Tensor:
        found: dict[str, Tensor] = {}
        listen(pair, metric, scores.listeners(points.names, found), [hook(shares[step])])
        return scores.flat(points.names, found)

    blank = scores.blank({"step": range(steps), "point": points.names}, f"{OVER_INPUT}, step by step", steps)
    found = collected(pair, metric, blank, one, {"keep": list(points.keep)}, Effort(results, progress=progress))
    return points.results(scores.parts(found.values.mean(0)), OVER_INPUT, pair, {"steps": steps})


@overload
def attribution_patch_ig_activations(
    model: HookedModel,
    clean: Input,
    corrupted: Input,
    metric: Metric,
    names: str,
    keep: Sequence[str] = ("pos",),
    steps: int = 5,
    progress: bool = True,
    results: Earlier = None,
    max_bytes: int | None = ...,
    **options: Any,
) -> Result: ...
@overload
def attribution_patch_ig_activations(
    model: HookedModel,
    clean: Input,
    corrupted: Input,
    metric: Metric,
    names: Names = None,
    keep: Sequence[str] = ("pos",),
    steps: int = 5,
    progress: bool = True,
    results: Earlier = None,
    max_bytes: int | None = ...,
    **options: Any,
) -> Results: ...
@taking(HookedLanguageModel.forward, only=OF_INPUT)
@checked
def attribution_patch_ig_activations(
    model: HookedModel,
    clean: Input,
    corrupted: Input,
    metric: Metric,
    names: NamesFilter = None,
    keep: Sequence[str] = ("pos",),
    steps: int = 5,
    progress: bool = True,
    results: Earlier = None,
    max_bytes: int | None = CACHE_LIMIT,
    **options: Any,
) -> Result | Results:
    """`attribution_patch_ig_activations(model, clean, corrupted, metric, "blocks.*.hook_mixer_out", steps=5)`: gradients
    integrated over the activation.

    As `attribution_patch`, the gradient a mean along the line on which the activation itself goes from corrupted to clean:
    `steps` forwards and backwards for each point of each layer, one after the other; the rest of the model is the
    corrupted run's. results: a path to which the points are written as they come and from which an interrupted call goes on, or
    the Result that `gl.patching.Interrupted` holds (axes point, entry: a point's scores, laid flat). The rest, and the errors,
    are those of `attribution_patch`; InputError too if results is of another call.

    A point's scores sum to the effect of patching it whole as steps grow. Marks et al. 2024 (Sparse feature circuits, arXiv
    2403.19647), eq. 3. Measured as above: 0.97 to 1.00 and 0.99 to 1.00; 0.55 to 0.79 over all.
    """
    pair, points, shares = (
        Pair.of(model, clean, corrupted, options),
        _Points(model, names, keep, approximate_rise(metric)),
        steps_of(steps),
    )
    scores = _Scores(pair, points, pair.differences(points.names, max_bytes))

    def one(number: int) -> Tensor:
        """The scores of one point of one layer."""
        name, found = points.names[number], dict[str, Tensor]()
        way = scores.store[name]
        for share in shares:
            shift = [(name, lambda x, hook, share=share: x.detach() + share * way)]
            listen(pair, metric, scores.listeners([name], found), shift)
        return scores.flat([name], found)[0] / steps

    blank = scores.blank({"point": points.names}, f"{OVER_ACTIVATION}, point by point", steps)
    found = collected(pair, metric, blank, one, {"keep": list(points.keep)}, Effort(results, progress=progress))
    return points.results(scores.parts(found.values), OVER_ACTIVATION, pair, {"steps": steps})


@torch.no_grad()
def _baselines(metric: Metric, clean: Tensor, corrupted: Tensor) -> dict[str, Any]:
    return {"clean": float(per_row(metric, clean).mean()), "corrupted": float(corrupted.mean())}


# -- which points, and what remains of them -------------------------------------------------------------------------


class _Points:
    """The points that are asked for, by rows: `found["mixer.hook_gate"]` are its full names, one a layer."""

    def __init__(self, model: HookedModel, names: NamesFilter, keep: Sequence[str], value: str):
        self.model = model
        self.value = value  # what a score is
        self.keep = (keep,) if isinstance(keep, str) else tuple(keep)
        self.names = _full_names(model, names)
        self.single = isinstance(names, str) or is_placed(names)
        self.found: dict[str, list[str]] = {}
        for name in self.names:
            self.found.setdefault(self.point(name).name, []).append(name)
        if self.single and len(self.found) > 1:
            raise InputError(
                f"{names!r} stands for {len(self.found)} points ({', '.join(list(self.found)[:3])}, ...): a string gives one "
                f"Result. Ask for a list, [{names!r}], to get a dict of them."
            )
        if len(self.found) == 1:
            refuse_overlap(self.keep)
        for axis in self.keep:
            if not any(self.point(name).reaches(axis, model.cfg.sizes) for name in self.names):
                raise model.names.lacking(self.names[0], axis, model.cfg.sizes)

    def point(self, name: str) -> Point:
        return self.model.names.points[name]

    def dims(self, name: str) -> tuple[str, ...]:
        """A point's axes, by those that are kept: (batch pos head value) of its channels, where heads are. Of two that overlap,
        as they may where several points are asked for, the one that is its own.
        """
        point, sizes = self.point(name), self.model.cfg.sizes
        own = [axis for axis in self.keep if axis in point.dims]
        others = [axis for axis in self.keep if axis not in own and point.reaches(axis, sizes)]
        return point.by([*own, *(axis for axis in others if not overlaps(axis, own))], sizes)

    def kept(self, name: str) -> list[str]:
        return [axis for axis in self.dims(name) if axis in self.keep]

    def reduced(self, name: str, product: Tensor) -> Tensor:
        """The mean over rows (unless they are kept) of the sum over the axes that are not kept."""
        dims = self.dims(name)
        product = turned(product, self.point(name).dims, dims, self.model.cfg.sizes)
        gone = [i for i, axis in enumerate(dims) if axis not in self.keep]
        total = product.sum(gone) if gone else product
        return total if "batch" in self.keep else total / product.shape[0]

    def results(self, scores: Mapping[str, Tensor], title: str, pair: Pair, facts: dict[str, Any]) -> Result | Results:
        """One Result a point of a block; that one by itself where `names` was a string."""
        told = {"model": self.model.cfg.model_name, **facts}
        labels = {"pos": inputs.labels(self.model, pair.clean)}
        every = Results({row: self._result(row, scores, title, labels, told) for row in self.found})
        return next(iter(every.values())) if self.single else every

    def _result(
        self, row: str, scores: Mapping[str, Tensor], title: str, labels: dict[str, list[Any]], facts: dict[str, Any]
    ) -> Result:
        names = self.found[row]
        values, axes = torch.stack([scores[name] for name in names]), ("layer", *self.kept(names[0]))
        given: dict[str, Sequence[Any]] = {"layer": [layer_of(name) for name in names], **labels}
        if layer_of(names[0]) is None:  # a point outside the blocks
            values, axes = values[0], axes[1:]
        shown = {axis: given[axis] for axis in axes if axis in given}
        return Result(values, axes, shown, f"{title}: {row}", self.value, {**facts, "point": row})


def _full_names(model: HookedModel, names: NamesFilter) -> list[str]:
    if names is None:
        return model.names.select(None)[0]
    if not callable(names) and not listed(names):
        raise PointError("names is an empty list: name the points, or pass None for every one that is not lazy.")
    asked = [names] if callable(names) else listed(names)
    found = [one for name in asked for one in model.names.hooked(name)]
    for one in found:
        if one.view is not None:
            raise PointError(f"{one.asked} is computed from {', '.join(one.needs())}: ask for these.")
    return list(dict.fromkeys(one.name for one in found))


class _Scores:
    """difference * gradient at each point, summed over the axes that are not kept and averaged over rows.

    On their way through a file scores lie flat: one row a point, zeros behind those of points that keep fewer entries.
    """

    def __init__(self, pair: Pair, points: _Points, store: dict[str, Tensor]):
        self.pair = pair
        self.points = points
        self.store = store

    def listeners(self, names: Sequence[str], found: dict[str, Tensor]) -> dict[str, Listener]:
        """What adds the scores of these points to `found`."""
        return {name: self._listener(name, found) for name in names}

    def _listener(self, name: str, found: dict[str, Tensor]) -> Listener:
        def listener(gradient: Tensor) -> None:
            score = self._reduced(name, at_least_float32(self.store[name]) * at_least_float32(gradient))
            found[name] = found[name] + score if name in found else score

        return listener

    def _reduced(self, name: str, product: Tensor) -> Tensor:
        """By the numbers of real positions, so that position k of one row meets position k of another."""
        return self.points.reduced(name, self.pair.by_number(product, self.points.point(name).dims))

    def whole(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every point's scores, zeros where the metric does not depend on the point; InputError for NaN."""
        for name, score in found.items():
            if bool(score.isnan().any()):
                raise InputError(
                    f"The gradient of the metric at {name} is NaN: does the metric divide by zero, or take its root?"
                )
        return {name: found[name] if name in found else torch.zeros_like(like) for name, like in self.like.items()}

    @functools.cached_property
    def like(self) -> dict[str, Tensor]:
        """Zeros of every point's scores, which say their shape, dtype and device."""
        return {name: self._reduced(name, torch.zeros_like(at_least_float32(x))) for name, x in self.store.items()}

    # -- laid flat -----------------------------------------------------------------------------------------------

    def blank(self, axes: Mapping[str, Sequence[Any]], title: str, steps: int) -> Result:
        """The Result before any score is known, with an axis entry behind these."""
        shape = (*map(len, axes.values()), max(one.numel() for one in self.like.values()))
        values = torch.full(shape, torch.nan, dtype=torch.float64)
        facts = {"model": self.points.model.cfg.model_name, "steps": steps}
        labels = {axis: list(said) for axis, said in axes.items()}
        return Result(values, (*axes, "entry"), labels, title, self.points.value, facts)

    def flat(self, names: Sequence[str], found: Mapping[str, Tensor]) -> Float[Tensor, "point entry"]:
        """The scores of some points, in float64, which holds those of every dtype as they are."""
        whole, width = self.whole(found), max(one.numel() for one in self.like.values())
        flat = [whole[name].detach().double().cpu().flatten() for name in names]
        return torch.stack([torch.nn.functional.pad(one, (0, width - len(one))) for one in flat])

    def parts(self, flat: Float[Tensor, "point entry"]) -> dict[str, Tensor]:
        """The way back from `flat`."""
        rows = zip(self.points.names, flat, strict=True)
        return {
            name: row[: self.like[name].numel()].reshape(self.like[name].shape).to(self.like[name])
            for name, row in rows
        }

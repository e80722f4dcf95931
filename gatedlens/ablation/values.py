"""What stands there instead: zero, a number, a multiple, noise, a mean, another row, another run.

    gl.ablation.zero("blocks.2.mixer.hook_write", pos=3, channel=slice(0, 64))
    gl.ablation.mean("blocks.*.hook_mixer_out", gl.ablation.means(model, batches, "blocks.*.hook_mixer_out"))

Each is an Intervention: `.on(model)`, `a + b`. Where another run's values come from (`source`) is its ActivationCache, `means`
of a data set, or any mapping of full names to tensors.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import torch
from torch import Tensor

from gatedlens.ablation.average import Means
from gatedlens.address.entries import Index, Where
from gatedlens.address.names import Name, listed
from gatedlens.errors import InputError, PointError
from gatedlens.model.base import HookedModel
from gatedlens.model.cache import ActivationCache
from gatedlens.model.hookpoint import HookPoint
from gatedlens.model.intervention import EditStep, Intervention, edit
from gatedlens.model.padding import Padding
from gatedlens.options import checked, is_number

ROWS = ("batch",)

# Where another run's values come from. For editors and type checkers: whoever passes something else gets the error of `_stored`.
if TYPE_CHECKING:
    Source: TypeAlias = ActivationCache | Mapping[str, Tensor]
else:
    Source = Any


@overload
def constant(names: Name | Sequence[Name], *number: int | float, **index: Index) -> Intervention: ...
@overload
def constant(names: Name | Sequence[Name], *, value: int | float, **index: Index) -> Intervention: ...
@checked
def constant(names: Name | Sequence[Name], *number: int | float, **index: Any) -> Intervention:
    """`gl.ablation.constant("blocks.*.mixer.hook_gate", 1)`: these entries become a number; 1 opens every gate.

    The number stands behind the names, or is said as `value=1`. Behind the names it leaves `value=` to the axis of that name, the
    values of a head: `constant("blocks.*.mixer.hook_u", 0.5, head=2, value=[1, 3])`.

    names, index and errors: as of `gl.ablation.zero`; InputError too for no number, or several.
    """
    if not number and "value" in index:
        number = (index.pop("value"),)
        if not is_number(number[0]):
            raise InputError(
                f"constant(value={number[0]!r}): without a number behind the names, value= is the number that is put in. To say "
                f"entries of the axis value, put the number first: constant(names, 0.0, value={number[0]!r})."
            )
    if len(number) != 1:
        raise InputError(f"constant() puts in one number, and {len(number)} are given: constant(names, 1.0).")
    return edit(names, lambda x, point: torch.full_like(x, number[0]), **index)


@checked
def zero(names: Name | Sequence[Name], **index: Index) -> Intervention:
    """`gl.ablation.zero("blocks.*.mixer.hook_write", pos=3, channel=[0, 5])`: these entries become 0.

    names: a point's name, an alias or a glob, or a list of them. index: any axis of the points: a number, a slice, a list or a
    boolean mask; `pos` counts the real positions of each row; an axis that is not named is meant whole.
    Returns an Intervention: `with gl.ablation.zero(...).on(model): ...`.

    Where it is put on a model: PointError for a name that no point has, or an axis that a point lacks; InputError for an index
    that is out of range or names nothing.
    """
    return edit(
        names, lambda x, point: torch.zeros_like(x), **index
    )  # an index may be called `value`, as constant's number is


@checked
def scale(names: Name | Sequence[Name], factor: int | float, **index: Index) -> Intervention:
    """`gl.ablation.scale("blocks.*.hook_mixer_out", 0.5)`: the activation times a factor.

    names, index and errors: as of `gl.ablation.zero`.
    """
    return edit(names, lambda x, point: x * factor, **index)


@checked
def noise(names: Name | Sequence[Name], std: int | float, seed: int = 0, **index: Index) -> Intervention:
    """`gl.ablation.noise("hook_embed", std=0.1, seed=0)`: the activation plus Gaussian noise of this standard deviation.

    The noise is of its own at every point, row and entry, and the same at every call for one seed (so also at every step of
    `generate`). names, index and errors: as of `gl.ablation.zero`.
    """

    def add(x: Tensor, point: HookPoint) -> Tensor:
        generator = torch.Generator().manual_seed(seed + zlib.crc32((point.name or "").encode()))
        return x + std * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)

    return edit(names, add, **index)


@checked
def freeze(names: Name | Sequence[Name], source: Source, **index: Index) -> Intervention:
    """`gl.ablation.freeze("blocks.*.mixer.hook_gate", cache)`: the activation becomes what another run had there.

    source: that run's ActivationCache, or a mapping of full names to tensors with the point's axes. A source with one row gives
    it to every row. From a padded cache, position k of a row is the row's k-th real one.

    names, index and errors: as of `gl.ablation.zero`. While the model runs: PointError where the source lacks the point;
    InputError where shapes do not fit, or where the cache keeps only some positions (pos_slice).
    """

    def other(x: Tensor, point: HookPoint) -> Tensor:
        return _laid_out(_fitting(_by_number(_stored(source, point), point, source), x, point, source), point, source)

    return edit(names, other, **index)


@checked
def mean(names: Name | Sequence[Name], source: Source, over: Sequence[str] = ROWS, **index: Index) -> Intervention:
    """`gl.ablation.mean("blocks.*.hook_mixer_out", cache, over=("batch", "pos"))`: the activation becomes a mean.

    source: an ActivationCache, whose mean over the axes `over` is taken, its padding left out: `("batch",)` gives a mean of its
    rows for each position, `("batch", "pos")` one vector for each point. Or `gl.ablation.means(...)` of a data set, whose means
    are taken as they are.

    names, index and errors: as of `gl.ablation.freeze`. InputError too for `over` beside means that are taken already, and where
    a position of the source is padding in every row.
    """

    def average(x: Tensor, point: HookPoint) -> Tensor:
        value = _stored(source, point)
        if isinstance(source, Means):
            if tuple(over) != ROWS:
                raise InputError(
                    f"over={over!r}: means are taken already; `means(..., per_position=...)` says over what."
                )
            return _fitting(value, x, point, source)
        dims = [point.point.axis(axis) for axis in over]
        value = _by_number(value, point, source)
        real = _real(source, point, value)
        if real is None:
            return _laid_out(_fitting(value.mean(dims, keepdim=True), x, point, None), point, source)
        count = real.sum(dims, keepdim=True)
        if bool((count == 0).any()):
            raise InputError(
                f"Some positions of the source are padding in every row: {point.name} has no mean there. Take the mean "
                'over positions too, over=("batch", "pos").'
            )
        mean = _fitting(value.masked_fill(~real, 0).sum(dims, keepdim=True) / count, x, point, None)
        return _laid_out(mean, point, source)

    return edit(names, average, **index)


@checked
def resample(names: Name | Sequence[Name], source: Source | None = None, seed: int = 0, **index: Index) -> Intervention:
    """`gl.ablation.resample("blocks.*.hook_mixer_out", cache, seed=0)`: the activation becomes that of another row.

    Rows are drawn at random, the same at every point: from the same batch (source=None), or from a cache's rows. Row b never gets
    row b: neither of its own batch, nor of a source with as many rows, which is most often a run of the same inputs.

    names, index and errors: as of `gl.ablation.freeze`. InputError too for a batch of one row without a source, and for padding:
    another row's activation would bring padding to real positions.
    """

    def other(x: Tensor, point: HookPoint) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if source is None:
            if len(x) < 2:
                raise InputError("resample without a source takes other rows of the batch: give at least two.")
            return x.roll(int(torch.randint(1, len(x), (), generator=generator)), 0)
        stored = _stored(source, point)
        if _real(source, point, stored) is not None:
            raise InputError(_padded("source", point))
        n = len(stored)
        if n == len(x) and n > 1:
            drawn = (torch.arange(n) + torch.randint(1, n, (n,), generator=generator)) % n
        else:
            drawn = torch.randint(n, (len(x),), generator=generator)
        return _fitting(stored[drawn], x, point, source)

    if source is not None:
        return edit(names, other, **index)
    return Intervention((Unpadded(Where(tuple(listed(names)), index), other),))


@dataclass(frozen=True)
class Unpadded(EditStep):
    """An edit that hands activations from row to row of a batch, refused where the rows differ in length."""

    def hooks(self, model: HookedModel) -> list[tuple[str, Callable[..., Any]]]:
        return [(name, self._checked(model, hook)) for name, hook in super().hooks(model)]

    def _checked(self, model: HookedModel, edit: Callable[..., Any]) -> Callable[..., Any]:
        def hook(tensor: Tensor, hook: HookPoint) -> Any:
            if model.current().padding.mask is not None:
                raise InputError(_padded("batch", hook))
            return edit(tensor, hook)

        return hook


def _padded(what: str, point: HookPoint) -> str:
    return (
        f"The {what} is padded: another row's {point.name} would bring padding to real positions. Resample from rows of "
        "one length."
    )


# -- from another run -----------------------------------------------------------------------------------------------


def _stored(source: Any, point: HookPoint) -> Tensor:
    """What the source holds of a point, with its batch axis and all its positions."""
    try:
        value: Tensor = source[point.name]
    except KeyError as error:
        raise PointError(f"The source holds no {point.name}: cache it first (names_filter={point.name!r}).") from error
    except TypeError as error:
        raise InputError(
            f"The source is {type(source).__name__}; it is an ActivationCache, gl.ablation.means(...), or a dict of full names."
        ) from error
    if isinstance(source, ActivationCache):
        if source.sliced and point.pos_dim is not None:
            raise InputError(
                f"The source keeps only some positions (pos_slice), so its {point.name} stands nowhere in particular: "
                "cache all positions, and say pos=... here."
            )
        value = value if source.has_batch_dim else value.unsqueeze(0)
    if value.ndim != len(point.point.dims):
        raise InputError(
            f"The source's {point.name} has shape {list(value.shape)}; the axes there are {point.point.axes}, so "
            "keep each of them (size 1 stands for all)."
        )
    return value


def _by_number(value: Tensor, point: HookPoint, source: Any) -> Tensor:
    """What a cache holds, each row's real positions in front; of another source as it is."""
    mask = source.mask if isinstance(source, ActivationCache) else None
    return Padding.of(mask).by_number(value, point.point.dims)


def _laid_out(value: Tensor, point: HookPoint, source: Any) -> Tensor:
    """What stands by number, laid out as the run is padded that it goes to; of another source than a cache as it is."""
    if not isinstance(source, ActivationCache):
        return value
    run = source.model.running  # None if another model runs: that is taken to be padded as the source was
    return (Padding.of(source.mask) if run is None else run.padding).by_place(value, point.point.dims)


def _real(source: Any, point: HookPoint, value: Tensor) -> Tensor | None:
    """Where the source's positions are no padding, by their numbers, along the axes of a point; None where all are."""
    mask = source.mask if isinstance(source, ActivationCache) else None
    if mask is None or point.pos_dim is None or bool(mask.all()):
        return None
    mask = Padding.of(mask).pack(mask).to(value.device).bool()
    shape = [len(mask), *[mask.shape[1] if d == point.pos_dim else 1 for d in range(1, value.ndim)]]
    return mask.reshape(shape)


def _fitting(value: Tensor, x: Tensor, point: HookPoint, source: Any) -> Tensor:
    """The value, with the activation's shape. A cache's axes must be the activation's, but for a batch of one."""
    first = 1 if isinstance(source, ActivationCache) else x.ndim
    pairs = list(zip(value.shape, x.shape, strict=True))
    if any(have not in ((want, 1) if d < first else (want,)) for d, (have, want) in enumerate(pairs)):
        raise InputError(
            f"The source's {point.name} has shape {list(value.shape)}; the activation {list(x.shape)} ({point.point.axes})."
        )
    return value.to(x.device).expand_as(x)

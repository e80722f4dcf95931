"""Positions: which positions of which rows a user means. They are counted among a row's real ones, wherever it is padded.

    3, -1, [2, 3], range(2, 6), slice(4, 8)      the same positions in every row; negative ones count from the row's end
    None, "*", "[0-3]"                           all of them, or a glob of their numbers
    tensor([4, 7])                               one position a row [batch]
    tensor([[4, 5], [7, 8]]), [[4, 5], [7]]      several a row: [batch, some], or a list for each row
    mask                                         booleans [batch, pos] (or [pos], then a list too), laid out as the input

Prompts differ by row, and so does where their subject stands: an integer tensor goes by row, a plain list goes for all.
Where a single position a row is meant (a metric's), several numbers can only be one for each row, a list's too.

`real` [batch, pos] is True where a token is no padding. The k-th real position of a row is its position k, so a batch of
unequal rows means what its rows mean alone. A mask alone speaks of places in the input as it is laid out.
"""

from __future__ import annotations

import fnmatch
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from gatedlens.errors import InputError
from gatedlens.options import is_whole

# What `pos=` takes. For editors and type checkers: whoever passes something else gets the error of the functions below.
if TYPE_CHECKING:
    Positions: TypeAlias = int | slice | str | Sequence[Any] | numpy.ndarray[Any, Any] | Tensor | None
else:
    Positions = Any


def mask_of(given: Positions, what: str, real: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """True at the positions that are meant; `what` is the parameter's name, for the errors."""
    given = _as_tensor(given)
    if isinstance(given, Tensor) and given.dtype == torch.bool:
        return _masked(given, what, real)
    counts = real.sum(1).tolist()
    chosen = torch.zeros(real.shape, dtype=torch.bool)  # by number: [row, k] is the row's k-th real position
    for row, (places, count) in enumerate(zip(_by_row(given, what, counts), counts, strict=True)):
        chosen[row, _within(places, what, row, count)] = True
    if not bool(chosen.any()):
        said = "is no position: no number fits it" if isinstance(given, str) else "names no position"
        raise InputError(f"{what}={given!r} {said}.")
    return _laid_out(chosen, real)


def one_a_row(given: Positions, what: str, real: Bool[Tensor, "batch pos"]) -> Int[Tensor, " batch"]:
    """Where in the input the position of each row is, where one is meant."""
    meant: Any = _as_tensor(given)
    if isinstance(meant, Tensor) and meant.dtype == torch.bool:
        rows = listed(_masked(meant, what, real), real)
    else:
        if isinstance(meant, Sequence) and len(meant) == len(real) and all(is_whole(one) for one in meant):
            meant = torch.tensor([operator.index(one) for one in meant])  # one number for each row
        rows = _by_row(meant, what, real.sum(1).tolist())
    if any(len(places) != 1 for places in rows):
        raise InputError(
            f"{what}={meant!r}: one position is meant in each row (a number, or as many as there are rows, {len(real)})."
        )
    counts = real.sum(1).tolist()
    numbers = [_within(places, what, row, counts[row])[0] for row, places in enumerate(rows)]
    return order(real)[torch.arange(len(real)), numbers]


def columns(given: Any, what: str, real: Bool[Tensor, "batch pos"]) -> dict[Any, Bool[Tensor, "batch pos"]]:
    """Positions that stand side by side in a result: the mask of each, by its number or name.

    None (or "*"): every number up to the longest row's; a sequence or slice: each of them by itself; or a mapping of names
    to positions. A row that is too short for a number takes no part in it; some row must have it.
    """
    longest = int(real.sum(1).max())
    given = _as_tensor(given)
    if given is None or isinstance(given, slice | str):
        given = _numbers(given, longest)
    elif isinstance(given, Tensor) and given.ndim == 1:
        given = given.tolist()
    elif is_whole(given):
        given = [operator.index(given)]
    named = isinstance(given, Mapping)
    if not named:
        given = {operator.index(one) if is_whole(one) else str(one): one for one in given}
    if not given:
        raise InputError(f"{what} is empty: give positions, a dict of names to positions, or None for all.")
    return {
        name: _column(one, f"{what} {name!r}" + (f"={one!r}" if named and is_whole(one) else ""), real, longest)
        for name, one in given.items()
    }


def _column(given: Any, what: str, real: Tensor, longest: int) -> Bool[Tensor, "batch pos"]:
    if not is_whole(given):
        return mask_of(given, what, real)
    number = operator.index(given)
    if not -longest <= number < longest:
        raise InputError(f"{what} is out of range: the longest row has {longest} positions.")
    counts = real.sum(1, keepdim=True)
    return real & (real.cumsum(1) - 1 == (number if number >= 0 else counts + number))


def listed(mask: Bool[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]) -> list[list[int]]:
    """The positions of a mask, row by row, by their numbers."""
    return [row[own].nonzero().flatten().tolist() for row, own in zip(mask, real, strict=True)]


def order(real: Bool[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """Where each row's real positions are, in their order; padding behind them."""
    return torch.argsort((~real).to(torch.int8), dim=1, stable=True)


# -- reading --------------------------------------------------------------------------------------------------------


def _as_tensor(given: Any) -> Any:
    """numpy's arrays, and lists of truths, as tensors."""
    if isinstance(given, numpy.ndarray):
        return torch.as_tensor(given)
    truths = isinstance(given, list | tuple) and given and all(isinstance(one, bool) for one in given)
    return torch.tensor(given) if truths else given


def _masked(given: Tensor, what: str, real: Tensor) -> Bool[Tensor, "batch pos"]:
    batch, length = real.shape
    if tuple(given.shape) not in ((batch, length), (1, length), (length,)):
        raise InputError(f"{what} is a mask {list(given.shape)}; the input is [{batch}, {length}].")
    mask = given.to(real.device).expand(batch, length)
    lost = mask.any(1) & ~(mask & real).any(1)
    if bool(lost.any()):
        raise InputError(f"{what}: the mask marks nothing but padding in row {int(lost.nonzero()[0])}.")
    return mask & real


def _laid_out(chosen: Tensor, real: Tensor) -> Bool[Tensor, "batch pos"]:
    """From numbers to places in the input: each row's real places are filled in order."""
    there = torch.arange(real.shape[1], device=real.device) < real.sum(1, keepdim=True)
    mask = torch.zeros_like(real)
    mask[real] = chosen.to(real.device)[there]
    return mask


def _within(places: list[int], what: str, row: int, count: int) -> list[int]:
    """The numbers from 0 on; InputError for one that the row does not have."""
    for place in places:
        if not -count <= place < count:
            raise InputError(f"{what}={place} is out of range: row {row} has {count} positions.")
    return [place % count for place in places]


def _by_row(given: Any, what: str, counts: list[int]) -> list[list[int]]:
    """The positions of each row, as they were numbered."""
    if given is None or isinstance(given, slice | str):
        return [list(_numbers(given, count)) for count in counts]
    if isinstance(given, Sequence):
        if given and all(_is_several(one) for one in given):
            return _fitting([_whole(torch.as_tensor(one), what) for one in given], given, what, len(counts))
        return [[_number(one, what) for one in given]] * len(counts)
    if isinstance(given, Tensor) and given.ndim == 1:
        return _fitting([[one] for one in _whole(given, what)], given, what, len(counts))
    if isinstance(given, Tensor) and given.ndim == 2:
        return _fitting([_whole(one, what) for one in given], given, what, len(counts))
    if isinstance(given, Tensor) and given.ndim > 2:
        raise InputError(f"{what} has shape {list(given.shape)}: give [batch], [batch, some] or a mask [batch, pos].")
    return [[_number(given, what)]] * len(counts)


def _numbers(given: slice | str | None, count: int) -> Sequence[int]:
    """Those of the numbers 0 to count - 1 that a slice or a glob means."""
    if isinstance(given, str):
        return [number for number in range(count) if fnmatch.fnmatchcase(str(number), given)]
    return range(count)[given or slice(None)]


def _fitting(rows: list[list[int]], given: Any, what: str, batch: int) -> list[list[int]]:
    if len(rows) == 1:
        return rows * batch
    if len(rows) != batch:
        raise InputError(
            f"{what}={given!r} goes by row and has {len(rows)} rows; the batch has {batch}. "
            "A plain list of positions goes for every row."
        )
    return rows


def _is_several(given: Any) -> bool:
    """Whether it is a row's positions in a list of rows."""
    return bool(given.ndim) if isinstance(given, Tensor) else isinstance(given, Sequence) and not isinstance(given, str)


def _number(given: Any, what: str) -> int:
    if not is_whole(given):
        raise InputError(f"{what}={given!r} is no position: a whole number, a slice, a list or a tensor.")
    return operator.index(given)


def _whole(given: Tensor, what: str) -> list[int]:
    if (given.is_floating_point() or given.dtype == torch.bool) and given.numel():
        raise InputError(f"{what}: positions are whole numbers, these are {given.dtype}.")
    return [int(one) for one in given.reshape(-1).tolist()]

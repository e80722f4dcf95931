"""Positions: which positions of which rows a user means, as a mask [batch, pos].

    3, -1, [2, 3], range(2, 6), slice(4, 8)      the same positions in every row; negative ones count from the end
    tensor([4, 7])                               one position a row [batch]
    tensor([[4, 5], [7, 8]]), [[4, 5], [7]]      several a row: [batch, some], or a list for each row
    mask                                         booleans [batch, pos] (or [pos], then a list too)

Prompts differ by row, and so does where their subject stands: an integer tensor goes by row, a plain list goes for all.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from gatedlens.errors import InputError


def mask_of(
    given: Any, what: str, batch: int, length: int, device: torch.device | str = "cpu"
) -> Bool[Tensor, "batch pos"]:
    """True at the positions that are meant; `what` is the parameter's name, for the errors."""
    if isinstance(given, Tensor) and given.dtype == torch.bool:
        if tuple(given.shape) not in ((batch, length), (1, length), (length,)):
            raise InputError(f"{what} is a mask {list(given.shape)}; the input is [{batch}, {length}].")
        return given.to(device).expand(batch, length)
    if isinstance(given, list | tuple) and given and all(isinstance(one, bool) for one in given):
        return mask_of(torch.tensor(given), what, batch, length, device)
    mask = torch.zeros(batch, length, dtype=torch.bool)
    for row, places in enumerate(_by_row(given, what, batch, length)):
        if places and not (-length <= min(places) and max(places) < length):
            wrong = next(place for place in places if not -length <= place < length)
            raise InputError(f"{what}={wrong} is out of range: row {row} has {length} positions.")
        mask[row, places] = True
    if not bool(mask.any()):
        raise InputError(f"{what}={given!r} names no position.")
    return mask.to(device)


def one_a_row(
    given: Any, what: str, batch: int, length: int, device: torch.device | str = "cpu"
) -> Int[Tensor, " batch"]:
    """The position of each row, where one is meant."""
    mask = mask_of(given, what, batch, length, device)
    if bool((mask.sum(1) != 1).any()):
        raise InputError(f"{what}={given!r}: one position is meant in each row (a number, or a tensor [{batch}]).")
    return mask.long().argmax(1)


def listed(mask: Bool[Tensor, "batch pos"]) -> list[list[int]]:
    """The positions of a mask, row by row."""
    return [row.nonzero().flatten().tolist() for row in mask]


def _by_row(given: Any, what: str, batch: int, length: int) -> list[list[int]]:
    """The positions of each row, as they were numbered."""
    if isinstance(given, slice):
        return [list(range(length)[given])] * batch
    if isinstance(given, Sequence) and not isinstance(given, str):
        if given and all(isinstance(one, Sequence | Tensor) and not isinstance(one, str) for one in given):
            return _fitting([_whole(torch.as_tensor(one), what) for one in given], given, what, batch)
        return [_whole(torch.as_tensor([_number(one, what) for one in given]), what)] * batch
    if isinstance(given, Tensor) and given.ndim == 1:
        return _fitting([[one] for one in _whole(given, what)], given, what, batch)
    if isinstance(given, Tensor) and given.ndim == 2:
        return _fitting([_whole(one, what) for one in given], given, what, batch)
    if isinstance(given, Tensor) and given.ndim > 2:
        raise InputError(f"{what} has shape {list(given.shape)}: give [batch], [batch, some] or a mask [batch, pos].")
    return [[_number(given, what)]] * batch


def _fitting(rows: list[list[int]], given: Any, what: str, batch: int) -> list[list[int]]:
    if len(rows) == 1:
        return rows * batch
    if len(rows) != batch:
        raise InputError(
            f"{what}={given!r} goes by row and has {len(rows)} rows; the batch has {batch}. "
            "A plain list of positions goes for every row."
        )
    return rows


def _number(given: Any, what: str) -> int:
    try:
        return operator.index(given)
    except TypeError:
        raise InputError(f"{what}={given!r} is no position: a whole number, a slice, a list or a tensor.") from None


def _whole(given: Tensor, what: str) -> list[int]:
    if given.is_floating_point() and given.numel():
        raise InputError(f"{what}: positions are whole numbers, these are {given.dtype}.")
    return [int(one) for one in given.reshape(-1).tolist()]

"""Target: what an attribution explains, as one number a row of the batch.

    target=None              the predicted token or class, each row its own
    target=7                 the logit of 7; [7, 3, 3]: one a row; "cat", ["cat", "dog", "dog"]: of these single tokens
    target=(7, 3)            the logit of 7 minus that of 3; either may be one a row
    target=f                 any metric: logits -> [batch]

Logits of a language model are read at each row's last real position; a metric of your own gets them all
[batch, pos, d_vocab] and reads where it likes (see `metrics.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gatedlens.errors import InputError
from gatedlens.metrics import Metric, at_position, logit, logit_difference
from gatedlens.model.base import HookedModel
from gatedlens.model.language import HookedLanguageModel

# What `target=` takes, as the head of this file says. For type checkers: whoever passes something else gets an InputError.
if TYPE_CHECKING:
    Asked: TypeAlias = int | str | Sequence[Any] | Tensor | numpy.ndarray[Any, Any] | Metric | None
else:
    Asked = Any


@dataclass(frozen=True)
class Target:
    """The logit of `right` (minus that of `wrong`, if given) at the places `pos` of the input; or the metric `custom`."""

    pos: Int[Tensor, " batch"]
    right: Int[Tensor, " batch"] | None = None
    wrong: Int[Tensor, " batch"] | None = None
    custom: Metric | None = None

    @staticmethod
    def of(
        asked: Any, model: HookedModel, logits: Float[Tensor, "batch *pos d_vocab"], pos: Int[Tensor, " batch"]
    ) -> Target:
        """What a user asked, checked; `logits` are those of the clean run, which decide what is predicted."""
        if callable(asked):
            return Target(pos, custom=asked)
        if asked is None:
            return Target(pos, right=at_position(logits.as_subclass(Tensor), pos).argmax(-1))
        if isinstance(asked, tuple):
            if len(asked) != 2:
                raise InputError(
                    f"target={asked!r} has {len(asked)} parts; a pair (right, wrong) is a logit difference."
                )
            right, wrong = (_ids(one, model, logits, asked) for one in asked)
            return Target(pos, right, wrong)
        return Target(pos, _ids(asked, model, logits, asked))

    @property
    def metric(self) -> Metric:
        """logits -> [batch]"""
        if self.custom is not None:
            return self.custom
        assert self.right is not None
        right, wrong = self.right, self.wrong
        read = logit(right, self.pos) if wrong is None else logit_difference(right, wrong, self.pos)
        return lambda logits: read(logits.as_subclass(Tensor))  # `pos` are places in the input, padding included

    @property
    def said(self) -> Any:
        """The target as JSON holds it: ids, a pair of ids, or a metric's name."""
        if self.custom is not None:
            return getattr(self.custom, "__name__", type(self.custom).__name__)
        assert self.right is not None
        right = self.right.tolist()
        return right if self.wrong is None else {"right": right, "wrong": self.wrong.tolist()}

    def row(self, r: int, logits: Float[Tensor, "batch *pos d_vocab"], real: Bool[Tensor, " pos"] | None) -> Target:
        """The target of row `r` alone, its padding (where `real` is False) left out.

        A metric of the user's knows all rows: it is given the other rows' clean `logits`, and only r's answer counts.
        """
        pos = self.pos[r : r + 1] if real is None else real.sum().reshape(1) - 1
        if self.custom is None:
            right, wrong = (None if given is None else given[r : r + 1] for given in (self.right, self.wrong))
            return Target(pos, right, wrong)
        whole, metric = logits, self.custom

        def alone(row: Tensor) -> Tensor:
            filled = whole.clone()
            filled[r, slice(None) if real is None else real] = row[0]
            return metric(filled)[r : r + 1]

        return Target(pos, custom=alone)


def _ids(given: Any, model: HookedModel, logits: Tensor, asked: Any) -> Int[Tensor, " batch"]:
    """Token or class ids, one a row."""
    if isinstance(model, HookedLanguageModel):
        given = _read(given, model)
    if not isinstance(given, Integral | Tensor | Sequence | numpy.ndarray) or isinstance(given, str | bool):
        raise InputError(
            f"target={_say(asked)}: give an id, one a row, a pair (right, wrong), or a metric (logits -> one number a row)."
        )
    try:
        ids = torch.as_tensor(given, device=logits.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"target={_say(asked)} is no list of ids: {error}.") from error
    rows, size = len(logits), logits.shape[-1]
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputError(f"target={_say(asked)}: ids are whole numbers, these are {ids.dtype}.")
    if ids.ndim > 1 or (ids.ndim == 1 and len(ids) not in (1, rows)):
        raise InputError(f"target has shape {list(ids.shape)} and the input {rows} rows: give one id, or one a row.")
    if bool(((ids < 0) | (ids >= size)).any()):
        raise InputError(
            f"target={_say(asked)} is out of range: {model.cfg.model_name} has the logits 0 to {size - 1}."
        )
    return ids.long().reshape(-1).expand(rows)


def _read(given: Any, model: HookedLanguageModel) -> Any:
    """Text as the id of its token; a list of texts as a list of ids."""
    if isinstance(given, str):
        return model.to_single_token(given)
    if isinstance(given, list) and given and all(isinstance(one, str) for one in given):
        return [model.to_single_token(one) for one in given]
    return given


def _say(asked: Any) -> str:
    return str(asked.tolist()) if isinstance(asked, Tensor | numpy.ndarray) else repr(asked)

"""Inputs: what a user hands to an analysis, made ready, and how its positions are counted and called.

batch = inputs.ready(model, ["short", "a longer text"])     # a Batch: tokens and where they are real
inputs.ready(model, (tokens, mask))                          # ids that were padded by hand
inputs.places(-1, inputs.real(model, batch))                 # the last real position of each row
inputs.labels(model, batch)                                  # ["<bos>", "A", "3", ...]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from gatedlens.cache import ActivationCache
from gatedlens.errors import InputError
from gatedlens.hooking import Batch


def ready(model: Any, input: Any) -> Batch:
    """Text, a list of texts, token ids, images, or a pair (token ids, mask [batch, pos]) as a Batch."""
    if isinstance(input, tuple) and len(input) == 2 and all(isinstance(part, Tensor) for part in input):
        batch: Batch = model.prepare(input[0], attention_mask=input[1])[0]
        return batch
    found: Batch = model.prepare(input)[0]
    return found


def cached(model: Any, input: Any, names: Sequence[str]) -> tuple[ActivationCache, Batch]:
    """The cache of `names` of one run of an input, or a cache that the user has, and what was run; all positions of it."""
    if not isinstance(input, ActivationCache):
        batch = ready(model, input)
        return model.run_with_cache(batch, names_filter=list(names))[1], batch
    if input.model is not model:
        raise InputError(f"This cache is one of {input.model.cfg.model_name}, not of {model.cfg.model_name}.")
    if input.sliced or not input.has_batch_dim:
        raise InputError("This needs a cache of all positions, with its batch axis: no pos_slice or remove_batch_dim.")
    if input.tokens is None:
        return input, Batch(input["resid_pre", 0], input.mask, is_resid=True)
    return input, Batch(input.tokens, input.mask)


def real(model: Any, batch: Batch) -> Bool[Tensor, "batch pos"]:
    """Where a position is no padding."""
    if batch.mask is not None:
        return batch.mask.bool()
    shape = (batch.value.shape[0], model.positions(batch))
    return torch.ones(shape, dtype=torch.bool, device=batch.value.device)


def places(pos: Any, real: Bool[Tensor, "batch pos"]) -> Int[Tensor, " batch"]:
    """One position a row: `pos`, one number for all or one a row, counted among the row's real positions (-1: the last)."""
    asked = torch.as_tensor(pos, device=real.device)
    if asked.is_floating_point() or asked.dtype == torch.bool or asked.ndim > 1:
        raise InputError(f"pos={pos!r}: a whole number is meant, or one for each row.")
    if asked.ndim == 1 and len(asked) not in (1, len(real)):
        raise InputError(
            f"pos has {len(asked)} entries and the batch {len(real)} rows: give one for all, or one a row."
        )
    asked, counts = asked.reshape(-1).expand(len(real)), real.sum(1)
    if bool(((asked < -counts) | (asked >= counts)).any()):
        raise InputError(f"pos={asked.tolist()} is out of range: the rows have {counts.tolist()} real positions.")
    order = torch.argsort((~real).to(torch.int8), dim=1, stable=True)  # the real ones first
    return order[torch.arange(len(real), device=real.device), torch.where(asked < 0, asked + counts, asked)]


def word(model: Any, token: int) -> str:
    """A vocabulary entry (or class) as a user calls it: its text where there is a tokenizer, else its number."""
    return str(token) if model.tokenizer is None else str(model.tokenizer.decode([token]))


def labels(model: Any, batch: Batch, row: int | None = None) -> list[Any]:
    """The tokens of a row (None: of all rows, a position's number where they differ); numbers if there are no tokens."""
    length = model.positions(batch)
    if batch.is_resid or batch.value.is_floating_point():
        return list(range(length))
    rows = batch.value if row is None else batch.value[row].unsqueeze(0)
    same = (rows == rows[0]).all(0).tolist()
    return [word(model, token) if same[p] else p for p, token in enumerate(rows[0].tolist())]

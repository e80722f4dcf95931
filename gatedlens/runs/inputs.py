"""Inputs: what a user hands to an analysis, made ready, and how its positions are counted and called.

batch = inputs.ready(model, ["short", "a longer text"])     # a Batch: tokens and where they are real
inputs.ready(model, (tokens, mask))                          # ids that were padded by hand
inputs.real(model, batch)                                    # [batch, pos]: what `positions.py` counts among
inputs.labels(model, batch)                                  # ["<bos>", "A", "3", ...]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from gatedlens.errors import InputError
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Batch, Input
from gatedlens.model.cache import ActivationCache
from gatedlens.runs import fingerprints


def ready(model: HookedModel, input: Input, **options: Any) -> Batch:
    """Text, a list of texts, token ids, images, or a pair (token ids, mask [batch, pos]) as a Batch."""
    return prepared(model, input, **options)[0]


def prepared(model: HookedModel, input: Input, **options: Any) -> tuple[Batch, dict[str, Any]]:
    """The Batch, and those of the forward's options that are not spent on it. A pair's mask is its `attention_mask`."""
    if isinstance(input, tuple) and len(input) == 2 and all(isinstance(part, Tensor) for part in input):
        if options.get("attention_mask") is not None:
            raise InputError(
                "The input is a pair (ids, mask) and attention_mask is given too: leave one of the masks out."
            )
        ids, mask = input
        input, options = ids, {**options, "attention_mask": mask}
    found: tuple[Batch, dict[str, Any]] = model.prepare(input, **options)
    return found


def cached(model: HookedModel, input: Input | ActivationCache, names: Sequence[str]) -> tuple[ActivationCache, Batch]:
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


def checksum(batch: Batch, total: int = 0) -> int:
    """crc32 of what is run, and of where it is real; `total` is that of what came before."""
    total = fingerprints.checksum(batch.value, total)
    return total if batch.mask is None else fingerprints.checksum(batch.mask, total)


def real(model: HookedModel, batch: Batch) -> Bool[Tensor, "batch pos"]:
    """Where a position is no padding."""
    if batch.mask is not None:
        return batch.mask.bool()
    shape = (batch.value.shape[0], model.positions(batch))
    return torch.ones(shape, dtype=torch.bool, device=batch.value.device)


def word(model: HookedModel, token: int) -> str:
    """A vocabulary entry (or class) as a user calls it: its text where there is a tokenizer, else its number."""
    return str(token) if model.tokenizer is None else str(model.tokenizer.decode([token]))


def labels(model: HookedModel, batch: Batch, row: int | None = None) -> list[Any]:
    """What stands at each real position of a row (None: of any row, a position's number where rows differ): its token, or
    "row,column" of an image's patches and "cls"; numbers where nobody can say."""
    own = real(model, batch)
    own = own if row is None else own[row].unsqueeze(0)
    length = int(own.sum(1).max())
    if not batch.is_resid and batch.value.is_floating_point():
        grid: Any = model.grid  # every model that reads images has one
        places = [grid.place(pos) for pos in range(length)]
        return ["cls" if place is None else f"{place[0]},{place[1]}" for place in places]
    if batch.is_resid or model.tokenizer is None:
        return list(range(length))
    ids = batch.value if row is None else batch.value[row].unsqueeze(0)
    found: list[set[int]] = [set() for _ in range(length)]
    for tokens, there in zip(ids, own, strict=True):
        for pos, token in enumerate(tokens[there].tolist()):
            found[pos].add(token)
    return [word(model, *some) if len(some) == 1 else pos for pos, some in enumerate(found)]

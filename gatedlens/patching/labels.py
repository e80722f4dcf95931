"""Labels: what stands at each position of an input."""

from __future__ import annotations

from typing import Any

from gatedlens.hooking import Batch
from gatedlens.language import HookedLanguageModel


def of_positions(model: Any, batch: Batch) -> list[Any]:
    """Tokens of a prompt (of several: those that all share, numbers elsewhere); rows and columns of an image's patches."""
    length = model.positions(batch)
    if not isinstance(model, HookedLanguageModel):
        places = [model.grid.place(pos) for pos in range(length)]
        return ["cls" if place is None else f"{place[0]},{place[1]}" for place in places]
    if model.tokenizer is None or batch.is_resid:
        return list(range(length))
    first, shared = model.to_str_tokens(batch.value[0]), (batch.value == batch.value[:1]).all(0).tolist()
    return [token if same else pos for pos, (token, same) in enumerate(zip(first, shared, strict=True))]

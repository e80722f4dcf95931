"""The plan of a harvest: how each point that was asked for will lie in the store, learnt from a run on two tokens.

layouts = plan(batches, "blocks.*.mixer.hook_gated", dtype=None)
"""

from __future__ import annotations

import torch

from gatedlens.address.names import NamesFilter
from gatedlens.errors import InputError
from gatedlens.store.corpus.batches import Batches, Rows
from gatedlens.store.disk.layout import Layout, resolve
from gatedlens.store.work import activations


def plan(batches: Batches, names: NamesFilter, dtype: torch.dtype | None) -> list[Layout]:
    """A Layout for each point, in firing order; PointError if one does not fire, InputError if there is nothing to run."""
    wanted, model = resolve(batches.model, names), batches.model
    first = next(iter(batches), None)
    if first is None:
        raise InputError(_nothing(batches))
    length = 2 if first.is_text else None
    some = Rows(first.value[:1, :length], None, first.keep[:1, :length], first.documents[:1, :length])
    with torch.no_grad():
        fired = activations(model, some, wanted)
    points = model.names.points
    return [Layout.of(points[name], name, fired[name], dtype, batches.length) for name in wanted]


def _nothing(batches: Batches) -> str:
    if batches.rest:
        return (
            f"The whole corpus has {batches.rest} tokens, and context={batches.context}: it does not fill one row. Give a "
            "smaller context, or none (a row is then a document)."
        )
    return "The corpus holds no document that is not empty (or marks none): there is nothing to harvest."

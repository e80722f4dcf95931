"""Work: from a batch to what is stored of it. A worker needs nothing else, here or on another machine.

work = Work(model, layouts)
tensors = work(rows)                        # {name: [entry, ...]}, equal to run_with_cache's bit for bit
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gatedlens.store.corpus.batches import Rows
from gatedlens.store.disk.layout import Layout, last_layer
from gatedlens.store.reductions import Reduction


@dataclass(frozen=True)
class Work:
    """`work(rows)`: the activations of one batch at the points of `layouts`, on the CPU."""

    model: Any
    layouts: tuple[Layout, ...]

    @torch.no_grad()
    def __call__(self, rows: Rows) -> dict[str, Tensor]:
        cache = activations(self.model, rows, [layout.name for layout in self.layouts])
        return {layout.name: layout.flat(cache[layout.name], rows.keep) for layout in self.layouts}


@dataclass(frozen=True)
class Reduce:
    """`reduce(rows)`: the parts of one batch, {"point/reduction/field": tensor}, of what `work` gives for it."""

    work: Work
    reductions: tuple[Reduction, ...]

    @torch.no_grad()
    def __call__(self, rows: Rows) -> dict[str, Tensor]:
        tensors = self.work(rows)
        found: dict[str, Tensor] = {}
        for layout in self.work.layouts:
            first = rows.first_token if layout.per == "token" else rows.first_row
            for reduction in self.reductions:
                part = reduction.of(tensors[layout.name], first)
                found |= {f"{layout.name}/{reduction.name}/{field}": value for field, value in part.items()}
        return found


def activations(model: Any, rows: Rows, names: list[str]) -> dict[str, Tensor]:
    """What `run_with_cache` gives for the batch; blocks and the unembedding that none of the points needs are not run."""
    stop = last_layer(names)
    wants = "logits" if stop is None else None
    given = {} if rows.mask is None else {"attention_mask": rows.mask}
    _, cache = model.run_with_cache(
        rows.value,
        names_filter=names,
        device="cpu",
        return_cache_object=False,
        return_type=wants,
        stop_at_layer=stop,
        **given,
    )
    return cache

"""Baseline: the run that is patched (the corrupted one, in patching), made ready to be run again.

    corrupted = Baseline(model, tokens)
    corrupted.logits                                   # of the run itself
    corrupted.advance(16)                              # from here on runs start at position 16
    corrupted.run(cells)                               # [cell batch pos d_vocab]: each cell's logits, in one batch
    corrupted.onward(streams, 3)                       # the same of residual streams that enter block 3

Only what a patch can change is run: blocks from the patched one on, from the residual stream that the corrupted run had
there, and in a causal model positions from the patched one on, from the recurrent state that it had there (conv tails,
shift tails, scan states and attention windows: `RecurrentState`). A patch that changes nothing is not run at all.

Under hooks of the user's own each patch is a whole run by itself: what they do may depend on the position, the row or
the batch (an ablation at pos=3, another row's activation), and part of a run, or many in one batch, would not be theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from gatedlens import inputs
from gatedlens.errors import InputError
from gatedlens.hooking import Batch
from gatedlens.language import HookedLanguageModel
from gatedlens.runs.cells import Cell
from gatedlens.state import RecurrentState


class Baseline:
    """`input`: what the model reads (text, tokens, images); `rows` and `length` its batch and positions."""

    def __init__(self, model: Any, input: Any, attention_mask: Tensor | None = None):
        if model.training:
            raise InputError("The model is in training mode, where dropout may differ from run to run: model.eval().")
        self.model = model
        self.batch = inputs.ready(model, input, attention_mask=attention_mask)
        self.rows, self.length = len(self.batch.value), model.positions(self.batch)
        self.causal = isinstance(model, HookedLanguageModel)
        self.alone = model.is_hooked()
        self.order = {name: i for i, name in enumerate(model.names)}
        self.start = 0
        self.state: RecurrentState | None = None
        self.resid: dict[int, Tensor] = {}
        self.logits = torch.empty(0)

    # -- where a run begins --------------------------------------------------------------------------------------

    def entry(self, cell: Cell) -> int:
        """The block that a run with this cell begins at; -1: with the input; n_layers: behind the last block."""
        return -1 if self.alone else min(self._entry(edit.name) for edit in cell.edits)

    def _entry(self, name: str) -> int:
        n_layers = self.model.cfg.n_layers
        if not name.startswith("blocks."):
            return -1 if self.order[name] < self.order["blocks.0.hook_resid_pre"] else n_layers
        layer = int(name.split(".")[1])
        # Some points of block 0 (a norm of the embedding) fire before its residual stream begins.
        return layer if self.order[name] >= self.order[f"blocks.{layer}.hook_resid_pre"] else -1

    def earliest(self, pos: int) -> int:
        """The last position at or before `pos` at which a run may start: 0, or one with a real token before it in each row."""
        if self.alone or not self.causal or pos == 0:
            return 0
        mask = self.batch.mask
        return pos if mask is None or bool(mask[:, :pos].any(1).all()) else 0

    def prepare(self, cells: Sequence[Cell]) -> list[Cell]:
        """Run the corrupted input once, keep the residual stream where `cells` enter it, and return the cells that
        change something."""
        entries = sorted({self.entry(cell) for cell in cells} - {-1})
        names = {layer: self._stream(layer) for layer in entries}
        changing: set[int] = set()
        watch = _by_name(cells)

        def compare(x: Tensor, hook: Any) -> None:
            changing.update(i for i, edit in watch[hook.name] if i not in changing and edit.changes(x))

        with self.model.hooks([(name, compare) for name in watch]):
            if names:
                wanted = list(dict.fromkeys(names.values()))
                self.logits, cache = self.model.run_with_cache(self.batch, names_filter=wanted, max_bytes=None)
                self.resid = {layer: cache[name] for layer, name in names.items()}
            else:
                self.logits = self.model(self.batch)
        return [cell for i, cell in enumerate(cells) if i in changing]

    def _stream(self, layer: int) -> str:
        """The point that holds what enters a block (or, behind the last one, the final norm)."""
        last = layer == self.model.cfg.n_layers
        return f"blocks.{layer - 1}.hook_resid_post" if last else f"blocks.{layer}.hook_resid_pre"

    def advance(self, start: int) -> None:
        """Let runs start at position `start` (ascending): takes the state before it along."""
        if start == self.start:
            return
        # A row may be all padding between two starts, so a padded batch is read from its beginning.
        begin = 0 if self.batch.mask is not None else self.start
        part = self._input(begin, start)
        _, self.state = self.model(part, return_type=None, state=self.state if begin else None, return_state=True)
        self.start = start

    def _input(self, begin: int, end: int | None = None) -> Batch:
        mask = self.batch.mask
        return Batch(self.batch.value[:, begin:end], None if mask is None else mask[:, begin:end])

    # -- runs ----------------------------------------------------------------------------------------------------

    def run(self, cells: Sequence[Cell]) -> Tensor:
        """The logits of each cell, [cell batch ...]: all of one `entry`, none of which touches what is before `start`.

        Positions before `start` are missing; `whole` puts them in front.
        """
        entry, n, start = self.entry(cells[0]), len(cells), self.start
        with self.model.hooks(self._hooks(cells)):
            if entry != -1:
                return self.onward(_tile(self.resid[entry], n), entry)
            batch = self._input(start) if start else self.batch
            logits = self.model(self._many(batch.value, n), **self._from_state(n))
        return logits.unflatten(0, (n, self.rows))

    def onward(self, streams: Tensor, layer: int) -> Tensor:
        """The logits [cell batch ...] of whole residual streams [cell * batch, pos, d_model] that enter block `layer`.

        They are read from position `start` on; before it they must be this run's own.
        """
        n = len(streams) // self.rows
        given = {"start_at_layer": layer, **self._from_state(n)}
        logits: Tensor = self.model(self._many(streams[:, self.start :], n, is_resid=True), **given)
        return logits.unflatten(0, (n, self.rows))

    def _from_state(self, n: int) -> dict[str, Any]:
        return {} if self.state is None else {"state": self.state.rows(self._repeat(n))}

    def _many(self, value: Tensor, n: int, is_resid: bool = False) -> Batch:
        """A batch of `n` runs from position `start` on: `value` is one run's input, or the streams of all."""
        mask = self._input(self.start).mask
        return Batch(value if is_resid else _tile(value, n), None if mask is None else _tile(mask, n), is_resid)

    def whole(self, logits: Tensor) -> Tensor:
        """One cell's logits with the corrupted run's before the position at which it started."""
        return torch.cat([self.logits[:, : self.start], logits], dim=1) if self.start else logits

    def _repeat(self, n: int) -> Tensor:
        return torch.arange(self.rows, device=self.batch.value.device).repeat(n)

    def _hooks(self, cells: Sequence[Cell]) -> list[Any]:
        edits = _by_name(cells)

        def patch(x: Tensor, hook: Any) -> Tensor:
            for i, edit in edits[hook.name]:
                edit.apply(x[i * self.rows : (i + 1) * self.rows], self.start)
            return x

        return [(name, patch) for name in edits]


def _by_name(cells: Iterable[Cell]) -> dict[str, list[tuple[int, Any]]]:
    """For each point, which cells (by number) do what there."""
    found: dict[str, list[tuple[int, Any]]] = {}
    for i, cell in enumerate(cells):
        for edit in cell.edits:
            found.setdefault(edit.name, []).append((i, edit))
    return found


def _tile(x: Tensor, n: int) -> Tensor:
    return x.repeat(n, *[1] * (x.ndim - 1))

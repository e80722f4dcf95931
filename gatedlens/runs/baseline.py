"""Baseline: the run whose edits a sweep measures (the corrupted one, in patching), made ready to be run again.

    corrupted = Baseline(model, tokens)
    changing = corrupted.prepare(cells)                # the run itself, once; which cells change anything at all
    corrupted.logits                                   # of the run itself, as a metric reads them
    corrupted.advance(16)                              # from here on runs start at position 16
    corrupted.run(cells)                               # [cell batch pos d_vocab]: each cell's logits, in one batch
    corrupted.whole(logits)                            # one cell's, as a metric reads them

Only what an edit can change is run: blocks from the edited one on, from the residual stream that this run had there, and
in a causal model positions from the edited one on, from the recurrent state that it had there (conv tails, shift tails,
scan states and attention windows: `RecurrentState`). An edit that changes nothing is not run at all.

Under hooks of the user's own each cell is a whole run by itself: what they do may depend on the position, the row or
the batch (an ablation at pos=3, another row's activation), and part of a run, or many in one batch, would not be theirs.
So it is under options of the forward that go by row or position (a state, position_ids).

Cells count real positions. A padded batch is run with its rows' real positions in front, so that the k-th of each stands at
k, on whatever side the input was padded; a metric gets the logits as the input was laid out. Where each cell is a whole run
by itself the input stays as it is, and the activation that a cell edits is turned instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from gatedlens.address import positions
from gatedlens.address.positions import Positions
from gatedlens.errors import InputError
from gatedlens.metrics import Logits
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Batch, Input
from gatedlens.model.hookpoint import Capture
from gatedlens.model.language import HookedLanguageModel
from gatedlens.model.padding import Padding
from gatedlens.model.state import RecurrentState
from gatedlens.runs import inputs
from gatedlens.runs.cells import Cell, by_name

EMBED = "hook_embed"  # where an input enters, in every architecture
ALIKE = frozenset(("return_type", "loss_per_token"))  # options of the forward that do not go by row or position


class Streams(NamedTuple):
    """What runs hold at a block, a row each: the stream, and what blocks handed on beside it, by point."""

    value: Tensor
    handed: dict[str, Tensor]

    def since(self, start: int) -> Streams:
        """From position `start` on."""
        return Streams(self.value[:, start:], {name: x[:, start:] for name, x in self.handed.items()})

    def joined(self, others: Streams) -> Streams:
        """With the rows of others behind these."""
        handed = {name: torch.cat([x, others.handed[name]]) for name, x in self.handed.items()}
        return Streams(torch.cat([self.value, others.value]), handed)


class Baseline:
    """`input`: what the model reads (text, tokens, images); `rows` and `length` its batch and positions, `longest` how many
    of them are real in the longest row.

    options: of the forward, beside the input's own. noise: what is added to the embeddings. Both as the input is laid out.
    """

    def __init__(
        self,
        model: HookedModel,
        input: Input,
        attention_mask: Tensor | None = None,
        options: Mapping[str, Any] | None = None,
        noise: Float[Tensor, "batch pos d_model"] | None = None,
    ):
        if model.training:
            raise InputError("The model is in training mode, where dropout may differ from run to run: model.eval().")
        self.model = model
        self.given = inputs.ready(model, input, attention_mask=attention_mask)
        self.options = {name: given for name, given in (options or {}).items() if given is not None}
        self.padding = Padding.of(self.given.mask)
        self.alone = model.is_hooked() or not ALIKE.issuperset(self.options)
        self.batch = self._laid_out(self.given)
        self.noise = None if noise is None else self.as_run(noise)
        self.rows, self.length = len(self.batch.value), model.positions(self.batch)
        self.longest = self.padding.longest(self.length)
        self.causal = isinstance(model, HookedLanguageModel)
        self.order = {name: i for i, name in enumerate(model.names)}
        self.start = 0
        self.state: RecurrentState | None = None
        self.resid: dict[int, Tensor] = {}
        self.handed: dict[str, Tensor] = {}  # what blocks handed on beside the stream in this run, by point
        self.base = torch.empty(0)  # the run's own logits, laid out as it is run
        self.read: Int[Tensor, " batch"] | None = None  # the one position of each row that is read; None: all may be

    # -- padding -------------------------------------------------------------------------------------------------

    def _laid_out(self, batch: Batch) -> Batch:
        mask = None if batch.mask is None else self.as_run(batch.mask)
        return Batch(self.as_run(batch.value), mask, batch.is_resid)

    def as_run(self, x: Shaped[Tensor, "batch pos ..."]) -> Shaped[Tensor, "batch pos ..."]:
        """Something of the input's positions, laid out as it is run."""
        return x if self.alone else self.padding.pack(x)

    def mask_of(self, given: Positions, what: str) -> Bool[Tensor, "batch pos"]:
        """Positions of the input that a user means, laid out as it is run."""
        return self.as_run(positions.mask_of(given, what, inputs.real(self.model, self.given)))

    def by_number(self, x: Tensor, dims: Sequence[str]) -> Tensor:
        """An activation of this run as cells see it: the rows' real positions in front."""
        return self.padding.by_number(x, dims) if self.alone else x

    def by_place(self, x: Tensor, dims: Sequence[str]) -> Tensor:
        """The way back from `by_number`."""
        return self.padding.by_place(x, dims) if self.alone else x

    @property
    def logits(self) -> Tensor:
        """The run's own logits, as a metric reads them."""
        return self._as_given(self.base)

    def _as_given(self, logits: Tensor) -> Tensor:
        """Logits laid out as the input was, which know where it is real."""
        return Logits.of(logits if self.alone else self.padding.spread(logits), self.padding.mask)

    # -- where a run begins --------------------------------------------------------------------------------------

    def entry(self, cell: Cell) -> int:
        """The block that a run with this cell begins at; -1: with the input; n_layers: behind the last block."""
        return -1 if self.alone else cell.entry(self)

    def entry_of(self, name: str) -> int:
        """The block at which a run begins that is edited at this point."""
        n_layers = self.model.cfg.n_layers
        if not name.startswith("blocks."):
            return -1 if self.order[name] < self.order["blocks.0.hook_resid_pre"] else n_layers
        layer = int(name.split(".")[1])
        # Some points of block 0 (a norm of the embedding) fire before its residual stream begins.
        if self.order[name] < self.order[f"blocks.{layer}.hook_resid_pre"]:
            return -1
        return layer + 1 if name == _behind(layer) else layer

    def earliest(self, pos: int) -> int:
        """The last position at or before `pos` at which a run may start: 0, or one with a real token before it in each row."""
        if self.alone or not self.causal or pos == 0:
            return 0
        mask = self.batch.mask
        return pos if mask is None or bool(mask[:, :pos].any(1).all()) else 0

    def prepare(self, cells: Sequence[Cell]) -> set[int]:
        """Run the input once, keep the residual stream where `cells` enter it; which of them (by number) may change
        anything."""
        entries = sorted({self.entry(cell) for cell in cells} - {-1})
        streams = {layer: f"blocks.{layer}.hook_resid_pre" for layer in entries}
        if self.model.cfg.n_layers in streams:
            streams[self.model.cfg.n_layers] = _behind(self.model.cfg.n_layers - 1)
        changing = {i for i, cell in enumerate(cells) if not cell.edits}
        watch = by_name(cells)

        def compare(x: Tensor, hook: Any) -> None:
            x = self.by_number(x, hook.point.dims)
            changing.update(i for i, edit in watch[hook.name] if i not in changing and edit.changes(x))

        with self.model.hooks([*self._noisy(0, self.length), *((name, compare) for name in watch)]):
            if streams:
                wanted = [*streams.values(), *self.model.hands_on]
                self.base, cache = self.model.run_with_cache(
                    self.batch, names_filter=wanted, max_bytes=None, **self.options
                )
                self.resid = {layer: cache[name] for layer, name in streams.items()}
                self.handed = {name: cache[name] for name in self.model.hands_on}
            else:
                self.base = self.model(self.batch, **self.options)
        return changing

    def advance(self, start: int) -> None:
        """Let runs start at position `start` (ascending): takes the state before it along."""
        if start == self.start:
            return
        # A row may be all padding between two starts, so a padded batch is read from its beginning.
        begin = 0 if self.batch.mask is not None else self.start
        with self.model.hooks(self._noisy(begin, start)):
            part = self._input(begin, start)
            _, self.state = self.model(part, return_type=None, state=self.state if begin else None, return_state=True)
        self.start = start

    def read_only(self, place: Int[Tensor, " batch"] | None, cells: Sequence[Cell]) -> None:
        """Let runs of `cells` have logits at one place of each row of the input alone, where that can be."""
        self.read = None
        if place is None or self.alone or not self.causal or any(cell.beyond(self) for cell in cells):
            return
        place = place.to(self.batch.value.device)
        rank = self.padding.rank
        self.read = place if rank is None else rank.to(place.device).gather(1, place.unsqueeze(1)).squeeze(1)

    def is_read(self, cell: Cell) -> bool:
        """Whether anything that a metric reads stands at or behind the first position that a cell touches."""
        return self.read is None or cell.first <= int(self.read.max())

    def _input(self, begin: int, end: int | None = None) -> Batch:
        mask = self.batch.mask
        return Batch(self.batch.value[:, begin:end], None if mask is None else mask[:, begin:end])

    def _noisy(self, begin: int, end: int, n: int = 1) -> list[Any]:
        """The hooks of `n` runs of some positions that add this run's noise."""
        if self.noise is None:
            return []
        added = _tile(self.noise[:, begin:end], n)
        return [(EMBED, lambda x, hook: x + added)]

    # -- runs ----------------------------------------------------------------------------------------------------

    def run(self, cells: Sequence[Cell]) -> Float[Tensor, "cell batch ..."]:
        """The logits of each cell, none of which touches what is before `start`. They are in the order of their entries;
        those that enter with the input, or whose `behind` is another block than their entry, are among their like.

        Positions before `start` are missing; `whole` puts them in front.
        """
        one, n = cells[0], len(cells)
        hooks = one.hooks(cells, self)
        if self.entry(one) == -1:
            with self.model.hooks([*self._noisy(self.start, self.length, n), *hooks]):
                value = _tile(self._input(self.start).value if self.start else self.batch.value, n)
                logits = self.model(self._many(value, self.start, n), **self.options, **self._from_state(n))
            return logits.unflatten(0, (n, self.rows))
        groups = [(entry, list(group)) for entry, group in groupby(cells, key=self.entry)]
        with self.model.hooks(hooks):
            batch = self._entering(*groups[0])
            # Each batch runs up to the block where others join it.
            for (_, group), (entry, joining) in pairwise(groups):
                here = self._onwards(batch, group[0].behind(self), stop_at_layer=entry)
                batch = here.joined(self._entering(entry, joining))
            behind = groups[-1][1][0].behind(self)
            logits = self._onwards(batch, behind).value if self.read is None else self._there(batch, behind)
        return logits.unflatten(0, (n, self.rows))

    def _entering(self, entry: int, cells: Sequence[Cell]) -> Streams:
        """The streams of cells that enter at one block, from `start` on, as they are `behind` it."""
        n, behind = len(cells), cells[0].behind(self)
        streams = Streams(_tile(self.resid[entry], n), {name: _tile(x, n) for name, x in self.handed.items()})
        for i, edit in by_name(cells).get(_behind(entry - 1), ()):  # its point has fired before a run begins
            edit.apply(streams.value[i * self.rows : (i + 1) * self.rows], 0)
        if behind > entry:
            streams = self._through(streams, 0, start_at_layer=entry, stop_at_layer=behind)
        return streams.since(self.start)

    def _onwards(self, streams: Streams, layer: int, **options: Any) -> Streams:
        """What becomes of streams that have reached a block."""
        n = len(streams.value) // self.rows
        return self._through(streams, self.start, start_at_layer=layer, **options, **self._from_state(n))

    def _through(self, streams: Streams, start: int, **options: Any) -> Streams:
        """What blocks make of streams from position `start` on, and of what is handed on beside them."""
        batch = self._many(streams.value, start, len(streams.value) // self.rows, True)
        if not streams.handed:
            return Streams(self.model(batch, **options), {})
        handed = dict(streams.handed)
        with self.model.hooks([(name, Capture(handed)) for name in handed]):
            return Streams(self.model(batch, earlier=streams.handed, **options), handed)

    def _there(self, streams: Streams, layer: int) -> Float[Tensor, "row d_vocab"]:
        """The logits of streams that have reached a block, where they are read. (Before `start` they are anything.)"""
        n_layers, n = self.model.cfg.n_layers, len(streams.value) // self.rows
        assert self.read is not None
        here = (self.read - self.start).clamp(min=0).repeat(n)
        last = self._onwards(streams, layer, stop_at_layer=n_layers).value
        last = last[torch.arange(len(last), device=last.device), here].unsqueeze(1)
        return self.model(Batch(last, None, True), start_at_layer=n_layers).squeeze(1)

    def _many(self, value: Tensor, start: int, n: int, is_resid: bool = False) -> Batch:
        """A batch of `n` runs from position `start` on."""
        mask = self.batch.mask
        return Batch(value, None if mask is None else _tile(mask[:, start:], n), is_resid)

    def _from_state(self, n: int) -> dict[str, Any]:
        return {} if self.state is None else {"state": self.state.repeated(n)}

    def whole(self, logits: Tensor) -> Tensor:
        """One cell's logits as a metric reads them, with this run's own before the position at which it started.

        [batch, d_vocab] where one position alone is read.
        """
        if self.read is not None:
            rows = torch.arange(len(self.read), device=logits.device)
            if logits.ndim == 3:  # of a run that entered with the input
                logits = logits[rows, (self.read - self.start).clamp(min=0)]
            before = (self.read < self.start).unsqueeze(1)  # in rows that are shorter than others
            return torch.where(before, self.base[rows, self.read], logits) if self.start else logits
        return self._as_given(torch.cat([self.base[:, : self.start], logits], dim=1) if self.start else logits)


def _behind(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_post"


def _tile(x: Tensor, n: int) -> Tensor:
    return x.repeat(n, *[1] * (x.ndim - 1))

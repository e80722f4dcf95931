"""Reading a store: lazily, by name, layer, sample and position; nothing is loaded before it is asked for.

    store = gl.store.open("out")
    gated = store["gated", 1]                  # also a full name, or another tool's name for it
    gated[7]                                   # pos channel: the eighth sample
    gated[7, -1]                               # channel: at its last stored position
    gated[0:16]                                # sample pos channel, where the samples have one length
    for batch in store.loader("blocks.1.mixer.hook_gated", batch_size=1024, shuffle=True): ...
    for x, y in store.with_labels(labels).loader(("gated", 1), batch_size=256): ...

A sample is a row of the harvest (with context=None a document); positions count the sample's tokens from 0, and with
positions="last" or "mask" only some are there. A store under way can be read up to its last committed batch.
"""

from __future__ import annotations

import bisect
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor
from torch.utils.data import DataLoader

from gatedlens.errors import InputError, PointError, StoreError, did_you_mean
from gatedlens.store import manifest
from gatedlens.store.arrow import batch_reader
from gatedlens.store.column import Column
from gatedlens.store.feeding import Activations, Labelled
from gatedlens.store.journal import Entry, entries
from gatedlens.store.layout import Layout
from gatedlens.store.shards import checksum
from gatedlens.store.statistics import Statistics
from gatedlens.store.statisticsfile import read_statistics


def open(path: str | Path) -> Store:
    """`gl.store.open("out")`: the store in a folder."""
    return Store(Path(path).expanduser())


class Store:
    """`len(store)` samples, `store.n_tokens` stored positions; `store[name]`, `store[word, layer]` are Columns."""

    def __init__(self, folder: Path):
        told = manifest.load(folder)
        if told is None:
            if folder.is_file():
                raise StoreError(f"{folder} is a file; a store is a folder.")
            what = "there is no such folder" if not folder.exists() else "it has no manifest.json"
            raise StoreError(f"{folder} is no store: {what}. `gl.store.harvest(..., out={str(folder)!r})` makes one.")
        self.folder = folder
        self.manifest: dict[str, Any] = told
        self.layouts = {layout["name"]: Layout.from_dict(layout) for layout in told["points"]}
        self.batches: list[Entry] = list(entries(folder / "journal.jsonl"))
        self.first_row = [0, *accumulate(entry.rows for entry in self.batches)]
        self.first_token = [0, *accumulate(entry.tokens for entry in self.batches)]
        self._maps: dict[str, Tensor] = {}
        self._readers: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_maps": {},
            "_readers": {},
        }  # mapped files do not travel to the workers of a DataLoader

    def __len__(self) -> int:
        return self.first_row[-1]

    @property
    def n_tokens(self) -> int:
        return self.first_token[-1]

    @property
    def names(self) -> list[str]:
        return list(self.layouts)

    @property
    def is_finished(self) -> bool:
        return self.manifest["finished"] is not None

    @property
    def nbytes(self) -> int:
        return sum(extent.length for entry in self.batches for extent in entry.at)

    def __repr__(self) -> str:
        state = "" if self.is_finished else ", not finished"
        names = ", ".join(self.names[:3]) + (", ..." if len(self.names) > 3 else "")
        return f"Store({self.folder}: {len(self)} samples, {self.n_tokens} tokens of {names}{state})"

    # -- names ---------------------------------------------------------------------------------------------------

    def find(self, key: Any) -> Layout:
        """The point that `key` stands for: a full name, another tool's name for it, or (word, layer[, part])."""
        if isinstance(key, tuple):
            return self._short(*key)
        if key in self.layouts:
            return self.layouts[key]
        aliases = self.manifest["aliases"]
        if key in aliases:
            return self.layouts[aliases[key]]
        raise PointError(
            f"{key!r} is not in {self.folder}.{did_you_mean(str(key), [*self.layouts, *aliases])}{self._held()}"
        )

    def _short(self, word: str, layer: int, part: str | None = None) -> Layout:
        leaf = word if word.startswith("hook_") else f"hook_{word}"
        layers = sorted({int(name.split(".")[1]) for name in self.layouts if name.startswith("blocks.")})
        layer = layer if layer >= 0 or not layers else layers[layer] if -layer <= len(layers) else layer
        stem = f"blocks.{layer}."
        known = {**{name: name for name in self.layouts}, **self.manifest["aliases"]}
        for names in (list(self.layouts), list(known)):  # our own names win
            hits = [name for name in names if name.startswith(stem) and name.rpartition(".")[2] == leaf]
            hits = [name for name in hits if part is None or name[len(stem) :].rpartition(".")[0] == part]
            targets = sorted({known[name] for name in hits})
            if len(targets) == 1:
                return self.layouts[targets[0]]
            if targets:
                raise PointError(f"{(word, layer)} is ambiguous: it may be {', '.join(targets)}.")
        asked = (word, layer) if part is None else (word, layer, part)
        raise PointError(f"{asked} is not in {self.folder}.{self._held()}")

    def _held(self) -> str:
        return f" It holds: {', '.join(self.names[:6])}{', ...' if len(self.names) > 6 else ''}."

    def __contains__(self, key: Any) -> bool:
        try:
            self.find(key)
        except PointError:
            return False
        return True

    def __getitem__(self, key: Any) -> Column:
        if self.manifest["settings"]["reduce"]:
            raise InputError(f"{self.folder} holds statistics and no activations: read `store.statistics[{key!r}]`.")
        return Column(self, self.find(key))

    @property
    def statistics(self) -> Statistics:
        """The statistics of a harvest with `reduce`."""
        reductions = self.manifest["settings"]["reduce"]
        if not reductions:
            raise InputError(f"{self.folder} holds activations and no statistics: harvest with reduce=[...] for these.")
        _, parts = read_statistics(self.folder / "statistics.safetensors")
        if not parts:
            raise StoreError(f"{self.folder} holds no statistics yet, or its file is damaged: run the harvest again.")
        keys = [f"{name}/{reduction}" for name in self.names for reduction in reductions]
        return Statistics({key: parts[key] for key in keys}, self.find)

    # -- samples -------------------------------------------------------------------------------------------------

    def tokens(self, sample: int) -> Int[Tensor, " pos"]:
        """The ids at the stored positions of a sample."""
        return self._counted("token_ids", sample)

    def positions(self, sample: int) -> Int[Tensor, " pos"]:
        """Which positions of a sample are stored."""
        return self._counted("positions", sample)

    def documents(self, sample: int) -> Int[Tensor, " pos"]:
        """The document (a line, a file, a row, an image) that each stored position of a sample is of."""
        return self._counted("documents", sample)

    def _counted(self, name: str, sample: int) -> Tensor:
        batch, row = self.place(sample)
        flat, ends = self.batch_of(name, batch)
        return flat[ends[row] : ends[row + 1]]

    def place(self, sample: int) -> tuple[int, int]:
        """(batch, row in it) of a sample."""
        if not -len(self) <= sample < len(self):
            raise InputError(f"Sample {sample} is out of range: {self.folder} has {len(self)}, 0 to {len(self) - 1}.")
        sample %= len(self)
        batch = bisect.bisect_right(self.first_row, sample) - 1
        return batch, sample - self.first_row[batch]

    def batch_of(self, name: str, batch: int) -> tuple[Shaped[Tensor, "entry ..."], list[int]]:
        """(entries of one batch, where each of its rows begins and the last ends), mapped from the file."""
        layout = self.layouts.get(name)
        if layout is None or layout.stored == "column":
            return self._arrow(batch, name)
        extent = self.batches[batch].at[1 + [x.name for x in self.layouts.values() if x.stored == "tensor"].index(name)]
        raw = self._mapped(f"tensors/{name}-{extent.shard:05}.safetensors")[
            extent.offset : extent.offset + extent.length
        ]
        values = raw.view(layout.dtype).view(-1, *layout.shape)
        if layout.per == "row":
            return values, list(range(len(values) + 1))
        return values, self._arrow(batch, "positions")[1]

    def _arrow(self, batch: int, name: str) -> tuple[Tensor, list[int]]:
        extent = self.batches[batch].at[0]
        path = f"activations/data-{extent.shard:05}.arrow"
        if path not in self._readers:
            self._readers[path] = batch_reader(self._mapped(path))
        return self._readers[path](extent.offset, name, self.layouts.get(name))

    def _mapped(self, name: str) -> Tensor:
        """A file as bytes, mapped."""
        if name not in self._maps:
            path = self.folder / name
            self._maps[name] = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
        return self._maps[name]

    # -- training ------------------------------------------------------------------------------------------------

    def dataset(self, keys: Any) -> Activations:
        """A torch Dataset of the entries at one point, or at a list of points."""
        return Activations(self, keys)

    def loader(self, keys: Any, batch_size: int, shuffle: bool = False, seed: int = 0, **options: Any) -> DataLoader:
        """A torch DataLoader of the entries at one point ([batch, ...]) or at a list of points ({name: [batch, ...]})."""
        return self.dataset(keys).loader(batch_size, shuffle, seed, **options)

    def with_labels(self, labels: Any, per: str = "token") -> Labelled:
        """The store with a label for each entry, for a probe.

        labels: a tensor with one for each stored token, sample or document (`per`), or a function of a sample's token
        ids that gives one for each, or one for all.
        """
        return Labelled(self, labels, per)

    def verify(self) -> list[str]:
        """The files that are not what was written, by the checksums of the manifest (once the store is finished)."""
        if not self.is_finished:
            raise StoreError(f"{self.folder} is not finished: `gl.store.harvest` checks it before it goes on.")
        told = self.manifest["finished"]["files"]
        paths = {file["name"]: self.folder / file["name"] for file in told}
        return [
            file["name"]
            for file in told
            if not paths[file["name"]].exists() or checksum(paths[file["name"]]) != file["crc32"]
        ]

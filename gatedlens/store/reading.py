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

What is read is what was written, or a StoreError names the file: manifest and journal are compared when the store is
opened, the checksum of a batch when it is first read; `verify` reads all there is.
"""

from __future__ import annotations

import bisect
import operator
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor
from torch.utils.data import DataLoader

from gatedlens.address.key import Key
from gatedlens.errors import InputError, PointError, StoreError, did_you_mean
from gatedlens.options import checked
from gatedlens.store.disk import journal, manifest
from gatedlens.store.disk.arrow import Columns, batch_reader
from gatedlens.store.disk.journal import AGAIN, Entry
from gatedlens.store.disk.layout import Layout
from gatedlens.store.disk.mapped import Mapped
from gatedlens.store.disk.shards import HEAD, SafetensorsFormat, fits
from gatedlens.store.disk.statistics_file import read_statistics
from gatedlens.store.loaders import Activations, Labelled
from gatedlens.store.statistics import Statistics, by_name, misfit

# Column: one point of a store, sample by sample; nothing is read before it is asked for.
#
# gated = store["gated", 1]
# gated[7]                                   # pos channel: the eighth sample
# gated[7, -1]                               # channel: at its last stored position
# gated[0:16]                                # sample pos channel, where the samples have one length
# for sample in gated: ...


class Column:
    """One point of a store: `column[sample]`, `column[sample, position]`, `column[a:b]`, `iter(column)`."""

    def __init__(self, store: Any, layout: Layout):
        self.store = store
        self.layout = layout

    @property
    def name(self) -> str:
        return self.layout.name

    def __len__(self) -> int:
        return len(self.store)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[sample] for sample in range(len(self)))

    def __repr__(self) -> str:
        return f"Column({self.name}, {len(self)} samples, {self.layout.axes}, {self.layout.dtype})"

    def __getitem__(self, index: Any) -> Shaped[Tensor, ...]:
        sample, position = index if isinstance(index, tuple) else (index, None)
        if isinstance(sample, slice | list | range | Tensor):
            return self._several(sample, position)
        try:
            sample = operator.index(sample)
        except TypeError as error:
            message = f"{self.name}[{sample!r}]: a sample is a number, a slice or a list of numbers."
            raise InputError(message) from error
        whole = self._sample(sample)
        return whole if position is None else whole[self._at(sample, position)]

    def _sample(self, sample: int) -> Tensor:
        batch, row = self.store.place(sample)
        values, ends = self.store.batch_of(self.name, batch)
        return (values[row] if self.layout.per == "row" else values[ends[row] : ends[row + 1]]).clone()

    def _several(self, samples: Any, position: Any) -> Tensor:
        chosen = range(len(self))[samples] if isinstance(samples, slice) else [int(i) for i in samples]
        found = [self[i] if position is None else self[i, position] for i in chosen]
        shapes = {tuple(x.shape) for x in found}
        if len(shapes) != 1:
            raise InputError(
                f"{self.name}[{samples}]: the samples differ in length ({', '.join(map(str, sorted(shapes)[:3]))}): iterate "
                "over them, or read one position of each."
                if shapes
                else f"{self.name}[{samples}] picks no sample: there are {len(self)}."
            )
        return torch.stack(found)

    def _at(self, sample: int, position: Any) -> Any:
        """Where a position (or several) of a sample is among its stored ones; negative ones count these from the end.

        A slice is of the row's positions, too: the stored ones among them.
        """
        if self.layout.per == "row":
            raise InputError(f"{self.name} ({self.layout.axes}) has no positions: leave {position!r} out.")
        if isinstance(position, list | Tensor | range):
            return [self._at(sample, int(one)) for one in position]
        stored = self.store.positions(sample).tolist()
        if isinstance(position, slice):
            asked = set(range(stored[-1] + 1)[position])
            return [place for place, one in enumerate(stored) if one in asked]
        if position < 0 and -position <= len(stored):
            return len(stored) + position
        if position not in stored:
            raise InputError(
                f"Position {position} of sample {sample} is not stored: it has {len(stored)}, {stored[0]} to {stored[-1]}."
            )
        return stored.index(position)


STATISTICS = "statistics.safetensors"
KEPT = ("activations", "tensors", STATISTICS)  # what a batch is committed to


def _file(name: str | None, shard: int) -> str:
    """The file of a point that is a tensor; of None, of all that are columns."""
    return f"activations/data-{shard:05}.arrow" if name is None else f"tensors/{name}-{shard:05}.safetensors"


@checked
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
        self.batches: list[Entry] = journal.read(folder / "journal.jsonl")
        self.first_row = [0, *accumulate(entry.rows for entry in self.batches)]
        self.first_token = [0, *accumulate(entry.tokens for entry in self.batches)]
        self._streams = [None, *(name for name, layout in self.layouts.items() if layout.stored == "tensor")]
        self._files = Mapped(folder)
        self._readers: dict[str, Any] = {}
        self._compare()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}}  # mapped files do not travel to the workers of a DataLoader

    def _compare(self) -> None:
        """StoreError where the manifest and the journal are at odds."""
        path = self.folder / "journal.jsonl"
        streams = 0 if self.manifest["settings"]["reduce"] else len(self._streams)
        for entry in self.batches:
            if len(entry.at) != streams:
                raise StoreError(
                    f"{path} is damaged: line {entry.batch + 1}: at has {len(entry.at)} places, expected {streams}, one for "
                    f"each kind of file. {AGAIN}"
                )
        finished = self.manifest["finished"]
        if finished is None:
            held = sorted(one.name for one in self.folder.iterdir() if one.name in KEPT)
            if held and not path.exists():
                raise StoreError(f"{path} is missing, and {self.folder} holds {', '.join(held)}. {AGAIN}")
            return
        counted = {"batches": len(self.batches)}
        counted |= {key: sum(getattr(one, key) for one in self.batches) for key in ("rows", "tokens", "read")}
        for key, count in counted.items():
            if finished[key] != count:
                raise StoreError(
                    f"{self.folder} is damaged: finished.{key} is {finished[key]} in manifest.json, and journal.jsonl "
                    f"{'has' if path.exists() else 'is missing, with'} {count}. {AGAIN}"
                )
        told, names = sorted(card["name"] for card in finished["files"]), sorted(self._names())
        if told != names:
            raise StoreError(
                f"{self.folder} is damaged: finished.files in manifest.json names {', '.join(told) or 'none'}, and the batches "
                f"of journal.jsonl lie in {', '.join(names) or 'none'}."
            )
        for card in finished.get("besides", []):
            if card["name"] == path.name and not fits(card, self.folder):
                raise StoreError(
                    f"{path} is damaged: its checksum is not {card['crc32']}, as in manifest.json. {AGAIN}"
                )

    def _names(self) -> set[str]:
        """The files that hold what is committed."""
        if self.manifest["settings"]["reduce"]:
            return {STATISTICS}
        return {_file(name, entry.at[at].shard) for entry in self.batches for at, name in enumerate(self._streams)}

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

    def find(self, key: Key) -> Layout:
        """`store.find(("gated", 1))`: the point that `key` stands for: a full name, another tool's name for it, or (word,
        layer[, part]).
        """
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
        if not self.batches:
            raise StoreError(f"{self.folder} holds no statistics yet: run the harvest again.")
        path, finished = self.folder / STATISTICS, self.manifest["finished"]
        held = read_statistics(path)
        if held.batches not in (
            len(self.batches),
            len(self.batches) - (finished is None),
        ):  # the journal's line comes first
            raise StoreError(
                f"{path} is damaged: it is of {held.batches} batches, expected {len(self.batches)}. {AGAIN}"
            )
        if finished is not None and not fits(finished["files"][0], self.folder):
            raise StoreError(
                f"{path} is damaged: its checksum is not {finished['files'][0]['crc32']}, as in manifest.json."
            )
        said = misfit(
            held.parts, {(name, by_name(one)): layout for name, layout in self.layouts.items() for one in reductions}
        )
        if said:
            raise StoreError(f"{path} is damaged: {said}. {AGAIN}")
        order = {name: number for number, name in enumerate(self.layouts)}
        parts = sorted(held.parts.items(), key=lambda item: order[item[0].partition("/")[0]])
        return Statistics(dict(parts), self.find)

    # -- samples -------------------------------------------------------------------------------------------------

    @checked
    def tokens(self, sample: int) -> Int[Tensor, " pos"]:
        """`store.tokens(7)`: [pos], The ids at the stored positions of a sample."""
        return self._counted("token_ids", sample)

    @checked
    def positions(self, sample: int) -> Int[Tensor, " pos"]:
        """`store.positions(7)`: [pos], Which positions of a sample are stored."""
        return self._counted("positions", sample)

    @checked
    def documents(self, sample: int) -> Int[Tensor, " pos"]:
        """`store.documents(7)`: [pos], The document (a line, a file, a row, an image) that each stored position of a
        sample is of.
        """
        return self._counted("documents", sample)

    def _counted(self, name: str, sample: int) -> Tensor:
        batch, row = self.place(sample)
        flat, ends = self.batch_of(name, batch)
        return flat[ends[row] : ends[row + 1]]

    @checked
    def place(self, sample: int) -> tuple[int, int]:
        """`store.place(7)`: (batch, row in it) of a sample."""
        if not -len(self) <= sample < len(self):
            raise InputError(f"Sample {sample} is out of range: {self.folder} has {len(self)}, 0 to {len(self) - 1}.")
        sample %= len(self)
        batch = bisect.bisect_right(self.first_row, sample) - 1
        return batch, sample - self.first_row[batch]

    @checked
    def batch_of(self, name: str, batch: int) -> tuple[Shaped[Tensor, "entry ..."], list[int]]:
        """`entries, ends = store.batch_of("blocks.1.mixer.hook_gated", 0)`: (entries of one batch, where each of its rows
        begins and the last ends), mapped from the file.
        """
        layout = self.layouts.get(name)
        if layout is None or layout.stored == "column":
            return self._arrow(batch, name)
        entry = self.batches[batch]
        at = self._streams.index(name)
        file = _file(name, entry.at[at].shard)
        raw = self._files.batch(file, entry.at[at], batch)
        self._check_head(file, layout)
        n = entry.tokens if layout.per == "token" else entry.rows
        if len(raw) != n * layout.bytes or raw.storage_offset() % layout.dtype.itemsize:
            raise StoreError(
                f"{self.folder} is damaged: batch {batch} of {file} has {len(raw)} bytes at {entry.at[at].offset} in "
                f"journal.jsonl, expected {n} times {layout.bytes}, as shape and dtype in manifest.json say."
            )
        values = raw.view(layout.dtype).view(n, *layout.shape)
        if layout.per == "row":
            return values, list(range(n + 1))
        return values, self._arrow(batch, "positions")[1]

    def _check_head(self, file: str, layout: Layout) -> None:
        """StoreError if a shard's own head tells of another point, shape or dtype than the manifest."""
        if file in self._readers:
            return
        format, whole = SafetensorsFormat(layout), self._files[file]
        heads = {format.head(0), format.head(max(0, len(whole) - HEAD))}  # of one under way, and of one that is closed
        if bytes(whole[:HEAD].numpy()) not in heads:
            raise StoreError(
                f"{self.folder / file} is damaged: its head is not that of {layout.name}, {layout.dtype} {list(layout.shape)} "
                f"{len(whole) - HEAD} bytes long, as in manifest.json. {AGAIN}"
            )
        self._readers[file] = None

    def _arrow(self, batch: int, name: str) -> tuple[Tensor, list[int]]:
        entry = self.batches[batch]
        file = _file(None, entry.at[0].shard)
        layout = self.layouts.get(name)
        try:
            if file not in self._readers:
                schema = Columns.of(self.manifest["settings"], list(self.layouts.values())).schema
                self._readers[file] = batch_reader(self._files[file], schema)
            self._files.batch(file, entry.at[0], batch)
            values, ends = self._readers[file](entry.at[0].offset, name, layout)
        except (ValueError, RuntimeError) as error:
            raise StoreError(f"{self.folder / file} is damaged: {error}. {AGAIN}") from error
        n = entry.rows if layout is not None and layout.per == "row" else entry.tokens
        if len(ends) != entry.rows + 1 or len(values) != n:
            raise StoreError(
                f"{self.folder} is damaged: batch {batch} of {file} has {len(ends) - 1} rows and {len(values)} entries of "
                f"{name}, expected {entry.rows} and {n}, as in line {batch + 1} of journal.jsonl."
            )
        return values, ends

    # -- training ------------------------------------------------------------------------------------------------

    def dataset(self, keys: Key | Sequence[Key]) -> Activations:
        """`store.dataset(("gated", 1))`: a torch Dataset of the entries at one point, or at a list of points."""
        return Activations(self, keys)

    @checked
    def loader(
        self, keys: Key | Sequence[Key], batch_size: int, shuffle: bool = False, seed: int = 0, **options: Any
    ) -> DataLoader:
        """`for x in store.loader(("gated", 1), batch_size=1024, shuffle=True): ...`: a torch DataLoader of the entries at
        one point ([batch, ...]) or at a list of points ({name: [batch, ...]}).
        """
        return self.dataset(keys).loader(batch_size, shuffle, seed, **options)

    @checked
    def with_labels(self, labels: Tensor | Callable[[Tensor], Any], per: str = "token") -> Labelled:
        """`store.with_labels(labels)`: the store with a label for each entry, for a probe.

        labels: a tensor with one for each stored token, sample or document (`per`), or a function of a sample's token
        ids that gives one for each, or one for all.
        """
        return Labelled(self, labels, per)

    def verify(self) -> list[str]:
        """`store.verify()`: the files that are not what was written, by the checksums of the manifest (once the store is
        finished).
        """
        finished = self.manifest["finished"]
        if finished is None:
            raise StoreError(f"{self.folder} is not finished: `gl.store.harvest` checks it before it goes on.")
        return [one["name"] for one in [*finished["files"], *finished.get("besides", [])] if not fits(one, self.folder)]

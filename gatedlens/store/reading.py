"""Reading a store: lazily, by name, layer, sample and position; nothing is loaded before it is asked for.

    store = gl.store.open("out")
    gated = store["gated", 1]                  # also a full name, or another tool's name for it
    gated[7]                                   # pos channel: the eighth sample
    gated[7, -1]                               # channel: at its last stored position
    gated.select(head=2)[7]                    # pos value: one head of it
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
from itertools import accumulate
from pathlib import Path
from typing import Any

from jaxtyping import Int, Shaped
from torch import Tensor
from torch.utils.data import DataLoader

from gatedlens.address.entries import Index
from gatedlens.address.key import Key
from gatedlens.errors import InputError, PointError, StoreError, did_you_mean, in_bytes
from gatedlens.markup import card, table
from gatedlens.options import checked, is_whole
from gatedlens.store.column import Column
from gatedlens.store.disk import journal, manifest
from gatedlens.store.disk.arrow import Columns, batch_reader
from gatedlens.store.disk.journal import AGAIN, Entry
from gatedlens.store.disk.layout import Layout
from gatedlens.store.disk.mapped import Mapped
from gatedlens.store.disk.shards import HEAD, SafetensorsFormat, fits
from gatedlens.store.disk.statistics_file import read_statistics
from gatedlens.store.loaders import Activations, Keys, Labelled, Labels
from gatedlens.store.statistics import Statistics, by_name, misfit

STATISTICS = "statistics.safetensors"
KEPT = ("activations", "tensors", STATISTICS)  # what a batch is committed to


def _file(name: str | None, shard: int) -> str:
    """The file of a point that is a tensor; of None, of all that are columns."""
    return f"activations/data-{shard:05}.arrow" if name is None else f"tensors/{name}-{shard:05}.safetensors"


@checked
def open(path: str | Path) -> Store:
    """`gl.store.open("out")`: the store in a folder; one whose harvest is under way is read up to its last committed batch.

    StoreError if the folder is no store, or its manifest and journal are damaged or at odds.
    """
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
        for besides in finished.get("besides", []):
            if besides["name"] == path.name and not fits(besides, self.folder):
                raise StoreError(
                    f"{path} is damaged: its checksum is not {besides['crc32']}, as in manifest.json. {AGAIN}"
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

    def _repr_html_(self) -> str:
        rows = [
            (name, layout.per, list(layout.shape), str(layout.dtype).removeprefix("torch."))
            for name, layout in self.layouts.items()
        ]
        facts = {"samples": f"{len(self):,}", "tokens": f"{self.n_tokens:,}", "": in_bytes(self.nbytes)}
        if not self.is_finished:
            facts["not"] = "finished"
        return card(f"Store: {self.folder}", facts, table(["point", "one a", "shape", "dtype"], rows))

    # -- names ---------------------------------------------------------------------------------------------------

    def find(self, key: Key) -> Layout:
        """`store.find(("gated", 1))`: the point that `key` stands for, as a Layout: its name, axes, shape and dtype.

        key: a full name, another tool's name for it, or (word, layer[, part]). PointError for what is no such key, is not in
        the store, or fits several points.
        """
        if isinstance(key, tuple) and self._is_short(key):
            return self._short(*key)
        if not isinstance(key, str):
            raise PointError(f"{key!r} is no point: give its name, or (word, layer).{self._held()}")
        if key in self.layouts:
            return self.layouts[key]
        aliases = self.manifest["aliases"]
        if key in aliases:
            return self.layouts[aliases[key]]
        raise PointError(
            f"{key!r} is not in {self.folder}.{did_you_mean(key, [*self.layouts, *aliases])}{self._held()}"
        )

    @staticmethod
    def _is_short(key: tuple[Any, ...]) -> bool:
        """Whether it is (word, layer) or (word, layer, part)."""
        return (
            len(key) in (2, 3)
            and isinstance(key[0], str)
            and is_whole(key[1])
            and all(part is None or isinstance(part, str) for part in key[2:])
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

    def __getitem__(self, key: Key) -> Column:
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
        """`store.tokens(7)`: the ids at the stored positions of a sample, [pos]. InputError for a sample out of range."""
        return self._counted("token_ids", sample)

    @checked
    def positions(self, sample: int) -> Int[Tensor, " pos"]:
        """`store.positions(7)`: which positions of a sample are stored, [pos]. InputError for a sample out of range."""
        return self._counted("positions", sample)

    @checked
    def documents(self, sample: int) -> Int[Tensor, " pos"]:
        """`store.documents(7)`: the document that each stored position of a sample is of, [pos], by its number.

        A document is a line, a file, a row or an image of the corpus. InputError for a sample out of range.
        """
        return self._counted("documents", sample)

    def _counted(self, name: str, sample: int) -> Tensor:
        batch, row = self.place(sample)
        flat, ends = self.batch_of(name, batch)
        return flat[ends[row] : ends[row + 1]]

    @checked
    def place(self, sample: int) -> tuple[int, int]:
        """`batch, row = store.place(7)`: the batch of the harvest that a sample is in, and its row there.

        Negative samples count from the end. InputError for a sample out of range.
        """
        if not -len(self) <= sample < len(self):
            raise InputError(f"Sample {sample} is out of range: {self.folder} has {len(self)}, 0 to {len(self) - 1}.")
        sample %= len(self)
        batch = bisect.bisect_right(self.first_row, sample) - 1
        return batch, sample - self.first_row[batch]

    @checked
    def batch_of(self, name: str, batch: int) -> tuple[Shaped[Tensor, "entry ..."], list[int]]:
        """`entries, ends = store.batch_of("blocks.1.mixer.hook_gated", 0)`: one batch of the harvest, mapped from its file.

        The entries [entry, ...] are one a stored token (of a point without positions, one a row); `ends` says where each row
        begins among them, and where the last ends. StoreError if the file is not what was written.
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

    def dataset(self, keys: Keys, **index: Index) -> Activations:
        """`store.dataset(("gated", 1))`: a torch Dataset of the entries at one point, or of {name: entry} at a list of them.

        `store.dataset(("gated", 1), head=2).loader(batch_size=1024)`: of these entries alone, as in `Column.select`.

        An entry is a stored token; of a point without positions, a sample. PointError for a point that the store lacks;
        InputError for an empty list, and for points with and without positions side by side.
        """
        return Activations(self, keys, index=index)

    @checked
    def loader(self, keys: Keys, batch_size: int, shuffle: bool = False, seed: int = 0, **options: Any) -> DataLoader:
        """`for x in store.loader(("gated", 1), batch_size=1024, shuffle=True): ...`: a torch DataLoader.

        It gives the entries at one point, [batch, ...], or at a list of points, {name: [batch, ...]}. seed: of the order, if
        it is shuffled. options: torch's (num_workers, drop_last, ...). Errors as in `dataset`, and InputError for a
        batch_size below 1.
        """
        return self.dataset(keys).loader(batch_size, shuffle, seed, **options)

    @checked
    def with_labels(self, labels: Labels, per: str = "token") -> Labelled:
        """`store.with_labels(labels).loader(("gated", 1), batch_size=256)`: the store with a label for each entry, for a probe.

        labels: a tensor with one for each stored token, sample or document (`per`), or a function of a sample's token
        ids that gives one for each, or one for all. InputError for another `per`, and for as many labels as do not fit.
        """
        return Labelled(self, labels, per)

    def verify(self) -> list[str]:
        """`assert store.verify() == []`: the names of the files that are not what was written.

        Every file is read whole, and its checksum compared with the manifest's. StoreError if the store is not finished.
        """
        finished = self.manifest["finished"]
        if finished is None:
            raise StoreError(f"{self.folder} is not finished: `gl.store.harvest` checks it before it goes on.")
        return [one["name"] for one in [*finished["files"], *finished.get("besides", [])] if not fits(one, self.folder)]

"""Feeding training: the stored activations as a torch Dataset of tokens (or samples), and as a DataLoader.

    for x in store.loader(("gated", 1), batch_size=1024, shuffle=True): ...           # x: batch channel
    for x, y in store.with_labels(labels).loader(("gated", 1), batch_size=256): ...
    for both in store.loader([("gated", 0), ("gated", 1)], batch_size=256): ...        # {name: batch channel}

An entry is a stored token (of a point without positions, a sample). Entries are gathered straight from the mapped files.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gatedlens.address.entries import Index
from gatedlens.address.key import Key
from gatedlens.errors import InputError
from gatedlens.options import checked, tensor_of

PER = ("token", "sample", "document")

# What loaders take, and labels. For editors: other kinds get the errors of the functions below.
if TYPE_CHECKING:
    Keys: TypeAlias = Key | list[Key] | list[str] | list[tuple[str, int]]
    Labels: TypeAlias = Tensor | Sequence[float] | Callable[[Tensor], Any]
else:
    Keys = Labels = Any


class Activations(Dataset):
    """`data[i]`: the entry `i` at one point, or {name: entry} at several; with `labels`, (entry, label)."""

    def __init__(self, store: Any, keys: Keys, labels: Tensor | None = None, index: Mapping[str, Index] | None = None):
        self.store = store
        self.index = dict(index or {})
        self.single = not isinstance(keys, list)
        self.layouts = [store.find(key) for key in ([keys] if self.single else keys)]
        if not self.layouts:
            raise InputError("The list of points is empty: name at least one.")
        kinds = {layout.per for layout in self.layouts}
        if len(kinds) > 1:
            raise InputError(
                f"{', '.join(layout.name for layout in self.layouts)} cannot be read side by side: some have a position "
                "and others do not."
            )
        self.first = store.first_token if kinds == {"token"} else store.first_row
        self.labels = labels
        if labels is not None and len(labels) != len(self):
            raise InputError(f"There are {len(labels)} labels for {len(self)} entries of {self.layouts[0].name}.")

    def __len__(self) -> int:
        return self.first[-1]

    @checked
    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Entry {index} is out of range: there are {len(self)}.")
        return _map(lambda x: x[0], self.gather([index % len(self)]))

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """What a DataLoader asks for: one batch, gathered at once."""
        return [self.gather(indices)]

    def gather(self, indices: Sequence[int]) -> Any:
        """The entries at some places, stacked."""
        found = [self._gathered(layout, indices) for layout in self.layouts]
        values: Any = found[0] if self.single else {x.name: f for x, f in zip(self.layouts, found, strict=True)}
        return values if self.labels is None else (values, self.labels[list(indices)])

    def _gathered(self, layout: Any, indices: Sequence[int]) -> Shaped[Tensor, "entry ..."]:
        """Batch of the harvest by batch, each opened once."""
        out = torch.empty(len(indices), *layout.shape, dtype=layout.dtype)
        places: dict[int, tuple[list[int], list[int]]] = {}
        for place, index in enumerate(indices):
            batch = bisect.bisect_right(self.first, index) - 1
            to, at = places.setdefault(batch, ([], []))
            to.append(place)
            at.append(index - self.first[batch])
        for batch, (to, at) in sorted(places.items()):
            out[to] = self.store.batch_of(layout.name, batch)[0][at]
        picked: Tensor = layout.picked(out, self.index, ("entry",))
        return picked

    @checked
    def loader(self, batch_size: int, shuffle: bool = False, seed: int = 0, **options: Any) -> DataLoader:
        """`data.loader(batch_size=1024, shuffle=True)`: a DataLoader of stacked batches.

        seed: of the order, if it is shuffled. options: torch's (num_workers, drop_last, ...). InputError for a batch_size
        below 1.
        """
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size}: give at least 1.")
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(
            self, batch_size, shuffle=shuffle, collate_fn=_only, generator=generator if shuffle else None, **options
        )


class Labelled:
    """A store and a label for each entry: `store.with_labels(labels, per="document").loader(name, batch_size)`."""

    def __init__(self, store: Any, labels: Labels, per: str = "token"):
        if per not in PER:
            raise InputError(f"per={per!r}: a label belongs to a {', a '.join(PER)}.")
        self.store = store
        self.per = per
        self.labels = labels if callable(labels) else tensor_of(labels, "labels")
        if isinstance(self.labels, Tensor) and self.labels.ndim == 0:
            raise InputError(f"labels is one number: give one for each {per}.")

    def dataset(self, keys: Keys) -> Activations:
        """`labelled.dataset(("gated", 1))`: a torch Dataset of (entry, label), or of ({name: entry}, label)."""
        plain = Activations(self.store, keys)
        by_row = plain.layouts[0].per == "row"
        labels = torch.cat([self._of(sample, by_row) for sample in range(len(self.store))])
        return Activations(self.store, keys, labels)

    @checked
    def loader(self, keys: Keys, batch_size: int, shuffle: bool = False, seed: int = 0, **options: Any) -> DataLoader:
        """`labelled.loader(("gated", 1), batch_size=256)`: batches of (activations, labels); options as in `Store.loader`."""
        return self.dataset(keys).loader(batch_size, shuffle, seed, **options)

    def _of(self, sample: int, by_row: bool) -> Tensor:
        """The labels of a sample's entries."""
        n = 1 if by_row else len(self.store.positions(sample))
        if callable(self.labels):
            found = torch.as_tensor(self.labels(self.store.tokens(sample)))
            found = found.expand(n) if found.ndim == 0 else found
        elif self.per == "sample":
            found = self._at(torch.tensor([sample])).expand(n)
        elif self.per == "document":
            found = self._at(self.store.documents(sample)[:n])
        else:
            batch, row = self.store.place(sample)
            begin = self.store.first_token[batch] + self.store.batch_of("positions", batch)[1][row]
            found = self._at(torch.arange(begin, begin + n))
        if len(found) != n:
            raise InputError(f"The labels of sample {sample} have shape {list(found.shape)}; it has {n} entries.")
        return found

    def _at(self, index: Tensor) -> Tensor:
        """The labels at some places, where `labels` is a tensor."""
        assert isinstance(self.labels, Tensor)
        total = {"token": self.store.n_tokens, "sample": len(self.store)}.get(self.per)
        if (total is not None and len(self.labels) != total) or int(index.max()) >= len(self.labels):
            raise InputError(
                f"There are {len(self.labels)} labels, one per {self.per}; the store has {len(self.store)} samples with "
                f"{self.store.n_tokens} stored tokens, of documents up to number {int(index.max())}."
            )
        return self.labels[index.long()]


def _only(batches: list[Any]) -> Any:
    """A batch comes out of `gather` stacked."""
    return batches[0]


def _map(function: Callable[[Tensor], Tensor], values: Any) -> Any:
    if isinstance(values, tuple):
        return tuple(_map(function, value) for value in values)
    if isinstance(values, dict):
        return {name: _map(function, value) for name, value in values.items()}
    return function(values)

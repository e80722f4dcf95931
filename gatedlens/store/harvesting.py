"""Harvest: activations of a whole corpus into a folder that can be read lazily, gone on with, and trusted.

    store = gl.store.harvest(model, "corpus.jsonl", ["blocks.*.mixer.hook_gated"], "store", batch_size=16, context=128)
    store["gated", 1][0]                       # pos channel, of the first row

    store/  manifest.json   activations/ (a `datasets` folder)   tensors/ (safetensors)   journal.jsonl   lock

Run the same call again after any interruption and it goes on where it stopped; batches that are damaged on the disk are
named and done again. The stored values are those of `run_with_cache` on the same batches, to the bit.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gatedlens.address.entries import Index, Where
from gatedlens.address.names import NamesFilter
from gatedlens.errors import InputError, StoreError, did_you_mean
from gatedlens.model.base import HookedModel
from gatedlens.model.config import dtype_name, dtype_of
from gatedlens.options import checked
from gatedlens.store.corpus.batches import Batches, Rows
from gatedlens.store.corpus.sources import Documents, read
from gatedlens.store.disk import manifest
from gatedlens.store.disk.arrow import Columns
from gatedlens.store.disk.files import explained, locked
from gatedlens.store.disk.layout import Layout, aliases, chosen_of, resolve
from gatedlens.store.disk.shards import card, checksum, fits
from gatedlens.store.disk.sinks import Sink, StatisticsSink, TensorSink
from gatedlens.store.engines import Engine, EngineLike, Reduce, Work, activations
from gatedlens.store.engines import engine as engine_of
from gatedlens.store.reading import Store
from gatedlens.store.reading import open as open_store
from gatedlens.store.sizes import Estimate, estimate_of
from gatedlens.store.statistics import Reduction, Reductions, chosen

log = logging.getLogger(__name__)
SHARD_BYTES = 2**30


@checked
def harvest(
    model: HookedModel,
    dataset: Documents,
    names: NamesFilter,
    out: str | Path,
    batch_size: int = 8,
    max_tokens: int | None = None,
    positions: str = "all",
    dtype: torch.dtype | str | None = None,
    reduce: Reductions = None,
    *,
    context: int | None = None,
    field: str | None = None,
    engine: EngineLike = "local",
    workers: int = 2,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
    **index: Index,
) -> Store:
    """`gl.store.harvest(model, "corpus.jsonl", "blocks.*.mixer.hook_gated", "out", context=128)`: the store in `out`.

    dataset: a JSONL file, a file or a folder of texts or images, a `datasets` folder or Dataset, token ids [row, pos], or
    any iterable of texts, ids, records or images; see `sources.py`. names: as in `run_with_cache`. context: rows of that
    many tokens, documents one behind the other; None: a row is a document. max_tokens: of the corpus. positions: "all",
    the "last" of each row, or those that the corpus marks ("mask"). dtype: to store (None: as computed; a column in
    bfloat16 is stored as float32, which holds it exactly). reduce: statistics instead of tensors: "mean", "variance",
    "covariance", "second_moment", "kurtosis", "max", "sample", or a list of them. field: which field of a record holds
    the text or ids. engine: "local", or "ray" with so many `workers`. shard_bytes: the size of one file.
    index: some entries of the points by axis, head=[0, 3] say; the others are not stored.

    PointError for a point that the model lacks, or an axis that a point lacks, InputError for a corpus or an option that
    cannot be read, TooLargeError if the disk lacks room, StoreError if the folder is in use, or holds another harvest.
    """
    kept, reductions = dtype_of(dtype), chosen(reduce)
    if not isinstance(shard_bytes, int) or shard_bytes < 1:
        raise InputError(f"shard_bytes={shard_bytes!r}: it is a number of bytes, at least 1.")
    batches = Batches(read(dataset, model, field), model, batch_size, context, max_tokens, positions)
    layouts = plan(batches, names, kept, index)
    folder = Path(out).expanduser()
    if "\0" in str(folder):
        raise StoreError(f"{str(folder)!r} is no name of a folder: it holds a null character.")
    settings = {
        "batch_size": batch_size,
        "context": context,
        "max_tokens": max_tokens,
        "positions": positions,
        "dtype": None if kept is None else dtype_name(kept),
        "reduce": [reduction.name for reduction in reductions] or None,
        "field": field,
        "shard_bytes": shard_bytes,
        "length": _kept_length(batches),
        "text": batches.corpus.is_text,
    }
    known = aliases(model, [layout.name for layout in layouts])
    told = manifest.compose(model, batches.corpus.described, settings, layouts, known)
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder} is a file; a store is a folder: give another name.")
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        old = manifest.load(folder)
        if old is None:
            _refuse_strangers(folder)
        else:
            manifest.check_same(folder, old, told)
            if old["packages"] != told["packages"]:
                log.warning("%s was begun with %s; this is %s.", folder, old["packages"], told["packages"])
        size = estimate_of(batches, layouts, reductions, folder)
        size.check(folder, _written(folder))
        log.info("%s: %s", folder, size)
        if old is None:
            with explained(folder):
                manifest.save(folder, told)
        sink = _sink(folder, told, layouts, reductions)
        try:
            sink.verify()
            for path, count in _damage(sink).items():
                log.warning("%s is damaged: %d batches of it are done again.", path, count)
            if not _is_whole(sink, old):
                _run(sink, batches, layouts, reductions, engine_of(engine, workers), size, progress)
                _finish(folder, told, sink, batches)
        finally:
            sink.close()
    return open_store(folder)


@checked
def estimate(
    model: HookedModel,
    dataset: Documents,
    names: NamesFilter,
    out: str | Path = ".",
    batch_size: int = 8,
    max_tokens: int | None = None,
    positions: str = "all",
    dtype: torch.dtype | str | None = None,
    reduce: Reductions = None,
    *,
    context: int | None = None,
    field: str | None = None,
    **index: Index,
) -> Estimate:
    """`gl.store.estimate(model, "corpus.jsonl", "blocks.*.mixer.hook_gated", context=128)`: how large a harvest would be.

    The Estimate says how many tokens and bytes the same call of `harvest` would take, and what the disk of `out` has. The
    model reads two tokens (or one image). Errors as those of `harvest`; a lack of room is none here.
    """
    batches = Batches(read(dataset, model, field), model, batch_size, context, max_tokens, positions)
    layouts = plan(batches, names, dtype_of(dtype), index)
    return estimate_of(batches, layouts, chosen(reduce), Path(out).expanduser())


# -- the steps of a harvest -----------------------------------------------------------------------------------------


def plan(
    batches: Batches, names: NamesFilter, dtype: torch.dtype | None, index: Mapping[str, Index] | None = None
) -> list[Layout]:
    """How each point that was asked for will lie in the store, in firing order, learnt from a run on two tokens.

    PointError if a point does not fire, or lacks an axis of `index`; InputError if there is nothing to run.
    """
    wanted, model = resolve(batches.model, names), batches.model
    where = _where(model, wanted, index or {})
    first = next(iter(batches), None)
    if first is None:
        raise InputError(_nothing(batches))
    length = 2 if first.is_text else None
    some = Rows(first.value[:1, :length], None, first.keep[:1, :length], first.documents[:1, :length])
    with torch.no_grad():
        fired = activations(model, some, wanted)
    layouts = []
    for name in wanted:
        point, sizes = model.names.points[name], model.cfg.sizes
        own, example, kept, known = chosen_of(point, name, fired[name], where.at(name), sizes)
        layout = Layout.of(own, name, example, dtype, batches.length)
        layouts.append(replace(layout, kept=kept, sizes=known))
    return layouts


def _where(model: HookedModel, wanted: list[str], index: Mapping[str, Index]) -> Where:
    """Which entries are harvested, checked; an axis that nothing has is most likely a misspelt option."""
    options = [*inspect.signature(harvest).parameters][:-1]
    for axis in index:
        if axis in ("batch", "pos"):
            raise InputError(
                f"{axis}={index[axis]!r}: which rows and positions are kept is said by the corpus and positions=."
            )
        if not any(point.reaches(axis, model.cfg.sizes) for point in model.names.points.values()):
            raise InputError(
                f"harvest() has no option {axis!r}, and no point of {model.cfg.model_name} such an axis."
                f"{did_you_mean(axis, options)}"
            )
    where = Where(tuple(wanted), index)
    if index:
        where.points(model)
    return where


def _nothing(batches: Batches) -> str:
    if batches.rest:
        return (
            f"The whole corpus has {batches.rest} tokens, and context={batches.context}: it does not fill one row. Give a "
            "smaller context, or none (a row is then a document)."
        )
    return "The corpus holds no document that is not empty (or marks none): there is nothing to harvest."


def _kept_length(batches: Batches) -> int | None:
    """How many positions of every row are kept, where that is one number."""
    return {"all": batches.length, "last": 1, "mask": None}[batches.positions]


def _refuse_strangers(folder: Path) -> None:
    """A folder without a manifest must be empty: nothing of somebody else's is overwritten."""
    found = sorted(path.name for path in folder.iterdir() if path.name not in ("lock", "manifest.json.tmp"))
    if found:
        raise StoreError(f"{folder} is no store and not empty (it holds {', '.join(found[:4])}): use another folder.")


def _written(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _sink(folder: Path, told: dict[str, Any], layouts: list[Layout], reductions: tuple[Reduction, ...]) -> Sink:
    if reductions:
        return StatisticsSink(folder, reductions, manifest.identity(told))
    return TensorSink(folder, Columns.of(told["settings"], layouts), layouts, told["settings"]["shard_bytes"])


def _is_whole(sink: Sink, old: dict[str, Any] | None) -> bool:
    """Whether nothing is left to do."""
    if old is None or old["finished"] is None or sink.damaged:
        return False
    finished = old["finished"]
    bad = [one["name"] for one in finished["besides"] if not fits(one, sink.folder)]
    if finished["batches"] == sink.done and sink.is_sealed() and not bad:
        return True
    log.warning(
        "%s is damaged (%s): %d of its %d batches are left.",
        sink.folder, ", ".join(bad) or "the end of a file", sink.done, finished["batches"],
    )  # fmt: skip
    return False


def _damage(sink: Sink) -> dict[str, int]:
    """How many batches are damaged in each file."""
    found: dict[str, int] = {}
    for path in sink.damaged.values():
        found[path] = found.get(path, 0) + 1
    return found


def _run(
    sink: Sink,
    batches: Batches,
    layouts: list[Layout],
    reductions: tuple[Reduction, ...],
    engine: Engine,
    size: Estimate,
    progress: bool,
) -> None:
    """Do every batch that is not done; whatever stops it, the files are left whole."""
    batches.corpus.begin()
    sink.begin()
    work = Work(batches.model, tuple(layouts))
    job = Reduce(work, reductions) if reductions else work
    bar = tqdm(
        total=size.tokens,
        initial=sink.tokens,
        unit=" tokens",
        unit_scale=True,
        desc=str(sink.folder),
        disable=not progress,
    )
    with bar:
        try:
            for rows, tensors in engine(job, _wanted(sink, batches)):
                fresh = rows.index >= sink.done
                sink.commit(rows, tensors)
                bar.update(rows.read if fresh else 0)
        except BaseException:
            with suppress(StoreError):  # the disk may be full: what is committed is safe without
                sink.seal()
            raise
        sink.seal()
        if sink.damaged:
            raise StoreError(f"{sink.folder}: the corpus ends before the damaged batch {min(sink.damaged)}.")


def _wanted(sink: Sink, batches: Batches) -> Iterator[Rows]:
    return (rows for rows in batches if sink.wants(rows))


def _finish(folder: Path, told: dict[str, Any], sink: Sink, batches: Batches) -> None:
    entries = sink.journal.entries
    for note in batches.notes:
        log.warning("%s: %s.", folder, note)
    told["finished"] = {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "batches": len(entries),
        "rows": sum(entry.rows for entry in entries),
        "tokens": sum(entry.tokens for entry in entries),
        "read": sum(entry.read for entry in entries),
        "notes": batches.notes,
        "files": sink.cards(),
        "besides": [card(path, folder, checksum(path)) for path in sink.besides()],
    }
    with explained(folder, sink.safe):
        manifest.save(folder, told)

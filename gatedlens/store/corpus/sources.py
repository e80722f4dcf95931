"""Sources: whatever holds documents, as a corpus.

    corpus = read("corpus.jsonl", model)          # also: a text file, a folder of files, a `datasets` folder, images
    corpus = read(tokens, model)                  # ids [row, pos] or one long [pos]
    corpus = read({"ids": tokens, "attention_mask": padding, "mask": marked}, model)
    corpus = read(texts, model)                   # any iterable of texts, ids, records (dicts) or PIL images

A document is a JSONL line, a file of text, a row, or an image. Hidden files of a folder are left out, as its other kinds
of files are; data in another format (CSV, Parquet, JSON, archives) are refused, never read as if they were text.
"""

from __future__ import annotations

import json
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from gatedlens.errors import InputError, TooLargeError, in_bytes
from gatedlens.files import optional
from gatedlens.model.base import HookedModel
from gatedlens.model.language import HookedLanguageModel
from gatedlens.options import is_many
from gatedlens.store.corpus.corpus import Corpus
from gatedlens.store.corpus.encoding import Item, Pixels, Tokens

TEXT_FILES = (".txt", ".md", ".text")
JSON_LINES = (".jsonl", ".ndjson")
IMAGE_FILES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")
NO_TEXT = (
    ".arrow", ".bz2", ".csv", ".db", ".docx", ".gz", ".h5", ".html", ".json", ".npy", ".npz", ".parquet", ".pdf", ".pkl",
    ".pt", ".pth", ".safetensors", ".tar", ".tsv", ".xz", ".zip", ".zst",
)  # fmt: skip
# What holds documents. For editors and type checkers: another kind gets the error of `read`.
if TYPE_CHECKING:
    Documents: TypeAlias = str | Path | Tensor | Mapping[str, Any] | Iterable[Any]
else:
    Documents = Any
LARGEST_FILE = 256 * 2**20  # a text file is one document and is tokenised whole


def read(data: Documents, model: HookedModel, field: str | None = None) -> Corpus:
    """The corpus that `data` holds for `model`; `field`: which field of a record (JSONL, `datasets`) to read."""
    is_text = isinstance(model, HookedLanguageModel)
    encode = Tokens(model, field) if is_text else Pixels(model, field)
    if isinstance(data, str | Path):
        return _read_path(Path(data).expanduser(), is_text, encode)
    if isinstance(data, Mapping):
        return _read_columns(data, encode)
    if isinstance(data, Tensor):
        return _read_tensor(data, is_text, encode)
    if not is_many(data):
        raise InputError(
            f"A corpus is a path, ids, or an iterable of texts, ids or images; this is {type(data).__name__}."
        )
    return _read_iterable(data, encode)


# -- files ----------------------------------------------------------------------------------------------------------


def _read_path(path: Path, is_text: bool, encode: Any) -> Corpus:
    if not path.exists():
        raise InputError(f"There is no file or folder {path}. For a text itself pass a list of texts.")
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return _read_dataset(path, encode)
    wanted = (*TEXT_FILES, *JSON_LINES) if is_text else IMAGE_FILES
    if path.is_file() and is_text and path.suffix.lower() in NO_TEXT:
        raise InputError(
            f"{path} is not text ({path.suffix}): it would be read byte by byte. Write JSONL, or open it with `datasets` "
            "(load_dataset) and pass the data set."
        )
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if _is_read(p, path, wanted))
    if not files:
        raise InputError(f"{path} holds no file that the model reads ({', '.join(wanted)}).")
    size = sum(file.stat().st_size for file in files)
    described = {"kind": "files", "name": path.name, "files": len(files), "bytes": size}
    items = _texts if is_text else _images
    count = None if is_text else len(files)
    return Corpus(described, lambda: items(files), encode, count, size)


def _is_read(file: Path, folder: Path, wanted: tuple[str, ...]) -> bool:
    """A file of a known kind, neither hidden nor in a hidden folder."""
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.suffix.lower() in wanted and not hidden and file.is_file()


def _texts(files: list[Path]) -> Iterator[Item]:
    for file in files:
        yield from _lines(file) if file.suffix.lower() in JSON_LINES else [_whole(file)]


def _images(files: list[Path]) -> Iterator[Item]:
    return (Item(file, str(file), file.stat().st_size) for file in files)


def _whole(file: Path) -> Item:
    size = file.stat().st_size
    if size > LARGEST_FILE:
        raise TooLargeError(
            f"{file} has {in_bytes(size)}, and a text file is one document, read whole (up to {in_bytes(LARGEST_FILE)})."
            " Split it, or write JSONL, one document a line."
        )
    return Item(_decoded(file.read_bytes(), str(file)), str(file), size)


def _lines(file: Path) -> Iterator[Item]:
    with file.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            where = f"{file}, line {number}"
            if not line.strip():
                yield Item("", where, len(line))
                continue
            try:
                record = json.loads(_decoded(line, where))
            except json.JSONDecodeError as error:
                raise InputError(f"{where} is no JSON ({error}). A JSONL file has one record a line.") from error
            yield Item(record, where, len(line))


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}. Convert it first, for example "
            "with `iconv -f latin1 -t utf-8`."
        ) from error


def _read_dataset(path: Path, encode: Any) -> Corpus:
    datasets = optional("datasets", "store")
    found = datasets.load_from_disk(str(path))
    if isinstance(found, datasets.DatasetDict):
        raise InputError(f"{path} holds several splits ({', '.join(found)}): give the folder of one.")
    described = {"kind": "datasets", "name": path.name, "rows": len(found), "fingerprint": found._fingerprint}
    return Corpus(described, lambda: _records(found), encode, len(found))


def _records(records: Iterable[Any]) -> Iterator[Item]:
    return (Item(record, f"Document {index} of the corpus") for index, record in enumerate(records))


# -- what is in memory ----------------------------------------------------------------------------------------------


def _read_columns(data: Mapping[str, Any], encode: Any) -> Corpus:
    """`{"ids": [row, pos], "attention_mask": ..., "mask": ...}`, each a rectangle or a list of rows."""
    if type(data).__name__ in ("DatasetDict", "IterableDatasetDict"):
        raise InputError(f"This data set has several splits ({', '.join(data)}): pass one of them.")
    lengths = {name: len(column) for name, column in data.items()}
    if len(set(lengths.values())) != 1:
        raise InputError(f"The columns of the corpus have different lengths: {lengths}.")

    def rows() -> Iterator[Item]:
        return _records(dict(zip(data, row, strict=True)) for row in zip(*data.values(), strict=True))

    sums = {name: _checksum(column) for name, column in data.items() if isinstance(column, Tensor)}
    return Corpus({"kind": "columns", "rows": lengths, "crc32": sums}, rows, encode, next(iter(lengths.values())))


def _read_tensor(data: Tensor, is_text: bool, encode: Any) -> Corpus:
    """Ids [row, pos], one document [pos], or images [batch, channels, height, width]."""
    rows = data.unsqueeze(0) if data.ndim == (1 if is_text else 3) else data
    described = {"kind": "tensor", "shape": list(data.shape), "crc32": _checksum(data)}
    return Corpus(described, lambda: _records(rows), encode, len(rows), width=rows.shape[-1] if is_text else None)


def _read_iterable(data: Iterable[Any], encode: Any) -> Corpus:
    """Of an iterator, what is sampled before the harvest begins is given again; others can be read twice anyway."""
    if isinstance(data, Iterator):
        replay = Replay(data)
        return Corpus({"kind": "iterator"}, lambda: _records(replay), encode, begin=replay.let_go)
    count = len(data) if isinstance(data, list | tuple) else None
    if count is None and isinstance(getattr(data, "num_rows", None), int):  # a datasets.Dataset
        count = data.num_rows  # type: ignore[attr-defined]
    return Corpus({"kind": type(data).__name__, "rows": count}, lambda: _records(data), encode, count)


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


class Replay:
    """An iterator whose beginning can be read several times, for estimates before the pass that counts.

    replay = Replay(documents)
    first, again = list(islice(replay, 64)), list(islice(replay, 64))       # the same
    replay.let_go()
    for document in replay: ...                                             # all of them, once, and held no longer
    """

    def __init__(self, data: Iterator[Any]):
        self.data = data
        self.held: deque[Any] = deque()
        self.keeps = True

    def let_go(self) -> None:
        self.keeps = False

    def __iter__(self) -> Iterator[Any]:
        if not self.keeps:
            while self.held:
                yield self.held.popleft()
            yield from self.data
            return
        at = 0
        while True:
            if at == len(self.held):
                try:
                    self.held.append(next(self.data))
                except StopIteration:
                    return
            yield self.held[at]
            at += 1

"""Corpora: whatever holds documents, as a stream of them, one at a time in memory.

    corpus = read("corpus.jsonl", model)          # also: a text file, a folder of files, a `datasets` folder, images
    corpus = read(tokens, model)                  # ids [row, pos] or one long [pos]
    corpus = read({"ids": tokens, "attention_mask": padding, "mask": marked}, model)
    corpus = read(texts, model)                   # any iterable of texts, ids, records (dicts) or PIL images
    for document in corpus.documents(): ...

A document is a JSONL line, a file of text, a row, or an image. Text becomes ids with the model's tokenizer, with its BOS
in front where it has one.
"""

from __future__ import annotations

import json
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from gatedlens import tokens as tokens_
from gatedlens.errors import InputError, TooLargeError, in_bytes
from gatedlens.language import HookedLanguageModel
from gatedlens.optional import optional

FIELDS = ("ids", "input_ids", "token_ids", "tokens", "text", "image")  # where a record's content is looked for, in turn
TEXT_FILES = (".txt", ".md", ".text")
IMAGE_FILES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")
LARGEST_FILE = 256 * 2**20  # a text file is one document and is tokenised whole
SAMPLE = 64  # documents from which the length of a corpus is estimated


@dataclass(frozen=True)
class Document:
    """`value`: ids [pos], or pixels [channels, height, width]. `marked`: the positions that positions="mask" keeps."""

    index: int
    value: Shaped[Tensor, ...]
    marked: Bool[Tensor, " pos"] | None = None


class Item(NamedTuple):
    """What a reader yields: anything that `encode` understands, where it stood, its bytes in the file."""

    value: Any
    where: str
    size: int = 0


def _nothing() -> None:
    return None


@dataclass
class Corpus:
    """`described` goes into the manifest; a corpus that can be told from another has a size or a checksum in it.

    items: a fresh iterator over what it holds. count, size: how many documents or bytes it holds, width: the length of
    each document, where that is known. begin: to be called before the pass that counts (an iterator has only one).
    """

    described: dict[str, Any]
    items: Callable[[], Iterator[Item]]
    encode: Callable[[Item], tuple[Tensor, Tensor | None]]
    count: int | None = None
    size: int | None = None
    width: int | None = None  # the length of every row of a rectangle
    begin: Callable[[], None] = _nothing
    empty: int = 0

    @property
    def is_text(self) -> bool:
        return isinstance(self.encode, Tokens)

    def documents(self) -> Iterator[Document]:
        """Every document that is not empty, in order; `empty` counts the others."""
        self.empty = 0
        for index, item in enumerate(self.items()):
            value, marked = self.encode(item)
            if value.numel():
                yield Document(index, value, marked)
            else:
                self.empty += 1

    def expected_tokens(self) -> int | None:
        """About how many tokens it holds, from its first documents; None for an iterable of unknown length."""
        first = list(islice(self.items(), SAMPLE))
        lengths = [len(self.encode(item)[0]) for item in first]
        if len(first) < SAMPLE:
            return sum(lengths)
        if self.count is not None:
            return sum(lengths) * self.count // len(first)
        read = sum(item.size for item in first)
        return None if self.size is None or not read else sum(lengths) * self.size // read


def read(data: Any, model: Any, field: str | None = None) -> Corpus:
    """The corpus that `data` holds for `model`; `field`: which field of a record (JSONL, `datasets`) to read."""
    is_text = isinstance(model, HookedLanguageModel)
    encode = Tokens(model, field) if is_text else Pixels(model, field)
    if isinstance(data, str | Path):
        return _read_path(Path(data).expanduser(), is_text, encode)
    if isinstance(data, Mapping):
        return _read_columns(data, encode)
    if isinstance(data, Tensor):
        return _read_tensor(data, is_text, encode)
    if not isinstance(data, Iterable):
        raise InputError(
            f"A corpus is a path, ids, or an iterable of texts, ids or images; this is {type(data).__name__}."
        )
    return _read_iterable(data, encode)


# -- from an item to a document -------------------------------------------------------------------------------------


def _content(item: Item, field: str | None) -> tuple[Any, Any]:
    """(content, mask) of an item; of a record, the field asked for or the first that is known."""
    if not isinstance(item.value, Mapping):
        return item.value, None
    record = item.value
    chosen = field if field is not None else next((name for name in FIELDS if name in record), None)
    if chosen not in record:
        asked = f"no field {field!r}" if field is not None else f"none of the fields {', '.join(FIELDS)}"
        raise InputError(f"{item.where} has {asked}; it has: {', '.join(record)}. Say which with field=...")
    content = record[chosen]
    if "attention_mask" in record:
        real = torch.as_tensor(record["attention_mask"]).bool()
        content = _ids(content, item.where)[real]
        return content, None if "mask" not in record else torch.as_tensor(record["mask"])[real]
    return content, record.get("mask")


def _ids(value: Any, where: str) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{where} is neither text nor a list of token ids: {error}.") from error


@dataclass(frozen=True)
class Tokens:
    """Item -> (ids [pos], mask or None), by the model's tokenizer and checked against its vocabulary."""

    model: Any
    field: str | None

    def __call__(self, item: Item) -> tuple[Tensor, Tensor | None]:
        content, mask = _content(item, self.field)
        if isinstance(content, str):
            return self._encode(content), None
        ids = _ids(content, item.where)
        if ids.numel() == 0:
            return ids.long().reshape(-1), None
        if ids.ndim != 1:
            raise InputError(f"{item.where} has shape {list(ids.shape)}; a document's ids are a list, [pos].")
        try:
            ids = tokens_.check(ids, self.model.cfg.d_vocab)[0]
        except InputError as error:
            raise InputError(f"{item.where}: {error}") from error
        marked = None if mask is None else torch.as_tensor(mask).bool()
        if marked is not None and marked.shape != ids.shape:
            raise InputError(f"{item.where}: its mask has shape {list(marked.shape)}, its ids {list(ids.shape)}.")
        return ids, marked

    def _encode(self, text: str) -> Tensor:
        if not text:
            return torch.empty(0, dtype=torch.long)
        ids = tokens_.encode(self.model._need_tokenizer("Text"), text, self.model.cfg.default_prepend_bos)
        return torch.tensor(ids, dtype=torch.long)


@dataclass(frozen=True)
class Pixels:
    """Item -> (pixels [channels, height, width], None), as the model's `preprocess` makes them."""

    model: Any
    field: str | None

    def __call__(self, item: Item) -> tuple[Tensor, Tensor | None]:
        content, _ = _content(item, self.field)
        if isinstance(content, Tensor):
            return content, None
        return self.model.preprocess(_image(content, item.where)), None


def _image(content: Any, where: str) -> Any:
    """The PIL image of a path, or the image itself."""
    from PIL import Image, UnidentifiedImageError

    if not isinstance(content, str | Path):
        return content
    try:
        image = Image.open(content)
        image.load()
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"{where} is no image that Pillow can read: {error}.") from error
    return image


# -- from a source to items -----------------------------------------------------------------------------------------


def _read_path(path: Path, is_text: bool, encode: Any) -> Corpus:
    if not path.exists():
        raise InputError(f"There is no file or folder {path}. For a text itself pass a list of texts.")
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return _read_dataset(path, encode)
    wanted = (*TEXT_FILES, ".jsonl") if is_text else IMAGE_FILES
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix.lower() in wanted)
    if not files:
        raise InputError(f"{path} holds no file that the model reads ({', '.join(wanted)}).")
    size = sum(file.stat().st_size for file in files)
    described = {"kind": "files", "name": path.name, "files": len(files), "bytes": size}
    items = _texts if is_text else _images
    count = None if is_text else len(files)
    return Corpus(described, lambda: items(files), encode, count, size)


def _texts(files: list[Path]) -> Iterator[Item]:
    for file in files:
        yield from _lines(file) if file.suffix.lower() == ".jsonl" else [_whole(file)]


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


def _read_columns(data: Mapping[str, Any], encode: Any) -> Corpus:
    """`{"ids": [row, pos], "attention_mask": ..., "mask": ...}`, each a rectangle or a list of rows."""
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


class Replay:
    """An iterator whose beginning can be read several times, and the whole once: the pass after `let_go`."""

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


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)

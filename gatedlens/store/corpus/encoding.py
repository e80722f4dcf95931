"""Encoding: from what a corpus holds to what the model reads.

    encode = Tokens(model, field=None)           # of a language model; Pixels(model) of one that reads images
    ids, marked = encode(Item({"text": "Call me Ishmael"}, "line 1 of a.jsonl"))

Text becomes ids with the model's tokenizer, with its BOS in front where it has one; ids are checked against its vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gatedlens.errors import InputError
from gatedlens.model import text as text_
from gatedlens.model.image import picture

FIELDS = ("ids", "input_ids", "token_ids", "tokens", "text", "image")  # where a record's content is looked for, in turn


class Item(NamedTuple):
    """What a source yields: anything that can be encoded, where it stood, its bytes in the file."""

    value: Any
    where: str
    size: int = 0


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


def _marked(mask: Any, where: str) -> Tensor:
    given = torch.as_tensor(mask)
    if not bool(((given == 0) | (given == 1)).all()):
        raise InputError(f"{where}: its mask holds values other than 0 and 1 (a position that is kept).")
    return given.bool()


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
            ids = text_.check(ids, self.model.cfg.d_vocab)[0]
        except InputError as error:
            raise InputError(f"{item.where}: {error}") from error
        marked = None if mask is None else _marked(mask, item.where)
        if marked is not None and marked.shape != ids.shape:
            raise InputError(f"{item.where}: its mask has shape {list(marked.shape)}, its ids {list(ids.shape)}.")
        return ids, marked

    def _encode(self, text: str) -> Tensor:
        if not text:
            return torch.empty(0, dtype=torch.long)
        ids = text_.encode(self.model._need_tokenizer("Text"), text, self.model.cfg.default_prepend_bos)
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
    if not isinstance(content, str | Path):
        return content
    try:
        return picture(content)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error

"""Item: samples as one model reads them, some together as a batch.

    items = [Item.of(model, sample) for sample in samples]
    batch = Items.of(items)                 # input, attention_mask, labels, keep, among, masks

An image is prepared as the model's evaluation does, or, with a mask, scaled to the model's size with it (`image_files.py`). A
prompt's parts are encoded one by one, so that it is known which tokens may be taken away.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gatedlens.errors import InputError
from gatedlens.evaluation.data.image_files import pixels, squeezed
from gatedlens.evaluation.data.sample import Prompt, Sample
from gatedlens.model.base import HookedModel
from gatedlens.model.text import encode, pad
from gatedlens.runs.fingerprints import checksum


@dataclass(frozen=True)
class Item:
    """value: tokens [pos] or an image; content: which tokens may be taken away (None: those that `Case` says); choices:
    the ids of the answers to choose from, `label` being the index of the right one."""

    sample: Sample
    value: Tensor
    label: int | None
    mask: Tensor | None = None
    content: Tensor | None = None
    choices: tuple[int, ...] | None = None

    @property
    def checksum(self) -> str:
        """Of all that decides what is measured of it."""
        said = (self.label, self.choices, self.sample.truth)
        total = zlib.crc32(repr(said).encode())
        for part in (self.value, self.mask, self.content):
            total = zlib.crc32(b"none", total) if part is None else checksum(part, total)
        return f"{total:08x}"

    @staticmethod
    def of(model: HookedModel, sample: Sample) -> Item:
        """InputError, with the sample's name, for a sample that this model cannot read."""
        try:
            return _image(model, sample) if model.grid is not None else _text(model, sample)
        except InputError as error:
            raise InputError(f"{sample.name}: {error}") from error


@dataclass(frozen=True)
class Items:
    """Items of equal kind: a batch."""

    input: Tensor
    attention_mask: Tensor | None
    labels: Tensor | None
    keep: Tensor | None
    among: Tensor | None
    masks: Tensor | None

    @staticmethod
    def of(items: Sequence[Item]) -> Items:
        if items[0].value.ndim > 1:
            value, real = torch.stack([item.value for item in items]), None
        else:
            value, real = pad([item.value.tolist() for item in items], "left", 0)
        content = None
        if items[0].content is not None:
            content = torch.zeros(value.shape, dtype=torch.bool)
            for row, item in zip(content, items, strict=True):
                assert item.content is not None
                row[len(row) - len(item.content) :] = item.content
        return Items(
            value,
            None if real is None or bool(real.all()) else real,
            None if items[0].label is None else torch.tensor([item.label for item in items]),
            None if content is None else ~content,
            None if items[0].choices is None else torch.tensor([item.choices for item in items]),
            None if items[0].mask is None else torch.stack([item.mask for item in items if item.mask is not None]),
        )


def alike(a: Item, b: Item) -> bool:
    """May two items stand in one batch?"""
    count = [len(item.choices or ()) for item in (a, b)]
    known = [
        (
            item.label is None,
            item.content is None,
            not item.sample.truth,
            None if item.mask is None else item.mask.shape,
        )
        for item in (a, b)
    ]
    return a.value.ndim == b.value.ndim and count[0] == count[1] and known[0] == known[1]


def _image(model: HookedModel, sample: Sample) -> Item:
    given, mask = sample.input, sample.mask
    if isinstance(given, Prompt | list | str) or (isinstance(given, Tensor) and not given.is_floating_point()):
        raise InputError(f"{model.cfg.model_name} reads images, and this is text.")
    classes = model.cfg.d_vocab
    if sample.classes is not None and sample.classes != classes:
        raise InputError(
            f"the data has {sample.classes} classes and {model.cfg.model_name} {classes}, so their numbers differ. Of an "
            "ImageNet folder with some of the classes: put the list of all of them beside it (LOC_synset_mapping.txt)."
        )
    if not isinstance(given, Tensor) and mask is not None:
        given, mask = squeezed(model, given, mask)
    value = given if isinstance(given, Tensor) else pixels(model, given)
    if tuple(value.shape) != tuple(model.image_shape):
        raise InputError(f"the image is {list(value.shape)}; {model.cfg.model_name} reads {list(model.image_shape)}.")
    return Item(sample, value, sample.label, mask)


def _text(model: HookedModel, sample: Sample) -> Item:
    given = sample.input
    if isinstance(given, Prompt):
        return _prompt(model, sample, given)
    if not isinstance(given, Tensor | list) or (isinstance(given, Tensor) and given.is_floating_point()):
        raise InputError(f"{model.cfg.model_name} reads text, and this is an image.")
    return Item(sample, torch.as_tensor(given).long(), sample.label)


def _prompt(model: HookedModel, sample: Sample, prompt: Prompt) -> Item:
    if model.tokenizer is None:
        raise InputError(f"{model.cfg.model_name} has no tokenizer: load it with tokenizer=.")
    bos = model.tokenizer.bos_token_id is not None and model.cfg.default_prepend_bos
    before = encode(model.tokenizer, prompt.before, prepend_bos=bos)
    text, after = (encode(model.tokenizer, part, prepend_bos=False) for part in (prompt.text, prompt.after))
    if not text:
        raise InputError("the text is empty.")
    choices = tuple(encode(model.tokenizer, choice, prepend_bos=False)[0] for choice in prompt.choices)
    if len(set(choices)) < len(choices):
        raise InputError(f"the answers {prompt.choices} begin with one token: they cannot be told apart.")
    content = torch.tensor([False] * len(before) + [True] * len(text) + [False] * len(after))
    return Item(sample, torch.tensor([*before, *text, *after]), sample.label, None, content, choices or None)

"""Tokens: from text to ids and back, padding, and the checks that a stray id or mask fails before the model does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from gatedlens.errors import InputError
from gatedlens.model.batch import Input
from gatedlens.options import tensor_of
from gatedlens.recurrence.transforms import anywhere, plain

Text = str | Sequence[str]
SIDES = ("left", "right")


def encode(tokenizer: Any, text: str, prepend_bos: bool) -> list[int]:
    """The ids of one string, with exactly one BOS in front if `prepend_bos`."""
    try:
        ids = list(tokenizer.encode(text, add_special_tokens=False))
    except Exception as error:  # the tokenizers library raises no narrower class
        raise InputError(f"The tokenizer cannot encode {text!r} ({error}).{_knows(tokenizer)}") from error
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is not None and unknown in ids and _knows(tokenizer):  # a list of words, and this is none of them
        raise InputError(f"The tokenizer does not know all words of {text!r}.{_knows(tokenizer)}")
    bos = tokenizer.bos_token_id
    if prepend_bos and bos is None:
        raise InputError("prepend_bos=True, but the tokenizer has no BOS token; pass prepend_bos=False.")
    return [bos, *ids] if prepend_bos and ids[:1] != [bos] else ids


class Inherited(str):
    """The padding side that a tokenizer came with: as good as any str, and known to be nobody's choice."""


def forget_side(tokenizer: Any) -> None:
    """Mark the padding side of a tokenizer as the one that it came with. A side that is set later is its user's."""
    side = getattr(tokenizer, "padding_side", None)
    if side in SIDES:
        tokenizer.padding_side = Inherited(side)


def side_of(tokenizer: Any) -> str | None:
    """The padding side that a user set on a tokenizer; None if it is the one that it came with, or it has none."""
    side = getattr(tokenizer, "padding_side", None)
    return None if isinstance(side, Inherited) else side


def _knows(tokenizer: Any) -> str:
    """What a tokenizer of a few words knows, for messages; empty for one of many."""
    unknown = getattr(tokenizer, "unk_token", None)
    words = sorted(word for word in tokenizer.get_vocab() if word != unknown)
    return f" It knows only: {' '.join(words)}." if 0 < len(words) <= 64 else ""


def pad(rows: list[list[int]], side: str, pad_id: int) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """(tokens, mask) of rows of unequal length, padded on `side`."""
    if side not in SIDES:
        raise InputError(f"padding_side={side!r}: it is 'left' or 'right'.")
    longest = max(len(row) for row in rows)
    tokens = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        tokens[i, place] = torch.tensor(row, dtype=torch.long)
        mask[i, place] = True
    return tokens, mask


def encoded(
    input: Input | None, input_ids: Any = None, attention_mask: Any = None, token_type_ids: Any = None
) -> tuple[Any, Any]:
    """(input, attention mask) of what a call gave: a tokenizer's output (`tokenizer(text, return_tensors="pt")`) as the input
    or as keywords, or anything else as it is. InputError for what is given twice, and for segments, which nobody reads."""
    if isinstance(input, Mapping):
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        if twice := [name for name, value in given.items() if value is not None and input.get(name) is not None]:
            raise InputError(
                f"{twice[0]} is in the input (a {type(input).__name__}) and was given beside it: give it once."
            )
        if unknown := [name for name in input if name not in given]:
            raise InputError(
                f"The input is a {type(input).__name__} with {', '.join(map(str, unknown))}; a call reads its "
                f"{', '.join(given)}."
            )
        given |= {name: value for name, value in input.items() if value is not None}
        return encoded(None, **given)
    if input is None and input_ids is None:
        raise InputError("There is no input: give text, token ids, or what a tokenizer returned (input_ids=...).")
    if input is not None and input_ids is not None:
        raise InputError("input_ids was given beside an input: give one of the two.")
    if token_type_ids is not None and bool((tensor_of(token_type_ids, "token_type_ids") != 0).any()):
        raise InputError(
            "token_type_ids tells segments apart, and this model reads one text a row: leave it out "
            "(tokenizer(text, return_token_type_ids=False))."
        )
    return input_ids if input is None else input, attention_mask


def check(tokens: Shaped[Tensor, ...], d_vocab: int) -> Int[Tensor, "batch pos"]:
    """Token ids as [batch, pos] int64, or an InputError that says which id at which place is wrong."""
    if tokens.numel() == 0:
        raise InputError(f"The input is empty: its shape is {list(tokens.shape)}. Give at least one token.")
    if tokens.is_floating_point() or tokens.dtype == torch.bool or tokens.is_complex():
        raise InputError(
            f"Tokens must be integer ids; these are {tokens.dtype}. For a residual stream pass start_at_layer as well."
        )
    if tokens.ndim == 1:
        tokens = tokens.unsqueeze(0)
    if tokens.ndim != 2:
        raise InputError(f"Tokens have shape [batch, pos]; these have shape {list(tokens.shape)}.")
    wrong = plain((tokens < 0) | (tokens >= d_vocab))
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        row, pos = place[-2:]
        raise InputError(
            f"Token id {int(plain(tokens)[place])} at row {row}, position {pos} is out of range: the model knows ids 0 to "
            f"{d_vocab - 1}. Was the text encoded by another model's tokenizer?"
        )
    return tokens.long()


def check_mask(mask: Any, shape: tuple[int, int]) -> Bool[Tensor, "batch pos"]:
    """An attention mask as booleans of `shape`; every row must have a real token."""
    mask = tensor_of(mask, "attention_mask")
    if mask.ndim == 1 and shape[0] == 1:
        mask = mask.unsqueeze(0)
    if tuple(mask.shape) != shape:
        raise InputError(
            f"attention_mask has shape {list(mask.shape)}; the input has shape {list(shape)} [batch, pos]."
        )
    if anywhere((mask != 0) & (mask != 1)):
        raise InputError("attention_mask holds values other than 0 (padding) and 1 (a token).")
    mask = mask.bool()
    empty = ~mask.any(dim=1)
    if anywhere(empty):
        row = int(plain(empty).nonzero()[0, -1])
        raise InputError(f"attention_mask masks all of row {row}: give every row at least one token.")
    return mask

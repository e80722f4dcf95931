"""Tokens: what a language model does with text: to ids, to strings and back, by TransformerLens's names.

    tokens, mask = model.to_tokens_and_mask(["Call me", "Call me Ishmael"])
    model.to_str_tokens("Call me")
    model.set_tokenizer(AutoTokenizer.from_pretrained("gpt2"))

text.py pads and checks; tokenizer.py puts foreign tokenizers behind transformers' words.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from gatedlens.errors import InputError
from gatedlens.model import placement
from gatedlens.model import text as text_
from gatedlens.model.batch import Array, Input
from gatedlens.model.tokenizer import TokenizerLike, tokenizer_of


class ReadsText:
    """What a HookedLanguageModel inherits; it has `cfg`, `embedding` and a `tokenizer`, or None."""

    cfg: Any
    tokenizer: Any

    if TYPE_CHECKING:

        @property
        def embedding(self) -> Any: ...

    def set_tokenizer(self, tokenizer: TokenizerLike) -> None:
        """`model.set_tokenizer(tokenizer)`: use `tokenizer`: transformers', a folder of one, or anything that encodes and
        decodes (None: none).

        What is not transformers' is put behind its words; see `tokenizer.py`. InputError for what is no tokenizer.

        Texts are padded on the side of `padding_side=` of the call; else on that which was set on the model's tokenizer,
        `model.tokenizer.padding_side = "right"`; else on the left (cfg.default_padding_side). The side that a tokenizer comes
        with is its maker's default, the right nearly always, and counts for nothing.
        """
        self.tokenizer = found = tokenizer_of(tokenizer)
        text_.forget_side(found)
        self.cfg.tokenizer_name = None if found is None else (getattr(found, "name_or_path", "") or None)
        self.cfg.default_prepend_bos = found is not None and found.bos_token_id is not None

    def _need_tokenizer(self, what: str) -> Any:
        if self.tokenizer is None:
            raise InputError(
                f"{what} needs a tokenizer and {self.cfg.model_name} has none: pass token ids, or give it one with "
                "model.set_tokenizer(AutoTokenizer.from_pretrained(...))."
            )
        return self.tokenizer

    def _tokenize(
        self, input: Input, prepend_bos: bool | None, side: str | None
    ) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"] | None]:
        """(tokens on the model's device, mask or None)."""
        device = placement.device_of(self.embedding)
        if isinstance(input, str) or (isinstance(input, Sequence) and any(isinstance(i, str) for i in input)):
            tokenizer = self._need_tokenizer("Text")
            texts = [input] if isinstance(input, str) else list(input)
            bos = self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
            rows = [text_.encode(tokenizer, text, bos) for text in texts]
            for text, row in zip(texts, rows, strict=True):
                if not row:
                    raise InputError(f"The text {text!r} has no tokens; give at least one (or prepend_bos=True).")
            pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
            side = side or text_.side_of(tokenizer) or self.cfg.default_padding_side
            tokens, mask = text_.pad(rows, side, pad_id)
            tokens = text_.check(tokens, self.embedding.weight.shape[0])
            return tokens.to(device), None if bool(mask.all()) else mask.to(device)
        try:
            ids = torch.as_tensor(input)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"The input is {type(input).__name__}, and neither text nor a rectangle of token ids: {error}."
            ) from error
        ids = text_.check(ids, self.embedding.weight.shape[0]).to(device)
        if prepend_bos:
            bos_id = self._need_tokenizer("prepend_bos=True").bos_token_id
            ids = torch.cat([torch.full_like(ids[:, :1], bos_id), ids], dim=1)
        return ids, None

    def to_tokens(
        self,
        input: str | Sequence[str],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = False,
    ) -> Int[Tensor, "batch pos"]:
        """`model.to_tokens("Call me")`: ids [batch, pos], with BOS if the tokenizer has one (cfg.default_prepend_bos).

        Ids do not tell padding from text: for texts of unequal length pass them to the model themselves, or
        `attention_mask=` of `to_tokens_and_mask`; this warns.
        """
        ids, mask = self._tokenize([input] if isinstance(input, str) else input, prepend_bos, padding_side)
        if mask is not None:
            warnings.warn(
                "These texts differ in length and were padded; ids alone do not say where. Give the model the texts, or "
                "attention_mask from model.to_tokens_and_mask(texts).",
                stacklevel=2,
            )
        ids = ids[:, : self.cfg.n_ctx] if truncate else ids
        return ids if move_to_device else ids.cpu()

    def to_tokens_and_mask(
        self, input: str | Sequence[str], prepend_bos: bool | None = None, padding_side: str | None = None
    ) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
        """`tokens, mask = model.to_tokens_and_mask(texts)`; `model(tokens, attention_mask=mask)` equals `model(texts)`."""
        ids, mask = self._tokenize([input] if isinstance(input, str) else input, prepend_bos, padding_side)
        return ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask

    def get_token_position(
        self,
        single_token: str | int | Tensor,
        input: str | Int[Tensor, "*one pos"],
        mode: str = "first",
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
    ) -> int:
        """`model.get_token_position(" Ishmael", "Call me Ishmael")`: at which position of one text, or of ids [pos] or [1, pos],
        a token stands, as TransformerLens's: BOS counts.

        single_token: its id, or a text that is one token. mode: "first" or "last", where it stands several times. InputError for
        a token that the input lacks, for several rows, and for another mode.
        """
        if mode not in ("first", "last"):
            raise InputError(f"mode={mode!r}: it is 'first' or 'last'.")
        ids = self.to_tokens(input, prepend_bos, padding_side) if isinstance(input, str) else torch.as_tensor(input)
        if ids.ndim not in (1, 2) or (ids.ndim == 2 and len(ids) != 1):
            raise InputError(f"input has shape {list(ids.shape)}: one row of ids is meant, [pos] or [1, pos].")
        token = self.to_single_token(single_token) if isinstance(single_token, str) else int(single_token)
        found = (ids.flatten() == token).nonzero().flatten().tolist()
        if not found:
            raise InputError(f"{single_token!r} (id {token}) does not stand in this input of {ids.numel()} tokens.")
        return found[0] if mode == "first" else found[-1]

    if TYPE_CHECKING:

        @overload
        def to_string(self, tokens: int | list[int]) -> str: ...
        @overload
        def to_string(self, tokens: Array) -> Any: ...

    def to_string(self, tokens: int | Array) -> str | list[str]:
        """`model.to_string(tokens)`: a text for ids [pos], a list of texts for [batch, pos]."""
        tokenizer = self._need_tokenizer("to_string")
        ids = torch.as_tensor(tokens)
        if ids.ndim == 2:
            return [tokenizer.decode(row) for row in ids.tolist()]
        return tokenizer.decode([int(ids)] if ids.ndim == 0 else ids.tolist())

    if TYPE_CHECKING:

        @overload
        def to_str_tokens(self, input: str, prepend_bos: bool | None = None) -> list[str]: ...
        @overload
        def to_str_tokens(self, input: list[str], prepend_bos: bool | None = None) -> list[list[str]]: ...
        @overload
        def to_str_tokens(self, input: Input, prepend_bos: bool | None = None) -> Any: ...

    def to_str_tokens(self, input: Input, prepend_bos: bool | None = None) -> list[str] | list[list[str]]:
        """`model.to_str_tokens("Call me")`: each token as a text; a list of lists for a list of texts or a batch of
        several rows.
        """
        tokenizer = self._need_tokenizer("to_str_tokens")
        if not isinstance(input, str) and isinstance(input, Sequence) and input and isinstance(input[0], str):
            return [self.to_str_tokens(text, prepend_bos) for text in input]
        ids = self.to_tokens(input, prepend_bos) if isinstance(input, str) else torch.as_tensor(input)
        if ids.ndim == 2 and ids.shape[0] > 1:
            return [self.to_str_tokens(row) for row in ids]
        return [tokenizer.decode([i]) for i in ids.reshape(-1).tolist()]

    def to_single_token(self, text: str) -> int:
        """`model.to_single_token(" whale")`: the id of a text that is exactly one token; InputError for any other."""
        ids = text_.encode(self._need_tokenizer("to_single_token"), text, prepend_bos=False)
        if len(ids) != 1:
            raise InputError(f"{text!r} is {len(ids)} tokens ({ids}), not one.")
        return ids[0]

    def to_single_str_token(self, token: int) -> str:
        """`model.to_single_str_token(42)`: the text of one id."""
        return str(self._need_tokenizer("to_single_str_token").decode([token]))

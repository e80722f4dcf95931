"""World vocabulary: the tokenizer of RWKV's World models, `rwkv_vocab_v20230424.txt`: the longest word that fits, byte by byte.

    words = WorldVocabulary.read("rwkv_vocab_v20230424.txt")
    words.decode(words.encode("Hello")) == "Hello"

A line is an id, a Python literal (a text, or bytes that are none) and how many bytes it has. Id 0 ends a document.
Source: BlinkDL, RWKV-LM (RWKV-v5/tokenizer).
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from gatedlens.errors import CheckpointError, InputError


@dataclass(frozen=True)
class WorldVocabulary:
    """`words`: bytes -> id. Stands behind an Adapter, as every tokenizer does that is not transformers'."""

    words: Mapping[bytes, int]
    eos_token_id: int = 0
    name: str = "rwkv-world"

    @staticmethod
    def read(path: str | Path) -> WorldVocabulary:
        """`WorldVocabulary.read(path)`: that of a file; CheckpointError names the line that is not as it should be."""
        lines = Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n")
        words = dict(_word(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line)
        if not words:
            raise CheckpointError(f"{path} holds no words.")
        return WorldVocabulary(words)

    @cached_property
    def by_id(self) -> dict[int, bytes]:
        """id -> bytes"""
        return {i: word for word, i in self.words.items()}

    @cached_property
    def longest(self) -> int:
        """How many bytes the longest word has."""
        return max(map(len, self.words))

    def encode(self, text: str) -> list[int]:
        """`words.encode("Hello")`: ids, each of the longest word that stands next; InputError for a byte that none has."""
        data, place, ids = text.encode("utf-8"), 0, []
        while place < len(data):
            sizes = range(min(self.longest, len(data) - place), 0, -1)
            size = next((n for n in sizes if data[place : place + n] in self.words), None)
            if size is None:
                raise InputError(f"No word of the vocabulary begins with the byte {data[place]:#x}.")
            ids.append(self.words[data[place : place + size]])
            place += size
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """`words.decode([33])`: the text; bytes that are no text become the replacement character, id 0 is nothing."""
        return b"".join(self.by_id.get(int(i), b"") for i in ids).decode("utf-8", errors="replace")

    def get_vocab(self) -> dict[str, int]:
        """`words.get_vocab()["!"]`: ids by word."""
        return {word.decode("utf-8", errors="replace"): i for word, i in self.words.items()}


def _word(line: str, where: str) -> tuple[bytes, int]:
    """(word, id) of a line."""
    try:
        first, rest = line.split(" ", 1)
        literal, size = rest.rsplit(" ", 1)
        said = ast.literal_eval(literal)
        word = said.encode("utf-8") if isinstance(said, str) else bytes(said)
        if len(word) != int(size):
            raise ValueError(f"it has {len(word)} bytes")
        return word, int(first)
    except (ValueError, SyntaxError, TypeError) as error:
        raise CheckpointError(
            f"{where}: expected is an id, a word and its bytes, as 33 '!' 1; this is {line[:60]!r} ({error})."
        ) from error

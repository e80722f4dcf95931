"""Tasks with a known truth, for testing what an explanation or an intervention finds.

batch = gl.tasks.recall(8, seed=0)
model(batch.tokens)[:, -1].argmax(-1) == batch.answers           # the value of the queried key
batch.answer_pos                                                  # the position that holds it
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from gatedlens.options import checked

__all__ = ["Recall", "ids", "recall"]

KEYS = tuple("ABCDEFGHIJKL")
VALUES = tuple("12345678")
NOISE = ("and", "but", "cod", "dog", "elm", "fig", "gnu", "hay")
VOCABULARY = ("<bos>", "?", *KEYS, *VALUES, *NOISE)
N_PAIRS = 4
N_NOISE = 10


@dataclass(frozen=True)
class Recall:
    """A batch of key-value recall: `<bos> D 3 dog hay A 7 ... ? A` and the answer `7`.

    tokens [batch, pos]; answers [batch] are token ids; answer_pos and key_pos [batch] are where the queried value and
    its key stand; pair_pos [batch, pairs] is where each value stands.
    """

    tokens: Int[Tensor, "batch pos"]
    answers: Int[Tensor, " batch"]
    answer_pos: Int[Tensor, " batch"]
    pair_pos: Int[Tensor, "batch pairs"]

    @property
    def key_pos(self) -> Int[Tensor, " batch"]:
        return self.answer_pos - 1

    @checked
    def with_answer(self, answers: Int[Tensor, " batch"]) -> Recall:
        """`other = batch.with_answer(answers)`: the same prompts with other values at the queried keys: the counterfactual
        of activation patching.
        """
        tokens = self.tokens.clone()
        tokens[torch.arange(len(tokens)), self.answer_pos] = answers
        return Recall(tokens, answers, self.answer_pos, self.pair_pos)


@checked
def ids(words: tuple[str, ...]) -> Int[Tensor, " words"]:
    """`gl.tasks.ids(("A", "dog"))`: the token ids of some words of the vocabulary."""
    return torch.tensor([VOCABULARY.index(word) for word in words])


@checked
def recall(n: int, seed: int = 0) -> Recall:
    """`batch = gl.tasks.recall(16, seed=0)`: `n` prompts: 4 distinct keys, each followed by one of 8 values, 10 noise
    words between, `?` and one of the keys.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    keys = ids(KEYS)[uniform(n, len(KEYS)).argsort(1)[:, :N_PAIRS]]
    values = ids(VALUES)[(uniform(n, N_PAIRS) * len(VALUES)).long()]
    noise = ids(NOISE)[(uniform(n, N_NOISE) * len(NOISE)).long()]
    # A body of 4 pairs and 10 noise words in random order: a pair takes two places.
    order = uniform(n, N_PAIRS + N_NOISE).argsort(1)
    is_pair = order < N_PAIRS
    place = torch.cumsum(1 + is_pair.long(), 1) - is_pair.long()  # where each element begins, after <bos>
    tokens = torch.full((n, 1 + 2 * N_PAIRS + N_NOISE + 2), VOCABULARY.index("<bos>"))
    rows = torch.arange(n).unsqueeze(1)
    pair_at = place.gather(1, order.argsort(1)[:, :N_PAIRS])
    tokens[rows, pair_at], tokens[rows, pair_at + 1] = keys, values
    tokens[rows, place.gather(1, order.argsort(1)[:, N_PAIRS:])] = noise
    asked = (uniform(n) * N_PAIRS).long().unsqueeze(1)
    tokens[:, -2] = VOCABULARY.index("?")
    tokens[:, -1] = keys.gather(1, asked).squeeze(1)
    answer_pos = (pair_at + 1).gather(1, asked).squeeze(1)
    return Recall(tokens, values.gather(1, asked).squeeze(1), answer_pos, pair_at + 1)

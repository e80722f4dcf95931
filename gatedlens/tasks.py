"""Tasks with a known truth, for testing what an explanation or an intervention finds.

batch = gl.tasks.recall(8, seed=0)
model(batch.tokens)[:, -1].argmax(-1) == batch.answers           # the value of the queried key
batch.answer_pos                                                  # the position that holds it
again = gl.tasks.rewritten_recall(8, seed=0)                      # one key gets a second value, which counts
again.old_answers, again.old_pos                                  # the first, which a model must forget
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gatedlens.options import checked

__all__ = ["Recall", "RewrittenRecall", "ids", "recall", "rewritten_recall"]

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
    draw = Draw(seed)
    keys = draw.distinct(ids(KEYS), n, N_PAIRS)
    values = draw.some(ids(VALUES), n, N_PAIRS)
    noise = draw.some(ids(NOISE), n, N_NOISE)
    tokens, value_pos = draw.laid_out(keys, values, noise)
    asked = draw.numbers(N_PAIRS, n, 1)
    tokens[:, -1] = keys.gather(1, asked).squeeze(1)
    return Recall(tokens, values.gather(1, asked).squeeze(1), value_pos.gather(1, asked).squeeze(1), value_pos)


@dataclass(frozen=True)
class RewrittenRecall(Recall):
    """Recall where the queried key was written twice: `<bos> D 3 dog A 7 ... D 5 ... ? D` and the answer `5`.

    old_answers [batch] are the ids of the values that no longer count, old_pos [batch] where they stand.
    """

    old_answers: Int[Tensor, " batch"]
    old_pos: Int[Tensor, " batch"]


@checked
def rewritten_recall(n: int, seed: int = 0) -> RewrittenRecall:
    """`batch = gl.tasks.rewritten_recall(16, seed=0)`: `n` prompts as long as those of `recall`: 4 distinct keys, one of them
    written twice with different values, 8 noise words between, `?` and that key. The answer is its second value.
    """
    draw = Draw(seed)
    keys = draw.distinct(ids(KEYS), n, N_PAIRS)
    numbers = draw.numbers(len(VALUES), n, N_PAIRS + 1)
    # The last pair is the first key again, with another value: 1 to 7 further round.
    numbers[:, -1] = (numbers[:, 0] + 1 + draw.numbers(len(VALUES) - 1, n)) % len(VALUES)
    values, noise = ids(VALUES)[numbers], draw.some(ids(NOISE), n, N_NOISE - 2)
    tokens, value_pos = draw.laid_out(torch.cat([keys, keys[:, :1]], 1), values, noise)
    tokens[:, -1] = keys[:, 0]
    both, rows = [0, N_PAIRS], torch.arange(n)
    second = value_pos[:, both].argmax(1)  # which of the two stands behind the other
    where, said = value_pos[:, both], values[:, both]
    last, first = (rows, second), (rows, 1 - second)
    return RewrittenRecall(tokens, said[last], where[last], value_pos, said[first], where[first])


class Draw:
    """`Draw(seed)`: what prompts are drawn by: one stream of numbers."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, *shape: int) -> Float[Tensor, ...]:
        return torch.rand(*shape, generator=self.generator)

    def numbers(self, below: int, *shape: int) -> Int[Tensor, ...]:
        """Whole numbers from 0 up to `below`, without it."""
        return (self.uniform(*shape) * below).long()

    def some(self, words: Int[Tensor, " word"], *shape: int) -> Int[Tensor, ...]:
        """Words at random."""
        return words[self.numbers(len(words), *shape)]

    def distinct(self, words: Int[Tensor, " word"], n: int, count: int) -> Int[Tensor, "row count"]:
        """Words at random, in each row no two alike."""
        return words[self.uniform(n, len(words)).argsort(1)[:, :count]]

    def laid_out(
        self, keys: Int[Tensor, "row pair"], values: Int[Tensor, "row pair"], noise: Int[Tensor, "row word"]
    ) -> tuple[Int[Tensor, "row pos"], Int[Tensor, "row pair"]]:
        """Prompts of pairs and noise in random order, where a pair takes two places, and where each value stands. <bos> is in
        front, `?` and a place for a key behind."""
        (n, pairs), words = keys.shape, noise.shape[1]
        order = self.uniform(n, pairs + words).argsort(1)
        is_pair = order < pairs
        place = torch.cumsum(1 + is_pair.long(), 1) - is_pair.long()  # where each element begins, after <bos>
        tokens = torch.full((n, 1 + 2 * pairs + words + 2), VOCABULARY.index("<bos>"))
        rows, places = torch.arange(n).unsqueeze(1), order.argsort(1)
        pair_at = place.gather(1, places[:, :pairs])
        tokens[rows, pair_at], tokens[rows, pair_at + 1] = keys, values
        tokens[rows, place.gather(1, places[:, pairs:])] = noise
        tokens[:, -2] = VOCABULARY.index("?")
        return tokens, pair_at + 1

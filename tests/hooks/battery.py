"""What every architecture of language promises, as assertions for the tests of any of them, and transformers in true float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch

import gatedlens as gl
from tests.helpers import padded, relative

PACKED = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 0], [6, 7, 0, 1, 0, 0, 1, 2, 3, 4, 5]])
MORE = torch.tensor([[7, 8, 9]])


@contextmanager
def true_float64() -> Iterator[None]:
    """transformers computes wholly in float64: what it takes to float32 on the way becomes double."""
    before = torch.float32, torch.float, torch.Tensor.float
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.float32, torch.float, torch.Tensor.float = before


def rows_are_their_equations(model, tokens: torch.Tensor, literal, error: float = 1e-11) -> None:
    """literal(cache, model, layer): every row of a block from its equation."""
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: True)
    for layer in range(model.cfg.n_layers):
        rows = literal(cache, model, layer)
        names = {row.name for row in model.rows_for(layer)}
        assert set(rows) >= names - {"hook_resid_pre"}, "a row has no literal equation here"
        for name, value in rows.items():
            assert relative(cache[f"blocks.{layer}.{name}"], value) < error, (layer, name)


def edits_are_in_all_that_follows(model, tokens: torch.Tensor, literal, layer: int, error: float = 1e-11) -> None:
    """An edit of each row: every later row equals its equation of the (edited) rows that it names, and so do the logits."""
    plain = model(tokens)
    for row in model.rows_for(layer):
        noise = torch.Generator().manual_seed(3)

        def edit(x, hook, noise=noise):
            return x * 1.2 + 0.1 * torch.rand(x.shape, generator=noise, dtype=x.dtype)

        with model.hooks([(f"blocks.{layer}.{row.name}", edit)]):
            logits, cache = model.run_with_cache(tokens, names_filter=lambda name: True)
        for number in range(layer, model.cfg.n_layers):
            for name, value in literal(cache, model, number).items():
                if (number, name) != (layer, row.name):
                    assert relative(cache[f"blocks.{number}.{name}"], value) < error, (row.name, name)
        assert relative(logits, plain) > 1e-6, f"the edit of {row.name} had no effect"


def implicit_attention_reconstructs(model, tokens: torch.Tensor) -> None:
    """A x + r of every mixer: of a plain run, one from a state, one with padding."""
    _, cache = model.run_with_cache(tokens)
    _, state = model(tokens[:, :4], return_state=True)
    _, later = model.run_with_cache(tokens[:, 4:], state=state)
    padding, mask = padded([tokens[0], tokens[1, :5]], "right")
    _, part = model.run_with_cache(padding, attention_mask=mask)
    for mixer in (mixer for block in model.blocks for mixer in block.mixers):
        for given in (cache, later, part):
            assert gl.implicit_attention(given, layer=mixer.layer, place=mixer.place).check().relative < 1e-12


def padding_counts_for_nothing(model, tokens: torch.Tensor, listening: bool) -> None:
    """On either side and inside a row; also for what a state goes on with."""
    rows = [tokens[0], tokens[1, :5]]
    holes = torch.tensor([[True] * 3 + [False] * 2 + [True] * 6, [False, True, False] + [True] * 4 + [False] * 4])
    batches = [*(padded(rows, side) for side in ("left", "right")), (tokens, holes)]
    names = (lambda name: True) if listening else "hook_logits"
    for given, mask in batches:
        logits, _ = model.run_with_cache(given, attention_mask=mask, names_filter=names)
        _, left = model(given, attention_mask=mask, return_state=True)
        for i, row in enumerate(given[i][mask[i]] for i in range(2)):
            alone, state = model(row[None], return_state=True)
            assert relative(logits[i][mask[i]], alone[0]) < 1e-12
            assert relative(model(MORE, state=left.rows([i])), model(MORE, state=state)) < 1e-12


def documents_stand_alone(model, tokens: torch.Tensor, listening: bool) -> None:
    """Documents packed in rows, told apart by position_ids, from nothing and from a state."""
    _, before = model(torch.randint(40, (2, 6), generator=torch.Generator().manual_seed(7)), return_state=True)
    for state in (None, before):
        names = (lambda name: True) if listening else "hook_logits"
        logits, cache = model.run_with_cache(tokens, position_ids=PACKED, state=state, names_filter=names)
        _, left = model(tokens, position_ids=PACKED, state=state, return_state=True)
        for row in range(2):
            begins = [0, *(i for i in range(1, 11) if PACKED[row, i] == 0), 11]
            for number, (a, b) in enumerate(pairwise(begins)):
                own = {"state": state.rows([row])} if state is not None and number == 0 and PACKED[row, 0] > 0 else {}
                places = PACKED[row : row + 1, a:b]
                alone, end = model(tokens[row : row + 1, a:b], return_state=True, position_ids=places, **own)
                assert relative(logits[row, a:b], alone[0]) < 1e-12
            assert relative(model(MORE, state=left.rows([row])), model(MORE, state=end)) < 1e-12
        if listening:
            numbers = (PACKED == 0).cumsum(1)
            apart = (numbers.unsqueeze(2) != numbers.unsqueeze(1)).unsqueeze(1)
            for layer in model.mixers:
                A = gl.implicit_attention(cache, layer=layer)
                assert A.check().relative < 1e-12
                assert (A.dense() * apart == 0).all() and (A.dense() * ~apart != 0).any()


def every_split_continues(model, tokens: torch.Tensor) -> None:
    """Prefix and suffix are the whole, and so is what they leave."""
    whole, end = model(tokens, return_state=True)
    for split in range(1, tokens.shape[1]):
        first, state = model(tokens[:, :split], return_state=True)
        rest, left = model(tokens[:, split:], state=state, return_state=True)
        assert relative(torch.cat([first, rest], dim=1), whole) < 1e-12
        assert set(left) == set(end)
        for key in end:
            assert relative(left[key].double(), end[key].double()) < 1e-12, key


def generation_is_of_the_whole_prompt(model, tokens: torch.Tensor) -> None:
    """Greedy tokens of a padded batch are those of each row alone, every token from a run of all before it."""
    rows = [tokens[0], tokens[1, :5]]
    batch, mask = padded(rows, "left")
    out = model.generate(batch, attention_mask=mask, max_new_tokens=6, temperature=0, verbose=False)
    for i, row in enumerate(rows):
        for _ in range(6):
            row = torch.cat([row, model(row[None])[0, -1].argmax()[None]])
        assert torch.equal(out[i][-6:], row[-6:])

"""What the tests of every hybrid ask, each a function: its file says the models, the literal equations and the sizes.

`tokens` are [2, pos], the models in float64 unless it says otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch

import gatedlens as gl
from tests.helpers import padded, relative


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


def everything(name):
    return True


@torch.no_grad()
def rows_are_their_equations(model, literal, tokens, rtol=1e-11):
    """`literal(cache, model, layer)` gives every row of a block from the rows that its equation names."""
    _, cache = model.run_with_cache(tokens, names_filter=everything)
    for layer in range(model.cfg.n_layers):
        rows = literal(cache, model, layer)
        names = {row.name for row in model.rows_for(layer)}
        assert set(rows) >= names - {"hook_resid_pre"}, "a row has no literal equation here"
        for name, value in rows.items():
            assert relative(cache[f"blocks.{layer}.{name}"], value) < rtol, name


@torch.no_grad()
def edits_reach_every_row(model, literal, layer, tokens, least=1e-6, rtol=1e-11, may_be_vain=()):
    """An edit anywhere: each later row equals its equation of the (edited) rows that it names, and so do the logits. may_be_vain:
    words in the names of rows whose edit may have no effect."""
    plain = model(tokens)
    for row in model.rows_for(layer):
        noise = torch.Generator().manual_seed(3)

        def edit(x, hook, noise=noise):
            return x * 1.2 + 0.1 * torch.rand(x.shape, generator=noise, dtype=x.dtype)

        with model.hooks([(f"blocks.{layer}.{row.name}", edit)]):
            logits, cache = model.run_with_cache(tokens, names_filter=everything)
        for number in range(model.cfg.n_layers):
            for name, value in literal(cache, model, number).items():
                if (number, name) != (layer, row.name):
                    assert relative(cache[f"blocks.{number}.{name}"], value) < rtol, (row.name, name)
        vain = any(word in row.name for word in may_be_vain)
        assert vain or relative(logits, plain) > least, f"the edit of {row.name} had no effect"


@torch.no_grad()
def a_lazy_point_alone_is_the_same_edit(model, point, tokens):
    """Which other points are heard decides how the scan is computed, not what it is."""

    def edit(x, hook):
        return x * torch.linspace(0.5, 1.5, x.shape[-1], dtype=x.dtype)

    with model.hooks([(f"blocks.0.mixer.hook_{point}", edit)]):
        alone = model(tokens)
        among_all = model.run_with_cache(tokens, names_filter=everything)[0]
    assert relative(alone, among_all) < 1e-12
    if point != "state_start":
        assert relative(alone, model(tokens)) > 1e-5


def gradients_are_transformers(ours, tokens):
    """`ours` in float32."""
    other = copy.deepcopy(ours.wrapped)
    other.config.get_text_config()._experts_implementation = "eager"
    weight = torch.randn(*tokens.shape, 40, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((ours(tokens) * weight).sum(), list(ours.wrapped.parameters()))
    wanted = torch.autograd.grad((other(tokens, use_cache=False).logits * weight).sum(), list(other.parameters()))
    for (name, _), a, b in zip(other.named_parameters(), found, wanted, strict=True):
        assert relative(a, b) < 1e-4, name


def gradients_are_those_of_the_function(model, tokens):
    """The gradient of every parameter, by finite differences along a direction."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(*tokens.shape, 40, generator=generator, dtype=torch.float64)

    def loss():
        return (model(tokens) * weight).sum()

    params = dict(model.wrapped.named_parameters())
    grads = torch.autograd.grad(loss(), list(params.values()))
    for (name, p), grad in zip(params.items(), grads, strict=True):
        direction, step = torch.randn(p.shape, generator=generator, dtype=p.dtype), 1e-6
        kept = p.detach().clone()
        with torch.no_grad():
            sides = []
            for sign in (1, -1):
                p.copy_(kept + sign * step * direction)
                sides.append(loss())
            p.copy_(kept)
        slope = (sides[0] - sides[1]) / (2 * step)
        assert abs(slope - (grad * direction).sum()) < 1e-6 * max(1, abs(slope)), name


@torch.no_grad()
def half_precision_is_as_close_as_transformers_is(exact, model, theirs, tokens):
    """`exact` in float32, `model` in bfloat16, `theirs` transformers' logits of the latter."""
    want, got = exact(tokens), model(tokens)
    assert got.dtype == torch.float32
    assert relative(got, want) < 1.5 * max(relative(theirs.float(), want), 1e-2)


@torch.no_grad()
def attention_reconstructs_every_layer(model, tokens):
    _, cache = model.run_with_cache(tokens)
    _, state = model(tokens[:, :4], return_state=True)
    _, later = model.run_with_cache(tokens[:, 4:], state=state)
    some, mask = padded([tokens[0], tokens[1, :5]], "right")
    _, part = model.run_with_cache(some, attention_mask=mask)
    for mixer in (mixer for block in model.blocks for mixer in block.mixers):
        for given in (cache, later, part):
            assert gl.implicit_attention(given, layer=mixer.layer, place=mixer.place).check().relative < 1e-12


@torch.no_grad()
def padding_and_holes_count_for_nothing(model, tokens, listening):
    rows = [tokens[0], tokens[1, :5]]
    holes = torch.tensor([[True] * 3 + [False] * 2 + [True] * 6, [False, True, False] + [True] * 4 + [False] * 4])
    for given, mask in [*(padded(rows, side) for side in ("left", "right")), (tokens, holes)]:
        names = everything if listening else "hook_logits"
        logits, _ = model.run_with_cache(given, attention_mask=mask, names_filter=names)
        _, left = model(given, attention_mask=mask, return_state=True)
        for i, row in enumerate(given[i][mask[i]] for i in range(2)):
            alone, state = model(row[None], return_state=True)
            assert relative(logits[i][mask[i]], alone[0]) < 1e-12
            more = torch.tensor([[7, 8, 9]])
            assert relative(model(more, state=left.rows([i])), model(more, state=state)) < 1e-12


@torch.no_grad()
def what_a_hook_does_at_padding_reaches_nobody(model, tokens, points):
    given, mask = padded([tokens[0], tokens[1, :5]], "left")
    plain = model(given, attention_mask=mask)

    def spoil(x, hook):
        # what is read at a masked position is that position's own affair
        return torch.where(mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), x, torch.nan)

    for name in points:
        with model.hooks([(f"blocks.0.mixer.hook_{name}", spoil)]):
            logits = model(given, attention_mask=mask)
        assert relative(logits[mask], plain[mask]) < 1e-12, name


PACKED = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 0], [6, 7, 0, 1, 0, 0, 1, 2, 3, 4, 5]])


@torch.no_grad()
def packed_documents_stand_alone(model, tokens, listening):
    """`tokens` [2, 11], as PACKED; the second row goes on from a state, where there is one."""
    _, before = model(torch.randint(40, (2, 6), generator=torch.Generator().manual_seed(7)), return_state=True)
    for state in (None, before):
        names = everything if listening else "hook_logits"
        logits, cache = model.run_with_cache(tokens, position_ids=PACKED, state=state, names_filter=names)
        _, left = model(tokens, position_ids=PACKED, state=state, return_state=True)
        for row in range(2):
            begins = [0, *(i for i in range(1, 11) if PACKED[row, i] == 0), 11]
            for number, (a, b) in enumerate(pairwise(begins)):
                own = {"state": state.rows([row])} if state is not None and number == 0 and PACKED[row, 0] > 0 else {}
                places = PACKED[row : row + 1, a:b]
                alone, end = model(tokens[row : row + 1, a:b], return_state=True, position_ids=places, **own)
                assert relative(logits[row, a:b], alone[0]) < 1e-12
            more = torch.tensor([[7, 8, 9]])
            assert relative(model(more, state=left.rows([row])), model(more, state=end)) < 1e-12
        if listening:
            numbers = (PACKED == 0).cumsum(1)
            apart = (numbers.unsqueeze(2) != numbers.unsqueeze(1)).unsqueeze(1)
            for layer in model.mixers:
                A = gl.implicit_attention(cache, layer=layer)
                assert A.check().relative < 1e-12
                assert (A.dense() * apart == 0).all() and (A.dense() * ~apart != 0).any()


@torch.no_grad()
def every_split_continues(model, tokens):
    whole, end = model(tokens, return_state=True)
    for split in range(1, tokens.shape[1]):
        first, state = model(tokens[:, :split], return_state=True)
        rest, left = model(tokens[:, split:], state=state, return_state=True)
        assert relative(torch.cat([first, rest], dim=1), whole) < 1e-12
        assert set(left) == set(end)
        for key in end:
            assert relative(left[key].double(), end[key].double()) < 1e-12, key


@torch.no_grad()
def generation_is_that_of_the_whole_prompt(model, tokens):
    given, mask = padded([tokens[0], tokens[1, :5]], "left")
    out = model.generate(given, attention_mask=mask, max_new_tokens=6, temperature=0, verbose=False)
    for i, row in enumerate([tokens[0], tokens[1, :5]]):
        for _ in range(6):
            row = torch.cat([row, model(row[None])[0, -1].argmax()[None]])
        assert torch.equal(out[i][-6:], row[-6:])


@torch.no_grad()
def a_patched_state_is_a_fresh_start_from_it(model, tokens, pos):
    """What is set is set for good: nothing of what was there before is left, nor does the erase take anything of the new."""
    _, before = model(tokens[:, : pos + 1], return_state=True)
    shape, generator = before["scan", 0].shape, torch.Generator().manual_seed(6)
    new = torch.randn(shape, generator=generator, dtype=torch.float64)
    patched = model.run_with_cache(tokens, names_filter="*.hook_state")[1]["state", 0]
    with gl.states.patch(new, pos=pos, layers=0).on(model):
        logits, cache = model.run_with_cache(tokens, names_filter=everything)
    assert torch.equal(cache["state", 0][:, pos], new) and relative(patched[:, pos], new) > 0.1
    before["scan", 0] = new
    names = [f"blocks.0.mixer.hook_{name}" for name in ("state", "scan")]
    fresh = model.run_with_cache(tokens[:, pos + 1 :], state=before, names_filter=names)[1]
    for name in names:
        assert relative(cache[name][:, pos + 1 :], fresh[name]) < 1e-12
    assert pos == 0 or relative(logits[:, :pos], model(tokens)[:, :pos]) < 1e-12


NINE = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0], [6, 7, 0, 1, 0, 0, 1, 2, 3]])  # three documents and four
HOLES = torch.tensor([[1, 0, 0, 1, 1, 0, 1, 1, 1], [0, 1, 1, 1, 0, 1, 1, 0, 0]]).bool()


@torch.no_grad()
def padding_and_holes_leave_states_of_their_own(model, tokens, heard):
    """`tokens` [2, 9]; also what each row of a padded batch leaves is what it leaves alone."""
    listen = [("*.hook_state", lambda x, hook: None)] if heard else []
    for side in ("left", "right"):
        given, mask = padded([tokens[0], tokens[1, :5]], side)
        with model.hooks(listen):
            logits, state = model(given, attention_mask=mask, return_state=True)
        for i, row in enumerate((tokens[0], tokens[1, :5])):
            alone, own = model(row[None], return_state=True)
            assert relative(logits[i][mask[i]], alone[0]) < 1e-12
            assert all(relative(state[key][i : i + 1], own[key]) < 1e-12 for key in own)
    with model.hooks(listen):
        logits = model(tokens, attention_mask=HOLES)
    for i in range(2):
        assert relative(logits[i][HOLES[i]], model(tokens[i][HOLES[i]][None])[0]) < 1e-12


@torch.no_grad()
def documents_leave_states_of_their_own(model, tokens, heard):
    """`tokens` [2, 9], as NINE, of models that have no positions but those; also what a row leaves is its last document's."""
    prefix = torch.randint(40, (2, 5), generator=torch.Generator().manual_seed(7))
    _, before = model(prefix, return_state=True)
    for state in (None, before):
        names = everything if heard else "hook_logits"
        logits, cache = model.run_with_cache(tokens, position_ids=NINE, state=state, names_filter=names)
        _, left = model(tokens, position_ids=NINE, state=state, return_state=True)
        for row in range(2):
            begins = [0, *(i for i in range(1, 9) if NINE[row, i] == 0), 9]
            for number, part in enumerate(slice(a, b) for a, b in pairwise(begins)):
                begun = state is not None and number == 0 and NINE[row, 0] > 0
                own = {"state": state.rows([row])} if begun else {}
                alone, end = model(tokens[row : row + 1, part], return_state=True, **own)
                assert relative(logits[row, part], alone[0]) < 1e-12
            assert all(relative(left[key][row : row + 1], end[key]) < 1e-12 for key in end)
        for layer in range(model.cfg.n_layers) if heard else ():
            A = gl.implicit_attention(cache, layer=layer)
            numbers = (NINE == 0).cumsum(1)
            apart = (numbers.unsqueeze(2) != numbers.unsqueeze(1)).unsqueeze(1)
            assert A.check().relative < 1e-12 and (A.dense() * apart == 0).all()

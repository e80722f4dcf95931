"""Packed documents, told apart by position_ids: on every language architecture each is as if it stood alone."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import gatedlens as gl
from tests.helpers import kept, relative

TOKENS = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(0))
PREFIX = torch.randint(40, (2, 5), generator=torch.Generator().manual_seed(7))
SUFFIX = torch.randint(40, (2, 4), generator=torch.Generator().manual_seed(8))
PACKED = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0], [5, 6, 0, 1, 0, 0, 1, 2, 3]])  # three documents and four


def documents(row: int) -> list[slice]:
    """Where the documents of a row of PACKED are; the first of the second row goes on from a state."""
    begins = [0, *(i for i in range(1, 9) if PACKED[row, i] == 0), 9]
    return [slice(a, b) for a, b in pairwise(begins)]


@torch.no_grad()
@pytest.mark.parametrize("continued", [False, True], ids=["", "from a state"])
@pytest.mark.parametrize("listening", [False, True], ids=["", "inside"])
def test_packed_documents_are_as_if_each_stood_alone(lm, continued, listening):
    state = lm(PREFIX, return_state=True)[1] if continued else None
    names = (lambda name: True) if listening else "hook_logits"
    cache = lm.run_with_cache(TOKENS, position_ids=PACKED, state=state, names_filter=names)[1]
    _, left = lm(TOKENS, position_ids=PACKED, state=state, return_state=True)
    onward = lm(SUFFIX, state=left)
    for row in range(2):
        for number, part in enumerate(documents(row)):
            begun = continued and number == 0 and PACKED[row, 0] > 0
            own = {"state": state.rows([row])} if begun else {}
            own["position_ids"] = PACKED[row : row + 1, part]
            alone = lm.run_with_cache(TOKENS[row : row + 1, part], names_filter=names, **own)[1]
            for name in cache:
                dims = lm.names.points[name].dims
                if dims[1] == "pos" and "key_pos" not in dims and not name.endswith("hook_reset"):
                    assert relative(cache[name][row, part], alone[name][0]) < 1e-10, name
        _, end = lm(TOKENS[row : row + 1, part], return_state=True, **own)
        assert (
            relative(onward[row], lm(SUFFIX[row : row + 1], state=end)[0]) < 1e-10
        )  # what is left is the last document's


@torch.no_grad()
def test_the_implicit_attention_stays_within_documents(lm):
    state = lm(PREFIX, return_state=True)[1]
    numbers = (PACKED == 0).cumsum(1)
    apart = (numbers.unsqueeze(2) != numbers.unsqueeze(1)).unsqueeze(1)
    for start in (None, state):
        cache = lm.run_with_cache(TOKENS, position_ids=PACKED, state=start)[1]
        for layer in range(lm.cfg.n_layers):
            A = gl.implicit_attention(cache, layer=layer)
            assert A.check().relative < 1e-10
            dense = A.dense()
            assert (dense * apart == 0).all() and (dense * ~apart != 0).any()


@torch.no_grad()
def test_documents_and_padding_together(lm):
    mask = torch.tensor([[False, False] + [True] * 7, [True] * 4 + [False] + [True] * 4])
    places = torch.tensor([[0, 0, 0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 0, 4, 0, 1, 2]])
    out = lm(TOKENS, attention_mask=mask, position_ids=places)
    assert relative(out[0, 2:5], lm(TOKENS[:1, 2:5])[0]) < 1e-10
    assert relative(out[0, 5:], lm(TOKENS[:1, 5:])[0]) < 1e-10
    assert relative(out[1, 6:], lm(TOKENS[1:, 6:])[0]) < 1e-10
    whole = lm(torch.cat([TOKENS[1:, :4], TOKENS[1:, 5:6]], dim=1))[0]
    assert relative(out[1, [0, 1, 2, 3, 5]], whole) < 1e-10


def test_gradients_are_those_of_the_documents_alone(lm):
    weights = [p for p in lm.wrapped.parameters() if p.requires_grad]
    part = slice(3, 8)
    embedded = lm.embed(TOKENS).detach().requires_grad_()
    out = lm(embedded, start_at_layer=0, position_ids=PACKED)[0, part].pow(2).sum()
    grad, *packed = torch.autograd.grad(out, [embedded, *weights], allow_unused=True)
    outside = torch.ones_like(grad, dtype=torch.bool)
    outside[0, part] = False
    assert (grad[~outside] != 0).any() and (grad[outside] == 0).all()
    alone = lm(embedded[:1, part], start_at_layer=0).pow(2).sum()
    own, *separate = torch.autograd.grad(alone, [embedded, *weights], allow_unused=True)
    assert relative(grad, own) < 1e-10
    for a, b in zip(packed, separate, strict=True):
        assert (a is None) == (b is None) and (a is None or relative(a, b) < 1e-10)


def _reset(value: float, at: int):
    """A hook that says of one position how much of the state before it is forgotten."""

    def put(reset, hook):
        reset = reset.clone()
        reset[:, at] = value
        return reset

    return put


@torch.no_grad()
@pytest.mark.parametrize("value", [0.3, 1.0])
@pytest.mark.parametrize("at", [0, 4])
def test_a_reset_forgets_as_much_of_the_state_as_it_says(lm, value, at):
    """The implicit attention knows it too, from a carried state as well."""
    layer = next(i for i in range(lm.cfg.n_layers) if f"blocks.{i}.mixer.hook_reset" in lm.names.points)
    name, state = f"blocks.{layer}.mixer.hook_", lm(PREFIX, return_state=True)[1]
    with lm.hooks([(name + "reset", _reset(value, at))]):
        logits, cache = lm.run_with_cache(TOKENS, state=state, names_filter=lambda name: True)
        assert relative(lm(TOKENS, state=state), logits) < 1e-10  # with nobody inside
    start, states = cache[name + "state_start"], cache[name + "state"]
    plain = lm.run_with_cache(TOKENS, state=state, names_filter=lambda name: True)[1]
    before = start if at == 0 else states[:, at - 1]
    left = kept(plain, name.removesuffix("hook_"), (1 - value) * before, at)  # of a delta rule, too
    assert relative(states[:, at], left + cache[name + "write"][:, at]) < 1e-10
    assert relative(cache[name + "decay"][:, at + 1], plain[name + "decay"][:, at + 1]) < 1e-12
    A = gl.implicit_attention(cache, layer=layer)
    assert A.check().relative < 1e-10


@pytest.mark.parametrize("value", [0.0, 0.4])
def test_a_reset_has_a_gradient(lm, value):
    """Nobody inside or somebody: the same, and that of finite differences."""
    layer = next(i for i in range(lm.cfg.n_layers) if f"blocks.{i}.mixer.hook_reset" in lm.names.points)
    name = f"blocks.{layer}.mixer.hook_"

    def at(reset):
        return lm.run_with_hooks(TOKENS, fwd_hooks=[(name + "reset", lambda _, hook: reset)]).pow(2).sum()

    reset = torch.zeros(2, 9, 1, dtype=torch.float64)
    reset[:, 4] = value
    live = reset.clone().requires_grad_()
    (grad,) = torch.autograd.grad(at(live), live)
    step = torch.zeros_like(reset)
    step[:, 4] = 1e-6
    with torch.no_grad():
        slope = (at(reset + step) - at(reset - step)) / 2e-6
    assert abs(grad[:, 4].sum() - slope) < 1e-6 * abs(slope)
    with lm.hooks([(name + "decay", lambda decay, hook: decay * 1.0)]):
        inside = torch.autograd.grad(at(live), live)[0]
    assert relative(grad, inside) < 1e-9


def test_what_is_no_position_is_refused(lm):
    with pytest.raises(gl.InputError, match=r"position_ids have shape \[2, 8\]; the input is \[2, 9\]"):
        lm(TOKENS, position_ids=PACKED[:, :8])
    with pytest.raises(gl.InputError, match=r"position_ids are torch.float64; they are whole numbers"):
        lm(TOKENS, position_ids=PACKED.double())
    with pytest.raises(gl.InputError, match=r"position_ids are torch.bool"):
        lm(TOKENS, position_ids=PACKED == 0)

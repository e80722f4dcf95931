"""The state lens: the own state through the own read is the mixer's output; heads, entries and logits add up; mistakes."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens import lens
from tests.helpers import example, padded

AT = 4


def same(a, b):
    return torch.allclose(a, b, rtol=1e-10, atol=1e-11)


def before(model) -> int:
    """1 where a position reads the state of the one before."""
    return int(model.cfg.architecture in ("rwkv", "rwkv6"))


def test_the_own_state_through_the_own_read_is_the_mixer_s_output(model, clean):
    found = lens.state_lens(model, clean, example(model), pos=AT)
    here = AT + before(model)
    for said, rest, readout in zip(
        found.resid, found.rest, found.readouts[:: len(found.readouts) // len(found.rest)], strict=True
    ):
        assert same((said + rest)[:, here], clean[readout.written][:, here])
        assert said[:, here].abs().max() > 1e-3
    logits = found.logits(found.layers[-1])
    want = model.unembed(model.ln_final(found.resid[-1]))
    assert torch.equal(logits, want)


def test_another_state_is_read_as_the_recurrence_reads_it():
    """Literally, in Mamba: W_out (gate . (S C)), S the other prompt's."""
    model = gl.HookedMamba.tiny(dtype=torch.float64)
    ours, theirs = example(model, 2, 6), example(model, 2, 9, seed=5)
    found = lens.state_lens(model, theirs, ours, pos=torch.tensor([3, 7]))
    _, cache = model.run_with_cache(ours, names_filter="*")
    _, other = model.run_with_cache(theirs, names_filter="*.hook_state")
    for layer, said in zip(found.layers, found.resid, strict=True):
        state = other["state", layer][torch.arange(2), torch.tensor([3, 7])]
        read, gate = cache["C", layer], cache["gate", layer]
        scan = torch.einsum("bcn,bpn->bpc", state, read)
        assert same(said, (scan * gate) @ model.blocks[layer].mixer.output_weights()[0].T)


def test_what_the_states_give_to_a_logit_adds_up(lm, clean_lm):
    """With the own state: state and rest are the mixer's component of `logit_attribution`; entries sum to the state's."""
    tokens, cache = clean_lm
    here = AT + before(lm)
    found = lens.state_lens(lm, cache, tokens, pos=AT)
    components = lens.logit_attribution(lm, tokens, 3, 5, pos=here)
    given = found.attribution(3, 5, at=here)
    assert given.axes == ("batch", "layer") and given["layer"] == found.layers
    reading = lens.logit_shares.Reading.of(lm, found.cache, 3, 5, here, ())
    for layer, rest, readout in zip(found.layers, found.rest, found.readouts, strict=True):
        name = readout.written.rpartition("hook_")[2]
        want = components.at(component=f"{layer}_{name}").values
        assert same(given.at(layer=layer).values + reading.at(f"{layer}_{name}").of_stream(rest), want)
    if lm.cfg.architecture == "rwkv":
        with pytest.raises(gl.InputError, match="not linear in its state"):
            found.shares(3, 5, at=here)
        return
    for layer in found.layers:
        shares = found.shares(3, 5, at=here, layer=layer)
        assert shares.axes[0] == "batch" and shares.facts["error"] < 1e-10
        assert same(shares.values.flatten(1).sum(1), given.at(layer=layer).values)
    if "head" in shares.axes:
        some = lens.state_lens(lm, cache, tokens, pos=AT, layers=layer, head=1).attribution(3, 5, at=here)
        heads = shares.values.flatten(3).sum((2, 3)) if shares.axes[1] == "head" else None
        assert same(some.values[:, 0], heads[:, 1])


@pytest.fixture
def clean_lm(lm):
    tokens = example(lm)
    with torch.no_grad():
        return tokens, lm.run_with_cache(tokens, names_filter=["*.hook_state", "blocks.0.hook_resid_pre"])[1]


def test_a_source_is_an_input_a_cache_or_a_state(lm, clean_lm):
    tokens, cache = clean_lm
    reader = example(lm, 1, 5, seed=3)
    found = lens.state_lens(lm, cache, reader)
    assert len(found.resid[0]) == 2, "one row of the reader goes for all of the source"
    by_input = lens.state_lens(lm, tokens, reader)
    with torch.no_grad():
        _, state = lm(tokens, return_state=True)
    by_state = lens.state_lens(lm, state, reader)
    for a, b, c in zip(found.resid, by_input.resid, by_state.resid, strict=True):
        assert same(a, b) and same(a, c)


def test_padded_rows_are_read_as_they_are_alone(lm):
    tokens = example(lm)
    rows = [tokens[0], tokens[1, :4]]
    both = lens.state_lens(lm, padded(rows, "left"), padded(rows, "right"))
    alone = lens.state_lens(lm, rows[1].unsqueeze(0), rows[1].unsqueeze(0))
    for layer in both.layers:
        assert same(both.logits(layer)[1, :4], alone.logits(layer)[0])
    assert both.words(1) == alone.words()


def test_a_vision_model_reads_two_states():
    model = gl.HookedViM.tiny(dtype=torch.float64)
    x = example(model)
    both = lens.state_lens(model, x, example(model, seed=2), pos=AT)
    parts = [lens.state_lens(model, x, example(model, seed=2), pos=AT, scan=scan) for scan in ("fwd", "bwd")]
    for one, fwd, bwd in zip(both.resid, *(part.resid for part in parts), strict=True):
        assert not same(one, fwd) and not same(one, bwd)
    with pytest.raises(gl.InputError, match="reads 2 states: choose one by scan"):
        both.shares(1)
    assert parts[0].shares(1).axes == ("batch", "channel", "state")


def test_mistakes_about_states_are_explained():
    model = gl.HookedGriffin.tiny(dtype=torch.float64)
    tokens = example(model)
    for ask, error, message in (
        (lambda: lens.state_lens(model, tokens, tokens, layers=2), gl.PointError, "Layer 2 .* has no recurrence"),
        (lambda: lens.state_lens(model, tokens, tokens, pos=99), gl.InputError, "pos=99 is out of range"),
        (lambda: lens.state_lens(model, tokens, tokens, batch=0), gl.InputError, "reads every row at every position"),
        (lambda: lens.state_lens(model, tokens, tokens, head=0), gl.PointError, "has no axis 'head'"),
        (lambda: lens.state_lens(model, tokens, tokens, channel=999), gl.InputError, "channel=999 is out of range"),
        (lambda: lens.state_lens(model, tokens, tokens, scan="fwd"), gl.InputError, "has one scan"),
        (
            lambda: lens.state_lens(model, tokens, tokens[[0, 1, 0]]),
            gl.InputError,
            "The source has 2 rows and the reader 3",
        ),
        (lambda: lens.state_lens(model, model.run_with_cache(tokens)[1], tokens), gl.PointError, "The source holds no"),
        (lambda: lens.state_lens(model, tokens, tokens).logits(2), gl.InputError, "this state lens reads 0, 1"),
    ):
        with pytest.raises(error, match=message):
            ask()
    assert not model.list_hooks()

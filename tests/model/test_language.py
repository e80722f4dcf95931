"""Language models: text and tokens, loss, padding, state at every split, generation, bad input."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import gatedlens as gl
from gatedlens.hooks.mamba import HookedMamba
from gatedlens.model.generation import sample
from tests.helpers import example, padded, relative

# -- text -----------------------------------------------------------------------------------------------------------


def test_text_to_tokens_and_back(moby_model):
    tokens = moby_model.to_tokens("Call me")
    assert tokens.tolist() == [[256, *b"Call me"]]
    assert moby_model.to_tokens("Call me", prepend_bos=False).tolist() == [list(b"Call me")]
    assert moby_model.to_string(tokens[0, 1:]) == "Call me"
    assert moby_model.to_string(tokens[:, 1:]) == ["Call me"]
    assert moby_model.to_str_tokens("Ah — a") == ["<bos>", "A", "h", " ", "�", "�", "�", " ", "a"]
    assert moby_model.to_single_token("C") == ord("C")
    assert moby_model.to_tokens(["abd", "abc"]).shape == (2, 4)
    assert moby_model.to_tokens("x" * 3000, truncate=True).shape == (1, 2048)
    with pytest.raises(gl.InputError, match="is 2 tokens"):
        moby_model.to_single_token("Ca")


@torch.no_grad()
def test_text_runs_as_its_tokens_do(moby_model):
    assert torch.equal(moby_model("Call me"), moby_model(moby_model.to_tokens("Call me")))
    both = moby_model(["Call me", "It"])
    assert relative(both[1, -3:], moby_model("It")[0]) < 1e-5


def test_without_a_tokenizer_text_is_refused():
    with pytest.raises(gl.InputError, match="needs a tokenizer and tiny-mamba has none"):
        HookedMamba.tiny()("Call me")


# -- loss -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_loss_is_cross_entropy_of_the_next_token(lm):
    tokens = example(lm)
    logits, loss = lm(tokens, return_type="both")
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert torch.allclose(loss, want) and torch.allclose(lm(tokens, return_type="loss"), want)
    assert torch.allclose(lm(tokens, return_type="loss", loss_per_token=True).mean(), want)
    with pytest.raises(gl.InputError, match="at least two tokens"):
        lm(tokens[:, :1], return_type="loss")


@torch.no_grad()
def test_loss_of_a_padded_batch_is_that_of_its_real_tokens(lm):
    rows = [example(lm, 1, n, seed=n)[0] for n in (4, 7)]
    for side in ("left", "right"):
        tokens, mask = padded(rows, side)
        total = sum(lm(row.unsqueeze(0), return_type="loss") * (len(row) - 1) for row in rows)
        loss = lm(tokens, return_type="loss", attention_mask=mask)
        assert torch.allclose(loss, total / sum(len(row) - 1 for row in rows))


# -- padding --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("lengths", [(5, 9, 1), (3,)], ids=str)
def test_a_padded_batch_equals_its_rows_alone(lm, side, lengths):
    rows = [example(lm, 1, n, seed=n)[0] for n in lengths]
    tokens, mask = padded(rows, side)
    if len(rows) == 1:
        tokens = F.pad(tokens, (2, 0) if side == "left" else (0, 2), value=1)
        mask = F.pad(mask, (2, 0) if side == "left" else (0, 2), value=False)
    logits, state = lm(tokens, attention_mask=mask, return_state=True)
    for i, row in enumerate(rows):
        alone, own = lm(row.unsqueeze(0), return_state=True)
        assert relative(logits[i][mask[i]], alone[0]) < 1e-10
        after = lm(example(lm, 1, 3), state=state.rows([i]))
        assert relative(after, lm(example(lm, 1, 3), state=own)) < 1e-10
    assert torch.isfinite(logits).all()


@torch.no_grad()
def test_padding_in_the_middle_and_between_calls(lm):
    """Right-padded prompts, then more tokens: each row's windows reach over its padding."""
    rows = [example(lm, 1, n, seed=n)[0] for n in (2, 6)]
    tokens, mask = padded(rows, "right")
    more = example(lm, 2, 4, seed=9)
    both = lm(torch.cat([tokens, more], 1), attention_mask=torch.cat([mask, torch.ones(2, 4, dtype=torch.bool)], 1))
    _, state = lm(tokens, attention_mask=mask, return_state=True)
    split = lm(more, state=state)
    for i, row in enumerate(rows):
        alone = lm(torch.cat([row, more[i]]).unsqueeze(0))[0, len(row) :]
        assert relative(both[i, -4:], alone) < 1e-10
        assert relative(split[i], alone) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_holds_whatever_a_hook_does_there(lm, side):
    """Constant decay, write and (where there is one) dt at every position, masked ones too: rows still equal rows alone."""
    rows = [example(lm, 1, n, seed=n)[0] for n in (3, 6)]
    tokens, mask = padded(rows, side)
    for leaf in ("hook_decay", "hook_write", "hook_dt", "hook_log_decay"):
        names = [n for n in lm.names if n.endswith(f".{leaf}")]
        if not names:
            continue
        value = -0.3 if leaf == "hook_log_decay" else 0.3
        with lm.hooks([(n, lambda x, hook, value=value: torch.full_like(x, value)) for n in names]):
            logits, state = lm(tokens, attention_mask=mask, return_state=True)
            for i, row in enumerate(rows):
                alone, own = lm(row.unsqueeze(0), return_state=True)
                assert relative(logits[i][mask[i]], alone[0]) < 1e-10, leaf
                assert relative(lm(tokens[:1], state=state.rows([i])), lm(tokens[:1], state=own)) < 1e-10, leaf


@torch.no_grad()
def test_nothing_leaks_from_masked_positions(lm):
    """NaN in the stream at padding stays there."""
    tokens, mask = padded([example(lm, 1, 3, seed=1)[0], example(lm, 1, 6)[0]], "left")
    resid = lm(tokens, stop_at_layer=0)
    clean = lm(resid, start_at_layer=0, attention_mask=mask)
    resid[0, :3] = torch.nan
    dirty = lm(resid, start_at_layer=0, attention_mask=mask)
    assert torch.equal(dirty[mask], clean[mask])
    loss = lm(resid, "loss", start_at_layer=0, attention_mask=mask, tokens=tokens)
    assert torch.isfinite(loss)


@torch.no_grad()
def test_loss_over_holes_is_that_of_the_row_alone(lm):
    tokens, mask = example(lm, 1, 5), torch.tensor([[1, 0, 1, 1, 0]])
    want = lm(tokens[:, [0, 2, 3]], return_type="loss", loss_per_token=True)[0]
    assert torch.allclose(lm(tokens, return_type="loss", attention_mask=mask), want.mean())
    got = lm(tokens, return_type="loss", loss_per_token=True, attention_mask=mask)[0]
    assert torch.allclose(got[[0, 2]], want) and got[[1, 3]].abs().max() == 0
    with pytest.raises(gl.InputError, match="at least two tokens"):
        lm(tokens, return_type="loss", attention_mask=torch.tensor([[0, 0, 1, 0, 0]]))


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6).filter(any), min_size=1, max_size=3), st.integers(0, 5))
@torch.no_grad()
def test_any_mask_equals_rows_alone(mask, seed):
    mask = torch.tensor(mask)
    tokens = example(TINY, len(mask), 6, seed)
    logits = TINY(tokens, attention_mask=mask)
    for i in range(len(mask)):
        assert relative(logits[i][mask[i]], TINY(tokens[i][mask[i]].unsqueeze(0))[0]) < 1e-10


TINY = HookedMamba.tiny(dtype=torch.float64)


# -- state ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_prefix_and_suffix_equal_the_whole_at_every_split(lm):
    tokens = example(lm, pos=8)
    whole, last = lm(tokens, return_state=True)
    for cut in range(1, 8):
        first, state = lm(tokens[:, :cut], return_state=True)
        kept = state.clone()
        second, end = lm(tokens[:, cut:], state=state, return_state=True)
        assert relative(torch.cat([first, second], 1), whole) < 1e-10, cut
        assert end.seen.tolist() == [8, 8] and state.seen.tolist() == [cut, cut]
        assert all(torch.equal(state[k], kept[k]) for k in kept), "the call changed the state it was given"
        assert all(relative(end[k], last[k]) < 1e-10 for k in last if last[k].is_floating_point())


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 9))
@torch.no_grad()
def test_any_split_into_pieces_equals_the_whole(pieces, seed):
    tokens = example(TINY, 2, sum(pieces), seed)
    state, parts = None, []
    for part in tokens.split(pieces, dim=1):
        logits, state = TINY(part, state=state, return_state=True)
        parts.append(logits)
    assert relative(torch.cat(parts, 1), TINY(tokens)) < 1e-10


@torch.no_grad()
def test_a_state_stays_the_same_size_however_much_was_read(lm):
    """Generation in constant memory per step: what is carried does not grow (an attention window only fills up).

    Attention over all positions must keep them all, a position as many numbers as the last.
    """
    _, state = lm.generate(example(lm, pos=12), max_new_tokens=8, do_sample=False, return_state=True, verbose=False)
    _, later = lm.generate(example(lm, pos=12), max_new_tokens=60, do_sample=False, return_state=True, verbose=False)
    assert later.seen.tolist() == [72, 72]
    unbounded = [key for key in state if state[key].shape != later[key].shape]
    assert all(lm.carried[key.rpartition(".")[2]].part == "window" for key in unbounded)
    assert all(state[key].shape[1] == 20 and later[key].shape[1] == 72 for key in unbounded)
    windowed = getattr(lm.cfg, "window_size", None) is not None
    assert not unbounded or not windowed
    assert all(state[key].nbytes == later[key].nbytes for key in state if key not in unbounded)


def test_gradients_flow_through_the_state(lm):
    tokens = example(lm, pos=8)
    weight = torch.randn(2, 3, lm.cfg.d_vocab_out, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    embedded = lm(tokens, stop_at_layer=0).detach().requires_grad_()
    (want,) = torch.autograd.grad((lm(embedded, start_at_layer=0)[:, 5:] * weight).sum(), embedded)
    _, state = lm(embedded[:, :5], start_at_layer=0, return_state=True)
    out = lm(embedded[:, 5:], start_at_layer=0, state=state)
    (got,) = torch.autograd.grad((out * weight).sum(), embedded)
    assert relative(got, want) < 1e-10


@torch.no_grad()
def test_a_state_is_saved_loaded_picked_and_edited(lm, tmp_path):
    tokens = example(lm)
    _, state = lm(tokens, return_state=True)
    state.save(tmp_path / "state.safetensors")
    loaded = gl.RecurrentState.load(tmp_path / "state.safetensors")
    assert list(loaded) and set(loaded) == set(state) and all(torch.equal(loaded[k], state[k]) for k in state)
    assert torch.equal(lm(tokens, state=loaded), lm(tokens, state=state))
    assert torch.equal(lm(tokens[:1], state=state.rows([1])), lm(tokens[:1], state=loaded.rows([1])))
    key = next(iter(state))
    with pytest.raises(gl.InputError, match="has shape"):
        state[key] = torch.zeros(1)
    with pytest.raises(gl.InputError, match="The state holds no"):
        state["nonsense", 0]
    with pytest.raises(gl.InputError, match="holds 2 rows and the input 3"):
        lm(example(lm, 3), state=state)
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(gl.CheckpointError, match="not a readable safetensors"):
        gl.RecurrentState.load(tmp_path / "bad.safetensors")
    assert "RecurrentState(seen [7, 7]" in repr(state) and state.batch_size == 2


# -- generation -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_greedy_generation_is_the_argmax_of_the_whole_each_time(lm):
    tokens = example(lm, pos=5)
    out = lm.generate(tokens, max_new_tokens=6, temperature=0, verbose=False)
    whole = tokens
    for _ in range(6):
        whole = torch.cat([whole, lm(whole)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, whole)


@torch.no_grad()
def test_a_padded_batch_generates_what_its_rows_do(lm):
    rows = [example(lm, 1, n, seed=n)[0] for n in (3, 6)]
    for side in ("left", "right"):
        tokens, mask = padded(rows, side)
        out = lm.generate(tokens, max_new_tokens=5, do_sample=False, attention_mask=mask, verbose=False)
        for i, row in enumerate(rows):
            alone = lm.generate(row.unsqueeze(0), max_new_tokens=5, do_sample=False, verbose=False)
            assert torch.equal(out[i, -5:], alone[0, -5:])


@torch.no_grad()
def test_seeds_states_and_hooks_while_generating(lm):
    tokens = example(lm, pos=4)
    a, b, c = (lm.generate(tokens, max_new_tokens=8, seed=s, verbose=False) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    calls = []
    with lm.hooks([("blocks.0.hook_mixer_out", lambda x, hook: calls.append(x.shape[1]))]):
        lm.generate(tokens, max_new_tokens=4, verbose=False)
    assert calls == [4, 1, 1, 1]
    first, state = lm.generate(tokens, max_new_tokens=3, do_sample=False, return_state=True, verbose=False)
    assert state.seen.tolist() == [7, 7]
    whole = lm.generate(tokens, max_new_tokens=3, do_sample=False, verbose=False)
    assert torch.equal(first, whole)


@torch.no_grad()
def test_generation_stops_at_eos_row_by_row(lm):
    tokens = example(lm, 4, 5)
    free = lm.generate(tokens, max_new_tokens=12, seed=0, verbose=False)[:, 5:]
    eos = int(free[0, 2])
    out = lm.generate(tokens, max_new_tokens=12, seed=0, eos_token_id=eos, verbose=False)[:, 5:]
    for row, unstopped in zip(out.tolist(), free.tolist(), strict=True):
        if eos in row:
            at = row.index(eos)
            assert row[: at + 1] == unstopped[: at + 1] and set(row[at:]) == {eos}
    assert eos in out[0].tolist()


def test_sampling_keeps_to_top_k_and_top_p():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0]]).expand(4000, -1)
    generator = torch.Generator().manual_seed(0)
    assert set(sample(logits, top_k=2, generator=generator).tolist()) == {0, 1}
    probs = logits[0].softmax(-1)
    assert probs[:2].sum() < 0.9 < probs[:3].sum()
    assert set(sample(logits, top_p=0.9, generator=generator).tolist()) == {0, 1, 2}
    cold = sample(logits, temperature=0.5, generator=generator)
    want = (logits[0] / 0.5).softmax(-1)[0].item()
    assert abs((cold == 0).float().mean().item() - want) < 4 * math.sqrt(want * (1 - want) / 4000)
    assert set(sample(logits, temperature=0).tolist()) == {0}


@torch.no_grad()
def test_text_in_text_out(moby_model, capsys):
    out = moby_model.generate("Call me", max_new_tokens=5, seed=0, verbose=False)
    assert out.startswith("Call me") and len(out.encode()) >= 12
    assert len(moby_model.generate(["Call", "It was"], max_new_tokens=2, seed=0, verbose=False)) == 2
    assert moby_model.generate("Call me", max_new_tokens=2, return_type="tokens", verbose=False).shape == (1, 10)
    assert moby_model.generate("Call me", max_new_tokens=0, verbose=False) == "Call me"
    assert capsys.readouterr().err == ""
    moby_model.generate("Call me", max_new_tokens=2)
    assert "generating" in capsys.readouterr().err


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("input", "options", "message"),
    [
        (torch.tensor([[1, 2, 999]]), {}, "Token id 999 at row 0, position 2 is out of range"),
        (torch.tensor([[1, -1]]), {}, "Token id -1 at row 0, position 1"),
        (torch.zeros(1, 0, dtype=torch.long), {}, "The input is empty"),
        (torch.zeros(1, 3), {}, "Tokens must be integer ids; these are torch.float32"),
        (torch.zeros(1, 2, 3, dtype=torch.long), {}, r"these have shape \[1, 2, 3\]"),
        ([[1, 2], [3]], {}, "neither text nor a rectangle of token ids"),
        (
            torch.ones(2, 3, dtype=torch.long),
            {"attention_mask": torch.ones(2, 4)},
            r"attention_mask has shape \[2, 4\]",
        ),
        (torch.ones(2, 3, dtype=torch.long), {"attention_mask": torch.zeros(2, 3)}, "masks all of row 0"),
        (torch.ones(1, 3, dtype=torch.long), {"attention_mask": torch.full((1, 3), 0.5)}, "values other than 0"),
        (torch.ones(1, 3, dtype=torch.long), {"return_type": "logit"}, "return_type='logit'"),
        (torch.ones(1, 3, dtype=torch.long), {"start_at_layer": 1}, "runs from a residual stream"),
        (torch.zeros(1, 3, 5), {"start_at_layer": 1}, "runs from a residual stream"),
        ([], {}, "empty"),
    ],
)
def test_bad_input_is_explained(lm, input, options, message):
    with pytest.raises(gl.InputError, match=message):
        lm(input, **options)


@pytest.mark.parametrize(
    "option", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"max_new_tokens": -1}], ids=str
)
def test_bad_sampling_options_are_explained(lm, option):
    with pytest.raises(gl.InputError, match=next(iter(option))):
        lm.generate(torch.ones(1, 2, dtype=torch.long), **option)


def test_bad_text_options_are_explained(moby_model):
    with pytest.raises(gl.InputError, match="padding_side='middle'"):
        moby_model(["a", "bc"], padding_side="middle")
    with pytest.raises(gl.InputError, match="has no tokens"):
        moby_model("", prepend_bos=False)


def test_the_side_that_texts_are_padded_on():
    """The argument, else what was set on the model's tokenizer, else the left; what a tokenizer comes with is no choice."""
    model = gl.from_pretrained("gatedlens/mamba-moby", device="cpu")

    def side(**options):
        mask = model.to_tokens_and_mask(["Call", "Call me"], **options)[1]
        return "left" if mask[0, -1] else "right"

    assert model.tokenizer.padding_side == "right" and side() == "left"
    assert side(padding_side="right") == "right"
    for chosen, other in (("right", "left"), ("left", "right")):
        model.tokenizer.padding_side = chosen
        assert side() == chosen and side(padding_side=other) == other
        assert model.generate(["Call", "Call me"], max_new_tokens=1, return_type="tokens", verbose=False).shape[1] == 9
    model.set_tokenizer(model.tokenizer)
    assert side() == "left" and copy.deepcopy(model.tokenizer).padding_side == "left"
    model.tokenizer.padding_side = "middle"
    with pytest.raises(gl.InputError, match="padding_side='middle'"):
        side()


# -- what a tokenizer returned, and no return -----------------------------------------------------------------------


@torch.no_grad()
def test_what_a_tokenizer_returned_is_an_input(lm):
    from transformers import BatchEncoding

    ids, mask = torch.tensor([[1, 2, 3], [0, 4, 5]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    want = lm(ids, attention_mask=mask)
    given = BatchEncoding({"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)})
    assert torch.equal(lm(**given), want) and torch.equal(lm(given), want)
    lists = BatchEncoding({"input_ids": ids.tolist(), "attention_mask": mask.tolist()})
    assert torch.equal(lm(**lists), want) and torch.equal(lm(lists), want)
    for call in (lambda: lm.run_with_cache(**given), lambda: lm.run_with_cache(given)):
        logits, cache = call()
        assert torch.equal(logits, want) and torch.equal(cache.mask, mask.bool()) and torch.equal(cache.tokens, ids)
    assert torch.equal(lm.run_with_hooks(**given, fwd_hooks=[("hook_embed", lambda x, hook: None)]), want)
    new = lm.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False, verbose=False)
    assert torch.equal(lm.generate(**given, max_new_tokens=2, do_sample=False, verbose=False), new)
    assert torch.equal(lm.generate(given, max_new_tokens=2, do_sample=False, verbose=False), new)


@pytest.mark.parametrize(
    "given, told",
    [
        (lambda ids: {}, "no input"),
        (lambda ids: {"input": ids, "input_ids": ids}, "beside an input"),
        (lambda ids: {"input_ids": ids, "token_type_ids": torch.ones_like(ids)}, "token_type_ids"),
        (lambda ids: {"input": {"input_ids": ids}, "input_ids": ids}, "input_ids is in the input"),
        (lambda ids: {"input": {"input_ids": ids, "offset_mapping": 3}}, "offset_mapping"),
        (lambda ids: {"input": {"attention_mask": torch.ones_like(ids)}}, "no input"),
    ],
)
def test_what_a_tokenizer_returned_and_cannot_be_read_is_told(lm, given, told):
    for call in (lm, lm.run_with_cache):
        with pytest.raises(gl.InputError, match=told):
            call(**given(torch.tensor([[1, 2, 3]])))

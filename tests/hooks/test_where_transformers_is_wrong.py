"""Where transformers' own forward of a hybrid is wrong, line by line: each is wrong there as described, and right here.

Right is what transformers itself says of a row that stands alone, in one call, in true float64. A line that transformers has put
right fails with "put it right": then the docstring of its architecture says too much.
"""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from tests.helpers import padded, relative
from tests.hooks import battery, test_jamba, test_mamba2, test_mamba2_hybrid, test_zamba

TOKENS = torch.randint(40, (2, 11), generator=torch.Generator().manual_seed(0))
WRONG, RIGHT = 1e-3, 1e-11
PUT_RIGHT = "transformers has put it right: say so"
BIAS = {"Nemotron-H": "use_bias", "Zamba2": "add_bias_linear", "Mamba-2": "use_bias"}
AROUND = ("Bamba", "Granite", "Falcon-H1", "Nemotron-H", "Zamba2")
EVERY = ("Mamba-2", *AROUND, "Jamba", "Zamba")


def theirs_of(family: str, **sizes):
    """transformers' model of a family, small, in float64."""
    if family in AROUND:
        return test_mamba2_hybrid.wrapped(family, **sizes)
    if family == "Mamba-2":
        return test_mamba2.hf(torch.float64, **sizes)
    return (test_jamba if family == "Jamba" else test_zamba).tiny(**sizes).wrapped


def both(family: str, **sizes):
    theirs = theirs_of(family, **sizes)
    return gl.wrap(theirs), theirs


def with_bias(family: str):
    return both(family, **{BIAS.get(family, "mamba_proj_bias"): True})


def alone(theirs, rows):
    """What transformers says of each row by itself."""
    with battery.true_float64():
        return [theirs(row[None], use_cache=False).logits[0] for row in rows]


def goes_on(theirs, first, rest, **options):
    """Its logits of `rest` from the cache that `first` leaves."""
    with battery.true_float64():
        begun = theirs(first, use_cache=True)
        return theirs(rest, past_key_values=begun.past_key_values, **options).logits


@torch.no_grad()
@pytest.mark.parametrize("family", EVERY)
def test_left_padding_with_a_bias_of_in_proj(family):
    """The mask zeroes what in_proj reads, and in_proj(0) is its bias: the conv of the first tokens reads it."""
    ours, theirs = with_bias(family)
    rows = [TOKENS[0], TOKENS[1, :5]]
    want, (tokens, mask) = alone(theirs, rows), padded(rows, "left")
    with battery.true_float64():
        got = theirs(tokens, attention_mask=mask.long(), use_cache=False).logits
    assert relative(got[1][mask[1]], want[1]) > WRONG, PUT_RIGHT
    found = ours(tokens, attention_mask=mask)
    assert all(relative(found[row][mask[row]], want[row]) < RIGHT for row in range(2))


@torch.no_grad()
def test_positions_that_go_on_from_a_cache_of_bamba():
    """Bamba alone forgets how long its cache is where position_ids are not given."""
    ours, theirs = both("Bamba")
    (want,) = alone(theirs, TOKENS[:1])
    assert relative(goes_on(theirs, TOKENS[:1, :6], TOKENS[:1, 6:])[0], want[6:]) > WRONG, PUT_RIGHT
    _, state = ours(TOKENS[:1, :6], return_state=True)
    assert relative(ours(TOKENS[:1, 6:], state=state)[0], want[6:]) < RIGHT


@torch.no_grad()
@pytest.mark.parametrize("family", ["Jamba", "Zamba"])
def test_a_state_that_several_tokens_go_on_from(family):
    """Around Mamba-1 the carried state is dropped where more than one token follows; one by one it is not."""
    ours, theirs = both(family)
    (want,) = alone(theirs, TOKENS[:1])
    assert relative(goes_on(theirs, TOKENS[:1, :6], TOKENS[:1, 6:])[0], want[6:]) > WRONG, PUT_RIGHT
    assert relative(goes_on(theirs, TOKENS[:1, :6], TOKENS[:1, 6:7])[0], want[6:7]) < RIGHT
    _, state = ours(TOKENS[:1, :6], return_state=True)
    assert relative(ours(TOKENS[:1, 6:], state=state)[0], want[6:]) < RIGHT


@torch.no_grad()
@pytest.mark.parametrize("family", ["Mamba-2", "Bamba", "Nemotron-H", "Zamba2"])
def test_the_limit_of_a_time_step_while_decoding(family):
    """A single token's time step is not limited; Nemotron-H and Zamba2 have a floor of 0.001 whatever their config says."""
    sizes = {} if family in ("Nemotron-H", "Zamba2") else {"time_step_limit": (0.3, 0.9)}
    ours, theirs = both(family, **sizes)
    for name, p in theirs.named_parameters():
        if name.endswith("dt_bias") and not sizes:
            p.fill_(-12.0)  # a softplus far below the floor
        if name.endswith("mamba.D") and not sizes:
            p.zero_()  # what is written is then all that is read
    (want,) = alone(theirs, TOKENS[:1])
    got = goes_on(theirs, TOKENS[:1, :6], TOKENS[:1, 6:7])
    assert relative(got[0], want[6:7]) > 1e-5, PUT_RIGHT
    _, state = ours(TOKENS[:1, :6], return_state=True)
    for t in range(6, 11):
        logits, state = ours(TOKENS[:1, t : t + 1], state=state, return_state=True)
        assert relative(logits[0, 0], want[t]) < RIGHT


@torch.no_grad()
@pytest.mark.parametrize("family", EVERY)
def test_a_step_after_padding_on_the_right(family):
    """At padding the time step is not masked, so the state decays, and the conv's tail ends in zeros."""
    ours, theirs = both(family)
    row = TOKENS[:1]
    (want,) = alone(theirs, row)
    tokens, mask = padded([row[0, :6], row[0, :3]], "right")
    with battery.true_float64():
        begun = theirs(tokens, attention_mask=mask.long(), use_cache=True)
        step = torch.cat([mask, torch.ones(2, 1, dtype=torch.bool)], dim=1).long()
        places = torch.tensor([[6], [3]])
        following = torch.stack([row[0, 6:7], row[0, 3:4]])
        got = theirs(
            following, past_key_values=begun.past_key_values, attention_mask=step, position_ids=places
        ).logits  # fmt: skip
    assert relative(got[1], want[3:4]) > WRONG, PUT_RIGHT
    _, state = ours(tokens, attention_mask=mask, return_state=True)
    for number, cut in enumerate((6, 3)):
        assert relative(ours(row[:, cut:], state=state.rows([number]))[0], want[cut:]) < RIGHT


@torch.no_grad()
@pytest.mark.parametrize("family", ["Mamba-2", "Bamba", "Nemotron-H"])
def test_a_row_that_has_ended_writes_nothing(family):
    """A mask on a call of one token is ignored: a row of a batch that has ended goes on writing into its state."""
    ours, theirs = both(family)
    row, both_rows = TOKENS[:1], TOKENS[:, :5]
    (want,) = alone(theirs, [torch.cat([row[0, :5], row[0, 6:7]])])
    with battery.true_float64():
        begun = theirs(row[:, :5], use_cache=True).past_key_values
        masks = [torch.tensor([[1] * 5 + later]) for later in ([0], [0, 1])]
        places = torch.tensor([[5]])
        theirs(row[:, 5:6], past_key_values=begun, attention_mask=masks[0], position_ids=places)
        got = theirs(row[:, 6:7], past_key_values=begun, attention_mask=masks[1], position_ids=places).logits
    assert relative(got[0], want[5:6]) > WRONG, PUT_RIGHT
    _, state = ours(both_rows, return_state=True)
    ended = torch.tensor([[True, True], [True, False]])  # the second row has ended behind its sixth token
    _, after = ours(TOKENS[:, 5:7], state=state, attention_mask=ended, return_state=True)
    (known,) = alone(theirs, [torch.cat([TOKENS[1, :6], TOKENS[1, 8:]])])
    assert relative(ours(TOKENS[1:, 8:], state=after.rows([1]))[0], known[6:]) < RIGHT
    with pytest.raises(gl.InputError, match="masks all of row 1: give every row at least one token"):
        ours(TOKENS[:, 5:6], state=state, attention_mask=torch.tensor([[True], [False]]))


@torch.no_grad()
@pytest.mark.parametrize("family", EVERY[1:])
def test_documents_packed_in_a_row(family):
    """Attention begins anew at position 0, the conv and the state run on."""
    ours, theirs = both(family)
    rows = [TOKENS[0], TOKENS[1, :5]]
    want = torch.cat(alone(theirs, rows))
    packed, places = torch.cat(rows)[None], torch.cat([torch.arange(11), torch.arange(5)])[None]
    with battery.true_float64():
        got = theirs(packed, position_ids=places, use_cache=False).logits
    assert relative(got[0], want) > WRONG, PUT_RIGHT
    assert relative(ours(packed, position_ids=places)[0], want) < RIGHT


def test_ties_that_a_config_claims():
    """Nemotron-H never ties its head, whatever its config says: the tensors tell."""
    ours, theirs = both("Nemotron-H", tie_word_embeddings=True)
    assert theirs.config.tie_word_embeddings and theirs.lm_head.weight is not theirs.model.embeddings.weight
    assert not ours.cfg.tie_word_embeddings
    ours, theirs = both("Bamba", tie_word_embeddings=True)
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight and ours.cfg.tie_word_embeddings


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("Bamba", {"attn_layer_indices": []}),
        ("Granite", {"layer_types": ["linear_attention"] * 2}),
    ],
)
def test_models_that_transformers_cannot_go_on_with(family, sizes):
    """Without a layer of attention a cache that goes on fails there; a state here goes on."""
    ours, theirs = both(family, **sizes)
    (want,) = alone(theirs, TOKENS[:1])
    with pytest.raises(ValueError):
        goes_on(theirs, TOKENS[:1, :6], TOKENS[:1, 6:])
    _, state = ours(TOKENS[:1, :6], return_state=True)
    assert relative(ours(TOKENS[:1, 6:], state=state)[0], want[6:]) < RIGHT

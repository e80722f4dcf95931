"""What a TransformerLens user types: `from_pretrained` on the class, get_token_position, loss_fn, generate's options, incl_mid,
logit_lens of a cache; and `help()` that shows a function's own options."""

from __future__ import annotations

import inspect

import pytest
import torch

import gatedlens as gl
from tests.helpers import example

TEXT = "Call me Ishmael"


@pytest.fixture(scope="module")
def moby():
    return gl.from_pretrained("gatedlens/mamba-moby")


def test_a_class_loads_its_own_architecture():
    assert isinstance(gl.HookedMamba.from_pretrained("gatedlens/mamba-recall"), gl.HookedMamba)
    with pytest.raises(
        gl.InputError, match=r"HookedGriffin.from_pretrained.*a Mamba model.*gl.HookedMamba.from_pretrained"
    ):
        gl.HookedGriffin.from_pretrained("gatedlens/mamba-recall")


def test_where_a_token_stands(moby):
    ids = moby.to_tokens(TEXT)
    strings = moby.to_str_tokens(TEXT)
    assert moby.get_token_position("I", TEXT) == strings.index("I")
    assert moby.get_token_position(int(ids[0, 1]), ids) == 1
    repeated = max(range(len(strings)), key=lambda i: strings[i] == "e")
    assert (
        moby.get_token_position("e", ids[0], mode="last")
        == max(i for i, s in enumerate(strings) if s == "e")
        >= repeated
    )
    for wrong, says in (
        ({"single_token": "z", "input": TEXT}, "does not stand"),
        ({"mode": "middle"}, "'first' or 'last'"),
    ):
        with pytest.raises(gl.InputError, match=says):
            moby.get_token_position(**{"single_token": "e", "input": TEXT, **wrong})
    with pytest.raises(gl.InputError, match="one row of ids"):
        moby.get_token_position("e", torch.zeros(2, 3, dtype=torch.long))


@torch.no_grad()
def test_loss_fn_is_the_loss(moby):
    texts = [TEXT, "It was the whiteness of the whale"]
    ids, mask = moby.to_tokens_and_mask(texts)
    logits, loss = moby(texts, return_type="both")
    assert torch.equal(moby.loss_fn(logits, ids, mask), loss)
    per_token = moby(texts, return_type="loss", loss_per_token=True)
    assert torch.equal(moby.loss_fn(logits, ids, mask, per_token=True), per_token)


@torch.no_grad()
def test_generation_without_the_state_of_the_last_step_is_the_same(lm):
    model = lm
    tokens = example(model)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, :2] = False
    options = {"max_new_tokens": 4, "temperature": 0, "attention_mask": mask, "verbose": False, "stop_at_eos": False}
    once, cache = model.generate(tokens, return_cache=True, names_filter="hook_logits", **options)
    again = model.generate(tokens, use_past_kv_cache=False, **options)
    assert torch.equal(once, again)  # in float64, where no near-tie is decided by rounding
    longer = torch.cat([mask, torch.ones_like(mask[:, :4])], dim=1)
    whole = model(once, attention_mask=longer)
    assert torch.equal(cache["hook_logits"], whole)


@torch.no_grad()
def test_the_middle_of_a_layer_where_there_is_one(model):
    cache = model.run_with_cache(example(model))[1]
    stack, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    plain, names = cache.accumulated_resid(return_labels=True)
    mids = [i for i in range(model.cfg.n_layers) if f"blocks.{i}.hook_resid_mid" in cache]
    assert [label for label in labels if label.endswith("_mid")] == [f"{i}_mid" for i in mids]
    assert [label for label in labels if not label.endswith("_mid")] == names
    for label, resid in zip(labels, stack, strict=True):
        if label.endswith("_mid"):
            assert torch.equal(resid, cache["resid_mid", int(label[: -len("_mid")])])
        else:
            assert torch.equal(resid, plain[names.index(label)])


@torch.no_grad()
def test_a_cache_is_read_with_its_own_model(moby):
    cache = moby.run_with_cache(TEXT)[1]
    assert torch.equal(gl.lens.logit_lens(cache).logits(0), gl.lens.logit_lens(moby, TEXT).logits(0))
    with pytest.raises(gl.InputError, match="give the cache alone"):
        gl.lens.logit_lens(cache, TEXT)


SHOWN = {
    gl.patching.sweep: {"reduce", "normalised", "results", "max_rows", "progress"},
    gl.patching.get_act_patch_resid_pre: {"reduce", "normalised", "results"},
    gl.patching.get_act_patch_by_tap: {"reduce", "results"},
    gl.circuits.eap: {"attention_mask", "position_ids"},
    gl.circuits.path_patch: {"attention_mask"},
    gl.circuits.attribution_patch: {"attention_mask"},
    gl.implicit_attention: {"attention_mask", "prepend_bos"},
    gl.evaluation.perturbation: {"measure", "shares", "batch_size"},
    gl.evaluation.insertion: {"measure", "shares", "batch_size"},
}


@pytest.mark.parametrize("function", SHOWN, ids=lambda f: getattr(f, "__name__", "get_act_patch_resid_pre"))
def test_help_shows_a_functions_own_options(function):
    parameters = inspect.signature(function).parameters
    assert SHOWN[function] <= parameters.keys(), SHOWN[function] - parameters.keys()
    assert not [one for one in parameters.values() if one.kind is one.VAR_KEYWORD]

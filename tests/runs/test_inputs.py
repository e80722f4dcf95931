"""Inputs of every kind made ready; positions counted among real tokens; labels."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens.runs import inputs
from tests.helpers import example, padded


def test_what_is_given_becomes_a_batch(model):
    x = example(model)
    batch = inputs.ready(model, x)
    assert torch.equal(batch.value, x) and inputs.real(model, batch).shape == (2, model.positions(batch))
    assert inputs.real(model, batch).all()
    _, cache = model.run_with_cache(x)
    held, again = inputs.cached(model, cache, ["hook_embed"])
    assert held is cache and again.value.shape[0] == 2
    fresh, _ = inputs.cached(model, x, ["hook_embed"])
    assert list(fresh) == ["hook_embed"] and torch.equal(fresh["hook_embed"], cache["hook_embed"])
    with pytest.raises(gl.InputError, match="cache of all positions"):
        inputs.cached(model, model.run_with_cache(x[:1], remove_batch_dim=True)[1], [])
    with pytest.raises(gl.InputError, match="This cache is one of"):
        inputs.cached(type(model).tiny(), cache, [])


def test_ids_with_a_mask(lm):
    tokens, mask = padded([example(lm, 1, n)[0] for n in (5, 3)], "left")
    assert torch.equal(inputs.real(lm, inputs.ready(lm, (tokens, mask))), mask)
    assert torch.equal(inputs.real(lm, inputs.ready(lm, tokens, attention_mask=mask)), mask)
    with pytest.raises(gl.InputError, match="leave one of the masks out"):
        inputs.ready(lm, (tokens, mask), attention_mask=mask)


def test_labels_are_tokens_where_rows_agree(recall_model, hooked):
    batch = inputs.ready(recall_model, ["A 3 and ? A", "A 4 and ? A"])
    assert inputs.labels(recall_model, batch) == ["<bos>", "A", 2, "and", "?", "A"]
    assert inputs.labels(recall_model, batch, row=1) == ["<bos>", "A", "4", "and", "?", "A"]
    for side in ("left", "right"):  # rows of unequal length: position k of each, where those that have it agree
        batch = inputs.ready(recall_model, ["A 3 and", "A 4 and ? A"], padding_side=side)
        assert inputs.labels(recall_model, batch) == ["<bos>", "A", 2, "and", "?", "A"]
        assert inputs.labels(recall_model, batch, row=0) == ["<bos>", "A", "3", "and"]
    model = hooked.tiny()
    ready = inputs.ready(model, example(model).to(torch.float32) if model.pooling() is not None else example(model))
    own = inputs.labels(model, ready, row=0)
    if model.pooling() is None:
        assert own == list(range(7)), "a tiny model has no tokenizer"
    else:
        assert own == ["cls" if p in model.grid.cls else "{},{}".format(*model.grid.place(p)) for p in range(10)]

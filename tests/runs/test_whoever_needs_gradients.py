"""Whoever needs gradients switches them on under torch.no_grad, with the same numbers, and says so under torch.inference_mode."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from tests.helpers import example

POINT, QUIET = "blocks.0.hook_resid_post", {"progress": False}
METRIC = gl.metrics.logit_difference(1, 2)
TOOLS = {
    "dictionary": lambda m, x, cache: (
        gl.dictionaries.train(cache[POINT], POINT, 8, gl.dictionaries.TopK(2), steps=3, batch_size=4, **QUIET).W_enc
    ),
    "tuned lens": lambda m, x, cache: gl.lens.tuned_lens(m, [x], steps=2, **QUIET).weights[0],
    "J-lens": lambda m, x, cache: gl.lens.jacobian_lens(m, x, skip_first=1, **QUIET).weights[0],
    "R-lens": lambda m, x, cache: gl.lens.relevance_lens(m, x, skip_first=1, **QUIET).weights[0],
    "trained state": lambda m, x, cache: gl.states.optimise(m, x, METRIC, steps=2, **QUIET).facts["losses"],
    "DAS": lambda m, x, cache: gl.subspaces.das(m, x, x.flip(0), [1, 2], POINT, epochs=2, **QUIET).basis,
    "feature graph": lambda m, x, cache: torch.tensor(
        [edge.weight for edge in gl.feature_graph.attribute(m, x[:1], **QUIET).edges]
    ),
    "attribution": lambda m, x, cache: gl.attribution.lrp(m, x).scores,
    "attribution patching": lambda m, x, cache: gl.circuits.attribution_patch(m, x, x.flip(0), METRIC, POINT).values,
}


@pytest.mark.parametrize("tool", TOOLS)
def test_gradients_are_on_whatever_they_were_before(tool):
    model = gl.HookedMamba.tiny(seed=0)
    x = example(model)
    cache = model.run_with_cache(x, names_filter=POINT)[1]
    want = TOOLS[tool](model, x, cache)
    with torch.no_grad():
        found = TOOLS[tool](model, x, cache)
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(want))
    with torch.inference_mode(), pytest.raises(gl.InputError, match="inference_mode forbids them"):
        TOOLS[tool](model, x, cache)
    assert not model.list_hooks() and all(p.grad is None for p in model.parameters())

"""Intervening: predictions by hand, the model's own change, and what cannot be clamped."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens.feature_graph import attribute
from gatedlens.hooks.mamba import HookedMamba
from tests.feature_graph.dictionaries import three
from tests.helpers import example


@pytest.fixture(scope="module")
def mamba():
    return HookedMamba.tiny(seed=0, dtype=torch.float64)


@pytest.fixture(scope="module")
def tokens(mamba):
    return example(mamba)[:1]


@pytest.fixture(scope="module")
def dictionaries(mamba, tokens):
    return three(mamba, tokens)


@pytest.fixture(scope="module")
def graph(mamba, tokens, dictionaries):
    return attribute(mamba, tokens, dictionaries, logits=[3, (1, 2)], progress=False)


def test_the_model_changes_as_if_the_feature_were_edited_by_hand(mamba, tokens, dictionaries, graph):
    """true: (value - what it is) W_dec added at its place; of a token its embedding, of an error what was left over."""
    sae, plain = dictionaries[0], mamba(tokens)[0, -1]
    node = next(node for node in graph.of("feature") if node.point == sae.point)
    with torch.no_grad():
        _, cache = mamba.run_with_cache(tokens, names_filter=[sae.point])
    x = cache[sae.point]

    def run(point, pos, added):
        edited = torch.zeros_like(x)
        edited[0, pos] = added
        with torch.no_grad():
            now = mamba.run_with_hooks(tokens, fwd_hooks=[(point, lambda value, hook: value + edited)])[0, -1] - plain
        return torch.stack([now[3], now[1] - now[2]])

    wanted = run(sae.point, node.pos, (2.5 - node.activation) * sae.W_dec[node.number])
    assert torch.allclose(graph.intervene({node: 2.5}).true.values, wanted, atol=1e-12)
    token = graph.of("token", 3)[0]
    wanted = run("blocks.0.hook_resid_pre", 3, -0.5 * mamba.embed(tokens)[0, 3])
    assert torch.allclose(graph.intervene({token: 0.5}).true.values, wanted, atol=1e-12)
    error = next(one for one in graph.of("error", 4) if one.point == sae.point)
    left = x[0, 4] - sae(x[0, 4])
    assert torch.allclose(graph.intervene({error: 0.0}).true.values, run(sae.point, 4, -left), atol=1e-12)


def test_what_is_predicted_is_the_sum_over_the_paths_that_may_respond(graph):
    """token -> feature -> logit: the direct edge and the way by each feature that may respond, by hand."""
    logit, token = graph.of("logit")[0], graph.of("token", 2)[0]
    direct = {edge.target: edge.weight for edge in graph.out_of(token)}
    on = {edge.source: edge.weight for edge in graph.into(logit)}
    some = [node for node in graph.of("feature") if node.id in direct and node.id in on and node.layer == 0][:2]
    assert some
    wanted = -direct.get(logit.id, 0.0)
    assert abs(float(graph.predict({token: 0.0}, through=[]).values[0]) - wanted) < 1e-12
    for node in some:  # two of one site do not make one another
        wanted -= direct[node.id] * on[node.id] / node.activation
    assert abs(float(graph.predict({token: 0.0}, through=some).values[0]) - wanted) < 1e-12


def test_a_clamp_at_what_a_node_is_changes_nothing(graph):
    node = graph.of("feature")[0]
    done = graph.intervene({node: node.activation, graph.of("token")[0]: 1.0})
    assert max(values.values.abs().max() for values in (done.predicted, done.frozen, done.true)) < 1e-12
    assert done.gap.abs().max() < 1e-12 and node.id in repr(done) and "gap" in done._repr_html_()


def test_the_gap_is_what_gates_and_norms_do(graph):
    done = graph.intervene({graph.of("token", 1)[0]: 0.0})
    assert done.rounding < 1e-12 and done.gap.abs().max() > 1e-6
    assert torch.equal(done.gap, done.true.values - done.predicted.values)
    assert done.predicted["logit"] == ["logit of '3'", "logit of '1 - 2'"] and done.true.axes == ("logit",)


def test_what_cannot_be_clamped_is_refused(graph):
    feature, logit, token = graph.of("feature")[0], graph.of("logit")[0], graph.of("token")[0]
    for clamped, through, said in (
        ({logit: 0.0}, None, "a logit is not"),
        ({"E_-1_0": 0.0}, None, "a bias is not"),
        ({}, None, "say which nodes are clamped"),
        ({feature: 0.0}, [token], "does not respond"),
        ({feature: 0.0}, feature.id, "give a list of nodes"),
        ({"1_99_0": 0.0}, None, "is no node of this graph"),
    ):
        with pytest.raises(gl.InputError, match=said):
            graph.predict(clamped, through)

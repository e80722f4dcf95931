"""EAP and EAP-IG against their formula, edge by edge, and the exact scores against a run an edge."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens import circuits
from gatedlens.circuits import Graph
from tests.circuits.helpers import METRIC, fired, gradient, measured, put, two


def stored(model, tokens):
    graph = Graph.of(model)
    return graph, fired(
        model, tokens, ["hook_embed", *(n for node in graph.nodes for n in (node.reads, node.writes) if n)]
    )


def test_eap_is_sender_difference_times_receiver_gradient(model):
    clean, corrupted = two(model)
    (graph, good), (_, bad) = stored(model, clean), stored(model, corrupted)
    found = circuits.eap(model, clean, corrupted, METRIC)
    by_pos = circuits.eap(model, clean, corrupted, METRIC, positions=True)
    assert found.scores.axes == ("sender", "receiver") and by_pos.scores.axes == ("sender", "receiver", "pos")
    assert len(found) == len(graph.edges()) and len(by_pos) == len(graph.edges()) * good["hook_embed"].shape[1]
    for receiver in graph.receivers:
        slope = gradient(model, corrupted, receiver.reads, bad[receiver.reads])
        for sender in graph.before(receiver):
            want = ((good[sender.writes] - bad[sender.writes]) * slope).sum(-1).mean(0)
            got = by_pos.scores.at(sender=sender.name, receiver=receiver.name).values
            assert torch.allclose(got, want, atol=1e-10)
            assert found.score(sender.name, receiver.name) == pytest.approx(float(want.sum()), abs=1e-10)


def test_edges_into_a_receiver_sum_to_its_inputs_attribution(model):
    clean, corrupted = two(model)
    edges = circuits.eap_ig(model, clean, corrupted, METRIC, steps=2, progress=False).scores.values.nansum(0)
    names = [node.reads for node in Graph.of(model).receivers]
    for name, total in zip(names, edges, strict=True):
        inputs = circuits.attribution_patch_ig(model, clean, corrupted, METRIC, name, (), steps=2, progress=False)
        assert torch.allclose(inputs.values.squeeze(), total, atol=1e-10)


def test_eap_ig_is_the_mean_of_eap_along_the_input(model):
    clean, corrupted = two(model)
    (graph, good), (_, bad) = stored(model, clean), stored(model, corrupted)
    found = circuits.eap_ig(model, clean, corrupted, METRIC, steps=2, progress=False)
    receiver = graph.nodes[-2]
    slope = 0
    for share in (0.25, 0.75):
        between = [("hook_embed", put(bad["hook_embed"] + share * (good["hook_embed"] - bad["hook_embed"])))]
        with model.hooks(between):
            here = fired(model, corrupted, receiver.reads)[receiver.reads]
        slope = slope + gradient(model, corrupted, receiver.reads, here, hooks=between) / 2
    for sender in graph.before(receiver):
        want = float(((good[sender.writes] - bad[sender.writes]) * slope).sum((1, 2)).mean())
        assert found.score(sender.name, receiver.name) == pytest.approx(want, abs=1e-10)


def test_edge_patching_is_a_run_an_edge(model):
    clean, corrupted = two(model)
    (graph, good), (_, bad) = stored(model, clean), stored(model, corrupted)
    found, base = circuits.edge_patch(model, clean, corrupted, METRIC, progress=False), measured(model, corrupted)
    for edge in graph.edges():
        sender, receiver = graph.find(edge.sender), graph.find(edge.receiver)
        value = bad[receiver.reads] + good[sender.writes] - bad[sender.writes]
        want = (measured(model, corrupted, [(receiver.reads, put(value))]) - base).mean()
        assert found.score(*edge) == pytest.approx(float(want), abs=1e-10)


def test_what_edges_are_asked_wrongly_is_explained(model):
    clean, corrupted = two(model)
    for method in (circuits.eap, circuits.eap_ig, circuits.edge_patch):
        with pytest.raises(gl.InputError, match="need one shape"):
            method(model, clean, corrupted[:1], METRIC)
        with pytest.raises(gl.InputError, match="returned NaN"):
            method(model, clean, corrupted, lambda logits: METRIC(logits) * torch.nan)
        with pytest.raises(gl.InputError, match="one number for 2 rows"):
            method(model, clean, corrupted, lambda logits: METRIC(logits).mean())
    for method in (circuits.eap, circuits.eap_ig):
        with pytest.raises(gl.InputError, match="has no gradient"):
            method(model, clean, corrupted, lambda logits: METRIC(logits.detach()))
        with pytest.raises(gl.InputError, match="gradient of the metric is NaN"):
            method(model, clean, corrupted, lambda logits: (0 * METRIC(logits)).sqrt())
    with pytest.raises(gl.InputError, match="at least 1"):
        circuits.eap_ig(model, clean, corrupted, METRIC, steps=0)
    assert not model.list_hooks()


def test_by_secants_the_edges_into_the_logits_are_the_whole_effect(model):
    """And those into any receiver its input's attribution by secants."""
    clean, corrupted = two(model)
    metric = gl.metrics.logit_difference(1, 2)
    edges = circuits.eap(model, clean, corrupted, metric, rule="secant").scores.values.nansum(0)
    names = [node.reads for node in Graph.of(model).receivers]
    for name, total in zip(names, edges, strict=True):
        inputs = circuits.attribution_patch(model, clean, corrupted, metric, name, (), rule="secant")
        assert torch.allclose(inputs.values.squeeze().double(), total, atol=1e-10)
    whole = circuits.attribution_patch(model, clean, corrupted, metric, "hook_embed", (), rule="secant")
    if not model.hands_on:
        assert torch.allclose(edges[-1], whole.values.double().squeeze(), atol=1e-10)

"""The residual graph: who is in it, and that what a receiver reads is the sum of what was sent."""

from __future__ import annotations

import re

import pytest
import torch

import gatedlens as gl
from gatedlens.circuits import Edge, Graph
from tests.circuits.helpers import fired, two
from tests.helpers import padded


def test_a_receiver_reads_the_sum_of_its_senders(model):
    graph, (tokens, _) = Graph.of(model), two(model)
    cache = fired(model, tokens, [name for node in graph.nodes for name in (node.reads, node.writes) if name])
    for receiver in graph.receivers:
        total = sum(cache[sender.writes] for sender in graph.before(receiver))
        assert torch.allclose(total, cache[receiver.reads], rtol=0, atol=1e-10), receiver.name


def test_a_receiver_reads_that_sum_in_a_padded_batch_too(lm):
    rows = [torch.arange(n) for n in (4, 7)]
    tokens, mask = padded(rows, "left")
    graph = Graph.of(lm)
    names = [name for node in graph.nodes for name in (node.reads, node.writes) if name]
    cache = fired(lm, tokens, names, attention_mask=mask)
    total = sum(cache[sender.writes] for sender in graph.senders)
    assert torch.allclose(total, cache[graph.find("logits").reads], rtol=0, atol=1e-10)


def test_every_branch_is_a_node_and_every_pair_in_order_an_edge(model):
    graph = Graph.of(model)
    assert graph.names[0] == "embed" and graph.names[-1] == "logits"
    outs = [name for name in model.names if re.search(r"hook_(mixer|mlp|norm\d)_out", name)]
    assert [node.writes for node in graph.nodes[1:-1]] == outs
    n = len(graph.nodes)
    turns = [node.turn for node in graph.nodes]
    beside = sum(turns.count(turn) * (turns.count(turn) - 1) // 2 for turn in set(turns))  # parallel ones: no edge
    assert len(graph.edges()) == n * (n - 1) // 2 - beside and graph.edges()[0] == Edge("embed", graph.names[1])


def test_nodes_by_name_point_and_glob(model):
    graph = Graph.of(model)
    assert graph.find("1.mixer") is graph.find("blocks.1.hook_mixer_in") is graph.find("blocks.1.hook_mixer_out")
    assert graph.some("*.mixer") == [node for node in graph.nodes if node.name.endswith("mixer")]
    assert graph.some(["logits", "0.mixer"])[0].name == "0.mixer", "in running order"
    with pytest.raises(gl.PointError, match=r"'0.mixr' is no node.*Did you mean '0.mixer'"):
        graph.find("0.mixr")
    for wrong in ("", None, 3):
        with pytest.raises(gl.PointError, match="is no node"):
            graph.find(wrong)
    with pytest.raises(gl.PointError, match="matches no node"):
        graph.some("*.attention")
    with pytest.raises(gl.InputError, match="list is empty"):
        graph.some([])
    with pytest.raises(gl.InputError, match="sends nothing"):
        graph.sender("logits")

"""FeatureGraph: asking for nodes and edges, pruning, files, pages and pictures."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import save_file

import gatedlens as gl
from gatedlens.feature_graph import FeatureGraph, attribute
from gatedlens.files import read_tensors
from gatedlens.hooks.mamba import HookedMamba
from tests.feature_graph.dictionaries import three
from tests.helpers import example

# By safety-research/circuit-tracer, frontend/graph_models.py: what each field holds.
NODE = {
    "node_id": str, "feature": int, "layer": str, "ctx_idx": int, "feature_type": str, "token_prob": float,
    "is_target_logit": bool, "run_idx": int, "reverse_ctx_idx": int, "jsNodeId": str, "clerp": str,
    "influence": (float, type(None)), "activation": (float, type(None)),
}  # fmt: skip
METADATA = {
    "slug": str, "scan": str, "transcoder_list": list, "prompt_tokens": list, "prompt": str,
    "node_threshold": (float, type(None)), "schema_version": int,
}  # fmt: skip
QPARAMS = {"pinnedIds": list, "supernodes": list, "linkType": str, "clickedId": str, "sg_pos": str}
TYPES = {"cross layer transcoder", "mlp reconstruction error", "embedding", "logit"}


@pytest.fixture(scope="module")
def graph():
    model = HookedMamba.tiny(seed=0, dtype=torch.float64)
    tokens = example(model)[:1]
    return attribute(model, tokens, three(model, tokens), logits=[3, (1, 2)], progress=False)


def test_nodes_and_edges_are_found_by_name(graph):
    logit = graph.of("logit")[0]
    assert graph.node(logit.id) == graph.node(logit) == logit and graph.place(logit) == len(graph.nodes) - 2
    into = graph.into(logit)
    assert abs(sum(edge.weight for edge in into) - graph.value(logit)) < 1e-12
    assert [abs(edge.weight) for edge in into] == sorted((abs(edge.weight) for edge in into), reverse=True)
    token = graph.of("token", pos=-1)[0]
    assert all(edge.source == token.id for edge in graph.out_of(token)) and token.pos == 6
    assert len(graph.edges) == int((graph.adjacency != 0).sum()) and graph.top(5) == graph.edges[:5]
    assert graph.reaches(graph.of("token", 0)[0], logit) and not graph.reaches(logit, token)
    assert len({node.id for node in graph.nodes}) == len(graph.nodes)


def test_names_that_are_none_are_explained(graph):
    with pytest.raises(gl.InputError, match="'9_9_9' is no node of this graph"):
        graph.into("9_9_9")
    with pytest.raises(gl.InputError, match="is no target"):
        graph.into(graph.of("token")[0])
    with pytest.raises(gl.InputError, match="kind='faeture'.*Did you mean 'feature'"):
        graph.of("faeture")
    with pytest.raises(gl.InputError, match="pos=7 is out of range"):
        graph.of("token", 7)
    with pytest.raises(gl.InputError, match="a share, from 0 to 1"):
        graph.prune(1.5)


def test_pruning_tells_what_it_keeps(graph):
    small = graph.prune(0.5, 0.8)
    kept = small.facts["kept"]
    assert len(small) < len(graph) and len(small.edges) < len(graph.edges)
    assert 0 < kept["influence of edges"] <= kept["influence of nodes"] <= 1 and kept["nodes"] < 1
    assert abs(kept["influence of nodes"] - float(graph.influence[small.kept].sum() / graph.influence.sum())) < 1e-9
    names = {node.id for node in graph.nodes if bool(small.kept[graph.place(node)])}
    assert all(edge.source in names and edge.target in names for edge in small.edges)
    assert small.replacement == graph.replacement and 0 < small.replacement < 1 and 0 < small.completeness < 1
    whole = graph.prune(1.0, 1.0)
    assert whole.facts["kept"]["influence of nodes"] > 1 - 1e-9


def test_a_graph_is_saved_whole_and_predicts_as_it_did(graph, tmp_path):
    small = graph.prune(0.6, 0.9)
    again = FeatureGraph.load(small.save(tmp_path / "graph.safetensors"))
    assert again.nodes == small.nodes and again.words == small.words and dict(again.facts) == dict(small.facts)
    assert torch.equal(again.adjacency, small.adjacency) and torch.equal(again.joined, small.joined)
    node = graph.of("feature")[0]
    assert torch.equal(again.predict({node: 0.0}).values, small.predict({node: 0.0}).values)
    assert again.edges == small.edges and repr(again) == repr(small)
    with pytest.raises(gl.InputError, match="was loaded, and no run came with it"):
        again.intervene({node: 0.0})
    with pytest.raises(gl.CheckpointError, match="no saved feature graph"):
        gl.feature_graph.FeatureGraph.load(_other(tmp_path))
    tensors, meta = read_tensors(tmp_path / "graph.safetensors")
    older = {name: json.dumps(one) for name, one in json.loads(meta["said"]).items()}  # as graphs were saved first
    save_file(tensors, tmp_path / "old.safetensors", {"gatedlens": "feature_graph", **older})
    assert FeatureGraph.load(tmp_path / "old.safetensors").nodes == small.nodes
    save_file(tensors, tmp_path / "old.safetensors", {"gatedlens": "feature_graph", **older, "words": "["})
    with pytest.raises(gl.CheckpointError, match="its field 'words' is"):
        FeatureGraph.load(tmp_path / "old.safetensors")
    with pytest.raises(gl.InputError, match=r"written as .safetensors, .json or .html, not '.pt'"):
        graph.save(tmp_path / "graph.pt")


def _other(folder):
    save_file({"a": torch.zeros(2)}, str(folder / "other.safetensors"))
    return folder / "other.safetensors"


def fits(values, kinds):
    return set(values) == set(kinds) and all(isinstance(values[name], kind) for name, kind in kinds.items())


def test_the_json_is_circuit_tracers(graph, tmp_path):
    small = graph.prune(0.9, 0.95)
    data = json.loads(small.save(tmp_path / "recall.json").read_text())
    assert set(data) == {"metadata", "qParams", "nodes", "links"}
    assert fits(data["metadata"], METADATA) and fits(data["qParams"], QPARAMS)
    assert data["metadata"]["slug"] == "recall" and data["metadata"]["node_threshold"] == 0.9
    assert all(fits(node, NODE) for node in data["nodes"])
    assert all(fits(link, {"source": str, "target": str, "weight": float}) for link in data["links"])
    ids = [node["node_id"] for node in data["nodes"]]
    assert len(set(ids)) == len(ids) and {link[end] for link in data["links"] for end in ("source", "target")} <= set(
        ids
    )
    assert {node["feature_type"] for node in data["nodes"]} <= TYPES
    assert sum(node["is_target_logit"] for node in data["nodes"]) == 1
    for node in data["nodes"]:
        layer, number, pos = node["node_id"].split("_")
        assert layer == node["layer"] and int(pos) == node["ctx_idx"]
        if node["feature_type"] == "cross layer transcoder":
            low, high = int(layer), int(number)
            assert node["feature"] == (low + high) * (low + high + 1) // 2 + high and node["activation"] > 0
            assert 0 < node["influence"] <= 1 + 1e-9
    whole = graph.to_circuit_tracer()
    assert [node["feature_type"] for node in whole["nodes"]].count("bias") == 1


def test_the_page_needs_no_network(graph, tmp_path):
    page = graph.prune(0.9, 0.95).save(tmp_path / "graph.html").read_text()
    links = set(re.findall(r"https?://[^\s'\"<)]+", page)) - {
        "http://www.w3.org/2000/svg"
    }  # a name space, never fetched
    assert not links and "<svg" in page and "src=" not in page
    data = json.loads(re.search(r"id='gl-data'>(.*?)</script>", page, re.DOTALL)[1])
    names = {node["id"] for node in data["nodes"]}
    assert data["first"] in names and all(edge[0] in names and edge[1] in names for edge in data["edges"])


def test_a_picture_holds_every_node_that_is_shown(graph):
    from matplotlib.collections import LineCollection

    from gatedlens.feature_graph.layout import Layout

    small = graph.prune(0.8, 0.9)
    laid = Layout.of(small)
    assert len(set(laid.places.values())) == len(laid.places) == len(laid.nodes)
    assert all(laid.places[edge.source][1] < laid.places[edge.target][1] for edge in laid.edges)
    figure = small.plot()
    lines = next(one for one in figure.axes[0].collections if isinstance(one, LineCollection))
    assert len(lines.get_segments()) == len(laid.edges)
    assert "FeatureGraph(" in graph.prune(0.3, 0.3)._repr_html_() and repr(small).count("\n") == 0
    assert len(Layout.of(graph).edges) <= 400

"""Circuits: exact evaluation against one run a node, choosing edges, saving, drawing, mistakes."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens import circuits
from gatedlens.circuits import Circuit, Edge, Graph
from gatedlens.circuits.faithfulness import EdgePatch
from tests.circuits.helpers import METRIC, fired, measured, put, two
from tests.helpers import padded


def made(names, values, pos=False):
    """A Circuit of all edges between these nodes, with these scores."""
    size = len(names) - 1
    scores = torch.full((size, size), torch.nan, dtype=torch.float64)
    scores[torch.ones(size, size, dtype=torch.bool).triu()] = torch.tensor(values, dtype=torch.float64)
    axes, labels = ("sender", "receiver"), {"sender": names[:-1], "receiver": names[1:]}
    if pos:
        scores, axes = scores.unsqueeze(-1).repeat(1, 1, 2), (*axes, "pos")
    return Circuit.of(gl.Result(scores, axes, labels, "by hand"))


CHAIN = ["embed", "0.mixer", "1.mixer", "logits"]  # edges by sender: e0 e1 eL, 01 0L, 1L


@pytest.fixture
def circuit(model):
    clean, corrupted = two(model)
    return circuits.eap(model, clean, corrupted, METRIC)


def test_all_edges_are_the_clean_run_and_none_the_corrupted(model, circuit):
    clean, corrupted = two(model)
    with torch.no_grad():
        assert torch.allclose(circuit.run(model, clean, corrupted), model(clean), rtol=0, atol=1e-10)
        assert torch.allclose(circuit.keep([]).run(model, clean, corrupted), model(corrupted), rtol=0, atol=1e-10)
    assert circuit.faithfulness(model, clean, corrupted, METRIC) == pytest.approx(1, abs=1e-10)
    assert circuit.keep([]).faithfulness(model, clean, corrupted, METRIC) == pytest.approx(0, abs=1e-10)


def by_hand(model, clean, corrupted, kept, **options):
    """Logits of a circuit, one node after the other: each in a run in which its input is put where it reads."""
    graph = Graph.of(model)
    bad = fired(model, corrupted, [node.writes for node in graph.senders], **options)
    out, handed = {"embed": fired(model, clean, graph.nodes[0].writes, **options)[graph.nodes[0].writes]}, []
    for j, receiver in enumerate(graph.receivers):
        read = 0
        for i, sender in enumerate(graph.before(receiver)):
            share = kept[i, j].reshape(1, -1, 1)
            read = read + torch.where(share, out[sender.name], bad[sender.writes])
        with torch.no_grad(), model.hooks([(receiver.reads, put(read)), *handed]):
            if not receiver.writes:
                return model(clean, **options)
            found = fired(model, clean, [receiver.writes, *model.hands_on], **options)
            out[receiver.name] = found[receiver.writes]
        if j == 0:  # what later nodes read of the first beside the residual stream
            handed = [(name, put(found[name])) for name in model.hands_on]
    raise AssertionError


@pytest.mark.parametrize("positions", [False, True], ids=["whole", "by position"])
def test_any_circuit_is_what_its_nodes_make_one_after_the_other(model, positions):
    clean, corrupted = two(model)
    graph = Graph.of(model)
    length = fired(model, clean, "hook_embed")["hook_embed"].shape[1]
    size = len(graph.senders)
    patch = EdgePatch.of(model, clean, corrupted)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        kept = torch.rand(size, size, *([length] if positions else []), generator=generator) < 0.5
        want = by_hand(model, clean, corrupted, kept)
        assert torch.allclose(patch.logits(kept), want, rtol=0, atol=1e-10)


def test_a_circuit_of_a_padded_batch(lm):
    rows = [torch.randint(lm.cfg.d_vocab, (n,), generator=torch.Generator().manual_seed(n)) for n in (4, 7)]
    clean, mask = padded(rows, "left")
    corrupted, _ = padded([(row + 3) % lm.cfg.d_vocab for row in rows], "left")
    found = circuits.eap(lm, clean, corrupted, METRIC, attention_mask=mask).top(5)
    got = found.run(lm, clean, corrupted, attention_mask=mask)
    want = by_hand(lm, clean, corrupted, found.kept, attention_mask=mask)
    assert torch.allclose(got[:, -1], want[:, -1], rtol=0, atol=1e-10)


def test_faithfulness_and_its_curve_of_circuits(model, circuit):
    clean, corrupted = two(model)
    sizes = [0, 2, len(circuit) - 1, len(circuit)]
    curve = circuit.curve(model, clean, corrupted, METRIC, sizes, progress=False)
    assert curve.axes == ("edges",) and curve["edges"] == sizes
    low, high = measured(model, corrupted).mean(), measured(model, clean).mean()
    for n, value in zip(sizes, curve.values, strict=True):
        with torch.no_grad():
            logits = by_hand(model, clean, corrupted, circuit.top(n).kept)
        assert float(value) == pytest.approx(float((METRIC(logits).mean() - low) / (high - low)), abs=1e-9)
    assert circuit.curve(model, clean, corrupted, METRIC, progress=False)["edges"][-1] == len(circuit)
    with pytest.raises(gl.InputError, match="nothing to be faithful to"):
        circuit.faithfulness(model, clean, clean, METRIC)


def test_top_takes_the_strongest_edges():
    whole = made(CHAIN, [5.0, 1.0, 0.1, -4.0, 2.0, 3.0])
    assert [str(edge) for edge in whole.edges[:3]] == ["embed -> 0.mixer", "0.mixer -> 1.mixer", "1.mixer -> logits"]
    assert [len(whole.top(n)) for n in range(8)] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert whole.top(2).edges == whole.edges[:2] and "(2 on no path from embed to logits)" in repr(whole.top(2))
    assert whole.top(3).nodes == tuple(CHAIN) and "on no path" not in repr(whole.top(3))


def test_pruned_leaves_out_what_lies_on_no_path():
    whole = made(CHAIN, [5.0, 1.0, 0.1, -4.0, 2.0, 3.0])
    assert whole.top(1).pruned().edges == [] and whole.top(2).pruned().edges == []
    assert whole.top(3).pruned().edges == whole.top(3).edges
    dead = made(CHAIN, [5.0, 0.0, 1.0, 4.0, 0.0, 0.0]).top(3).pruned()
    assert dead.edges == [Edge("embed", "logits")], "what no path to the logits holds is gone"
    assert dead.nodes == ("embed", "logits")
    by_pos = made(CHAIN, [5.0, 0.0, 1.0, 4.0, 0.0, 0.0], pos=True).top(6).pruned()
    assert by_pos.edges == [Edge("embed", "logits", 0), Edge("embed", "logits", 1)]


def test_edges_on_no_path_change_nothing(model, circuit):
    clean, corrupted = two(model)
    for n in range(len(circuit)):
        some = circuit.top(n)
        assert len(some) == n
        want, got = some.run(model, clean, corrupted), some.pruned().run(model, clean, corrupted)
        assert torch.allclose(got, want, rtol=0, atol=1e-10)


def test_edges_are_told_by_their_names():
    whole = made(CHAIN, [5.0, 1.0, 0.1, -4.0, 2.0, 3.0])
    some = whole.keep([("embed", "0.mixer"), Edge("0.mixer", "logits")])
    assert some.edges == [("embed", "0.mixer", None), ("0.mixer", "logits", None)] and len(some) == 2
    assert whole.score("0.mixer", "1.mixer") == -4
    with pytest.raises(gl.InputError, match=r"'0.mixr' is not there.*Did you mean '0.mixer'"):
        whole.keep([("embed", "0.mixr")])
    with pytest.raises(gl.InputError, match="does not come after"):
        whole.keep([("1.mixer", "0.mixer")])
    with pytest.raises(gl.InputError, match="name it too"):
        made(CHAIN, [1.0] * 6, pos=True).score("embed", "logits")
    with pytest.raises(gl.InputError, match="have no positions"):
        whole.score("embed", "logits", 2)
    for wrong in (-1, True, 1.5):
        with pytest.raises((gl.InputError, TypeError), match=r"whole number|type"):
            whole.top(wrong)


def test_a_circuit_saved_and_loaded_is_the_same(tmp_path, model, circuit):
    clean, corrupted = two(model)
    some = circuit.top(5)
    again = Circuit.load(some.save(tmp_path / "circuit.json"))
    assert again.edges == some.edges and again.nodes == some.nodes and torch.equal(again.kept, some.kept)
    assert torch.equal(again.scores.values.nan_to_num(), some.scores.values.nan_to_num())
    assert torch.equal(again.run(model, clean, corrupted), some.run(model, clean, corrupted))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(gl.InputError, match="not JSON"):
        Circuit.load(tmp_path / "broken.json")
    some.scores.save(tmp_path / "result.json")
    with pytest.raises(gl.InputError, match="'embed' is no edge: give"):
        circuit.keep(["embed"])
    with pytest.raises(gl.InputError, match="no saved circuit"):
        Circuit.load(tmp_path / "result.json")


def test_a_circuit_of_another_model_is_refused(model, circuit):
    clean, corrupted = two(model)
    with pytest.raises(gl.InputError, match=r"nodes embed, 0.mixer, 1.mixer.*has embed"):
        made([*CHAIN[:-1], "2.other", "logits"], [1.0] * 10).run(model, clean, corrupted)
    kept = torch.ones(*circuit.kept.shape, 99, dtype=torch.bool)
    with pytest.raises(gl.InputError, match="tells 99 positions apart"):
        Circuit(circuit.scores, kept).run(model, clean, corrupted)


def test_the_picture_shows_its_nodes_and_edges(model, circuit):
    import matplotlib

    matplotlib.use("agg")
    some = circuit.top(4)
    figure = some.plot()
    (ax,) = figure.axes
    words = [text for text in ax.texts if text.get_text()]
    assert [text.get_text() for text in words] == list(circuit.graph)
    assert len([patch for patch in ax.patches if hasattr(patch, "get_arrowstyle")]) == len(some.edges), (
        "an arrow an edge"
    )
    black = {text.get_text() for text in words if text.get_color() == "black"}
    assert black == set(some.nodes)
    assert f"{len(some)} of" in repr(some)

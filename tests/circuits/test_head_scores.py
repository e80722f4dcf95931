"""EAP from single heads: against a head's own write times the receiver's gradient, and the sum of a layer's heads."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens import circuits
from gatedlens.circuits import Graph
from tests.circuits.helpers import METRIC, fired, gradient, two
from tests.helpers import padded

OUTPUT = {gl.HookedMamba2: "hook_gated", gl.HookedGriffin: "hook_z"}


@pytest.mark.parametrize(("make", "layers"), [(gl.HookedMamba2, [0, 1]), (gl.HookedGriffin, [2])])
def test_a_heads_write_times_the_receivers_gradient(make, layers):
    model = make.tiny(seed=0, dtype=torch.float64)
    clean, corrupted = two(model)
    found = circuits.eap_heads(model, clean, corrupted, METRIC)
    heads, graph = model.cfg.sizes["head"], Graph.of(model)
    assert found.axes == ("layer", "head", "receiver") and found["layer"] == layers
    assert found["head"] == list(range(heads)) and found["receiver"] == list(graph.names[1:])
    for layer in layers:
        mixer, sender = model.blocks[layer].mixer, graph.find(f"{layer}.mixer")
        good, bad = (fired(model, one, [mixer.output_name])[mixer.output_name] for one in (clean, corrupted))
        for receiver in graph.receivers:
            got = found.at(layer=layer, receiver=receiver.name).values
            if sender not in graph.before(receiver):
                assert bool(got.isnan().all())
                continue
            slope = gradient(model, corrupted, receiver.reads, fired(model, corrupted, receiver.reads)[receiver.reads])
            for head in range(heads):
                alone = (good - bad).flatten(2).unflatten(2, (heads, -1)).clone()
                alone[:, :, [other for other in range(heads) if other != head]] = 0
                want = (alone.flatten(2) @ mixer.output_weights()[0].T * slope).sum((1, 2)).mean()
                assert torch.allclose(got[head], want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("side", ["left", "right"])
def test_heads_sum_to_the_edge_of_their_mixer(side):
    model = gl.HookedMamba2.tiny(seed=0, dtype=torch.float64)
    rows = [torch.randint(model.cfg.d_vocab, (n,), generator=torch.Generator().manual_seed(n)) for n in (4, 7)]
    (clean, mask), (corrupted, _) = padded(rows, side), padded([(row + 3) % model.cfg.d_vocab for row in rows], side)
    pair = (model, clean, corrupted, METRIC)
    plain = circuits.eap_heads(*pair, attention_mask=mask), circuits.eap(*pair, attention_mask=mask)
    steps = {"steps": 2, "progress": False, "attention_mask": mask}
    integrated = circuits.eap_ig_heads(*pair, **steps), circuits.eap_ig(*pair, **steps)
    for by_head, whole in (plain, integrated):
        for layer in by_head["layer"]:
            total = by_head.at(layer=layer).values.sum(0)
            want = whole.scores.at(sender=f"{layer}.mixer").values
            assert torch.allclose(total, want, rtol=0, atol=1e-10, equal_nan=True)


def test_steps_go_on_where_they_were_stopped(tmp_path):
    model = gl.HookedMamba2.tiny(seed=0, dtype=torch.float64)
    pair = (model, *two(model), METRIC)
    whole = circuits.eap_ig_heads(*pair, steps=2, progress=False, results=tmp_path / "steps.json")
    again = circuits.eap_ig_heads(*pair, steps=2, progress=False, results=tmp_path / "steps.json")
    assert torch.equal(whole.values.nan_to_num(), again.values.nan_to_num()) and whole.facts["steps"] == 2
    with pytest.raises(gl.InputError, match="another sweep: its shape is"):
        circuits.eap_ig_heads(*pair, steps=3, progress=False, results=tmp_path / "steps.json")


def test_a_model_without_heads_says_so():
    model = gl.HookedMamba.tiny()
    for method in (circuits.eap_heads, circuits.eap_ig_heads):
        with pytest.raises(gl.PointError, match="has no axis 'head'"):
            method(model, *two(model), METRIC)

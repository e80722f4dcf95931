"""Path patching against its literal three passes: every other output frozen by hooks, on every architecture."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens import circuits
from gatedlens.circuits import Graph
from tests.circuits.helpers import METRIC, fired, measured, put, two
from tests.helpers import padded


class Literally:
    """Pass 1: both runs. Pass 2: the sender's clean output, all others frozen; what the receivers read. Pass 3: that."""

    def __init__(self, model, clean, corrupted, **options):
        self.model, self.graph, self.corrupted, self.options = model, Graph.of(model), corrupted, options
        writes = [node.writes for node in self.graph.senders]
        self.good, self.bad = (fired(model, one, writes, **options) for one in (clean, corrupted))
        self.base = measured(model, corrupted, **options)

    def effect(self, sender, receivers, pos=slice(None)):
        frozen = {node.writes: self.bad[node.writes].clone() for node in self.graph.senders}
        written = self.graph.find(sender).writes
        frozen[written][:, pos] = self.good[written][:, pos]
        reads = [self.graph.find(name).reads for name in receivers]
        with self.model.hooks([(name, put(value)) for name, value in frozen.items()]):
            read = fired(self.model, self.corrupted, reads, **self.options)
        hooks = [(name, put(read[name])) for name in reads]
        return measured(self.model, self.corrupted, hooks, **self.options) - self.base


def test_every_path_is_its_three_passes(model):
    clean, corrupted = two(model)
    literal = Literally(model, clean, corrupted)
    for edge in Graph.of(model).edges():
        got = circuits.path_patch(model, clean, corrupted, METRIC, edge.sender, edge.receiver)
        assert torch.allclose(got, literal.effect(edge.sender, [edge.receiver]), rtol=0, atol=1e-10), edge


@pytest.mark.parametrize("pos", [2, [0, -1], slice(1, 4)], ids=str)
def test_several_receivers_and_some_positions(model, pos):
    clean, corrupted = two(model)
    graph = Graph.of(model)
    later = [node.name for node in graph.receivers[:-1] if graph.find("0.mixer").reaches(node)]
    got = circuits.path_patch(model, clean, corrupted, METRIC, "0.mixer", later, pos=pos)
    assert torch.allclose(got, Literally(model, clean, corrupted).effect("0.mixer", later, pos), rtol=0, atol=1e-10)
    assert not torch.allclose(got, circuits.path_patch(model, clean, corrupted, METRIC, "0.mixer", later))


def test_paths_in_a_padded_batch(lm):
    rows = [torch.randint(lm.cfg.d_vocab, (n,), generator=torch.Generator().manual_seed(n)) for n in (4, 7)]
    clean, mask = padded(rows, "left")
    corrupted, _ = padded([(row + 3) % lm.cfg.d_vocab for row in rows], "left")
    got = circuits.path_patch(lm, clean, corrupted, METRIC, "0.mixer", "1.mixer", attention_mask=mask)
    want = Literally(lm, clean, corrupted, attention_mask=mask).effect("0.mixer", ["1.mixer"])
    assert torch.allclose(got, want, rtol=0, atol=1e-10)


def test_the_sweep_over_senders(model):
    clean, corrupted = two(model)
    graph = Graph.of(model)
    found = circuits.path_patch_senders(model, clean, corrupted, METRIC, "logits", progress=False)
    assert found.axes == ("sender",) and found["sender"] == [node.name for node in graph.senders]
    literal = Literally(model, clean, corrupted)
    for sender, value in zip(found["sender"], found.values, strict=True):
        want = literal.effect(sender, ["logits"]).mean()
        assert torch.allclose(value, want, rtol=0, atol=1e-10)
    some = circuits.path_patch_senders(model, clean, corrupted, METRIC, ["1.mixer", "logits"], progress=False)
    assert some["sender"] == [node.name for node in graph.before(graph.find("1.mixer"))]


def test_a_path_at_a_position_in_each_row(model):
    clean, corrupted = two(model)
    found = circuits.path_patch(model, clean, corrupted, METRIC, "embed", "1.mixer", pos=torch.tensor([1, 3]))
    for row, pos in enumerate((1, 3)):
        alone = circuits.path_patch(model, clean, corrupted, METRIC, "embed", "1.mixer", pos=pos)
        assert torch.allclose(found[row], alone[row], rtol=0, atol=1e-10)


def test_paths_that_do_not_exist_are_explained(model):
    clean, corrupted = two(model)
    for receivers in ("0.mixer", "1.mixer", ["logits", "0.mixer"]):
        with pytest.raises(gl.InputError, match=r"'1.mixer' does not reach '\d.mixer'"):
            circuits.path_patch(model, clean, corrupted, METRIC, "1.mixer", receivers)
    with pytest.raises(gl.PointError, match=r"'9.mixer' is no node"):
        circuits.path_patch(model, clean, corrupted, METRIC, "9.mixer")
    with pytest.raises(gl.InputError, match="sends nothing"):
        circuits.path_patch(model, clean, corrupted, METRIC, "logits")
    with pytest.raises(gl.InputError, match="receives nothing"):
        circuits.path_patch_senders(model, clean, corrupted, METRIC, "embed")
    with pytest.raises(gl.InputError, match="out of range"):
        circuits.path_patch(model, clean, corrupted, METRIC, "embed", pos=99)
    with pytest.raises(gl.InputError, match="need one shape"):
        circuits.path_patch(model, clean, corrupted[:1], METRIC, "embed")
    assert not model.list_hooks()


@pytest.mark.parametrize("receivers", ["logits", ["1.mixer", "logits"]], ids=["logits", "several"])
def test_a_path_from_a_head_is_its_three_passes(receivers):
    """Pass 2 with the output of one head alone clean: only its channels of what the output projection reads."""
    model = gl.HookedMamba2.tiny(seed=0, dtype=torch.float64)
    clean, corrupted = two(model)
    found = circuits.path_patch_heads(model, clean, corrupted, METRIC, receivers, progress=False)
    layers = [0] if receivers != "logits" else [0, 1]
    heads, width = model.cfg.sizes["head"], model.cfg.sizes["value"]
    assert found.axes == ("layer", "head") and found["layer"] == layers and found["head"] == list(range(heads))
    literal = Literally(model, clean, corrupted)
    for row, layer in enumerate(layers):
        name, written = f"blocks.{layer}.mixer.hook_gated", f"blocks.{layer}.hook_mixer_out"
        good, bad = (fired(model, one, [name])[name] for one in (clean, corrupted))
        for head in range(heads):
            mixed, some = bad.clone(), slice(head * width, (head + 1) * width)
            mixed[..., some] = good[..., some]
            said = torch.nn.functional.linear(mixed, *model.blocks[layer].mixer.output_weights())
            literal.good = {written: said}
            want = literal.effect(f"{layer}.mixer", [receivers] if receivers == "logits" else receivers).mean()
            assert torch.allclose(found.values[row, head], want, rtol=0, atol=1e-10)


def test_what_heads_write_sums_to_what_their_mixer_writes():
    model = gl.HookedMamba2.tiny(seed=0, dtype=torch.float64)
    clean, corrupted = two(model)
    name = "blocks.0.hook_mixer_out"
    good, bad = (fired(model, one, [name, "blocks.0.mixer.hook_gated"]) for one in (clean, corrupted))
    o = good["blocks.0.mixer.hook_gated"] - bad["blocks.0.mixer.hook_gated"]
    written = model.blocks[0].writing("mixer", None).by_heads(o, 4)
    assert torch.allclose(written.sum(2), good[name] - bad[name], rtol=0, atol=1e-12)


def test_heads_that_are_not_there_are_explained():
    model = gl.HookedMamba.tiny()
    clean, corrupted = two(model)
    with pytest.raises(gl.PointError, match="has no axis 'head'"):
        circuits.path_patch_heads(model, clean, corrupted, METRIC)
    with pytest.raises(gl.InputError, match="receives from no head"):
        circuits.path_patch_heads(model, clean, corrupted, METRIC, "0.mixer")
    griffin = gl.HookedGriffin.tiny()  # its first layers are recurrent, without heads
    with pytest.raises(gl.InputError, match="No mixer before '1.mixer' has heads; the first with heads is in layer 2"):
        circuits.path_patch_heads(griffin, *two(griffin), METRIC, "1.mixer")

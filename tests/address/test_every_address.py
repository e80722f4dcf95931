"""What `head=`, `value=` and `channel=` mean, and how they are refused, in every function that takes an address."""

from __future__ import annotations

import numpy
import pytest
import torch

import gatedlens as gl
from gatedlens import ablation, knockout, patching, states, steering
from gatedlens.circuits import attribution_patch, attribution_patch_ig
from tests.helpers import example

WITH, WITHOUT = "blocks.0.mixer.hook_scan", "blocks.0.hook_resid_pre"  # points of Mamba-2: with heads, without
METRIC = gl.metrics.logit_difference(3, 1)
QUIET = {"progress": False}


class Given:
    """A model with an input, its cache, and a folder for stores."""

    def __init__(self, model, folder):
        self.model, self.folder = model, folder
        self.tokens, self.other = example(model), example(model, seed=1)
        self.whole = {}  # stores without an index, each harvested once
        with torch.no_grad():
            self.cache = model.run_with_cache(self.tokens, names_filter=lambda name: True)[1]

    def run(self, intervention):
        with torch.no_grad():
            return self.model.run_with_hooks(self.tokens, fwd_hooks=intervention.hooks(self.model))

    def store(self, name, **options):
        out = self.folder / f"{name}-{len(list(self.folder.iterdir()))}"
        return gl.store.harvest(self.model, self.tokens, name, out, progress=False, batch_size=2, **options)

    def stored(self, name, **options):
        key = (name, *options.items())
        if key not in self.whole:
            self.whole[key] = self.store(name, **options)
        return self.whole[key]

    def vector(self, name, **index):
        return steering.vector(self.model, self.tokens, self.other, name, **index)

    def steered(self, name, **index):
        with self.vector(name).on(self.model, 2.0, **index), torch.no_grad():
            return self.model(self.tokens)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return Given(gl.HookedMamba2.tiny(dtype=torch.float64), tmp_path_factory.mktemp("stores"))


# (given, name of a point, index) -> what comes of it.
BY_INDEX = {
    "zero": lambda g, name, **i: g.run(ablation.zero(name, **i)),
    "constant": lambda g, name, **i: g.run(ablation.constant(name, 0.5, **i)),
    "scale": lambda g, name, **i: g.run(ablation.scale(name, 2.0, **i)),
    "noise": lambda g, name, **i: g.run(ablation.noise(name, 0.5, **i)),
    "freeze": lambda g, name, **i: g.run(ablation.freeze(name, g.cache, **i)),
    "mean": lambda g, name, **i: g.run(ablation.mean(name, g.cache, **i)),
    "resample": lambda g, name, **i: g.run(ablation.resample(name, g.cache, **i)),
    "edit": lambda g, name, **i: g.run(ablation.edit(name, lambda x, point: -x, **i)),
    "select": lambda g, name, **i: g.cache.select(name, **i),
    "vector": lambda g, name, **i: g.vector(name, **i).vector,
    "steering": lambda g, name, **i: g.steered(name, **i),
    "steering as an intervention": lambda g, name, **i: g.run(g.vector(name).intervention(2.0, **i)),
    "harvest": lambda g, name, **i: g.store(name, **i)[name][0],
    "estimate": lambda g, name, **i: gl.store.estimate(g.model, g.tokens, name, **i).bytes,
    "column": lambda g, name, **i: g.stored(name)[name].select(**i)[0],
    "dataset": lambda g, name, **i: g.stored(name).dataset(name, **i)[3],
    "statistics": lambda g, name, **i: g.stored(name, reduce="mean").statistics.select(name, **i)["mean"],
}
# Of the mixer's output, or its state, by themselves: (given, index).
OF_A_MIXER = {
    "cut": lambda g, **i: g.run(knockout.cut(1, 5, layers=0, **i)),
    "cut_scan": lambda g, **i: g.run(knockout.cut_scan(1, 5, layers=0, **i)),
    "knockout sweep": lambda g, **i: knockout.sweep(g.model, g.tokens, METRIC, -1, [1], layers=0, **QUIET, **i).values,
    "open_gate": lambda g, **i: g.run(ablation.open_gate(layers=0, **i)),
    "no_scan": lambda g, **i: g.run(ablation.no_scan(layers=0, **i)),
    "patch": lambda g, **i: g.run(states.patch(g.cache, 3, layers=0, source_pos=1, **i)),
    "causal_trace": lambda g, **i: (
        gl.tracing.causal_trace(
            g.model, g.tokens, METRIC, corrupt=g.other, point="mixer.hook_gate", positions=[2, -1], **QUIET, **i
        ).values
    ),
    "splice": lambda g, **i: spliced(g, **i),
    "swap": lambda g, **i: spliced(g, states.swap, **i),
}


def spliced(g, how=states.splice, **index):
    a, b = (g.model(one, return_state=True)[1] for one in (g.tokens, g.other))
    found = how(g.model, a, b, layers=0, parts="scan", **index)
    return torch.cat([one["blocks.0.scan"] for one in (found if isinstance(found, tuple) else (found,))])


# Whose axes are named, not indexed: (given, name, axes).
BY_AXES = {
    "sweep": lambda g, name, *axes: patching.sweep(g.model, g.other, g.cache, METRIC, name, axes, **QUIET),
    "attribution_patch": lambda g, name, *axes: attribution_patch(g.model, g.tokens, g.other, METRIC, name, axes),
    "attribution_patch_ig": lambda g, name, *axes: attribution_patch_ig(
        g.model, g.tokens, g.other, METRIC, name, axes, steps=1, **QUIET
    ),
}


def everything(given, index):
    for what, call in BY_INDEX.items():
        yield what, lambda call=call: call(given, WITH, **index)
    for what, call in OF_A_MIXER.items():
        yield what, lambda call=call: call(given, **index)


@pytest.mark.parametrize(
    "forms",
    [
        [{"head": 2}, {"head": -2}, {"head": torch.tensor(2)}, {"head": numpy.int64(2)}, {"channel": range(16, 24)}],
        [
            {"head": [1, 3]},
            {"head": slice(1, None, 2)},
            {"head": [False, True, False, True]},
            {"head": torch.tensor([-3, -1])},
            {"channel": [*range(8, 16), *range(24, 32)]},
        ],
        [{"value": [0, 5]}, {"value": numpy.array([0, 5])}, {"channel": [0, 5, 8, 13, 16, 21, 24, 29]}],
        [{"head": 2, "value": [1, 3]}, {"head": [2], "value": slice(1, 4, 2)}, {"channel": [17, 19]}],
    ],
    ids=["one head", "heads", "values", "both"],
)
def test_every_form_of_an_index_means_its_channels(given, forms):
    first, *others = (list(everything(given, form)) for form in forms)
    for number, (what, call) in enumerate(first):
        want = torch.as_tensor(call()).flatten()
        for other in others:
            assert torch.equal(torch.as_tensor(other[number][1]()).flatten(), want), (what, other)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ({"head": 4}, gl.InputError, "head=4 is out of range"),
        ({"head": [0, -5]}, gl.InputError, r"head=\[0, -5\] is out of range"),
        ({"value": 8}, gl.InputError, "value=8 is out of range"),
        ({"head": []}, gl.InputError, r"head=\[\] names no entry"),
        ({"head": slice(4, None)}, gl.InputError, "names no entry"),
        ({"head": [True, False]}, gl.InputError, r"head: a mask of shape \[2\]; .* has 4 of that axis"),
        ({"head": 1.5}, gl.InputError, "head=1.5 is no index"),
        ({"head": "all"}, gl.InputError, "head='all' is no index"),
        ({"head": 2, "channel": 17}, gl.PointError, r"channel and head overlap: a channel is \(head value\)"),
        ({"value": 2, "channel": 17}, gl.PointError, "channel and value overlap.* Say channel, or head and value"),
        ({"haed": 2}, gl.GatedlensError, "haed"),
    ],
)
def test_an_index_that_means_nothing_is_refused_alike(given, index, error, message):
    for _, call in everything(given, index):
        with pytest.raises(error, match=message):
            call()


def test_a_point_without_heads_names_the_nearest_that_has_them(given):
    message = f"{WITHOUT} has no axis 'head'"
    nearest = r"batch pos d_model\. The nearest point that has it is blocks.0.mixer.hook_gate_pre \(batch pos channel\)"
    for what, call in BY_INDEX.items():
        stored = what in ("column", "dataset", "statistics")
        with pytest.raises(gl.PointError, match=message if stored else f"{message}; its axes are: {nearest}"):
            call(given, WITHOUT, head=0)
    for call in BY_AXES.values():
        with pytest.raises(gl.PointError, match=rf"{message}.* d_model\. The nearest .* blocks.0.mixer.hook_gate_pre"):
            call(given, WITHOUT, "head")
        with pytest.raises(gl.PointError, match="channel and value overlap"):
            call(given, WITH, "channel", "value")


@pytest.mark.parametrize("kind", ["mamba", "griffin", "rwkv"])
def test_an_architecture_without_heads_says_so(kind, tmp_path):
    model = {"mamba": gl.HookedMamba, "griffin": gl.HookedGriffin, "rwkv": gl.HookedRWKV}[kind].tiny(
        dtype=torch.float64
    )
    given, name = Given(model, tmp_path), "blocks.0.mixer.hook_gate"
    where = "The nearest .* blocks.2.attn.hook_q" if kind == "griffin" else f"No point of {model.cfg.model_name} has it"
    point = "is no option|has no option 'head'" if kind != "griffin" else "has no axis 'head'"
    for what, call in BY_INDEX.items():
        stored = what in ("column", "dataset", "statistics")
        refused = what in ("harvest", "estimate")
        kinds, message = gl.PointError, f"{name} has no axis 'head'; its axes are: batch pos channel. {where}"
        if refused and kind != "griffin":
            kinds, message = gl.InputError, point
        with pytest.raises(kinds, match=f"{name} has no axis 'head'" if stored else message):
            call(given, name, head=0)
    for what, call in OF_A_MIXER.items():
        with pytest.raises(gl.PointError, match="has no axis 'head'; its axes are: batch "):
            call(given, head=0)
        assert what
    for call in BY_AXES.values():
        with pytest.raises(gl.PointError, match="has no axis 'head'"):
            call(given, name, "head")
    layer = gl.implicit_attention(given.cache, layer=0)
    views = [layer.mean, layer.abs_mean, layer.dense, layer.select, layer.contributions]
    views += [lambda heads: layer.row(-1, heads), lambda heads: gl.profiles.of_heads(layer, heads)]
    for view in views:
        with pytest.raises(gl.PointError, match=f"has no axis 'head'; .* {where}"):
            view(heads=0)

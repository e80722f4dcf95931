"""Words: `dt`, `mixer.dt`, `("dt", 1)` stand wherever names of points do, and a slip is told the nearest right one."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from tests.helpers import example

METRIC = gl.metrics.logit_difference(3, 1)


@pytest.fixture(scope="module")
def mamba():
    return gl.HookedMamba.tiny(dtype=torch.float64)


def every(model, leaf):
    return [name for name in model.names if name.endswith(f".{leaf}")]


def meant(model, word):
    """The points of a word, or what is said against it."""
    try:
        return [one.name for one in model.names.hooked(word)]
    except gl.PointError as error:
        return str(error)


@torch.no_grad()
def test_a_word_is_every_layers_point_and_with_a_layer_one(model):
    """On every architecture."""
    inputs = example(model)
    layer = model.cfg.n_layers - 1
    by_word = model.run_with_cache(inputs, names_filter="resid_post", return_cache_object=False)[1]
    assert list(by_word) == every(model, "hook_resid_post")
    placed = model.run_with_cache(inputs, names_filter=("resid_post", layer), return_cache_object=False)[1]
    assert list(placed) == [f"blocks.{layer}.hook_resid_post"]
    both = model.run_with_cache(inputs, names_filter=["resid_pre", ("resid_post", -1)], return_cache_object=False)[1]
    assert set(both) == {*every(model, "hook_resid_pre"), f"blocks.{layer}.hook_resid_post"}
    words = {name.rpartition(".")[2].removeprefix("hook_") for name in model.names if name.startswith("blocks.")}
    for word in words:  # each means something, or says that it is ambiguous
        found = meant(model, word)
        assert (
            "ambiguous" in found if isinstance(found, str) else found and all(n.endswith(f"hook_{word}") for n in found)
        )


WORDS = {  # (model, tokens, other tokens, name) -> what comes of it; `name` is one point
    "hook": lambda m, t, o, name: m.run_with_hooks(t, fwd_hooks=[(name, lambda x, hook: x * 0)]),
    "predicate": lambda m, t, o, name: list(m.run_with_cache(t, names_filter=name)[1]),
    "zero": lambda m, t, o, name: m.run_with_hooks(t, fwd_hooks=gl.ablation.zero(name).hooks(m)),
    "resample": lambda m, t, o, name: m.run_with_hooks(t, fwd_hooks=gl.ablation.resample(name, seed=0).hooks(m)),
    "means": lambda m, t, o, name: dict(gl.ablation.means(m, [t], name, progress=False)),
    "sweep": lambda m, t, o, name: gl.patching.sweep(m, t, m.run_with_cache(o)[1], METRIC, name, progress=False).values,
    "attribution_patch": lambda m, t, o, name: gl.circuits.attribution_patch(m, t, o, METRIC, name).values,
    "steering": lambda m, t, o, name: gl.steering.vector(m, t, o, name).vector,
    "nnsight": lambda m, t, o, name: m.nnsight().hook(name).path,
}


@pytest.mark.parametrize("tool", WORDS)
@pytest.mark.parametrize("name", [("mixer_out", 1), "mixer_out1"])
def test_a_word_means_what_the_full_name_means(mamba, tool, name):
    tokens, other = example(mamba), example(mamba, seed=1)
    ours, full = (WORDS[tool](mamba, tokens, other, one) for one in (name, "blocks.1.hook_mixer_out"))
    if isinstance(ours, dict):
        assert ours.keys() == full.keys()
        ours, full = (torch.cat(list(x.values())) for x in (ours, full))
    assert torch.equal(ours, full) if isinstance(ours, torch.Tensor) else ours == full


def test_several_words_and_places_stand_in_one_list(mamba):
    tokens = example(mamba)
    places = ["mixer_out", ("dt", 0)]
    full = ["blocks.0.hook_mixer_out", "blocks.1.hook_mixer_out", "blocks.0.mixer.hook_dt"]
    ours, theirs = (mamba.run_with_hooks(tokens, fwd_hooks=gl.ablation.zero(x).hooks(mamba)) for x in (places, full))
    assert torch.equal(ours, theirs)
    assert set(gl.ablation.means(mamba, [tokens], places, progress=False)) == set(full)


def test_a_store_and_a_trace_take_words(mamba, tmp_path):
    tokens = example(mamba)
    store = gl.store.harvest(mamba, tokens, ["mixer_out", ("dt", 1)], tmp_path / "store", progress=False)
    assert set(store.names) == {*every(mamba, "hook_mixer_out"), "blocks.1.mixer.hook_dt"}
    traced = mamba.nnsight()
    with traced.trace(tokens) as tracer:
        cache = tracer.activations(["dt", ("gate", 0)])
    assert set(cache[0]) == {*every(mamba, "hook_dt"), "blocks.0.mixer.hook_gate"}


@pytest.mark.parametrize(
    "ask", [lambda m, n: m.names.find(n), lambda m, n: m.names.select(n), lambda m, n: m.names.hooked(n)]
)
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("dtt", r"'dtt' is not a hook point of tiny-mamba. Did you mean 'dt'"),
        (("dtt", 1), r"\('dtt', 1\) is not a hook point of tiny-mamba. Did you mean 'dt'"),
        (("dt", 9), r"layer 9 does not exist; tiny-mamba has 2 layers"),
        ("hook_gat", r"Did you mean 'hook_gate'"),
        ("mixer.gat", r"'mixer.gat' is not a hook point"),
    ],
)
def test_a_slip_is_told_the_nearest_word(mamba, ask, name, says):
    with pytest.raises(gl.PointError, match=says):
        ask(mamba, name)


def test_a_word_of_several_layers_is_no_single_point(mamba):
    with pytest.raises(gl.PointError, match=r"'dt' is a point of 2 layers.*\('dt', 0\) or 'blocks.0.mixer.hook_dt'"):
        mamba.names.find("dt")
    with pytest.raises(gl.PointError, match=r"'mixer_out' is a point of 2 layers"):
        gl.steering.vector(mamba, example(mamba), example(mamba, seed=1), "mixer_out")
    with pytest.raises(gl.PointError, match=r"'dt' is a point of 2 layers"):
        mamba.run_with_cache(example(mamba))[1]["dt"]

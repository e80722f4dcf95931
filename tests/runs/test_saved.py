"""What was fitted and saved: a damaged file is refused by name, and a checkpoint is of one question."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import gatedlens as gl
from gatedlens.files import read_tensors
from gatedlens.hooks.mamba2 import HookedMamba2
from tests.helpers import example

POINT = "blocks.0.hook_resid_post"
KIND = {
    "lens": gl.lens.FittedLens,
    "state": gl.states.TrainedState,
    "subspace": gl.subspaces.Subspace,
    "interchange": gl.subspaces.Interchange,
    "probe": gl.probes.Probe,
    "dictionary": gl.dictionaries.Dictionary,
    "graph": gl.feature_graph.FeatureGraph,
}


@pytest.fixture(scope="module")
def small():
    return HookedMamba2.tiny(seed=0, dtype=torch.float64)


@pytest.fixture(scope="module")
def cache(small):
    return small.run_with_cache(example(small, batch=6), names_filter=POINT)[1]


@pytest.fixture(scope="module")
def saved(small, cache, tmp_path_factory):
    """A file of each kind."""
    pytest.importorskip("sklearn")
    folder, ids = tmp_path_factory.mktemp("saved"), example(small, batch=6)
    space = gl.subspaces.pca(small, ids, POINT, rank=2)
    sae = gl.dictionaries.train(cache[POINT], POINT, 8, gl.dictionaries.BatchTopK(2), steps=2, progress=False)
    made = {
        "lens": gl.lens.tuned_lens(small, ids, steps=1, progress=False),
        "state": gl.states.optimise(small, ids, steps=1, progress=False),
        "subspace": space,
        "interchange": space.interchange(small, ids, pos=torch.tensor([1, 2, 3, 1, 2, 3])),
        "probe": gl.probes.fit(cache, ["a", "b"] * 3, POINT, held_out=0.34).placebo(1),
        "dictionary": sae,
        "graph": gl.feature_graph.attribute(small, ids[:1], [sae], logits=1, progress=False),
    }
    return {kind: one.save(folder / f"{kind}.safetensors") for kind, one in made.items()}


@pytest.mark.parametrize("kind", KIND)
def test_a_damaged_file_is_refused(kind, saved, tmp_path):
    load, path = KIND[kind].load, tmp_path / "damaged.safetensors"
    load(saved[kind])
    raw = saved[kind].read_bytes()
    tensors, meta = load_file(saved[kind]), read_tensors(saved[kind])[1]
    for cut in (0, 9, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:cut])
        with pytest.raises(gl.errors.CheckpointError, match="damaged"):
            load(path)
    for name in tensors:
        if kind == "state" and name != "seen":
            continue  # what a model's state holds its model knows
        save_file({**tensors, name: torch.zeros(2, 3, 5, 7, 1)}, path, meta)
        with pytest.raises(gl.errors.CheckpointError, match="damaged"):
            load(path)
    save_file(tensors, path, dict.fromkeys(meta, "[[") | {"gatedlens": meta["gatedlens"]})
    with pytest.raises(gl.errors.CheckpointError, match="damaged"):
        load(path)
    other = saved["probe" if kind == "lens" else "lens"]
    with pytest.raises(gl.errors.CheckpointError, match="no saved"):
        load(other)


@pytest.mark.parametrize("pos", [None, -1, "*", slice(1, 3), [1, 2]], ids=str)
def test_an_interchange_keeps_its_positions(pos, small, tmp_path):
    ids = example(small, batch=2)
    change = gl.subspaces.random(small, POINT, rank=2).interchange(small, ids.roll(1, 0), pos=pos)
    again = gl.subspaces.Interchange.load(change.save(tmp_path / "change.safetensors"))
    assert again.pos == change.pos and torch.equal(again.source, change.source)


def test_another_probe_s_classes_are_refused(saved, tmp_path):
    tensors, meta = load_file(saved["probe"]), read_tensors(saved["probe"])[1]
    path = tmp_path / "p.safetensors"
    save_file(tensors, path, {**meta, "said": meta["said"].replace('["a", "b"]', '["a", "b", "c"]')})
    with pytest.raises(gl.errors.CheckpointError, match="classes"):
        gl.probes.Probe.load(path)


FITS = {
    "tuned lens": lambda model, ids, path: gl.lens.tuned_lens(model, ids, steps=2, checkpoint=path, progress=False),
    "J-lens": lambda model, ids, path: gl.lens.jacobian_lens(model, ids, skip_first=1, checkpoint=path, progress=False),
    "DAS": lambda model, ids, path: gl.subspaces.das(
        model, ids, ids.roll(1, 0), [0, 1], POINT, epochs=1, checkpoint=path, progress=False
    ),
    "dictionary": lambda model, ids, path: gl.dictionaries.train(
        model.run_with_cache(ids, names_filter=POINT)[1][POINT],
        POINT,
        8,
        gl.dictionaries.TopK(2),
        steps=2,
        checkpoint=path,
        progress=False,
    ),
}


@pytest.mark.parametrize("fit", FITS)
def test_a_damaged_checkpoint_is_refused(fit, small, tmp_path):
    ids, path = example(small), tmp_path / "fit.safetensors"
    FITS[fit](small, ids, path)
    tensors, meta = load_file(path), read_tensors(path)[1]
    for name in tensors:
        for held in ({}, {name: torch.zeros(2, 3, 5, 7, 1)}):
            save_file({key: one for key, one in tensors.items() if key != name} | held, path, meta)
            with pytest.raises(gl.errors.CheckpointError, match=r"fit\.safetensors"):
                FITS[fit](small, ids, path)


def test_answers_and_masks_belong_to_a_checkpoint(small, tmp_path):
    ids, path = example(small), tmp_path / "fit.safetensors"

    def trained(answers):
        metric = gl.metrics.log_probability(torch.tensor(answers))
        return gl.states.optimise(small, ids, metric, steps=1, checkpoint=path, progress=False)

    trained([1, 2])
    trained([1, 2])
    with pytest.raises(gl.errors.InputError, match="another fit: its metric"):
        trained([2, 1])
    mask = torch.ones_like(ids)
    path.unlink()
    gl.lens.tuned_lens(small, [(ids, mask)], steps=1, checkpoint=path, progress=False)
    mask[0, :2] = 0
    with pytest.raises(gl.errors.InputError, match="another fit: its input"):
        gl.lens.tuned_lens(small, [(ids, mask)], steps=1, checkpoint=path, progress=False)


def test_a_fit_that_has_not_begun_leaves_no_file(small, tmp_path):
    path = tmp_path / "fit.safetensors"
    with pytest.raises(gl.errors.InputError, match="no gradient"):
        gl.states.optimise(
            small, example(small), lambda x: x[:, -1].argmax(-1).double(), steps=1, checkpoint=path, progress=False
        )
    assert not path.exists()


def test_a_training_of_doubles_goes_on_with_the_same_numbers(cache, tmp_path):
    """A BatchTopK's threshold, too, which is as exact as the entries."""
    path = tmp_path / "sae.safetensors"

    def trained(checkpoint=None):
        act = gl.dictionaries.BatchTopK(2)
        return gl.dictionaries.train(
            cache[POINT], POINT, 8, act, steps=20, batch_size=16, checkpoint=checkpoint, progress=False
        )

    from gatedlens.dictionaries.training import Run

    once, left = Run.once, iter(range(9))

    def stopping(self):
        if next(left, None) is None:
            raise RuntimeError("stopped")
        once(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "once", stopping)
        with pytest.raises(RuntimeError, match="stopped"):
            trained(path)
    for name, tensor in trained().state_dict().items():
        assert torch.equal(trained(path).state_dict()[name], tensor), name


def test_entries_that_are_not_finite(cache, small, tmp_path):
    x = cache[POINT].flatten(0, 1).clone()
    many = x.repeat(250, 1)
    many[torch.randperm(len(many), generator=torch.Generator().manual_seed(0))[-1]] = torch.nan  # not among the first
    with pytest.raises(gl.errors.InputError, match="not finite"):
        gl.dictionaries.train(many, POINT, 8, gl.dictionaries.TopK(2), steps=20, progress=False)
    with pytest.raises(gl.errors.InputError, match="not finite"):
        gl.subspaces.spanned(small, POINT, torch.full((16,), torch.nan))
    with pytest.raises(gl.errors.InputError, match="folder that there is"):
        gl.dictionaries.train(x, POINT, 8, steps=1, checkpoint=tmp_path / "none" / "x", progress=False)


def test_a_state_of_another_model(small):
    wide = HookedMamba2.tiny(seed=0, dtype=torch.float64)
    state = wide(example(wide)[:1], return_state=True)[1]
    cut = gl.RecurrentState({key: one[..., :2] for key, one in state.tensors.items()}, state.seen, "narrow")
    strange = gl.RecurrentState({"blocks.0.memory": torch.zeros(1, 2)}, state.seen, "strange")
    ids = example(small)
    for other in (cut, strange):
        for ask in (
            lambda state: gl.lens.state_lens(small, state, ids),
            lambda state: gl.states.optimise(small, ids, start=state, steps=1, progress=False),
            lambda state: small(ids[:1], state=state),
        ):
            with pytest.raises(gl.errors.InputError, match="another model"):
                ask(other)


def test_labels_that_are_single_tensors(cache, small):
    pytest.importorskip("sklearn")
    labels = torch.tensor([0, 1] * 3)
    one, other = (gl.probes.fit(cache, given, POINT, held_out=0.34) for given in (labels, list(labels)))
    assert one.classes == other.classes == [0, 1] and torch.equal(one.weights, other.weights)
    spoiled = small.run_with_cache(example(small, batch=6), names_filter=POINT)[1]
    spoiled.cache_dict[POINT] = spoiled.cache_dict[POINT] * torch.nan
    with pytest.raises(gl.errors.InputError, match="not finite"):
        gl.probes.fit(spoiled, labels, POINT, held_out=0.34)


def test_a_graph_of_a_padded_pair(small):
    ids = example(small, batch=1)
    pair = (torch.cat([torch.zeros_like(ids[:, :2]), ids], 1), torch.tensor([[0, 0] + [1] * 7]))
    alone, padded = (gl.feature_graph.attribute(small, given, logits=1, progress=False) for given in (ids, pair))
    assert torch.equal(alone.adjacency, padded.adjacency)

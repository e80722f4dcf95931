"""Sweeps on every architecture against a literal loop, one forward a cell: points, axes, batches, padding, states."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens import patching
from gatedlens.model.hookpoint import Saver
from gatedlens.result.result import Result
from gatedlens.runs.baseline import Baseline
from gatedlens.runs.engine import Effort, Sizes
from tests.helpers import example, in_parts, padded

QUIET = {"progress": False}


def metric(logits):
    """One number a row, of any model's logits."""
    last = logits[:, -1] if logits.ndim == 3 else logits
    return last[:, 3] - last[:, 1]


def pair(model, batch=2, pos=7):
    return example(model, batch, pos, seed=0), example(model, batch, pos, seed=1)


def caches(model, clean, **options):
    with torch.no_grad():
        return model.run_with_cache(clean, names_filter=lambda name: True, **options)[1]


def by_hand(model, corrupted, cache, name, measure=metric, **index):
    """One cell: a whole forward with the entries `index` of a point taken from the cache."""

    def patch(x, hook):
        key = [slice(None)] * x.ndim
        for axis, i in index.items():
            key[model.names[name].dims.index(axis)] = i
        x[tuple(key)] = cache[name][tuple(key)]

    with torch.no_grad():
        return measure(model.run_with_hooks(corrupted, fwd_hooks=[(name, patch)])).mean()


def close(found, want):
    found, want = (x.values if isinstance(x, Result) else torch.as_tensor(x) for x in (found, want))
    return torch.allclose(found, want, rtol=1e-10, atol=1e-10)


def everywhere(model):
    """Points that have positions: all of block 1, those around the blocks, and the first of block 0."""
    names = [n for n in model.names if n.startswith("blocks.1.") or not n.startswith("blocks.")]
    early = [n for n in model.names if n.startswith("blocks.0.")][:4]
    return [n for n in early + names if "pos" in model.names[n].dims]


@in_parts
def test_every_point_by_position_is_one_forward_a_cell(model, part):
    """Wherever runs start and whatever shares a batch; every point's cells share batches with the others'."""
    clean, corrupted = pair(model, 1, pos=6)
    cache, names, places = caches(model, clean), everywhere(model)[part], (0, 4)
    want = [[by_hand(model, corrupted, cache, name, pos=pos) for pos in places] for name in names]
    for max_bytes in (None, 20_000):
        found = patching.sweep(model, corrupted, cache, metric, names, ["pos"], max_bytes=max_bytes, **QUIET)
        kinds = [name.split(".", 2)[2] if name.startswith("blocks.") else name for name in names]
        for name, kind, wanted in zip(names, kinds, want, strict=True):
            if kinds.count(kind) == 1:  # without "layer", one kind in two layers is patched in both at once
                assert close(found.at(point=kind)[list(places)], wanted), name


@pytest.mark.parametrize(
    "ablation",
    [gl.ablation.zero("blocks.*.hook_mixer_in", pos=2), gl.ablation.resample("blocks.0.hook_mixer_out")],
    ids=["a position", "another row"],
)
def test_under_the_users_own_hooks(model, ablation):
    """What they do depends on positions and rows, of which a part of a run, or many in one batch, has others."""
    clean, corrupted = pair(model, pos=6)
    cache = caches(model, clean)
    with ablation.on(model):
        found = patching.get_act_patch_resid_pre(model, corrupted, cache, metric, **QUIET)
        for layer, pos in ((0, 1), (1, 3), (1, 5)):
            assert close(found[layer, pos], by_hand(model, corrupted, cache, f"blocks.{layer}.hook_resid_pre", pos=pos))


@pytest.mark.parametrize("word", ["resid_pre", "mixer_out"])
def test_one_patch_at_a_time_is_the_same(model, word):
    clean, corrupted = pair(model, pos=6)
    function, cache = getattr(patching, f"get_act_patch_{word}"), caches(model, clean)
    want = function(model, corrupted, cache, metric, **QUIET)
    assert close(function(model, corrupted, cache, metric, max_bytes=1, **QUIET), want)
    assert close(want[1, 4], by_hand(model, corrupted, cache, f"blocks.1.hook_{word}", pos=4))


def test_layers_and_positions_together(model):
    clean, corrupted = pair(model)
    cache = caches(model, clean)
    found = patching.get_act_patch_mixer_out(model, corrupted, cache, metric, **QUIET)
    assert (
        isinstance(found, Result) and found.axes == ("layer", "pos") and found["layer"] == [*range(model.cfg.n_layers)]
    )
    for layer in range(model.cfg.n_layers):
        for pos in range(found.size("pos")):
            want = by_hand(model, corrupted, cache, f"blocks.{layer}.hook_mixer_out", pos=pos)
            assert close(found[layer, pos], want)
    assert found.facts["corrupted"] == pytest.approx(float(metric(model(corrupted)).detach().mean()), abs=1e-10)
    assert found.facts["clean"] == pytest.approx(float(metric(model(clean)).detach().mean()), abs=1e-10)


def test_other_axes_groups_and_whole_layers(model):
    clean, corrupted = pair(model)
    cache = caches(model, clean)
    name = "blocks.1.hook_mixer_out"
    found = patching.sweep(model, corrupted, cache, metric, name, ("d_model", "pos"), groups={"d_model": 3}, **QUIET)
    assert found["d_model"] == ["0-4", "5-10", "11-15"]
    for i, channels in enumerate((slice(0, 5), slice(5, 11), slice(11, 16))):
        assert close(found[i, 2], by_hand(model, corrupted, cache, name, d_model=channels, pos=2))
    named = {"odd": [1, -1], "one": 4}
    found = patching.sweep(model, corrupted, cache, metric, name, ["d_model"], groups={"d_model": named}, **QUIET)
    assert close(found.at(d_model="odd"), by_hand(model, corrupted, cache, name, d_model=[1, 15]))
    # Two lists: their product, and a list of positions that starts later.
    both = {"d_model": {"a": [2, 9]}, "pos": {"late": [3, 5]}}
    found = patching.sweep(model, corrupted, cache, metric, name, ("d_model", "pos"), groups=both, **QUIET)

    def patch(x, hook):
        for pos in (3, 5):
            x[:, pos, [2, 9]] = cache[name][:, pos, [2, 9]]

    with torch.no_grad():
        assert close(found[0, 0], metric(model.run_with_hooks(corrupted, fwd_hooks=[(name, patch)])).mean())

    # Without "layer" all layers are patched at once.
    def everywhere(x, hook):
        x[:, 4] = cache[hook.name][:, 4]

    found = patching.sweep(model, corrupted, cache, metric, "blocks.*.hook_mixer_out", ["pos"], **QUIET)
    with torch.no_grad():
        want = metric(model.run_with_hooks(corrupted, fwd_hooks=[("blocks.*.hook_mixer_out", everywhere)])).mean()
    assert close(found[4], want)


def test_points_without_positions_and_the_keys_of_attention(model):
    """What depends on where a run starts is run whole."""
    clean, corrupted = pair(model)
    cache = caches(model, clean)
    odd = [
        n for n in model.names if n.endswith(("hook_state_start", "hook_pattern", "hook_patch_embed", "hook_features"))
    ]
    assert odd
    for name in odd:
        axis = model.names[name].dims[-1]
        found = patching.sweep(model, corrupted, cache, metric, name, [axis], **QUIET)
        assert close(found[1], by_hand(model, corrupted, cache, name, **{axis: 1})), name


def test_a_padded_batch(lm):
    rows = [example(lm, 1, n, seed=n)[0] for n in (7, 4, 6)]
    others = [example(lm, 1, n, seed=10 + n)[0] for n in (7, 4, 6)]
    for side in ("left", "right"):
        (clean, mask), (corrupted, _) = padded(rows, side), padded(others, side)
        cache = caches(lm, clean, attention_mask=mask)
        for point in ("resid_pre", "mixer_out"):
            third = mask.long().argmax(1) + 2  # where each row's position 2 is in the input
            measure = lambda logits, at=third: logits[torch.arange(3), at, 3]  # noqa: E731
            function = getattr(patching, f"get_act_patch_{point}")
            found = function(
                lm, corrupted, cache, measure, attention_mask=mask, max_bytes=60_000, reduce="none", **QUIET
            )
            for layer in range(lm.cfg.n_layers):
                for pos in range(7):
                    name = f"blocks.{layer}.hook_{point}"

                    def patch(x, hook, pos=pos, clean=cache[name]):
                        for row, own, real in zip(x, clean, mask, strict=True):  # noqa: B023
                            places = real.nonzero().flatten()[pos : pos + 1]
                            row[places] = own[places]

                    with torch.no_grad():
                        logits = lm.run_with_hooks(corrupted, fwd_hooks=[(name, patch)], attention_mask=mask)
                    assert close(found[layer, pos], measure(logits)), (side, point, layer, pos)


# -- the state ------------------------------------------------------------------------------------------------------


def test_a_patched_state_goes_on(model):
    """decay[pos] = 0, erase[pos] = 0 of a delta rule, and write[pos] = the clean state, of each scan that a layer has."""
    clean, corrupted = pair(model)
    cache = caches(model, clean)
    found = patching.get_act_patch_state(model, corrupted, cache, metric, **QUIET)
    states = [n for n in model.names if n.endswith("hook_state")]
    for name in states:
        where = {"layer": int(name.split(".")[1])}
        if "point" in found.axes:
            where["point"] = name.split(".", 2)[2]
        for pos in (0, 3, 6):

            def forget(x, hook, pos=pos):
                x[:, pos] = 0

            def put(x, hook, pos=pos, name=name):
                x[:, pos] = cache[name][:, pos]

            stem = name.removesuffix("state")
            hooks = [(f"{stem}{word}", forget) for word in ("decay", "erase") if f"{stem}{word}" in model.names]
            with torch.no_grad():
                logits = model.run_with_hooks(corrupted, fwd_hooks=[*hooks, (f"{stem}write", put)])
            assert close(found.at(**where)[pos], metric(logits).mean())
    # An edit of hook_state itself is read at its own position and nowhere later.
    only_read = patching.get_act_patch_state(model, corrupted, cache, metric, edits=patching.copied, **QUIET)
    assert only_read.shape == found.shape and not torch.allclose(only_read.values, found.values)


def test_a_patched_state_is_the_clean_prefix_handed_over():
    """RWKV reads a state one position later, so a patched state is exactly the clean run's state put into a split run."""
    from gatedlens.hooks.rwkv import HookedRWKV

    model = HookedRWKV.tiny(seed=0, dtype=torch.float64)
    clean, corrupted = pair(model)
    found = patching.get_act_patch_state(model, corrupted, caches(model, clean), metric, **QUIET)
    with torch.no_grad():
        for pos in range(6):
            _, theirs = model(clean[:, : pos + 1], return_state=True)
            for layer in range(model.cfg.n_layers):
                _, state = model(corrupted[:, : pos + 1], return_state=True)
                for name in ("num", "den", "max"):
                    state[name, layer] = theirs[name, layer]
                assert close(found[layer, pos], metric(model(corrupted[:, pos + 1 :], state=state)).mean())


# -- the family -----------------------------------------------------------------------------------------------------

FAMILY = {
    "resid_pre": "hook_resid_pre", "resid_mid": "hook_resid_mid", "resid_post": "hook_resid_post",
    "mixer_out": "hook_mixer_out", "attn_out": "hook_mixer_out", "mlp_out": "hook_mlp_out",
    "conv": "mixer.hook_conv", "gate": "mixer.hook_gate", "scan": "mixer.hook_scan",
}  # fmt: skip


def test_the_family_patches_what_it_says(model):
    """Each function where the architecture has the point, on the layers that have it; a PointError where it does not."""
    clean, corrupted = pair(model)
    cache = caches(model, clean)
    for word, leaf in FAMILY.items():
        function = getattr(patching, f"get_act_patch_{word}")
        place, _, last = leaf.rpartition(".")
        inside = [n for n in model.names if n.startswith("blocks.") and n.endswith(f".{last}")]
        names = [n for n in inside if n.split(".", 2)[2].startswith(place)]
        if not names:
            with pytest.raises(gl.PointError, match="matches no hook point"):
                function(model, corrupted, cache, metric, **QUIET)
            continue
        found = function(model, corrupted, cache, metric, **QUIET)
        assert found["layer"] == sorted({int(n.split(".")[1]) for n in names})
        for name in names:
            entry = found.at(layer=int(name.split(".")[1]))
            entry = entry.at(point=name.split(".", 2)[2]) if "point" in entry.axes else entry
            assert close(entry[3], by_hand(model, corrupted, cache, name, pos=3)), name


def test_taps_channel_groups_and_every_part_of_a_block(model):
    clean, corrupted = pair(model)
    cache = caches(model, clean)
    gated = next(n for n in model.names if n.endswith("mixer.hook_gated"))
    found = patching.get_act_patch_by_channel_group(model, corrupted, cache, metric, n_groups=4, **QUIET)
    width = model.cfg.sizes["channel"]
    first = by_hand(model, corrupted, cache, gated, channel=slice(0, width // 4))
    assert found.axes == ("layer", "channel") and found.size("channel") == 4 and close(found[0, 0], first)
    every = patching.get_act_patch_block_every(model, corrupted, cache, metric, **QUIET)
    parts = ["hook_resid_pre", "hook_mixer_out"] + ["hook_mlp_out"] * ("blocks.0.hook_mlp_out" in model.names)
    assert every.axes == ("point", "layer", "pos") and every["point"] == parts
    assert close(
        every.at(point="hook_mixer_out"), patching.get_act_patch_mixer_out(model, corrupted, cache, metric, **QUIET)
    )
    taps = [n for n in model.names if n.endswith("hook_conv_taps")]
    if not taps:
        with pytest.raises(gl.PointError, match="matches no hook point"):
            patching.get_act_patch_by_tap(model, corrupted, cache, metric, **QUIET)
        return
    found = patching.get_act_patch_by_tap(model, corrupted, cache, metric, axes=("layer", "pos", "tap"), **QUIET)
    part = found.at(layer=0)
    part = part.at(point=taps[0].split(".", 2)[2]) if "point" in part.axes else part
    assert close(part[4, 1], by_hand(model, corrupted, cache, taps[0], pos=4, tap=1))


# -- what is not run ------------------------------------------------------------------------------------------------


def test_a_patch_that_changes_nothing_is_not_run(lm):
    """Before the first token that differs the clean run is the corrupted one."""
    corrupted = example(lm, 2, 7, seed=0)
    clean = corrupted.clone()
    clean[:, 4] = (clean[:, 4] + 1) % lm.cfg.d_vocab
    calls = []
    with torch.no_grad():
        cache = lm.run_with_cache(clean)[1]

    def counting(logits):
        calls.append(1)
        return metric(logits)

    found = patching.get_act_patch_resid_pre(lm, corrupted, cache, counting, **QUIET)
    with torch.no_grad():
        assert close(found[:, :4], metric(lm(corrupted)).mean().expand(lm.cfg.n_layers, 4))
    assert len(calls) <= 2 + 3 * lm.cfg.n_layers  # the two baselines, and positions 4 to 6
    for pos in (4, 5):
        assert close(found[1, pos], by_hand(lm, corrupted, cache, "blocks.1.hook_resid_pre", pos=pos))


def test_runs_start_at_the_patched_layer_and_position(lm):
    clean, corrupted = pair(lm, 1)
    cache, shapes, seen = caches(lm, clean), [], []

    class Spy(Saver):
        """A hook that edits nothing, so that runs may still be cut short."""

        def __call__(self, x, hook):
            (seen if hook.name == "hook_embed" else shapes).append((hook.name, tuple(x.shape)))

    with lm.hooks([("blocks.*.hook_mixer_out", Spy()), ("hook_embed", Spy())]):
        patching.get_act_patch_resid_pre(lm, corrupted, cache, metric, max_bytes=1, **QUIET)
    starts = [shape[1] for name, shape in shapes if name.startswith("blocks.0.") and shape[0] == 1]
    assert sorted(starts)[-1] == 7 and {1, 2, 3} <= set(starts), "runs of block 0 get shorter"
    per_layer = [sum(name.startswith(f"blocks.{layer}.") for name, _ in shapes) for layer in range(lm.cfg.n_layers)]
    assert per_layer == sorted(per_layer) and per_layer[0] < per_layer[-1], "later blocks run more often"
    assert len(seen) <= 10, "the embedding is read by the baselines and by the prefixes alone"


def test_batches_keep_to_their_bytes(model):
    clean, corrupted = pair(model)
    run = Baseline(model, corrupted)
    rows = []
    for limit in (1, 60_000, 10**9):
        with model.hooks([("ln_final.hook_out", lambda x, hook: rows.append(len(x)))]):
            patching.get_act_patch_mixer_out(model, corrupted, caches(model, clean), metric, max_bytes=limit, **QUIET)
        size = Sizes(run, [], Effort(max_bytes=limit))
        assert max(rows) <= max(2, 2 * (limit // (size.per_position * 1)))
        if limit == 1:
            assert max(rows) == 2, "one patch at a time"
        rows.clear()


EACH = [(side, pos, None) for side in ("left", "right") for pos in (-1, 3, [2, -2, 1])]


@pytest.mark.parametrize(
    ("side", "pos", "limit"), [*EACH, ("right", [2, -2, 1], 1)]
)  # one patch at a time takes its time
def test_a_metric_that_says_what_it_reads(lm, pos, side, limit):
    """The same numbers as by a function that may read anything, of rows of unequal length, behind the blocks too."""
    clean, mask = padded([example(lm, 1, n, seed=n)[0] for n in (7, 4, 6)], side)
    corrupted, _ = padded([example(lm, 1, n, seed=10 + n)[0] for n in (7, 4, 6)], side)
    cache = caches(lm, clean, attention_mask=mask)
    said = gl.metrics.logit_difference(3, 1, pos)
    options = {"attention_mask": mask, "max_bytes": limit, "reduce": "none", **QUIET}
    names = ["blocks.*.hook_mixer_out", "ln_final.hook_out"]
    for name in names if limit else [*names, "blocks.*.hook_resid_post", "hook_embed"]:
        axes = ("layer", "pos") if name.startswith("blocks") else ("pos",)
        own = patching.sweep(lm, corrupted, cache, lambda logits: said(logits), name, axes, **options)
        assert close(patching.sweep(lm, corrupted, cache, said, name, axes, **options), own)
        several = {"same": said, "other": gl.metrics.logit(1, pos), "at 0": gl.metrics.logit(1, 0)}
        for chosen in (["same", "other"], ["same", "at 0"]):
            metrics = {key: several[key] for key in chosen}
            assert close(patching.sweep(lm, corrupted, cache, metrics, name, axes, **options).values[0], own)


def test_logits_are_computed_where_they_are_read(lm):
    clean, corrupted = pair(lm)
    cache, shapes = caches(lm, clean), []

    class Spy(Saver):
        def __call__(self, x, hook):
            shapes.append(tuple(x.shape[:2]))

    def run(measure):
        shapes.clear()
        with lm.hooks([("hook_logits", Spy())]):
            found = patching.get_act_patch_resid_pre(lm, corrupted, cache, measure, **QUIET)
        return found, {length for rows, length in shapes if rows > 2}

    said = gl.metrics.logit(3, 2)
    cut, lengths = run(said)
    assert lengths == {1}
    own, lengths = run(lambda logits: said(logits))
    assert lengths == {7} and close(cut, own)
    assert (cut.values[:, 3:] == cut.facts["corrupted"]).all(), "nothing behind what is read changes it"
    score = gl.metrics.normalised(said, lm(clean), lm(corrupted))
    found, lengths = run(score)
    assert lengths == {1} and close(found, run(lambda logits: score(logits))[0])


def test_packed_documents(lm, tmp_path):
    """Cells are runs of the packed row; what was measured of other documents is not gone on with."""
    if not lm.has_positions:
        pytest.skip("knows no documents")
    clean, corrupted = pair(lm, 1)
    packed = {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]])}
    cache, name = caches(lm, clean, **packed), "blocks.1.hook_resid_pre"
    path = tmp_path / "sweep.json"
    found = patching.sweep(lm, corrupted, cache, metric, name, "pos", results=path, **packed, **QUIET)
    for pos in range(7):
        with torch.no_grad():
            hook = (name, lambda x, hook, pos=pos: x.index_copy(1, torch.tensor([pos]), cache[name][:, pos : pos + 1]))
            want = metric(lm.run_with_hooks(corrupted, fwd_hooks=[hook], **packed)).mean()
        assert torch.allclose(found.at(pos=pos).values, want, rtol=0, atol=1e-10)
    with torch.no_grad():
        base = float(metric(lm(corrupted, **packed)).mean())
    assert found.at(pos=2).values == pytest.approx(base, abs=1e-12), "an edit went from one document into another"
    with pytest.raises(gl.InputError, match="another sweep"):
        patching.sweep(lm, corrupted, cache, metric, name, "pos", results=path, **QUIET)


def test_what_a_cache_lacks_in_every_layer_is_named_once(recall_model):
    tokens = recall_model.to_tokens("A 2 hay B 4 ? A")
    with torch.no_grad():
        cache = recall_model.run_with_cache(tokens)[1]  # states are lazy
    with pytest.raises(
        gl.PointError, match=r"holds no blocks\.\*\.mixer\.hook_state: .*names_filter='blocks\.\*\.mixer\.hook_state'"
    ):
        gl.patching.get_act_patch_state(recall_model, tokens, cache, gl.metrics.logit_difference(3, 1), progress=False)

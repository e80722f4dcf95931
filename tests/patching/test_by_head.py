"""Sweeps by head, value and channel against a literal loop: a whole forward a cell, its entries put in by hand."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens import patching
from tests.helpers import example, padded

QUIET = {"progress": False}
METRIC = gl.metrics.logit_difference(3, 1)
HEADS, WIDTH = 4, 8


@pytest.fixture(scope="module")
def heads():
    return gl.HookedMamba2.tiny(dtype=torch.float64)


def caches(model, clean, **options):
    with torch.no_grad():
        return model.run_with_cache(clean, names_filter=lambda name: True, **options)[1]


def by_hand(model, corrupted, cache, name, channels, pos=None, **options):
    """One cell: these channels (of a state: by head and value), at one position or all."""

    def patch(x, hook):
        states = "value" in model.names[name].dims
        own, clean = (t.flatten(2, 3) if states else t for t in (x.clone(), cache[name]))
        at = slice(None) if pos is None else pos
        own[:, at, channels] = clean[:, at, channels]
        return own.reshape(x.shape)

    with torch.no_grad():
        logits = model.run_with_hooks(corrupted, fwd_hooks=[(name, patch)], **options)
        return METRIC(gl.metrics.Logits.of(logits, options.get("attention_mask"))).mean()


def of_head(head):
    return list(range(head * WIDTH, (head + 1) * WIDTH))


def near(found, want):
    return torch.allclose(found.values, torch.as_tensor(want), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("leaf", ["x", "u", "scan", "y", "gate", "gated", "state", "write"])
def test_heads_of_a_point(heads, leaf):
    clean, corrupted = example(heads, seed=0, pos=5), example(heads, seed=1, pos=5)
    cache, names = caches(heads, clean), [f"blocks.{layer}.mixer.hook_{leaf}" for layer in range(2)]
    found = patching.sweep(heads, corrupted, cache, METRIC, names, ("layer", "head"), **QUIET)
    want = [[by_hand(heads, corrupted, cache, name, of_head(head)) for head in range(HEADS)] for name in names]
    assert found.axes == ("layer", "head") and found["head"] == [0, 1, 2, 3] and near(found, want)
    found = patching.sweep(heads, corrupted, cache, METRIC, names[1], ("head", "pos"), **QUIET)
    want = [[by_hand(heads, corrupted, cache, names[1], of_head(h), pos) for pos in range(5)] for h in range(HEADS)]
    assert near(found, want)


def test_values_channels_and_groups(heads):
    clean, corrupted = example(heads, seed=0, pos=4), example(heads, seed=1, pos=4)
    cache = caches(heads, clean)
    for name in ("blocks.0.mixer.hook_scan", "blocks.0.mixer.hook_state"):
        found = patching.sweep(heads, corrupted, cache, METRIC, name, ("value",), **QUIET)
        assert near(found, [by_hand(heads, corrupted, cache, name, [v, 8 + v, 16 + v, 24 + v]) for v in range(WIDTH)])
        groups = {"slow": [3, 17, 18], "one": [5], "rest": range(24, 32)}
        found = patching.sweep(heads, corrupted, cache, METRIC, name, ("channel",), groups={"channel": groups}, **QUIET)
        assert near(found, [by_hand(heads, corrupted, cache, name, list(some)) for some in groups.values()])
        found = patching.sweep(heads, corrupted, cache, METRIC, name, ("head", "value"), **QUIET)
        want = [[by_hand(heads, corrupted, cache, name, [h * WIDTH + v]) for v in range(WIDTH)] for h in range(HEADS)]
        assert near(found, want)
        pairs = {"ends": [0, -1], "middle": slice(1, 3)}
        found = patching.sweep(heads, corrupted, cache, METRIC, name, "head", groups={"head": pairs}, **QUIET)
        want = [of_head(0) + of_head(3), of_head(1) + of_head(2)]
        assert near(found, [by_hand(heads, corrupted, cache, name, some) for some in want])


def test_heads_in_rows_of_unequal_length(heads):
    rows = [[example(heads, 1, n, seed)[0] for n in (6, 4)] for seed in (0, 1)]
    (clean, mask), (corrupted, _) = (padded(one, "left") for one in rows)
    cache, name = caches(heads, clean, attention_mask=mask), "blocks.1.mixer.hook_scan"
    found = patching.sweep(heads, corrupted, cache, METRIC, name, "head", attention_mask=mask, **QUIET)
    want = [by_hand(heads, corrupted, cache, name, of_head(head), attention_mask=mask) for head in range(HEADS)]
    assert near(found, want)


def test_the_family_by_head(heads):
    clean, corrupted = example(heads, 1, 4, seed=0), example(heads, 1, 4, seed=1)
    cache = caches(heads, clean)
    layers, every = range(2), range(HEADS)
    kinds = {"scan": "scan", "y": "y", "gated": "gated", "attn": "gated"}
    for kind, leaf in kinds.items():
        names = [f"blocks.{layer}.mixer.hook_{leaf}" for layer in layers]
        stem = f"get_act_patch_{kind}_head" + ("_out" if kind == "attn" else "")
        found = getattr(patching, f"{stem}_all_pos")(heads, corrupted, cache, METRIC, **QUIET)
        assert found.axes == ("layer", "head")
        assert near(found, [[by_hand(heads, corrupted, cache, name, of_head(h)) for h in every] for name in names])
        found = getattr(patching, f"{stem}_by_pos")(heads, corrupted, cache, METRIC, **QUIET)
        assert found.axes == ("layer", "pos", "head")
        want = [
            [[by_hand(heads, corrupted, cache, name, of_head(h), pos) for h in every] for pos in range(4)]
            for name in names
        ]
        assert near(found, want)


def test_every_point_of_a_head(heads):
    clean, corrupted = example(heads, 1, 4, seed=0), example(heads, 1, 4, seed=1)
    cache = caches(heads, clean)
    for how in (patching.get_act_patch_attn_head_all_pos_every, patching.get_act_patch_attn_head_by_pos_every):
        found = how(heads, corrupted, cache, METRIC, **QUIET)
        assert found["point"] == [f"mixer.hook_{leaf}" for leaf in ("u", "dt", "scan", "gate", "gated")]
        for kind in found["point"]:
            points = [f"blocks.{layer}.{kind}" for layer in range(2)]
            alone = patching.sweep(heads, corrupted, cache, METRIC, points, found.axes[1:], **QUIET)
            assert near(found.at(point=kind), alone.values)


def test_a_state_is_carried_by_head(heads):
    """decay 0 and write the clean state at a position, in one head."""
    clean, corrupted = example(heads, 1, 5, seed=0), example(heads, 1, 5, seed=1)
    cache = caches(heads, clean)
    found = patching.get_act_patch_state_head_by_pos(heads, corrupted, cache, METRIC, **QUIET)
    with torch.no_grad():
        want = [
            [
                [
                    METRIC(
                        heads.run_with_hooks(
                            corrupted, fwd_hooks=gl.states.patch(cache, pos, layers=layer, head=head).hooks(heads)
                        )
                    ).mean()
                    for head in range(HEADS)
                ]
                for pos in range(5)
            ]
            for layer in range(2)
        ]
    assert near(found, want)
    # At every position: decay 0 and write the clean state, so the head has all the states of the clean run.
    found = patching.get_act_patch_state_head_all_pos(heads, corrupted, cache, METRIC, **QUIET)
    want = [
        [by_hand(heads, corrupted, cache, f"blocks.{layer}.mixer.hook_state", of_head(head)) for head in range(HEADS)]
        for layer in range(2)
    ]
    assert near(found, want)


def test_heads_of_attention():
    """Griffin: the layers that have heads are on the axis, and what a head gives is hook_z."""
    model = gl.HookedGriffin.tiny(dtype=torch.float64)
    clean, corrupted = example(model, 1, 4, seed=0), example(model, 1, 4, seed=1)
    cache, name = caches(model, clean), "blocks.2.attn.hook_z"

    def cell(head):
        def patch(x, hook):
            x[:, :, head] = cache[name][:, :, head]

        with torch.no_grad():
            return METRIC(model.run_with_hooks(corrupted, fwd_hooks=[(name, patch)])).mean()

    found = patching.get_act_patch_attn_head_out_all_pos(model, corrupted, cache, METRIC, **QUIET)
    assert found["layer"] == [2] and near(found, [[cell(head) for head in range(model.cfg.n_heads)]])
    every = patching.get_act_patch_attn_head_all_pos_every(model, corrupted, cache, METRIC, **QUIET)
    assert every["point"] == ["attn.hook_q", "attn.hook_pattern", "attn.hook_z"]
    assert near(every.at(point="attn.hook_z"), found.values)


def test_a_model_without_heads():
    model = gl.HookedMamba.tiny(dtype=torch.float64)
    clean = example(model, 1, 4)
    cache = caches(model, clean)
    for how in (patching.get_act_patch_attn_head_out_all_pos, patching.get_act_patch_attn_head_by_pos_every):
        with pytest.raises(
            gl.PointError, match="blocks.0.mixer.hook_gated has no axis 'head'.* No point of tiny-mamba has it"
        ):
            how(model, clean, cache, METRIC, **QUIET)
    with pytest.raises(gl.PointError, match="has no axis 'head'"):
        patching.generic_activation_patch(
            model, clean, cache, METRIC, lambda x, index, clean: x, "gated", ("layer", "head_index"), **QUIET
        )


def test_a_setter_by_head(heads):
    clean, corrupted = example(heads, 1, 4, seed=0), example(heads, 1, 4, seed=1)
    cache = caches(heads, clean)

    def setter(x, index, clean):
        some = slice(index[1] * WIDTH, (index[1] + 1) * WIDTH)
        x[..., some] = clean[..., some]
        return x

    found = patching.generic_activation_patch(
        heads, corrupted, cache, METRIC, setter, "gated", ("layer", "head_index"), **QUIET
    )
    want = patching.get_act_patch_gated_head_all_pos(heads, corrupted, cache, METRIC, **QUIET)
    assert torch.allclose(found.values, want.values, rtol=1e-12, atol=1e-12)

"""Splicing: the forward is what it was until something is edited, and then what the equation says."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens.dictionaries import TopK, splice
from gatedlens.errors import InputError, PointError
from tests.dictionaries.making import made, recurrent_layer
from tests.helpers import example

WHERE = ("hook_resid_pre", "mixer.hook_write", "mixer.hook_state", "mixer.hook_gated")


def same(x, hook):
    """A hook that changes nothing: where a state is heard the recurrence runs by other sums."""
    return x * 1


def constant(value):
    """A hook that puts a value in place of whatever is there."""
    return lambda x, hook: value


@pytest.mark.parametrize("where", WHERE)
@torch.no_grad()
def test_nothing_changes_until_a_feature_is_edited(lm, where):
    x, point = example(lm, pos=5), f"blocks.{recurrent_layer(lm)}.{where}"
    if point not in lm.names:
        point = lm.blocks[recurrent_layer(lm)].mixer.output_name
        point = f"blocks.{recurrent_layer(lm)}.mixer.{point.rpartition('.')[2]}"
    before, base = list(lm.names), lm.run_with_hooks(x, fwd_hooks=[(point, same)])
    d = made(lm, point)
    with splice(lm, d) as (one,):
        assert torch.equal(lm.run_with_hooks(x, fwd_hooks=[(one.features, same), (one.errors[0], same)]), base)
        out, cache = lm.run_with_cache(x, names_filter=[*one.rows, point])
        assert torch.equal(out, base)
        alone = lm.run_with_hooks(x, fwd_hooks=[(one.errors[0], lambda e, hook: e * 0)])
        edited = lm.run_with_hooks(x, fwd_hooks=[(one.features, lambda f, hook: f + 1)])
    y = cache[point].flatten(2)
    torch.testing.assert_close(cache[one.features], d.encode(y), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(cache[one.reconstructions[0]] + cache[one.errors[0]], y, atol=1e-10, rtol=1e-10)
    # by the equation, with no dictionary in the model
    for got, value in ((alone, d(y)), (edited, y + torch.ones_like(d.encode(y)) @ d.W_dec)):
        put = lm.run_with_hooks(x, fwd_hooks=[(point, lambda t, hook, value=value: value.view_as(t))])
        torch.testing.assert_close(got, put, atol=1e-9, rtol=1e-9)
    assert list(lm.names) == before and list(lm.hook_dict) == before and not lm.list_hooks()


@pytest.fixture(scope="module")
def mamba2():
    return gl.HookedMamba2.tiny(seed=0, dtype=torch.float64)


def metric(logits):
    return logits[:, -1, 3] - logits[:, -1, 5]


@pytest.fixture(scope="module")
def pair(mamba2):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(mamba2.cfg.d_vocab, (2, 2, 6), generator=generator).unbind(0)


def test_gradients_are_the_models_own(mamba2, pair):
    """Of the embedding as without the dictionary; of a feature what moves the metric."""
    at, d = "blocks.1.hook_resid_pre", made(mamba2, "blocks.1.hook_resid_pre", centred=True, normalise="layer_norm")

    def grads(names):
        found = {}

        def keep(x, hook):
            found[hook.name] = x
            x.retain_grad()

        metric(mamba2.run_with_hooks(pair[0], fwd_hooks=[(name, keep) for name in names])).sum().backward()
        for p in mamba2.wrapped.parameters():
            p.grad = None
        return {name: found[name].grad for name in names}

    plain = grads(["hook_embed"])["hook_embed"]
    with splice(mamba2, d) as (one,):
        found = grads(["hook_embed", one.features, one.errors[0], one.reconstructions[0]])
        f = mamba2.run_with_cache(pair[0], names_filter=one.features)[1][one.features]
        step = torch.zeros_like(f)
        step[0, 2, 4] = 1e-5
        up, down = (
            metric(mamba2.run_with_hooks(pair[0], fwd_hooks=[(one.features, lambda f, hook, s=s: f + s * step)])).sum()
            for s in (1, -1)
        )
    torch.testing.assert_close(found["hook_embed"], plain, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(found[one.features][0, 2, 4], (up - down) / 2e-5, atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(found[one.errors[0]], found[one.reconstructions[0]], atol=1e-12, rtol=0)
    assert at in one.features


def test_every_tool_takes_the_points(mamba2, pair):
    clean, corrupted = pair
    d = made(mamba2, "blocks.1.mixer.hook_gated", n=5, activation=TopK(4))
    with splice(mamba2, {"blocks.1.mixer.hook_gated": d}) as (one,), torch.no_grad():
        name = one.features
        _, cache = mamba2.run_with_cache(clean, names_filter=name)
        base = mamba2(corrupted)
        swept = gl.patching.sweep(mamba2, corrupted, cache, metric, name, ("pos", "feature"), progress=False)
        assert swept.values.shape == (6, 5)
        f = cache[name]

        def put(x, hook):
            x[:, 4, 2] = f[:, 4, 2]
            return x

        by_hand = metric(mamba2.run_with_hooks(corrupted, fwd_hooks=[(name, put)])).mean()
        torch.testing.assert_close(swept.values[4, 2], by_hand, atol=1e-10, rtol=0)
        with gl.ablation.zero(name, feature=[1, 3], pos=-1).on(mamba2):
            ablated = mamba2(corrupted)
        _, own = mamba2.run_with_cache(corrupted, names_filter=name)
        change = torch.zeros_like(own[name])
        change[:, -1, [1, 3]] = -own[name][:, -1, [1, 3]]
        want = mamba2.run_with_hooks(corrupted, fwd_hooks=[(d.point, lambda y, hook: y + change @ d.W_dec)])
        torch.testing.assert_close(ablated, want, atol=1e-10, rtol=0)
        assert torch.equal(ablated[:, :-1], base[:, :-1])
        steer = gl.steering.vector(mamba2, clean, corrupted, name)
        assert steer.vector.shape == (5,)
        table = str(mamba2.hook_table(1))
        assert "sae.hook_features" in table.replace("\n", "")
    with splice(mamba2, d) as (one,):
        found = gl.circuits.attribution_patch(mamba2, clean, corrupted, metric, one.features, keep=("pos", "feature"))
        assert found.values.squeeze(0).shape == (6, 5)
        # the last layer's features reach the logits through one norm alone: small steps agree with the run
        assert torch.sign(found.values.flatten()[found.values.abs().argmax()]) == torch.sign(
            (swept.values - metric(base).mean()).flatten()[found.values.abs().argmax()]
        )


def test_a_transcoder_and_one_with_a_skip(mamba2, pair):
    x = pair[0]
    reads, writes = "blocks.0.ln1.hook_out", "blocks.0.hook_mixer_out"
    for skip in (False, True):
        d = made(mamba2, reads, [writes], skip=skip)
        base, cache = mamba2.run_with_cache(x, names_filter=[reads, writes])
        with splice(mamba2, d) as (one,), torch.no_grad():
            assert one.features == f"{reads}.transcoder.hook_features"
            assert one.errors == [f"{writes}.transcoder.hook_error"]
            assert torch.equal(mamba2(x), base)
            with gl.ablation.zero(one.errors[0]).on(mamba2):
                alone = mamba2(x)
        put = mamba2.run_with_hooks(x, fwd_hooks=[(writes, constant(d(cache[reads])))])
        torch.testing.assert_close(alone, put, atol=1e-10, rtol=0)
    late = made(mamba2, reads, ["blocks.1.hook_mixer_out"])
    resid = mamba2.run_with_cache(x, names_filter="blocks.1.hook_resid_pre")[1]["resid_pre", 1]
    with splice(mamba2, late), torch.no_grad():
        assert torch.equal(mamba2(x), base)
        assert torch.equal(mamba2(resid, start_at_layer=1), base)  # nobody listens: it has nothing to do
        with pytest.raises(InputError, match="ln1.hook_out, which it reads, did not fire"):
            mamba2.run_with_cache(resid, start_at_layer=1, names_filter="*.hook_error")


def test_a_crosscoder_over_layers(mamba2, pair):
    """It writes the first layer before it has read the last: by hand, from a run without it."""
    x, points = pair[0], ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    d = made(mamba2, points)
    with torch.no_grad():
        base, cache = mamba2.run_with_cache(x, names_filter=points)
        both = torch.cat([cache[name] for name in points], -1)
        with splice(mamba2, d) as (one,):
            assert one.features == "blocks.0.hook_resid_post.crosscoder.hook_features"
            out, held = mamba2.run_with_cache(x, names_filter=[one.features, *one.errors])
            assert torch.equal(out, base)
            got = mamba2.run_with_hooks(x, fwd_hooks=[(one.features, lambda f, hook: f * 2)])
        torch.testing.assert_close(held[one.features], d.encode(both), atol=1e-12, rtol=0)
        change = (d.encode(both) @ d.W_dec).split(d.d_outs, -1)
        hooks = [(name, lambda y, hook, v=cache[name] + c: v) for name, c in zip(points, change, strict=True)]
        torch.testing.assert_close(got, mamba2.run_with_hooks(x, fwd_hooks=hooks), atol=1e-10, rtol=0)


def test_a_dictionary_of_heads(mamba2, pair):
    """Of each head's values, and of one head alone."""
    x, point = pair[0], "blocks.1.mixer.hook_scan"
    heads, width = (mamba2.cfg.sizes[name] for name in ("head", "value"))
    with torch.no_grad():
        base, cache = mamba2.run_with_cache(x, names_filter=point)
        y = cache[point].unflatten(-1, (heads, width))
        for axes, index, kept in ((("value",), None, y), (None, {"head": 1}, y[:, :, 1])):
            d = made(mamba2, point, axes=axes, index=index)
            with splice(mamba2, d) as (one,):
                out, held = mamba2.run_with_cache(x, names_filter=one.features)
                assert torch.equal(out, base)
                got = mamba2.run_with_hooks(x, fwd_hooks=[(one.features, lambda f, hook: f * 0)])
                if axes:
                    with gl.ablation.zero(one.features, head=1).on(mamba2):
                        of_one = mamba2(x)
            torch.testing.assert_close(held[one.features], d.encode(kept), atol=1e-12, rtol=0)
            left = y.clone()
            if axes:
                left -= d.encode(y) @ d.W_dec
            else:
                left[:, :, 1] -= d.encode(kept) @ d.W_dec
            put = mamba2.run_with_hooks(x, fwd_hooks=[(point, lambda t, hook, v=left: v.flatten(2))])
            torch.testing.assert_close(got, put, atol=1e-10, rtol=0)
            if axes:
                some = y.clone()
                some[:, :, 1] -= d.encode(y[:, :, 1]) @ d.W_dec
                put = mamba2.run_with_hooks(x, fwd_hooks=[(point, lambda t, hook, v=some: v.flatten(2))])
                torch.testing.assert_close(of_one, put, atol=1e-10, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_and_generation(mamba2, side):
    """A padded row's features are the row's own; a generated text is what it is without the dictionary."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(mamba2.cfg.d_vocab, (1, 4), generator=generator)
    pad = torch.ones(1, 2, dtype=torch.long)
    rows = torch.cat([pad, tokens] if side == "left" else [tokens, pad], 1)
    mask = torch.cat([pad * 0, tokens * 0 + 1] if side == "left" else [tokens * 0 + 1, pad * 0], 1)
    d = made(mamba2, "blocks.1.hook_resid_pre")
    plain = mamba2.generate(tokens, max_new_tokens=3, return_type="tokens", do_sample=False, verbose=False)
    with splice(mamba2, d) as (one,), torch.no_grad():
        alone = mamba2.run_with_cache(tokens, names_filter=one.features)[1][one.features]
        padded = mamba2.run_with_cache(rows, names_filter=one.features, attention_mask=mask)[1][one.features]
        torch.testing.assert_close(padded[mask.bool()], alone[0], atol=1e-10, rtol=1e-10)
        assert torch.equal(
            mamba2.generate(tokens, max_new_tokens=3, return_type="tokens", do_sample=False, verbose=False), plain
        )


def test_what_cannot_be_spliced_is_named(mamba2):
    d = made(mamba2, "blocks.1.hook_resid_pre")
    wide = made(mamba2, "blocks.1.mixer.hook_gated").at("blocks.1.hook_resid_pre")
    for error, said, given in (
        (InputError, "at blocks.1.hook_resid_pre; .* has", wide),
        (InputError, r"dictionary.at\('blocks.0.hook_resid_pre'\)", {"blocks.0.hook_resid_pre": d}),
        (InputError, "is of other, and the model is", d.at(model="other")),
        (PointError, "second one", [d, d]),
        (PointError, "not a hook point", d.at("blocks.1.hook_resid_pro")),
        (PointError, "did you mean|not a hook point|layers 0 to", d.at("blocks.9.hook_resid_pre")),
        (InputError, "no dictionary", [3]),
        (InputError, "No dictionary was given", []),
        (
            PointError,
            "no axis 'head'",
            made(mamba2, "blocks.1.mixer.hook_scan", index={"head": 0}).at("blocks.1.hook_resid_pre"),
        ),
    ):
        with pytest.raises(error, match=said), splice(mamba2, given):
            pass
    with splice(mamba2, d):
        with pytest.raises(PointError, match="second one"), splice(mamba2, d):
            pass
        with splice(mamba2, d.at("blocks.0.hook_resid_pre")):
            assert sum("sae.hook_features" in name for name in mamba2.names) == 2
        assert sum("sae.hook_features" in name for name in mamba2.names) == 1
    with pytest.raises(RuntimeError, match="mine"), splice(mamba2, d):
        raise RuntimeError("mine")
    assert not any("sae" in name for name in mamba2.names) and not mamba2.list_hooks()

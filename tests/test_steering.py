"""Steering vectors: the mean difference, added where and when it says, on every architecture, while generating too."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import gatedlens as gl
from gatedlens import steering
from gatedlens.steering import SteeringVector
from tests.helpers import example, kept, padded

NAME = "blocks.0.hook_resid_post"
CLOSE = {"rtol": 1e-10, "atol": 1e-11}


def made(model, name=NAME, pos=-1):
    return steering.vector(model, example(model, 3, seed=1), example(model, 2, seed=2), name, pos)


def by_hand(model, given, target, vector, where, scale=1.0, **options):
    """The model with `scale * vector` added at `where` [batch, pos]."""

    def add(x, hook):
        return x + scale * where.reshape(*where.shape, *[1] * (x.ndim - 2)) * vector

    with torch.no_grad():
        return model.run_with_hooks(given, fwd_hooks=[(target, add)], **options)


def marks(shape, *at):
    where = torch.zeros(shape)
    where[:, list(at)] = 1
    return where


def states(model):
    """The names of every hook_state of the first block."""
    return [name for name in model.names if name.startswith("blocks.0.") and name.endswith(".hook_state")]


@torch.no_grad()
def test_the_vector_is_the_mean_difference(model):
    for name in (NAME, *states(model)):
        kept = [
            model.run_with_cache(example(model, n, seed=s), names_filter=name)[1][name] for n, s in ((3, 1), (2, 2))
        ]
        for pos in (-1, 2):
            want = kept[0][:, pos].mean(0) - kept[1][:, pos].mean(0)
            assert torch.allclose(made(model, name, pos).vector, want, **CLOSE)
        want = kept[0].mean((0, 1)) - kept[1].mean((0, 1))
        found = made(model, name, None)
        assert torch.allclose(found.vector, want, **CLOSE) and found.facts["positive"] == 3


@torch.no_grad()
def test_a_vector_at_a_position_in_each_row(model):
    vector, x = made(model), example(model)
    with vector.on(model, 2.0, pos=torch.tensor([1, 3])):
        found = model(x)
    where = torch.zeros(2, model.positions(model.prepare(x)[0]))
    where[0, 1] = where[1, 3] = 1
    assert torch.allclose(found, by_hand(model, x, NAME, vector.vector, where, 2.0), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_are_counted_among_real_tokens(lm, side):
    rows = [example(lm, 1, n, seed=n)[0] for n in (7, 4)]
    given, other = padded(rows, side), example(lm, 2, seed=3)
    alone = [lm.run_with_cache(row.unsqueeze(0), names_filter=NAME)[1][NAME][0] for row in rows]
    base = lm.run_with_cache(other, names_filter=NAME)[1][NAME]
    for pos in (-1, 1):
        want = (alone[0][pos] + alone[1][pos]) / 2 - base[:, pos].mean(0)
        assert torch.allclose(steering.vector(lm, given, other, NAME, pos).vector, want, **CLOSE)
    want = (alone[0].mean(0) + alone[1].mean(0)) / 2 - base.mean((0, 1))
    assert torch.allclose(steering.vector(lm, given, other, NAME, None).vector, want, **CLOSE)
    found = made(lm)
    for pos, chosen in ((-1, [-1]), ([0, 2], [0, 2]), (slice(-2, None), [-2, -1]), (slice(1, 3), [1, 2])):
        with found.on(lm, 2.0, pos):
            out = lm(given[0], attention_mask=given[1])
        for i, row in enumerate(rows):
            want = by_hand(lm, row.unsqueeze(0), NAME, found.vector, marks((1, len(row)), *chosen), 2.0)[0]
            assert torch.allclose(out[i][given[1][i]], want, **CLOSE), (side, pos)


@torch.no_grad()
def test_it_is_added_where_it_says(model):
    x, found = example(model), made(model)
    shape = model.run_with_cache(x, names_filter=NAME)[1][NAME].shape[:2]
    clean = model(x)
    for pos, at in ((None, range(shape[1])), (3, [3]), (slice(2, None), range(2, shape[1]))):
        with found.on(model, 1.5, pos):
            out = model(x)
            assert torch.allclose(model(x), out), "a second prompt is a prompt too"
        assert torch.allclose(out, by_hand(model, x, NAME, found.vector, marks(shape, *at), 1.5), **CLOSE)
        if pos is None:
            assert not torch.allclose(out, clean, atol=1e-4)
    value = found.intervention(1.5, pos=3) + gl.ablation.zero("blocks.1.hook_mixer_out")
    with value.on(model):
        out = model(x)
    with gl.ablation.zero("blocks.1.hook_mixer_out").on(model):
        assert torch.allclose(out, by_hand(model, x, NAME, found.vector, marks(shape, 3), 1.5), **CLOSE)
    assert torch.allclose(model(x), clean) and not model._forward_pre_hooks


def greedy(model, tokens, steps, target, vector, where):
    """Greedy generation by the whole sequence at every step; `where(length)` [pos] says where the vector is added."""
    for _ in range(steps):
        logits = by_hand(model, tokens, target, vector, where(tokens.shape[1]).expand(len(tokens), -1))
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    return tokens


@torch.no_grad()
@pytest.mark.parametrize("pos", [None, slice(-1, None), -1, slice(0, 3)], ids=str)
def test_generation_is_steered_as_the_whole_would_be(lm, pos):
    tokens, found = example(lm), made(lm).normalised(6.0)
    prompt = tokens.shape[1]

    def where(length):
        chosen = torch.zeros(length)
        chosen[:prompt][slice(pos, None) if isinstance(pos, int) else slice(None) if pos is None else pos] = 1
        chosen[prompt:] = float(pos is None or pos == slice(-1, None))
        return chosen

    with found.on(lm, pos=pos):
        ids = lm.generate(tokens, max_new_tokens=5, do_sample=False, verbose=False)
    assert torch.equal(ids, greedy(lm, tokens, 5, NAME, found.vector, where))
    if pos is None:
        assert not torch.equal(ids, lm.generate(tokens, max_new_tokens=5, do_sample=False, verbose=False))


@torch.no_grad()
def test_a_steered_state_propagates_by_the_recurrence(model):
    """state_{t + k} = clean state_{t + k} + what the steps t + 1 ... t + k keep of v, in the order of the scan."""
    x, at = example(model), 2
    for name in states(model):
        found, stem = made(model, name), name.removesuffix("hook_state")
        assert found.target == f"{stem}hook_write"
        keep = [row for row in model.names if row.startswith(stem)]
        _, clean = model.run_with_cache(x, names_filter=keep)
        with found.on(model, 0.5, at):
            _, steered = model.run_with_cache(x, names_filter=keep)
        want = clean[name].clone()
        backward = ".bwd." in name
        order = range(at, -1, -1) if backward else range(at, want.shape[1])
        carried = 0.5 * found.vector.expand_as(want[:, 0])
        for t in order:
            carried = carried if t == at else kept(clean, stem, carried, t)
            want[:, t] += carried
        assert torch.allclose(steered[name], want, **CLOSE)


@torch.no_grad()
def test_a_state_is_steered_once_and_carried_on(lm):
    name = states(lm)[0]
    tokens, found = example(lm, pos=9), made(lm, name)
    cut = 6
    with found.on(lm, 2.0, pos=-1):
        _, state = lm(tokens[:, :cut], return_state=True)
        inside, _ = lm(tokens[:, cut:], state=state, return_state=True)
    outside, _ = lm(tokens[:, cut:], state=state, return_state=True)
    whole = by_hand(lm, tokens, found.target, found.vector, marks(tokens.shape, cut - 1), 2.0)
    assert torch.allclose(inside, whole[:, cut:], **CLOSE) and torch.allclose(outside, inside, **CLOSE)
    assert not torch.allclose(whole[:, cut:], lm(tokens)[:, cut:], atol=1e-6)
    with found.on(lm, 2.0, pos=-1):
        ids = lm.generate(tokens, max_new_tokens=4, do_sample=False, verbose=False)
    end = tokens.shape[1] - 1
    want = greedy(lm, tokens, 4, found.target, 2 * found.vector, lambda n: marks((1, n), end)[0])
    assert torch.equal(ids, want)


@torch.no_grad()
def test_a_prompt_behind_a_given_state_is_a_prompt(lm):
    tokens, found = example(lm, pos=9), made(lm)
    _, state = lm(tokens[:, :4], return_state=True)
    with found.on(lm, pos=-1):
        out = lm(tokens[:, 4:], state=state)
    want = by_hand(lm, tokens[:, 4:], NAME, found.vector, marks((2, 5), 4), state=state)
    assert torch.allclose(out, want, **CLOSE)


def test_as_vectors_and_on_disk(model, tmp_path):
    found = made(model)
    assert abs(found.normalised(2.5).norm - 2.5) < 1e-12
    assert abs(found.cosine(found.normalised()) - 1) < 1e-12
    assert abs(found.cosine(found.normalised(-1.0)) + 1) < 1e-12
    other = made(model, pos=1)
    a, b = found.vector, other.vector
    assert abs(found.cosine(other) - float(a @ b / a.norm() / b.norm())) < 1e-12
    back = SteeringVector.load(found.save(tmp_path / "v.safetensors"))
    assert torch.equal(back.vector, a) and back.name == NAME and back.facts == found.facts
    assert f"SteeringVector({NAME}, [16], norm" in repr(back)


def test_texts_steer_a_trained_model(moby_model):
    found = steering.vector(moby_model, ["the whale", "a white whale!"], ["I", "we went home"], NAME)
    assert found.vector.shape == (moby_model.cfg.d_model,) and found.norm > 0
    with found.on(moby_model, 8.0):
        steered = moby_model.generate("Call me", max_new_tokens=12, do_sample=False, verbose=False)
    plain = moby_model.generate("Call me", max_new_tokens=12, do_sample=False, verbose=False)
    assert steered.startswith("Call me") and steered != plain


def test_mistakes_about_steering_leave_nothing_behind(model, tmp_path):
    x = example(model)
    with pytest.raises(gl.PointError, match="Did you mean"):
        made(model, "blocks.0.hook_resid_pots")
    for name in model.names:
        if name.endswith("hook_state_start"):
            with pytest.raises(gl.PointError, match="cannot be steered: .* its axes are batch (channel|head)"):
                made(model, name)
    with pytest.raises(gl.InputError, match="pos=.*out of range"):
        made(model, pos=400)
    with pytest.raises(gl.InputError, match="it has no direction"):
        steering.vector(model, x, x, NAME).normalised()
    wrong = SteeringVector(NAME, torch.zeros(7), {"model": "another"})
    with pytest.raises(gl.InputError, match=r"has shape \[7\]; .* wants \[16\] there: .*\(another\)"), wrong.on(model):
        model(x)
    with pytest.raises(gl.InputError, match="cosine"):
        made(model).cosine(wrong)
    with pytest.raises(gl.InputError, match="pos=.*out of range"), made(model).on(model, pos=77):
        model(x)
    with pytest.raises(RuntimeError), made(model).on(model):
        raise RuntimeError
    assert not model.list_hooks() and not model._forward_pre_hooks
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(gl.CheckpointError, match="no saved SteeringVector"):
        SteeringVector.load(tmp_path / "other.safetensors")
    with pytest.raises(gl.CheckpointError, match="not a readable"):
        SteeringVector.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("leaf", ["gated", "state"])
@torch.no_grad()
def test_a_vector_of_one_head(leaf):
    model, name = gl.HookedMamba2.tiny(dtype=torch.float64), f"blocks.0.mixer.hook_{leaf}"
    whole = made(model, name)
    vector = steering.vector(model, example(model, 3, seed=1), example(model, 2, seed=2), name, head=2)
    own = vector.vector if leaf == "state" else vector.vector.unflatten(0, (4, 8))
    every = whole.vector if leaf == "state" else whole.vector.unflatten(0, (4, 8))
    assert torch.equal(own[2], every[2]) and not own[[0, 1, 3]].any() and every.all()
    tokens, target = example(model), vector.target
    want = by_hand(model, tokens, target, vector.vector, marks(tokens.shape, 3), 2.0)
    for steered, index in ((vector, {}), (whole, {"head": 2}), (whole, {"channel": range(16, 24)})):
        with steered.on(model, 2.0, pos=3, **index):
            assert torch.allclose(model(tokens), want, **CLOSE)
        got = model.run_with_hooks(tokens, fwd_hooks=steered.intervention(2.0, pos=3, **index).hooks(model))
        assert torch.allclose(got, want, **CLOSE)
    with pytest.raises(gl.InputError, match="head=4 is out of range"), whole.on(model, head=4):
        pass
    with pytest.raises(gl.InputError, match="batch=0: a vector has no rows"):
        steering.vector(model, example(model), example(model), name, batch=0)


def test_vectors_add_up_and_scale():
    a = SteeringVector(NAME, torch.tensor([1.0, -2.0]), {"model": "m", "positive": 1})
    b = SteeringVector(NAME, torch.tensor([0.5, 4.0]), {"model": "m", "positive": 2})
    sums = ((a + b, [1.5, 2.0]), (a - b, [0.5, -6.0]))
    for found, want in ((a * 4, [4.0, -8.0]), (4 * a, [4.0, -8.0]), (a / 2, [0.5, -1.0]), (-a, [-1.0, 2.0]), *sums):
        assert isinstance(found, SteeringVector) and found.name == NAME and found.vector.tolist() == want
    assert (a * 4).facts == a.facts and (a + b).facts == {"model": "m"}
    with pytest.raises(gl.InputError, match="are of two points"):
        a + SteeringVector("blocks.1.hook_resid_post", torch.tensor([1.0, 1.0]))
    for wrong in (lambda: a * "4", lambda: a + 1, lambda: a * b):
        with pytest.raises(TypeError):
            wrong()

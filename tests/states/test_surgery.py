"""State surgery: a patched state propagates exactly, spliced states are what they say, readers read them; mistakes."""

from __future__ import annotations

import itertools

import pytest
import torch

import gatedlens as gl
from gatedlens import ablation, knockout, states
from gatedlens.hooks import architectures
from tests.helpers import by_channel, example, kept, padded, relative

AT = 3  # a position in the middle


def same(a, b):
    return torch.allclose(a, b, rtol=1e-10, atol=1e-10)


def stems(model, layer):
    """The places of a layer's recurrences: `blocks.0.mixer.` or one a direction; none in an attention layer."""
    mixer = model.blocks[layer].mixer
    found = [f"blocks.{layer}.{mixer.place}.{scan + '.' if scan else ''}" for scan in mixer.scans]
    return [stem for stem in found if f"{stem}hook_state" in model.names]


def everything(model, input, intervention=None, **options):
    with torch.no_grad(), (intervention or ablation.Intervention(())).on(model):
        return model.run_with_cache(input, names_filter=lambda name: True, **options)[1]


def run_to(model, tokens):
    """The state after `tokens`."""
    with torch.no_grad():
        return model(tokens, return_type=None, return_state=True)[1]


def go_on(model, tokens, state):
    with torch.no_grad():
        return model(tokens, state=state)


def pair(model, split: int = 4):
    """(A's prefix, B's prefix, the suffix of both): 2 rows each."""
    a, b = example(model, 2, 9, seed=1), example(model, 2, 9, seed=2)
    return a[:, :split], b[:, :split], b[:, split:]


# -- in the middle of a run -----------------------------------------------------------------------------------------


def by_loop(model, clean, stem, new, at, chosen=...):
    """state_t = what is kept of state_{t-1} + write_t, with the chosen entries of the state after `at` replaced by `new`."""
    write, state, found = clean[f"{stem}hook_write"], clean[f"{stem}hook_state_start"], {}
    for t in sorted(range(write.shape[1]), reverse=stem.endswith("bwd.")):
        state = kept(clean, stem, state, t) + write[:, t]
        if t == at:
            state = state.clone(memory_format=torch.contiguous_format)
            by_channel(state, model, 1)[chosen] = by_channel(new, model, 1)[chosen]
        found[t] = state
    return torch.stack([found[t] for t in range(write.shape[1])], 1)


@pytest.mark.parametrize("index", [{}, {"channel": [0, 5, -1]}], ids=["all", "channels"])
def test_a_patch_sets_the_state_and_later_positions_follow(model, index):
    clean, other = everything(model, example(model)), everything(model, example(model, seed=5))
    chosen = (slice(None), index["channel"]) if index else ...
    for layer in range(model.cfg.n_layers):
        for stem in stems(model, layer):
            name = stem.split(".")[-2] if stem.count(".") > 3 else None
            patched = everything(model, example(model), states.patch(other, AT, layers=layer, scan=name, **index))
            want = by_loop(model, clean, stem, other[f"{stem}hook_state"][:, AT], AT, chosen)
            assert same(patched[f"{stem}hook_state"], want)
            before = slice(AT + 1, None) if name == "bwd" else slice(AT)
            assert same(patched[f"{stem}hook_scan"][:, before], clean[f"{stem}hook_scan"][:, before])
            assert not same(patched[f"{stem}hook_scan"], clean[f"{stem}hook_scan"])


def test_the_suffix_after_a_patch_goes_on_from_the_patched_state(lm):
    """B's prefix run under the patch leaves A's scan states, and the suffix goes on from them."""
    a, b, suffix = pair(lm)
    at, state_a = b.shape[1] - 1, run_to(lm, a)
    whole, cache = torch.cat([b, suffix], 1), everything(lm, torch.cat([a, suffix], 1))
    clean = go_on(lm, whole, None)
    for source in (state_a, cache):
        patch = states.patch(source, at, layers=0)
        with torch.no_grad(), patch.on(lm):
            got = lm(whole)
            left = run_to(lm, b)
        assert same(lm.blocks[0].mixer.state_of(left), lm.blocks[0].mixer.state_of(state_a))
        assert same(got[:, at + 1 :], go_on(lm, suffix, left)) and not same(got, clean)
        assert same(got[:, :at], clean[:, :at])


def test_in_the_last_layer_a_patch_is_a_splice(lm):
    """There position t's own readout, which the patch changes and the splice does not, reaches nothing later; but where the
    channel mix reads the position before, it reaches the next one."""
    a, b, suffix = pair(lm)
    state_a, state_b, last = run_to(lm, a), run_to(lm, b), lm.cfg.n_layers - 1
    if not stems(lm, last):
        pytest.skip("the last layer is attention")
    for index in ({}, {"channel": [1, 2]}):
        want = go_on(lm, suffix, states.splice(lm, state_b, state_a, layers=last, parts="scan", **index))
        with torch.no_grad(), states.patch(state_a, b.shape[1] - 1, layers=last, **index).on(lm):
            got = lm(torch.cat([b, suffix], 1))[:, b.shape[1] :]
        first = 1 if lm.cfg.architecture == "rwkv7" else 0  # RWKV-4's readout is of the state before
        assert same(got[:, first:], want[:, first:]) and not same(got, go_on(lm, suffix, state_b))


def test_patches_by_row_from_other_positions_and_from_a_tensor(lm):
    b = example(lm, 2, 9, seed=2)
    other = everything(lm, example(lm, 2, 7, seed=1))
    (stem,) = stems(lm, 0)
    state = other[f"{stem}hook_state"]
    pos, source_pos = torch.tensor([2, 5]), torch.tensor([6, 1])
    both = everything(lm, b, states.patch(other, pos, layers=0, source_pos=source_pos))
    new = state[torch.arange(2), source_pos]
    given = everything(lm, b, states.patch(new, pos, layers=0))
    for row in range(2):
        alone = everything(lm, b[row : row + 1], states.patch(new[row : row + 1], int(pos[row]), layers=0))
        assert same(both["hook_logits"][row], alone["hook_logits"][0])
        assert same(given["hook_logits"][row], alone["hook_logits"][0])
    for_all = everything(lm, b, states.patch(new[:1], 2, layers=0))
    assert same(for_all[f"{stem}hook_state"][:, 2], new[:1].expand_as(new))
    twice = states.patch(new, 2, layers=0, channel=0) + states.patch(new, 4, layers=0, channel=1)
    got, new = by_channel(everything(lm, b, twice)[f"{stem}hook_state"], lm, 2), by_channel(new, lm, 1)
    assert same(got[:, 2, 0], new[:, 0]) and same(got[:, 4, 1], new[:, 1]) and not same(got[:, 2, 1], new[:, 1])


def test_one_entry_of_the_state_axis():
    model = architectures()["rwkv"].tiny(dtype=torch.float64)
    clean, other = everything(model, example(model)), everything(model, example(model, seed=5))
    patched = everything(model, example(model), states.patch(other, AT, layers=0, state=0))["blocks.0.mixer.hook_state"]
    assert same(patched[:, AT, :, 0], other["blocks.0.mixer.hook_state"][:, AT, :, 0])
    assert same(patched[..., 1], clean["blocks.0.mixer.hook_state"][..., 1])


def test_under_padding_a_patch_is_that_of_the_row_alone(lm):
    rows = [torch.arange(1, 10), torch.arange(3, 9)]
    new = everything(lm, example(lm, 2, 5, seed=4))[f"{stems(lm, 0)[0]}hook_state"][:, -1]
    for side, pos in itertools.product(("left", "right"), (torch.tensor([4, 2]), -1, 1)):
        tokens, mask = padded(rows, side)
        got = everything(lm, tokens, states.patch(new, pos, layers=0), attention_mask=mask)["hook_logits"]
        for row, alone in enumerate(rows):
            own = int(pos[row]) if isinstance(pos, torch.Tensor) else pos
            want = everything(lm, alone.unsqueeze(0), states.patch(new[row : row + 1], own, layers=0))["hook_logits"]
            assert same(got[row][mask[row]], want[0])
        with pytest.raises(gl.InputError, match="pos=7 is out of range: row 1 has 6 positions"):
            everything(lm, tokens, states.patch(new, 7, layers=0), attention_mask=mask)
    assert not lm.list_hooks() and lm.running is None


def test_gradients_reach_the_new_state_and_not_the_old(lm):
    b = example(lm, 1, 8)
    new = everything(lm, example(lm, 1, 8, seed=4))[f"{stems(lm, 0)[0]}hook_state"][:, AT].requires_grad_()
    with states.patch(new, AT, layers=0).on(lm):
        (grad,) = torch.autograd.grad(lm(b)[:, -1].sum(), new)
    assert grad.shape == new.shape and grad.abs().max() > 0


def test_a_cut_through_a_patched_state_is_refused(lm):
    """After a patch the state no longer holds what A says: a cut would take away what is not there."""
    new = everything(lm, example(lm))[f"{stems(lm, 0)[0]}hook_state"][:, AT]
    both = states.patch(2 * new, AT, layers=0) + knockout.cut(1, 5, layers=0)
    with pytest.raises(gl.InputError, match="would not be exact"):
        everything(lm, example(lm), both)


# -- between two calls ----------------------------------------------------------------------------------------------


def test_every_tensor_of_the_state_says_what_it_is(lm):
    state = run_to(lm, example(lm))
    for key in state:
        axes = lm.carried[key.rpartition(".")[2]].axes.split()
        assert axes[0] == "batch" and state[key].ndim <= len(axes)
        sizes = {**lm.cfg.sizes, "batch": 2}
        for axis, size in zip(axes, state[key].shape, strict=False):
            assert sizes.get(axis, size) == size, f"{key}: {axis}"


def test_everything_of_a_is_going_on_from_a(lm):
    a, b, suffix = pair(lm)
    state_a, state_b = run_to(lm, a[:, :3]), run_to(lm, b)  # of different lengths
    spliced = states.splice(lm, state_b, state_a)
    want = go_on(lm, torch.cat([a[:, :3], suffix], 1), None)[:, 3:]
    assert same(go_on(lm, suffix, spliced), want) and torch.equal(spliced.seen, state_a.seen)


def test_layers_parts_and_channels_and_nothing_else(lm):
    a, b, suffix = pair(lm)
    state_a, state_b = run_to(lm, a), run_to(lm, b)
    before = {key: state_b[key].clone() for key in state_b}
    parts = {lm.carried[key.rpartition(".")[2]].part for key in state_b} - {""}
    for part in parts:
        got = states.splice(lm, state_b, state_a, parts=part)
        for key in got:
            mine = lm.carried[key.rpartition(".")[2]].part == part
            assert torch.equal(got[key], (state_a if mine else state_b)[key])
    got = states.splice(lm, state_b, state_a, layers=[0], parts="scan", channel=[0, -1])
    for key in got:
        changed = key.startswith("blocks.0.") and lm.carried[key.rpartition(".")[2]].part == "scan"
        want = state_b[key].clone(memory_format=torch.contiguous_format)
        if changed:
            by_channel(want, lm, 1)[:, [0, -1]] = by_channel(state_a[key], lm, 1)[:, [0, -1]]
        assert torch.equal(got[key], want)
    assert all(torch.equal(before[key], state_b[key]) for key in before), "the given state was changed"
    x, y = states.swap(lm, state_a, state_b, layers=0, parts="scan")
    assert same(go_on(lm, suffix, x), go_on(lm, suffix, states.splice(lm, state_a, state_b, layers=0, parts="scan")))
    assert same(go_on(lm, suffix, y), go_on(lm, suffix, states.splice(lm, state_b, state_a, layers=0, parts="scan")))


def test_rows_among_themselves_and_one_row_for_all(lm):
    _, b, suffix = pair(lm)
    state = run_to(lm, b)
    swapped = states.splice(lm, state, state.rows([1, 0]))
    assert same(go_on(lm, suffix, swapped), go_on(lm, torch.cat([b.flip(0), suffix], 1), None)[:, b.shape[1] :])
    one = states.splice(lm, state, state.rows([1]), layers=0, parts="scan")
    assert same(go_on(lm, suffix, one)[1], go_on(lm, suffix, state)[1])


def test_reading_a_state_through_another_prompt(lm):
    a, b, suffix = pair(lm)
    whole, at = torch.cat([b, suffix], 1), b.shape[1]
    all_of_a = states.read_through(lm, a, whole, at)
    assert same(all_of_a, go_on(lm, torch.cat([a, suffix], 1), None)[:, a.shape[1] :])
    words = (key.split(".")[1:] for key in run_to(lm, b))
    scans = sorted({int(layer) for layer, name in words if lm.carried[name].part == "scan"})
    some = {"layers": scans[-1] if lm.cfg.n_layers < 3 else [0, 1], "parts": "scan"}
    want = go_on(lm, suffix, states.splice(lm, run_to(lm, b), run_to(lm, a), **some))
    assert same(states.read_through(lm, a, whole, at, **some), want)
    assert same(states.read_through(lm, run_to(lm, a), whole, at, **some), want)
    reader = whole[:1]  # one reader for many sources, one source for many readers
    got = states.read_through(lm, a, reader, at, **some)
    assert same(got[0], states.read_through(lm, a[:1], reader, at, **some)[0]) and got.shape[0] == 2
    assert same(states.read_through(lm, a[:1], whole, at, **some)[0], got[0])


def test_a_spliced_state_generates(lm):
    a, b, suffix = pair(lm)
    state = states.splice(lm, run_to(lm, b), run_to(lm, a), layers=0, parts="scan")
    got = lm.generate(suffix, max_new_tokens=2, temperature=0, state=state, return_type="tokens")
    first = go_on(lm, suffix, state)[:, -1].argmax(-1)
    assert torch.equal(got[:, suffix.shape[1]], first)


# -- mistakes -------------------------------------------------------------------------------------------------------


def test_mistakes_in_patches_are_explained_and_leave_nothing_behind(lm):
    tokens = example(lm, 2, 8)
    cache = everything(lm, tokens)
    new = cache[f"{stems(lm, 0)[0]}hook_state"][:, 0]
    state = run_to(lm, tokens)
    for make, error, message in [
        (lambda: states.patch(new, 20, layers=0), gl.InputError, "pos=20 is out of range: row 0 has 8 positions"),
        (lambda: states.patch(new, torch.tensor([1, 2, 3]), layers=0), gl.InputError, "has 3 rows; the batch has 2"),
        (lambda: states.patch(new, [1, 2, 3], layers=0), gl.InputError, "one position is meant in each row"),
        (lambda: states.patch(cache, 3, source_pos=30), gl.InputError, "source_pos=30 is out of range"),
        (lambda: states.patch(new, 1, layers=9), gl.InputError, "layers=9 does not exist"),
        (lambda: states.patch(new, 1, layers=0, tap=0), gl.PointError, "has no axis 'tap'"),
        (lambda: states.patch(new, 1, layers=0, channel=99), gl.InputError, "channel=99 is out of range"),
        (lambda: states.patch(new, 1, layers=0, batch=0), gl.InputError, "says its position by pos"),
        (lambda: states.patch(new[:, :3], 1, layers=0), gl.InputError, "it must be"),
        (lambda: states.patch({}, 1, layers=0), gl.PointError, "The source holds no blocks.0.mixer.hook_state"),
        (lambda: states.patch(state.rows([0, 0, 0]), 1, layers=0), gl.InputError, "it must be"),
        (lambda: states.patch(new, 1, layers=0, scan="fwd"), gl.InputError, "has one scan: leave `scan` out"),
    ]:
        with pytest.raises(error, match=message), make().on(lm):
            lm(tokens)
        assert not lm.list_hooks() and lm.running is None
    sliced = lm.run_with_cache(tokens, names_filter="*.hook_state", pos_slice=-1)[1]
    with pytest.raises(gl.InputError, match="keeps only some positions"):
        states.patch(sliced, 1).hooks(lm)


def test_an_attention_layer_has_no_state_to_patch():
    model = architectures()["griffin"].tiny(dtype=torch.float64)
    state = run_to(model, example(model))
    assert all(name.startswith(("blocks.0.", "blocks.1.")) for name, _ in states.patch(state, 1).hooks(model))
    with pytest.raises(gl.PointError, match="Layer 2 of tiny-griffin has no recurrence.*attn"):
        states.patch(state, 1, layers=[0, 2]).hooks(model)
    with pytest.raises(gl.InputError, match="Layer 2 carries no scan; it carries window"):
        states.splice(model, state, state, layers=2, parts="scan")
    longer = run_to(model, example(model, 2, 8))
    with pytest.raises(gl.InputError, match="attention window.*have seen as many tokens"):
        states.splice(model, longer, state, layers=2)
    other = run_to(model, example(model, seed=3))
    assert torch.equal(states.splice(model, other, state, layers=2)["keys", 2], state["keys", 2])


def test_mistakes_in_splices_and_readers_are_explained(lm):
    tokens = example(lm, 2, 8)
    state = run_to(lm, tokens)
    other = architectures()["mamba" if lm.cfg.architecture != "mamba" else "rwkv"].tiny(dtype=torch.float64)
    for call, error, message in [
        (lambda: states.splice(lm, state, tokens), gl.InputError, "second state is Tensor"),
        (lambda: states.splice(lm, state, run_to(other, tokens)), gl.InputError, "states of different models"),
        (lambda: states.splice(lm, state, state.rows([0, 1, 0])), gl.InputError, "holds 3 rows and the other 2"),
        (lambda: states.splice(lm, state, state, parts="scn"), gl.InputError, "Did you mean 'scan'"),
        (lambda: states.splice(lm, state, state, layers=8), gl.InputError, "layers=8 does not exist"),
        (lambda: states.splice(lm, state, state, parts="scan", tap=0), gl.PointError, "has no axis 'tap'"),
        (lambda: states.splice(lm, state, state, parts="scan", channel=99), gl.InputError, "out of range"),
        (lambda: states.read_through(lm, tokens, tokens, 8), gl.InputError, "at=8: give 1 to 7"),
        (lambda: states.read_through(lm, tokens, tokens, 0), gl.InputError, "at=0: give 1 to 7"),
    ]:
        with pytest.raises(error, match=message):
            call()


# -- what is known --------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["mamba", "griffin", "rwkv"])
def test_on_recall_the_state_before_the_question_holds_the_answer(name):
    """Another prompt's states in place of its own, just before `?`: the model recalls the other prompt's value."""
    model = gl.from_pretrained(f"gatedlens/{name}-recall", device="cpu")
    batch = gl.tasks.recall(64, seed=1)
    values = gl.tasks.ids(gl.tasks.VALUES)
    other = batch.with_answer(values[(batch.answers - values[0] + 3) % len(values)])
    _, state = model(other.tokens[:, :-2], return_state=True)

    def recalled(answers, intervention):
        with intervention.on(model):
            return (model(batch.tokens)[:, -1].argmax(-1) == answers).float().mean().item()

    patch = states.patch(state, batch.tokens.shape[1] - 3)
    assert recalled(batch.answers, ablation.Intervention(())) > 0.95
    assert recalled(other.answers, patch) > 0.7 > 0.3 > recalled(batch.answers, patch)
    everything_of_it = states.read_through(model, state, batch.tokens, at=batch.tokens.shape[1] - 2)
    assert (everything_of_it[:, -1].argmax(-1) == other.answers).float().mean() > 0.95


@pytest.mark.parametrize("width", [1, 2])
@torch.no_grad()
def test_convs_of_one_and_two_taps_go_on_from_a_state(width):
    """Logits at every split, and the implicit attention after each: no architecture needs a tail."""
    griffin = gl.HookedGriffin.tiny(dtype=torch.float64, conv1d_width=width)
    mamba = gl.HookedMamba.tiny(dtype=torch.float64, ssm_cfg={"d_state": 4, "d_conv": width})
    for model in (griffin, mamba):
        tokens = example(model, 2, 6)
        whole = model(tokens)
        for split in (1, 2, 5):
            first, state = model(tokens[:, :split], return_state=True)
            rest, cache = model.run_with_cache(tokens[:, split:], state=state)
            assert relative(torch.cat([first, rest], 1), whole) < 1e-12
            assert gl.implicit_attention(cache).check().relative < 1e-10

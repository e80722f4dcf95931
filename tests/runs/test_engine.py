"""The engine: metrics, baselines, scores, interruption, mistakes; and TransformerLens's own function."""

from __future__ import annotations

import pytest
import torch
from transformer_lens import patching as theirs

import gatedlens as gl
from gatedlens import patching
from gatedlens.result.result import Result
from tests.patching.test_sweeping import QUIET, by_hand, caches, close, metric, pair


@pytest.fixture
def case(model):
    clean, corrupted = pair(model)
    return model, corrupted, caches(model, clean), clean


def test_the_generic_function_is_transformer_lens_with_a_result(lm):
    clean, corrupted = pair(lm)
    cache = caches(lm, clean)
    given = (lm, corrupted, cache, lambda logits: metric(logits).mean(), theirs.layer_pos_patch_setter, "resid_pre")
    with torch.no_grad():
        want = theirs.generic_activation_patch(*given, index_axis_names=("layer", "pos"))
    found, frame = patching.generic_activation_patch(*given, ("layer", "pos"), return_index_df=True, **QUIET)
    assert isinstance(found, Result) and torch.allclose(found.float(), want, atol=1e-6)
    assert list(frame.columns) == ["layer", "pos"] and len(frame) == want.numel()
    with torch.no_grad():
        assert torch.allclose(theirs.get_act_patch_resid_pre(*given[:4]), want)
    family = patching.get_act_patch_resid_pre(*given[:4], **QUIET)
    assert close(family, found.values)
    # Chosen indices: one axis, in the frame's order.
    chosen, again = patching.generic_activation_patch(
        *given, index_df=frame.iloc[[5, 2]], return_index_df=True, **QUIET
    )
    assert close(chosen, found.flatten()[[5, 2]]) and chosen["patch"][0] == "layer 0, pos 5" and len(again) == 2
    assert close(
        patching.get_act_patch_attn_out(*given[:4], **QUIET)[1, 3],
        by_hand(lm, corrupted, cache, "blocks.1.hook_mixer_out", pos=3),
    )


def test_a_setter_may_do_anything(case):
    """Return a new tensor, edit in place, or read another axis."""
    model, corrupted, cache, _ = case

    def mixed(x, index, clean):
        _, channel = index
        out = x.clone()
        out[..., channel] = 0.5 * clean[..., channel] + 0.5 * x[..., channel]
        return out

    found = patching.generic_activation_patch(
        model, corrupted, cache, metric, mixed, "mixer_out", ("layer", "d_model"), **QUIET
    )
    name = "blocks.1.hook_mixer_out"
    with torch.no_grad():
        want = metric(
            model.run_with_hooks(corrupted, fwd_hooks=[(name, lambda x, hook: mixed(x, (1, 3), cache[name]))])
        )
    assert close(found[1, 3], want.mean())


# -- numbers --------------------------------------------------------------------------------------------------------


def test_rows_scores_and_several_metrics(case):
    model, corrupted, cache, clean = case
    rows = patching.get_act_patch_resid_pre(model, corrupted, cache, metric, reduce="none", **QUIET)
    assert rows.axes == ("layer", "pos", "batch") and rows.size("batch") == 2
    mean = patching.get_act_patch_resid_pre(model, corrupted, cache, metric, **QUIET)
    assert close(rows.mean_over("batch"), mean.values)
    low, high = (float(metric(model(x)).mean().detach()) for x in (corrupted, clean))
    score = patching.get_act_patch_resid_pre(model, corrupted, cache, metric, normalised=True, **QUIET)
    assert close(score, (mean.values - low) / (high - low)) and score.facts["normalised"] is True
    two = {"difference": metric, "negative": lambda logits: -metric(logits)}
    both = patching.get_act_patch_resid_pre(model, corrupted, cache, two, normalised=True, **QUIET)
    assert both.axes == ("metric", "layer", "pos") and both["metric"] == ["difference", "negative"]
    assert close(both.at(metric="negative"), score.values) and both.facts["clean"]["negative"] == pytest.approx(-high)
    # A metric that knows its rows: each call gets one patch's rows, in their order.
    chosen = torch.tensor([1, 3])
    own = gl.metrics.logit(chosen)
    found = patching.get_act_patch_resid_pre(model, corrupted, cache, own, **QUIET)
    assert close(found[1, 2], by_hand(model, corrupted, cache, "blocks.1.hook_resid_pre", measure=own, pos=2))


def test_the_clean_baseline_where_it_can_be_known(case):
    model, corrupted, cache, clean = case
    name = "blocks.1.hook_mixer_out"
    with torch.no_grad():
        small = model.run_with_cache(clean, names_filter=name)[1]  # without logits: they are computed from its tokens
    want = float(metric(model(clean)).mean().detach())
    assert patching.sweep(model, corrupted, small, metric, name, ["pos"], **QUIET).facts["clean"] == pytest.approx(want)
    bare = {name: cache[name]}
    assert patching.sweep(model, corrupted, bare, metric, name, ["pos"], **QUIET).facts["clean"] is None
    with pytest.raises(gl.InputError, match="needs the clean run's metric"):
        patching.sweep(model, corrupted, bare, metric, name, ["pos"], normalised=True, **QUIET)


def test_a_result_is_written_read_and_labelled(recall_model, tmp_path):
    batch = gl.tasks.recall(1, seed=0)
    other = batch.with_answer(gl.tasks.recall(1, seed=5).answers)
    cache = caches(recall_model, batch.tokens)
    found = patching.get_act_patch_gate(
        recall_model, other.tokens, cache, gl.metrics.logit(batch.answers), results=tmp_path / "gate.json", **QUIET
    )
    assert found["pos"][0] == "<bos>" and found["pos"][-2] == "?"
    loaded = Result.load(tmp_path / "gate.json")
    assert torch.allclose(loaded.values, found.values.double()) and loaded.facts == dict(found.facts)
    assert {"layer", "pos", "value"} <= set(found.to_dataframe().columns) and found.plot().axes


# -- stopping and going on ------------------------------------------------------------------------------------------


class Stops:
    """A metric during whose n-th call somebody presses Ctrl-C."""

    def __init__(self, at):
        self.left = at

    def __call__(self, logits):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return metric(logits)


@pytest.mark.parametrize("normalised", [False, True])
def test_an_interrupted_sweep_keeps_its_results_and_goes_on(case, normalised):
    model, corrupted, cache, _ = case
    whole = patching.get_act_patch_mixer_out(model, corrupted, cache, metric, normalised=normalised, **QUIET)
    with pytest.raises(patching.Interrupted, match=r"measured.*results=stop.results") as stop:
        patching.get_act_patch_mixer_out(model, corrupted, cache, Stops(8), normalised=normalised, **QUIET)
    part = stop.value.results
    done = ~part.values.isnan()
    assert done.sum() == 5 == part.facts["measured"] and close(part.values[done], whole.values[done])
    assert not model.list_hooks()
    calls = Stops(10**9)
    rest = patching.get_act_patch_mixer_out(
        model, corrupted, cache, calls, normalised=normalised, results=part, **QUIET
    )
    assert close(rest, whole.values)
    assert 10**9 - calls.left == 2 + whole.numel() - 5, "what was measured is not measured again"


def test_results_in_a_file_are_taken_up(case, tmp_path):
    model, corrupted, cache, _ = case
    path = tmp_path / "sweep.json"
    with pytest.raises(patching.Interrupted, match="saved; the same call"):
        patching.get_act_patch_mixer_out(model, corrupted, cache, Stops(6), results=path, **QUIET)
    assert Result.load(path).facts["measured"] == 3
    found = patching.get_act_patch_mixer_out(model, corrupted, cache, metric, results=str(path), **QUIET)
    want = patching.get_act_patch_mixer_out(model, corrupted, cache, metric, **QUIET)
    assert close(found, want.values) and Result.load(path).facts["measured"] == want.numel()
    with pytest.raises(gl.InputError, match="results is of another sweep"):
        patching.get_act_patch_resid_pre(model, corrupted, cache, metric, results=path, **QUIET)
    with pytest.raises(gl.InputError, match="its clean is"):
        patching.get_act_patch_mixer_out(
            model, corrupted, cache, lambda logits: 2 * metric(logits), results=path, **QUIET
        )


def test_the_progress_bar_can_be_switched_off(case, capsys):
    model, corrupted, cache, _ = case
    patching.get_act_patch_resid_pre(model, corrupted, cache, metric, progress=False)
    assert capsys.readouterr().err == ""
    patching.get_act_patch_resid_pre(model, corrupted, cache, metric)
    assert "Patching resid_pre" in capsys.readouterr().err


# -- mistakes -------------------------------------------------------------------------------------------------------

POINT = "blocks.1.hook_mixer_out"


def nan_late(logits):
    nan_late.calls = getattr(nan_late, "calls", 0) + 1
    return metric(logits) * (torch.nan if nan_late.calls % 4 == 0 else 1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"axes": ("layer", "head")}, gl.PointError, "has no axis 'head' to sweep; it has: layer, pos, d_model"),
        ({"axes": ("batch",)}, gl.PointError, "reduce='none' keeps their numbers apart"),
        ({"axes": ("pos", "pos")}, gl.InputError, "name each axis once"),
        ({"axes": ()}, gl.InputError, "name each axis once"),
        ({"groups": {"d_model": 2}}, gl.InputError, "divides an axis that is not swept"),
        ({"axes": ("d_model",), "groups": {"d_model": 99}}, gl.InputError, "give 1 to 16 groups"),
        ({"axes": ("d_model",), "groups": {"d_model": {"a": [3, 16]}}}, gl.InputError, "d_model=16 is out of range"),
        ({"axes": ("d_model",), "groups": {"d_model": {"a": []}}}, gl.InputError, "it is empty"),
        ({"axes": ("d_model",), "groups": {"d_model": "two"}}, gl.InputError, "a dict of label -> indices"),
        ({"points": "blocks.1.hook_mixer_ot"}, gl.PointError, "Did you mean 'blocks.1.hook_mixer_out'"),
        ({"points": []}, gl.PointError, "empty list"),
        ({"edits": patching.carried}, gl.PointError, "edits=carried patches the state"),
        ({"metric": lambda logits: logits}, gl.InputError, "In the corrupted run: The metric returned shape"),
        ({"metric": lambda logits: metric(logits)[:1].expand(3)}, gl.InputError, "one number a row"),
        ({"metric": "logits"}, gl.InputError, "a function of logits"),
        ({"metric": {}}, gl.InputError, "a function of logits"),
        ({"metric": nan_late}, gl.InputError, "With layer 1, pos . patched: The metric returned NaN"),
        ({"metric": lambda logits: metric(logits).sum(), "reduce": "none"}, gl.InputError, "leave out its mean"),
        ({"reduce": "scalar"}, gl.InputError, "it must return one scalar"),
        ({"reduce": "men"}, gl.InputError, "Did you mean 'mean'"),
        ({"max_bytes": 0}, gl.InputError, "max_bytes=0"),
        ({"metric": lambda logits: logits.sum() * 0, "normalised": True}, gl.InputError, "nothing to normalise by"),
        ({"attention": None}, gl.InputError, "A sweep has no option 'attention'; .*Did you mean 'attention_mask'"),
        ({"results": "/no/such/folder/r.json"}, gl.InputError, "there is no folder '/no/such/folder'"),
    ],
)
def test_mistakes_are_explained_and_leave_nothing_behind(case, options, error, message):
    model, corrupted, cache, _ = case
    nan_late.calls = 0
    given = {"points": POINT, "metric": metric, **QUIET, **options}
    measure, points = given.pop("metric"), given.pop("points")
    with pytest.raises(error, match=message):
        patching.sweep(model, corrupted, cache, measure, points, **given)
    assert not model.list_hooks()


def test_clean_runs_that_do_not_fit(lm):
    clean, corrupted = pair(lm)
    cache = caches(lm, clean)

    def run(cache, corrupted=corrupted, point=POINT, **options):
        return patching.sweep(lm, corrupted, cache, metric, point, **QUIET, **options)

    with pytest.raises(gl.InputError, match="clean prompt has 7 positions and the corrupted one 5"):
        run(cache, corrupted[:, :5])
    with pytest.raises(gl.InputError, match="2 rows and the corrupted input 1"):
        run(cache, corrupted[:1])
    with pytest.raises(gl.InputError, match=r"has shape \[2, 7, 16\]; in the corrupted run it is \[2, 5, 16\]"):
        run({POINT: cache[POINT]}, corrupted[:, :5])
    with torch.no_grad():
        few = lm.run_with_cache(clean, names_filter="hook_embed")[1]
        sliced = lm.run_with_cache(clean, pos_slice=slice(2))[1]
        mask = torch.ones_like(clean, dtype=torch.bool)
        mask[0, -1] = False
        short = lm.run_with_cache(clean, attention_mask=mask)[1]
    with pytest.raises(
        gl.PointError, match=r"holds no blocks.1.hook_mixer_out: cache it, .*names_filter='blocks.1.hook_mixer_out'"
    ):
        run(few)
    with pytest.raises(gl.InputError, match="keeps only some positions"):
        run(sliced)
    with pytest.raises(gl.InputError, match="padded in different places"):
        run(short)
    words = {"mamba": {"d_model": 32}, "mamba2": {"d_model": 32}, "rwkv6": {"n_embd": 32}}
    words |= {
        "fla": {"hidden_size": 32, "head_dim": 8},
        "mamba3": {"d_model": 32},
        "mamba_ssm_hybrid": {"d_model": 32},
    }
    wide = type(lm).tiny(seed=1, dtype=torch.float64, **words.get(lm.cfg.architecture, {"hidden_size": 32}))
    with pytest.raises(
        gl.InputError, match=rf"has shape \[2, 7, {wide.cfg.d_model}\].*It is a cache of {wide.cfg.model_name}"
    ):
        run(caches(wide, clean))
    assert not lm.list_hooks()
    lm.train()
    try:
        with pytest.raises(gl.InputError, match="training mode"):
            run(cache)
    finally:
        lm.eval()


def test_generic_mistakes(lm):
    clean, corrupted = pair(lm)
    cache = caches(lm, clean)
    given = (lm, corrupted, cache, metric, theirs.layer_pos_patch_setter)
    with pytest.raises(gl.InputError, match="give one of them"):
        patching.generic_activation_patch(*given, "resid_pre", **QUIET)
    with pytest.raises(gl.InputError, match="The first axis of an index is the layer"):
        patching.generic_activation_patch(*given, "resid_pre", ("pos", "layer"), **QUIET)
    with pytest.raises(gl.PointError, match="has no axis 'tab'"):
        patching.generic_activation_patch(*given, "resid_pre", ("layer", "tab"), **QUIET)
    with pytest.raises(gl.HookError, match=r"The patch setter returned \[7\] at blocks.0.hook_resid_pre"):
        patching.generic_activation_patch(
            *given[:4], lambda x, i, c: x[0, :, 0], "resid_pre", ("layer", "pos"), **QUIET
        )
    with pytest.raises(gl.InputError, match="The clean cache is Tensor; it is what model.run_with_cache"):
        patching.generic_activation_patch(*given[:2], clean, *given[3:], "resid_pre", ("layer", "pos"), **QUIET)
    with pytest.raises(gl.PointError, match="Did you mean"):
        patching.generic_activation_patch(*given, "resid_pree", ("layer", "pos"), **QUIET)


# -- direction ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mamba-recall", "griffin-recall", "rwkv-recall"])
def test_clean_goes_into_corrupted(name):
    """Recall: the answer stands at one position before the first block, and at the last behind the last block."""
    model = gl.from_pretrained(f"gatedlens/{name}", device="cpu")
    batch = gl.tasks.recall(2, seed=0)
    order = gl.tasks.ids(gl.tasks.VALUES)
    other = batch.with_answer(order[(batch.answers - order[0] + 3) % len(order)])
    positions = torch.arange(batch.tokens.shape[1])
    for row in range(2):
        one = slice(row, row + 1)
        with torch.no_grad():
            own = model.run_with_cache(batch.tokens[one])[1]
        score = gl.metrics.logit_difference(batch.answers[one], other.answers[one])
        found = patching.get_act_patch_resid_pre(model, other.tokens[one], own, score, normalised=True, **QUIET)
        at = int(batch.answer_pos[row])
        assert found[0, at] == pytest.approx(1, abs=1e-4)
        assert found[0][positions != at].abs().max() < 1e-4
        last = patching.get_act_patch_resid_post(model, other.tokens[one], own, score, normalised=True, **QUIET)
        assert last[-1, -1] == pytest.approx(1, abs=1e-4) and last[-1, :-1].abs().max() < 1e-4

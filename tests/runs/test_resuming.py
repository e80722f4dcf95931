"""Stopping and going on, the same for all: patching, knockout, tracing, path and edge patching, circuits and gradients."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

import gatedlens as gl
from gatedlens import circuits, knockout, patching, tracing
from gatedlens.result.result import Result
from tests.helpers import example

QUIET = {"progress": False}
METRIC = gl.metrics.logit_difference(1, 2)


class Stops:
    """A metric that is stopped at its n-th call."""

    def __init__(self, at, how=KeyboardInterrupt):
        self.left, self.how = at, how

    def __call__(self, logits):
        self.left -= 1
        if self.left == 0:
            raise self.how
        return METRIC(logits)


class Tools:
    """Every tool on one model, each called alike: tools["patching"](metric, results=...) gives a Result."""

    def __init__(self, model, mask=None):
        self.model = model
        self.clean, self.corrupted = clean, _ = example(model, 2), example(model, 2, seed=1)
        if mask is not None:
            self.clean, self.corrupted = (self.clean, mask), (self.corrupted, mask)
        points, options = ["blocks.*.hook_*", "hook_logits"], {} if mask is None else {"attention_mask": mask}
        with torch.no_grad():
            self.cache = model.run_with_cache(clean, names_filter=points, **options)[1]

    def patching(self, metric, point="blocks.*.hook_mixer_out", **options):
        return patching.sweep(
            self.model, self.corrupted, self.cache, metric, point, max_bytes=60_000, **QUIET, **options
        )

    def knockout(self, metric, **options):
        return knockout.sweep(self.model, self.clean, metric, **{"dst": 5, "max_rows": 4, **QUIET, **options})

    def tracing(self, metric, **options):
        given = {"subject": [1], "samples": 2, "max_rows": 6, **QUIET, **options}
        return tracing.causal_trace(self.model, self.clean, metric, **given)

    def senders(self, metric, **options):
        return circuits.path_patch_senders(
            self.model, self.clean, self.corrupted, metric, max_rows=4, **QUIET, **options
        )

    def edges(self, metric, **options):
        return circuits.edge_patch(
            self.model, self.clean, self.corrupted, metric, max_rows=4, **QUIET, **options
        ).scores

    def curve(self, metric, **options):
        edges = circuits.eap(self.model, self.clean, self.corrupted, METRIC)
        sizes = [*range(6), len(edges)]
        return edges.curve(self.model, self.clean, self.corrupted, metric, sizes, max_rows=4, **QUIET, **options)

    def eap_ig(self, metric, **options):
        given = {"steps": 6, **QUIET, **options}
        return circuits.eap_ig(self.model, self.clean, self.corrupted, metric, **given).scores

    def ig_input(self, metric, names="blocks.*.hook_mixer_out", **options):
        given = {"steps": 6, **QUIET, **options}
        return circuits.attribution_patch_ig(self.model, self.clean, self.corrupted, metric, names, **given)

    def ig_activations(self, metric, names="blocks.*.hook_*_out", **options):
        """Points that keep another number of entries each, joined."""
        given = {"steps": 2, "keep": ["pos", "d_model"], **QUIET, **options}
        tools = circuits.attribution_patch_ig_activations
        found = tools(self.model, self.clean, self.corrupted, metric, [names, "hook_embed", "hook_logits"], **given)
        return Result(torch.cat([one.values.flatten() for one in found.values()]), ("entry",))

    def __getitem__(self, name):
        return getattr(self, name)


SWEEPS = {
    "patching": 8,
    "knockout": 7,
    "tracing": 8,
    "senders": 4,
    "edges": 6,
    "curve": 7,
}  # at which call it is stopped
GRADIENTS = {"eap_ig": 4, "ig_input": 4, "ig_activations": 6}  # whose files hold steps, or points, and not their result
TOOLS = {**SWEEPS, **GRADIENTS}


@pytest.fixture(scope="module")
def small():
    from gatedlens.hooks.mamba import HookedMamba

    return Tools(HookedMamba.tiny(seed=0, dtype=torch.float64, n_layer=3))


def equal(found, want):
    return torch.allclose(found.values.double(), want.values.double(), rtol=1e-9, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("name", TOOLS)
def test_every_tool_goes_on_where_it_was_stopped(model, name, tmp_path):
    _goes_on(Tools(model)[name], name, tmp_path / "results.json")
    assert not model.list_hooks()


@pytest.mark.parametrize("name", TOOLS)
def test_so_does_every_tool_in_padded_rows(small, name, tmp_path):
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 6] = False
    run = Tools(small.model, mask)[name]
    _goes_on(run, name, tmp_path / "results.json")
    with pytest.raises(patching.Interrupted):
        run(Stops(TOOLS[name]), results=tmp_path / "left.json")
    with pytest.raises(gl.InputError, match="another sweep"):
        Tools(small.model, mask.flip(1))[name](METRIC, results=tmp_path / "left.json")


def _goes_on(run, name, path):
    want = run(METRIC)
    with pytest.raises(patching.Interrupted, match="measured and saved; the same call with results=") as stop:
        run(Stops(TOOLS[name]), results=path)
    part = Result.load(path)
    assert 0 < part.facts["measured"] < part.facts["cells"]
    assert torch.equal(part.values.isnan(), stop.value.results.values.cpu().isnan())
    if name in SWEEPS:
        done = ~part.values.isnan()
        assert torch.allclose(part.values[done], want.values.double()[done], rtol=1e-9, atol=1e-10)
        assert part.facts["cells"] == want.facts["cells"]
    calls = Stops(10**9)
    assert equal(run(calls, results=path), want)
    again = Stops(10**9)
    assert equal(run(again, results=stop.value.results), want), "what an exception holds goes on as well"
    assert again.left == calls.left
    full = Stops(10**9)
    run(full)
    assert full.left < calls.left, "what was measured is not measured again"
    assert Result.load(path).facts["measured"] == part.facts["cells"]


@pytest.mark.parametrize("name", TOOLS)
@pytest.mark.parametrize("change", ["parameters", "prompt", "metric", "hooks"])
def test_nobody_goes_on_with_another_sweeps_numbers(small, name, change, tmp_path):
    path, model = tmp_path / "results.json", small.model
    with pytest.raises(patching.Interrupted):
        small[name](Stops(TOOLS[name]), results=path)
    kept = path.read_bytes()
    tools, metric, parameter = small, METRIC, list(model.wrapped.parameters())[-1]
    if change == "prompt":
        tools = Tools(model)
        tools.clean = example(model, 2, seed=7)
        with torch.no_grad():
            tools.cache = model.run_with_cache(tools.clean, names_filter=["blocks.*.hook_*", "hook_logits"])[1]
    if change == "metric":
        metric = gl.metrics.logit_difference(3, 4)
    hooks = gl.ablation.zero("blocks.0.hook_mixer_out", d_model=3).hooks(model) if change == "hooks" else []
    try:
        if change == "parameters":
            parameter.data[-1] += 1e-3
        with model.hooks(hooks), pytest.raises(gl.InputError, match="results is of another sweep: ") as said:
            tools[name](metric, results=path)
    finally:
        if change == "parameters":
            parameter.data[-1] -= 1e-3
    assert "Give another path, or results=None" in str(said.value)
    assert path.read_bytes() == kept, "the other sweep's file is left alone"


POINT = "blocks.[01].hook_mixer_out"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"point": "blocks.[12].hook_mixer_out"}, "its axis layer is"),
        ({"axes": ("pos", "layer")}, "its axes is"),
        ({"axes": ("layer", "d_model"), "groups": {"d_model": 7}}, "its axes is"),
        ({"groups": {"pos": {i: [6 - i] for i in range(7)}}}, "its cells"),
        ({"normalised": True}, "its normalised is"),
        ({"reduce": "none"}, "its axes is"),
        ({"edits": lambda name, clean: [(name, -clean[name])]}, "its values put in"),
        ({"edits": lambda name, clean: [(name, None)]}, "its values put in|its cells"),
        ({"title": "another"}, "its title is"),
    ],
)
def test_what_a_sweep_was_told_is_compared(small, options, named, tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(patching.Interrupted):
        small.patching(Stops(6), POINT, results=path)
    with pytest.raises(gl.InputError, match=named):
        small.patching(METRIC, **{"point": POINT, **options}, results=path)


@pytest.mark.parametrize(
    "options",
    [{"dst": 4}, {"how": knockout.cut_scan}, {"channel": [1]}, {"window": 2}],
    ids=["dst", "how", "channel", "window"],
)
def test_what_a_knockout_was_told_is_compared(small, options, tmp_path):
    with pytest.raises(patching.Interrupted):
        small.knockout(Stops(6), results=tmp_path / "k.json")
    with pytest.raises(gl.InputError, match="results is of another sweep"):
        small.knockout(METRIC, results=tmp_path / "k.json", **options)


@pytest.mark.parametrize(
    "options",
    [{"seed": 3}, {"noise": 2.0}, {"subject": [2]}, {"point": "mixer_out"}],
    ids=["seed", "noise", "subject", "point"],
)
def test_what_a_trace_was_told_is_compared(small, options, tmp_path):
    with pytest.raises(patching.Interrupted):
        small.tracing(Stops(9), results=tmp_path / "t.json")
    with pytest.raises(gl.InputError, match="results is of another sweep"):
        small.tracing(METRIC, results=tmp_path / "t.json", **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("eap_ig", {"steps": 7}),
        ("eap_ig", {"positions": True}),
        ("ig_input", {"steps": 7}),
        ("ig_input", {"names": "blocks.[01].hook_mixer_out"}),
        ("ig_input", {"keep": ("d_model",)}),
        ("ig_activations", {"steps": 3}),
        ("ig_activations", {"names": "blocks.[01].hook_mixer_out"}),
    ],
)
def test_what_gradients_were_told_is_compared(small, name, options, tmp_path):
    with pytest.raises(patching.Interrupted):
        small[name](Stops(TOOLS[name]), results=tmp_path / "g.json")
    with pytest.raises(gl.InputError, match="results is of another sweep"):
        small[name](METRIC, results=tmp_path / "g.json", **options)


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_of_another_function_that_does_the_same_go_on(small, name, tmp_path):
    path = tmp_path / "g.json"
    with pytest.raises(patching.Interrupted):
        small[name](Stops(TOOLS[name]), results=path)
    assert equal(small[name](lambda logits: 1.0 * METRIC(logits), results=path), small[name](METRIC))
    with pytest.raises(gl.InputError, match="measured again it is"):
        small[name](lambda logits: 2.0 * METRIC(logits), results=path)


def test_a_curve_does_not_speak_of_the_sweep_that_scored_its_edges(small, tmp_path):
    given = (small.model, small.clean, small.corrupted, METRIC)
    edges = circuits.edge_patch(*given, **QUIET, results=tmp_path / "edges.json")
    curve = edges.curve(*given, [1, 2, 3], **QUIET)
    assert curve.facts["cells"] == curve.facts["measured"] == 3 and "run" not in curve.facts
    assert equal(edges.curve(*given, [1, 2, 2], **QUIET), edges.curve(*given, [1, 2, 2], max_rows=1, **QUIET))


def test_metrics_that_agree_in_both_runs_are_told_apart(small, tmp_path):
    """Scores of different logits are 0 in the corrupted run and 1 in the clean one, all of them."""
    with torch.no_grad():
        logits = [small.model(one) for one in (small.clean, small.corrupted)]

    def score(token):
        high, low = (float(one[:, -1, token].mean()) for one in logits)
        return lambda x: (x[:, -1, token].mean() - low) / (high - low)

    first, calls = score(1), [0]

    def stopped(x):
        calls[0] += 1
        if calls[0] == 9:
            raise KeyboardInterrupt
        return first(x)

    with pytest.raises(patching.Interrupted):
        small.patching(stopped, results=tmp_path / "s.json")
    with pytest.raises(gl.InputError, match="measured again it is"):
        small.patching(score(2), results=tmp_path / "s.json")
    found = small.patching(lambda x: score(1)(x), results=tmp_path / "s.json")  # another function that does the same
    assert equal(found, small.patching(score(1)))


def test_a_result_that_does_not_say_what_it_is_of_is_refused(small, tmp_path):
    found = small.patching(METRIC)
    for results in (found, found.save(tmp_path / "old.json")):
        with pytest.raises(gl.InputError, match="does not say what it was measured on"):
            small.patching(METRIC, results=results)


# -- stopped from outside -------------------------------------------------------------------------------------------

SWEEP = """
import signal, sys, time, torch, gatedlens as gl
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background jobs deaf to it
from gatedlens.hooks.mamba import HookedMamba
model = HookedMamba.tiny(seed=0, n_layer=2)
clean, corrupted = torch.arange(12)[None], torch.arange(12).flip(0)[None]
metric = gl.metrics.logit_difference(1, 2)
calls = 0
def stopping(logits):
    global calls
    calls += 1
    if calls > 8:
        print("eight", flush=True)
        time.sleep(60)
    return metric(logits)
_, cache = model.run_with_cache(clean)
gl.patching.sweep(
    model, corrupted, cache, stopping, "blocks.*.hook_resid_pre", progress=False, results=sys.argv[1], max_bytes=1
)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=["kill -9", "SIGTERM", "Ctrl-C"]
)
def test_a_signal_loses_the_batch_under_way_at_most(number, tmp_path):
    path = tmp_path / "results.json"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SWEEP, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout.readline() == "eight\n"
        process.send_signal(number)
        _, told = process.communicate(timeout=60)
    assert process.returncode != 0
    part = Result.load(path)
    assert part.facts["measured"] == 6, "two calls were the baselines', six a batch of one cell each"
    if number != signal.SIGKILL:
        assert f"6 of 24 cells were measured and saved; the same call with results={str(path)!r} goes on." in told
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_sigterm_is_left_to_a_program_that_listens_to_it(small, tmp_path):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:

        def metric(logits):
            if not heard:
                os.kill(os.getpid(), signal.SIGTERM)
            return METRIC(logits)

        assert equal(small.patching(metric), small.patching(METRIC)) and heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("name", TOOLS)
def test_a_full_disk_leaves_the_older_file_and_loses_nothing(small, name, tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    with pytest.raises(patching.Interrupted):
        small[name](Stops(TOOLS[name]), results=path)
    kept, written = path.read_bytes(), []

    def full(fd):
        written.append(fd)
        if len(written) > 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(patching.NotSaved, match=r"cannot be written: No space left on device. .* as it was") as said:
        small[name](METRIC, results=path)
    monkeypatch.undo()
    now = Result.load(path)
    assert now.facts["measured"] >= json.loads(kept)["facts"]["measured"]
    assert said.value.results.facts["measured"] > now.facts["measured"]
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
    assert equal(small[name](METRIC, results=said.value.results), small[name](METRIC))


def test_an_error_of_the_metric_keeps_what_was_measured(small, tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(ZeroDivisionError):
        small.patching(Stops(8, ZeroDivisionError), results=path)
    assert Result.load(path).facts["measured"] == 5
    assert equal(small.patching(METRIC, results=path), small.patching(METRIC))


def test_files_that_are_none_of_a_sweep(small, tmp_path):
    with pytest.raises(gl.InputError, match="is a folder: name a file"):
        small.patching(METRIC, results=tmp_path)
    with pytest.raises(gl.InputError, match="give a path, or the Result"):
        small.patching(METRIC, results=3)
    (tmp_path / "cut.json").write_text("{")
    with pytest.raises(gl.InputError, match="not JSON"):
        small.patching(METRIC, results=tmp_path / "cut.json")

"""Engines: the same files whoever does the work, also when a worker is killed in the middle."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

import gatedlens as gl
from gatedlens import store as gl_store
from gatedlens.store import engines
from gatedlens.store.corpus.batches import Batches
from gatedlens.store.corpus.sources import read
from tests.helpers import example
from tests.store.test_crash import contents

NAMES = ["blocks.0.hook_mixer_out", "blocks.1.mixer.hook_state"]


class Deadly:
    """A job that kills the process it runs in at one batch, once."""

    def __init__(self, job, marker: Path):
        self.job = job
        self.marker = marker

    def __call__(self, rows):
        if rows.index == 5 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.job(rows)


@pytest.mark.slow
@pytest.mark.parametrize("reduce", [None, ["kurtosis", "sample(9, seed=1)"]], ids=["tensors", "statistics"])
def test_ray_writes_the_same_files_though_a_worker_is_killed(tmp_path, reduce):
    ray = pytest.importorskip("ray")
    model = gl.HookedMamba.tiny()
    corpus = [example(model, 1, 3 + n % 5, seed=n)[0] for n in range(24)]
    options = {"batch_size": 2, "reduce": reduce, "progress": False}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    try:
        local = gl_store.harvest(model, corpus, NAMES, tmp_path / "local", **options)

        def engine(job, batches):
            return engines.ray(workers=2)(Deadly(job, tmp_path / "killed"), batches)

        far = gl_store.harvest(model, corpus, NAMES, tmp_path / "ray", engine=engine, **options)
        assert (tmp_path / "killed").exists() and contents(far.folder) == contents(local.folder)
        plain = gl_store.harvest(model, corpus, NAMES, tmp_path / "plain", engine="ray", workers=2, **options)
        assert contents(plain.folder) == contents(local.folder)
    finally:
        ray.shutdown()


def test_batches_come_back_in_order_and_few_are_under_way(monkeypatch):
    """The Ray engine against a stand-in for Ray: its order, its window, and that its actors are ended."""
    events = []

    class Answer:
        def __init__(self, value):
            self.value = value

    class Method:
        def __init__(self, method):
            self.method = method

        def remote(self, *arguments):
            return Answer(self.method(*arguments))

    class Actor:
        def __init__(self, *arguments):
            self.do = Method(engines.Worker(*arguments).do)

    class Cluster:
        is_initialized = staticmethod(lambda: True)
        put = staticmethod(lambda job: job)
        get = staticmethod(lambda answer: answer.value)
        kill = staticmethod(lambda actor: events.append("ended"))

        @staticmethod
        def remote(**options):
            assert options["max_restarts"] == options["max_task_retries"] == -1
            return lambda cls: type("Remote", (), {"remote": staticmethod(Actor)})

    monkeypatch.setattr(engines, "optional", lambda name, extra: Cluster)
    model = gl.HookedMamba.tiny()
    batches = Batches(read(example(model, 20), model), model, 2)

    def counted():
        for rows in batches:
            events.append(rows.index)
            yield rows

    threads = torch.get_num_threads()
    results = engines.ray(workers=2)(lambda rows: {"value": rows.value}, counted())
    first = next(results)
    assert events == [0, 1, 2, 3] and first[0].index == 0, "only so many batches are under way"
    assert [rows.index for rows, _ in results] == list(range(1, 10))
    assert events[-2:] == ["ended"] * 2 and torch.get_num_threads() == threads


def test_mistakes(tmp_path):
    model = gl.HookedMamba.tiny()
    with pytest.raises(gl.InputError, match="engine='rey': it is 'local' or 'ray'. Did you mean 'ray'"):
        gl_store.harvest(model, [[1]], NAMES, tmp_path, engine="rey", progress=False)
    with pytest.raises(gl.InputError, match="workers=0"):
        gl_store.harvest(model, [[1]], NAMES, tmp_path, engine="ray", workers=0, progress=False)

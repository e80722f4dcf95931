"""Killed at any moment, a harvest loses at most the batch under way; damage is found and mended; two runs do not mix.

The killed processes are forks of this one, so that hundreds fit in seconds. Whatever happened in between, the files are
those of an uninterrupted run, byte by byte.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

import gatedlens as gl
from gatedlens import store as gl_store
from gatedlens.store.disk import files, journal, shards
from tests.helpers import example

NAMES = ["blocks.0.hook_mixer_out", "blocks.1.mixer.hook_state", "blocks.0.mixer.hook_dt"]
REDUCE = ["mean", "kurtosis", "max", "covariance", "sample(5, seed=3)"]


@pytest.fixture(scope="module")
def model():
    return gl.HookedMamba.tiny(dtype=torch.float64)


@pytest.fixture(scope="module")
def corpus(model):
    return [example(model, 1, 1 + n % 6, seed=n)[0] for n in range(22)]


def harvest(model, corpus, out, **options):
    options = {"batch_size": 2, "shard_bytes": 6000, **options}
    return gl_store.harvest(model, corpus, NAMES, out, progress=False, **options)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a store; of the manifest all but when it was finished."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    told = json.loads(found.pop("manifest.json"))
    told["finished"].pop("at")
    found.pop("lock")
    return {**found, "manifest": json.dumps(told).encode()}


def forked(work) -> int:
    """Run `work` in a forked process and wait for it: its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            os._exit(3)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def dies_at(n: int):
    """Patches under which this process kills itself in its n-th dealing with the disk, half way through a write."""
    patch = pytest.MonkeyPatch()
    left = [n]

    def counted(real, half=None):
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                if half is not None:
                    half(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    def half_written(file, offset, data):
        os.pwrite(file.fileno(), bytes(data[: len(data) // 2]), offset)

    def half_a_line(self, entry):
        os.write(self.file.fileno(), entry.line()[: len(entry.line()) // 2])

    patch.setattr(shards, "_write_at", counted(shards._write_at, half_written))
    patch.setattr(journal.Journal, "add", counted(journal.Journal.add, half_a_line))
    for name in ("fsync", "replace"):
        patch.setattr(files.os, name, counted(getattr(os, name)))
    return left


@pytest.mark.parametrize("reduce", [None, REDUCE], ids=["tensors", "statistics"])
@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_every_dealing_with_the_disk(model, corpus, tmp_path, reduce, step):
    corpus = corpus[:12]
    whole = contents(harvest(model, corpus, tmp_path / "whole", reduce=reduce).folder)
    total = []

    def count():
        left = dies_at(10**9)
        harvest(model, corpus, tmp_path / "counted", reduce=reduce)
        (tmp_path / "count").write_text(str(10**9 - left[0]))

    assert forked(count) == 0
    total = int((tmp_path / "count").read_text())
    assert total > 30
    for n in range(1, total + 1, step):
        out = tmp_path / f"killed-{n}"
        assert forked(lambda out=out, n=n: dies_at(n) and harvest(model, corpus, out, reduce=reduce)) == -signal.SIGKILL
        before = len(list(journal.entries(out / "journal.jsonl")))
        store = harvest(model, corpus, out, reduce=reduce)
        assert contents(out) == whole, f"killed at {n} of {total}, after {before} batches"
        assert store.is_finished and store.verify() == []


def test_killed_many_times_at_random(model, corpus, tmp_path):
    """One harvest that is killed again and again, each time somewhere else, and never loses a committed batch."""
    whole = contents(harvest(model, corpus, tmp_path / "whole").folder)
    began = time.monotonic()
    assert forked(lambda: harvest(model, corpus, tmp_path / "timed")) == 0
    seconds, moments = time.monotonic() - began, random.Random(0)
    kills, out, done = 0, tmp_path / "out", 0
    while True:
        pid = os.fork()
        if pid == 0:
            try:
                harvest(model, corpus, out)
            finally:
                os._exit(0)
        longest = 0.6 if kills >= 3 else 0.15  # early at first: the run that was timed may have been a slow one
        time.sleep(moments.uniform(0.05, longest) * seconds)
        os.kill(pid, signal.SIGKILL)
        killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        now = len(list(journal.entries(out / "journal.jsonl")))
        assert now >= done, "a committed batch was lost"
        done, kills = now, kills + killed
        if not killed or kills > 200:
            break
    harvest(model, corpus, out)
    assert kills >= 3 and contents(out) == whole


@pytest.mark.parametrize(
    "name", ["activations/data-00000.arrow", "tensors/blocks.1.mixer.hook_state-00001.safetensors"]
)
@pytest.mark.parametrize("harm", ["flip", "cut", "head", "remove"])
def test_damage_is_named_and_mended(model, corpus, tmp_path, name, harm, caplog):
    whole = contents(harvest(model, corpus, tmp_path).folder)
    path = tmp_path / name
    data = bytearray(path.read_bytes())
    if harm == "flip":
        data[-40] ^= 1
    elif harm == "head":
        data[9] ^= 1
    path.write_bytes(data[: len(data) // 2] if harm == "cut" else data)
    if harm == "remove":
        path.unlink()
    assert gl_store.open(tmp_path).verify() == [name]
    harvest(model, corpus, tmp_path)
    assert contents(tmp_path) == whole and (
        f"{name} is damaged" in caplog.text or (harm == "head" and "is damaged" in caplog.text)
    )


def test_damaged_statistics_and_journal_begin_anew_where_they_must(model, corpus, tmp_path, caplog):
    whole = contents(harvest(model, corpus, tmp_path / "a", reduce="mean").folder)
    path = tmp_path / "a" / "statistics.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    harvest(model, corpus, tmp_path / "a", reduce="mean")
    assert contents(tmp_path / "a") == whole and "statistics.safetensors is damaged" in caplog.text
    whole = contents(harvest(model, corpus, tmp_path / "b").folder)
    lines = (tmp_path / "b" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "b" / "journal.jsonl").write_bytes(b"".join([*lines[:3], b"x" + lines[3][1:], *lines[4:]]))
    with pytest.raises(gl_store.StoreError, match=r"journal.jsonl is damaged: line 4: its checksum is 'x"):
        gl_store.open(tmp_path / "b")
    harvest(model, corpus, tmp_path / "b")
    assert contents(tmp_path / "b") == whole


def test_a_second_run_is_refused_and_a_dead_one_blocks_nobody(model, corpus, tmp_path):
    (tmp_path / "out").mkdir()
    with files.locked(tmp_path / "out"):
        with pytest.raises(gl_store.StoreError, match=rf"Another run writes into .*process {os.getpid()}"):
            harvest(model, corpus, tmp_path / "out")
        assert forked(lambda: harvest(model, corpus, tmp_path / "out")) == 3
    assert forked(lambda: dies_at(20) and harvest(model, corpus, tmp_path / "out")) == -signal.SIGKILL
    assert harvest(model, corpus, tmp_path / "out").is_finished


def test_another_corpus_is_noticed_when_the_harvest_goes_on(model, corpus, tmp_path):
    assert forked(lambda: dies_at(25) and harvest(model, iter(corpus), tmp_path)) == -signal.SIGKILL
    with pytest.raises(gl_store.StoreError, match=r"batch 0 of this corpus is not the one that was harvested"):
        harvest(model, iter(corpus[::-1]), tmp_path)
    assert harvest(model, iter(corpus), tmp_path).is_finished


def test_what_the_model_gives_now_must_be_what_was_written(model, corpus, tmp_path, monkeypatch):
    harvest(model, corpus, tmp_path)
    path = tmp_path / "activations" / "data-00000.arrow"
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr(model.blocks[0].ln1, "eps", 1e-3)
    with pytest.raises(gl_store.StoreError, match="is damaged, and what the model gives now is not what was written"):
        harvest(model, corpus, tmp_path)


def test_a_full_disk_loses_nothing(model, corpus, tmp_path):
    """A file-size limit stands for the full disk: the same OSError at the same place."""
    import resource

    whole = contents(harvest(model, corpus, tmp_path / "whole", shard_bytes=10**9).folder)

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
        with pytest.raises(gl_store.StoreError, match=r"cannot be written: File too large\. \d+ batches .* are safe"):
            harvest(model, corpus, tmp_path / "out", shard_bytes=10**9)

    assert forked(limited) == 0
    store = gl_store.open(tmp_path / "out")
    assert 0 < len(store.batches) < 11 and not store.is_finished
    assert torch.equal(store[NAMES[0]][0], gl_store.open(tmp_path / "whole")[NAMES[0]][0])
    harvest(model, corpus, tmp_path / "out", shard_bytes=10**9)
    assert contents(tmp_path / "out") == whole


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_is_really_full(model, corpus, tmp_path, monkeypatch):
    import subprocess

    from gatedlens.store import sizes

    (tmp_path / "disk").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path / "disk")], check=False)
    if mounted.returncode:
        pytest.skip("this machine mounts no tmpfs")
    try:
        with pytest.raises(gl.TooLargeError, match="The store would take"):
            harvest(model, corpus, tmp_path / "disk" / "out")
        monkeypatch.setattr(sizes.Estimate, "check", lambda *_: None)
        with pytest.raises(gl_store.StoreError, match="No space left on device.* are safe"):
            harvest(model, corpus, tmp_path / "disk" / "out", shard_bytes=10**9)
        assert len(gl_store.open(tmp_path / "disk" / "out").batches) > 0
        subprocess.run(["mount", "-o", "remount,size=64m", str(tmp_path / "disk")], check=True)
        assert harvest(model, corpus, tmp_path / "disk" / "out", shard_bytes=10**9).is_finished
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        with pytest.raises(gl_store.StoreError, match="Read-only file system"):
            harvest(model, corpus, tmp_path / "disk" / "other")
        assert len(gl_store.open(tmp_path / "disk" / "out")) == 22, "reading a store needs no writing"
    finally:
        subprocess.run(["umount", str(tmp_path / "disk")], check=True)


@pytest.mark.slow
def test_the_command_is_killed_and_run_again(tmp_path):
    """The same with whole processes: `gatedlens harvest`, killed with -9 once it has committed something."""
    import subprocess
    import sys

    lines = [json.dumps({"text": f"Some years ago, never mind how long precisely, number {i}."}) for i in range(600)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    command = [sys.executable, "-m", "gatedlens.cli", "harvest", "--model", "gatedlens/mamba-moby", "--quiet"]
    command += ["--data", str(tmp_path / "corpus.jsonl"), "--names", "blocks.*.mixer.hook_gated", "--context", "128"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, env=env, capture_output=True)
    for wanted in (1, 9, 17):
        run = subprocess.Popen([*command, "--out", str(tmp_path / "out")], env=env, stdout=subprocess.DEVNULL)
        while run.poll() is None and len(list(journal.entries(tmp_path / "out" / "journal.jsonl"))) < wanted:
            time.sleep(0.005)
        run.kill()
        assert run.wait() == -signal.SIGKILL and not gl_store.open(tmp_path / "out").is_finished
    subprocess.run([*command, "--out", str(tmp_path / "out")], check=True, env=env, capture_output=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")

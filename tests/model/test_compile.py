"""torch.compile: a block that nobody watches is one graph, with the same numbers and gradients, and no loop unrolled.

Each check is a function of tests/model/compiled.py. They run in a process beside the tests: the tests' type checker cannot be
traced. It is started once, since what it imports takes longer than what it checks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import EVERY, ROOT


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """`compiled(what, name)` runs a check on an architecture, and fails with what it raised."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command, noise = [sys.executable, "-m", "tests.model.compiled"], tmp_path_factory.mktemp("compiled") / "stderr"
    with (
        noise.open("w") as stderr,
        subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
        ) as process,
    ):

        def check(what, name):
            print(what, name, file=process.stdin, flush=True)
            answer = process.stdout.readline().strip()
            assert answer, f"the process has ended: {noise.read_text()[-3000:]}"
            assert answer == "fine", json.loads(answer)

        yield check


@pytest.mark.parametrize("name", EVERY)
def test_a_block_is_one_graph_of_any_length(compiled, name):
    compiled("block", name)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_the_whole_model_and_its_hooks(compiled, name):
    compiled("model", name)


@pytest.mark.slow
def test_the_default_backend(compiled):
    compiled("default", "mamba")

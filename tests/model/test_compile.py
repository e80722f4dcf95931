"""torch.compile: a block that nobody watches is one graph, with the same numbers and gradients, and no loop unrolled.

Each check is a function of tests/model/compiled.py and runs in a process of its own: the tests' type checker cannot be traced.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import EVERY, ROOT


def run(what, name):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.model.compiled", what, name]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "fine", done.stderr[-3000:]


@pytest.mark.parametrize("name", EVERY)
def test_a_block_is_one_graph_of_any_length(name):
    run("block", name)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_the_whole_model_and_its_hooks(name):
    run("model", name)


@pytest.mark.slow
def test_the_default_backend():
    run("default", "mamba")

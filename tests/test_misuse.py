"""Misused options and hooks: whatever is passed is used, or refused by one of our own errors, and the model is left as it was."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import gatedlens as gl
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def model():
    return gl.from_pretrained("gatedlens/mamba-recall", device="cpu")


@pytest.fixture(scope="module")
def tokens():
    return gl.tasks.recall(2, seed=0).tokens


def test_options_that_do_not_fit_are_refused_by_name():
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.misuse"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].endswith(" tried, 0 wrong")


RETURNED = {
    "a text": lambda a: "x", "one number": lambda a: torch.zeros(1), "a pair": lambda a: (a, a), "True": lambda a: True,
    "a list": lambda a: [1], "long": lambda a: a.long(), "double": lambda a: a.double(), "complex": lambda a: a.to(torch.cfloat),
    "fewer rows": lambda a: a[:1], "an axis more": lambda a: a.unsqueeze(0), "numpy": lambda a: a.detach().numpy(),
    "meta": lambda a: a.to("meta"),
}  # fmt: skip
POINTS = (
    "hook_embed",
    "blocks.0.mixer.hook_decay",
    "blocks.0.mixer.hook_state",
    "blocks.0.ln1.hook_scale",
    "hook_logits",
)


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize("returned", RETURNED)
def test_what_a_hook_must_not_return_is_named(model, tokens, direction, returned):
    for point in POINTS:
        hooks = {f"{direction}_hooks": [(point, lambda a, hook: RETURNED[returned](a))]}
        with pytest.raises(gl.HookError, match=point.rpartition(".")[2]), model.hooks(**hooks):
            model(tokens, return_type="loss").backward()
    model.zero_grad()


def test_a_hook_that_cannot_be_called_as_one_is_named(model, tokens):
    for hook in (lambda a: a, lambda: None, 3, None):
        with pytest.raises(gl.InputError, match="hook_embed"):
            model.run_with_hooks(tokens, fwd_hooks=[("hook_embed", hook)])

"""What would take too much is named before it is allocated, with what to ask for instead."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens.attention import profiles
from gatedlens.model import memory
from gatedlens.parts import attention
from tests.helpers import example

VIEWS = {
    "mean": lambda A, n: A.mean(max_bytes=n),
    "abs_mean": lambda A, n: A.abs_mean(max_bytes=n),
    "weighted": lambda A, n: A.weighted(torch.ones(A.shape[2]), max_bytes=n),
    "grouped": lambda A, n: A.grouped([[0], [1]], max_bytes=n),
    "dense": lambda A, n: A.dense(max_bytes=n),
    "norms": lambda A, n: A.contributions().norms(max_bytes=n),
    "blocks": lambda A, n: list(A.contributions().blocks(max_bytes=n)),
    "along": lambda A, n: A.contributions().along(torch.ones(A.contributions().writing.width), max_bytes=n),
    "profile": lambda A, n: profiles.of_layer(A, max_bytes=n),
    "profiles of channels": lambda A, n: profiles.of_channels(A, max_bytes=n),
}
STACKS = {
    "mean": lambda stack, n: stack.mean(progress=False, max_bytes=n),
    "abs_mean": lambda stack, n: stack.abs_mean(progress=False, max_bytes=n),
    "layer_mean": lambda stack, n: stack.layer_mean(progress=False, max_bytes=n),
    "rollout": lambda stack, n: stack.rollout(progress=False, max_bytes=n),
    "profile": lambda stack, n: stack.profiles(progress=False, max_bytes=n),
}


@torch.no_grad()
def test_every_view_that_holds_a_matrix_says_what_it_takes(model):
    stack = gl.implicit_attention(model, example(model))
    for views, given in ((VIEWS, stack[0]), (STACKS, stack)):
        for name, view in views.items():
            with pytest.raises(
                gl.TooLargeError, match=rf"{name}.* would take [\d.]+ KiB, more than max_bytes=100 B\. .*"
            ):
                view(given, 100)
            view(given, None)
            view(given, 1 << 20)


@torch.no_grad()
def test_thirty_thousand_positions_are_refused_at_once_and_rows_are_not():
    model = gl.HookedMamba.tiny(n_layer=1, d_model=4, ssm_cfg={"d_state": 1, "d_conv": 2})
    A = gl.implicit_attention(model, torch.zeros(1, 30_000, dtype=torch.long), layer=0)
    for view in (A.mean, A.abs_mean, A.dense, A.contributions().norms, A.contributions().blocks):
        with pytest.raises(gl.TooLargeError, match="at 30000 positions would take .* GiB, more than max_bytes=4.0 GiB"):
            view()
    with pytest.raises(gl.TooLargeError, match="profile at 30000 positions"):
        profiles.of_layer(A)
    assert A.row(-1).shape == (1, 8, 30_000)


@torch.no_grad()
def test_a_pattern_that_the_device_does_not_hold_is_refused(monkeypatch):
    model = gl.HookedGriffin.tiny()
    layer = model.cfg.layer_types.index("attention")
    monkeypatch.setattr(attention, "SMALL", 0)
    monkeypatch.setattr(attention, "free", lambda device: 1000)
    with pytest.raises(
        gl.TooLargeError, match=rf"layer {layer}, 2 heads over 7 x 7 .* the 1000 B that are free on cpu. Run"
    ):
        model(example(model))
    monkeypatch.setattr(attention, "free", lambda device: None)
    model(example(model))


def test_what_is_free_is_read_off_the_machine(monkeypatch, tmp_path):
    for name, text in (("MEMINFO", "MemTotal: 9 kB\nMemAvailable:   3 kB\n"), ("CONTAINER", "max\n")):
        monkeypatch.setattr(memory, name, tmp_path / name)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "STATM", tmp_path / "none")
    assert memory.free(torch.device("cpu")) == 3 * 1024
    (tmp_path / "CONTAINER").write_text("1024\n")
    assert memory.free(torch.device("cpu")) == 1024
    (tmp_path / "MEMINFO").unlink()
    (tmp_path / "CONTAINER").unlink()
    assert memory.free(torch.device("cpu")) is None and memory.free(torch.device("meta")) is None

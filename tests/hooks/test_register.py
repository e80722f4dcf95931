"""The door for an architecture: registered by a program, or named by an installed package."""

from __future__ import annotations

import warnings
from importlib.metadata import EntryPoint

import pytest
import torch

import gatedlens as gl
from gatedlens import hooks
from gatedlens.hooks import architectures, shipped, unregister
from gatedlens.hooks.mamba import HookedMamba


class Mine(HookedMamba):
    """A Mamba of one's own: it wraps what HookedMamba does."""

    title = "My Mamba"


@pytest.fixture(autouse=True)
def as_before():
    before = dict(hooks._registered)
    hooks._plugins.cache_clear()
    yield
    hooks._plugins.cache_clear()
    hooks._registered.clear()
    hooks._registered.update(before)


def test_what_is_registered_is_found_first():
    wrapped = HookedMamba.tiny().wrapped
    assert type(gl.wrap(wrapped)) is HookedMamba
    assert gl.register(Mine) is Mine
    assert list(architectures()) == ["test_register", *shipped()] and type(gl.wrap(wrapped)) is Mine
    gl.register(Mine)  # once more is the same
    unregister("test_register")
    assert architectures() == shipped() and type(gl.wrap(wrapped)) is HookedMamba
    with pytest.raises(gl.InputError, match="'test_register' was not registered; nothing is"):
        unregister("test_register")


def test_who_inherits_the_points_is_not_named_beside_them():
    named = (
        r"tiny-griffin\. Jamba, .*Mamba.* and .* have such a point"  # and what other tests of this process have written
    )
    with pytest.raises(gl.PointError, match=named) as caught:
        gl.HookedGriffin.tiny().names.find("blocks.0.mixer.hook_dt_rank")
    assert Mine.title not in str(caught.value)


def test_a_decorator_and_a_name():
    @gl.register
    class Other(Mine):
        title = "Another"

    gl.register(Mine, name="mine")
    assert architectures()["test_register"] is Other and architectures()["mine"] is Mine
    with pytest.raises(gl.InputError, match="'mine' was not registered|'min' was not registered.*Did you mean 'mine'"):
        unregister("min")


def test_what_is_no_architecture_is_explained():
    class Silent(gl.HookedLanguageModel):
        title = "Silent"

    for given, message in [
        (torch.nn.Linear, "register takes a HookedModel subclass, not <class 'torch.nn.modules.linear.Linear'>"),
        (HookedMamba.tiny(), "register takes a HookedModel subclass"),
        (Silent, "Silent lacks wraps, block_points, recurrence, attention_words"),
    ]:
        with pytest.raises(gl.InputError, match=message):
            gl.register(given)
    with pytest.raises(gl.InputError, match="'rwkv' is the name of HookedRWKV: give another, register"):
        gl.register(Mine, name="rwkv")
    assert architectures() == shipped()


def test_installed_packages_name_theirs(monkeypatch):
    named = [
        EntryPoint("mine", "tests.hooks.test_register:Mine", "gatedlens.architectures"),
        EntryPoint("broken", "theirs:Broken", "gatedlens.architectures"),
    ]
    monkeypatch.setattr(hooks, "entry_points", lambda group: named if group == "gatedlens.architectures" else [])
    with pytest.warns(
        UserWarning, match=r"The architecture broken \(theirs:Broken\) cannot be loaded: No module named 'theirs'"
    ):
        found = architectures()
    assert found == {"mine": Mine, **shipped()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once
        assert type(gl.wrap(HookedMamba.tiny().wrapped)) is Mine

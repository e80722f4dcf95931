"""tiny(): one rule for all, drawn by the seed alone."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
from torch import nn

import gatedlens as gl
from gatedlens.hooks import architectures
from gatedlens.model.tiny import Tiny, around, by_fan_in, fresh
from tests.conftest import EVERY, has_a_state


def values(model):
    return {name: value.clone() for name, value in model.wrapped.state_dict().items()}


def test_only_an_old_transformers_lacks_an_architecture():
    recurrent = [name for name, hooked in architectures().items() if has_a_state(hooked)]
    assert list(EVERY) == recurrent or int(version("transformers").split(".")[1]) < 20


@pytest.mark.parametrize("name", EVERY)
def test_the_seed_says_all_and_torchs_random_numbers_stay(name):
    hooked = EVERY[name]
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    one = values(hooked.tiny(seed=3))
    assert torch.equal(torch.rand(3), want)
    again, other = values(hooked.tiny(seed=3)), values(hooked.tiny(seed=4))
    assert all(torch.equal(value, again[key]) for key, value in one.items())
    assert any(not torch.equal(value, other[key]) for key, value in one.items())
    assert all(torch.isfinite(value).all() for value in one.values() if value.is_floating_point())
    assert hooked.tiny().cfg.model_name == f"tiny-{name}" and not hooked.tiny().training


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.conv, self.proj = nn.RMSNorm(width), nn.Conv1d(width, width, 3), nn.Linear(width, width)
        self.scale = nn.Parameter(torch.full((1000,), 7.0))
        self.rate = nn.Parameter(torch.full((10, 100), 2.0))
        self.still = nn.Parameter(torch.tensor(5.0))


def test_the_rule():
    small = Tiny("mine", lambda config: Layer(**config), {"width": 64}, {"rate": around(0.1), "still": None})
    assert small.module(0, {"width": 8}).proj.weight.shape == (8, 8)
    drawn = dict(small.module(0, {}).named_parameters())
    assert drawn["conv.weight"].std().item() == pytest.approx(192**-0.5, rel=0.05)
    assert drawn["proj.weight"].std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert drawn["scale"].mean().item() == pytest.approx(7, abs=0.05) and drawn["scale"].std().item() == pytest.approx(
        0.3, rel=0.1
    )
    assert drawn["rate"].mean().item() == pytest.approx(2, abs=0.02) and drawn["rate"].std().item() == pytest.approx(
        0.1, rel=0.1
    )
    assert drawn["still"].item() == 5.0


def test_draws():
    start, noise = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[1.0, -1.0, 2.0, 0.0]])
    assert torch.equal(fresh(0.5)(start, noise), noise / 2)
    assert torch.equal(around(2.0)(start, noise), start + 2 * noise)
    assert torch.equal(by_fan_in(3.0)(start, noise), noise * 1.5)


def test_words_of_the_config():
    assert gl.HookedMamba.tiny(n_layer=3).cfg.n_layers == 3
    assert set(gl.HookedMamba.small.config) == {"d_model", "n_layer", "vocab_size", "ssm_cfg"}

"""A channel is (head value): one index selects a head, by whichever axis a point has."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens import ablation, knockout, states
from tests.helpers import example


@pytest.fixture(scope="module")
def heads():
    return gl.HookedMamba2.tiny(dtype=torch.float64)  # 4 heads of 8: channel 17 is value 1 of head 2


def everything(model, intervention):
    with torch.no_grad(), intervention.on(model):
        return model.run_with_cache(example(model), names_filter=lambda name: True)[1]


@pytest.mark.parametrize("leaf", ["hook_x", "hook_u", "hook_scan", "hook_gated", "hook_state", "hook_write"])
def test_a_head_is_its_channels(heads, leaf):
    name = f"blocks.0.mixer.{leaf}"
    for by_part, channels in (
        ({"head": 2}, range(16, 24)),
        ({"head": [0, -1]}, [*range(8), *range(24, 32)]),
        ({"value": 1}, [1, 9, 17, 25]),
        ({"head": 2, "value": [1, 3]}, [17, 19]),
    ):
        got = everything(heads, ablation.zero(name, **by_part))
        want = everything(heads, ablation.zero(name, channel=list(channels)))
        assert torch.equal(got["hook_logits"], want["hook_logits"])
        own = got[name].flatten(2, 3) if got[name].ndim == 5 else got[name]
        assert (own[:, :, list(channels)] == 0).all() and (own != 0).any()


def test_states_and_cuts_go_by_head(heads):
    other = everything(heads, ablation.Intervention(()))
    channels = list(range(8, 16))
    by_head = everything(heads, states.patch(other, 3, layers=0, source_pos=1, head=1))
    by_channel = everything(heads, states.patch(other, 3, layers=0, source_pos=1, channel=channels))
    assert torch.equal(by_head["hook_logits"], by_channel["hook_logits"])
    by_head = everything(heads, knockout.cut(1, 5, layers=0, head=1))
    by_channel = everything(heads, knockout.cut(1, 5, layers=0, channel=channels))
    assert torch.equal(by_head["hook_logits"], by_channel["hook_logits"])
    a, b = (heads(example(heads, seed=seed), return_state=True)[1] for seed in (1, 2))
    spliced, same = (
        states.splice(heads, a, b, layers=0, parts="scan", **i) for i in ({"head": 1}, {"channel": channels})
    )
    assert all(torch.equal(spliced[key], same[key]) for key in same)


def test_heads_that_are_not_there_are_explained(heads):
    with pytest.raises(gl.InputError, match="head=7 is out of range"):
        everything(heads, ablation.zero("blocks.0.mixer.hook_u", head=7))
    with pytest.raises(
        gl.PointError, match="blocks.0.hook_resid_pre has no axis 'head'; its axes are: batch pos d_model"
    ):
        everything(heads, ablation.zero("blocks.0.hook_resid_pre", head=0))
    for model in (gl.HookedMamba.tiny(), gl.HookedGriffin.tiny()):  # no heads, and heads of attention alone
        with pytest.raises(gl.PointError, match="blocks.0.mixer.hook_u has no axis 'head'"):
            ablation.zero("blocks.0.mixer.hook_u", head=0).hooks(model)

"""What is claimed of a model, measured on it: it holds on every architecture, and what is wrong is found."""

from __future__ import annotations

import json

import pytest
import torch

import gatedlens as gl
from gatedlens.cli.command_line import main
from gatedlens.verification import Claim
from tests import supported
from tests.conftest import EVERY

INSIDE = ("points fire", "somebody inside", "A x + r", "an edit reaches the output", "... and what its rows say")
PARTS = ("a split at a state", "padding", "step by step", "generation")
VENDORS = ("the vendor's logits", "the vendor's gradients")


def test_every_claim_holds(model):
    asked = [p.requires_grad for p in model.wrapped.parameters()]
    found = gl.verify(model)
    assert found.passed, str(found)
    assert [claim.name for claim in found.claims] == [*VENDORS, *INSIDE, *PARTS]
    for name in INSIDE:
        assert found[name].verdict == "holds"
    for name in PARTS:
        assert found[name].verdict == ("holds" if isinstance(model, gl.HookedLanguageModel) else "not asked")
    for name in VENDORS:
        own = type(model.wrapped).forward is torch.nn.Module.forward
        assert found[name].verdict == ("not asked" if own else "holds") and bool(found[name].why) >= own
    assert [p.requires_grad for p in model.wrapped.parameters()] == asked
    assert json.loads(json.dumps(found.to_dict()))["passed"] is True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [gl.HookedRWKV, gl.HookedQwen3Next])
def test_in_every_precision(make, dtype):
    assert gl.verify(make.tiny(dtype=dtype)).passed


def test_what_is_wrong_is_found():
    """A hook that changes what the recurrence gives, behind the mixer's back."""
    model = gl.HookedRWKV.tiny(dtype=torch.float64)
    with model.hooks([("blocks.0.mixer.hook_wkv", lambda x, hook: x * 1.1 + 0.1)]):
        found = gl.verify(model)
    assert not found.passed and "NOT AS CLAIMED" in str(found)
    for name in (*VENDORS, "A x + r"):
        assert found[name].verdict == "fails", name
    assert found["padding"].verdict == "holds"
    with model.hooks([("blocks.1.hook_resid_post", lambda x, hook: torch.zeros_like(x))]):
        idle = gl.verify(model)["an edit reaches the output"]
    assert idle.verdict == "fails" and idle.error > 10 and "hook_embed" in idle.why


def test_an_own_input_and_what_is_too_small():
    model = gl.HookedMamba.tiny(dtype=torch.float64)
    assert gl.verify(model, torch.randint(20, (3, 5))).passed
    for small in (torch.zeros(1, 9, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long)):
        with pytest.raises(gl.InputError, match="2 rows or more, of 4 positions"):
            gl.verify(model, small)
    with pytest.raises(gl.InputError, match="used as it is"):
        gl.verify(model, dtype="float64")
    with pytest.raises(gl.InputError, match="Did you mean 'padding'"):
        gl.verify(model)["pading"]


def test_the_command(capsys, monkeypatch):
    assert main(["verify", "gatedlens/mamba2-recall", "--dtype", "float64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True
    assert main(["verify", "gatedlens/rwkv-recall"]) == 0
    assert "every claim holds" in capsys.readouterr().out
    wrong = gl.Verification("mine", "float32", (Claim("padding", 1.0, 1e-3),))
    monkeypatch.setattr("gatedlens.verification.verify", lambda model, dtype=None: wrong)
    assert main(["verify", "gatedlens/mamba2-recall"]) == 1


@pytest.mark.skipif("kimi_linear" not in EVERY, reason="the page is of all families, and this transformers lacks some")
def test_the_page_of_models_is_up_to_date():
    """`python -m tests.supported` writes it."""
    assert supported.PAGE.read_text() == supported.page()
    assert "fails" not in supported.PAGE.read_text()

"""A small model of every hybrid, in float64, for tests that go across what mixes their tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

import gatedlens as gl
from tests.hooks import test_mamba2_hybrid, test_mamba_ssm_hybrid, test_olmo_hybrid, test_qwen4_exp, test_zamba

HYBRIDS: dict[str, Callable[[], Any]] = {
    "Griffin": lambda: gl.HookedGriffin.tiny(seed=1, dtype=torch.float64),
    "Qwen3-Next": lambda: gl.HookedQwen3Next.tiny(seed=1, dtype=torch.float64),
    "Qwen4": lambda: test_qwen4_exp.tiny(),
    "Kimi Linear": lambda: gl.HookedKimiLinear.tiny(seed=1, dtype=torch.float64),
    "OLMo-hybrid": lambda: test_olmo_hybrid.tiny("biases"),
    "MiniMax": lambda: gl.HookedMiniMax.tiny(seed=1, dtype=torch.float64),
    "Jamba": lambda: gl.HookedJamba.tiny(seed=1, dtype=torch.float64),
    "Zamba": lambda: test_zamba.tiny(),
    "mamba-ssm's": lambda: test_mamba_ssm_hybrid.tiny("channels beside"),
    "LFM2": lambda: gl.HookedLFM2.tiny(seed=1, dtype=torch.float64),
    "Bamba": lambda: test_mamba2_hybrid.tiny("Bamba"),
    "Granite": lambda: test_mamba2_hybrid.tiny("Granite"),
    "Nemotron-H": lambda: test_mamba2_hybrid.tiny("Nemotron-H"),
    "Falcon-H1": lambda: test_mamba2_hybrid.tiny("Falcon-H1"),
    "Zamba2": lambda: test_mamba2_hybrid.tiny("Zamba2"),
}
TWO = ("Falcon-H1", "Zamba", "Zamba2")  # whose layers mix tokens twice


@cache
def hybrid(name: str) -> Any:
    """The model of this name; tests leave it as it was."""
    return HYBRIDS[name]()

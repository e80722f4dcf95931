"""The page of supported models: what `gl.verify` says of a tiny random model of each family, in float64.

python -m tests.supported          # writes docs/models.md
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

import gatedlens as gl
from gatedlens.verification import VENDORS, Verification
from tests.conftest import ROOT
from tests.hooks import (
    test_fla,
    test_lfm2,
    test_mamba,
    test_mamba2,
    test_mamba2_hybrid,
    test_mamba3,
    test_mamba_ssm_hybrid,
    test_qwen3_next,
    test_qwen4_exp,
    test_zamba,
)

PAGE = ROOT / "docs" / "models.md"


def of_class(make: Any) -> Callable[[], Any]:
    return lambda: make.tiny(seed=1, dtype=torch.float64)


FAMILIES: dict[str, Callable[[], Any]] = {
    "Mamba": lambda: gl.wrap(test_mamba.hf("Mamba", torch.float64)),
    "FalconMamba": lambda: gl.wrap(test_mamba.hf("FalconMamba", torch.float64)),
    "Mamba-2": lambda: gl.wrap(test_mamba2.hf(torch.float64)),
    "Mamba-3": lambda: test_mamba3.tiny(),
    "Mamba-3, MIMO": lambda: test_mamba3.tiny("MIMO, MLP"),
    "Griffin (RecurrentGemma)": of_class(gl.HookedGriffin),
    "RWKV-4": of_class(gl.HookedRWKV),
    "RWKV-6 (and RWKV-5)": of_class(gl.HookedRWKV6),
    "RWKV-7": of_class(gl.HookedRWKV7),
    "GLA": lambda: test_fla.tiny("gla"),
    "RetNet": lambda: test_fla.tiny("retnet"),
    "HGRN2": lambda: test_fla.tiny("hgrn2"),
    "DeltaNet": lambda: test_fla.tiny("delta_net"),
    "gated DeltaNet": lambda: test_fla.tiny("gated_deltanet"),
    "gated DeltaProduct": lambda: test_fla.tiny("gated_deltaproduct of two steps"),
    "Qwen3-Next": lambda: test_qwen3_next.tiny("next"),
    "Qwen3.5": lambda: test_qwen3_next.tiny("3.5"),
    "Qwen3.5-MoE": lambda: test_qwen3_next.tiny("3.5, experts, with images"),
    "Qwen4": lambda: test_qwen4_exp.tiny(),
    "Kimi Linear": of_class(gl.HookedKimiLinear),
    "Bailing hybrid (Ling 3)": of_class(gl.HookedBailingHybrid),
    "OLMo-hybrid": of_class(gl.HookedOlmoHybrid),
    "MiniMax": of_class(gl.HookedMiniMax),
    "Bamba": lambda: test_mamba2_hybrid.tiny("Bamba"),
    "Granite-4-H": lambda: test_mamba2_hybrid.tiny("Granite"),
    "Falcon-H1": lambda: test_mamba2_hybrid.tiny("Falcon-H1"),
    "Nemotron-H": lambda: test_mamba2_hybrid.tiny("Nemotron-H"),
    "Zamba2": lambda: test_mamba2_hybrid.tiny("Zamba2"),
    "Zamba": lambda: test_zamba.tiny(),
    "mamba-ssm's hybrids": lambda: test_mamba_ssm_hybrid.tiny("channels beside"),
    "Jamba": of_class(gl.HookedJamba),
    "LFM2": of_class(gl.HookedLFM2),
    "LFM2-MoE": lambda: test_lfm2.tiny("experts"),
    "Vision Mamba": of_class(gl.HookedViM),
}
HEAD = """# Supported models, and what is verified of each

Every line is `gl.verify` on a tiny random model of the family, in float64: each claim holds to a relative error of 1e-9, those
against the vendor's own forward to {vendors:.0e} (it takes some steps in float32), gradients to ten times that.

"-" where it cannot be asked: the vendor's code is not at hand (golden vectors or literal loops of the tests stand for it), or
a model reads a whole image at once. `print(gl.verify(model))` says it of yours.

"""


def page() -> str:
    """The page as it should be."""
    found = {family: (model := make(), gl.verify(model)) for family, make in FAMILIES.items()}
    claims = [claim.name for claim in next(iter(found.values()))[1].claims]
    rows = [f"| family | opened as | layers | {' | '.join(claims)} |", f"|---|---|---|{'---|' * len(claims)}"]
    rows += [row(family, model, verified) for family, (model, verified) in found.items()]
    return HEAD.format(vendors=VENDORS[torch.float64]) + "\n".join(rows) + "\n"


def row(family: str, model: Any, verified: Verification) -> str:
    kinds = sorted(set().union(*(block.kinds for block in model.blocks)))
    told = {"holds": "holds", "fails": "**fails**", "not asked": "-"}
    said = " | ".join(told[claim.verdict] for claim in verified.claims)
    return f"| {family} | `gl.{type(model).__name__}` | {', '.join(kinds)} | {said} |"


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    PAGE.write_text(page())
    print(f"wrote {PAGE.relative_to(ROOT)}")

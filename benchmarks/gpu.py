"""On a GPU: the hooked forward with nobody listening against mamba-ssm's own model, forward and backward.

python -m benchmarks.gpu            Mamba-130m's sizes, batch 8, pos 2048, bfloat16; prints seconds and peak MiB

Needs CUDA, mamba-ssm and causal-conv1d (`pip install 'gatedlens[cuda]'`); says so and ends with 0 where they are missing.
Both run the same parameters: our model wraps mamba-ssm's.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measure import medians

BATCH, LENGTH = 8, 2048


def missing() -> str | None:
    """Why this cannot run here; None if it can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    lacks = [name for name in ("mamba_ssm", "causal_conv1d") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(lacks)} cannot be imported" if lacks else None


def synchronised(function: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        function()
        torch.cuda.synchronize()

    return run


def speed() -> dict[str, Any]:
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    import gatedlens as gl

    torch.manual_seed(0)
    config = MambaConfig(d_model=768, n_layer=24, vocab_size=50277)
    peer = MambaLMHeadModel(config, device="cuda", dtype=torch.bfloat16).eval()
    ours = gl.wrap(peer)
    tokens = torch.randint(50277, (BATCH, LENGTH), device="cuda")
    with torch.no_grad():
        gap = (ours(tokens).float() - peer(tokens).logits.float()).abs().max() / peer(tokens).logits.abs().max()
        runs = {"ours": lambda: ours.ln_final(ours(tokens, stop_at_layer=24)), "theirs": lambda: peer.backbone(tokens)}
        found: dict[str, Any] = {"forward": medians({k: synchronised(f) for k, f in runs.items()}, 20, warmup=5)}

    def backward(logits: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            logits()[:, -1].float().logsumexp(-1).sum().backward()
            peer.zero_grad(set_to_none=True)

        return synchronised(run)

    roads = {"ours": backward(lambda: ours(tokens)), "theirs": backward(lambda: peer(tokens).logits)}
    found["forward + backward"] = medians(roads, 10, warmup=3)
    ratios = {f"speed of mamba-ssm's {what}": round(s["theirs"] / s["ours"], 3) for what, s in found.items()}
    return {"device": torch.cuda.get_device_name(), "largest relative gap of logits": float(gap), **found, **ratios}


if __name__ == "__main__":
    print(json.dumps({"skipped": why} if (why := missing()) else speed(), indent=1))

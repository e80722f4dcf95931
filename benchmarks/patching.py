"""Activation patching against TransformerLens's on the same model: layer x pos of 12 layers, hidden 256, 64 positions.

python -m benchmarks.patching resid_pre changed      prompts that differ at every position; also: mixer_out, and
python -m benchmarks.patching resid_pre one          prompts that differ in one token, as counterfactuals do
python -m benchmarks.patching resid_pre one own      the same with a metric of one's own, which may read all logits

One thread, float32, batch 1, no gradients. TransformerLens runs the model once a cell; both give the same numbers, which
is asserted: to 1e-5 of the largest logit, where float32 itself is good to half of that.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import Any

import torch

LAYERS, LENGTH, VOCABULARY = 12, 64, 1024
THEIRS = {"resid_pre": "get_act_patch_resid_pre", "mixer_out": "get_act_patch_attn_out"}


def model() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    import gatedlens as gl

    torch.manual_seed(0)
    config = MambaConfig(hidden_size=256, num_hidden_layers=LAYERS, vocab_size=VOCABULARY)
    return gl.wrap(MambaForCausalLM(config).eval())


def prompts(differ: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(clean, corrupted) tokens: random ones that differ everywhere, or in one token a quarter of the way in."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(VOCABULARY, (1, LENGTH), generator=generator)
    corrupted = (clean + torch.randint(1, VOCABULARY, (1, LENGTH), generator=generator)) % VOCABULARY
    if differ == "one":
        at = torch.arange(LENGTH) == LENGTH // 4
        corrupted = torch.where(at, corrupted, clean)
    return clean, corrupted


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    found = function()
    return time.process_time() - began, found


@torch.no_grad()
def sweep(point: str, differ: str, whose: str = "library") -> dict[str, float]:
    """CPU seconds of a whole sweep: ours twice around theirs once, the mean of ours, so that noise hits both."""
    from transformer_lens import patching as peer

    import gatedlens as gl
    from gatedlens import patching

    hooked = model()
    clean, corrupted = prompts(differ)
    _, cache = hooked.run_with_cache(clean)

    def own(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1, 3].mean() - logits[:, -1, 5].mean()

    metric = own if whose == "own" else gl.metrics.logit_difference(3, 5)

    def ours() -> Any:
        function = getattr(patching, f"get_act_patch_{point}")
        return function(hooked, corrupted, cache, metric, progress=False)

    def theirs() -> Any:
        with redirect_stderr(io.StringIO()):  # its progress bar has no switch
            return getattr(peer, THEIRS[point])(hooked, corrupted, cache, lambda logits: metric(logits).mean())

    before, found = timed(ours)
    peer_seconds, wanted = timed(theirs)
    after, _ = timed(ours)
    error = float((found.values - wanted).abs().max() / hooked(corrupted).abs().max())
    assert error < 1e-5, f"{point}: the two sweeps differ by {error}"
    return {"ours": (before + after) / 2, "theirs": peer_seconds, "error": error}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(sweep(*sys.argv[1:])))

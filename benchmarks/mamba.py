"""Mamba against transformers' own forward: hidden 768, 4 layers, batch 1, one thread, float32.

python -m benchmarks.mamba speed            forward at pos 256 and 1024, forward + backward at pos 256, run_with_cache
python -m benchmarks.mamba memory ours      peak memory of a plain forward at pos 1024 (fresh process); also: theirs
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from benchmarks.measure import growth, medians

SIZES = {"hidden_size": 768, "num_hidden_layers": 4, "vocab_size": 50280}


def theirs() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(**SIZES)).eval()


def speed() -> dict[str, Any]:
    import gatedlens as gl

    peer = theirs()
    ours = gl.wrap(peer)
    found: dict[str, Any] = {}
    for length in (256, 1024):
        tokens = torch.randint(50280, (1, length), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            runs = {"ours": lambda t=tokens: ours(t), "theirs": lambda t=tokens: peer(t, use_cache=False)}
            found[f"forward, pos {length}"] = medians(runs, repeats=5 if length == 256 else 3)
    tokens = torch.randint(50280, (1, 256), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pair = {"ours": lambda: ours.run_with_cache(tokens), "theirs": lambda: ours(tokens)}
        found["run_with_cache (not lazy) / plain, pos 256"] = medians(pair, repeats=7)
    peer.requires_grad_(False)
    embedded = torch.randn(1, 256, 768)

    def back_ours() -> None:
        x = embedded.clone().requires_grad_()
        ours(x, start_at_layer=0)[:, -1].sum().backward()

    def back_theirs() -> None:
        x = embedded.clone().requires_grad_()
        peer(inputs_embeds=x, use_cache=False).logits[:, -1].sum().backward()

    found["forward + backward to the embeddings, pos 256"] = {
        **medians({"ours": back_ours}, repeats=5),
        **medians({"theirs": back_theirs}, repeats=1, warmup=0),
    }
    return found


def memory(who: str) -> float:
    tokens = torch.randint(50280, (1, 1024), generator=torch.Generator().manual_seed(0))

    def prepare() -> Any:
        import gatedlens as gl

        peer = theirs()
        model = gl.wrap(peer) if who.startswith("ours") else peer
        with torch.no_grad():  # what is loaded at the first call is not the forward's
            model(tokens[:, :8])
        return model

    @torch.no_grad()
    def forward(model: Any) -> None:
        if who == "ours":
            model(tokens)
        elif who == "ours, blocks":
            model(tokens, return_type=None)
        elif who == "theirs":
            model(tokens, use_cache=False)
        else:
            model.backbone(tokens, use_cache=False)

    return growth(prepare, forward)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(speed() if sys.argv[1] == "speed" else memory(sys.argv[2])))

"""Griffin and RWKV against transformers' own forward + backward: hidden 768, 4 layers, pos 1024, batch 1, one thread, float32.

    python -m benchmarks.language griffin        also: rwkv

The vocabulary is small (512), so that the unembedding, the same for both, does not hide the recurrence.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from benchmarks.measure import medians


def griffin() -> Any:
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    sizes = {"hidden_size": 768, "lru_width": 768, "intermediate_size": 2304, "num_hidden_layers": 4, "vocab_size": 512}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 1, "w_init_variance_scale": 1.0}
    return RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**sizes, **heads)).eval()


def rwkv() -> Any:
    from transformers import RwkvConfig, RwkvForCausalLM

    return RwkvForCausalLM(RwkvConfig(hidden_size=768, num_hidden_layers=4, vocab_size=512)).eval()


def speed(make: Any) -> dict[str, float]:
    import gatedlens as gl

    torch.manual_seed(0)
    peer = make()
    ours = gl.wrap(peer)
    peer.requires_grad_(False)
    tokens = torch.randint(512, (1, 1024), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        embedded = peer.get_input_embeddings()(tokens)

    def back_ours() -> None:
        x = embedded.clone().requires_grad_()
        ours(ours.stream(x), start_at_layer=0)[:, -1].sum().backward()

    def back_theirs() -> None:
        x = embedded.clone().requires_grad_()
        peer(inputs_embeds=x, use_cache=False).logits[:, -1].sum().backward()

    found = medians({"ours": back_ours}, repeats=3)
    return {**found, **medians({"theirs": back_theirs}, repeats=1, warmup=0)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(speed({"griffin": griffin, "rwkv": rwkv}[sys.argv[1]])))

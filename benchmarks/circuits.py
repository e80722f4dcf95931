"""Attribution patching of every point that is not lazy, against one forward + backward of the same model.

    python -m benchmarks.circuits speed         seconds of both; also Griffin and RWKV
    python -m benchmarks.circuits memory ours   peak memory (fresh process); also: theirs

12 layers, hidden 256, pos 64, vocabulary 512, batch 8, one thread, float32. The forward + backward is the leanest there
is: parameters frozen, the gradient of the last position's logit difference with respect to the embeddings.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from benchmarks.measure import growth, medians

VOCABULARY, BATCH, LENGTH = 512, 8, 64


def mamba() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(hidden_size=256, num_hidden_layers=12, vocab_size=VOCABULARY)).eval()


def griffin() -> Any:
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    sizes = {"hidden_size": 256, "lru_width": 256, "intermediate_size": 768, "num_hidden_layers": 12}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": VOCABULARY, "w_init_variance_scale": 1.0}
    return RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**sizes, **heads)).eval()


def rwkv() -> Any:
    from transformers import RwkvConfig, RwkvForCausalLM

    return RwkvForCausalLM(RwkvConfig(hidden_size=256, num_hidden_layers=12, vocab_size=VOCABULARY)).eval()


def runs(make: Any) -> dict[str, Any]:
    """The two functions that are compared, of one model."""
    import gatedlens as gl
    from gatedlens.circuits import attribution_patch

    torch.manual_seed(0)
    model = gl.wrap(make())
    clean, corrupted = torch.randint(VOCABULARY, (2, BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    metric = gl.metrics.logit_difference(1, 2)
    with torch.no_grad():
        embedded = model.embed(corrupted)

    def forward_and_backward() -> None:
        x = embedded.clone().requires_grad_()
        torch.autograd.grad(metric(model(model.stream(x), start_at_layer=0)).sum(), x)

    model.wrapped.requires_grad_(False)
    ours = lambda: attribution_patch(model, clean, corrupted, metric)  # noqa: E731
    return {"ours": ours, "theirs": forward_and_backward}


def speed() -> dict[str, Any]:
    return {make.__name__: medians(runs(make), repeats=7) for make in (mamba, griffin, rwkv)}


def memory(who: str) -> float:
    def prepare() -> Any:
        made = runs(mamba)
        made[who]()  # what is loaded at the first call is not the method's
        return made[who]

    return growth(prepare, lambda function: function())


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(speed() if sys.argv[1] == "speed" else memory(sys.argv[2])))

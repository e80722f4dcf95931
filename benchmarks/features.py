"""A feature graph, every target of it, against one forward + backward of the same model on the same prompt.

    python -m benchmarks.features speed        seconds a target, of recall models and a Mamba of 12 layers
    python -m benchmarks.features memory 512   peak memory (fresh process) at so many positions

Random dictionaries of the stream and of mixers' outputs, TopK: how many features are on decides how many targets there are. The
forward + backward is the leanest there is: parameters frozen, the gradient of one logit with respect to the embeddings.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.circuits import VOCABULARY, mamba
from benchmarks.measure import growth, medians

RECALL = ("mamba", "mamba2", "gdn", "rwkv7")
LENGTH, FEATURES, ON = 64, 512, 4


def random_dictionary(model: Any, point: str, on: int) -> Any:
    """A dictionary with random weights of a point."""
    from gatedlens.dictionaries import Dictionary, TopK

    width = model.names.points[point].elements({**model.cfg.sizes, "batch": 1, "pos": 1})
    draw = torch.Generator().manual_seed(0)
    W = torch.randn(2, width, FEATURES, generator=draw) / width**0.5
    return Dictionary(W[0], W[1].T.contiguous(), point=point, activation=TopK(on))


def runs(model: Any, tokens: Any, layers: tuple[int, ...]) -> tuple[dict[str, Callable[[], Any]], int]:
    """The two functions that are compared, and how many targets the graph has."""
    import gatedlens as gl

    model.wrapped.requires_grad_(False)
    points = [
        point
        for layer in layers
        for point in (f"blocks.{layer}.hook_resid_post", model.blocks[layer].mixer.output_name)
    ]
    dictionaries = [random_dictionary(model, point, ON) for point in points]
    with torch.no_grad():
        embedded = model.embed(tokens)

    def forward_and_backward() -> None:
        x = embedded.clone().requires_grad_()
        torch.autograd.grad(model(model.stream(x), start_at_layer=0)[0, -1, 1], x)

    def ours() -> Any:
        return gl.feature_graph.attribute(model, tokens, dictionaries, logits=[1], progress=False)

    return {"ours": ours, "theirs": forward_and_backward}, len(ours().targets)


def speed() -> dict[str, dict[str, float]]:
    """Seconds a target, and of the forward + backward."""
    import gatedlens as gl

    torch.manual_seed(0)
    cases = {
        f"{name}-recall": (
            gl.from_pretrained(f"gatedlens/{name}-recall", device="cpu"),
            gl.tasks.recall(1).tokens,
            (0, 1),
        )
        for name in RECALL
    }
    tokens = torch.randint(VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    cases["mamba of 12 layers, pos 64"] = (gl.wrap(mamba()), tokens, (5, 11))
    found = {}
    for name, (model, prompt, layers) in cases.items():
        functions, targets = runs(model, prompt, layers)
        seconds = medians(functions, repeats=3)
        found[f"{name}, {targets} targets"] = {"ours": seconds["ours"] / targets, "theirs": seconds["theirs"]}
    return found


def memory(length: int) -> float:
    """MiB of a graph with 64 features of a Mamba of 2 layers, 2 targets a backward pass."""
    import gatedlens as gl

    def prepare() -> Any:
        from transformers import MambaConfig, MambaForCausalLM

        torch.manual_seed(0)
        model = gl.wrap(
            MambaForCausalLM(MambaConfig(hidden_size=256, num_hidden_layers=2, vocab_size=VOCABULARY)).eval()
        )
        model.wrapped.requires_grad_(False)
        sae = random_dictionary(model, "blocks.0.hook_resid_post", 1)

        def graph(length: int) -> Any:
            tokens = torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))
            options: dict[str, Any] = {"logits": [1], "max_nodes": 64, "batch_size": 2, "progress": False}
            return gl.feature_graph.attribute(model, tokens, [sae], **options)

        graph(16)  # what is loaded at the first call is not the graph's
        return graph

    return growth(prepare, lambda graph: graph(length))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(speed() if sys.argv[1] == "speed" else memory(int(sys.argv[2]))))

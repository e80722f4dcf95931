"""Each architecture's blocks over the matrix products that they are made of: hidden 768, 4 layers, batch 1, one thread, float32.

    python -m benchmarks.products mamba        also: CASES below; forward, forward + backward, pos 1024

Qwen3-Next and Kimi Linear have hidden 512, and three delta nets to one attention.

The products are those that a forward (and a backward) of the blocks calls, by their operators and shapes: every linear map, and
those of a scan, or of attention, that is made of products. They run alone, on numbers drawn anew, in the same process and in
turns with the blocks. What is over 1 is norms, gates, convolutions, elementwise scans and the cost of calling.
The parameters take gradients too, as in training.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import language
from benchmarks.measure import medians

LENGTH, HIDDEN, LAYERS = 1024, 768, 4
OPERATORS = ("mm", "bmm", "addmm", "baddbmm", "addmm_", "baddbmm_", "linear")


class Noted(TorchDispatchMode):
    """Notes the operands of every matrix product: (shape, strides) of both."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[list[tuple[tuple[int, ...], tuple[int, ...]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith("_scaled_dot_product"):
            self.note_attention(name.endswith("backward"), args)
        if name in OPERATORS:
            pair = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            if pair[0].ndim >= 2 and pair[1].ndim >= 2:
                self.note(*pair)
        return func(*args, **(kwargs or {}))

    def note(self, *pair: torch.Tensor) -> None:
        self.found.append([(tuple(x.shape), tuple(x.stride())) for x in pair])

    def note_attention(self, backward: bool, args: Any) -> None:
        """torch's own attention: q k^T and P v; for a gradient g, g v^T, P^T g, dS k and dS^T q. What a backward computes once
        more does not count."""
        if backward:
            g, q, k, v = args[:4]
            pattern = torch.empty(*q.shape[:3], k.shape[2], device="meta")
            for pair in ((g, v.mT), (pattern.mT, g), (pattern, k), (pattern.mT, q)):
                self.note(*pair)
        elif torch._C._current_graph_task_id() == -1:  # not inside a backward
            q, k, v = args[:3]
            self.note(q, k.mT)
            self.note(torch.empty(*q.shape[:3], k.shape[2], device="meta"), v)


def alone(noted: Noted) -> Callable[[], None]:
    """All that was noted, with nothing in between. (A vector times a matrix is not worth its name and left out.)"""
    pairs = []
    for shapes in noted.found:
        a, b = (torch.randn(shape).as_strided(shape, _dense(shape, strides)) for shape, strides in shapes)
        if min(a.shape[-2], a.shape[-1], b.shape[-1]) > 1:
            pairs.append((a, b))

    @torch.no_grad()
    def run() -> None:
        for a, b in pairs:
            torch.matmul(a, b)

    return run


def _dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in the order of the given ones, without gaps."""
    size, found = 1, [0] * len(shape)
    for axis in sorted(range(len(shape)), key=lambda axis: (strides[axis], -axis)):
        found[axis] = size
        size *= shape[axis]
    return tuple(found)


def mamba() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(hidden_size=HIDDEN, num_hidden_layers=LAYERS, vocab_size=512))


def mamba2() -> Any:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    sizes = {
        "hidden_size": HIDDEN,
        "num_heads": 24,
        "head_dim": 64,
        "n_groups": 1,
        "state_size": 128,
        "vocab_size": 512,
    }
    return Mamba2ForCausalLM(Mamba2Config(num_hidden_layers=LAYERS, **sizes))


CASES = {
    "mamba": mamba,
    "mamba2": mamba2,
    "griffin": language.griffin,
    "rwkv": language.rwkv,
    "qwen3_next": language.qwen3_next,
    "kimi_linear": language.kimi_linear,
}


def speed(name: str) -> dict[str, Any]:
    import gatedlens as gl

    torch.manual_seed(0)
    model = gl.wrap(CASES[name]().eval())
    model.requires_grad_(True)
    resid = torch.randn(1, LENGTH, model.cfg.d_model)

    def forward(x: torch.Tensor = resid) -> torch.Tensor:
        return model(x, start_at_layer=0, stop_at_layer=model.cfg.n_layers)

    def both() -> None:
        model.zero_grad(set_to_none=True)
        forward(resid.clone().requires_grad_()).sum().backward()

    found: dict[str, Any] = {}
    for what, run in (("forward", torch.no_grad()(forward)), ("forward + backward", both)):
        with Noted() as noted:
            run()
        found[f"{what}, pos {LENGTH}"] = medians({"ours": run, "theirs": alone(noted)}, repeats=3)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(speed(sys.argv[1])))

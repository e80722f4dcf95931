"""Secant relevance against lrp, on the architectures of `products.py`: models of 4 layers, batch 1, one thread, float32.

    python -m benchmarks.secant speed mamba            also: CASES of products.py; CPU seconds of both, pos 128 and 1024
    python -m benchmarks.secant memory mamba ours      peak memory, pos 1024 (fresh process); also: theirs

The peer in memory is a forward + backward to the embeddings, and a cache of every point of a second run that is not lazy.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measure import growth
from benchmarks.products import CASES

LENGTHS = (128, 1024)


def made(name: str) -> Any:
    import gatedlens as gl

    torch.manual_seed(0)
    model = gl.wrap(CASES[name]().eval())
    model.requires_grad_(False)
    return model


def tokens(length: int) -> torch.Tensor:
    return torch.randint(512, (1, length), generator=torch.Generator().manual_seed(0))


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """Of this process: the least of several, since other processes only add."""
    function()
    found = []
    for _ in range(repeats):
        began = time.process_time()
        function()
        found.append(time.process_time() - began)
    return min(found)


def speed(name: str) -> dict[str, Any]:
    import gatedlens as gl

    model, found = made(name), {}
    for length in LENGTHS:
        x, repeats = tokens(length), 3 if length < 512 else 2
        ours, theirs = (
            seconds(lambda of=of, x=x: of(model, x, 3), repeats)  # type: ignore[misc]
            for of in (gl.attribution.secant, gl.attribution.lrp)
        )
        found[f"pos {length}"] = {"ours": ours, "theirs": theirs}
    return found


def ours(model: Any) -> None:
    import gatedlens as gl

    gl.attribution.secant(model, tokens(LENGTHS[-1]), 3)


def theirs(model: Any) -> None:
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens(LENGTHS[-1]))
        x = model(tokens(LENGTHS[-1]), stop_at_layer=0)
    x = x.detach().requires_grad_()
    torch.autograd.grad(model(x, start_at_layer=0)[0, -1, 3], x)
    del cache


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, name = sys.argv[1:3]
    if what == "speed":
        print(json.dumps(speed(name)))
    else:
        print(json.dumps(growth(lambda: made(name), {"ours": ours, "theirs": theirs}[sys.argv[3]])))

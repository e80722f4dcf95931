"""Heads with matrix states against transformers' own forms of the same recurrences: batch 1, one thread, float32.

    python -m benchmarks.heads mamba2          also: gated_delta, kimi_delta; forward, forward + backward, pos 1024 and 2048
    python -m benchmarks.heads memory mamba2 ours           peak memory of forward + backward at pos 1024 (fresh process)
    python -m benchmarks.heads matrix          the mean of the scan's matrix, and of its absolutes, over its matrix products

Sizes are those of mamba2-130m (24 heads of 64, 128 states) and of Qwen3-Next's and Kimi Linear's layers (16 heads of 128 by 128).
Each pair computes the same numbers; that is checked before it is timed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.measure import growth, medians

LENGTHS = (1024, 2048)


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def mamba2(length: int) -> tuple[Callable[..., Any], Callable[..., Any], list[torch.Tensor]]:
    """(ours, theirs, tensors): dt [b, l, h], A [h], B and C [b, l, 1, n], u [b, l, h, v]."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    from gatedlens.recurrence import Terms, chunked

    def ours(dt: Any, A: Any, B: Any, C: Any, u: Any) -> Any:
        return chunked(Terms((dt * A).unsqueeze(-1), B, C, amount=dt), u, u.new_zeros(1, 24, 64, 128))[0]

    def theirs(dt: Any, A: Any, B: Any, C: Any, u: Any) -> Any:
        return mamba2_chunk_scan(u, dt, A, B, C, chunk_size=256)

    tensors = [
        F.softplus(_draw(1, length, 24) - 3),
        -torch.exp(_draw(24)),
        *(_draw(1, length, 1, 128) for _ in range(2)),
    ]
    return ours, theirs, [*tensors, _draw(1, length, 24, 64)]


def _delta(by_key: bool, rule: Callable[..., Any], length: int) -> Any:
    from gatedlens.recurrence import Terms, chunked

    def ours(q: Any, k: Any, v: Any, g: Any, beta: Any) -> Any:
        log = g if by_key else g.unsqueeze(-1)
        written = beta.unsqueeze(-1) * k
        terms = Terms(log, written, q * 128**-0.5, erase=written, probe=log.exp() * k)
        return chunked(terms, v, v.new_zeros(1, 16, 128, 128))[0]

    q, k = (F.normalize(_draw(1, length, 16, 128 + i)[..., :128], dim=-1) for i in range(2))
    g = -torch.exp(_draw(1, length, 16, 128) - 3) if by_key else -torch.exp(_draw(1, length, 16) - 1)
    beta = torch.sigmoid(_draw(1, length, 16))
    return ours, lambda *given: rule(*given)[0], [q, k, _draw(1, length, 16, 129)[..., :128].contiguous(), g, beta]


def gated_delta(length: int) -> Any:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    return _delta(False, torch_chunk_gated_delta_rule, length)


def kimi_delta(length: int) -> Any:
    from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention

    return _delta(True, chunk_kimi_delta_attention, length)


CASES = {"mamba2": mamba2, "gated_delta": gated_delta, "kimi_delta": kimi_delta}


def _both_ways(function: Callable[..., Any], tensors: list[torch.Tensor]) -> None:
    live = [t.detach().requires_grad_() for t in tensors]
    function(*live).sum().backward()


def speed(name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for length in LENGTHS:
        ours, theirs, tensors = CASES[name](length)
        with torch.no_grad():
            a, b = ours(*tensors), theirs(*tensors)
            assert (a - b).abs().max() < 1e-4 * b.abs().max(), "the two do not compute the same"
            runs = {"ours": partial(ours, *tensors), "theirs": partial(theirs, *tensors)}
            found[f"forward, pos {length}"] = medians(runs, repeats=5 if name != "kimi_delta" else 1)
        runs = {who: partial(_both_ways, f, tensors) for who, f in (("ours", ours), ("theirs", theirs))}
        found[f"forward + backward, pos {length}"] = medians(runs, repeats=3 if name != "kimi_delta" else 1)
    return found


def memory(name: str, who: str) -> float:
    def prepare() -> Any:
        ours, theirs, tensors = CASES[name](1024)
        function = ours if who == "ours" else theirs
        with torch.no_grad():  # what is loaded at the first call is not the scan's
            function(*(t[:, :64] if t.ndim > 1 else t for t in tensors))
        return function, tensors

    return growth(prepare, lambda made: _both_ways(*made))


def matrix() -> dict[str, Any]:
    """The mean over channels of the scan's matrix with a conv of 4 taps, over the matrix products that it is made of."""
    from gatedlens.recurrence import HeadScan, Terms

    found: dict[str, Any] = {}
    for name in ("mamba2", "gated_delta"):
        for length in LENGTHS:
            tensors = CASES[name](length)[2]
            if name == "mamba2":
                dt, A, B, C, u = tensors
                terms = Terms((dt * A).unsqueeze(-1), B, C, amount=dt)
            else:
                q, k, u, g, beta = tensors
                written = beta.unsqueeze(-1) * k
                terms = Terms(g.unsqueeze(-1), written, q, erase=written, probe=g.exp().unsqueeze(-1) * k)
            heads, width = u.shape[2:]
            left, right = u.flatten(2), u.flatten(2).flip(1)
            taps = _draw(heads * width, 4)
            scan = HeadScan.of(terms, width)
            key = terms.key.shape[-1]
            a, b, c = _draw(heads, length, width), _draw(heads, width, length), _draw(terms.key.shape[2], length, key)

            def products(a: Any = a, b: Any = b, c: Any = c) -> None:
                # Half of each: the triangle. Four taps of left @ right^T a head, and rows @ sources^T a group.
                half = a.shape[1] // 2
                for _ in range(4):
                    torch.bmm(a[:, :half], b)
                torch.bmm(c[:, :half], c.mT)

            with torch.no_grad():
                runs = {"ours": partial(scan.summed, left, right, taps), "theirs": products}
                found[f"{name}: mean with 4 taps, pos {length}"] = medians(runs, repeats=3)
                absolute = partial(scan.absolute, left, right, taps, torch.zeros(heads * width))
                runs = {"ours": absolute, "theirs": partial(scan.summed, left, right, taps)}
                found[f"{name}: abs_mean with 4 taps over mean, pos {length}"] = medians(runs, repeats=1)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "memory":
        print(json.dumps(memory(sys.argv[2], sys.argv[3])))
    else:
        print(json.dumps(matrix() if sys.argv[1] == "matrix" else speed(sys.argv[1])))

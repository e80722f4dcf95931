"""Implicit attention: channel 1536, state 16, batch 1, float32, one thread, on a randomly initialised Mamba.

python -m benchmarks.attention ratios        mean() against the direct sum and TransformerLens, `@ x` against the scan
python -m benchmarks.attention cpu WHAT      CPU seconds of WHAT (see MEASURED), median of three
python -m benchmarks.attention memory WHAT   MiB by which WHAT raises the resident memory at its peak (fresh process)
python -m benchmarks.attention bounds        what the machine allows: its matrix products and exponentials

The direct sum holds [channel chunk, state, pos, pos]; conv, act, gate and skip are in it and in mean(). TransformerLens's
bridge fails with current transformers (its hooks do not fire), so its own formula is called on the tensors of our cache.
"""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import growth, medians

SIZES = {"hidden_size": 768, "num_hidden_layers": 1, "vocab_size": 1000}
DIRECT_CHUNK = 16  # channels: 64 MiB at pos 256


def attention(length: int) -> Any:
    """The implicit attention of layer 0 on random tokens."""
    import gatedlens as gl

    return gl.implicit_attention(_model(), _tokens(length), layer=0)


def _model(**sizes: int) -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    import gatedlens as gl

    torch.manual_seed(0)
    return gl.wrap(MambaForCausalLM(MambaConfig(**{**SIZES, **sizes})).eval())


def _tokens(length: int) -> Tensor:
    return torch.randint(1000, (1, length), generator=torch.Generator().manual_seed(0))


# -- peers ----------------------------------------------------------------------------------------------------------


def direct(A: Any) -> Tensor:
    """mean() as the formula has it, channel chunk by channel chunk: [chunk, state, pos, pos] at a time."""
    f = A.factors
    s, length, channels = f.scan, f.x.shape[1], f.x.shape[2]
    causal, width = torch.ones(length, length).tril(), f.taps.shape[1]
    total = torch.zeros(length, length)
    for start in range(0, channels, DIRECT_CHUNK):
        some = slice(start, start + DIRECT_CHUNK)
        time_c = s.time[0, :, some].T
        ago = (time_c[:, :, None] - time_c[:, None, :]).clamp(min=0).float()
        decay = torch.exp(s.rate[some, :, None, None] * ago[:, None])  # channel state dst src
        S = (s.read[0].T[None, :, :, None] * decay * s.key[0].T[None, :, None, :]).sum(1)
        S = S * causal * s.amount[0, :, some].T[:, None, :] + torch.diag_embed(f.skip[some, None].expand(-1, length))
        S = S * f.act[0, :, some].T[:, None, :]
        A_c = torch.zeros_like(S)
        for k in range(width):
            A_c[..., : length - k] += S[..., k:] * f.taps[some, width - 1 - k, None, None]
        total += (A_c * f.gate[0, :, some].T[:, :, None]).sum(0)
    return total[None] / channels


def transformer_lens(cache: Any) -> Callable[[], Tensor]:
    """The mean over channels of `compute_effective_attention`, TransformerLens's own code on the tensors of our cache."""
    from transformer_lens.model_bridge.generalized_components.ssm_mixer import SSMMixerBridge

    mixer = cache.model.wrapped.backbone.layers[0].mixer
    theirs = {
        "blocks.0.mixer.x_proj.hook_out": torch.cat([cache[name, 0] for name in ("dt_rank", "B", "C")], dim=-1),
        "blocks.0.mixer.dt_proj.hook_out": cache["dt_pre", 0],
    }
    bridge: Any = SimpleNamespace(config=mixer, original_component=mixer, A_log=mixer.A_log)
    bridge._s6_terms = lambda cache, layer: SSMMixerBridge._s6_terms(bridge, cache, layer)
    formula: Any = SSMMixerBridge.compute_effective_attention
    return lambda: formula(bridge, theirs, 0, include_dt_scaling=True).mean(1)


def _cached(length: int) -> Any:
    return _model().run_with_cache(_tokens(length))[1]


def _ours(cache: Any) -> Tensor:
    import gatedlens as gl

    return gl.implicit_attention(cache, layer=0).mean()  # type: ignore[no-any-return]


# -- measurements ---------------------------------------------------------------------------------------------------


def _every_layer(model: Any) -> list[Tensor]:
    """The means of all layers from one cache that holds what they need."""
    import gatedlens as gl

    needed = [f"blocks.{n}.mixer.{name}" for n in range(24) for name in model.blocks[n].mixer.attention_points]
    _, cache = model.run_with_cache(_tokens(256), names_filter=needed)
    return [gl.implicit_attention(cache, layer=n).mean() for n in range(24)]


MEASURED: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    **{f"mean, pos {n}": (lambda n=n: attention(n), lambda A: A.mean()) for n in (64, 256, 512, 1024, 2048)},
    "row(-1), pos 4096": (lambda: attention(4096), lambda A: A.row(-1)),
    "abs_mean, pos 512": (lambda: attention(512), lambda A: A.abs_mean()),
    "ours, pos 64": (lambda: _cached(64), _ours),
    "TransformerLens, pos 64": (lambda: transformer_lens(_cached(64)), lambda formula: formula()),
    "means of 24 layers, pos 256": (lambda: _model(num_hidden_layers=24, vocab_size=50280), _every_layer),
}


def cpu(what: str) -> float:
    prepare, function = MEASURED[what]
    made, times = prepare(), []
    for _ in range(1 if "24 layers" in what else 3):
        began = time.process_time()
        function(made)
        times.append(time.process_time() - began)
    return statistics.median(times)


def memory(what: str) -> float:
    prepare, function = MEASURED[what]

    def trimmed() -> Any:
        made = prepare()
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what preparing left free would hide what the function takes
        return made

    return growth(trimmed, function)


def _plain_scan(A: Any) -> Callable[[], Tensor]:
    """The forward's scan, conv and gate on the same tensors: what `@ x` is compared with."""
    import torch.nn.functional as F

    from gatedlens.recurrence import ChannelTerms
    from gatedlens.recurrence.scanning import scan

    f = A.factors
    dt, start = f.scan.amount, f.x.new_zeros(1, f.x.shape[2], f.scan.rate.shape[1])
    terms = ChannelTerms(dt, amount=dt, key=f.scan.key, read=f.scan.read, rate=f.scan.rate)

    def run() -> Tensor:
        c = F.conv1d(F.pad(f.x.mT, (f.taps.shape[1] - 1, 0)), f.taps.unsqueeze(1), groups=len(f.taps)).mT
        u = F.silu(c)
        return (scan(*terms.steps(u), start)[0] + u * f.skip) * f.gate

    return run


def ratios() -> dict[str, dict[str, float]]:
    found = {}
    A = attention(256)
    wanted = direct(A)
    error = (A.mean() - wanted).abs().max() / wanted.abs().max()
    assert error < 1e-4, error
    found["mean(), pos 256, against the direct chunked sum"] = {
        **medians({"ours": A.mean}, repeats=7),
        **medians({"theirs": lambda: direct(A)}, repeats=1, warmup=0),
    }
    cache = _cached(64)
    formula = transformer_lens(cache)
    import gatedlens as gl

    S = gl.implicit_attention(cache, layer=0).only("scan").mean()
    assert (S - formula()).abs().max() < 1e-4 * S.abs().max()
    runs = {"ours": lambda: _ours(cache), "theirs": formula}
    found["mean(), pos 64, against TransformerLens's compute_effective_attention"] = medians(runs, repeats=3)
    A = attention(1024)
    runs = {"ours": lambda: A @ A.factors.x, "theirs": _plain_scan(A)}
    found["A @ x, pos 1024, against the plain scan"] = medians(runs, repeats=7)
    return found


def bounds() -> dict[str, float]:
    """GFLOP/s of a matrix product of mean()'s shape and of a large one; ns of an exponential, in cache."""
    left, right, square = torch.rand(512, 1024), torch.rand(515, 1024), torch.rand(2048, 2048)
    x, y = -torch.rand(1 << 17), torch.empty(1 << 17)
    runs = {
        "blocks": lambda: left @ right.T,
        "large": lambda: square @ square,
        "exp": lambda: [torch.exp(x, out=y) for _ in range(100)],
    }
    seconds = medians(runs, repeats=15)
    rates = {"GFLOP/s, 512 x 1024 x 515": 2 * 512 * 1024 * 515, "GFLOP/s, 2048 x 2048 x 2048": 2 * 2048**3}
    return {
        **{
            name: work / seconds[key] / 1e9
            for (name, work), key in zip(rates.items(), ("blocks", "large"), strict=True)
        },
        "ns an exponential": seconds["exp"] / 100 / x.numel() * 1e9,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    commands: dict[str, Callable[..., Any]] = {"ratios": ratios, "cpu": cpu, "memory": memory, "bounds": bounds}
    with torch.no_grad():
        print(json.dumps(commands[sys.argv[1]](*sys.argv[2:])))

"""Every picture at every size that users have: `python -m tests.plot.gallery FOLDER [WORD]` draws those with it in the name.

Numbers are made up, sizes are not: 2, 24 and 64 layers, 8, 60 and 300 tokens, 14 x 14 patches.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import gatedlens as gl
from gatedlens.circuits import Circuit
from gatedlens.evaluation.curves import AXES, Curve
from gatedlens.plot import results

LAYERS, LENGTHS = (2, 24, 64), (8, 60, 300)
WORDS = "It was the whiteness of the whale that above all things app alled me , and\n yet".split(" ")  # noqa: SIM905


def tokens(n: int) -> list[str]:
    return ["<bos>", *(f" {WORDS[i % len(WORDS)]}" for i in range(n - 1))][:n]


def attention(n: int, seed: int = 0) -> torch.Tensor:
    """Something like a layer's: signed, decaying, with a few far reads."""
    random = torch.Generator().manual_seed(seed)
    near = torch.arange(n)
    weights = torch.exp(-(near[:, None] - near[None, :]).abs() / (3 + seed % 5)) * torch.rand(n, n, generator=random)
    weights[n // 2, n // 3] = -0.8
    return (weights * 3.0 ** -(seed % 4)).tril()


def sweep(*shape: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random) * torch.rand(shape, generator=random) ** 4


def circuit(layers: int, edges: int | None) -> Circuit:
    names = ["embed", *(f"{i}.{kind}" for i in range(layers) for kind in ("mixer", "mlp")), "logits"]
    n = len(names) - 1
    values = sweep(n, n).masked_fill(~torch.ones(n, n, dtype=torch.bool).triu(), torch.nan)
    whole = Circuit.of(gl.Result(values, ("sender", "receiver"), {"sender": names[:-1], "receiver": names[1:]}, "EAP"))
    return whole if edges is None else whole.top(edges)


def grid(side: int) -> Any:
    return gl.HookedViM.tiny(img_size=4 * side).grid


def at_token(n: int) -> dict[str, list[str]]:
    return {"pos": tokens(n)}


def by_length(n: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    yield f"heatmap-{n}", lambda: gl.plot.heatmap(attention(n), tokens(n), value="|attention| (mean over channels)")
    yield f"text-{n}", lambda: gl.plot.text(sweep(n), tokens(n), "lrp of mamba-130m")
    yield f"bars-{n}", lambda: gl.Result(sweep(n), ("pos",), at_token(n), "Occlusion", "logit difference").plot()
    yield f"activation-{n}", lambda: activation(n)


def by_layer_and_length(k: int, n: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    def result(values: torch.Tensor, title: str, value: str, **facts: Any) -> gl.Result:
        return gl.Result(values, ("layer", "pos", "head")[: values.ndim], at_token(n), title, value, facts)

    score = "logit difference (corrupted 0, clean 1)"
    ranks = torch.linspace(11, 0, k).exp().sub(1).round()[:, None].expand(k, n).contiguous()
    words = [tokens(n)[i % 3 :] + tokens(n)[: i % 3] for i in range(k)]
    likeliest = "Logit lens: probability of the likeliest token"
    yield f"layers-{k}x{n}", lambda: gl.plot.layers({i: attention(n, i) for i in range(k)}, tokens(n))
    yield (
        f"sweep-{k}x{n}",
        lambda: result(sweep(k, n), "Patching blocks.*.hook_resid_pre of mamba-130m-hf", score).plot(),
    )
    yield f"ranks-{k}x{n}", lambda: result(ranks, "Logit lens: rank of ' whale'", "rank", scale="log").plot()
    yield f"lens-{k}x{n}", lambda: results.words(result(torch.rand(k, n), likeliest, "probability"), words)
    for heads in (4, 16):
        yield (
            f"by-head-{k}x{n}x{heads}",
            lambda heads=heads: result(sweep(k, n, heads), "Patching hook_scan by head", score).plot(),
        )


def by_layer(k: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    at_one = gl.Result(sweep(k, 1), ("layer", "pos"), {"pos": ["?"]}, "Patching at one position", "score")
    names = ["embed", *(f"{i}_{kind}_out" for i in range(k) for kind in ("mixer", "mlp"))]
    shares = gl.Result(
        sweep(len(names)), ("component",), {"component": names}, "Direct logit attribution", "logit difference"
    )
    yield f"one-row-{k}", at_one.plot
    yield f"components-{k}", shares.plot
    for edges in (8, 40, None):
        yield f"circuit-{k}-{edges or 'all'}", lambda edges=edges: circuit(k, edges).plot()


def by_side(side: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    image = torch.linspace(-1, 1, 4 * side).outer(torch.linspace(0, 1, 4 * side)).expand(3, -1, -1)
    places = [f"{i},{j}" for i in range(side) for j in range(side)]
    said = "a long title of an image, read as a whale (97%), or what else it is"
    yield f"over-image-{side}", lambda: gl.plot.over_image(sweep(side, side), image, grid(side), value="relevance")
    yield f"image-{side}", lambda: gl.plot.image(image, said)
    yield f"patches-{side}", lambda: gl.plot.heatmap(attention(side * side), places)


def others() -> Iterator[tuple[str, Callable[[], Any]]]:
    long = {i: attention(300, i) for i in range(2)}
    three = {i: attention(8, i) for i in range(3)}
    steps = {"share": [i / 10 for i in range(1, 10)]}
    curve = Curve(torch.rand(20, 9), AXES, steps, "lrp, positive perturbation", "probability of the class")
    yield "layers-one-scale", lambda: gl.plot.layers(three, tokens(8), one_scale=True)
    yield "layers-some-pos", lambda: gl.plot.layers(long, tokens(300), pos=slice(-20, None))
    yield "text-some-pos", lambda: gl.plot.text(sweep(300), tokens(300), pos=slice(100, 140))
    for heads in (4, 16, 64):
        many = torch.stack([attention(24, i) for i in range(heads)])
        yield f"heads-{heads}", lambda many=many: gl.plot.heads(many, tokens(24))
    yield "curve", curve.plot
    yield "one-cell", lambda: gl.Result(torch.tensor([[0.5]]), ("layer", "pos"), title="One", value="score").plot()
    tiny = gl.Result(-torch.rand(2, 8) * 3e-7, ("layer", "pos"), title="Tiny", value="score")
    yield "tiny-numbers", tiny.plot


def pictures() -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, what draws it)"""
    for n in LENGTHS:
        yield from by_length(n)
        for k in LAYERS:
            yield from by_layer_and_length(k, n)
    for k in LAYERS:
        yield from by_layer(k)
    for side in (3, 14):
        yield from by_side(side)
    yield from others()


def activation(n: int) -> Any:
    model = gl.HookedMamba.tiny()
    _, cache = model.run_with_cache(torch.arange(n)[None] % 20, names_filter="blocks.1.mixer.hook_decay")
    return gl.plot.activation(cache, ("decay", 1), tokens(n))


def save(figure: Any, stem: Path) -> None:
    if isinstance(figure, gl.plot.Html):
        figure.save(stem.with_suffix(".html"))
    else:
        figure.savefig(stem.with_suffix(".png"), dpi=100)


if __name__ == "__main__":
    folder, word = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in pictures():
        if word in name:
            save(draw(), folder / name)
